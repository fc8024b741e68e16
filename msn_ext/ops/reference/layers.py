"""The stages of a decoder layer, specified: sums in float64, what is stored rounded as stated."""

import torch
from torch.nn import functional as F

from msn_ext import _C

from .tree import ancestor_matrix

ACTIVATIONS: dict = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
STORED = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
INT8_BLOCK = 64
CODED_BLOCK = 256


def unpack_weights(packed, weights, outputs, inputs, halves=1, isa=""):
    """Return what :func:`msn_ext.ops.pack_weights` stored, [outputs, inputs] of float64."""
    width = _C.layer_isa(isa)["width"]
    panels = -(-outputs // halves // width) * halves
    if weights == "coded_bfloat16":
        packed, weights = decoded(packed, panels, inputs, width), "bfloat16"
    elif weights == "coded_float32":
        packed, weights = lengthened(packed, panels, inputs, width), "float32"
    packed = packed.view(panels, -1)
    if weights == "int8":
        blocks = -(-inputs // INT8_BLOCK)
        packed = packed.view(panels, blocks, width * (INT8_BLOCK + 2))
        numbers = packed[..., : width * INT8_BLOCK].view(torch.int8).double()
        scales = packed[..., width * INT8_BLOCK :].contiguous().view(torch.bfloat16).double()
        pairs = numbers.view(panels, blocks, INT8_BLOCK // 2, width, 2)
        numbers = pairs.transpose(3, 4).flatten(2, 3) * scales[:, :, None]
        of_panel = numbers.flatten(1, 2)[:, :inputs]
    elif weights == "bfloat16":
        pairs = packed.view(torch.bfloat16).view(panels, -(-inputs // 2), width, 2)
        of_panel = pairs.transpose(2, 3).flatten(1, 2)[:, :inputs].double()
    else:
        of_panel = packed.view(STORED[weights]).view(panels, inputs, width).double()
    rows = of_panel.transpose(1, 2).reshape(-1, halves, width, inputs)  # panels take turns
    return rows.transpose(0, 1).flatten(1, 2)[:, : outputs // halves].flatten(0, 1)


def decoded(packed, panels, inputs, width):
    """Return the panels of "bfloat16" that "coded_bfloat16" stand for."""
    blocks = [
        min(inputs - begin, CODED_BLOCK) // 2 for begin in range(0, inputs, CODED_BLOCK)
    ]  # steps of each
    numbers, at = [], 0
    for steps in blocks * panels:
        header, begin = packed[at : at + 64], at + 64
        of_step = packed[begin : begin + steps * 3 * width].view(steps, 3 * width).int()
        signs_fractions, codes = of_step[:, : 2 * width], of_step[:, 2 * width :]
        codes = torch.cat([codes & 15, codes >> 4], 1)
        exponents = header[:32].view(torch.uint16).int()
        of_block = (signs_fractions & 0x80) << 8 | signs_fractions & 0x7F
        of_block = (of_block | exponents[codes]).unflatten(1, (width, 2))
        other = (codes == 15).unflatten(1, (width, 2)).any(2)
        behind = at + int(header[48:52].view(torch.int32))
        pairs = packed[behind : behind + 4 * int(other.sum())].view(torch.uint16).int()
        of_block[other] = pairs.view(-1, 2)
        numbers.append(of_block.flatten())
        at = begin + steps * 3 * width
    return torch.cat(numbers).to(torch.uint16).view(torch.uint8)


def lengthened(packed, panels, inputs, width):
    """Return the panels of "float32" that "coded_float32" stand for."""
    of_input = packed[: panels * inputs * 3 * width].view(-1, 3 * width).int()
    third, fourth = of_input[:, : 2 * width].unflatten(1, (-1, 2)).unbind(-1)
    bits = fourth << 24 | third << 16 | of_input[:, 2 * width :] << 8
    # Outputs o and o + width / 2 lie side by side.
    return bits.unflatten(1, (-1, 2)).transpose(1, 2).flatten().view(torch.uint8)


def to_int16(rows):
    """Return rows whose numbers are multiples of 1/32767 of their block's largest."""
    blocks = torch.nn.functional.pad(rows, (0, -rows.shape[1] % INT8_BLOCK))
    blocks = blocks.unflatten(1, (-1, INT8_BLOCK))
    top = blocks.abs().amax(-1, keepdim=True)
    steps = (blocks * torch.where(top > 0, 32767 / top, 0)).round()
    return (steps.double() * (top / 32767).double()).flatten(1)[:, : rows.shape[1]]


def normed(x, norm, weight, bias, eps):
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return x if bias is None else x + bias


def packed_linear(
    x,
    packed,
    weights,
    outputs,
    bias=None,
    norm="none",
    norm_weight=None,
    norm_bias=None,
    eps=0.0,
    epilogue="store",
    activation="silu",
    scale=1.0,
    softcap=0.0,
    residual=None,
    pick=None,
    isa="",
):
    halves = 2 if epilogue == "gate" else 1
    rows = x.double() if pick is None else x.double()[pick]
    rows = normed(rows, norm, norm_weight, norm_bias, eps).to(x.dtype)
    if weights in ("bfloat16", "coded_bfloat16") and _C.layer_isa(isa)["rounds_to_bfloat16"]:
        rows = rows.bfloat16()
    elif weights == "int8":
        rows = to_int16(rows)
    w = unpack_weights(packed, weights, outputs, x.shape[1], halves, isa)
    y = rows.double() @ w.T
    y = y if bias is None else y + bias
    if epilogue == "add":
        y = residual + scale * y
    elif epilogue == "activate":
        y = ACTIVATIONS[activation](y)
    elif epilogue == "gate":
        gates, ups = y.chunk(2, dim=1)
        y = ACTIVATIONS[activation](gates) * ups
    elif epilogue == "logits":
        y = scale * y
        y = softcap * (y / softcap).tanh() if softcap else y
    return y.to(x.dtype)


def add_norm(h, x, norm, norm_weight, norm_bias=None, eps=0.0, scale=1.0, isa=""):
    return (h + scale * normed(x.double(), norm, norm_weight, norm_bias, eps)).to(h.dtype)


def embed_rows(
    tokens,
    table,
    weights,
    size,
    vocabulary,
    scale=1.0,
    positions=None,
    position_table=None,
    isa="",
):
    if table.dim() == 1:
        table = unpack_weights(table, weights, vocabulary, size, isa=isa)
    dtype = torch.float64 if weights == "float64" else torch.float32
    rows = table[tokens].to(dtype) * torch.tensor(scale, dtype=dtype)
    return rows if position_table is None else rows + position_table[positions]


# ---- the cache -----------------------------------------------------------------------------------


def key_places(keys, size):
    """Return where number d of the key in slot c lies in ``keys[b, head]``, int64 [C, D]."""
    pair = 2 if keys.dtype == torch.bfloat16 else 1
    even = -(-size // pair) * pair
    c, d = torch.arange(keys.shape[2] // even)[:, None], torch.arange(size)
    return c // 16 * 16 * even + d // pair * 16 * pair + c % 16 * pair + d % pair


def value_places(values, size):
    """Return where number d of the value in slot c lies in ``values[b, head]``, int64 [C, D]."""
    pair = 2 if values.dtype == torch.bfloat16 else 1
    slots = values.shape[2] // (-(-size // 16) * 16)
    c, d = torch.arange(slots)[:, None], torch.arange(size)
    return d // 16 * 16 * slots + c // pair * 16 * pair + d % 16 * pair + c % pair


def turned(x, cosines, sines):
    half = cosines.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines, rest], -1)


def rotary_write(
    qkv,
    keys,
    values,
    prefix,
    ancestors,
    positions,
    heads,
    kv_heads,
    cosines=None,
    sines=None,
    norm="none",
    q_weight=None,
    q_bias=None,
    k_weight=None,
    k_bias=None,
    eps=0.0,
    norm_each_head=True,
    isa="",
):
    batch, nodes, all_ = qkv.shape
    size = all_ // (heads + 2 * kv_heads)
    if cosines is None:
        cosines = sines = qkv.new_zeros(int(positions.max()) + 1, 0)
    at_key, at_value = key_places(keys, size), value_places(values, size)
    for b in range(batch):
        for i in range(nodes):
            q, k, v = qkv[b, i].double().split([heads * size, kv_heads * size, kv_heads * size])
            if norm_each_head:
                q, k = q.view(heads, size), k.view(kv_heads, size)
            q = normed(q, norm, q_weight, q_bias, eps).view(heads, size)
            k = normed(k, norm, k_weight, k_bias, eps).view(kv_heads, size)
            cos, sin = cosines[positions[b, i]].double(), sines[positions[b, i]].double()
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            qkv[b, i, : (heads + kv_heads) * size] = torch.cat([q, k]).flatten().to(qkv.dtype)
            slot = int(prefix[b]) + i
            # Through qkv's dtype: what is stored in 16 bits is rounded twice.
            keys[b, :, at_key[slot]] = k.to(qkv.dtype).to(keys.dtype)
            values[b, :, at_value[slot]] = v.view(kv_heads, size).to(qkv.dtype).to(values.dtype)


def packed_attention(
    qkv,
    keys,
    values,
    prefix,
    ancestors,
    heads,
    kv_heads,
    scale,
    window=0,
    softcap=0.0,
    isa="",
):
    batch, nodes, all_ = qkv.shape
    size = all_ // (heads + 2 * kv_heads)
    out = qkv.new_empty(batch, nodes, heads, size)
    at_key, at_value = key_places(keys, size), value_places(values, size)
    above = ancestor_matrix(ancestors).expand(batch, nodes, nodes)
    for b in range(batch):
        for i in range(nodes):
            length = int(prefix[b])
            path = [length + j for j in range(nodes) if above[b, i, j] or j == i]
            seen = [*range(length), *path]
            slots = torch.tensor(seen[-window:] if window else seen)
            for h in range(heads):
                key = keys[b, h // (heads // kv_heads), at_key[slots]].double()
                value = values[b, h // (heads // kv_heads), at_value[slots]].double()
                scores = scale * key @ qkv[b, i, h * size : (h + 1) * size].double()
                scores = softcap * (scores / softcap).tanh() if softcap else scores
                out[b, i, h] = (scores.softmax(0) @ value).to(qkv.dtype)
    return out.flatten(2)
