"""What a gated adapter adds to the linear layers of a plan, where a model's stand together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import LowRank, NoiseAdapter
from .plan import Linear


@dataclass(frozen=True, eq=False)
class Correction:
    """What an adapter adds to a plan's linear layer, as two matrices.

    Attributes:
        a: [R, inputs].
        b: [outputs, R], scaled; zero where an output has none of A's rows.
        spans: of every output, where its rows of A begin and end; (0, 0): it has none.
    """

    a: Tensor
    b: Tensor
    spans: list[tuple[int, int]]


def correction(linear: Linear, adapter: NoiseAdapter, dtype: torch.dtype) -> Correction | None:
    """Return what an adapter adds to a linear layer of a plan; None: nothing.

    Args:
        dtype: of the matrices.
    """
    parts, b, spans = [], [], []
    starts: dict[int, int] = {}
    size = 0
    for piece in linear.weights:
        found = part_of(piece, adapter)
        if found is None:
            b.append((0, piece.new_zeros(len(piece), 0, dtype=dtype)))
            spans += [(0, 0)] * len(piece)
            continue
        low, first = found
        if id(low) not in starts:
            starts[id(low)] = size
            rank = len(low.a)
            even = rank + rank % 2  # pairs of them are multiplied at once
            parts.append(torch.nn.functional.pad(low.a.detach().to(dtype), (0, 0, 0, even - rank)))
            size += even
        start = starts[id(low)]
        rows = low.b.detach()[first : first + len(piece)].to(dtype) * low.scaling
        b.append((start, rows))
        spans += [(start, start + low.a.shape[0] + low.a.shape[0] % 2)] * len(piece)
    if not parts:
        return None
    whole = [
        torch.nn.functional.pad(rows, (start, size - start - rows.shape[1])) for start, rows in b
    ]
    return Correction(torch.cat(parts), torch.cat(whole), spans)


def part_of(piece: Tensor, adapter: NoiseAdapter) -> tuple[LowRank, int] | None:
    """Return what is added to a piece of a plan's weights, and which output is its first."""
    address = piece.data_ptr()
    for low in adapter.layers.values():
        weight = low.base.weight
        begin = weight.data_ptr()
        if begin <= address < begin + weight.nbytes:
            return low, (address - begin) // piece.element_size() // piece.stride(0)
    return None
