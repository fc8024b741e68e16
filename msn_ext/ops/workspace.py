"""Memory that the blocks of one launch on a GPU share."""

import threading

import torch
from torch import Tensor


class Workspace:
    """Memory in which the blocks of a launch on a GPU leave sums and counts for each other.

    There is one per device and stream. Within ``with workspace:`` a thread's calls use this one
    instead, for captured launches (CUDA graphs), whose memory nobody else may use and which must
    stay.
    """

    def __init__(self) -> None:
        self._floats: list[Tensor] = []
        self._counters: list[Tensor] = []

    def get(self, like: Tensor, floats: int, counters: int) -> tuple[Tensor, Tensor]:
        """Return float32 [floats or more], and int32 [counters or more], 0 between launches."""
        return (
            self._last(self._floats, like, floats, torch.float32),
            self._last(self._counters, like, counters, torch.int32),
        )

    @staticmethod
    def _last(buffers: list[Tensor], like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Return one that is large enough. The smaller ones before it stay: captured launches know
        where they are. One that is made within a capture is for the launch that asks alone: it is 0
        when that is replayed, and not before.
        """
        if buffers and len(buffers[-1]) >= size:
            return buffers[-1]
        if _captured(like):
            return like.new_zeros(size, dtype=dtype)
        least = 2 * len(buffers[-1]) if buffers else 0
        buffers.append(like.new_zeros(max(size, least), dtype=dtype))
        return buffers[-1]

    def __enter__(self) -> None:
        _own.workspace, self._before = self, getattr(_own, "workspace", None)

    def __exit__(self, *error: object) -> None:
        _own.workspace = self._before


def _captured(like: Tensor) -> bool:
    """Return whether launches on the device of a tensor are being captured."""
    if not like.is_cuda:
        return False
    with torch.cuda.device(like.device):
        return torch.cuda.is_current_stream_capturing()


_own = threading.local()
_workspaces: dict[tuple[int, int], Workspace] = {}


def workspace(like: Tensor, floats: int, counters: int) -> tuple[Tensor, Tensor]:
    """Return what :meth:`Workspace.get` does, from the workspace of the current stream of the
    device that ``like`` is on, or from that of the ``with`` around this call.
    """
    space = getattr(_own, "workspace", None)
    if space is None:
        key = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
        space = _workspaces.setdefault(key, Workspace())
    return space.get(like, floats, counters)
