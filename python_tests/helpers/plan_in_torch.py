"""A plan run in torch, over whole texts and without a cache, to be read beside ``plan.py``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from msn_ext.decoding.forward.plan import Attention, Layer, Linear, Norm, Plan

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@torch.no_grad()
def logits_of(plan: Plan, tokens: Tensor) -> Tensor:
    """Return the logits [B, P, V] of texts [B, P] that begin at position 0."""
    positions = torch.arange(tokens.shape[1])
    tables = [rotary.tables(positions) for rotary in plan.rotaries]
    h = plan.embedding[tokens] * plan.embedding_scale
    if plan.positions is not None:
        h = h + plan.positions[positions]
    for layer in plan.layers:
        after = h + layer.residual_scale * attended(layer, h, tables)
        before_mlp = h if layer.parallel else after
        h = after + layer.residual_scale * gated(layer, before_mlp)
    logits = plan.logit_scale * product(plan.head, normed(plan.norm, h))
    return capped(plan.logit_softcap, logits)


def attended(layer: Layer, h: Tensor, tables: list[tuple[Tensor, Tensor]]) -> Tensor:
    its = layer.attention
    sizes = [heads * its.head_size for heads in (its.heads, its.kv_heads, its.kv_heads)]
    q, k, v = product(layer.qkv, normed(layer.attention_norm, h)).split(sizes, -1)
    q, k = normed_heads(its, its.q_norm, q), normed_heads(its, its.k_norm, k)
    if its.rotary is not None:
        q, k = turned(q, *tables[its.rotary]), turned(k, *tables[its.rotary])
    k, v = (x.repeat_interleave(its.heads // its.kv_heads, 1) for x in (k, in_heads(its, v)))
    scores = capped(its.softcap, its.scale * q @ k.mT)
    behind = torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])
    seen = (behind >= 0) & (behind < (its.window or h.shape[1]))
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return normed(layer.after_attention, product(layer.out, mixed.transpose(1, 2).flatten(2)))


def gated(layer: Layer, h: Tensor) -> Tensor:
    up = product(layer.up, normed(layer.mlp_norm, h))
    gate, up = up.chunk(2, -1) if layer.gated else (up, 1)
    return normed(layer.after_mlp, product(layer.down, ACTIVATIONS[layer.activation](gate) * up))


def in_heads(its: Attention, x: Tensor) -> Tensor:
    """[B, P, heads · size] -> [B, heads, P, size]"""
    return x.unflatten(-1, (-1, its.head_size)).transpose(1, 2)


def normed_heads(its: Attention, norm: Norm | None, x: Tensor) -> Tensor:
    each = its.norm_each_head
    return normed(norm, in_heads(its, x)) if each else in_heads(its, normed(norm, x))


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * (norm.weight + norm.offset)
    return x if norm.bias is None else x + norm.bias


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, rest = x.split([cos.shape[-1]] * 2 + [x.shape[-1] - 2 * cos.shape[-1]], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def capped(cap: float, x: Tensor) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


def product(linear: Linear, x: Tensor) -> Tensor:
    y = x @ torch.cat(linear.weights).mT
    return y + torch.cat(linear.biases) if linear.biases else y
