"""What a model is made of, walked once and handed down: a model with an adapter has thousands of
modules, and a call asks a dozen questions about them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapter import CannotGate, LowRank, NoiseAdapter, is_adapted, noise_adapter_in


class Modules:
    """The modules that a model computes with, their parameters and buffers: each once, in torch's
    order, as they are when they are asked for. To be made anew once others may have changed the
    model.

    Of a layer of PEFT's whose adapters are left out, since they are turned off or one is gated,
    they are the layer and the module inside it, not what adapters put beside that.

    Attributes:
        adapted: PEFT's layers around modules.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._all, self.adapted = _walk(model)

    @cached_property
    def all(self) -> list[nn.Module]:
        if len(self._left_out) == len(self.adapted):
            return self._all
        return _walk(self.model, [x for x in self.adapted if x not in self._left_out])[0]

    @cached_property
    def base(self) -> list[nn.Module]:
        """Those but for the layers whose adapters are left out.

        Raises:
            CannotGate: a gated adapter cannot be left out.
        """
        _ = self.noise_adapter
        return [module for module in self.all if module not in self._left_out]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Theirs, and a gated adapter's matrices."""
        added = ({"a": low.a, "b": low.b} for low in self._gated.values())
        return _each_once([*(module._parameters for module in self.all), *added])

    @cached_property
    def buffers(self) -> list[Tensor]:
        return _each_once(module._buffers for module in self.all)

    @cached_property
    def noise_adapter(self) -> NoiseAdapter | None:
        """The gated adapter that is active; None: there is none.

        Raises:
            CannotGate: it cannot be kept from the text; says why.
        """
        return noise_adapter_in(self.model, self.adapted)

    @cached_property
    def _gated(self) -> dict[nn.Module, LowRank]:
        try:
            return {} if self.noise_adapter is None else self.noise_adapter.layers
        except CannotGate:
            return {}

    @cached_property
    def _left_out(self) -> set[nn.Module]:
        """The layers whose adapters are left out."""
        inner = [layer for layer in self.adapted if "base_layer" in layer._modules]
        return {layer for layer in inner if layer in self._gated or _off(layer)}


def _off(layer: Any) -> bool:
    return layer.disable_adapters and not getattr(layer, "merged", False)


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that modules have themselves, each once."""
    return _each_once(module._parameters for module in modules)


def _each_once(named: Iterable[Mapping]) -> list:
    tensors = (tensor for its in named if its for tensor in its.values() if tensor is not None)
    return list({id(tensor): tensor for tensor in tensors}.values())


def _walk(
    model: nn.Module, whole: Collection[nn.Module] = ()
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return a model's modules, and PEFT's layers among them; of those, but for some that are
    ``whole``, only the module inside.
    """
    found, adapted = [], []
    kinds: dict[type[nn.Module], bool] = {}
    seen: set[nn.Module] = set()
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        found.append(module)
        kind, children = type(module), module._modules
        if kind not in kinds:
            kinds[kind] = is_adapted(module)
        if kinds[kind]:
            adapted.append(module)
            if "base_layer" in children and module not in whole:
                todo.append(children["base_layer"])
                continue
        if children:
            todo += reversed(list(children.values()))
    return found, adapted
