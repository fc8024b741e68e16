"""Memory of a CPU that comes from the system, in large pages where there are such."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 64
HUGE = 2 << 20
"""Bytes of a large page."""


def aligned(size: int) -> Tensor:
    """Return zeros, uint8 [size], that begin at a multiple of ``ALIGNMENT``, or of ``HUGE`` where
    they are as large: the system is asked for such pages, as a pass reads more than there are
    entries for small ones.

    It comes from the system, not from the allocator, which would fill up with holes while packed
    weights take the place of dense ones.
    """
    huge = size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    room = size + HUGE if huge else size  # what is not touched takes no memory
    memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    new = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -new.data_ptr() % HUGE if huge else 0
    if huge:
        with suppress(OSError):  # a kernel without; its end lies in small pages, which take no more
            memory.madvise(mmap.MADV_HUGEPAGE, begin, size)
    return new[begin : begin + size]


def table(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return zeros, int32, to look up in from anywhere: on a CPU in large pages, since a small one
    would have to be found, and the first time made, for nearly every row.
    """
    elsewhere = torch.device(device).type != "cpu"
    if elsewhere or not math.prod(shape) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=torch.int32, device=device)
    return aligned(4 * math.prod(shape)).view(torch.int32).view(shape)
