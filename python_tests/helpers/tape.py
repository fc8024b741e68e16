"""CUDA graphs for the CPU: a step recorded as the list of its operations, and replayed without its
Python.

What a graph repeats on a GPU, the same kernels on the same memory, a tape repeats here. So whatever
a step does in Python only, asks the device for, or keeps at another place of memory shows as an
error or as a wrong result.
"""

from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msn_ext.decoding.capture import as_if_capturing


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def why_it_asks(func, args) -> str | None:
    """What about an operation asks the device, if anything."""
    masks = any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1:]))
    plain = func is torch.ops.aten.index.Tensor and not masks  # indexed by numbers
    if torch.Tag.data_dependent_output in func.tags or (
        torch.Tag.dynamic_output_shape in func.tags and not plain
    ):
        return f"{func} asks the device, which a captured step cannot"
    return None


class Questions(TorchDispatchMode):
    """Notes what asks the device, and lets it pass."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (question := why_it_asks(func, args)) is not None:
            self.seen.append(question)
        return func(*args, **kwargs or {})


class TapeStep(TorchDispatchMode):
    """The operations of one step; as with a graph, recording changes nothing."""

    def __init__(self, step):
        super().__init__()
        self.operations, self._before, self._made = [], {}, set()
        self.replays = 0
        try:
            with as_if_capturing(), self:
                self.result = step()
        finally:
            for storage, content in self._before.values():
                storage.copy_(content)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (question := why_it_asks(func, args)) is not None:
            raise RuntimeError(question)
        written = []
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors(args[at] if at < len(args) else kwargs.get(argument.name))
        for x in written:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        fresh = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in given]
        self._made.update(x.untyped_storage().data_ptr() for x in fresh)
        if written or fresh:  # all else are views
            self.operations.append((func, args, kwargs, out, fresh))
        return out

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # operations lie below it
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out, fresh in self.operations:
            new = func(*args, **kwargs)
            for old, value in zip(tensors(out), tensors(new)):
                if any(old is x for x in fresh):
                    old.copy_(value)


class TapeBackend:
    """As :class:`msn_ext.decoding.capture.CudaCaptureBackend`; counts what was recorded and run."""

    made: ClassVar[list] = []
    memory = 1 << 30

    def __init__(self, device):
        self.captures, self.warm_ups = [], 0
        TapeBackend.made.append(self)

    def warm_up(self, step):
        self.warm_ups += 1
        return step()

    def rehearse(self, step):
        with as_if_capturing(), Questions() as questions:
            result = self.warm_up(step)
        return result, questions.seen[0] if questions.seen else None

    def capture(self, step):
        self.captures.append(TapeStep(step))
        return self.captures[-1]

    def copy_to_host(self, values):
        return [x.clone() for x in values], lambda: None

    def synchronize(self):
        pass

    @property
    def replays(self):
        return sum(captured.replays for captured in self.captures)
