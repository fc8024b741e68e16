"""The stages of a decoder layer on the CPU, each an op: norm and linear layer, rotary embedding and
cache, attention, and what stands around them.

They are the stages that the native forward pass runs (:mod:`msn_ext.decoding.forward`), which needs
one call for all layers; here they are alone, for tests, for readers, and for other loops. What a
row gets depends on that row's inputs alone, bit for bit, whatever else is computed with it.

Numbers are float64 where weights (or the cache) are, else float32. ``isa`` is "baseline", "avx2",
"avx512" or "avx512_bf16"; empty: the best one of this machine, or what ``MSN_ISA`` names. Packed
weights fit the instruction set that they were packed for.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from msn_ext import _C

from .registration import expect_dims, op

# ---- linear layers, norms, embeddings ------------------------------------------------------------


def pack_weights(weight: Tensor, weights: str, *, halves: int = 1, isa: str = "") -> Tensor:
    """Pack the weight of a linear layer for :func:`packed_linear`.

    Args:
        weight: [outputs, inputs], float16, bfloat16, float32 or float64, on the CPU.
        weights: how they are stored: "float64", "float32", "bfloat16", "float16" or "int8" (in
            blocks of 64 inputs, each with a scale in bfloat16). Or in fewer bits, each number
            whole: "coded_bfloat16", bfloat16 in twelve, for multiples of 8 inputs with
            "avx512_bf16"; "coded_float32", float32 whose last eight bits are zeros in twenty-four,
            with "avx512" and "avx512_bf16".
        halves: 2: the first half of the outputs are gates, the second ups, for "gate".

    Returns:
        uint8 [bytes]: panels of as many outputs as the instruction set takes at once, the last one
        filled up with zeros.
    """
    expect_dims("weight", weight, "[outputs, inputs]")
    outputs, inputs = weight.shape
    size = _C.packed_bytes(weights, isa, outputs, inputs, halves)
    if weights.startswith("coded_"):
        kind = weights.removeprefix("coded_")
        plain = pack_weights(weight, kind, halves=halves, isa=isa)
        matrix = kind, isa, plain, outputs, inputs, halves
        size = _C.coded_bytes(*matrix)
        if not size:
            raise ValueError(
                f"weight cannot be stored as '{weights}'; expected numbers whose last eight bits"
                " are zeros"
            )
        coded = torch.empty(size, dtype=torch.uint8, device="cpu")
        _C.code(*matrix, coded)
        return coded
    packed = torch.empty(size, dtype=torch.uint8, device="cpu")
    _C.pack(weights, isa, [weight.detach()], halves, packed)
    return packed


@op(
    "packed_linear(Tensor x, Tensor packed, str weights, int outputs, Tensor? bias=None, str"
    ' norm="none", Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0., str'
    ' epilogue="store", str activation="silu", float scale=1., float softcap=0., Tensor?'
    ' residual=None, Tensor? pick=None, str isa="") -> Tensor'
)
def packed_linear(
    x: Tensor,
    packed: Tensor,
    weights: str,
    outputs: int,
    bias: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    epilogue: str = "store",
    activation: str = "silu",
    scale: float = 1.0,
    softcap: float = 0.0,
    residual: Tensor | None = None,
    pick: Tensor | None = None,
    isa: str = "",
) -> Iterator[Tensor]:
    """Compute y = norm(x) W^T + bias, and what ``epilogue`` makes of it.

    ===========  ===================================================================================
    "store"      y: queries, keys and values
    "add"        residual + scale * y: after attention, and the end of an MLP
    "activate"   activation(y): an MLP without gates
    "gate"       activation(y of the gates) * y of the ups
    "logits"     scale * y, and with a softcap: softcap * tanh(scale * y / softcap)
    ===========  ===================================================================================

    Args:
        x: [R, inputs].
        packed: uint8, what :func:`pack_weights` made of [outputs, inputs].
        weights: as there. With "avx512_bf16" and "bfloat16", coded or not, norm(x) is rounded to
            bfloat16; with "int8" to multiples of 1/32767 of the largest number of its block of 64.
        bias: [outputs] or None.
        norm: "none", "rms" (``norm_weight * x / sqrt(mean(x^2) + eps)``) or "layer" (of x - mean).
        norm_weight, norm_bias: [inputs]; the bias may be None.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        residual: [P, outputs], for "add" only.
        pick: int64 [P], rows of x to compute; None: all.

    Returns:
        [P, outputs], or half of them for "gate".
    """
    expect_dims("x", x, "[R, inputs]")
    if (residual is None) != (epilogue != "add"):
        raise ValueError("residual is for epilogue 'add', which needs it")
    rows = x.shape[0] if pick is None else pick.shape[0]
    out = x.new_empty(rows, outputs // 2 if epilogue == "gate" else outputs)
    if residual is not None and (residual.shape != out.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual has shape {list(residual.shape)} and dtype {residual.dtype}; expected"
            f" {list(out.shape)} and {x.dtype}"
        )
    yield out
    if residual is not None:
        out.copy_(residual)
    _C.packed_linear(
        x.contiguous(),
        packed,
        weights,
        outputs,
        _dense(bias),
        norm,
        _dense(norm_weight),
        _dense(norm_bias),
        eps,
        epilogue,
        activation,
        scale,
        softcap,
        _dense(pick),
        isa,
        torch.get_num_threads(),
        out,
    )


@op(
    "add_norm(Tensor h, Tensor x, str norm, Tensor? norm_weight, Tensor? norm_bias=None, float"
    ' eps=0., float scale=1., str isa="") -> Tensor'
)
def add_norm(
    h: Tensor,
    x: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    scale: float = 1.0,
    isa: str = "",
) -> Iterator[Tensor]:
    """Return h + scale * norm(x), for models that have a norm after a branch.

    Args:
        h, x: [R, size], float32 or float64.
        norm, norm_weight, norm_bias, eps: as in :func:`packed_linear`, but not "none".
    """
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    yield out
    out.copy_(h)
    x = x.clone(memory_format=torch.contiguous_format)  # the stage norms in place
    normed = norm, _dense(norm_weight), _dense(norm_bias), eps
    _C.add_norm(out, x, *normed, scale, isa, torch.get_num_threads())


@op(
    "embed_rows(Tensor tokens, Tensor table, str weights, int size, int vocabulary, float scale=1.,"
    ' Tensor? positions=None, Tensor? position_table=None, str isa="") -> Tensor'
)
def embed_rows(
    tokens: Tensor,
    table: Tensor,
    weights: str,
    size: int,
    vocabulary: int,
    scale: float = 1.0,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    isa: str = "",
) -> Iterator[Tensor]:
    """Return scale * the rows of the tokens, and their positions' rows added to them.

    Args:
        tokens: int64 [R].
        table: [vocabulary, size], float16, bfloat16, float32 or float64; or uint8 [bytes], what
            :func:`pack_weights` made of it (of a head whose weights are the embedding's, too).
        weights: how they are packed; for the dtype of what is returned, too.
        positions: int64 [R], where there is a table of them.
        position_table: [P, size].

    Returns:
        [R, size], float64 for "float64", else float32.
    """
    expect_dims("tokens", tokens, "[R]")
    dtype = torch.float64 if weights == "float64" else torch.float32
    out = table.new_empty(tokens.shape[0], size, dtype=dtype)
    yield out
    placed = _dense(positions), _dense(position_table)
    inputs = tokens.contiguous(), table.contiguous(), weights, size, vocabulary, scale
    _C.embed_rows(*inputs, *placed, isa, torch.get_num_threads(), out)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ---- queries, keys and values --------------------------------------------------------------------


@op(
    "rotary_write(Tensor(a!) qkv, Tensor(b!) keys, Tensor(c!) values, Tensor prefix, Tensor"
    " ancestors, Tensor positions, int heads, int kv_heads, Tensor? cosines=None, Tensor?"
    ' sines=None, str norm="none", Tensor? q_weight=None, Tensor? q_bias=None, Tensor?'
    " k_weight=None, Tensor? k_bias=None, float eps=0., bool norm_each_head=True, str isa="
    '"") -> ()'
)
def rotary_write(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    cosines: Tensor | None = None,
    sines: Tensor | None = None,
    norm: str = "none",
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 0.0,
    norm_each_head: bool = True,
    isa: str = "",
) -> Iterator[None]:
    """Norm and turn queries and keys, and write keys and values into the cache, in place.

    Node i of row b has slot ``prefix[b] + i``. Queries stay in ``qkv``; keys there are turned, too.

    Args:
        qkv: [B, N, (heads + 2 * kv_heads) * D], contiguous: queries, keys, values.
        keys, values: the cache, [B, kv_heads, C * D] and [B, kv_heads, C * D'], contiguous, of
            float64, float32, bfloat16 or float16, C a multiple of 16 slots, D' the next multiple
            of 16 from D. Of a head, keys lie as [C / 16, D, 16] and values as [D' / 16, C, 16]; in
            bfloat16, two that are summed one after the other lie side by side: keys as [C / 16,
            D / 2, 16, 2] (an odd D rounded up, here and in the shape), values as [D' / 16, C / 2,
            16, 2].
        prefix: int64 [B], slots before the root.
        ancestors: int64 [N, W] or [B, N, W], from :func:`tree_ancestors`.
        positions: int64 [B, N], rows of the tables.
        cosines, sines: [P, turned / 2], of the first ``turned`` numbers of a head: number i and
            number i + turned / 2 are turned together. None: nothing turns.
        norm: of queries and of keys, as in :func:`packed_linear`.
        q_weight, q_bias, k_weight, k_bias: [D]; of all heads at once, [heads * D] and [kv_heads *
            D], without ``norm_each_head``.
    """
    yield
    _C.rotary_write(
        qkv,
        keys,
        values,
        prefix.contiguous(),
        ancestors.contiguous(),
        positions.contiguous(),
        heads,
        kv_heads,
        _dense(cosines),
        _dense(sines),
        norm,
        _dense(q_weight),
        _dense(q_bias),
        _dense(k_weight),
        _dense(k_bias),
        eps,
        norm_each_head,
        isa,
        torch.get_num_threads(),
    )


@op(
    "packed_attention(Tensor qkv, Tensor keys, Tensor values, Tensor prefix, Tensor ancestors, int"
    ' heads, int kv_heads, float scale, int window=0, float softcap=0., str isa="") -> Tensor'
)
def packed_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    isa: str = "",
) -> Iterator[Tensor]:
    """Attend from the nodes of a draft tree to the prefix and to their own ancestors, in the cache.

    As :func:`tree_attention` on the cache that :func:`rotary_write` fills, but that a token above
    gives the same bits whether it is in the tree or in the prefix. No slot behind the tree has a
    part in the result; a slot of the prefix before the window is multiplied by zero.

    Args:
        qkv, keys, values, prefix, ancestors: as in :func:`rotary_write`; of ``qkv``, the queries
            are read. A node without bits attends to the prefix and itself.
        scale: of the scores.
        window: if > 0, only the last ``window`` tokens up to a node.
        softcap: if > 0, scores become softcap * tanh(scores / softcap).

    Returns:
        [B, N, heads * D].
    """
    expect_dims("qkv", qkv, "[B, N, size]")
    batch, nodes, size = qkv.shape
    out = qkv.new_empty(batch, nodes, size // max(heads + 2 * kv_heads, 1) * max(heads, 0))
    yield out
    _C.packed_attention(
        qkv.contiguous(),
        keys,
        values,
        prefix.contiguous(),
        ancestors.contiguous(),
        heads,
        kv_heads,
        scale,
        window,
        softcap,
        isa,
        torch.get_num_threads(),
        out,
    )
