"""A gated adapter with its matrices packed beside a plan's weights, for the packed pass.

Linear layers that a plan lays together (queries, keys and values; gates and ups) have one product
A x, of all their adapters' rows, and one B; a panel of its outputs reads the part that it needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import _C

from .adapter import NoiseAdapter
from .correction import Correction, correction, part_of
from .packed import PackedPlan, linears, pack
from .plan import Linear, NoPlan

NAMES = "qkv", "out", "up", "down"

Packed = tuple[Tensor, int, Tensor, int, Tensor]
"""A as it lies, its rows, B in panels, their inputs, the first of each: as ``_C.ForwardPass`` takes
them.
"""


def packed_adapter(packed: PackedPlan, adapter: NoiseAdapter) -> list[dict[str, Packed]]:
    """Return for each layer, then for the head, what is added to noise rows, packed; the same until
    the adapter's weights change.

    Raises:
        NoPlan: it is on a module that the plan does not know.
    """
    weights = [x.detach() for low in adapter.layers.values() for x in (low.a, low.b)]
    version = adapter.version, _C.sample_hash([x.contiguous() for x in weights])
    if packed.adapter is None or packed.adapter[0] != version:
        packed.adapter = version, _packed(packed, adapter)
    return packed.adapter[1]


def _packed(packed: PackedPlan, adapter: NoiseAdapter) -> list[dict[str, Packed]]:
    found, used = [], 0
    plan = packed.plan
    for its, halves in [*map(linears, plan.layers), ((plan.head,), (1,))]:
        names = NAMES if len(its) > 1 else ("head",)
        layer = {}
        for name, linear, half in zip(names, its, halves):
            fix = correction(linear, adapter, packed.dtype)
            if fix is not None:
                layer[name] = _packed_part(packed, fix, half)
                parts = [part_of(piece, adapter) for piece in linear.weights]
                used += len({id(part[0]) for part in parts if part})
        found.append(layer)
    if used != len(adapter.layers):
        raise NoPlan(f"its adapter {adapter.name!r} is on layers that are not in a plan")
    return found


def _packed_part(packed: PackedPlan, fix: Correction, halves: int) -> Packed:
    """Pack a correction; panels of gates and of ups take turns where there are two halves."""
    weights = "bfloat16" if packed.weights == "int8" else packed.weights
    width: int = _C.layer_isa(packed.isa)["width"]
    outputs, rank = fix.b.shape
    half = outputs // halves
    panels = [
        range(h * half + begin, h * half + min(begin + width, half))
        for begin in range(0, half, width)
        for h in range(halves)
    ]
    spans = []
    for panel in panels:
        its = {fix.spans[output] for output in panel} - {(0, 0)}
        spans.append((min(its)[0], max(end for _, end in its)) if its else (0, 0))
    inputs = max(2, max(end - start for start, end in spans))
    firsts = [min(start, rank - inputs) for start, _ in spans]
    narrow = fix.b.new_empty(outputs, inputs)
    for panel, first in zip(panels, firsts):
        narrow[panel.start : panel.stop] = fix.b[panel.start : panel.stop, first : first + inputs]
    (b,) = pack(weights, packed.isa, [Linear((narrow,))], (halves,))
    a = torch.nn.functional.pad(fix.a, (0, -fix.a.shape[1] % _C.NARROW_STEP))
    a = a.to(torch.bfloat16) if weights == "bfloat16" else a
    starts = torch.tensor(firsts, dtype=torch.int32, device="cpu")
    return a.contiguous(), rank, b.data, inputs, starts
