"""Random cases of the ops that draft."""

import math
import random

import torch
from fuzz_cases import (
    FAR,
    Memory,
    check_op,
    malformed,
    random_guesses,
    random_history,
    random_logits,
    random_parents,
    random_tokens,
    random_tree,
    spoil,
)

from msn_ext import _C, ops
from msn_ext.ops import reference


def fuzz_lookup_ngram(rng: random.Random, nodes: int) -> None:
    batch, capacity = rng.randrange(4), rng.choice([1, 2, 5, 40, 1500])  # a block has 1024 threads
    history = random_history(rng, batch, capacity)
    lengths = (
        torch.full((batch,), capacity)
        if rng.random() < 0.4
        else torch.randint(0, capacity + 1, (batch,))
    )
    lengths = spoil(rng, lengths, capacity)
    max_ngram, wanted = (
        rng.choice([1, 2, 3, 5, 100 if capacity > 40 else 1 << 20]),
        rng.choice([0, 1, 5, 33, 1100]),
    )
    want = reference.lookup_ngram(history, lengths.clamp(0, capacity), max_ngram, wanted)
    check_op("lookup_ngram", rng, [history, lengths, max_ngram], want)


def fuzz_fill_tree(rng: random.Random, nodes: int) -> None:
    batch, capacity = rng.randrange(4), rng.choice([1, 5, 40])
    history = random_history(rng, batch, capacity)
    lengths = spoil(rng, torch.randint(1, capacity + 1, (batch,)), capacity)
    depth = torch.randint(
        -1, 8, (nodes,) if rng.random() < 0.3 else (batch, nodes), dtype=torch.int32
    )
    rank = torch.randint(-2, 6, (nodes,), dtype=torch.int32)
    candidates = torch.randint(-1, 9, (batch, rng.choice([0, 1, 5]), rng.choice([0, 1, 4])))
    retrieved = torch.randint(-1, 9, (batch, rng.choice([0, 1, 5])))
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    sources = candidates, retrieved, history
    want = reference.fill_tree(*sources, lengths.clamp(1, capacity), depth, rank, seed)
    check_op("fill_tree", rng, [*sources, lengths, depth, rank, seed], [want])


def fuzz_top_guesses(rng: random.Random, nodes: int) -> None:
    rows, vocabulary = (
        rng.randrange(4),
        rng.choice([rng.randrange(1, 21), 1000, 1023, 1025, 8192, 9001, 40000]),
    )
    logits = random_logits(rng, rows, vocabulary)
    want = reference.top_guesses(logits)
    memory = Memory(rng)
    placed, out = (
        memory.place(logits, free=1, unit=rng.choice([1, 8])),
        memory.place(torch.full_like(want, 77), want=want),
    )
    _C.top_guesses(placed, out, None, None)
    memory.check()


def random_suffixes(
    rng: random.Random, history: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Of the first ``lengths`` tokens; any slots may hold anything."""
    suffixes = torch.zeros(
        len(history), len(ops.SUFFIXES), rng.choice([0, 1, 7, 300]), dtype=torch.int32
    )
    if suffixes.shape[2]:
        reference.index_suffixes(suffixes, history, torch.zeros_like(lengths), lengths)
    wrong = torch.rand(suffixes.shape) < rng.choice([0.0, 0.0, 0.1, 0.9])
    anything = torch.tensor(
        [-(2**31), -1, 0, 1, 2, 7, 2**31 - 1, *lengths.tolist()], dtype=torch.int32
    )
    return torch.where(wrong, anything[torch.randint(0, len(anything), suffixes.shape)], suffixes)


def random_corpus(rng: random.Random, history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens as in the texts, with gaps between texts, and its suffixes; any slots may hold
    anything.
    """
    size = rng.choice([0, 1, 2, 30, 500])
    corpus = (
        history.flatten()[torch.randint(0, history.numel(), (size,))]
        if history.numel()
        else random_tokens(rng, size)
    )
    if rng.random() < 0.5:
        corpus = torch.arange(size).remainder(rng.choice([1, 2, 3, 7]))
    gaps = torch.rand(size) < rng.choice([0.0, 0.1, 0.5])
    corpus = corpus.masked_fill(gaps, rng.choice([-1, -(2**31)]))
    return corpus.int(), random_suffixes(rng, corpus[None], torch.tensor([size]))[0]


def random_adjacency(rng: random.Random, history: torch.Tensor) -> torch.Tensor:
    """The adjacency table that drafts after the texts of ``history`` left."""
    batch, capacity = history.shape
    adjacency = torch.zeros(
        ops.ORDERS, rng.choice([0, 1, 7, 300]), 1 + ops.GUESSES, dtype=torch.int32
    )
    for _ in range(rng.choice([0, 1, 10]) if adjacency.shape[1] else 0):
        parents = torch.tensor(random_tree(rng, 8), dtype=torch.int32)
        tokens = history[:, torch.randint(0, capacity, (8,))]
        lengths, path = torch.randint(1, capacity + 1, (batch,)), torch.full((batch, 8), -1)
        reference.remember_guesses(
            adjacency, history, lengths, tokens, parents, path, random_guesses(rng, batch, 8)
        )
    return adjacency


def fuzz_index_suffixes(rng: random.Random, nodes: int) -> None:
    batch, capacity = (
        rng.randrange(4),
        rng.choice([0, 1, 2, 16, 17, 40, 1500, 9000]),
    )  # a row of 9000 has two blocks
    history = random_history(rng, batch, capacity)
    history = history.masked_fill(
        torch.rand(history.shape) < rng.choice([0.0, 0.1]), rng.choice([-1, -(2**63)])
    )
    lengths, start = (
        spoil(rng, torch.randint(0, capacity + 1, (batch,)), capacity) for _ in range(2)
    )
    inside = lengths.clamp(0, capacity), start.clamp(0, capacity)
    # What earlier calls may have left: places before the first new one.
    suffixes = torch.rand(batch, len(ops.SUFFIXES), rng.choice([0, 1, 2, 50, 3000]))
    suffixes = (suffixes * inside[1].clamp(min=1)[:, None, None]).int()
    want, memory = suffixes.clone(), Memory(rng)
    if suffixes.shape[2]:
        reference.index_suffixes(want, history, inside[1], inside[0])
    _C.index_suffixes(
        memory.place(suffixes, want=want), *map(memory.place, (history, start, lengths))
    )
    memory.check()


def fuzz_remember_guesses(rng: random.Random, nodes: int) -> None:
    batch, capacity, slots = (
        rng.randrange(4),
        rng.choice([1, 2, 3, 20]),
        rng.choice([0, 1, 2, 50, 3000]),
    )
    history, tokens = random_history(rng, batch, capacity), random_tokens(rng, batch, nodes)
    lengths = spoil(rng, torch.randint(1, capacity + 1, (batch,)), capacity)
    bad, good = malformed(rng, random_parents(rng, batch, nodes))
    path = reference.verify_tree(tokens, random_tokens(rng, batch, nodes), good)[1]
    for _ in range(rng.choice([0, 0, 1, 20]) if batch else 0):
        path[rng.randrange(batch), rng.randrange(nodes)] = rng.choice(
            [*FAR, nodes, rng.randrange(nodes)]
        )
    guesses = torch.randint(-(2**31), 2**31 - 1, (batch, nodes, ops.GUESSES), dtype=torch.int32)
    adjacency = torch.randint(-9, 9, (ops.ORDERS, slots, 1 + ops.GUESSES), dtype=torch.int32)
    want, memory = adjacency.clone(), Memory(rng)
    if slots:
        inside = lengths.clamp(1, capacity), torch.where(path < nodes, path, -1)
        reference.remember_guesses(want, history, inside[0], tokens, good, inside[1], guesses)
    inputs = history, lengths, tokens, bad, path, guesses
    _C.remember_guesses(memory.place(adjacency, want=want), *map(memory.place, inputs))
    memory.check()


def fuzz_keep_continuation(rng: random.Random, nodes: int) -> None:
    batch, depths = rng.randrange(4), rng.choice([0, 1, 20, 300])
    guesses = torch.randint(-(2**31), 2**31 - 1, (batch, nodes, ops.GUESSES), dtype=torch.int32)
    continuation = torch.randint(-1, nodes, (batch, nodes))
    denoised = torch.randint(-9, 9, (batch, depths, ops.GUESSES), dtype=torch.int32)
    want, memory = denoised.clone(), Memory(rng)
    reference.keep_continuation(want, guesses, continuation)
    outside = torch.where(continuation < 0, rng.choice([*FAR, nodes]), continuation)
    inputs = guesses, rng.choice([continuation, outside])
    _C.keep_continuation(memory.place(denoised, want=want), *map(memory.place, inputs))
    memory.check()


def fuzz_keep_tail(rng: random.Random, nodes: int) -> None:
    batch, depths, length = rng.randrange(4), rng.choice([0, 1, 20, 300]), rng.choice([1, 2, 300])
    length = min(length, 256)
    tails = rng.choice([0, 1, (nodes - 1) // length])
    tails = min(tails, (nodes - 1) // length)
    guesses = torch.randint(-(2**31), 2**31 - 1, (batch, nodes, ops.GUESSES), dtype=torch.int32)
    continuation, path = torch.randint(-1, nodes, (2, batch, nodes))
    accepted = torch.randint(0, nodes + 1, (batch,))
    ends = torch.randint(-1, nodes, (batch, tails))
    for b, count in enumerate(accepted.tolist()):
        if tails and count and rng.random() < 0.5:
            path[b, count - 1] = ends[b, rng.randrange(tails)]
    tables = torch.randn(2, ops.FACTORS, dtype=torch.float64)
    denoised = torch.randint(-9, 9, (batch, depths, ops.GUESSES), dtype=torch.int32)
    factors = torch.randn(batch, ops.FACTORS, dtype=torch.float64)
    want, memory = (denoised.clone(), factors.clone()), Memory(rng)
    reference.keep_tail(*want, tables, guesses, continuation, path, accepted, ends, length)
    outside = torch.where(continuation < 0, rng.choice([*FAR, nodes]), continuation)
    if rng.random() < 0.5:  # none, in a row without a tail
        accepted = torch.where(accepted == 0, rng.choice([*FAR, nodes + 1]), accepted)
    seen = tables, guesses, rng.choice([continuation, outside]), path, accepted, ends
    changed = [memory.place(x, want=y) for x, y in zip((denoised, factors), want)]
    _C.keep_tail(*changed, *map(memory.place, seen), length)
    memory.check()


def fuzz_append_tails(rng: random.Random, rows: int) -> None:
    """``rows``: of the draft, tails included."""
    batch, capacity, length = rng.randrange(4), rng.choice([1, 2, 40]), rng.choice([1, 1, 2, 5])
    tails = rng.choice([0, 1, 2, 3, rng.randrange(rows)])
    tails = min(tails, (rows - 1) // length)
    nodes = rows - tails * length
    wide = nodes + rng.choice([0, 0, 5])
    trees = [random_tree(rng, wide) for _ in range(batch)]
    bad, good = malformed(rng, torch.tensor(trees, dtype=torch.int32).view(batch, wide))
    # Few values, so that many are equal; some that no probability is.
    probability = torch.randint(0, 5, (batch, wide)).double() / rng.choice([1, 3, 64])
    if rng.random() < 0.5:
        probability = probability * torch.rand(batch, wide, dtype=torch.float64)
    for special in (math.nan, math.inf, -1.0) if rng.random() < 0.2 else ():
        probability[torch.rand(batch, wide) < 0.1] = special
    history, tokens = random_history(rng, batch, capacity), random_tokens(rng, batch, wide)
    lengths = spoil(rng, torch.randint(1, capacity + 1, (batch,)), capacity)
    given, noise = (tokens, bad, probability, history), rng.choice([-1, 0, 7, 2**63 - 1])
    inside = tokens, good, probability, history, lengths.clamp(1, capacity)
    want = reference.append_tails(*inside, nodes, tails, length, noise)
    check_op("append_tails", rng, [*given, lengths, length, noise], want)


def draft_trees_of_every_size() -> None:
    """Trees of roots alone: what is asked of the device for a size is what it gives."""
    none = torch.empty(0, dtype=torch.int32)
    tables = (
        none.view(1, 0, 8),
        *2 * [none.view(3, 0, 9)],
        none.view(1, 8, 0),
        none,
        none.view(8, 0),
    )
    factors = torch.ones(ops.FACTORS, dtype=torch.float64)
    history, lengths = torch.tensor([[5]]), torch.tensor([1])
    for nodes in range(1, ops.MAX_NODES + 1):
        tokens, parents, *_ = ops.draft_tree(history, lengths, *tables, factors, nodes, 0, 0.0)
        assert (tokens == 5).all() and (parents == -1).all() and tokens.shape == (1, nodes)


def fuzz_draft_tree(rng: random.Random, nodes: int) -> None:
    batch, capacity = rng.choice([0, 1, 1, 2]), rng.choice([1, 2, 20, 100])
    history = random_history(rng, batch, capacity)
    lengths = spoil(rng, torch.randint(1, capacity + 1, (batch,)), capacity)
    inside = lengths.clamp(1, capacity)
    denoised = random_guesses(rng, batch, rng.choice([0, 1, 4, 20, 300]))
    adjacency, suffixes = random_adjacency(rng, history), random_suffixes(rng, history, inside)
    habits, corpus = random_adjacency(rng, history), random_corpus(rng, history)
    # Powers of two give many equal values; with the smallest factors, or down a deep path, values
    # reach 0.
    factors = torch.randn(ops.FACTORS, dtype=torch.float64) * rng.choice([0, 1, 3, 10])
    factors = 2.0 ** factors.round() if rng.random() < 0.3 else factors.exp()
    factors = (factors * rng.choice([1e-9, 0.1, 1.0, 1e9])).clamp(1e-9, 1e9)
    if batch and capacity == 20:
        factors = torch.stack([factors.roll(row) for row in range(batch)])
    options = rng.choice([0, 1, 3, 16, 256, 256]), rng.choice([0.0, 0.05, 0.5, 1.0])
    tables = denoised, adjacency, habits, suffixes, *corpus, factors
    want = reference.draft_tree(history, inside, *tables, nodes, *options)
    check_op("draft_tree", rng, [history, lengths, *tables, *options], want)
