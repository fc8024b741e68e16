"""A plan with its weights packed for this machine, ready to run.

Weights are packed a layer at a time into memory of their own: panels of a few outputs, as the
kernels read them (csrc/cpu/layers/panels.h). Norms and biases are kept in the numbers that sums are
made in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msn_ext import _C
from msn_ext.memory import ALIGNMENT, aligned

from .plan import Layer, Linear, Norm, Plan

WEIGHTS = "float64", "float32", "bfloat16", "float16", "int8"
"""How weights may be stored. Everything else is float64 for the first, float32 for the others."""
CACHE_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
CODED = {"bfloat16": "coded_bfloat16", "float32": "coded_float32"}
"""How layers' matrices are stored where the kernels have it and the numbers allow it, each of them
whole: those in bfloat16 in twelve bits a number (csrc/cpu/layers/coded.h), those in float32 in
twenty-four, where the last eight are zeros (csrc/cpu/layers/short_floats.h)."""
WORTH_CODING = 0.9
"""The largest part of a matrix's bytes that it may have then."""
SCREENED = 1 << 20
"""Weights of the smallest head that is screened: less of them stay in cache."""


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """The weights of a linear layer, packed.

    Attributes:
        data: uint8, its panels.
        halves: 2 where panels of gates and of ups take turns, else 1.
        weights, isa: how they are packed: one of ``WEIGHTS``, or of ``CODED``.
    """

    data: Tensor
    outputs: int
    inputs: int
    halves: int
    weights: str
    isa: str

    def unpacked(self, rows: Tensor) -> Tensor:
        """Return rows, [n, inputs] of the numbers that sums are made in; ``rows``: int64 [n]."""
        dtype = sums(self.weights)
        if not len(rows):
            return torch.empty(0, self.inputs, dtype=dtype, device="cpu")
        memory = aligned(len(rows) * self.inputs * dtype.itemsize)
        numbers = memory.view(dtype).view(len(rows), self.inputs)
        how = self.weights, self.isa, self.data, self.outputs, self.inputs, self.halves
        _C.unpack(*how, rows.contiguous(), numbers)
        return numbers


def sums(weights: str) -> torch.dtype:
    """Return the numbers that sums are made in."""
    return torch.float64 if weights == "float64" else torch.float32


def linears(layer: Layer) -> tuple[tuple[Linear, ...], tuple[int, ...]]:
    """Return the linear layers of a layer, and the ``halves`` of each."""
    return (layer.qkv, layer.out, layer.up, layer.down), (1, 1, 2 if layer.gated else 1, 1)


def pack(
    weights: str, isa: str, linears: Sequence[Linear], halves: Sequence[int] = (1,)
) -> list[PackedLinear]:
    """Pack linear layers into one piece of memory, one after the other."""
    sizes = [
        _C.packed_bytes(weights, isa, linear.outputs, linear.inputs, half)
        for linear, half in zip(linears, halves)
    ]
    packed = []
    for linear, half, data in zip(linears, halves, pieces(sizes)):
        _C.pack(weights, isa, [weight.detach() for weight in linear.weights], half, data)
        packed.append(PackedLinear(data, linear.outputs, linear.inputs, half, weights, isa))
    return packed


def coded(packed: list[PackedLinear]) -> list[PackedLinear]:
    """Store packed linear layers as :data:`CODED` where that pays."""
    sizes = []
    for one in packed:
        size = 0
        if one.weights in CODED:
            size = _C.coded_bytes(*_matrix(one))
        sizes.append(size if 0 < size <= WORTH_CODING * one.data.nbytes else one.data.nbytes)
    if all(size == one.data.nbytes for size, one in zip(sizes, packed)):
        return packed
    stored = []
    for one, data in zip(packed, pieces(sizes)):
        if data.nbytes == one.data.nbytes:
            stored.append(replace(one, data=data.copy_(one.data)))
        else:
            _C.code(*_matrix(one), data)
            stored.append(replace(one, data=data, weights=CODED[one.weights]))
    return stored


def _matrix(one: PackedLinear) -> tuple[str, str, Tensor, int, int, int]:
    return one.weights, one.isa, one.data, one.outputs, one.inputs, one.halves


def pieces(sizes: Sequence[int]) -> list[Tensor]:
    """Return uint8 tensors of one piece of memory, one after the other, aligned."""
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // ALIGNMENT) * ALIGNMENT)
    memory = aligned(starts[-1])
    return [memory[start : start + size] for start, size in zip(starts, sizes)]


def packed_one_by_one(
    plan: Plan, weights: str, isa: str, codes: bool = True
) -> Iterator[list[PackedLinear]]:
    """Pack the linear layers of each layer, then the head."""
    for layer in plan.layers:
        packed = pack(weights, isa, *linears(layer))
        yield coded(packed) if codes else packed
    yield pack(weights, isa, (plan.head,))


class PackedPlan:
    """The weights of a plan, packed, and what the passes that read them share.

    Args:
        plan: its tensors are read, and kept where they are used as they are (the embedding).
        weights: one of ``WEIGHTS``.
        isa: the instruction set to pack for; empty: the best one here, or what ``MSN_ISA`` names.
        panels: the linear layers of each layer, then the head, where they were packed before.
        codes: whether layers may be :data:`CODED`.
    """

    def __init__(
        self,
        plan: Plan,
        weights: str,
        isa: str = "",
        panels: Iterable[list[PackedLinear]] | None = None,
        codes: bool = True,
    ):
        self.plan, self.weights = plan, weights
        self.isa: str = _C.layer_isa(isa)["name"]
        self.dtype = sums(weights)
        self.cache_dtype = CACHE_DTYPES.get(weights, torch.bfloat16)
        *of_layers, (self.head,) = panels or packed_one_by_one(plan, weights, self.isa, codes)
        self.layers = [self._layer(*layer) for layer in zip(plan.layers, of_layers)]
        self.screen = self._screen()
        self.norm = self._norm(plan.norm)
        # Rows of a packed embedding are read from the head, which it is.
        self.table = plan.embedding.detach() if is_plain(plan.embedding) else None
        self.positions = None if plan.positions is None else self._number(plan.positions)
        self.rotaries: list[tuple[Tensor, Tensor]] = []
        self.rotary_positions = 0
        self.adapter: tuple | None = None  # :func:`.packed_adapter.packed_adapter`'s

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a pass reads."""
        packed = [layer[name][0] for layer in self.layers for name in ("qkv", "out", "up", "down")]
        return sum(data.nbytes for data in (*packed, self.head.data))

    def _screen(self) -> Tensor | None:
        """Return a copy of the head in int8 that tells which logits cannot be among the largest
        (csrc/cpu/layers/screen.h); None where it would save nothing, or cannot tell.
        """
        plan, head = self.plan, self.head
        if plan.head.biases or plan.logit_scale != 1 or plan.logit_softcap:
            return None
        if head.outputs * head.inputs < SCREENED:
            return None
        how = self.weights, self.isa
        size = _C.screen_bytes(*how, head.outputs, head.inputs)
        if not size:
            return None
        screen = aligned(size)
        made = _C.pack_screen(*how, head.data, head.outputs, head.inputs, screen)
        return screen if made else None

    def _dense_head(self) -> Tensor | None:
        """Return the head's own weights where they are what was packed."""
        first, *others = self.plan.head.weights
        same = is_plain(first) and first.dtype == getattr(torch, self.weights)
        if others or not same or not first.is_contiguous() or first.shape[1] % 2:
            return None
        return first.detach()

    def _number(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype).contiguous()

    def _norm(self, norm: Norm | None) -> tuple | None:
        if norm is None:
            return None
        weight = self._number(norm.weight) + norm.offset
        bias = None if norm.bias is None else self._number(norm.bias)
        return norm.kind, weight, bias, norm.eps

    def _linear(self, packed: PackedLinear, linear: Linear) -> tuple:
        bias = None
        if linear.biases:
            bias = torch.cat([self._number(piece) for piece in linear.biases])
        return packed.data, packed.weights, packed.outputs, packed.inputs, bias

    def _layer(self, layer: Layer, panels: list[PackedLinear]) -> dict:
        """Return what ``_C.ForwardPass.add_layer`` takes."""
        its, _ = linears(layer)
        qkv, out, up, down = map(self._linear, panels, its)
        attention = layer.attention
        return dict(
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_size=attention.head_size,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
            rotary=-1 if attention.rotary is None else attention.rotary,
            q_norm=self._norm(attention.q_norm),
            k_norm=self._norm(attention.k_norm),
            norm_each_head=attention.norm_each_head,
            attention_norm=self._norm(layer.attention_norm),
            after_attention=self._norm(layer.after_attention),
            mlp_norm=self._norm(layer.mlp_norm),
            after_mlp=self._norm(layer.after_mlp),
            qkv=qkv,
            out=out,
            up=up,
            down=down,
            gated=layer.gated,
            activation=layer.activation,
            parallel=layer.parallel,
            residual_scale=layer.residual_scale,
        )

    def forward_pass(self) -> _C.ForwardPass:
        """Return a pass over these weights; it has no cache yet."""
        plan = self.plan
        new = _C.ForwardPass(self.weights, self.isa)
        new.set_embedding(self.table, plan.embedding.shape[1], plan.embedding_scale, self.positions)
        for rotary in plan.rotaries:
            new.add_rotary(rotary.size)
        for layer in self.layers:
            new.add_layer(layer)
        new.set_head(
            self.norm, self._linear(self.head, plan.head), plan.logit_scale, plan.logit_softcap
        )
        if self.screen is not None:
            new.set_screen(self.screen, self._dense_head())
        return new

    def tables(self, positions: int) -> list[tuple[Tensor, Tensor]]:
        """Return the rotary tables for ``positions`` or more, [positions, size / 2] each."""
        if positions > self.rotary_positions:
            self.rotary_positions = max(512, -(-positions // 256) * 256, self.rotary_positions * 2)
            at = torch.arange(self.rotary_positions, device="cpu")
            tables = [rotary.tables(at) for rotary in self.plan.rotaries]
            self.rotaries = [(self._number(cos), self._number(sin)) for cos, sin in tables]
        return self.rotaries


def is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
