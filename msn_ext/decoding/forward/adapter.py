"""A gated noise adapter: a LoRA of PEFT's that works on the noise rows of a pass alone; text rows
are the base model's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from msn_ext.gates import gated_noise, why_not_gated


class CannotGate(ValueError):
    """A gated adapter that cannot be kept from the text; says why, for the user to read."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter adds to a linear layer: y + scaling * B (A x).

    Attributes:
        base: the linear layer.
        a, b: [r, inputs] and [outputs, r], PEFT's own parameters, of whatever dtype they have.
    """

    base: Any
    a: Tensor
    b: Tensor
    scaling: float

    def added_to(self, y: Tensor, x: Tensor) -> None:
        """Add it in place, for rows [..., outputs] of inputs [..., inputs]."""
        low = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)
        y.add_(low, alpha=self.scaling)


class NoiseAdapter:
    """A gated adapter of a model.

    Args:
        name: of the adapter.
        noise: what it says that it was trained for.
        layers: PEFT's layers, and what each adds.

    Attributes:
        length: of the chains of noise that it was trained on.
        content: their tokens: a token, or the name of what they were drawn from.
    """

    def __init__(self, name: str, noise: dict, layers: dict[nn.Module, LowRank]):
        self.name, self.layers = name, layers
        self.length: int = noise["length"]
        self.content: str | int = noise["content"]
        for kind in {type(layer) for layer in layers}:
            _gate_by_thread(kind)

    @contextlib.contextmanager
    def over(self, batch: int, nodes: int, tails: int) -> Iterator[None]:
        """Let the model compute the last ``tails`` of each row's ``nodes`` with the adapter and all
        others without it, in this thread.
        """
        before = getattr(_active, "rows", None)
        try:
            _active.rows = _Rows(self.layers, batch, nodes, tails)
            yield
        finally:
            _active.rows = before

    def left_out(self) -> contextlib.AbstractContextManager[None]:
        """Let the model compute all rows without the adapter, in this thread."""
        return self.over(0, 0, 0)

    @property
    def version(self) -> tuple:
        """What changes with the weights, and without a look at them."""
        return tuple(
            (x.data_ptr(), x._version, x.dtype, low.scaling)
            for low in self.layers.values()
            for x in (low.a, low.b)
        )


# ---- the gate ------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    layers: dict[nn.Module, LowRank]
    batch: int
    nodes: int
    tails: int


_active = threading.local()  # its `rows`, if any, are those of the pass that this thread is in


def _gate_by_thread(kind: type[nn.Module]) -> None:
    """Let PEFT's layers of a class leave their adapter to us in a thread that decodes with it, and
    in no other. Nothing is written to a module, so copies and saved ones are as ever.
    """
    owner: Any = next(c for c in kind.__mro__ if "forward" in vars(c))
    forward = vars(owner)["forward"]
    if getattr(forward, "by_thread", False):
        return

    @functools.wraps(forward)
    def gated(self, x, *args, **kwargs):
        rows: _Rows | None = getattr(_active, "rows", None)
        if rows is None or (low := rows.layers.get(self)) is None:
            return forward(self, x, *args, **kwargs)
        y = low.base(x, *args, **kwargs)
        if rows.tails:
            last = slice(rows.nodes - rows.tails, None)
            low.added_to(_by_node(y, rows)[:, last], _by_node(x, rows)[:, last])
        return y

    gated.by_thread = True  # type: ignore[attr-defined]
    owner.forward = gated


def _by_node(x: Tensor, rows: _Rows) -> Tensor:
    """Return a view of [B, N, size] or [B * N, size] as the former."""
    if x.numel() != rows.batch * rows.nodes * x.shape[-1]:
        raise ValueError(
            f"a linear layer with a gated adapter was given {list(x.shape)}, which are not the"
            f" {rows.nodes} nodes of {rows.batch} rows (an expert's, say); expected an adapter on"
            " layers that see all of them"
        )
    return x.reshape(rows.batch, rows.nodes, -1)


# ---- finding it ----------------------------------------------------------------------------------


def is_adapted(module: nn.Module) -> bool:
    """Return whether this is a layer of PEFT's around a module."""
    return isinstance(getattr(type(module), "disable_adapters", None), property)


def noise_adapter_of(model: PreTrainedModel) -> NoiseAdapter | None:
    """Return the gated adapter that is active in a model; None: there is none.

    Raises:
        CannotGate: it cannot be kept from the text; says why.
    """
    return noise_adapter_in(model, (x for x in model.modules() if is_adapted(x)))


def noise_adapter_in(model: PreTrainedModel, adapted: Iterable[nn.Module]) -> NoiseAdapter | None:
    """Return what :func:`noise_adapter_of` does, given PEFT's layers in the model."""
    configs = getattr(model, "peft_config", None) or {}  # PEFT puts them into the model, too
    gated = {name for name, config in configs.items() if gated_noise(config)}
    if not gated:
        return None
    layers: list[Any] = list(adapted)
    for layer in layers:
        if merged := gated.intersection(getattr(layer, "merged_adapters", ())):
            _refuse(min(merged), "is merged into the weights; call unmerge_adapter() before")
    active = {name for x in layers if not x.disable_adapters for name in x.active_adapters}
    if not (on := min(gated & active, default=None)):
        return None
    if others := active - {on}:
        names = ", ".join(map(repr, sorted(others)))
        _refuse(on, f"is active together with {names}; activate it alone, by set_adapter({on!r})")
    if wrong := why_not_gated(configs[on]):
        _refuse(on, f"has {wrong}; expected a LoRA whose effect is a sum that can be left out")
    found = {}
    for layer in layers:
        if not layer.disable_adapters and (low := _low_rank(on, layer, model)):
            found[layer] = low
    return NoiseAdapter(on, gated_noise(configs[on]) or {}, found)


def _low_rank(name: str, layer: Any, model: nn.Module) -> LowRank | None:
    """Return what an adapter adds in a layer of PEFT's; None: nothing."""
    path = functools.partial(path_of, model, layer)
    parts = layer._modules  # where torch would look last
    if name in parts.get("lora_embedding_A", ()):
        _refuse(name, f"is on {path()}, an embedding; expected linear layers")
    if name not in parts.get("lora_A", ()):
        return None
    base = parts["base_layer"]
    a, b = parts["lora_A"]._modules[name], parts["lora_B"]._modules[name]
    if not (isinstance(base, (nn.Linear, Conv1D)) and type(a) is type(b) is nn.Linear):
        kinds = ", ".join(type(x).__name__ for x in (base, a, b))
        _refuse(name, f"is on {path()}, where it has {kinds}; expected linear layers")
    if a.bias is not None or b.bias is not None or name in getattr(layer, "lora_variant", ()):
        _refuse(name, f"is more than a product of two matrices in {path()}")
    if "forward" in vars(layer) or layer._compiled_call_impl is not None:
        _refuse(name, f"cannot be left out of {path()}, whose forward was replaced or compiled")
    return LowRank(base, a.weight, b.weight, float(layer.scaling[name]))


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Return where a module of a model is, for messages."""
    return next(path for path, its in model.named_modules() if its is module) or "the model"


def _refuse(name: str, reason: str):
    raise CannotGate(
        f"its adapter {name!r} is gated, trained for noise alone, and {reason}; or decode within"
        " disable_adapter(), without it"
    )


def base_of(module: Any) -> Any:
    """Return the module that a layer of PEFT's is around; others are themselves."""
    return module.base_layer if is_adapted(module) else module


def leaving_out(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Let the model compute without its gated adapter, if it has one."""
    adapter = noise_adapter_of(model)
    return contextlib.nullcontext() if adapter is None else adapter.left_out()
