"""The ops that draft."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from msn_ext import Corpus, ops

from .common import Case, Model, random_tree

LONG = 100_000  # tokens; what drafting costs must not depend on it
CORPUS = 4_000_000  # tokens of a corpus that drafting looks into
RANKS, RETRIEVED, MAX_NGRAM = 10, 5, 3


# ---- the eager equivalents -----------------------------------------------------------------------


def lookup_ngram(history, lengths, max_ngram, length):
    capacity = history.shape[1]
    ends = torch.arange(capacity, device=history.device)
    back = torch.arange(1, max_ngram + 1, device=history.device)[:, None]
    suffix = history.gather(1, (lengths[:, None] - back.T).clamp(min=0))
    same = (history[:, (ends - back).clamp(min=0)] == suffix[:, :, None]) & (ends >= back)
    sizes = same.cumprod(1).sum(1) * (ends < lengths[:, None])
    key, _ = (sizes * capacity + ends).max(-1)
    matched = key // capacity
    at = key[:, None] % capacity + torch.arange(length, device=history.device)
    tokens = history.gather(1, at.clamp(max=capacity - 1))
    return torch.where((at < lengths[:, None]) & (matched[:, None] > 0), tokens, -1), matched


def splitmix64(x):
    def mix(x, shift):
        return x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))

    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = mix(x, 30) * (0xBF58476D1CE4E5B9 - 2**64)
    x = mix(x, 27) * (0x94D049BB133111EB - 2**64)
    return mix(x, 31)


def fill_tree(candidates, retrieved, history, lengths, depth, rank, seed):
    batch, depths, ranks = candidates.shape
    n = rank.shape[0]
    depth, row = depth.long().expand(batch, n), torch.arange(batch, device=history.device)[:, None]
    nodes = torch.arange(n, device=history.device)
    place = (depth - 1).clamp(min=0)
    table = torch.cat(
        [F.pad(retrieved, (0, depths - retrieved.shape[1]), value=-1)[..., None], candidates], -1
    )
    tokens = table.flatten(1).gather(1, place.clamp(max=depths - 1) * (ranks + 1) + rank.long() + 1)
    tokens = torch.where(depth <= depths, tokens, -1)
    bits = splitmix64(
        splitmix64(splitmix64(seed ^ splitmix64(row)) ^ (lengths[:, None] + depth)) ^ nodes
    )
    noise = history.gather(1, ((bits >> 1) & (2**63 - 1)) % lengths[:, None])
    tokens = torch.where(tokens >= 0, tokens, noise)
    return torch.where(depth > 0, tokens, history.gather(1, lengths[:, None] - 1))


@functools.cache
def edges_on(device):
    return torch.tensor(ops.EDGES, device=device)  # waits for a GPU


def top_guesses(logits):
    """The same but for ties and NaN."""
    best = logits.float().topk(ops.GUESSES, dim=-1)
    levels = torch.bucketize(best.values.softmax(-1), edges_on(logits.device), right=True)
    return (best.indices * 16 + levels).int()


# ---- the cases: inputs, bytes --------------------------------------------------------------------


def lookup_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """8 length read (the text); 8 (R + 1) written (tokens, matched)."""
    for context in contexts:
        generator = torch.Generator().manual_seed(context)
        history = torch.randint(model.vocabulary, (1, context + 64), generator=generator)
        history[0, context // 3 : context // 3 + 2] = history[0, context - 2 : context]
        history, lengths = history.to(device), torch.tensor([context], device=device)
        yield Case(
            f"context={context}",
            8 * context + 8 * (RETRIEVED + 1),
            lambda: ops.lookup_ngram(history, lengths, MAX_NGRAM, RETRIEVED),
            lambda: lookup_ngram(history, lengths, MAX_NGRAM, RETRIEVED),
        )


def fill_cases(model: Model, nodes: list[int], contexts: list[int], device: str) -> Iterator[Case]:
    """16 N read (candidate or noise, depth, rank); 8 N written."""
    context = contexts[len(contexts) // 2]
    for n in nodes:
        generator = torch.Generator().manual_seed(n)
        _, depth = ops.tree_ancestors(random_tree(n, device))
        candidates = torch.randint(model.vocabulary, (1, 5, RANKS), generator=generator).to(device)
        candidates[:, 3:] = -1
        retrieved = torch.randint(model.vocabulary, (1, RETRIEVED), generator=generator).to(device)
        history = torch.randint(model.vocabulary, (1, context), generator=generator).to(device)
        rank = torch.randint(-1, RANKS, (n,), generator=generator, dtype=torch.int32).to(device)
        lengths, seed = torch.tensor([context], device=device), torch.tensor([7], device=device)
        yield Case(
            f"N={n}",
            24 * n,
            lambda: ops.fill_tree(candidates, retrieved, history, lengths, depth, rank, seed),
            lambda: fill_tree(candidates, retrieved, history, lengths, depth, rank, seed),
        )


def guesses_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """N V read, of the dtype; 32 N written."""
    for n in nodes:
        generator = torch.Generator().manual_seed(n)
        logits = torch.randn(n, model.vocabulary, generator=generator)
        # Without ties at the top.
        logits[:, 100:200] += torch.rand(n, 100, generator=generator).cumsum(1) / 4
        logits = logits.to(device, model.dtype)
        yield Case(
            f"N={n}",
            n * model.vocabulary * model.dtype.itemsize + 32 * n,
            lambda: ops.top_guesses(logits),
            lambda: top_guesses(logits),
            # Equals may swap: what is compared is how likely they are.
            check=lambda got, expected: torch.testing.assert_close(
                logits.gather(1, got.long() >> 4), logits.gather(1, expected.long() >> 4)
            ),
        )


class Knowledge:
    """The tables of best-first drafting after a text of ``context`` tokens, a Markov chain that
    repeats itself, and of a corpus of ``corpus`` tokens of the same chain.
    """

    def __init__(self, model: Model, context: int, device: str, corpus: int = 0):
        generator = torch.Generator().manual_seed(context)
        follows = (
            torch.randint(model.vocabulary, (model.vocabulary, 4), generator=generator)
            .remainder(1500)
            .tolist()
        )

        def walk(length: int) -> list[int]:
            text = [1]
            for draw in torch.randint(4, (length,), generator=generator).tolist()[1:]:
                text.append(follows[text[-1]][draw])
            return text

        text = walk(context + 64)
        self.history = torch.tensor([text], device=device)
        self.lengths = torch.tensor([context], device=device)
        self.suffixes = torch.zeros(
            1, 8, min(1 << (context - 1).bit_length(), 1 << 17), dtype=torch.int32, device=device
        )
        ops.index_suffixes(
            self.suffixes, self.history, torch.zeros_like(self.lengths), self.lengths
        )
        self.adjacency = torch.zeros(3, 1 << 16, 9, dtype=torch.int32, device=device)
        logits = torch.randn(1, 256, 1500, generator=generator).mul(3)
        self.guesses = ops.top_guesses(logits.to(device))
        self.chain = torch.arange(-1, 255, dtype=torch.int32, device=device)
        # What a model said along the text.
        for start in range(max(0, context - 2048), context - 256, 256):
            tokens = self.history[:, start : start + 256].contiguous()
            path = torch.arange(256, device=device)[None]
            ops.remember_guesses(
                self.adjacency,
                self.history,
                torch.full_like(self.lengths, start + 1),
                tokens,
                self.chain,
                path,
                self.guesses,
            )
        self.denoised = self.guesses[:, :6].contiguous()
        factors = torch.rand(ops.FACTORS, generator=generator, dtype=torch.float64)
        self.factors = factors.mul(9).add(0.1).to(device)
        nothing = torch.zeros(8, 0, dtype=torch.int32, device=device)
        self.corpus = nothing[0], nothing
        if corpus:
            self.corpus = Corpus.build([walk(corpus)], model.vocabulary, progress=False).on(device)


def index_cases(model: Model, nodes: list[int], contexts: list[int], device: str) -> Iterator[Case]:
    """Four new tokens: 8 x 20 read (the text), 4 x 8 x 4 written (slots)."""
    for context in (*contexts, LONG):
        known = Knowledge(model, context, device)
        start = known.lengths - 4
        yield Case(
            f"context={context}",
            8 * 20 + 4 * 8 * 4,
            lambda: ops.index_suffixes(known.suffixes, known.history, start, known.lengths),
        )


def remember_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """52 N read (tokens, parents, path, guesses), 3 x 36 N written."""
    known = Knowledge(model, contexts[-1], device)
    for n in nodes:
        parents, path = random_tree(n, device), torch.full((1, n), -1, device=device)
        path[0, 0] = 0
        tokens = known.history[:, :n].contiguous()
        guesses = known.guesses[:, :n].contiguous()
        yield Case(
            f"N={n}",
            52 * n + 108 * n,
            lambda: ops.remember_guesses(
                known.adjacency, known.history, known.lengths, tokens, parents, path, guesses
            ),
        )


def draft_cases(model: Model, nodes: list[int], contexts: list[int], device: str) -> Iterator[Case]:
    """24 N written; what is read depends on what is found: counted are 3 rows of 36 and 8 places of
    4 bytes a node, 8 places more with a corpus.
    """
    for context, size in ((contexts[0], 0), (LONG, 0), (contexts[0], CORPUS)):
        known = Knowledge(model, context, device, size)
        for n in nodes:
            yield Case(
                f"N={n} context={context}" + (f" corpus={size}" if size else ""),
                24 * n + (3 * 36 + (16 if size else 8) * 4) * n,
                lambda: ops.draft_tree(
                    known.history,
                    known.lengths,
                    known.denoised,
                    known.adjacency,
                    known.adjacency[:, :0],
                    known.suffixes,
                    *known.corpus,
                    known.factors,
                    n,
                    20,
                    0.05,
                ),
            )


CASES = {
    "lookup_ngram": lookup_cases,
    "fill_tree": fill_cases,
    "top_guesses": guesses_cases,
    "index_suffixes": index_cases,
    "remember_guesses": remember_cases,
    "draft_tree": draft_cases,
}
