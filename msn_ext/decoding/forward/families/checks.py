"""What refuses a model before its plan is read: it may compute something that its family does not.

Classes are compared exactly, since a subclass may have a forward of its own.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as hooks
from transformers.pytorch_utils import Conv1D

from ..adapter import CannotGate, is_adapted, path_of
from ..modules import Modules, parameters_of
from ..packed_weight import PackedWeight, reading
from ..plan import NoPlan
from .parts import ALL_ACTIVATIONS

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
_PLAIN = {nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList, Conv1D}


def check_computation(its: Modules, name: str, device: str) -> None:
    """Refuse a model that is not plainly of transformers' class ``name``, module by module."""
    model = its.model
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise NoPlan("there are hooks on the forward of all modules")
    if torch.is_autocast_enabled(device):
        raise NoPlan("autocast is on")
    try:
        modules = its.base
    except CannotGate as reason:
        raise NoPlan(str(reason)) from None
    for module in modules:
        if wrong := _wrong_with(module):
            raise NoPlan(f"{path_of(model, module)} {wrong}")
    for layer in its.adapted:  # that are left out; their forward is still called
        if wrong := _wrong_with_forward(layer):
            raise NoPlan(f"{path_of(model, layer)} {wrong}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise NoPlan("its weights are quantised")
    whole = getattr(transformers, name)
    if type(model) is not whole:
        raise NoPlan(f"{_name(type(model))} is not transformers' own {name}")
    known = (
        _PLAIN
        | ALL_ACTIVATIONS
        | {
            kind
            for kind in vars(sys.modules[whole.__module__]).values()
            if isinstance(kind, type) and kind.__module__ == whole.__module__
        }
    )
    kinds = {type(module) for module in modules}
    if not kinds <= known:
        odd = next(module for module in modules if type(module) not in known)
        raise NoPlan(
            f"{path_of(model, odd)} is a {_name(type(odd))}, which is not in its family's plan"
        )
    for kind in kinds - {nn.ModuleList}:
        if inspect.unwrap(kind.forward).__module__ != kind.__module__:
            raise NoPlan(f"the forward of {_name(kind)} has been replaced")


def _wrong_with(module: nn.Module) -> str | None:
    """Return what no plan says of a module; None: nothing, if its class is known."""
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return "is compiled"
    if is_adapted(module):
        return "has an adapter"
    if "parametrizations" in module._modules:
        return "is parametrised"
    if wrong := _wrong_with_forward(module):
        return wrong
    if module.training and (rate := _dropout(module)):
        return f"is in training mode with a dropout of {rate}"
    return None


def _wrong_with_forward(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "has a forward of its own"
    if not module._forward_pre_hooks and not module._forward_hooks:
        return None
    # transformers' own hooks stay once output_hidden_states was asked for, and change nothing.
    its = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    known = "transformers.utils.output_capturing"
    if all(getattr(hook, "__module__", "") == known for hook in its):
        return None
    return "has a hook on its forward"


def _dropout(module: nn.Module) -> float:
    """Return the largest dropout rate that a module applies in training; 0: none."""
    rates = [module.p] if isinstance(module, nn.Dropout) else []
    named = [value for name, value in vars(module).items() if "drop" in name]
    return max([0.0, *rates, *(value for value in named if isinstance(value, (int, float)))])


def check_weights(its: Modules, device: torch.device) -> None:
    """Refuse weights that are not plain dense tensors of one floating dtype on one device."""
    dtypes = set()
    with torch._C.DisableTorchFunctionSubclass():  # which packed weights would be asked by
        for weight in parameters_of(its.base):
            if wrong := _wrong_with_weight(weight, device):
                [name, *_] = (name for name, x in its.model.named_parameters() if x is weight)
                raise NoPlan(f"{name} {wrong}")
            dtypes.add(weight.dtype)
    if len(dtypes) > 1:
        raise NoPlan(f"its weights are of mixed dtypes ({', '.join(sorted(map(_short, dtypes)))})")


def _wrong_with_weight(weight: nn.Parameter, device: torch.device) -> str | None:
    if isinstance(weight, PackedWeight) and not reading():
        return (
            "is packed, and the model was changed after msn_ext.prepare(model); call"
            " msn_ext.unprepare(model), then prepare it again"
        )
    if type(weight) not in (nn.Parameter, PackedWeight) or weight.layout is not torch.strided:
        return f"is a {_name(type(weight))} of {weight.layout}, not a plain tensor"
    if weight.device != device:
        where = "the CPU" if device.type == "cpu" else str(device)
        return f"lies on {weight.device}, not on {where}"
    if weight.dtype not in DTYPES:
        return f"is {_short(weight.dtype)}, which no plan is run in"
    return None


def check_config(config: Any) -> None:
    """Refuse settings that change attention in a way that is not in a plan."""
    implementation = config._attn_implementation or ""
    if implementation not in ("eager", "sdpa", "flex_attention") and not implementation.startswith(
        "flash_attention"
    ):
        raise NoPlan(f"the attention {implementation!r} is not known")
    if getattr(config, "attention_chunk_size", None):
        raise NoPlan("its attention is in chunks")
    if getattr(config, "use_bidirectional_attention", None) or not getattr(
        config, "is_causal", True
    ):
        raise NoPlan("its attention looks ahead")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
