"""Models that several processes compute together (tensor parallelism). What a process would decide
by its own clock or its own random numbers, the first of them decides for all: processes that ran
trees of different sizes would wait for each other for ever.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """The processes of a model.

    Attributes:
        group: of torch.distributed.
        device: where this process's part of the model is.
    """

    group: dist.ProcessGroup
    device: torch.device

    def first(self, number: int) -> int:
        """Return the first process's number, less than 2**63; waits for all of them."""
        shared = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.broadcast(shared, group_src=0, group=self.group)
        return int(shared)


_here = threading.local()


def ranks_of(model: nn.Module) -> Ranks | None:
    """Return the processes that compute ``model`` together; None: this one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor

    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return Ranks(parameter.device_mesh.get_group(), parameter.device)
    return None


@contextlib.contextmanager
def one_clock(ranks: Ranks | None) -> Iterator[None]:
    """Within: :func:`seconds` is the first process's, in this thread."""
    before, _here.ranks = getattr(_here, "ranks", None), ranks
    try:
        yield
    finally:
        _here.ranks = before


def seconds() -> float:
    """Return the time of a clock, within :func:`one_clock` the same in all processes."""
    ranks: Ranks | None = getattr(_here, "ranks", None)
    now = time.perf_counter_ns()
    return (now if ranks is None else ranks.first(now)) * 1e-9
