"""The ops between a decoder layer's products."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from msn_ext import ops

from .common import Case, Model
from .layers import sizes

close = partial(torch.testing.assert_close, rtol=3e-2, atol=3e-2)  # eager PyTorch rounds more often


def drawn(model: Model, device: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)


def norm_cases(model: Model, nodes: list[int], contexts: list[int], device: str) -> Iterator[Case]:
    """h and x read, h and the result written."""
    hidden, _ = sizes(model)
    weight = torch.ones(hidden, device=device, dtype=model.dtype)
    for rows in nodes:
        h, x = drawn(model, device, rows, hidden), torch.zeros_like(weight).expand(rows, hidden)
        x = x.contiguous()  # zeros: h stays as it is, however often it is added to
        yield Case(
            f"rows={rows}",
            4 * h.nbytes,
            partial(ops.residual_norm, h, x, norm="rms", weight=weight, eps=1e-5),
            lambda h=h, x=x: F.rms_norm(h + x, (hidden,), weight, 1e-5),
            check=close,
        )


def rotary_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """Queries, keys and values read and written."""
    context, size = contexts[0], model.head_size
    caches = [drawn(model, device, 1, model.kv_heads, context + 256, size) for _ in range(2)]
    angles = torch.randn(context + 256, size // 2, generator=torch.Generator().manual_seed(0))
    cosines, sines = angles.cos().to(device), angles.sin().to(device)
    prefix = torch.tensor([context], device=device)
    for count in nodes:
        heads = model.heads + 2 * model.kv_heads
        rows = drawn(model, device, 1, count, heads, size)
        q, k, v = rows.split([model.heads, model.kv_heads, model.kv_heads], 2)
        positions = context + torch.arange(count, device=device)[None]

        def eager(q: Tensor = q, k: Tensor = k, v: Tensor = v, at: Tensor = positions) -> Tensor:
            cos, sin = (table[at][:, :, None].to(q.dtype) for table in (cosines, sines))

            def turned(x: Tensor) -> Tensor:
                a, b = x.chunk(2, -1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            for cache, new in zip(caches, (turned(k), v)):
                cache.transpose(1, 2)[:, at[0]] = new
            return turned(q)

        yield Case(
            f"nodes={count}",
            2 * rows.nbytes,
            partial(ops.rotary_cache, q, k, v, *caches, prefix, positions, cosines, sines),
            eager,
            check=close,
        )


def gate_cases(model: Model, nodes: list[int], contexts: list[int], device: str) -> Iterator[Case]:
    """Two halves read, one written."""
    _, middle = sizes(model)
    for rows in nodes:
        both = drawn(model, device, rows, 2 * middle)
        gate, up = both.chunk(2, 1)
        yield Case(
            f"rows={rows}",
            3 * both.nbytes // 2,
            partial(ops.gated_activation, gate, up),
            lambda gate=gate, up=up: F.silu(gate) * up,
            check=close,
        )


CASES = {
    "residual_norm": norm_cases,
    "rotary_cache": rotary_cases,
    "gated_activation": gate_cases,
}
