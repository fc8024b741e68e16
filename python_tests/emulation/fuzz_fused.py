"""Random cases of the ops between a layer's products."""

import math
import random

import torch
from fuzz_cases import FAR, Memory

from msn_ext import _C
from msn_ext.ops import reference

# What two roundings of the last place may differ by, relative to what was added up
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
NORMS = ["none", "rms", "layer"]


def numbers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def close(memory: Memory, dtype: torch.dtype, got: torch.Tensor, want: torch.Tensor) -> None:
    """``got`` is near ``want``, and takes part in the comparison of all bytes as it is."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    next(twin for _, _, tensor, twin in memory.blocks if tensor is got).copy_(got)


def placed_norm(rng: random.Random, memory: Memory, dtype: torch.dtype, size: int) -> list:
    """Kind, weight, bias, eps and offset."""
    kind = rng.choice(NORMS)
    if kind == "none":
        return [kind, None, None, 0.0, 0.0]
    weight = memory.place(numbers(dtype, size), free=1)
    bias = memory.place(numbers(dtype, size), free=1) if rng.random() < 0.5 else None
    least = 1e-6 if size > 2 else 0.1  # two numbers may be so near that their norm is rounding
    return [kind, weight, bias, rng.choice([least, 0.1]), rng.choice([0.0, 1.0])]


def fuzz_residual_norm(rng: random.Random, nodes: int) -> None:
    rows, dtype = rng.choice([0, 1, 2, 5]), rng.choice(list(TOLERANCE))
    size = rng.choice([1, 2, 8, 31, 64, 100, 576, 1000, 4096, 5000])  # 512 threads a row
    memory = Memory(rng)
    h, x = numbers(dtype, rows, size), numbers(dtype, rows, size) if rng.random() < 0.8 else None
    if rows and rng.random() < 0.2:
        h[rng.randrange(rows), rng.randrange(size)] = rng.choice([math.nan, math.inf, 1e4])
    of_x, of_h = (placed_norm(rng, memory, dtype, size) for _ in range(2))
    scale = rng.choice([1.0, 0.4])
    after = h.clone()
    want = reference.residual_norm(after, x, scale, *of_x, *of_h)
    h = memory.place(h)
    x = None if x is None else memory.place(x)
    out = memory.place(torch.full_like(want, 77))
    _C.residual_norm(h, x, scale, *of_x, *of_h, out)
    if x is not None:
        close(memory, dtype, h, after)
        # From the sum as it was rounded here
        want = reference.residual_norm(h.clone(), None, 1.0, *of_x, *of_h)
    close(memory, dtype, out, want)
    memory.check()


def fuzz_gated_activation(rng: random.Random, nodes: int) -> None:
    rows, dtype = rng.choice([0, 1, 3]), rng.choice(list(TOLERANCE))
    size = rng.choice([1, 8, 33, 64, 2048, 2100])  # 256 threads of 16 bytes
    activation = rng.choice(["silu", "gelu", "gelu_tanh", "relu"])
    gate = numbers(dtype, rows, size) * rng.choice([1.0, 4.0, 40.0])
    if rows and rng.random() < 0.2:
        gate[rng.randrange(rows), rng.randrange(size)] = math.nan
    up = numbers(dtype, rows, size) if rng.random() < 0.7 else None
    want = reference.gated_activation(gate, up, activation)
    memory = Memory(rng)
    unit = rng.choice([1, 8])
    gate, up = (x if x is None else memory.place(x, free=1, unit=unit) for x in (gate, up))
    out = memory.place(torch.full_like(want, 77))
    _C.gated_activation(gate, up, activation, out)
    close(memory, dtype, out, want)
    memory.check()


def fuzz_rotary_cache(rng: random.Random, nodes: int) -> None:
    nodes = nodes if nodes < 40 else rng.choice([5, 12])
    batch, dtype = rng.randrange(3), rng.choice(list(TOLERANCE))
    kv_heads, size = rng.choice([1, 2, 3]), rng.choice([2, 6, 8, 64, 66, 128])
    heads = kv_heads * rng.choice([1, 2, 9])  # a block has 16 warps
    slots, known = nodes + rng.choice([0, 1, 30]), rng.choice([1, 40])
    memory = Memory(rng)
    q, k, v = (numbers(dtype, batch, nodes, n, size) for n in (heads, kv_heads, kv_heads))
    keys, values = (numbers(dtype, batch, kv_heads, slots, size) for _ in range(2))
    prefix = torch.randint(0, slots - nodes + 1, (batch,))
    positions = torch.randint(0, known, (batch, nodes))
    tables = [None, None]
    if rng.random() < 0.8:
        number = torch.float64 if dtype == torch.float64 else torch.float32
        half = rng.choice([0, 1, size // 2, size // 2])
        tables = [numbers(number, known, half) for _ in range(2)]
    each = rng.random() < 0.6
    kind, *_, eps, offset = placed_norm(rng, memory, dtype, size)
    weights = [None] * 4
    if kind != "none":
        sizes = [size if each else size * n for n in (heads, heads, kv_heads, kv_heads)]
        weights = [numbers(dtype, n) for n in sizes]
        if rng.random() < 0.5:
            weights[1] = weights[3] = None
    norm = kind, *weights, eps, offset, each
    if rng.random() < 0.3 and positions.numel():  # the nearest row of the tables
        positions.view(-1)[rng.randrange(positions.numel())] = rng.choice(FAR)
    inside = prefix.clone()
    if rng.random() < 0.3 and batch:  # not written
        prefix[rng.randrange(batch)] = rng.choice([*FAR, -1, slots - nodes + 1])
    kept = prefix == inside
    after = keys.clone(), values.clone()
    clamped = positions.clamp(0, known - 1)
    want = reference.rotary_cache(q, k, v, *after, inside, clamped, *tables, *norm)
    after = [torch.where(kept[:, None, None, None], x, y) for x, y in zip(after, (keys, values))]

    rows = [memory.place(x, free=3) for x in (q, k, v)]
    caches = [memory.place(x, free=3) for x in (keys, values)]
    rest = [None if x is None else memory.place(x) for x in (prefix, positions, *tables)]
    weights = [None if x is None else memory.place(x) for x in weights]
    out = memory.place(torch.full_like(want, 77))
    _C.rotary_cache(*rows, *caches, *rest, kind, *weights, eps, offset, each, out)
    for got, its in zip((out, *caches), (want, *after)):
        close(memory, dtype, got, its)
    memory.check()
