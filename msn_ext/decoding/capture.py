"""Capturing a step and replaying it: on a GPU, one launch instead of some hundred (CUDA graphs)."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers.utils import import_utils

from .decoder import PassResult

MEMORY_SHARE = 0.1
"""Of a device's memory, for the caches of runners that are kept from call to call."""


class CapturedStep(Protocol):
    """The kernels of one step.

    Attributes:
        result: where every replay leaves what it gained.
    """

    result: PassResult

    def replay(self) -> None:
        """Launch the same kernels on the same memory."""


class CaptureBackend(Protocol):
    """A device that steps are captured on.

    Attributes:
        memory: bytes of caches that may be kept from call to call.
    """

    memory: int

    def warm_up(self, step: Callable[[], PassResult]) -> PassResult:
        """Run a step outside any capture, as capturing asks for beforehand."""

    def rehearse(self, step: Callable[[], PassResult]) -> tuple[PassResult, str | None]:
        """Run a step as :meth:`warm_up` does, and return what in it waits for the device, too,
        which no capture may; None: nothing that was seen. Not the first step, which may wait while
        it sets things up; one thread at a time.
        """

    def capture(self, step: Callable[[], PassResult]) -> CapturedStep:
        """Capture a step without running it."""

    def copy_to_host(self, tensors: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Return copies that are under way, and a function that waits for them. The next call but
        one overwrites them.
        """

    def synchronize(self) -> None:
        """Wait until all that was launched has run."""


@contextlib.contextmanager
def as_if_capturing() -> Iterator[None]:
    """Let transformers leave out, in this thread, the questions to the device that it leaves out in
    a capture, such as those for a warning. One thread at a time.
    """
    thread, asks = threading.get_ident(), import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: threading.get_ident() == thread or asks()
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = asks


@contextlib.contextmanager
def watched_waits() -> Iterator[list[str]]:
    """Give a list of the places where this thread waits for the device within: torch reports those
    of its own operations. Nothing is stopped in its middle. One thread at a time.
    """
    waits: list[str] = []
    thread, before = threading.get_ident(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message, category, filename, lineno, *args, **kwargs):
            if "synchronizing CUDA operation" not in str(message):
                show(message, category, filename, lineno, *args, **kwargs)
            elif threading.get_ident() == thread:  # the mode is every thread's
                waits.append(f"{filename}:{lineno}")

        warnings.showwarning = note
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


class CudaCapturedStep:
    """A step as a CUDA graph."""

    def __init__(self, step: Callable[[], PassResult], pool, stream: torch.cuda.Stream):
        self._graph = torch.cuda.CUDAGraph()
        # A workspace of cuBLAS's that another capture or an eager call made, torch may free while
        # our graph still names its address. Made within, it is our pool's for as long as we are.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # The outer context restores the stream, which a failed capture would leave switched.
            with (
                torch.cuda.stream(torch.cuda.current_stream(stream.device)),
                torch.cuda.graph(
                    self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                self.result = step()
        except BaseException:
            # Up to torch 2.12 the allocator goes on as if the capture did.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(stream.device.index, pool)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()  # nor does an eager call get ours

    def replay(self) -> None:
        self._graph.replay()


class CudaCaptureBackend:
    """CUDA graphs; a :class:`CaptureBackend`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._host: dict[tuple, list[list[Tensor]]] = {}
        self.memory = int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)

    def warm_up(self, step: Callable[[], PassResult]) -> PassResult:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            result = step()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        return result

    def rehearse(self, step: Callable[[], PassResult]) -> tuple[PassResult, str | None]:
        with as_if_capturing(), watched_waits() as waits:
            result = self.warm_up(step)
        return result, waits[0] if waits else None

    def capture(self, step: Callable[[], PassResult]) -> CapturedStep:
        return CudaCapturedStep(step, self._pool, self._side)

    def copy_to_host(self, tensors: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        buffers = self._host.setdefault(shapes, [])  # two, which take turns
        if len(buffers) < 2:
            buffers.append(
                [
                    torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
                    for x in tensors
                ]
            )
        else:
            buffers.append(buffers.pop(0))
        for to, x in zip(buffers[-1], tensors):
            to.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return buffers[-1], event.synchronize

    def synchronize(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


BACKENDS: dict[str, Callable[[torch.device], CaptureBackend]] = {"cuda": CudaCaptureBackend}
"""By type of device."""
