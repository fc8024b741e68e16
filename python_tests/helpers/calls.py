"""One right call of every op."""

from collections.abc import Callable

import torch

from helpers.cases import (
    integers,
    seeded,
    tree_tensor,
)
from msn_ext import ops


def calls(device: str) -> dict[str, Callable[[], dict]]:
    """By op, what makes arguments that it takes."""
    parents = tree_tensor([[-1, 0, 0, 1], [-1, 0, 1, -1]], device)
    lengths = integers([5, 9], device)
    source = seeded(0)
    shapes = [(2, 4, 4, 8), (2, 2, 16, 8), (2, 2, 16, 6)]
    q, k, v = (torch.randn(shape, generator=source).to(device) for shape in shapes)
    tokens = integers([[1, 2, 3, 4], [1, 2, 3, 4]], device)
    text = integers([[1, 2, 3, 1, 2, 0], [5, 5, 5, 5, 5, 5]], device)
    guesses = (
        torch.arange(2 * 4 * 8, dtype=torch.int32, device=device).view(2, 4, 8) * 17
    )  # levels 0 to 15
    return {
        "tree_ancestors": lambda: {"parents": parents},
        "tree_attention": lambda: {
            "q": q,
            "k_cache": k,
            "v_cache": v,
            "lengths": lengths,
            "ancestors": ops.tree_ancestors(parents)[0],
            "offsets": integers([0, 2], device),
            "scale": 0.5,
            "window": 7,
            "softcap": 3.0,
            "sinks": torch.ones(4, device=device),
        },
        "verify_tree": lambda: {"tokens": tokens, "targets": tokens + 1, "parents": parents},
        "verify_logits": lambda: {
            "logits": torch.randn(2, 4, 20, generator=source).to(device),
            "tokens": tokens,
            "parents": parents,
        },
        "commit_kv": lambda: {
            "caches": [k, v],
            "lengths": lengths,
            "path": integers([[0, 2, -1], [0, 1, 3]], device),
            "accept_length": integers([2, 3], device),
        },
        "place_tree": lambda: {
            "tokens": tokens.clone(),
            "history": text,
            "lengths": integers([5, 6], device),
            "offsets": integers([0, 2], device),
            "last_position": integers([5, 99], device),
            "depth": tree_tensor([[0, 1, 1, 2], [0, 1, 2, -1]], device),
            "vocabulary": 50,
        },
        "advance_text": lambda: {
            "history": torch.nn.functional.pad(text, (0, 4)),
            "lengths": integers([5, 6], device),
            "remaining": integers([9, 2], device),
            "targets": tokens,
            "path": integers([[0, 2, -1, -1], [0, 1, 3, -1]], device),
            "accept_length": integers([2, 3], device),
            "ends": integers([7, 0], device),
            "vocabulary": 50,
        },
        "lookup_ngram": lambda: {
            "history": text,
            "lengths": integers([5, 6], device),
            "max_ngram": 3,
            "length": 4,
        },
        "fill_tree": lambda: {
            "candidates": integers([[[5, 6], [7, 8]]] * 2, device),
            "retrieved": integers([[9, -1]] * 2, device),
            "history": integers([[1, 2, 3, 4], [5, 6, 7, 8]], device),
            "lengths": integers([3, 4], device),
            "depth": tree_tensor([[0, 1, 1, 2], [0, 1, 2, -1]], device),
            "rank": tree_tensor([0, 0, -1, 1], device),
            "seed": integers([42], device),
        },
        "top_guesses": lambda: {"logits": torch.randn(2, 4, 20, generator=source).to(device)},
        "remember_guesses": lambda: {
            "adjacency": torch.zeros(3, 32, 9, dtype=torch.int32, device=device),
            "history": text,
            "lengths": integers([5, 6], device),
            "tokens": tokens,
            "parents": parents,
            "path": integers([[0, 1, 3, -1], [0, -1, -1, -1]], device),
            "guesses": guesses,
        },
        "keep_continuation": lambda: {
            "denoised": torch.zeros(2, 3, 8, dtype=torch.int32, device=device),
            "guesses": guesses,
            "continuation": integers([[1, 3, -1, -1], [-1, -1, -1, -1]], device),
        },
        "keep_tail": lambda: {
            "denoised": torch.zeros(2, 3, 8, dtype=torch.int32, device=device),
            "factors": torch.zeros(2, ops.FACTORS, dtype=torch.float64, device=device),
            "tables": torch.ones(2, ops.FACTORS, dtype=torch.float64, device=device),
            "guesses": guesses,
            "continuation": integers([[1, -1, -1, -1], [-1, -1, -1, -1]], device),
            "path": integers([[0, -1, -1, -1], [0, 1, -1, -1]], device),
            "accept_length": integers([1, 2], device),
            "ends": integers([[1], [1]], device),
            "length": 2,
        },
        "append_tails": lambda: {
            "tokens": tokens,
            "parents": parents,
            "probability": torch.ones(2, 4, dtype=torch.float64, device=device),
            "history": text,
            "lengths": integers([5, 6], device),
            "nodes": 3,
            "tails": 2,
            "length": 2,
            "noise": -1,
        },
        "index_suffixes": lambda: {
            "suffixes": torch.zeros(2, 8, 32, dtype=torch.int32, device=device),
            "history": text,
            "start": integers([0, 2], device),
            "lengths": integers([5, 6], device),
        },
        "draft_tree": lambda: {
            "history": text,
            "lengths": integers([5, 6], device),
            "denoised": guesses[:, :3],
            "adjacency": torch.zeros(3, 32, 9, dtype=torch.int32, device=device),
            "habits": torch.zeros(3, 16, 9, dtype=torch.int32, device=device),
            "suffixes": torch.zeros(2, 8, 32, dtype=torch.int32, device=device),
            "corpus": torch.arange(50, dtype=torch.int32, device=device),
            "corpus_suffixes": torch.ones(8, 32, dtype=torch.int32, device=device),
            "factors": torch.ones(ops.FACTORS, dtype=torch.float64, device=device),
            "nodes": 6,
            "max_depth": 3,
            "foresight": 0.05,
        },
        "draw_noise": lambda: {
            "input_ids": text,
            "labels": text.masked_fill(torch.arange(6, device=device) < 2, -100),
            "samples": integers([[0, 0, 6], [1, 0, 5]], device),
            "keep_token_ids": integers([3], device),
            "starts": integers([[-1, -1], [2, -1]], device),
            "seed": 7,
            "length": 2,
            "random": 0.5,
            "vocabulary": 20,
            "apart": True,
        },
        **fused_calls(device),
    }


def fused_calls(device: str) -> dict[str, Callable[[], dict]]:
    """Of those ops that stand between a decoder layer's products."""
    source = seeded(2)
    x, h, weight = (torch.randn(shape, generator=source).to(device) for shape in (6, 6, 12))
    q, kv = (torch.randn(2, 3, count, 8, generator=source).to(device) for count in (4, 2))

    def norm(prefix: str = "") -> dict:
        names = "norm", "weight", "bias", "eps", "offset"
        return {
            prefix + name: value for name, value in zip(names, ("layer", weight, weight, 1e-5, 1.0))
        }

    return {
        "residual_norm": lambda: {
            "h": h.repeat(3, 2) + 0,
            "x": x.repeat(3, 2),
            "scale": 0.5,
            **norm("x_"),
            **norm(),
        },
        "rotary_cache": lambda: {
            "q": q,
            "k": kv,
            "v": kv + 1,
            "keys": torch.ones(2, 2, 16, 8, device=device),
            "values": torch.ones(2, 2, 16, 8, device=device),
            "prefix": integers([5, 0], device),
            "positions": integers([[5, 6, 6], [0, 1, 2]], device),
            "cosines": torch.full((8, 3), 0.6, device=device),
            "sines": torch.full((8, 3), 0.8, device=device),
            "norm": "layer",
            **{f"{x}_{of}": weight[:8] for x in "qk" for of in ("weight", "bias")},
            "eps": 1e-5,
            "offset": 1.0,
            "norm_each_head": True,
        },
        "gated_activation": lambda: {
            "gate": q.flatten(1)[:, :48],
            "up": q.flatten(1)[:, 48:],
            "activation": "gelu",
        },
    }


def layer_calls() -> dict[str, Callable[[], dict]]:
    """The same of the stages of a decoder layer, which are for CPUs."""
    source = seeded(1)
    x, weight, ones = torch.randn(3, 24, generator=source), torch.ones(10, 24), torch.ones(24)
    embedding = torch.randn(9, 24, generator=source)
    norm = {"norm": "layer", "norm_weight": ones, "norm_bias": ones, "eps": 1e-5}
    qkv = torch.randn(2, 3, 4 * 8, generator=source)
    chain = {"prefix": integers([5, 0]), "ancestors": integers([[1], [3], [7]])}
    heads = {"heads": 2, "kv_heads": 1, "isa": "baseline"}

    def cache():
        return {"qkv": qkv.clone(), "keys": torch.ones(2, 1, 16 * 8)} | {
            "values": torch.ones(2, 1, 16 * 16)
        }

    return {
        "packed_linear": lambda: {
            "x": x,
            "packed": ops.pack_weights(weight, "float32", isa="baseline"),
            "weights": "float32",
            "outputs": 10,
            "bias": torch.ones(10),
            **norm,
            "epilogue": "add",
            "activation": "silu",
            "scale": 0.5,
            "softcap": 0.0,
            "residual": torch.ones(2, 10),
            "pick": integers([2, 0]),
            "isa": "baseline",
        },
        "add_norm": lambda: {"h": x + 1, "x": x, **norm, "scale": 0.5, "isa": "baseline"},
        "embed_rows": lambda: {
            "tokens": integers([3, 8]),
            "table": embedding,
            "weights": "float32",
            "size": 24,
            "vocabulary": 9,
            "scale": 2.0,
            "positions": integers([0, 1]),
            "position_table": torch.ones(2, 24),
            "isa": "baseline",
        },
        "rotary_write": lambda: {
            **cache(),
            **chain,
            "positions": integers([[5, 6, 7], [0, 1, 2]]),
            "cosines": torch.full((8, 2), 0.6),
            "sines": torch.full((8, 2), 0.8),
            "norm": "layer",
            "q_weight": torch.ones(8),
            "q_bias": torch.ones(8),
            "k_weight": torch.ones(8),
            "k_bias": torch.ones(8),
            "eps": 1e-5,
            "norm_each_head": True,
            **heads,
        },
        "packed_attention": lambda: {
            **cache(),
            **chain,
            "scale": 0.5,
            "window": 4,
            "softcap": 3.0,
            **heads,
        },
    }


LAYER_OPS = list(layer_calls())
OPS = [*calls("cpu"), *LAYER_OPS]


def example(op: str, device: str) -> dict:
    """Arguments that the op takes."""
    return (layer_calls() if op in LAYER_OPS else calls(device))[op]()
