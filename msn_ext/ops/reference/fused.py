"""The small ops between a decoder layer's matrix products, specified: in float64, rounded to the
dtype of the rows where something is stored.
"""

import torch

from .layers import ACTIVATIONS, normed, turned


def rms_or_layer(x, norm, weight, bias, eps, offset):
    if norm == "none":
        return x
    bias = None if bias is None else bias.double()
    return normed(x, norm, weight.double() + offset, bias, eps)


def residual_norm(
    h,
    x=None,
    scale=1.0,
    x_norm="none",
    x_weight=None,
    x_bias=None,
    x_eps=0.0,
    x_offset=0.0,
    norm="none",
    weight=None,
    bias=None,
    eps=0.0,
    offset=0.0,
):
    if x is not None:
        x = rms_or_layer(x.double(), x_norm, x_weight, x_bias, x_eps, x_offset)
        h.copy_((h.double() + scale * x).to(h.dtype))
    return rms_or_layer(h.double(), norm, weight, bias, eps, offset).to(h.dtype)


def rotary_cache(
    q,
    k,
    v,
    keys,
    values,
    prefix,
    positions,
    cosines=None,
    sines=None,
    norm="none",
    q_weight=None,
    q_bias=None,
    k_weight=None,
    k_bias=None,
    eps=0.0,
    offset=0.0,
    norm_each_head=True,
):
    if cosines is None:
        cosines = sines = torch.empty(int(positions.max()) + 1 if len(positions) else 1, 0)
    cos, sin = (table.double()[positions][:, :, None] for table in (cosines, sines))

    def prepared(x, weight, bias):
        rows = x.double() if norm_each_head else x.double().flatten(2)
        rows = rms_or_layer(rows, norm, weight, bias, eps, offset).view(x.shape)
        return turned(rows, cos, sin).to(x.dtype)

    k = prepared(k, k_weight, k_bias)
    for b, first in enumerate(prefix.tolist()):
        for cache, rows in ((keys, k), (values, v)):
            cache[b, :, first : first + rows.shape[1]] = rows[b].transpose(0, 1)
    return prepared(q, q_weight, q_bias)


def gated_activation(gate, up=None, activation="silu"):
    y = ACTIVATIONS[activation](gate.double())
    return (y if up is None else y * up.double()).to(gate.dtype)
