"""Random prompts, trees and drafters; histories and verified drafts written as lists."""

import random

import torch

from helpers.families import VOCAB, tiny_model
from msn_ext import Draft, DraftTree, Verified, generate, ops
from msn_ext.decoding import (
    BestFirst,
    Corpus,
    Habits,
)
from msn_ext.decoding.drafters.best_first import SOURCES
from msn_ext.decoding.drafters.tree import RETRIEVAL


def random_tree(rng: random.Random) -> DraftTree:
    """Any shape of up to 40 nodes; some nodes retrieve, siblings may even share a rank."""
    nodes = rng.randint(1, 40)
    parents = [-1] + [rng.choice([i - 1, rng.randrange(i)]) for i in range(1, nodes)]
    if rng.random() < 0.3:
        return DraftTree(tuple(parents))
    return DraftTree(
        tuple(parents), tuple(rng.choice([RETRIEVAL, 0, 0, 1, 2, 5]) for _ in range(nodes))
    )


class RandomDrafter:
    """A tree of its own for every row and step: padding anywhere, any token at the root, siblings
    that alias, guesses from the text (which repeats, so that many come true), and a chain after
    the prompt.
    """

    max_depth = 64

    def __init__(self, rng: random.Random):
        self._rng, self.seen = rng, []

    def start(self, batch, vocabulary, device):
        self._vocabulary = vocabulary

    def _tokens(self, history, lengths, count):
        rows = []
        for row, length in zip(history.tolist(), lengths.tolist()):
            at = [self._rng.randrange(length) for _ in range(count)]
            rows.append(
                [
                    row[i] if self._rng.random() < 0.8 else self._rng.randrange(self._vocabulary)
                    for i in at
                ]
            )
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), count)

    def first(self, history, lengths):
        return self._tokens(history, lengths, self._rng.randrange(5))

    def propose(self, history, lengths):
        nodes = self._rng.choice([1, 2, 17, 40, 64, 65])
        parents = [
            [-1] + [self._rng.choice([i - 1, self._rng.randrange(-1, i)]) for i in range(1, nodes)]
            for _ in range(len(lengths))
        ]
        return Draft.of(
            self._tokens(history, lengths, nodes), torch.tensor(parents, dtype=torch.int32)
        )

    def observe(self, verified):
        self.seen.append(verified)


def random_best_first(rng: random.Random) -> BestFirst:
    """Best-first drafting of any size from any sources, weighed anyhow."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    sources = tuple(source for source in SOURCES if rng.random() < 0.7)
    texts = [
        torch.randint(rng.choice([3, VOCAB]), (rng.choice([1, 9, 300]),), generator=generator)
        for _ in range(3)
    ]
    return BestFirst(
        habits=random_habits(rng) if "adjacency" in sources and rng.random() < 0.5 else None,
        budget=rng.choice([None, 1, 2, 5, 33, 64, 200]),
        sources=sources,
        corpus=(
            Corpus.build(texts, VOCAB, progress=False)
            if "suffix" in sources and rng.random() < 0.5
            else None
        ),
        factors=(
            None
            if rng.random() < 0.5
            else 10 ** (4 * torch.rand(348, generator=generator).double() - 2)
        ),
        max_depth=rng.choice([0, 1, 5, 20, 64]),
        foresight=rng.choice([0.0, 0.05, 1.0]),
    )


def random_habits(rng: random.Random, vocabulary: int = VOCAB) -> Habits:
    """What nobody said, after contexts of few tokens or of many."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    rows, tokens = rng.choice([1, 50, 500]), rng.choice([3, vocabulary])
    contexts = torch.randint(tokens, (rows, 3), generator=generator)
    guesses = torch.randint(vocabulary, (rows, 8), generator=generator) * 16
    guesses += torch.randint(12, (rows, 8), generator=generator)
    guesses[torch.rand(rows, 8, generator=generator) < 0.2] = -1
    return Habits.count(contexts, guesses.int(), vocabulary, rng.choice([(1, 1, 1), (1, 2, 2)]))


def prompts(rng: random.Random, batch: int, padded: bool = True):
    """Left-padded prompts of 1 to 14 tokens, and their mask."""
    length = rng.randint(1, 14)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        for b in range(1, batch):
            mask[b, : rng.randrange(length)] = 0
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    return ids.masked_fill(mask == 0, 0), mask


CPU = torch.device("cpu")


def text(*rows):
    """History [B, C] with no tokens after the texts, and lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    history = torch.full((len(rows), int(lengths.max()) + 3), -7)
    for b, row in enumerate(rows):
        history[b, : len(row)] = torch.tensor(row)
    return history, lengths


def verify(
    draft: Draft, logits: torch.Tensor, history: torch.Tensor, lengths: torch.Tensor
) -> Verified:
    targets = logits.argmax(-1)
    accepted, path, _, continuation = ops.verify_tree(draft.tokens, targets, draft.parents)
    known = targets, path, accepted, continuation, history, lengths
    return Verified(draft, lambda: logits, *known)


SETTINGS = dict(do_sample=False, max_new_tokens=48, eos_token_id=None, return_dict_in_generate=True)


def passes(draft, prompt=(5, 9, 4, 7), model=None) -> int:
    return len(
        generate(
            model or tiny_model("llama", 3), torch.tensor([prompt]), draft=draft, **SETTINGS
        ).accept_lengths[0]
    )
