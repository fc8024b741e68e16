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

torch's dispatcher takes longer over a small op than the op itself. So a call with plain arguments,
that nothing traces, wraps or watches, runs the function at once (:func:`_direct_arguments`).
"""

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

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
        direct_arguments = _direct_arguments(registered.default._schema)

        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not is_compiling() and (direct := direct_arguments(args, kwargs)) is not None:
                return run(*direct)  # type: ignore[call-arg]  # as the schema has them
            try:
                return registered(*args, **kwargs)
            except RuntimeError:  # torch's for arguments that are missing or too many, too
                signature.bind(*args, **kwargs)  # Python's for those: TypeError
                raise

        yielded = typing.get_args(signature.return_annotation)[0]
        vars(call)["__signature__"] = signature.replace(return_annotation=yielded)
        return call

    return register


def _direct_arguments(
    schema: torch._C.FunctionSchema,
) -> Callable[[tuple, dict[str, Any]], Sequence | None]:
    """Make what tells whether a call of the op may pass the dispatcher by.

    Returns:
        A function of the call's arguments, by position and by name: all of them in the schema's
        order, if each is of the schema's type, tensors are plain, dense ones of one device that is
        the CPU or CUDA and need no gradient, and no mode, transform, tracer or profiler is on;
        else None, and torch's dispatcher has to decide what happens.
    """
    names = [argument.name for argument in schema.arguments]
    kinds = [str(argument.type) for argument in schema.arguments]
    as_tensors = {
        "Tensor": lambda x: (x,),
        "Optional[Tensor]": lambda x: () if x is None else (x,),
        "List[Tensor]": lambda x: x if type(x) is list else None,
    }
    tensors = [(at, as_tensors[kind]) for at, kind in enumerate(kinds) if kind in as_tensors]
    as_types: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (float,),
        "Optional[float]": (float, type(None)),
        "str": (str,),
    }
    numbers = [(at, as_types[kind]) for at, kind in enumerate(kinds) if kind not in as_tensors]

    def direct_arguments(args: tuple, kwargs: dict[str, Any]) -> Sequence | None:
        if kwargs:
            rest = names[len(args) :]
            if len(rest) != len(kwargs) or any(name not in kwargs for name in rest):
                return None
            args = (*args, *(kwargs[name] for name in rest))
        if len(args) != len(names) or _watched():
            return None
        for at, types in numbers:
            if type(args[at]) not in types:
                return None
        on_cpu = on_cuda = True
        for at, kind in tensors:
            several = kind(args[at])
            if several is None:
                return None
            for tensor in several:
                if type(tensor) is not Tensor or tensor.requires_grad or tensor.is_neg():
                    return None
                if tensor.layout is not torch.strided or tensor.is_quantized:
                    return None
                on_cpu, on_cuda = on_cpu and tensor.is_cpu, on_cuda and tensor.is_cuda
        return args if on_cpu or on_cuda else None

    return direct_arguments


def _watched() -> bool:
    """Return whether anything may want to know of this thread's ops."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def expect_dims(name: str, tensor: Tensor, shape: str) -> None:
    """Raise ValueError where an argument has not as many dimensions as ``shape``, such as [B, N].

    For what the outputs' sizes are taken from; the kernel checks the rest.
    """
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {shape}")


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, copied only if the numbers of its last dimension lie apart."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()
