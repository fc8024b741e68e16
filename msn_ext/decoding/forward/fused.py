"""The fused forward pass: a plan over the model's own weights, for a GPU, where launches cost.

Products are torch's, which are cuBLAS's; what stands between them is an op each
(:mod:`msn_ext.ops.fused`), one launch. Prompts are read by the model's own forward pass, as their
products outweigh all launches; trees are checked here, in the same cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from msn_ext import ops

from ..attention import KernelAttention, MaskAttention
from ..past import KeysValues
from .adapter import NoiseAdapter
from .correction import correction
from .plan import Attention, Layer, Linear, NoPlan, Norm, Plan
from .protocol import Answers
from .transformers import TransformersForward

MOST_HEAD_SIZE = 256
"""Of ``ops.tree_attention``."""

# ---- weights -------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """Tensors that together are one, by rows; ``starts``: the first row of each."""

    tensor: Tensor
    starts: list[int]


def in_one(pieces: Sequence[Tensor]) -> Whole | None:
    """Return the tensor whose rows the pieces are, in whatever order; None: there is none."""
    first = min(pieces, key=Tensor.storage_offset).detach()
    if len(pieces) == 1:
        return Whole(first, [0])
    row, like = first.stride(0), (first.stride(), first.shape[1:])
    starts = [(piece.storage_offset() - first.storage_offset()) // row for piece in pieces]
    ends = 0
    for start, piece in sorted(zip(starts, pieces), key=lambda pair: pair[0]):
        same = piece.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        offset = piece.storage_offset() - first.storage_offset()
        fits = same and (piece.stride(), piece.shape[1:]) == like
        if not fits or (start, offset) != (ends, ends * row):
            return None
        ends += len(piece)
    shape = ends, *first.shape[1:]
    return Whole(first.as_strided(shape, first.stride(), first.storage_offset()), starts)


@torch.inference_mode(False)  # or they could not be trained any more
@torch.no_grad()
def lay_together(model: PreTrainedModel, plan: Plan) -> None:
    """Lay weights that multiply the same rows one below the other, so that they are one product.

    The one copy stays: parameters become views of the whole, layer by layer. Parameters whose
    memory others use, too, stay where they are, with their neighbours.
    """
    users = Counter(x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers()))
    for layer in plan.layers:
        for linear in (layer.qkv, layer.up):
            for pieces in (linear.weights, linear.biases):
                if len(pieces) < 2 or not all(_is_alone(piece, users) for piece in pieces):
                    continue
                whole = torch.cat([piece.detach() for piece in pieces])
                for piece, part in zip(pieces, whole.split([len(piece) for piece in pieces])):
                    piece.data = part
        if plan.embedding.is_cuda:  # torch's allocator would keep them, of no use to larger ones
            torch.cuda.empty_cache()


def _is_alone(piece: Tensor, users: Counter[int]) -> bool:
    storage = piece.untyped_storage()
    return (
        type(piece) is nn.Parameter
        and piece.is_contiguous()
        and not piece.is_inference()
        and storage.nbytes() == piece.nbytes
        and users[storage.data_ptr()] == 1
    )


class Product:
    """A linear layer: one product where its weights lie together, else one for each of them."""

    def __init__(self, linear: Linear):
        weight = in_one(linear.weights)
        bias = in_one(linear.biases) if linear.biases else None
        if weight is not None and (not linear.biases or (bias and bias.starts == weight.starts)):
            self._parts = [(weight.tensor, bias.tensor if bias else None)]
            self._places = [(0, start) for start in weight.starts]
        else:
            biases = [bias.detach() for bias in linear.biases]
            weights = [weight.detach() for weight in linear.weights]
            self._parts = [*zip_longest(weights, biases)]
            self._places = [(number, 0) for number in range(len(weights))]
        self.linear = linear
        self._firsts = [0, *accumulate(len(weight) for weight in linear.weights)]

    def __call__(self, x: Tensor) -> list[Tensor]:
        return [F.linear(x, weight, bias) for weight, bias in self._parts]

    def laid_out(self, rows: Tensor) -> list[Tensor]:
        """Return rows [outputs, ...] by results, each in the order of its columns."""
        results = [rows.new_zeros(len(weight), *rows.shape[1:]) for weight, _ in self._parts]
        for piece, first in zip(self.linear.weights, self._firsts):
            number, column = self.place(first)
            results[number][column : column + len(piece)] = rows[first : first + len(piece)]
        return results

    def place(self, output: int) -> tuple[int, int]:
        """Return which of the results an output is in, and its column there."""
        piece = bisect_right(self._firsts, output) - 1
        number, start = self._places[piece]
        return number, start + output - self._firsts[piece]


Run = Callable[[Product, Tensor], list[Tensor]]
"""How a product is run: as it is, or with what an adapter adds to noise rows."""


class Heads(NamedTuple):
    """Where heads lie in what a :class:`Product` gives: the first one, and the step to the next."""

    result: int
    first: int
    step: int
    heads: int
    size: int

    @classmethod
    def of(cls, product: Product, first: int, heads: int, size: int) -> Heads:
        places = [product.place((first + head) * size) for head in range(heads)]
        number, start = places[0]
        step = places[1][1] - start if heads > 1 else size
        if places != [(number, start + head * step) for head in range(heads)]:
            raise NoPlan("its heads do not lie at even distances")
        return cls(number, start, step, heads, size)

    def view(self, results: list[Tensor], batch: int, nodes: int) -> Tensor:
        """Return them, [B, N, heads, size]."""
        its = results[self.result]
        shape, row = (batch, nodes, self.heads, self.size), its.stride(0)
        return its.as_strided(shape, (nodes * row, row, self.step, 1), self.first)


# ---- the plan ------------------------------------------------------------------------------------

Normed = tuple[str, Tensor | None, Tensor | None, float, float]


def _norm(norm: Norm | None) -> Normed:
    """Return what the ops take: kind, weight, bias, eps and offset."""
    if norm is None:
        return "none", None, None, 0.0, 0.0
    bias = None if norm.bias is None else norm.bias.detach()
    return norm.kind, norm.weight.detach(), bias, norm.eps, norm.offset


class FusedLayer:
    """A layer of a plan, as the ops take it."""

    def __init__(self, layer: Layer):
        its, self.plan = layer.attention, layer
        self.qkv, self.out = Product(layer.qkv), Product(layer.out)
        self.up, self.down = Product(layer.up), Product(layer.down)
        firsts = (0, its.heads), (its.heads, its.kv_heads), (its.heads + its.kv_heads, its.kv_heads)
        self.heads = [Heads.of(self.qkv, *where, its.head_size) for where in firsts]
        self.middle = layer.up.outputs // (2 if layer.gated else 1)
        self.attention_norm, self.mlp_norm = _norm(layer.attention_norm), _norm(layer.mlp_norm)
        self.after_attention, self.after_mlp = _norm(layer.after_attention), _norm(layer.after_mlp)
        self.head_norms = _head_norms(its)

    def mlp(self, x: Tensor, run: Run) -> Tensor:
        results = run(self.up, x)
        halves = [self._half(results, half) for half in range(2 if self.plan.gated else 1)]
        up = halves[1] if self.plan.gated else None
        [y] = run(self.down, ops.gated_activation(halves[0], up, self.plan.activation))
        return y

    def _half(self, results: list[Tensor], half: int) -> Tensor:
        number, column = self.up.place(half * self.middle)
        return results[number][:, column : column + self.middle]


def _head_norms(its: Attention) -> tuple:
    """Return what ``ops.rotary_cache`` takes after its tables."""
    q, k = _norm(its.q_norm), _norm(its.k_norm)
    if (q[0], *q[3:]) != (k[0], *k[3:]):
        raise NoPlan("its queries and its keys have norms of different kinds")
    kind, _, _, eps, offset = q
    return kind, *q[1:3], *k[1:3], eps, offset, its.norm_each_head


class FusedPlan:
    """A plan whose tensors the ops take as they are.

    Args:
        plan: read from a model; its weights are used where they lie, and may change there.
    """

    def __init__(self, plan: Plan):
        if (size := plan.layers[0].attention.head_size) > MOST_HEAD_SIZE:
            raise NoPlan(f"its heads have the size {size}, more than {MOST_HEAD_SIZE}")
        self.plan = plan
        self.layers = [FusedLayer(layer) for layer in plan.layers]
        self.norm, self.head = _norm(plan.norm), Product(plan.head)
        self.embedding = plan.embedding.detach()
        self.positions = None if plan.positions is None else plan.positions.detach()
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._known = 0

    def tables(self, positions: int) -> list[tuple[Tensor, Tensor]]:
        """Return cosines and sines for ``positions`` or more, [positions, size / 2] each."""
        if positions > self._known:
            at, device = torch.arange(positions, device="cpu"), self.embedding.device
            double = self.embedding.dtype == torch.float64
            number = torch.float64 if double else torch.float32
            self._tables = [
                (cos.to(device, number).contiguous(), sin.to(device, number).contiguous())
                for cos, sin in (rotary.tables(at) for rotary in self.plan.rotaries)
            ]
            self._known = positions
        return self._tables

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the residual stream's first rows, [R, size], of int64 [R]."""
        h = F.embedding(tokens, self.embedding)
        if self.plan.embedding_scale != 1:
            h.mul_(self.plan.embedding_scale)
        return h if self.positions is None else h.add_(F.embedding(positions, self.positions))

    def logits(self, x: Tensor, run: Run) -> Tensor:
        [logits] = run(self.head, x)
        if self.plan.logit_scale != 1:
            logits.mul_(self.plan.logit_scale)
        if cap := self.plan.logit_softcap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits


# ---- noise rows ----------------------------------------------------------------------------------


class NoiseRows:
    """What a gated adapter adds to the products of a plan: two of torch's, with A of all that share
    an input in one.

    Args:
        fused: a model's.
        adapter: of the same model.
    """

    def __init__(self, fused: FusedPlan, adapter: NoiseAdapter):
        self._adapter = adapter
        layers = ((layer.qkv, layer.out, layer.up, layer.down) for layer in fused.layers)
        self._products = [product for layer in layers for product in layer] + [fused.head]
        self._added: dict[Product, tuple[Tensor, ...]] = {}
        self._version: tuple | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapter's weights where they have changed, in place: captured steps read
        the same memory.
        """
        if self._version == self._adapter.version:
            return
        self._version = self._adapter.version
        for product in self._products:
            found = correction(product.linear, self._adapter, product.linear.weights[0].dtype)
            if found is None:
                continue
            new = found.a, *product.laid_out(found.b)
            for to, x in zip(self._added.setdefault(product, new), new):
                to.copy_(x)

    def over(self, batch: int, nodes: int, tails: int) -> Run:
        """Return how products of [B * N] rows are run, the last of each tree's nodes noise."""

        def run(product: Product, x: Tensor) -> list[Tensor]:
            results = product(x)
            if (added := self._added.get(product)) is not None:
                a, *parts = added
                low = F.linear(x.view(batch, nodes, -1)[:, nodes - tails :], a)
                for y, b in zip(results, parts):
                    last = y.view(batch, nodes, -1)[:, nodes - tails :]
                    last.baddbmm_(low, b.T.expand(batch, *b.T.shape))
            return results

        return run


# ---- the pass ------------------------------------------------------------------------------------


class FusedForward(TransformersForward):
    """Reads prompts as the model does, and checks trees by a fused plan.

    Args:
        fused: the model's.
        model, attention, fixed, noise: as of :class:`.transformers.TransformersForward`.
    """

    def __init__(
        self,
        fused: FusedPlan,
        model: PreTrainedModel,
        attention: KernelAttention | MaskAttention,
        fixed: int | None = None,
        noise: NoiseAdapter | None = None,
    ):
        super().__init__(model, attention, fixed, noise)
        self._fused = fused
        self._noise_rows = None if noise is None else NoiseRows(fused, noise)
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._positions = 0

    def clear(self) -> None:
        super().clear()
        if self._noise_rows is not None:
            self._noise_rows.refresh()

    def check(
        self,
        tokens: Tensor,
        positions: Tensor,
        prefix: Tensor,
        offsets: Tensor,
        ancestors: Tensor,
        end: int,
        tails: int = 0,
        parents: Tensor | None = None,
    ) -> Answers:
        self._cache.reach(end)
        if self._cache.capacity > self._positions:  # then the cache moved, too
            self._positions = self._cache.capacity
            self._tables = self._fused.tables(self._positions)
        fused, tree = self._fused, (positions, prefix, offsets, ancestors)
        run: Run = Product.__call__
        if tails and self._noise_rows is not None:
            batch, nodes = tokens.shape
            run = self._noise_rows.over(batch, nodes, tails)
        h = fused.embedded(tokens.flatten(), positions.flatten())
        x = ops.residual_norm(h, None, 1.0, *_norm(None), *fused.layers[0].attention_norm)
        norms = [layer.attention_norm for layer in fused.layers[1:]] + [fused.norm]
        for layer, stored, norm in zip(fused.layers, self._cache.first(self._cache.end), norms):
            attended = self._attended(layer, x, stored, run, *tree)
            scale, after = layer.plan.residual_scale, (layer.after_attention, layer.after_mlp)
            if layer.plan.parallel:
                before = ops.residual_norm(h, None, 1.0, *_norm(None), *layer.mlp_norm)
                ops.residual_norm(h, attended, scale, *after[0], *_norm(None))
            else:
                before = ops.residual_norm(h, attended, scale, *after[0], *layer.mlp_norm)
            x = ops.residual_norm(h, layer.mlp(before, run), scale, *after[1], *norm)
        return Answers(fused.logits(x, run).view(*tokens.shape, -1))

    def _attended(
        self,
        layer: FusedLayer,
        x: Tensor,
        stored: KeysValues,
        run: Run,
        positions: Tensor,
        prefix: Tensor,
        offsets: Tensor,
        ancestors: Tensor,
    ) -> Tensor:
        """Return what a layer's attention adds to the residual stream, [R, size]."""
        its, results = layer.plan.attention, run(layer.qkv, x)
        q, k, v = (heads.view(results, *positions.shape) for heads in layer.heads)
        turned = (None, None) if its.rotary is None else self._tables[its.rotary]
        q = ops.rotary_cache(q, k, v, *stored, prefix, positions, *turned, *layer.head_norms)
        mixed = ops.tree_attention(
            q.transpose(1, 2),
            *stored,
            prefix,
            ancestors,
            offsets=offsets,
            scale=its.scale,
            window=its.window,
            softcap=its.softcap,
        )
        [y] = run(layer.out, mixed.view(len(x), -1))
        return y
