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
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..adapter import CannotGate, base_modules, base_parameters, is_adapted
from ..packed_weight import PackedWeight, reading
from ..plan import NoPlan
from .parts import ALL_ACTIVATIONS

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
_PLAIN = {nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList, Conv1D}


def check_computation(model: PreTrainedModel, name: str, device: str) -> None:
    """Refuse a model that is not plainly of transformers' class ``name``, module by module."""
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise NoPlan("there are hooks on the forward of all modules")
    if torch.is_autocast_enabled(device):
        raise NoPlan("autocast is on")
    try:
        modules = list(base_modules(model))
    except CannotGate as reason:
        raise NoPlan(str(reason)) from None
    for path, module in modules:
        _check_module(path or "the model", module)
    for path, module in model.named_modules():
        if is_adapted(module):  # an adapter's layer that is left out; its forward is still called
            _check_forward(path, module)
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
    for path, module in modules:
        if type(module) not in known:
            raise NoPlan(f"{path} is a {_name(type(module))}, which is not in its family's plan")
    for kind in {type(module) for _, module in modules} - {nn.ModuleList}:
        if inspect.unwrap(kind.forward).__module__ != kind.__module__:
            raise NoPlan(f"the forward of {_name(kind)} has been replaced")


def _check_module(path: str, module: nn.Module) -> None:
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        raise NoPlan(f"{path} is compiled")
    if is_adapted(module):
        raise NoPlan(f"{path} has an adapter")
    if parametrize.is_parametrized(module):
        raise NoPlan(f"{path} is parametrised")
    _check_forward(path, module)
    if module.training and (rate := _dropout(module)):
        raise NoPlan(f"{path} is in training mode with a dropout of {rate}")


def _check_forward(path: str, module: nn.Module) -> None:
    if "forward" in vars(module):
        raise NoPlan(f"{path} has a forward of its own")
    # transformers' own hooks stay once output_hidden_states was asked for, and change nothing.
    its = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if any(
        getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in its
    ):
        raise NoPlan(f"{path} has a hook on its forward")


def _dropout(module: nn.Module) -> float:
    """Return the largest dropout rate that a module applies in training; 0: none."""
    rates = [module.p] if isinstance(module, nn.Dropout) else []
    named = [value for name, value in vars(module).items() if "drop" in name]
    return max([0.0, *rates, *(value for value in named if isinstance(value, (int, float)))])


def check_weights(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse weights that are not plain dense tensors of one floating dtype on one device."""
    dtypes, where = set(), "the CPU" if device.type == "cpu" else str(device)
    for name, weight in base_parameters(model):
        if isinstance(weight, PackedWeight) and not reading():
            raise NoPlan(
                f"{name} is packed, and the model was changed after msn_ext.prepare(model); call"
                " msn_ext.unprepare(model), then prepare it again"
            )
        if type(weight) not in (nn.Parameter, PackedWeight) or weight.layout is not torch.strided:
            raise NoPlan(
                f"{name} is a {_name(type(weight))} of {weight.layout}, not a plain tensor"
            )
        if weight.device != device:
            raise NoPlan(f"{name} lies on {weight.device}, not on {where}")
        if weight.dtype not in DTYPES:
            raise NoPlan(f"{name} is {_short(weight.dtype)}, which no plan is run in")
        dtypes.add(weight.dtype)
    if len(dtypes) > 1:
        raise NoPlan(f"its weights are of mixed dtypes ({', '.join(sorted(map(_short, dtypes)))})")


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
