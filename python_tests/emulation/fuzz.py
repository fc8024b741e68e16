"""Fuzzes the emulated CUDA kernels against msn_ext.ops.reference; by hand:

    python python_tests/emulation/fuzz.py --rounds 50 --seed 0

builds them in a temporary folder. A round is one random case of each op. Each tensor of a case lies
in a block of 0xff bytes (NaN, -1), gaps between strides included, in which every byte is compared
with what it shall be in the end. The block ends at a page that cannot be accessed: a read behind it
is fatal.
"""

import argparse
import ctypes
import faulthandler
import math
import mmap
import random
import signal
import sys
import tempfile
from pathlib import Path

import build
import torch

import msn_ext
from msn_ext import _C, ops
from msn_ext.ops import reference

NODES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256]
FAR = [-(2**63), -5, 2**62, 2**63 - 1]  # values that nothing reaches
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
EXACT = {torch.float64: 1e-12}  # of attention, too
CACHE_DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.bool,
    torch.int64,
    torch.complex128,
]


def block_of(size: int) -> torch.Tensor:
    """At least a page more than ``size`` bytes, all 0xff, up to a page that cannot be accessed."""
    usable = (size + 2 * PAGE - 1) // PAGE * PAGE
    area = mmap.mmap(-1, usable + PAGE)
    block = torch.frombuffer(area, dtype=torch.uint8, count=usable).fill_(255)
    assert LIBC.mprotect(ctypes.c_void_p(block.data_ptr() + usable), ctypes.c_size_t(PAGE), 0) == 0
    return block


class Memory:
    """The tensors of a case, each inside a block of 0xff bytes, and what the blocks shall hold in
    the end.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.blocks = []

    def place(
        self, values: torch.Tensor, free: int = 0, want: torch.Tensor | None = None, unit: int = 1
    ) -> torch.Tensor:
        """A tensor that holds ``values`` and shall end as ``want`` (None: as it began).

        Its first ``free`` dimensions lie in any order in memory; where there are any, all of them
        may have gaps, those of the last one of whole ``unit`` values.
        """
        dims, rng = values.dim(), self.rng
        order = rng.sample(range(free), free) + list(range(free, dims))
        gaps = (
            [rng.choice([0, 0, 1, 3]) for _ in range(dims)]
            if free and rng.random() < 0.6
            else [0] * dims
        )
        gaps[-1] *= unit
        sizes = [values.shape[d] + gaps[d] for d in order]
        size = math.prod(sizes) * values.element_size()
        block = block_of(size)
        tensor = block[len(block) - size :].view(values.dtype).view(sizes)
        tensor = tensor.permute([order.index(d) for d in range(dims)])
        for d in range(dims):
            step = unit if d == dims - 1 else 1
            tensor = tensor.narrow(d, rng.randrange(gaps[d] // step + 1) * step, values.shape[d])
        tensor.copy_(values)
        end = block.clone()
        twin = end.view(values.dtype).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        if want is not None:
            assert want.shape == values.shape and want.dtype == values.dtype
            twin.copy_(want)
        self.blocks.append((block, end, tensor, twin))
        return tensor

    def check(self) -> None:
        for block, end, tensor, twin in self.blocks:
            if not torch.equal(block, end):
                inside = torch.equal(tensor, twin)
                wrong = (
                    "the bytes around it changed" if inside else f"holds {tensor}, expected {twin}"
                )
                raise AssertionError(f"a tensor {list(tensor.shape)} {tensor.dtype}: {wrong}")


def check_op(op: str, rng: random.Random, inputs, want) -> None:
    """The kernel gives ``want``, bit for bit, and touches nothing else."""
    memory = Memory(rng)
    inputs = [memory.place(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    outputs = [memory.place(torch.full_like(x, 77), want=x) for x in want]
    getattr(_C, op)(*inputs, *outputs)
    memory.check()


def random_tree(rng: random.Random, nodes: int) -> list[int]:
    draw = rng.choice(
        [
            lambda i: rng.randrange(i),
            lambda i: i - 1 if rng.random() < 0.97 else rng.randrange(i),
            lambda i: rng.randrange(min(i, 3)),
            lambda i: rng.randrange(max(0, i - 10), i),
            lambda i: -1 if rng.random() < 0.1 else rng.randrange(i),
        ]
    )
    return [-1, *(draw(i) for i in range(1, nodes))]


def random_parents(rng: random.Random, batch: int, nodes: int) -> torch.Tensor:
    """Well-formed, [N] or [B, N]."""
    if rng.random() < 0.3:
        return torch.tensor(random_tree(rng, nodes), dtype=torch.int32)
    return torch.tensor([random_tree(rng, nodes) for _ in range(batch)], dtype=torch.int32).view(
        batch, nodes
    )


def malformed(rng: random.Random, parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy with malformed entries, and one where these are padding; often both as they were."""
    nodes = parents.shape[-1]
    bad, good = parents.clone(), parents.clone()
    for _ in range(rng.choice([0, 1, 5]) if parents.numel() else 0):
        at = rng.randrange(parents.numel())
        node = at % nodes
        bad.view(-1)[at] = rng.choice([-7, -(2**31), 2**31 - 1, nodes, node, node + 1])
        good.view(-1)[at] = -1
    return bad, good


def spoil(rng: random.Random, lengths: torch.Tensor, near: int) -> torch.Tensor:
    """Lengths of which one may be out of range."""
    lengths = lengths.clone()
    if len(lengths) and rng.random() < 0.4:
        lengths[rng.randrange(len(lengths))] = rng.choice([*FAR, -1, 0, near, near + 1])
    return lengths


def fuzz_tree_ancestors(rng: random.Random, nodes: int) -> None:
    bad, good = malformed(rng, random_parents(rng, rng.randrange(4), nodes))
    check_op("tree_ancestors", rng, [bad], reference.tree_ancestors(good))


def fuzz_verify_tree(rng: random.Random, nodes: int) -> None:
    batch, vocabulary = rng.randrange(4), rng.choice([1, 2, 3, 50])
    bad, good = malformed(rng, random_parents(rng, batch, nodes))
    tokens, targets = torch.randint(0, vocabulary, (2, batch, nodes))
    check_op(
        "verify_tree", rng, [tokens, targets, bad], reference.verify_tree(tokens, targets, good)
    )


def fuzz_verify_logits(rng: random.Random, nodes: int) -> None:
    batch, vocabulary = (
        rng.randrange(3 if nodes < 100 else 2),
        rng.choice([1, 2, 3, 8, 50, 1000, 9000]),
    )
    bad, good = malformed(rng, random_parents(rng, batch, nodes))
    tokens = torch.randint(0, min(vocabulary, 3), (batch, nodes))
    logits = random_logits(rng, batch * nodes, vocabulary)
    guesses, *want = reference.verify_logits(logits.view(batch, nodes, vocabulary), tokens, good)
    memory = Memory(rng)
    inputs = [
        memory.place(logits, free=1, unit=rng.choice([1, 8])),
        memory.place(tokens),
        memory.place(bad),
    ]
    outputs = [
        memory.place(torch.full_like(x, 77), want=x) for x in (guesses.view(-1, ops.GUESSES), *want)
    ]
    _C.verify_logits(
        *inputs, *outputs, memory.place(torch.zeros(batch + rng.randrange(3), dtype=torch.int32))
    )
    memory.check()


def fuzz_advance_text(rng: random.Random, nodes: int) -> None:
    batch, vocabulary, room = rng.randrange(4), rng.choice([1, 2, 50]), 20 + nodes
    history, lengths = torch.randint(0, 99, (batch, room)), torch.randint(0, 21, (batch,))
    remaining = torch.randint(0, rng.choice([1, 3, 300]), (batch,))
    targets = torch.randint(-1, vocabulary + 1, (batch, nodes))
    path = torch.randint(-1, nodes, (batch, nodes))
    accepted, ends = (
        torch.randint(0, nodes + 1, (batch,)),
        torch.randint(0, vocabulary + 2, (rng.randrange(4),)),
    )
    after = [history.clone(), lengths.clone(), remaining.clone()]
    want = reference.advance_text(*after, targets, path, accepted, ends, vocabulary)
    if rng.random() < 0.3:  # what counts as its border
        path, accepted = (
            torch.where(path < 0, -(1 << 40), path),
            torch.where(accepted == nodes, 1 << 40, accepted),
        )
    memory = Memory(rng)
    inputs = [memory.place(x, want=y) for x, y in zip((history, lengths, remaining), after)]
    rest = [memory.place(x) for x in (targets, path, accepted, ends)]
    outputs = [memory.place(torch.full_like(x, 77), want=x) for x in want]
    _C.advance_text(*inputs, *rest, vocabulary, *outputs)
    memory.check()


def random_history(rng: random.Random, batch: int, capacity: int) -> torch.Tensor:
    if rng.random() < 0.3:
        return torch.arange(capacity).remainder(rng.choice([1, 2, 3, 7])).repeat(batch, 1)
    return torch.randint(0, rng.choice([1, 2, 3, 100]), (batch, capacity))


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


def random_path(rng: random.Random, width: int, room: int) -> tuple[list[int], int]:
    """Nodes accepted in a row with ``room`` slots behind the prefix; at times malformed."""
    kind = rng.random()
    if kind < 0.2:
        nodes = [rng.choice([*FAR, rng.randrange(-3, room + 9)]) for _ in range(width)]
        return nodes, rng.choice([*FAR, width, width + 9])
    accepted = rng.randrange(min(width, room) + 1)
    nodes = sorted(rng.sample(range(room), accepted))
    if nodes and kind < 0.8:
        nodes[0] = 0
    return nodes + [-1] * (width - accepted), accepted


def fuzz_commit_kv(rng: random.Random, nodes: int) -> None:
    batch, width, slots = rng.randrange(4), min(nodes, 40), rng.choice([1, 8, 64, 100])
    starts = [rng.randrange(slots) for _ in range(batch)]
    paths, accepted = (
        zip(*(random_path(rng, width, slots - start) for start in starts)) if batch else ((), ())
    )
    path, accept_length = (
        torch.tensor(paths).view(batch, width).long(),
        torch.tensor(accepted).long(),
    )
    lengths = spoil(rng, torch.tensor(starts).long(), slots)
    memory, caches = Memory(rng), []
    for _ in range(rng.choice([1, 2, 4, 66, 490])):  # a launch takes 64, or 480
        own_slots = max(1, slots + rng.choice([0, 0, -5, 3]))
        shape = batch, rng.choice([0, 1, 2, 5]), own_slots, rng.choice([0, 1, 3, 8, 20, 64])
        values = torch.randint(0, 200, shape).to(rng.choice(CACHE_DTYPES))
        want = values.clone()
        for b, start in enumerate(lengths.tolist()):
            if not 0 <= start < own_slots:
                continue
            room = own_slots - start
            kept = max(0, min(int(accept_length[b]), width, room))
            # Malformed steps as well-formed ones that stay where they are.
            sane = torch.tensor(
                [[node if i < node < room else i for i, node in enumerate(path[b, :kept].tolist())]]
            )
            reference.commit_kv(
                [want[b : b + 1]], lengths[b : b + 1], sane.long(), torch.tensor([kept])
            )
        caches.append(memory.place(values, free=4, want=want))
    _C.commit_kv(caches, *map(memory.place, (lengths, path, accept_length)))
    memory.check()


def fuzz_tree_attention(rng: random.Random, nodes: int) -> None:
    large = nodes > 100
    batch, kv_heads = (1, 1) if large else (rng.randrange(1, 4), rng.choice([1, 2]))
    group = rng.choice([1, 2] if large else [1, 2, 3, 7])
    if whole := rng.random() < 0.6:  # what tensor cores can take, unless it lies badly
        dtype, unit = rng.choice([torch.float16, torch.bfloat16]), rng.choice([8, 8, 8, 1])
        dim = rng.choice([8, 64] if large else [8, 64, 72, 96, 104, 128, 192, 256])
        v_dim = dim if rng.random() < 0.7 else rng.choice([8, 64, 72, 128, 200, 256])
    else:
        dtype, unit = rng.choice(list(TOLERANCE | EXACT)), 1
        dim = rng.choice([1, 3, 8, 64] if large else [1, 3, 8, 64, 80, 128, 256])
        v_dim = dim if rng.random() < 0.5 else rng.choice([1, 5, 64, 72, 128, 200, 256])
        if dtype == torch.float64:  # what fits into the shared memory of every device
            dim, v_dim = min(dim, 80), min(v_dim, 72)
    contexts = [0, 1, 5, 31, 32, 33, 64, 90, *([128, 200, 333] if whole else [])]
    lengths = torch.tensor([rng.choice(contexts) for _ in range(batch)])
    slots = int(lengths.max()) + nodes + rng.choice([0, 0, 3])
    offsets = (
        torch.tensor([rng.randrange(x + 1) for x in lengths.tolist()])
        if rng.random() < 0.4
        else None
    )
    if rng.random() < 0.3:
        lengths = spoil(rng, lengths, slots - 1)
        offsets = offsets if offsets is None else spoil(rng, offsets, slots)
    options = {
        "scale": rng.choice([dim**-0.5, 0.3]),
        "window": rng.choice([0, 0, 1, 2, 7, 40, 120, 2**63 - 1]),
        "softcap": rng.choice([0.0, 0.0, 3.0]),
    }
    heads = kv_heads * group
    sinks = (torch.randn(heads) * 2).to(dtype) if rng.random() < 0.4 else None
    if sinks is not None and rng.random() < 0.3:
        sinks[0] = -math.inf
    ancestors = reference.tree_ancestors(random_parents(rng, batch, nodes))[0]

    # As the kernel takes them: inside the cache.
    inside = lengths.clamp(0, slots)
    first = None if offsets is None else torch.minimum(offsets.clamp(min=0), inside)
    mask = reference.tree_mask(inside, ancestors, slots, offsets=first, window=options["window"])[
        :, 0
    ]  # [B, N, C]
    shapes = (heads, nodes, dim), (kv_heads, slots, dim), (kv_heads, slots, v_dim)
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    want = reference.tree_attention(
        q.double(),
        k.double(),
        v.double(),
        inside,
        ancestors,
        offsets=first,
        sinks=None if sinks is None else sinks.double(),
        **options,
    )
    # Slots that nobody sees hold poison; one that some nodes see, and others do not, NaN.
    seen = mask.any(1)
    poison = rng.choice([math.nan, math.inf, 1e4])
    for b in range(batch):
        k[b, :, ~seen[b]] = v[b, :, ~seen[b]] = poison
        partly = (seen[b] & ~mask[b, mask[b].any(1)].all(0)).nonzero().flatten().tolist()
        if partly and rng.random() < 0.5:
            slot = rng.choice(partly)
            for cache in rng.choice([(k, v), (k,), (v,)]):
                cache[b, :, slot] = math.nan
            want[b, mask[b, :, slot]] = math.nan

    memory = Memory(rng)
    q, k, v = (memory.place(x, free=3, unit=unit) for x in (q, k, v))
    rest = [x if x is None else memory.place(x) for x in (lengths, offsets, ancestors, sinks)]
    out = memory.place(torch.zeros(want.shape, dtype=dtype))
    _C.tree_attention(q, k, v, *rest, *options.values(), out, None, None)
    case = f"{dtype}, {shapes}, lengths {lengths}, offsets {offsets}, {options}"
    tolerance = (TOLERANCE | EXACT)[dtype]
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(out.double(), want, **close, msg=lambda text: f"{text}\n{case}")
    # Compared: what is left to check is that nothing around it changed.
    memory.blocks[-1][3].copy_(out)
    memory.check()


def random_logits(rng: random.Random, rows: int, vocabulary: int) -> torch.Tensor:
    """Equals, NaN, infinities and numbers close to 0 among them."""
    logits = torch.randn(rows, vocabulary) * rng.choice([0.0, 0.1, 1.0, 5.0])
    if rng.random() < 0.5:
        logits = logits.round()  # equals, -0.0 among them
    for _ in range(rng.choice([0, 1, 3, 2 * vocabulary]) if rows else 0):
        special = rng.choice([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-42])
        logits[rng.randrange(rows), rng.randrange(vocabulary)] = special
    return logits.to(rng.choice(list(TOLERANCE)))


def fuzz_top_guesses(rng: random.Random, nodes: int) -> None:
    rows, vocabulary = (
        rng.randrange(4),
        rng.choice([1, 2, 7, 8, 9, 1000, 1023, 1025, 8192, 9001, 40000]),
    )
    logits = random_logits(rng, rows, vocabulary)
    want = reference.top_guesses(logits)
    memory = Memory(rng)
    placed, out = (
        memory.place(logits, free=1, unit=rng.choice([1, 8])),
        memory.place(torch.full_like(want, 77), want=want),
    )
    _C.top_guesses(placed, out)
    memory.check()


def random_tokens(rng: random.Random, *shape: int) -> torch.Tensor:
    """Of a vocabulary so small that contexts meet again; at times any that a guess can hold."""
    return torch.randint(0, rng.choice([1, 2, 3, 5, 40, 1 << 27]), shape)


def random_guesses(rng: random.Random, *shape: int) -> torch.Tensor:
    guesses = random_tokens(rng, *shape, ops.GUESSES) * 16
    guesses = (guesses + torch.randint(0, ops.LEVELS, guesses.shape)).int()
    none = torch.rand(guesses.shape) < rng.choice([0.0, 0.0, 0.3, 0.9])
    return guesses.masked_fill(none, rng.choice([-1, -(2**31)]))


def random_heads(rng: random.Random, history: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of the first ``lengths`` tokens; any slots may hold anything."""
    heads = torch.zeros(
        len(history), len(ops.SUFFIXES), rng.choice([0, 1, 7, 300]), dtype=torch.int32
    )
    if heads.shape[2]:
        reference.index_suffixes(heads, history, torch.zeros_like(lengths), lengths)
    wrong = torch.rand(heads.shape) < rng.choice([0.0, 0.0, 0.1, 0.9])
    anything = torch.tensor(
        [-(2**31), -1, 0, 1, 2, 7, 2**31 - 1, *lengths.tolist()], dtype=torch.int32
    )
    return torch.where(wrong, anything[torch.randint(0, len(anything), heads.shape)], heads)


def random_corpus(rng: random.Random, history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens as in the texts, with gaps between documents, and its heads; any slots may hold
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
    return corpus.int(), random_heads(rng, corpus[None], torch.tensor([size]))[0]


def random_contexts(rng: random.Random, history: torch.Tensor) -> torch.Tensor:
    """What drafts behind the texts of ``history`` left."""
    batch, capacity = history.shape
    contexts = torch.zeros(
        ops.ORDERS, rng.choice([0, 1, 7, 300]), 1 + ops.GUESSES, dtype=torch.int32
    )
    for _ in range(rng.choice([0, 1, 10]) if contexts.shape[1] else 0):
        parents = torch.tensor(random_tree(rng, 8), dtype=torch.int32)
        tokens = history[:, torch.randint(0, capacity, (8,))]
        lengths, path = torch.randint(1, capacity + 1, (batch,)), torch.full((batch, 8), -1)
        reference.remember_guesses(
            contexts, history, lengths, tokens, parents, path, random_guesses(rng, batch, 8)
        )
    return contexts


def fuzz_index_suffixes(rng: random.Random, nodes: int) -> None:
    batch, capacity = (
        rng.randrange(4),
        rng.choice([0, 1, 2, 16, 17, 40, 1500]),
    )  # a block has 1024 threads
    history = random_history(rng, batch, capacity)
    history = history.masked_fill(
        torch.rand(history.shape) < rng.choice([0.0, 0.1]), rng.choice([-1, -(2**63)])
    )
    lengths, start = (
        spoil(rng, torch.randint(0, capacity + 1, (batch,)), capacity) for _ in range(2)
    )
    inside = lengths.clamp(0, capacity), start.clamp(0, capacity)
    # What earlier calls may have left: places before the first new one.
    heads = torch.rand(batch, len(ops.SUFFIXES), rng.choice([0, 1, 2, 50, 3000]))
    heads = (heads * inside[1].clamp(min=1)[:, None, None]).int()
    want, memory = heads.clone(), Memory(rng)
    if heads.shape[2]:
        reference.index_suffixes(want, history, inside[1], inside[0])
    _C.index_suffixes(memory.place(heads, want=want), *map(memory.place, (history, start, lengths)))
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
    contexts = torch.randint(-9, 9, (ops.ORDERS, slots, 1 + ops.GUESSES), dtype=torch.int32)
    want, memory = contexts.clone(), Memory(rng)
    if slots:
        inside = lengths.clamp(1, capacity), torch.where(path < nodes, path, -1)
        reference.remember_guesses(want, history, inside[0], tokens, good, inside[1], guesses)
    inputs = history, lengths, tokens, bad, path, guesses
    _C.remember_guesses(memory.place(contexts, want=want), *map(memory.place, inputs))
    memory.check()


def fuzz_draft_tree(rng: random.Random, nodes: int) -> None:
    batch, capacity = rng.choice([0, 1, 1, 2]), rng.choice([1, 2, 20, 100])
    history = random_history(rng, batch, capacity)
    lengths = spoil(rng, torch.randint(1, capacity + 1, (batch,)), capacity)
    inside = lengths.clamp(1, capacity)
    denoised = random_guesses(rng, batch, rng.choice([0, 1, 4, 20, 300]))
    contexts, heads = random_contexts(rng, history), random_heads(rng, history, inside)
    corpus = random_corpus(rng, history)
    # Powers of two give many equal values; with the smallest factors, or down a deep path, values
    # reach 0.
    factors = torch.randn(ops.FACTORS, dtype=torch.float64) * rng.choice([0, 1, 3, 10])
    factors = 2.0 ** factors.round() if rng.random() < 0.3 else factors.exp()
    factors = (factors * rng.choice([1e-9, 0.1, 1.0, 1e9])).clamp(1e-9, 1e9)
    options = rng.choice([0, 1, 3, 16, 256, 256]), rng.choice([0.0, 0.05, 0.5, 1.0])
    tables = denoised, contexts, heads, *corpus, factors
    want = reference.draft_tree(history, inside, *tables, nodes, *options)
    check_op("draft_tree", rng, [history, lengths, *tables, *options], want)


def fuzz_draw_noise(rng: random.Random, nodes: int) -> None:
    batch, columns = (
        rng.choice([1, 1, 2]),
        rng.choice([1, 2, 5, 40, 300, 700]),
    )  # a block has 256 threads
    vocabulary = rng.choice([1, 2, 9, 50000])
    tokens = torch.randint(0, vocabulary, (batch, columns))
    if rng.random() < 0.3:
        tokens = tokens + rng.choice(FAR)
    changes = torch.rand(batch, columns) < rng.choice([0.01, 0.2, 0.5])
    labels = torch.where(changes.cumsum(1) % 2 == 0, tokens, -100)
    count, segments, length = (
        rng.choice([0, 1, 3]),
        rng.choice([1, 2, 24, 256]),
        rng.choice([1, 4, 64]),
    )
    ends = torch.randint(0, columns + 1, (count, 2)).sort(1).values
    documents = torch.cat([torch.randint(0, batch, (count, 1)), ends], 1)
    starts = torch.full((count, segments), -1)
    keep = torch.tensor(
        sorted(rng.sample(range(vocabulary), min(vocabulary, rng.choice([0, 1, 5])))),
        dtype=torch.int64,
    )
    options = rng.choice([*FAR, 0, 7]), rng.choice([0.0, 0.4, 1.0]), vocabulary, rng.random() < 0.5

    def specified(documents, starts):
        seed, share, size, apart = options
        return reference.draw_noise(
            tokens, labels, documents, keep, starts, seed, length, share, size, apart
        )

    if rng.random() < 0.4:  # given starts, some of which are none
        starts = torch.where(torch.rand(starts.shape) < 0.5, specified(documents, starts)[0], -1)
    want = specified(documents, starts)
    if rng.random() < 0.4 and count:  # a document outside the batch has nothing
        at = rng.randrange(count)
        documents[at, 0] = rng.choice([*FAR, -1, batch])
        want[0][at], want[1][at] = -1, -1
    if rng.random() < 0.3 and count and segments == 1:
        starts[at := rng.randrange(count)] = rng.choice([2**63 - 1, columns])
        want[0][at], want[1][at] = -1, -1
    memory = Memory(rng)
    inputs = map(memory.place, (tokens, labels, documents, keep))
    outputs = (
        memory.place(starts, want=want[0]),
        memory.place(torch.full_like(want[1], 77), want=want[1]),
    )
    _C.draw_noise(*inputs, *options, *outputs)
    memory.check()


OPS = {
    "tree_ancestors": fuzz_tree_ancestors,
    "verify_tree": fuzz_verify_tree,
    "lookup_ngram": fuzz_lookup_ngram,
    "fill_tree": fuzz_fill_tree,
    "commit_kv": fuzz_commit_kv,
    "verify_logits": fuzz_verify_logits,
    "advance_text": fuzz_advance_text,
    "tree_attention": fuzz_tree_attention,
    "top_guesses": fuzz_top_guesses,
    "index_suffixes": fuzz_index_suffixes,
    "remember_guesses": fuzz_remember_guesses,
    "draft_tree": fuzz_draft_tree,
    "draw_noise": fuzz_draw_noise,
}


def run(ops: list[str], rounds: int, seed: int) -> None:
    for at in range(rounds):
        for op in ops:
            rng = random.Random(f"{seed} {op} {at}")
            torch.manual_seed(rng.getrandbits(32))
            try:
                OPS[op](rng, NODES[at % len(NODES)])
            except BaseException:
                print(f"{op} fails in round {at} of seed {seed}", file=sys.stderr)
                raise
    print(f"{rounds} rounds agree: {' '.join(ops)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2 * len(NODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument(
        "--built", action="store_true", help="PYTHONPATH has the emulated build (else one is made)"
    )
    args = parser.parse_args()
    if not args.built:
        with tempfile.TemporaryDirectory() as folder:
            build.build(Path(folder))
            return build.fuzz(Path(folder), *sys.argv[1:]).returncode
    assert msn_ext.build_info()["cpu_isa"] == "emulated CUDA", (
        f"not an emulated build: {_C.__file__}"
    )
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.register(
        signal.SIGTRAP, chain=True
    )  # what the compiler's checks end with on some machines
    run(args.ops, args.rounds, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
