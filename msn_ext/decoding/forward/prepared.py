"""Models whose linear weights are packed in place: one copy of the weights."""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from msn_ext import _C

from .families import check, plan_for
from .modules import Modules
from .packed import PackedLinear, PackedPlan, coded, linears, pack
from .packed_weight import PackedWeight, placeholders
from .plan import Linear, NoPlan, Plan

logger = logging.getLogger("msn_ext")


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is kept of a prepared model.

    Attributes:
        parameters: that are packed, as :func:`_packed_parameters` finds them.
        panels: the linear layers of each layer, then the head.
        weights, isa: how they are packed.
        dtype: of the model.
    """

    parameters: list[nn.Parameter]
    panels: list[list[PackedLinear]]
    weights: str
    isa: str
    dtype: torch.dtype

    def check(self, its: Modules) -> None:
        """Refuse a model that was changed, as :meth:`plan` does."""
        with placeholders():
            check(its)

    def plan(self, model: PreTrainedModel) -> Plan:
        """Read the model's plan; its linear layers have shapes alone."""
        with placeholders():
            return plan_for(model)

    def packed(self, plan: Plan) -> PackedPlan:
        return PackedPlan(plan, self.weights, self.isa, self.panels)


_prepared: weakref.WeakKeyDictionary[PreTrainedModel, Prepared] = weakref.WeakKeyDictionary()


def prepared_of(
    model: PreTrainedModel, modules: Iterable[nn.Module] | None = None
) -> Prepared | None:
    """Return what is kept of a prepared model; None: it is none, or packed weights were replaced
    since.

    Args:
        modules: of the model, in torch's order, where somebody has walked them.
    """
    prepared = _prepared.get(model)
    if prepared is None:
        return None
    now = _packed_parameters(modules or model.modules())
    if len(now) == len(prepared.parameters) and all(map(operator.is_, now, prepared.parameters)):
        return prepared
    return None


def _packed_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return them in the modules' order, tied ones several times."""
    return [
        weight
        for module in modules
        for weight in module._parameters.values()
        if weight is not None and isinstance(weight, PackedWeight)
    ]


# ---- packing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A dense parameter, without holding it: where it lies, and the modules that have it."""

    address: int
    end: int
    shape: torch.Size
    stride: tuple[int, ...]
    trained: bool
    of: tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True, eq=False)
class _Part:
    """A parameter as rows of a plan's linear layer: int64 [n]."""

    place: _Place
    rows: Tensor
    transposed: bool


def pack_in_place(model: PreTrainedModel, weights: str, dtype: torch.dtype) -> None:
    """Pack the linear weights of a model that is not prepared, layer by layer.

    Raises:
        NoPlan: nothing was changed.
    """
    plan = plan_for(model)
    places = _places(model)
    todo = [linears(layer) for layer in plan.layers] + [((plan.head,), (1,))]
    parts = [[_parts(linear, places) for linear in its] for its, _ in todo]
    del plan  # which holds the weights
    isa: str = _C.layer_isa("")["name"]
    panels = []
    while todo:
        its, halves = todo.pop(0)
        panels.append(pack(weights, isa, its, halves))
        if todo:  # the head, which is last, is looked up by rows
            panels[-1] = coded(panels[-1])
        del its  # the last that holds them
        for packed, of_linear in zip(panels[-1], parts.pop(0)):
            for part in of_linear:
                _replace(part, PackedWeight(packed, part.rows, part.transposed, dtype))
        _C.release_freed()
    with torch.no_grad():
        for parameter in model.parameters():
            if not isinstance(parameter, PackedWeight) and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
    if weights == "int8":
        model.register_state_dict_post_hook(_say_lossy)
    _prepared[model] = Prepared(_packed_parameters(model.modules()), panels, weights, isa, dtype)


def _places(model: nn.Module) -> list[_Place]:
    """Return the matrices of a model; those that lie at the same place are one."""
    found: dict[tuple, _Place] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None or weight.dim() != 2:
                continue
            last = sum((size - 1) * step for size, step in zip(weight.shape, weight.stride()))
            begin = weight.data_ptr()
            end = begin + (last + 1) * weight.element_size()
            key = begin, end, weight.shape, weight.stride()
            of = found[key].of if key in found else ()
            found[key] = _Place(*key, weight.requires_grad, (*of, (module, name)))
    return list(found.values())


def _parts(linear: Linear, places: list[_Place]) -> list[_Part]:
    """Return the parameters that a linear layer's weights are views of."""
    rows: dict[_Place, Tensor] = {}
    turned: dict[_Place, bool] = {}
    first = 0
    for piece in linear.weights:
        address = piece.data_ptr()
        place = next((one for one in places if one.address <= address < one.end), None)
        if place is None:
            raise NoPlan("a linear layer's weight is no parameter of it")
        turned[place] = piece.stride() != place.stride
        count = place.shape[1 if turned[place] else 0]
        begin = (address - place.address) // piece.element_size() // piece.stride(0)
        its = rows.setdefault(place, torch.full((count,), -1, device="cpu"))
        its[begin : begin + len(piece)] = torch.arange(first, first + len(piece), device="cpu")
        first += len(piece)
    if any(bool((its < 0).any()) for its in rows.values()):
        raise NoPlan("a linear layer's weight is a part of a parameter")
    return [_Part(place, its, turned[place]) for place, its in rows.items()]


def _replace(part: _Part, packed: PackedWeight) -> None:
    parameter = nn.Parameter(packed, part.place.trained)
    for module, name in part.place.of:
        module._parameters[name] = parameter
        module.register_state_dict_post_hook(_unpacked_in)


def _unpacked_in(module: nn.Module, state: dict, prefix: str, _metadata: Any) -> None:
    """Hook: a state has dense weights, tied ones once."""
    for name, weight in module._parameters.items():
        if isinstance(weight, PackedWeight) and prefix + name in state:
            state[prefix + name] = weight.shared()


def _say_lossy(_module: nn.Module, state: dict, prefix: str, _metadata: Any) -> None:
    logger.warning(
        "msn_ext: the weights of this state are those of int8, not the ones that the model had"
        " before msn_ext.prepare(model, weights='int8')"
    )


# ---- and back ------------------------------------------------------------------------------------


def unpack_in_place(model: nn.Module) -> None:
    """Make packed weights dense ones again, one by one; tied ones stay tied."""
    if isinstance(model, PreTrainedModel):
        _prepared.pop(model, None)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, hook in list(module._state_dict_hooks.items()):
            if hook in (_unpacked_in, _say_lossy):
                del module._state_dict_hooks[key]
        for name, weight in module._parameters.items():
            if isinstance(weight, PackedWeight):
                places.setdefault(id(weight), []).append((module, name))
    for of in places.values():
        (module, name), *_ = of
        weight = module._parameters[name]
        assert isinstance(weight, PackedWeight)
        dense = nn.Parameter(weight.dense(), weight.requires_grad)
        for module, name in of:
            module._parameters[name] = dense
