"""Figures of a training's batches for its log."""

from __future__ import annotations

import torch
from torch import Tensor


class Figures:
    """Sums of figures since the last log, over all processes of a trainer."""

    def __init__(self, trainer):
        self._trainer = trainer
        self.begin()

    def begin(self, sums: list[float] | None = None) -> None:
        """Begin with what :meth:`pending` gave before a break; None: with nothing."""
        self._here: Tensor | None = None  # float32 [n], of this process, not yet summed up
        self._all = sums

    def pending(self) -> list[float] | None:
        """Return what was summed up and not read yet."""
        return self._all

    @torch.no_grad()
    def add(self, parts: list[Tensor]) -> None:
        """Add figures of a batch, a tensor each whose elements are added up."""
        sums = torch.stack([part.sum(dtype=torch.float32) for part in parts])
        self._here = sums if self._here is None else self._here + sums

    def sum_up(self) -> None:
        """Add up what the processes have; all of them call it together, after a step."""
        if self._here is not None:
            found = self._trainer.accelerator.reduce(self._here, "sum").tolist()
            self._all = [a + b for a, b in zip(self._all or [0.0] * len(found), found)]
        self._here = None

    def read(self) -> list[float] | None:
        """Return the sums, once; None: there are none."""
        found, self._all = self._all, None
        return found
