"""Tell the collator of a trainer which epoch it is, and the figures when there is a log."""

from __future__ import annotations

from transformers import TrainerCallback

from .collator import NoisyCollator
from .figures import Figures


class Epochs(TrainerCallback):
    """Tells the collator which epoch it is: counts them, since a trainer that has a number of steps
    knows none.

    Figures are summed up over all processes after a step that is to be logged, since there all of
    them are.
    """

    def __init__(self, collator: NoisyCollator, figures: Figures):
        self._collator, self._figures, self._epoch = collator, figures, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = int((state.epoch or 0.0) + 1e-6)  # not 0 in a resumed run
        self._figures.forget()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._collator.set_epoch(self._epoch)
        self._epoch += 1

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log:
            self._figures.sum_up()

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_log:
            self._figures.sum_up()
