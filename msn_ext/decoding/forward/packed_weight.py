"""A parameter whose only storage is packed panels.

It stands in its module as the dense one did: same name, shape and dtype. torch computes with it by
unpacking it at every use, embeddings only the rows looked up. It cannot be written to.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from msn_ext.memory import aligned

from .packed import PackedLinear

CHUNK = 512
"""Rows that are unpacked at once, so that what is wider than the weights stays small."""
REFUSAL = "prepared models are for inference; call msn_ext.unprepare(model) first"


class _Reading(threading.local):
    on = False


_reading = _Reading()


@contextmanager
def placeholders() -> Iterator[None]:
    """Within, on this thread: packed weights pass for zeros of their shape, without memory. Plans
    of prepared models are read so.
    """
    _reading.on = True
    try:
        yield
    finally:
        _reading.on = False


def reading() -> bool:
    return _reading.on


class PackedWeight(Tensor):
    """A weight of a linear layer or an embedding, packed.

    Args:
        panels: of the plan's linear layer that the weight is a part of.
        rows: int64 [n], which rows of that are the weight's.
        transposed: the weight is [inputs, n], else [n, inputs].
        dtype: of the weight.
    """

    panels: PackedLinear
    rows: Tensor
    transposed: bool
    _last: weakref.ref[Tensor] | None = None
    _version_then = 0

    @staticmethod
    def __new__(cls, panels: PackedLinear, rows: Tensor, transposed: bool, dtype: torch.dtype):
        shape = (panels.inputs, len(rows)) if transposed else (len(rows), panels.inputs)
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        new.panels, new.rows, new.transposed = panels, rows, transposed
        return new

    def __init__(self, *_: Any):
        super().__init__()

    def dense(self) -> Tensor:
        """Return the weight as a plain tensor: what was packed, bit for bit, but for int8."""
        return self._unpacked_to(torch.empty(self.shape, dtype=self.dtype, device="cpu"))

    def _unpacked_to(self, new: Tensor) -> Tensor:
        by_rows = new.T if self.transposed else new
        for begin in range(0, len(self.rows), CHUNK):
            part = slice(begin, begin + CHUNK)
            by_rows[part] = self.panels.unpacked(self.rows[part])
        return new

    def shared(self) -> Tensor:
        """Return the weight as :meth:`dense` does; the same tensor as long as somebody has it and
        nobody changed it.
        """
        last = self._last() if self._last is not None else None
        if last is None or last._version != self._version_then:
            last = self.dense()
            self._last, self._version_then = weakref.ref(last), last._version
        return last

    def looked_up(self, tokens: Tensor) -> Tensor:
        """Return rows [..., inputs] of an embedding."""
        rows = self.panels.unpacked(self.rows[tokens.flatten()])
        return rows.to(self.dtype).unflatten(0, tokens.shape)

    def _plain(self) -> Tensor:
        if _reading.on:
            return torch.zeros((), dtype=self.dtype, device="cpu").expand(self.shape)
        # Not the allocator's memory: every use would touch other holes in it, which stay.
        memory = aligned(self.numel() * self.element_size())
        return self._unpacked_to(memory.view(self.dtype).view(self.shape))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), nn.Parameter(self.dense(), self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return nn.Parameter, (self.dense(), self.requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.__setitem__ and isinstance(args[0], cls):
            raise RuntimeError(REFUSAL)
        if func == Tensor.data.__set__ and isinstance(args[0], cls):  # type: ignore[attr-defined]
            # So module.to(dtype) goes on: the parameter becomes a dense one.
            weight, new = args
            torch.utils.swap_tensors(weight, nn.Parameter(new, weight.requires_grad))
            return None
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            its = args[0]
            return cls(its.panels, its.rows, its.transposed, its.dtype)
        if func is torch.ops.aten.embedding.default and isinstance(args[0], cls):
            return args[0].looked_up(args[1])
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                values = value if isinstance(value, (list, tuple)) else [value]
                if any(isinstance(one, cls) for one in values):
                    raise RuntimeError(REFUSAL)
        args, kwargs = tree_map_only(cls, cls._plain, (args, kwargs))
        return func(*args, **kwargs)
