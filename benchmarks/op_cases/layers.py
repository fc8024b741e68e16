"""The stages of a decoder layer, for CPUs."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from msn_ext import ops

from .common import Case, Model, random_tree

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": None}
close = partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2)  # bfloat16 rounds x as well


def sizes(model: Model) -> tuple[int, int]:
    """The hidden and the middle size of such a Llama."""
    hidden = model.heads * model.head_size
    return hidden, -(-8 * hidden // 3 // 256) * 256


def on_cpus(cases: Callable) -> Callable:
    """For GPUs there is none of these ops."""
    return lambda model, nodes, contexts, device: (
        cases(model, nodes, contexts) if device == "cpu" else iter(())
    )


def linear_cases(model: Model, nodes: list[int], contexts: list[int]) -> Iterator[Case]:
    """Norm, gates and ups in one; then the way down, added."""
    hidden, middle = sizes(model)
    source = torch.Generator().manual_seed(0)
    up = torch.randn(2 * middle, hidden, generator=source) / hidden**0.5
    down = torch.randn(hidden, middle, generator=source) / middle**0.5
    ones = torch.ones(hidden)
    for weights, dtype in FORMATS.items():
        gated = ops.pack_weights(up, weights, halves=2)
        packed = ops.pack_weights(down, weights)
        halves, back = up.to(dtype or torch.float32), down.to(dtype or torch.float32)
        for rows in nodes:
            h = torch.randn(rows, hidden, generator=source)
            x = torch.randn(rows, middle, generator=source)

            def eager_gate(h: Tensor = h, w: Tensor = halves, dtype=dtype) -> Tensor:
                normed = F.rms_norm(h, (hidden,), ones, 1e-5).to(dtype)
                gates, ups = F.linear(normed, w).chunk(2, dim=1)
                return (F.silu(gates) * ups).float()

            def eager_add(h: Tensor = h, x: Tensor = x, w: Tensor = back, dtype=dtype) -> Tensor:
                return h + F.linear(x.to(dtype), w).float()

            norm = {"norm": "rms", "norm_weight": ones, "eps": 1e-5, "epilogue": "gate"}
            yield Case(
                f"gate {weights} rows={rows}",
                gated.nbytes + 4 * rows * (hidden + middle),
                partial(ops.packed_linear, h, gated, weights, 2 * middle, **norm),
                eager_gate if dtype else None,
                check=close,
            )
            yield Case(
                f"add {weights} rows={rows}",
                packed.nbytes + 4 * rows * (2 * hidden + middle),
                partial(ops.packed_linear, x, packed, weights, hidden, epilogue="add", residual=h),
                eager_add if dtype else None,
                check=close,
            )


def cached(model: Model, nodes: int, context: int) -> tuple[list, dict]:
    """What both stages of attention take first, and their options."""
    source = torch.Generator().manual_seed(0)
    slots = -(-(context + nodes) // 16) * 16
    row = (model.heads + 2 * model.kv_heads) * model.head_size
    shape = 1, model.kv_heads, slots * model.head_size  # a multiple of 16
    keys, values = (torch.randn(shape, generator=source) for _ in range(2))
    qkv = torch.randn(1, nodes, row, generator=source)
    ancestors, _ = ops.tree_ancestors(random_tree(nodes, "cpu"))
    heads = {"heads": model.heads, "kv_heads": model.kv_heads}
    return [qkv, keys, values, torch.tensor([context]), ancestors], heads


def rotary_cases(model: Model, nodes: list[int], contexts: list[int]) -> Iterator[Case]:
    for count in nodes:
        arguments, heads = cached(model, count, contexts[0])
        positions = torch.full((1, count), contexts[0])
        cosines = torch.ones(contexts[0] + count, model.head_size // 2)  # stay as they are, however
        turn = {"cosines": cosines, "sines": cosines * 0, **heads}  # often they turn
        yield Case(
            f"nodes={count}",
            2 * arguments[0].nbytes,
            partial(ops.rotary_write, *arguments, positions, **turn),
        )


def attention_cases(model: Model, nodes: list[int], contexts: list[int]) -> Iterator[Case]:
    for context in contexts:
        for count in nodes:
            arguments, heads = cached(model, count, context)
            scale = model.head_size**-0.5
            yield Case(
                f"nodes={count} context={context}",
                8 * (context + count) * model.kv_heads * model.head_size,
                partial(ops.packed_attention, *arguments, **heads, scale=scale),
            )


def row_cases(model: Model, nodes: list[int], contexts: list[int]) -> Iterator[Case]:
    """Rows of the embedding."""
    hidden, _ = sizes(model)
    table = torch.randn(model.vocabulary, hidden, generator=torch.Generator().manual_seed(0))
    for rows in nodes:
        tokens = torch.arange(rows) * 97 % model.vocabulary
        yield Case(
            f"rows={rows}",
            8 * rows * hidden,
            partial(ops.embed_rows, tokens, table, "float32", hidden, model.vocabulary),
            lambda tokens=tokens: F.embedding(tokens, table),
        )


def norm_cases(model: Model, nodes: list[int], contexts: list[int]) -> Iterator[Case]:
    hidden, _ = sizes(model)
    ones = torch.ones(hidden)
    for rows in nodes:
        h = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0))
        yield Case(
            f"rows={rows}",
            12 * rows * hidden,
            partial(ops.add_norm, h, h, "rms", ones, eps=1e-5),
            lambda h=h: h + F.rms_norm(h, (hidden,), ones, 1e-5),
        )


CASES = {
    "packed_linear": on_cpus(linear_cases),
    "rotary_write": on_cpus(rotary_cases),
    "packed_attention": on_cpus(attention_cases),
    "embed_rows": on_cpus(row_cases),
    "add_norm": on_cpus(norm_cases),
}
