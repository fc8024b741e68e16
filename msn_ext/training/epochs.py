"""Tell the collator of a trainer which epoch it is, and the figures when there is a log."""

from __future__ import annotations

from transformers import TrainerCallback

from .collator import NoisyCollator
from .figures import Figures

KEPT = "msn_ext"
"""Where a checkpoint's trainer state has the figures that are not logged yet."""


class Epochs(TrainerCallback):
    """Tells the collator which epoch it is: counts them, since a trainer that has a number of steps
    knows none.

    Figures are summed up over all processes after a step that is to be logged or saved, since there
    all of them are. A checkpoint has those that are not logged yet, so that the first log of a
    resumed run is of the same steps as without the break.
    """

    def __init__(self, collator: NoisyCollator, figures: Figures):
        self._collator, self._figures, self._epoch = collator, figures, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = int((state.epoch or 0.0) + 1e-6)  # not 0 in a resumed run
        kept = state.stateful_callbacks.get(KEPT, {}).get("attributes", {})
        self._figures.begin(kept["sums"] if kept.get("step") == state.global_step else None)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._collator.set_epoch(self._epoch)
        self._epoch += 1

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_save:
            self._figures.sum_up()
            self._keep(state)

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, **kwargs):
        self._keep(state)  # what was logged no more

    def _keep(self, state) -> None:
        attributes = {"step": state.global_step, "sums": self._figures.pending()}
        state.stateful_callbacks[KEPT] = {"args": {}, "attributes": attributes}
