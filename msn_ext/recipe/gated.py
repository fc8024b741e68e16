"""Measure a model before and after training an adapter for the noise alone."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch

from msn_ext.training.data import Collate
from msn_ext.training.evaluation import noise_accuracy

from .metrics import replayed
from .samples import pad_of
from .settings import NoiseSettings


def gated_figures(
    model,
    tokenizer,
    samples: list[dict],
    noise: NoiseSettings,
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Return the figures that are compared: the fields of
    :class:`msn_ext.training.evaluation.NoiseAccuracy`, after noise as it is trained, and
    :func:`.metrics.replayed`.

    Args:
        model: the base model, or the PEFT model with its gated adapter.
        samples: held out.
        dtype: of a copy of the model that decodes; None: the model does.
    """
    pad = pad_of(tokenizer)
    of_collator = noise.of_collator(pad)
    found = noise_accuracy(
        model,
        samples,
        Collate(pad),
        length=of_collator["length"],
        content=of_collator["content"],
        progress=progress,
    )
    decoding = model if dtype is None else copy.deepcopy(model).to(dtype)
    return asdict(found) | replayed(decoding.eval(), samples, progress)


class TextCheck:
    """Whether a model says the same of a text after training as before, in every bit.

    Args:
        model: before training, without an adapter.
        sample: the text.
    """

    def __init__(self, model, sample: dict):
        self._ids = torch.tensor([sample["input_ids"]], device=model.device)
        self._before = self._logits(model)

    @torch.no_grad()
    def _logits(self, model):
        training = model.training
        model.eval()
        try:
            return model(input_ids=self._ids).logits
        finally:
            model.train(training)

    def confirm(self, peft) -> None:
        """Raise RuntimeError where the model without its adapter says anything else."""
        with peft.disable_adapter():
            if not torch.equal(self._logits(peft), self._before):
                raise RuntimeError(
                    "training has changed what the base model says of a text, which an adapter for"
                    " noise alone cannot; do not use this one"
                )
