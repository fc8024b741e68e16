"""Tell the collator of a trainer which epoch it is."""

from __future__ import annotations

from collections.abc import Callable

from transformers import TrainerCallback

from .collator import NoisyCollator


class Epochs(TrainerCallback):
    """Tells the collator which epoch it is: counts them, since a trainer that has a number of steps
    knows none.

    Args:
        begin: called when training begins.
    """

    def __init__(self, collator: NoisyCollator, begin: Callable[[], object]):
        self._collator, self._begin, self._epoch = collator, begin, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = int((state.epoch or 0.0) + 1e-6)  # not 0 in a resumed run
        self._begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._collator.set_epoch(self._epoch)
        self._epoch += 1
