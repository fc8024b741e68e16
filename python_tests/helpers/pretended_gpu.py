"""A GPU that is not there: tensors say that they lie on cuda:0, and the CPU computes.

    MSN_TEST_DEVICES=cuda pytest -p helpers.pretended_gpu python_tests/decoding

runs the tests of a GPU machine where there is none, with the tape in the place of CUDA graphs. An
operation fails if its tensors lie on two devices, as it would there; numbers alone may. So what is
found are tests, and code, that leave something on the CPU. Kernels, streams and waiting are not
pretended, nor is ``Tensor.is_cuda``, behind which is what only a GPU knows how to do.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import msn_ext
from helpers import runners, tape

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
MARK = "_pretends"  # an attribute of a tensor on the GPU
# What takes tensors of two devices.
MEET = {Tensor.copy_, Tensor.fill_, Tensor.to, Tensor.type_as, Tensor.data.__set__}
MEET.add(torch._has_compatible_shallow_copy_type)


def on_gpu(x: object) -> bool:
    return isinstance(x, Tensor) and MARK in x.__dict__


def put(x: Tensor, gpu: bool) -> None:
    if gpu:
        x.__dict__[MARK] = True
    else:
        x.__dict__.pop(MARK, None)


def names_gpu(x: object) -> bool:
    return (isinstance(x, str) and x.startswith("cuda")) or (
        isinstance(x, torch.device) and x.type == "cuda"
    )


def named_device(func, arguments: tuple, options: dict) -> bool | None:
    """Return True where a call asks for a result on the GPU, False: on the CPU, None: neither."""
    if func is Tensor.cpu:
        return False
    wanted = None if options.get("device") is None else names_gpu(options["device"])
    if func is Tensor.to:
        for x in arguments[1:]:
            if isinstance(x, (str, torch.device)):
                wanted = names_gpu(x)
            elif isinstance(x, Tensor):
                wanted = on_gpu(x)
    return wanted


def refuse_two_devices(func, arguments: tuple, tensors: list[Tensor]) -> None:
    name = getattr(func, "__name__", str(func))
    if func in (Tensor.numpy, Tensor.__array__):
        if on_gpu(arguments[0]):
            raise TypeError(f"{name} of a tensor on the GPU")
        return
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        here, index, *value = arguments
        indices = [x for x in tree_leaves(index) if isinstance(x, Tensor)]
        # What lies on a GPU takes indices of either; by indices it takes values of its own.
        met = not on_gpu(here) and any(map(on_gpu, indices))
        its = [x for x in value if indices and isinstance(x, Tensor) and x.dim()]
        met |= any(on_gpu(x) != on_gpu(here) for x in its)
    else:
        # Numbers on the CPU may meet tensors on the GPU, but not in these.
        alike = "msn_ext" in str(func) or name in ("cat", "stack", "equal")
        met = len({on_gpu(x) for x in tensors if alike or x.dim() or on_gpu(x)}) > 1
    if met:
        raise RuntimeError(f"{name}: tensors on the GPU and on the CPU")


class PretendedGpu(TorchFunctionMode):
    """Tensors keep their device in a mark, which results take over."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if on_gpu(args[0]) else func(*args)
        if func == Tensor.data.__set__:
            func(*args)
            return put(args[0], on_gpu(args[1]))
        if isinstance(func, torch._ops.OpOverload):
            return func(*args, **options)
        wanted = named_device(func, args, options)
        tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        if wanted is None and func not in MEET:
            refuse_two_devices(func, args, tensors)
        gpu = on_gpu(args[0]) if func is Tensor.copy_ else any(map(on_gpu, tensors))
        if func is Tensor.to:
            args = tuple(CPU if names_gpu(x) else x for x in args)
        if names_gpu(options.get("device")):
            options["device"] = CPU
        result = func(*args, **options)
        return tree_map(
            lambda x: placed(x, tensors, gpu if wanted is None else wanted, wanted), result
        )


def placed(x: object, given: list[Tensor], gpu: bool, wanted: bool | None) -> object:
    """Return a result where it is to lie: a copy of its own, if that is not where it came from."""
    if not isinstance(x, Tensor):
        return x
    is_given = any(x is y for y in given)
    if is_given and (wanted is None or on_gpu(x) == gpu):
        return x
    moved = wanted is not None and given and on_gpu(given[0]) != gpu
    if is_given or (moved and x.data_ptr() and x.data_ptr() == given[0].data_ptr()):
        x = x.detach().clone().requires_grad_(x.requires_grad) if x.is_leaf else x.clone()
    put(x, gpu)
    return x


# ---- the plugin ----------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    """Say that there is a GPU before anybody asks."""
    info = msn_ext.build_info()
    msn_ext.build_info = lambda: info | {"cuda": "pretended"}
    torch.cuda.is_available = lambda: True
    torch.cuda.set_per_process_memory_fraction = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_name = lambda *_: "pretended"
    torch.cuda.get_device_capability = lambda *_: (0, 0)
    runners.CountingBackend = tape.TapeBackend


# By a part of their name: what asks tensors without torch's knowing, and where kernels of the CPU
# do what those of a GPU do not.
LEFT_OUT = (
    "compile",
    "opcheck",
    "weights_that_move",
    "under_autocast",
    "on_several_devices",
    "malformed_parents",
    "commit_on_cuda",
)


def pytest_collection():
    settings.load_profile("sanitizers")  # of hypothesis: few examples


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if not any(name in item.name for name in LEFT_OUT)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with PretendedGpu():
        return (yield)
