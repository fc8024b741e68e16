"""What the families' readers share: one part of a model in, one part of a plan out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from ..adapter import base_of
from ..plan import Attention, Linear, NoPlan, Norm, Rotary

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}


def _class_of(name: str) -> type:
    content: Any = ACT2CLS[name]
    return content[0] if isinstance(content, tuple) else content


ACTIVATION_OF = {_class_of(name): ours for name, ours in _ACTIVATIONS.items()}
ALL_ACTIVATIONS = {_class_of(name) for name in ACT2CLS}
# Others switch their frequencies as a text grows.
_ROPE_TYPES = {"default", "linear", "yarn", "llama3", "proportional"}


def activation(module: nn.Module) -> str:
    if type(module) not in ACTIVATION_OF:
        raise NoPlan(f"its activation {type(module).__name__} is not in a plan")
    return ACTIVATION_OF[type(module)]


def _parameter(module: nn.Module, name: str) -> Tensor:
    weight = module._parameters.get(name)
    if weight is None:
        raise NoPlan(f"a {type(module).__name__} of it has no {name} of its own")
    return weight


def norm(module: Any, offset: float = 0.0) -> Norm:
    """Read a LayerNorm, or one of the families' RMS norms."""
    layer = type(module) is nn.LayerNorm
    bias = _parameter(module, "bias") if layer and module.bias is not None else None
    # They call it the one or the other.
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return Norm("layer" if layer else "rms", _parameter(module, "weight"), eps, bias, offset)


def linear(*modules: Any) -> Linear:
    """Read linear layers of the same input, to stand one below the other; without adapters."""
    weights, biases = [], []
    for module in map(base_of, modules):
        if type(module) not in (nn.Linear, Conv1D):
            raise NoPlan(f"a {type(module).__name__} stands where a linear layer is expected")
        weight = _parameter(module, "weight")
        weights.append(weight.detach().T if type(module) is Conv1D else weight)
        if module.bias is not None:
            biases.append(_parameter(module, "bias"))
    if biases and len(biases) < len(weights):
        raise NoPlan("some of its query, key and value projections have a bias, others not")
    return Linear(tuple(weights), tuple(biases))


def rows(fused: Linear, slices: Iterable[slice]) -> Linear:
    """Return rows of a linear layer in another order, as views."""
    [weight], slices = fused.weights, list(slices)
    biases = [bias.detach()[rows] for bias in fused.biases for rows in slices]
    return Linear(tuple(weight.detach()[rows] for rows in slices), tuple(biases))


def embedding(module: Any) -> tuple[Tensor, float]:
    """Read an embedding: its weight, and what the module itself multiplies its rows by."""
    if module.max_norm is not None:
        raise NoPlan("its embedding rescales rows (max_norm)")
    weight, scale = _parameter(module, "weight"), getattr(module, "embed_scale", None)
    return weight, 1.0 if scale is None else float(scale.to(weight.dtype))


def rotary(module: Any, dtype: torch.dtype, layer_type: str | None = None) -> Rotary:
    """Read a rotary embedding's tables: float64 in a float64 model, else float32, unrounded."""
    rope_type = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if rope_type not in _ROPE_TYPES:
        raise NoPlan(f"rope_type={rope_type!r} is not in a plan")
    like = torch.empty(
        0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="cpu"
    )
    kind = {} if layer_type is None else {"layer_type": layer_type}

    def whole(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = module(like, positions[None], **kind)
        return cos[0], sin[0]

    cos, _ = tables = whole(torch.tensor([0, 1, 2, 3, 1000], device="cpu"))
    size = cos.shape[-1]
    if size % 2 or not all(torch.equal(*table.chunk(2, -1)) for table in tables):
        raise NoPlan("its rotary embedding does not turn the halves of a head together")

    def halves(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = whole(positions)
        return cos[:, : size // 2].contiguous(), sin[:, : size // 2].contiguous()

    return Rotary(size, halves, torch.stack(tables))


def attention(qkv: Linear, out: Linear, head_size: int, kv_heads: int, **settings) -> Attention:
    """Put together what stands between the projections, whose sizes have to agree."""
    heads = out.inputs // head_size
    if head_size % 2:
        raise NoPlan(f"its heads have the odd size {head_size}")
    if (
        qkv.outputs != (heads + 2 * kv_heads) * head_size
        or out.inputs % head_size
        or heads % kv_heads
    ):
        raise NoPlan(
            f"its projections have {qkv.outputs} outputs and {out.inputs} inputs, which"
            f" {kv_heads} heads of keys of size {head_size} do not explain"
        )
    return Attention(heads, kv_heads, head_size, **settings)


def layers_of(config: Any, layers: nn.ModuleList) -> list[Any]:
    if len(layers) != config.num_hidden_layers:
        raise NoPlan(
            f"it has {len(layers)} layers, and its configuration says {config.num_hidden_layers}"
        )
    for layer in layers:
        for module in layer.children():
            if not getattr(module, "is_causal", True):
                raise NoPlan("its attention looks ahead")
    return list(layers)


# Windows: the configuration, a layer's attention and its number in, keys that are seen out, 0: all
Window = Callable[[Any, Any, int], int]


def no_window(config: Any, module: Any, number: int) -> int:
    if getattr(config, "sliding_window", None):
        raise NoPlan("sliding_window is set, which its attention does not follow")
    return one_window(config, module, number)


def one_window(config: Any, module: Any, number: int) -> int:
    if getattr(config, "layer_types", None):
        raise NoPlan("layer_types is set, which its attention does not follow")
    return getattr(config, "sliding_window", None) or 0


def windows_by_layer(config: Any, module: Any, number: int) -> int:
    kind = config.layer_types[number]
    if kind not in ("full_attention", "sliding_attention"):
        raise NoPlan(f"layer {number} has {kind}, which is not in a plan")
    window = config.sliding_window or 0 if kind == "sliding_attention" else 0
    if (module.sliding_window or 0) != window or (kind == "sliding_attention" and not window):
        raise NoPlan(
            f"layer {number} has {kind} with a window of {module.sliding_window}, and its mask one"
            f" of {config.sliding_window}"
        )
    return window
