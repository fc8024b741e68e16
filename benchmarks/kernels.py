"""Every op of msn_ext.ops against its eager PyTorch equivalent, with cold caches.

    python benchmarks/kernels.py                     # the CPU or GPU that is there, under 5 minutes
    python benchmarks/kernels.py --quick --ops verify_tree commit_kv --json out.json

One sequence (B = 1), one layer for tree_attention, all layers for commit_kv. Before every repeat a
buffer of twice the last-level cache is overwritten, as a model's forward pass would do between two
steps; times are medians with quartiles. The equivalents are vectorised PyTorch, get whatever they
can prepare once per tree or step (attention mask, ancestor matrix, sliced prefix) for free, and
must agree with the op before anything is timed. "sdpa" is F.scaled_dot_product_attention with that
mask, with enable_gqa or repeat_interleave, whichever is faster (the column says which).

Bytes are what an op must move at least, each tensor once (the ``bytes`` of each case below); GB/s
is bytes / median; "of copy" is its share of the bandwidth of a large Tensor.copy_ measured in the
same run. On CUDA a call is recorded as a CUDA graph, so that no launch is waited for, and timed
with CUDA events around its replay (what cannot be recorded is timed as it is called);
FlexAttention, compiled, with a block mask is timed there for the largest contexts.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import copy_bandwidth, last_level_cache
from plot import times

import msn_ext
from msn_ext import Corpus, ops
from msn_ext.ops import reference


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int
    dtype: torch.dtype


MODELS = {
    "cpu": [Model("SmolLM2-135M", 9, 3, 64, 30, 49152, torch.float32)],
    "cuda": [
        Model("SmolLM2-135M", 9, 3, 64, 30, 49152, torch.bfloat16),
        Model("Llama-3-8B", 32, 8, 128, 32, 128256, torch.bfloat16),
    ],
}
NODES = [1, 8, 16, 64, 69]
CONTEXTS = {"cpu": [256, 1024, 4096], "cuda": [1024, 4096, 16384]}
LONG = 100_000  # tokens; what drafting costs must not depend on it
CORPUS = 4_000_000  # tokens of a corpus that drafting looks into
RANKS, RETRIEVED, MAX_NGRAM = 10, 5, 3


@dataclasses.dataclass
class Case:
    """One op at one size; its calls hold while the generator that made it stays here."""

    size: str
    bytes: int
    run: Callable
    eager: Callable | None = None  # none: what is sequential has no vectorised equivalent
    others: dict[str, Callable] = dataclasses.field(default_factory=dict)
    check: Callable = torch.testing.assert_close  # called with what run and an equivalent returned


# ---- the eager equivalents -----------------------------------------------------------------------


def ancestor_matrix(parents):
    """bool [N, N], by squaring the one-step matrix; dead nodes have empty rows."""
    n = parents.shape[0]
    nodes = torch.arange(n, device=parents.device)
    reach = (parents[:, None] == nodes) | (nodes[:, None] == nodes)
    for _ in range((n - 1).bit_length()):
        reach = (reach.float() @ reach.float()) > 0
    return reach & reach[:, :1]


def tree_ancestors(parents):
    reach = ancestor_matrix(parents)
    words = (parents.shape[0] + 63) // 64
    bits = F.pad(reach, (0, 64 * words - reach.shape[1])).view(-1, words, 64).long()
    packed = (bits << torch.arange(64, device=parents.device)).sum(-1)
    return packed, (reach.sum(-1) - 1).int()


def attention(q, k, v, mask):
    """Matrix product, softmax, matrix product; the query heads of a group side by side, nothing
    repeated.
    """
    batch, heads, n, dim = q.shape
    kv_heads = k.shape[1]
    scores = q.reshape(batch, kv_heads, -1, dim) @ k.transpose(-1, -2) * dim**-0.5
    scores = scores.view(batch, heads, n, -1).masked_fill(~mask, -torch.inf)
    weights = scores.float().softmax(-1).to(q.dtype).view(batch, kv_heads, -1, k.shape[2])
    return (weights @ v).view(batch, heads, n, -1).transpose(1, 2)


def sdpa_gqa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def sdpa_repeat(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, mask):
    """FlexAttention with the tree's mask; made here, called often."""
    from torch.nn.attention.flex_attention import create_block_mask

    seen = mask.contiguous()
    blocks = create_block_mask(
        lambda b, h, i, j: seen[i, j], None, None, q.shape[2], k.shape[2], device=q.device
    )
    return lambda: compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)


def verify_tree(tokens, targets, parents, reach):
    """``reach`` is the ancestor matrix of the tree."""
    batch, n = tokens.shape
    nodes = torch.arange(n, device=tokens.device)
    agrees = tokens == targets.gather(1, parents.long().clamp(min=0).expand(batch, n))
    agrees[:, 0] = True
    depth = reach.sum(-1) - 1
    accepted = (agrees[:, None, :] | ~reach).all(-1) & reach[:, 0]
    end = torch.where(accepted, depth * n + (n - 1 - nodes), -1).argmax(-1)
    below = reach[:, end].T
    deepest = torch.where(below, depth * n + (n - 1 - nodes), -1).argmax(-1)

    def by_depth(members, first):
        """Node indices of a set that lies on one path, ``first`` at place 0, then -1."""
        place = torch.where(members, depth - first[:, None], n)
        return tokens.new_full((batch, n + 1), -1).scatter_(1, place, nodes.expand(batch, n))[:, :n]

    accept_length = depth[end] + 1
    path = by_depth(reach[end], torch.zeros_like(end))
    continuation = by_depth(reach[deepest] & ~reach[end], accept_length)
    return accept_length, path, targets.gather(1, end[:, None])[:, 0], continuation


def commit_kv(caches, lengths, path, accept_length):
    """B = 1; reads the accept length back, so that it moves no more than it must."""
    start, kept = int(lengths), int(accept_length)
    slots = start + path[0, :kept]
    for cache in caches:
        cache[:, :, start : start + kept] = cache[:, :, slots]


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


# ---- the cases: inputs, bytes
# ---------------------------------------------------------------------


def random_tree(nodes: int, device: str) -> torch.Tensor:
    """Parents of a tree about as deep and as wide as the paper's."""
    rng = random.Random(nodes)
    return torch.tensor(
        [-1, *(rng.randrange(i // 3, i) for i in range(1, nodes))], dtype=torch.int32, device=device
    )


def ancestors_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """4 N read (parents); 8 N W + 4 N written (bits, depth)."""
    for n in nodes:
        parents = random_tree(n, device)
        words = (n + 63) // 64
        yield Case(
            f"N={n}",
            4 * n + 8 * n * words + 4 * n,
            lambda: ops.tree_ancestors(parents, validate=False),
            lambda: tree_ancestors(parents),
        )


def attention_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """2 H_kv (length + N) D read (keys and values, once each), 2 H N D (queries, output), of the
    dtype.
    """
    for context in contexts:
        for n in nodes:
            shape = (1, model.kv_heads, context + n + 64, model.head_size)
            k, v = (torch.randn(shape, device=device).to(model.dtype) for _ in range(2))
            q = torch.randn(1, model.heads, n, model.head_size, device=device).to(model.dtype)
            parents = random_tree(n, device)
            ancestors, _ = ops.tree_ancestors(parents)
            lengths = torch.tensor([context], device=device)
            mask = F.pad(ancestor_matrix(parents), (context, 0), value=True)
            k_seen, v_seen = k[:, :, : context + n], v[:, :, : context + n]
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[model.dtype]
            others = {
                "sdpa enable_gqa": lambda: sdpa_gqa(q, k_seen, v_seen, mask),
                "sdpa repeat_interleave": lambda: sdpa_repeat(q, k_seen, v_seen, mask),
            }
            if device == "cuda" and context == contexts[-1] and n in (1, 64):
                others["FlexAttention"] = flex(q, k_seen, v_seen, mask)
            elements = 2 * model.kv_heads * (context + n) + 2 * model.heads * n
            yield Case(
                f"N={n} context={context}",
                elements * model.head_size * model.dtype.itemsize,
                lambda: ops.tree_attention(q, k, v, lengths, ancestors),
                lambda: attention(q, k_seen, v_seen, mask),
                others,
                lambda got, expected: torch.testing.assert_close(
                    got, expected, rtol=tolerance, atol=tolerance
                ),
            )


def verify_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """20 N read (tokens, targets, parents); 16 N + 16 written (path, continuation, accept length,
    bonus).
    """
    for n in nodes:
        parents = random_tree(n, device)
        reach = ancestor_matrix(parents)
        generator = torch.Generator().manual_seed(n)
        tokens, targets = (
            torch.randint(2, (1, n), generator=generator).to(device) for _ in range(2)
        )
        yield Case(
            f"N={n}",
            36 * n + 16,
            lambda: ops.verify_tree(tokens, targets, parents),
            lambda: verify_tree(tokens, targets, parents, reach),
        )


def logits_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """The logits and 12 N read (tokens, parents); 56 N + 16 written (guesses, target, path,
    continuation, …).
    """
    for n in nodes:
        parents = random_tree(n, device)
        reach = ancestor_matrix(parents)
        generator = torch.Generator().manual_seed(n)
        logits = torch.randn(1, n, model.vocabulary, generator=generator).to(device, model.dtype)
        tokens = torch.randint(2, (1, n), generator=generator).to(device)

        def parts():
            guesses = top_guesses(logits)
            targets = logits.argmax(-1)
            return guesses, targets, *verify_tree(tokens, targets, parents, reach)

        yield Case(
            f"N={n}",
            n * model.vocabulary * model.dtype.itemsize + 68 * n + 16,
            lambda: ops.verify_logits(logits, tokens, parents),
            parts,
            check=lambda got, expected: torch.testing.assert_close(
                got[1:], expected[1:]
            ),  # of guesses, equals may swap
        )


def commit_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """Keys and values of all layers: 2 x 2 layers H_kv D of the dtype, read and written, per moved
    node.
    """
    context = contexts[len(contexts) // 2]
    for n in nodes:
        kept = min(4, n)
        path = torch.full((1, n), -1, dtype=torch.int64, device=device)
        path[0, :kept] = torch.linspace(0, n - 1, kept).long().to(device)
        moved = int((path[0, :kept] != torch.arange(kept, device=device)).sum())
        shape = (1, model.kv_heads, context + n, model.head_size)
        caches = [
            torch.randn(shape, device=device).to(model.dtype) for _ in range(2 * model.layers)
        ]
        lengths, accepted = (
            torch.tensor([context], device=device),
            torch.tensor([kept], device=device),
        )

        def committed(commit):
            """What a commit makes of copies of the tree's slots."""
            tails = [cache[:, :, context - 1 :].clone() for cache in caches]
            commit(tails, torch.ones_like(lengths), path, accepted)
            return tails

        yield Case(
            f"N={n} context={context} layers={model.layers}",
            4 * model.layers * model.kv_heads * model.head_size * model.dtype.itemsize * moved
            + 8 * kept,
            lambda: ops.commit_kv(caches, lengths, path, accepted),
            lambda: commit_kv(caches, lengths, path, accepted),
            check=lambda *_: torch.testing.assert_close(
                committed(ops.commit_kv), committed(commit_kv), rtol=0, atol=0
            ),
        )


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


def top_guesses(logits):
    """Ties and NaN apart, the same."""
    best = logits.float().topk(reference.GUESSES, dim=-1)
    edges = torch.tensor(reference.EDGES, device=logits.device)
    levels = torch.bucketize(best.values.softmax(-1), edges, right=True)
    return (best.indices * 16 + levels).int()


def guesses_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """N V read, of the dtype; 32 N written."""
    for n in nodes:
        generator = torch.Generator().manual_seed(n)
        logits = torch.randn(n, model.vocabulary, generator=generator)
        logits[:, 100:200] += (
            torch.rand(n, 100, generator=generator).cumsum(1) / 4
        )  # without ties at the top
        logits = logits.to(device, model.dtype)
        yield Case(
            f"N={n}",
            n * model.vocabulary * model.dtype.itemsize + 32 * n,
            lambda: ops.top_guesses(logits),
            lambda: top_guesses(logits),
            check=lambda got, expected: (
                torch.testing.assert_close(got[:, :3] >> 4, expected[:, :3] >> 4)
                if model.dtype == torch.float32
                else None
            ),
        )


class Knowledge:
    """The tables of best-first drafting behind a text of ``context`` tokens, a Markov chain that
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
        self.heads = torch.zeros(
            1, 8, min(1 << (context - 1).bit_length(), 1 << 17), dtype=torch.int32, device=device
        )
        ops.index_suffixes(self.heads, self.history, torch.zeros_like(self.lengths), self.lengths)
        self.contexts = torch.zeros(3, 1 << 16, 9, dtype=torch.int32, device=device)
        logits = torch.randn(1, 256, 1500, generator=generator).mul(3)
        self.guesses = ops.top_guesses(logits.to(device))
        self.chain = torch.arange(-1, 255, dtype=torch.int32, device=device)
        for start in range(
            max(0, context - 2048), context - 256, 256
        ):  # what a model said along the text
            tokens = self.history[:, start : start + 256].contiguous()
            path = torch.arange(256, device=device)[None]
            ops.remember_guesses(
                self.contexts,
                self.history,
                torch.full_like(self.lengths, start + 1),
                tokens,
                self.chain,
                path,
                self.guesses,
            )
        self.denoised = self.guesses[:, :6].contiguous()
        self.factors = (
            torch.rand(reference.FACTORS, generator=generator, dtype=torch.float64)
            .mul(9)
            .add(0.1)
            .to(device)
        )
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
            lambda: ops.index_suffixes(known.heads, known.history, start, known.lengths),
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
                known.contexts, known.history, known.lengths, tokens, parents, path, guesses
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
                    known.contexts,
                    known.heads,
                    *known.corpus,
                    known.factors,
                    n,
                    20,
                    0.05,
                ),
            )


def noise_cases(model: Model, nodes: list[int], contexts: list[int], device: str) -> Iterator[Case]:
    """32 samples of 1024 tokens, half of them responses: 16 bytes a token read (ids, labels)."""
    samples, tokens = 32, 1024
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary, (samples, tokens), generator=generator).to(device)
    labels = ids.masked_fill(torch.arange(tokens, device=device) < tokens // 2, -100)
    rows = torch.arange(samples, device=device)
    documents = torch.stack([rows, rows * 0, rows * 0 + tokens], 1)
    keep = torch.tensor([2], device=device)
    for segments in (1, 24):
        starts = torch.full((samples, segments), -1, device=device)
        yield Case(
            f"tokens={samples * tokens} segments={segments}",
            16 * samples * tokens + 40 * samples * segments,
            lambda: ops.draw_noise(ids, labels, documents, keep, starts, 0, 4, apart=segments == 1),
        )


CASES = {
    "tree_ancestors": ancestors_cases,
    "tree_attention": attention_cases,
    "verify_tree": verify_cases,
    "verify_logits": logits_cases,
    "commit_kv": commit_cases,
    "lookup_ngram": lookup_cases,
    "fill_tree": fill_cases,
    "top_guesses": guesses_cases,
    "index_suffixes": index_cases,
    "remember_guesses": remember_cases,
    "draft_tree": draft_cases,
    "draw_noise": noise_cases,
}


# ---- measuring
# ------------------------------------------------------------------------------------


class Timer:
    """Seconds per call with cold caches."""

    def __init__(self, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.flushed = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable) -> list[float]:
        for _ in range(2):
            call()
        if self.device == "cuda":
            call = self._recorded(call)
        return [self._once(call) for _ in range(self.repeats)]

    def _recorded(self, call: Callable) -> Callable:
        """The replay of a graph of the call; the call itself where it asks the device, which a
        graph cannot.
        """
        stream, recording = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(recording, stream=stream):
                call()
        except RuntimeError:
            return call
        return recording.replay

    def _once(self, call: Callable) -> float:
        self.flushed.add_(1)
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def measure(op: str, model: Model, case: Case, timer: Timer, bandwidth: float) -> dict:
    for equivalent in filter(None, (case.eager, *case.others.values())):
        case.check(case.run(), equivalent())
    times = timer(case.run)
    lower, median, upper = statistics.quantiles(times, n=4)
    eager = statistics.median(timer(case.eager)) if case.eager else None
    others = {name: statistics.median(timer(call)) for name, call in case.others.items()}
    best = min(others, key=others.get, default=None)
    return {
        "op": op,
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "size": case.size,
        "seconds": median,
        "seconds_quartiles": [lower, upper],
        "bytes": case.bytes,
        "bytes_per_second": case.bytes / median,
        "share_of_copy": case.bytes / median / bandwidth,
        "eager_seconds": eager,
        "eager_ratio": eager / median if eager else None,
        "other": best,
        "other_seconds": others.get(best),
        "other_ratio": others[best] / median if best else None,
    }


# ---- reporting
# ------------------------------------------------------------------------------------


def git_commit() -> str:
    """The checkout's commit; "unknown" outside one."""
    describe = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(device: str, bandwidth: float) -> dict:
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "msn_ext": msn_ext.build_info(),
        "copy_bytes_per_second": bandwidth,
        "last_level_cache_bytes": last_level_cache(device),
    }


HEADER = (
    "op, model, size, µs, quartiles, KB, GB/s, of copy, eager µs, ×, other µs, ×, other"
).split(", ")


def table_row(row: dict) -> list[str]:
    lower, upper = row["seconds_quartiles"]
    other = [""] * 3
    if row["other"]:
        other = [f"{row['other_seconds'] * 1e6:.1f}", f"{row['other_ratio']:.2f}", row["other"]]
    return [
        row["op"],
        row["model"],
        row["size"],
        f"{row['seconds'] * 1e6:.1f}",
        f"{lower * 1e6:.1f}-{upper * 1e6:.1f}",
        f"{row['bytes'] / 1e3:.1f}",
        f"{row['bytes_per_second'] / 1e9:.2f}",
        f"{row['share_of_copy']:.0%}",
        f"{row['eager_seconds'] * 1e6:.1f}" if row["eager_seconds"] else "",
        f"{row['eager_ratio']:.2f}" if row["eager_ratio"] else "",
        *other,
    ]


def print_table(rows: list[dict]) -> None:
    cells = [HEADER, *map(table_row, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    text_columns = {0, 1, 2, 12}
    for line in cells:
        aligned = (
            c.ljust(w) if i in text_columns else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths))
        )
        print("  ".join(aligned).rstrip())


def picture(about: dict, rows: list[dict]) -> str:
    """Every case's time, next to what its bytes would take to be copied, and to its equivalents."""
    lines = []
    for row in rows:
        copied = row["bytes"] / about["copy_bytes_per_second"]
        taken = (
            {"a copy": copied} if copied > 1e-6 else {}
        )  # less is no time that a call could take
        taken |= {"msn_ext": row["seconds"]}
        taken |= {"eager PyTorch": row["eager_seconds"]} if row["eager_seconds"] else {}
        taken |= {row["other"].split()[0]: row["other_seconds"]} if row["other"] else {}
        lines.append((f"{row['op']} {row['size']}, {row['model']}", taken))
    return times(f"Seconds of a call, cold caches; {about['device']}", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where msn_ext has its kernels"
    )
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES), metavar="OP")
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and repeats, under a minute"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write everything to FILE, and a picture beside it",
    )
    options = parser.parse_args()
    have_cuda = torch.cuda.is_available() and msn_ext.build_info()["cuda"]
    device = options.device or ("cuda" if have_cuda else "cpu")
    if device == "cuda" and not have_cuda:
        parser.error("--device cuda: no GPU, or msn_ext was built without CUDA")

    nodes, contexts = ([1, 16, 69], [256, 1024]) if options.quick else (NODES, CONTEXTS[device])
    timer = Timer(device, repeats=9 if options.quick else 101)
    bandwidth = copy_bandwidth(timer.device)
    about = environment(device, bandwidth)
    versions = f"torch {about['torch']}, msn_ext {about['msn_ext']['version']}"
    print(f"{about['device']}, {about['threads']} threads, {versions}")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s; commit {about['commit']}")
    rows = []
    for model in MODELS[device]:
        for op in options.ops:
            for case in CASES[op](model, nodes, contexts, device):
                print(
                    f"\r{op} {model.name} {case.size}".ljust(70),
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
                with torch.inference_mode():
                    rows.append(measure(op, model, case, timer, bandwidth))
    print("\r".ljust(71), end="\r", file=sys.stderr, flush=True)
    print_table(rows)
    if options.json:
        options.json.write_text(
            json.dumps({"environment": about, "results": rows}, indent=1) + "\n"
        )
        options.json.with_suffix(".svg").write_text(picture(about, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
