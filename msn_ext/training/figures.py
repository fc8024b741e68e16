"""Figures of a training's batches for its log."""

from __future__ import annotations

import torch
from torch import Tensor


class Figures:
    """Sums of figures since the last log, over all processes of a trainer."""

    def __init__(self, trainer):
        self._trainer = trainer
        self.forget()

    def forget(self) -> None:
        self._here: Tensor | None = None  # float32 [n], of this process
        self._all: list[float] | None = None

    @torch.no_grad()
    def add(self, parts: list[Tensor]) -> None:
        """Add figures of a batch, a tensor each whose elements are added up."""
        sums = torch.stack([part.sum(dtype=torch.float32) for part in parts])
        self._here = sums if self._here is None else self._here + sums

    def sum_up(self) -> None:
        """Add up what the processes have; all of them call it together, after a step."""
        if self._here is not None:
            self._all = self._trainer.accelerator.reduce(self._here, "sum").tolist()
        self._here = None

    def read(self) -> list[float] | None:
        """Return the sums, once; None: there are none."""
        found, self._all = self._all, None
        return found
