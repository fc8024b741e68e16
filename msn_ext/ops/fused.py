"""The small ops of a decoder layer, each one launch: what stands between the matrix products, which
are torch's (:mod:`msn_ext.decoding.forward.fused`).

Numbers are of one dtype, the model's; sums and functions are float32 (float64 for float64), and a
result is rounded once, where it is stored. A norm is "none", "rms" (x / sqrt(mean(x^2) + eps)) or
"layer" (of x - mean); the result is multiplied by ``weight + offset``, and ``bias`` added.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from msn_ext import _C

from .registration import dense_rows, expect_dims, op


@op(
    'residual_norm(Tensor(a!) h, Tensor? x=None, float scale=1., str x_norm="none", Tensor?'
    ' x_weight=None, Tensor? x_bias=None, float x_eps=0., float x_offset=0., str norm="none",'
    " Tensor? weight=None, Tensor? bias=None, float eps=0., float offset=0.) -> Tensor"
)
def residual_norm(
    h: Tensor,
    x: Tensor | None = None,
    scale: float = 1.0,
    x_norm: str = "none",
    x_weight: Tensor | None = None,
    x_bias: Tensor | None = None,
    x_eps: float = 0.0,
    x_offset: float = 0.0,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Iterator[Tensor]:
    """Add a branch to the residual stream, in place, and norm the sum: h += scale * x_norm(x).

    Args:
        h: [R, size], contiguous; changed where there is an ``x``.
        x: [R, size], what a branch gives; None: the stream is as it was.
        x_norm, x_weight, x_bias, x_eps, x_offset: of the branch, for models that have one there.
        norm, weight, bias, eps, offset: of the sum, as it was rounded; weights are [size].

    Returns:
        norm(h), [R, size].
    """
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    yield out
    x = None if x is None else x.contiguous()
    of_x = x_norm, x_weight, x_bias, x_eps, x_offset
    _C.residual_norm(h, x, scale, *of_x, norm, weight, bias, eps, offset, out)


@op(
    "rotary_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor prefix,"
    ' Tensor positions, Tensor? cosines=None, Tensor? sines=None, str norm="none", Tensor?'
    " q_weight=None, Tensor? q_bias=None, Tensor? k_weight=None, Tensor? k_bias=None, float eps=0.,"
    " float offset=0., bool norm_each_head=True) -> Tensor"
)
def rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: Tensor,
    positions: Tensor,
    cosines: Tensor | None = None,
    sines: Tensor | None = None,
    norm: str = "none",
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    norm_each_head: bool = True,
) -> Iterator[Tensor]:
    """Norm and turn queries and keys, and write keys and values into a cache, in place.

    Node i of row b has slot ``prefix[b] + i``. On CUDA a row whose slots are not all in the cache
    is not written, and a position outside the tables counts as the nearest one inside.

    Args:
        q, k, v: [B, N, heads, D], k and v of fewer heads, strides as they come.
        keys, values: the cache, [B, kv_heads, C, D] each, strides as they come.
        prefix: int64 [B], slots before the root.
        positions: int64 [B, N], rows of the tables.
        cosines, sines: [P, turned / 2], float32 (float64 for float64), of the first ``turned``
            numbers of a head: number i and number i + turned / 2 turn together. None: nothing
            turns.
        norm: of queries and of keys, before they turn.
        q_weight, q_bias, k_weight, k_bias: [D]; of all heads at once, [heads * D] and [kv_heads *
            D], without ``norm_each_head``.

    Returns:
        The queries, [B, N, heads, D], contiguous.
    """
    expect_dims("q", q, "[B, N, heads, D]")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    yield out
    _C.rotary_cache(
        dense_rows(q),
        dense_rows(k),
        dense_rows(v),
        keys,
        values,
        prefix.contiguous(),
        positions.contiguous(),
        cosines,
        sines,
        norm,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        eps,
        offset,
        norm_each_head,
        out,
    )


@op('gated_activation(Tensor gate, Tensor? up=None, str activation="silu") -> Tensor')
def gated_activation(
    gate: Tensor, up: Tensor | None = None, activation: str = "silu"
) -> Iterator[Tensor]:
    """Return activation(gate) * up, what stands in the middle of a decoder layer's MLP.

    Args:
        gate: [R, size], with any stride between rows (halves of one product).
        up: the same; None: 1.
        activation: "silu", "gelu", "gelu_tanh" or "relu".

    Returns:
        [R, size], contiguous.
    """
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    yield out
    _C.gated_activation(dense_rows(gate), None if up is None else dense_rows(up), activation, out)
