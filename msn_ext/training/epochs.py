"""Tell the collator of a trainer which epoch it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from .collator import NoisyCollator

if TYPE_CHECKING:
    from .attach import NoisyLoss


class Epochs(TrainerCallback):
    """Tells the collator which epoch it is: counts them, since a trainer that has a number of steps
    knows none.
    """

    def __init__(self, collator: NoisyCollator, loss: NoisyLoss):
        self._collator, self._loss, self._epoch = collator, loss, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = int((state.epoch or 0.0) + 1e-6)  # not 0 in a resumed run
        self._loss.read()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._collator.set_epoch(self._epoch)
        self._epoch += 1
