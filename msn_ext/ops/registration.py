"""Registration of an op with :mod:`torch.library`: one function says everything.

The function makes the op's outputs, yields them, and fills them::

    @op("double(Tensor x) -> Tensor")
    def double(x: Tensor) -> Iterator[Tensor]:
        \"""Return 2 * x, for x float32 [N].\"""
        expect_dims("x", x, "[N]")
        out = torch.empty_like(x)
        yield out
        _C.double(x.contiguous(), out)

What stands before the ``yield`` also runs on tensors without data, when ``torch.compile`` and
``torch.export`` trace the op: it may look at shapes, dtypes and numbers only. What stands after it
calls the kernel, which checks its arguments and picks the backend by their device. An op that only
changes its arguments yields nothing (``Iterator[None]``).
"""

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("msn_ext", "DEF")


def op(schema: str) -> Callable[[Callable[P, Iterator[R]]], Callable[P, R]]:
    """Register the decorated function (see above) as ``torch.ops.msn_ext.<name>``.

    Args:
        schema: name, arguments and results as torch writes them, the arguments named as in Python.
            It says which arguments the op changes.

    Returns:
        A decorator that returns the function to call: it goes through torch's dispatcher and
        returns what the decorated one yields.
    """
    name = schema.split("(")[0]

    def register(function: Callable[P, Iterator[R]]) -> Callable[P, R]:
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            steps = function(*args, **kwargs)
            outputs = next(steps)
            next(steps, None)
            return outputs

        def trace(*args: P.args, **kwargs: P.kwargs) -> R:
            return next(function(*args, **kwargs))

        _library.define(schema)
        for device in ("CPU", "CUDA"):
            _library.impl(name, run, device)
        torch.library.register_fake(f"msn_ext::{name}", trace, lib=_library)
        registered = getattr(torch.ops.msn_ext, name)

        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return registered(*args, **kwargs)
            except RuntimeError:  # torch's for arguments that are missing or too many, too
                signature.bind(*args, **kwargs)  # Python's for those: TypeError
                raise

        yielded = typing.get_args(signature.return_annotation)[0]
        vars(call)["__signature__"] = signature.replace(return_annotation=yielded)
        return call

    return register


def expect_dims(name: str, tensor: Tensor, shape: str) -> None:
    """Raise ValueError where an argument has not as many dimensions as ``shape``, such as [B, N].

    For what the outputs' sizes are taken from; the kernel checks the rest.
    """
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {shape}")


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, copied only if the numbers of its last dimension lie apart."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()
