"""Noise in a trainer that is there already: one line."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TrainerCallback

from .collator import NoisyCollator
from .layouts import ANNOTATIONS, NO_LABEL

Weights = tuple[float, float]
ROWS = 512  # of logits in float32 at a time


class _Epochs(TrainerCallback):
    """Tells the collator which epoch it is."""

    def __init__(self, collator: NoisyCollator):
        self._collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._collator.set_epoch(int((state.epoch or 0.0) + 1e-6))


def add_noise(trainer, *, loss_weights: Weights | Callable[[float], Weights] = (1.0, 1.0), **settings):
    """Put noise into the training batches of a ``transformers.Trainer`` or TRL ``SFTTrainer``::

        trainer = SFTTrainer(model, args, train_dataset=data)
        msn_ext.add_noise(trainer, layout="branch", segments=24)
        trainer.train()

    Evaluation and prediction stay free of noise, epochs are counted. Logged beside the loss: ``clean_loss`` and
    ``noise_loss`` (mean cross-entropy behind clean and behind noise tokens, natural logarithm) and
    ``noise_accuracy`` (share of noise tokens behind which the likeliest token is right), since the last log.

    Args:
        trainer: not yet trained; packing and padding-free batches are fine.
        loss_weights: of the labels behind clean tokens and behind noise, or a function that gives them for the share of
            the steps that are done, 0 to 1; the trainer goes on dividing by the number of labels.
        settings: of :class:`NoisyCollator`, all but ``inner`` and ``config``.

    Returns:
        The trainer.

    Raises:
        ValueError: a setting is wrong, or the trainer has noise already.
    """
    if isinstance(trainer.data_collator, NoisyCollator):
        raise ValueError("trainer has noise already: its data_collator is a NoisyCollator")
    if not callable(loss_weights):
        _check(loss_weights)
    inner = trainer.data_collator
    noisy = NoisyCollator(inner, config=trainer.model.config, **settings)
    noisy.annotate = True
    trainer.data_collator = noisy
    trainer.add_callback(_Epochs(noisy))
    for name in ("get_eval_dataloader", "get_test_dataloader"):
        setattr(trainer, name, _with_collator(trainer, inner, getattr(trainer, name)))
    trainer.noise = NoisyLoss(_now(trainer, loss_weights), own_guesses=noisy.content == "self")
    trainer.compute_loss = trainer.noise.around(trainer.compute_loss)
    trainer.log = _logging(trainer, trainer.log)
    return trainer


def _check(weights: Weights) -> Weights:
    try:
        clean, noise = weights
        right = 0 <= clean < float("inf") and 0 <= noise < float("inf")
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"loss_weights is {weights!r}; expected two numbers, 0 or more")
    return weights


def _now(trainer, loss_weights) -> Callable[[], Weights]:
    """The weights of the step that is being made."""
    if not callable(loss_weights):
        return lambda: loss_weights
    return lambda: _check(loss_weights(trainer.state.global_step / max(trainer.state.max_steps, 1)))


def _with_collator(trainer, collator, make_loader):
    """``make_loader`` with another collator for as long as it runs."""

    @functools.wraps(make_loader)
    def make(*args, **kwargs):
        before, trainer.data_collator = trainer.data_collator, collator
        try:
            return make_loader(*args, **kwargs)
        finally:
            trainer.data_collator = before

    return make


def _logging(trainer, log):
    @functools.wraps(log)
    def logging(logs, *args, **kwargs):
        if "loss" in logs:
            logs |= trainer.noise.read()
        return log(logs, *args, **kwargs)

    return logging


class NoisyLoss:
    """What comes before and behind a trainer's loss: the model's own guesses as noise, weights, and what is logged."""

    def __init__(self, weights: Callable[[], Weights] = lambda: (1.0, 1.0), own_guesses: bool = False):
        self._weights, self._own_guesses = weights, own_guesses
        self._sums: Tensor | None = None  # loss, labels behind clean; loss, labels, right ones behind noise

    def around(self, compute_loss):
        """``compute_loss`` of a trainer for batches that say where their noise is."""

        @functools.wraps(compute_loss)
        def computed(model, inputs, *args, **kwargs):
            depth, before = (inputs.pop(name, None) for name in ANNOTATIONS)
            if depth is None:  # evaluation
                return compute_loss(model, inputs, *args, **kwargs)
            if self._own_guesses:
                inputs["input_ids"] = guess(model, inputs, depth, before)
            labels, said = inputs["labels"], []
            # What the model said is taken here: a trainer may not return it, or not without another pass.
            hook = model.register_forward_hook(lambda model, given, outputs: said.append(outputs))
            try:
                result = compute_loss(model, inputs, *args, **kwargs)
            finally:
                hook.remove()
            loss, outputs = result if isinstance(result, tuple) else (result, None)
            loss = self._observe(loss, said[0], labels, depth)
            return loss if outputs is None else (loss, outputs)

        return computed

    def _observe(self, loss: Tensor, outputs, labels: Tensor, depth: Tensor) -> Tensor:
        """Adds a batch; returns its loss, weighted."""
        clean, noise = self._weights()
        weighted = (clean, noise) != (1.0, 1.0)
        targets, noisy = labels[:, 1:], depth[:, :-1] > 0
        live = targets != NO_LABEL
        with torch.set_grad_enabled(weighted):
            losses, right = _by_label(outputs, targets, live)
        noisy = noisy[live]
        parts = [losses.detach() * ~noisy, ~noisy, losses.detach() * noisy, noisy, right & noisy]
        sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums
        if not weighted or not len(losses):
            return loss
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError("loss_weights cannot be told apart from a mixture of experts' own loss; leave them at (1, 1)")
        # By what the trainer divides, and what it multiplies with, is its own affair.
        scale = loss.detach() / losses.detach().sum()
        return scale * (losses * torch.where(noisy, noise, clean)).sum()

    def read(self) -> dict[str, float]:
        """What was observed since the last call, by this process."""
        if self._sums is None:
            return {}
        clean, cleans, noise, noises, right = self._sums.tolist()
        self._sums = None
        read = {"clean_loss": clean / cleans} if cleans else {}
        return read | ({"noise_loss": noise / noises, "noise_accuracy": right / noises} if noises else {})


@torch.no_grad()
def guess(model, inputs: dict, depth: Tensor, before: Tensor) -> Tensor:
    """The batch's tokens with what the model guesses in place of the noise: one more pass, one Jacobi iteration.

    A segment's first guess is the likeliest that is wrong: were it right, it would have been accepted (the drafts that are
    checked behind it in decoding are behind a wrong one, too).
    """
    ids = inputs["input_ids"].clone()
    logits = model(**{name: x for name, x in inputs.items() if name != "labels"}).logits
    rows, columns = depth.nonzero(as_tuple=True)
    behind = before[rows, columns]
    likeliest = logits[rows, behind].topk(2, -1).indices
    right = inputs["labels"][rows, behind + 1]
    first = (depth[rows, columns] == 1) & (likeliest[:, 0] == right)
    ids[rows, columns] = torch.where(first, likeliest[:, 1], likeliest[:, 0])
    return ids


def _by_label(outputs, targets: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy at every label, float32 [n], and whether the likeliest token is right, bool [n]."""
    if getattr(outputs, "log_probs", None) is not None:  # TRL's fused head gives no logits
        return -outputs.log_probs[live].float(), outputs.is_top1[live].bool()
    logits, targets = outputs.logits[:, :-1][live], targets[live]
    if torch.is_grad_enabled():
        parts = [(logits, targets)]
    else:  # bounds the memory
        parts = zip(logits.split(ROWS), targets.split(ROWS))
    losses = [torch.nn.functional.cross_entropy(said.float(), right, reduction="none") for said, right in parts]
    return torch.cat(losses) if losses else logits.new_zeros(0), logits.detach().argmax(-1) == targets
