"""Modules that compute a row's output from other rows of the same call, too: a scale of activations
over all rows (dynamic quantisation), a mixture of weights by all rows (PEFT's Lily).

A wrong guess is a row beside right ones, and would change what they give.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .drafters import Drafter
from .drafters.jacobi import drafts_nothing
from .forward.adapter import path_of
from .forward.families.checks import DTYPES
from .forward.modules import Modules
from .forward.packed_weight import PackedWeight

LOUD = 1000.0
"""So many times its values, and a row has all of a range that it shares with others."""


def check_rows(
    model: PreTrainedModel, drafter: Drafter, batch: int, modules: Modules | None = None
) -> None:
    """Refuse guesses, and several prompts at once, where a module of the model mixes rows.

    Raises:
        ValueError: names the module.
    """
    alone = batch == 1 and drafts_nothing(drafter)
    if not alone and (found := mixing_module(model, modules)):
        path, module = found
        raise ValueError(
            f"{path} ({_name(module)}) computes a token's output from all tokens of a call, as a"
            " scale of activations over all of them does, so that wrong guesses and other prompts"
            " would change the text: decode one prompt at a time with draft='none', or quantise"
            " with a scale per token, or the weights alone"
        )


def mixing_module(
    model: PreTrainedModel, modules: Modules | None = None
) -> tuple[str, nn.Module] | None:
    """Return the first linear module that mixes rows, with its path; None: there is none.

    Torch's own linear layers over plain weights are known not to. Others are tried once: a row
    beside loud ones has to give what it gives beside others, bit for bit.
    """
    modules = modules or Modules(model)
    dtype = model.dtype  # which looks for a parameter
    for module in modules.all:
        if _plain(module):
            continue
        linear = isinstance(getattr(module, "in_features", None), int)
        if linear and _mixes(module, dtype):
            return path_of(model, module), module
    return None


def _plain(module: nn.Module) -> bool:
    # accelerate's hooks, which move weights, are a forward of the module's own, too.
    own_forward = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return (
        type(module) is nn.Linear
        and type(module._parameters.get("weight")) in (nn.Parameter, PackedWeight)
        and not own_forward
    )


_tried: weakref.WeakKeyDictionary[nn.Module, tuple[type, bool]] = weakref.WeakKeyDictionary()


def _mixes(module: nn.Module, dtype: torch.dtype) -> bool:
    kind = type(module._parameters.get("weight"))  # torchao changes weights, not modules
    last, mixes = _tried.get(module, (None, False))
    if last is not kind:
        own = (weight.dtype for weight in module.parameters() if weight.dtype in DTYPES)
        tries = (_first_row_changes(module, dtype) for dtype in dict.fromkeys([dtype, *own]))
        mixes = any(tries)
        _tried[module] = kind, mixes
    return mixes


@torch.no_grad()
def _first_row_changes(module: Any, dtype: torch.dtype) -> bool:
    """Return whether other rows change the first one; where it takes no such rows, they do not."""
    device = next((weight.device for weight in module.parameters()), "cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(1, 3, module.in_features, generator=generator, device="cpu")
    rows = rows.to(device, dtype)
    loud = torch.cat([rows[:, :1], LOUD * rows[:, 1:]], 1)
    try:
        # Without its hooks: there are some that note ranges, which a loud row would spoil.
        quiet, again, beside = (module.forward(x)[:, 0].double() for x in (rows, rows, loud))
        noise = (quiet - again).abs().max().item()  # where sums have no fixed order
        return (quiet - beside).abs().max().item() > 4 * noise
    except Exception:
        return False


def _name(module: nn.Module) -> str:
    """Return a module's class, and that of its weights where they say more."""
    weight = module._parameters.get("weight")
    plain = weight is None or type(weight) is nn.Parameter
    named = type(module).__qualname__ if plain else type(weight).__qualname__
    return f"{type(module).__module__ if plain else type(weight).__module__}.{named}"
