"""Random cases of the ops on a draft tree."""

import math
import random

import torch
from fuzz_cases import FAR, Memory, check_op, malformed, random_logits, random_parents, spoil

from msn_ext import _C, ops
from msn_ext.ops import reference

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
        rng.choice([rng.randrange(1, 21), 50, 1000, 9000, 30000 if nodes < 5 else 3000]),
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
    _C.verify_logits(*inputs, *outputs, None, None)
    memory.check()


def fuzz_place_tree(rng: random.Random, nodes: int) -> None:
    batch, capacity, vocabulary = rng.randrange(4), rng.choice([1, 5, 40]), rng.choice([1, 50])
    tokens, history = torch.randint(0, 99, (batch, nodes)), torch.randint(0, 99, (batch, capacity))
    lengths, offsets = torch.randint(1, capacity + 1, (batch,)), torch.randint(0, 9, (batch,))
    last = torch.randint(0, 60, (batch,))
    depth = torch.randint(
        -1, 9, (nodes,) if rng.random() < 0.3 else (batch, nodes), dtype=torch.int32
    )
    placed = tokens.clone()
    want = reference.place_tree(placed, history, lengths, offsets, last, depth, vocabulary)
    if rng.random() < 0.3:  # what counts as the nearest inside
        lengths = torch.where(lengths == capacity, 1 << 40, torch.where(lengths == 1, -9, lengths))
    memory = Memory(rng)
    inputs = [memory.place(x) for x in (history, lengths, offsets, last, depth)]
    outputs = [memory.place(torch.full_like(x, 77), want=x) for x in want]
    _C.place_tree(memory.place(tokens, want=placed), *inputs, vocabulary, *outputs)
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


def random_path(rng: random.Random, width: int, room: int) -> tuple[list[int], int]:
    """Nodes accepted in a row with ``room`` slots after the prefix; at times malformed."""
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
    long = nodes < 3 and rng.random() < 0.5  # up to as many splits as there are
    if whole := long or rng.random() < 0.6:  # what tensor cores can take, unless it lies badly
        dtype, unit = (
            rng.choice([torch.float16, torch.bfloat16]),
            8 if long else rng.choice([8, 8, 8, 1]),
        )
        dim = rng.choice([8, 64] if large else [8, 64, 72, 96, 104, 128, 192, 256])
        v_dim = dim if rng.random() < 0.7 else rng.choice([8, 64, 72, 128, 200, 256])
    else:
        dtype, unit = rng.choice(list(TOLERANCE | EXACT)), 1
        dim = rng.choice([1, 3, 8, 64] if large else [1, 3, 8, 64, 80, 128, 256])
        v_dim = dim if rng.random() < 0.5 else rng.choice([1, 5, 64, 72, 128, 200, 256])
    contexts = [0, 1, 5, 31, 32, 33, 64, 90, *([128, 200, 333] if whole else [])]
    if long:
        batch, kv_heads, contexts = 1, 1, [2300, 4000]
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
        "scale": rng.choice([dim**-0.5, dim**-0.5, 0.3, -0.2, 0.0]),
        "window": rng.choice([0, 0, 3000] if long else [0, 0, 1, 2, 7, 40, 120, 2**63 - 1]),
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
    if long:  # their scores of different sizes
        k *= torch.linspace(*rng.choice([(0.2, 3), (3, 0.2)]), slots)[:, None]
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
            slot, column = rng.choice(partly), slice(None)
            if rng.random() < 0.5:  # one value
                column = rng.randrange(v_dim)
                v[b, :, slot, column] = math.nan
            else:
                for cache in rng.choice([(k, v), (k,), (v,)]):
                    cache[b, :, slot] = math.nan
            want[b, mask[b, :, slot], :, column] = math.nan

    memory = Memory(rng)
    q, k, v = (memory.place(x, free=3, unit=unit) for x in (q, k, v))
    rest = [x if x is None else memory.place(x) for x in (lengths, offsets, ancestors, sinks)]
    out = memory.place(torch.zeros(want.shape, dtype=dtype))
    case = f"{dtype}, {shapes}, lengths {lengths}, offsets {offsets}, {options}"
    tolerance = (TOLERANCE | EXACT)[dtype]
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    # on_cpu.cpp takes each kind of device in turn: both, where they have kernels of their own.
    own = dtype.itemsize == 2 and max(dim, v_dim) <= 128 and nodes * group > 16
    for _ in range(2 if own else 1):
        out.fill_(77)
        _C.tree_attention(q, k, v, *rest, *options.values(), out, None)
        torch.testing.assert_close(out.double(), want, **close, msg=lambda text: f"{text}\n{case}")
    # Compared: what is left to check is that nothing around it changed.
    memory.blocks[-1][3].copy_(out)
    memory.check()
