"""A plan: what a decoder-only model computes, as data.

A plan holds a model's own parameters (or views of them), copies nothing and runs nothing.
:mod:`.families` read it from models; :mod:`.native` packs its weights and runs it, :mod:`.fused`
runs it over weights as they are. In formulas, for rows x of the residual stream::

    h = embedding[token] * embedding_scale + positions[position]
    for layer in layers:
        q, k, v = qkv(norm(h));  q, k = rotated(q_norm(q)), rotated(k_norm(k))
        h = h + residual_scale * after_attention(out(attention(q, k, v)))
        h = h + residual_scale * after_mlp(down(gated(mlp_norm(h))))
    logits = softcap(logit_scale * head(norm(h)))

Norms that are None are the identity. Where ``parallel``, both branches read the h before the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = "silu", "gelu", "gelu_tanh", "relu"


class NoPlan(Exception):
    """A model that no plan can be read from; the text says why, for the user to read."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the last dimension.

    Attributes:
        kind: ``"rms"`` (x / sqrt(mean(x^2) + eps)) or ``"layer"`` (mean taken off before).
        weight: [size]; multiplied by, after ``offset`` is added (Gemma's norms: 1).
        bias: [size], added at the end; None: none.
    """

    kind: str
    weight: Tensor
    eps: float
    bias: Tensor | None = None
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer: y = x W^T + bias, W the given rows one below the other.

    Attributes:
        weights: 2-D tensors [outputs of this piece, inputs] with any strides, together W.
        biases: 1-D, together the bias; empty: none.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] = ()

    @property
    def inputs(self) -> int:
        return self.weights[0].shape[1]

    @property
    def outputs(self) -> int:
        return sum(len(weight) for weight in self.weights)


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotary embedding: the first ``size`` numbers of a head turn, i with i + size / 2.

    Attributes:
        size: of a head, how many numbers turn; even.
        tables: gives for int64 positions [P] cosines and sines, [P, size / 2] each, float32 or
            float64, as the model's own module computes them, its scaling included.
        sample: of the tables, as they were when this was read; the module may change.
    """

    size: int
    tables: Callable[[Tensor], tuple[Tensor, Tensor]]
    sample: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention between the projections.

    Attributes:
        scale: of q . k.
        window: keys that a query sees, itself included; 0: all.
        softcap: s -> softcap * tanh(s / softcap) before soft-max; 0: none.
        rotary: index into the plan's ``rotaries``; None: positions do not enter here.
        q_norm, k_norm: of each head where ``norm_each_head``, else over all heads at once.
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    rotary: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_each_head: bool = True


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer (formulas in the module's docstring).

    Attributes:
        qkv: outputs: all heads' q, then k, then v, head by head.
        up: where ``gated``, all gates before all ups: y = activation(gate) * up.
        activation: one of ``ACTIVATIONS``.
    """

    qkv: Linear
    attention: Attention
    out: Linear
    up: Linear
    gated: bool
    activation: str
    down: Linear
    attention_norm: Norm | None = None
    after_attention: Norm | None = None
    mlp_norm: Norm | None = None
    after_mlp: Norm | None = None
    parallel: bool = False
    residual_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """A decoder-only model.

    Attributes:
        embedding: [V, size] or more rows.
        positions: [P, size] of learned positions, that of position 0 first; None: none.
        rotaries: the different ones of the layers.
        norm: before the head.
        head: outputs: the vocabulary's logits.
        logit_scale, logit_softcap: see the formulas; a softcap of 0: none.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    rotaries: tuple[Rotary, ...] = ()
    embedding_scale: float = 1.0
    positions: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float = 0.0


def is_same(one: Any, other: Any) -> bool:
    """Return whether two plans of a model, or parts of them, are the same: tensors by where they
    lie, rotary embeddings by their samples.
    """
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, Rotary):
        if one.sample is None or other.sample is None:
            return False
        return one.size == other.size and torch.equal(one.sample, other.sample)
    if is_dataclass(one):
        parts = ((getattr(one, x.name), getattr(other, x.name, None)) for x in fields(one))
        return type(one) is type(other) and all(is_same(*pair) for pair in parts)
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and _place(one) == _place(other)
    return one == other


def _place(tensor: Tensor) -> tuple:
    plain = type(tensor) in (Tensor, nn.Parameter)  # others need not lie anywhere
    where = tensor.data_ptr() if plain else id(tensor)
    return where, tensor.shape, tensor.stride(), tensor.dtype
