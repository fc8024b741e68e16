"""Noise in a trainer that is there already: one line."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TrainerCallback

from .collator import NoisyCollator
from .layouts import ANNOTATIONS, NO_LABEL, branch_mask

Weights = tuple[float, float]
PLAIN = (1.0, 1.0)
ROWS = 512  # of logits in float32 at a time


class _Epochs(TrainerCallback):
    """Tells the collator which epoch it is: counted, since a trainer that has a number of steps
    knows no epochs.
    """

    def __init__(self, collator: NoisyCollator, loss: NoisyLoss):
        self._collator, self._loss, self._epoch = collator, loss, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch = int((state.epoch or 0.0) + 1e-6)  # of a run that goes on
        self._loss.read()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._collator.set_epoch(self._epoch)
        self._epoch += 1


def add_noise(
    trainer, *, loss_weights: Weights | Callable[[float], Weights] = (1.0, 1.0), **settings
):
    """Put noise into the training batches of a ``transformers.Trainer`` or TRL ``SFTTrainer``::

        trainer = SFTTrainer(model, args, train_dataset=data)
        msn_ext.add_noise(trainer, layout="branch", segments=24)
        trainer.train()

    Evaluation and prediction stay free of noise, epochs are counted. Logged beside the loss:
    ``clean_loss`` and ``noise_loss`` (mean cross-entropy behind clean and behind noise tokens,
    natural logarithm) and ``noise_accuracy`` (share of noise tokens behind which the likeliest
    token is right), since the last log.

    Args:
        trainer: not yet trained; packing and padding-free batches are fine.
        loss_weights: of the labels behind clean tokens and behind noise, or a function that gives
            them for the share of the steps that are done, 0 to 1; the trainer goes on dividing by
            the number of labels. Others than (1, 1) need a trainer whose loss is plain
            cross-entropy.
        settings: of :class:`NoisyCollator`, all but ``inner`` and ``config``.

    Returns:
        The trainer.

    Raises:
        ValueError: a setting is wrong or does not fit the trainer, or the trainer has noise
            already.
    """
    if isinstance(trainer.data_collator, NoisyCollator):
        raise ValueError("trainer has noise already: its data_collator is a NoisyCollator")
    weighed = callable(loss_weights) or _check(loss_weights) != PLAIN
    if weighed and (own := _own_loss(trainer)):
        raise ValueError(
            f"loss_weights weigh plain cross-entropy, but the trainer has {own}; "
            "leave them at (1, 1)"
        )
    inner = trainer.data_collator
    noisy = NoisyCollator(inner, config=trainer.model.config, **settings)
    if noisy.layout == "branch" and getattr(
        getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False
    ):
        raise ValueError(
            "layout='branch' and a PEFT prompt, which lengthens the text, do not go together;"
            " expected layout='replace'"
        )
    noisy.annotate = True
    if hasattr(inner, "tokenizer"):  # which a trainer saves beside the model
        noisy.tokenizer = inner.tokenizer
    trainer.data_collator = noisy
    for name in ("get_eval_dataloader", "get_test_dataloader"):
        setattr(trainer, name, _with_collator(trainer, inner, getattr(trainer, name)))
    trainer.noise = NoisyLoss(noisy, _now(trainer, loss_weights))
    trainer.add_callback(_Epochs(noisy, trainer.noise))
    trainer.compute_loss = trainer.noise.around(trainer.compute_loss)
    trainer.log = _logging(trainer, trainer.log)
    return trainer


def _own_loss(trainer) -> str | None:
    """What makes a trainer's loss another one than cross-entropy."""
    if getattr(trainer, "label_smoother", None) is not None:
        return "label_smoothing_factor"
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func"
    kind = getattr(trainer.args, "loss_type", "nll")
    return None if kind == "nll" else f"loss_type={kind!r}"


def _check(weights: Weights) -> Weights:
    try:
        clean, noise = weights
        right = 0 <= clean < float("inf") and 0 <= noise < float("inf")
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"loss_weights is {weights!r}; expected two numbers, 0 or more")
    return clean, noise


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
    """What comes before and behind a trainer's loss: the mask of branches, the model's own guesses
    as noise, weights, and what is logged.
    """

    def __init__(self, collator: NoisyCollator, weights: Callable[[], Weights]):
        self._collator, self._weights = collator, weights
        self._sums: Tensor | None = (
            None  # loss, labels behind clean; loss, labels, right ones behind noise
        )

    def around(self, compute_loss):
        """``compute_loss`` of a trainer for batches that say where their noise is."""

        @functools.wraps(compute_loss)
        def computed(model, inputs, *args, **kwargs):
            inputs = dict(inputs)  # a trainer may compute the loss of a batch twice
            depth, before, document = (inputs.pop(name, None) for name in ANNOTATIONS)
            if depth is None:  # evaluation
                return compute_loss(model, inputs, *args, **kwargs)
            labels, said = inputs["labels"], []
            # What the model said is taken here: a trainer may not return it, or not without another
            # pass.
            hooks = [
                model.register_forward_hook(lambda model, given, outputs: said.append(outputs))
            ]
            if document is not None:
                # Not before: trainers and losses read attention_mask as [B, T'].
                mask = branch_mask(
                    depth,
                    before,
                    document,
                    inputs["position_ids"],
                    self._collator.config,
                    self._collator.length,
                )
                hooks.append(
                    model.register_forward_pre_hook(
                        functools.partial(self._with_mask, mask), with_kwargs=True
                    )
                )
            try:
                if self._collator.content == "self":
                    inputs["input_ids"] = guess(model, inputs, depth, before, self._collator.keep)
                    said.clear()
                result = compute_loss(model, inputs, *args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
            loss, outputs = result if isinstance(result, tuple) else (result, None)
            loss = self._observe(loss, said[0] if said else None, labels, depth)
            return loss if outputs is None else (loss, outputs)

        return computed

    def _with_mask(self, mask, model, args: tuple, given: dict) -> tuple[tuple, dict]:
        routed = given.get("output_router_logits")
        if (
            getattr(self._collator.config, "output_router_logits", False)
            if routed is None
            else routed
        ):
            raise ValueError(
                "layout='branch' and the loss that balances a mixture of experts do not go"
                " together: the model would count by the mask; set router_aux_loss_coef=0 (TRL) or"
                " config.output_router_logits=False, or take layout='replace'"
            )
        return args, given | {"attention_mask": mask}

    def _observe(self, loss: Tensor, outputs, labels: Tensor, depth: Tensor) -> Tensor:
        """Adds a batch; returns its loss, weighted."""
        clean, noise = self._weights()
        weighted = (clean, noise) != PLAIN
        targets, noisy = labels[:, 1:], depth[:, :-1] > 0
        live = targets != NO_LABEL
        with torch.set_grad_enabled(weighted):
            found = _by_label(outputs, targets, live)
        if found is None:
            if weighted:
                raise ValueError(
                    "loss_weights need the logits of the model, which this trainer's loss does"
                    " without; leave them at (1, 1)"
                )
            warnings.warn(
                "the trainer's loss does without logits of the model: the losses behind noise are"
                " not logged",
                stacklevel=2,
            )
            return loss
        losses, right = found
        noisy = noisy[live]
        parts = [losses.detach() * ~noisy, ~noisy, losses.detach() * noisy, noisy, right & noisy]
        sums = torch.stack([part.sum(dtype=torch.float32) for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums
        if not weighted or not len(losses):
            return loss
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError(
                "loss_weights cannot be told apart from a mixture of experts' own loss; leave them"
                " at (1, 1)"
            )
        # By what the trainer divides, and what it multiplies with, is its own affair.
        scale = loss.detach() / losses.detach().sum().clamp(min=torch.finfo(losses.dtype).tiny)
        return scale * (losses * torch.where(noisy, noise, clean)).sum()

    def read(self) -> dict[str, float]:
        """What was observed since the last call, by this process."""
        if self._sums is None:
            return {}
        clean, cleans, noise, noises, right = self._sums.tolist()
        self._sums = None
        read = {"clean_loss": clean / cleans} if cleans else {}
        return read | (
            {"noise_loss": noise / noises, "noise_accuracy": right / noises} if noises else {}
        )


@torch.no_grad()
def guess(model, inputs: dict, depth: Tensor, before: Tensor, keep: Tensor) -> Tensor:
    """The batch's tokens with what the model guesses in place of the noise: one more pass, one
    Jacobi iteration.

    A segment's first guess is the likeliest that is wrong: were it right, it would have been
    accepted (the drafts that are checked behind it in decoding are behind a wrong one, too). Tokens
    of ``keep``, int64 [k], are not guessed.
    """
    ids = inputs["input_ids"].clone()
    logits = _logits(
        model(**{name: x for name, x in inputs.items() if name != "labels"}), ids.shape[1]
    )
    if logits is None:
        raise ValueError(
            "content='self' needs the logits of the model, which gives none; expected another"
            " content"
        )
    rows, columns = depth.nonzero(as_tuple=True)
    behind = before[rows, columns]
    likeliest = (
        logits[rows, behind].index_fill(1, keep.to(ids.device), -torch.inf).topk(2, -1).indices
    )
    right = inputs["labels"][rows, behind + 1]
    first = (depth[rows, columns] == 1) & (likeliest[:, 0] == right)
    ids[rows, columns] = torch.where(first, likeliest[:, 1], likeliest[:, 0])
    return ids


def _logits(outputs, width: int) -> Tensor | None:
    """[B, width, V] of what a model returned; behind a prompt that PEFT put before the text."""
    logits = (
        outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    )
    return (
        None
        if logits is None or logits.dim() != 3 or logits.shape[1] < width
        else logits[:, -width:]
    )


def _by_label(outputs, targets: Tensor, live: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cross-entropy at every label, float32 [n], and whether the likeliest token is right, bool
    [n]; None: nobody knows.
    """
    if getattr(outputs, "log_probs", None) is not None:  # TRL's fused head gives no logits
        return -outputs.log_probs[live].float(), outputs.is_top1[live].bool()
    logits = _logits(outputs, targets.shape[1] + 1)
    if logits is None:
        return None
    places = live.nonzero()
    losses, right = [logits.new_zeros(0, dtype=torch.float32)], [live.new_zeros(0)]
    # In parts, which bounds the memory; gradients keep all of it anyway.
    for part in places.split(max(len(places), 1) if torch.is_grad_enabled() else ROWS):
        said, target = logits[part[:, 0], part[:, 1]], targets[part[:, 0], part[:, 1]]
        losses.append(torch.nn.functional.cross_entropy(said.float(), target, reduction="none"))
        right.append(said.detach().argmax(-1) == target)
    return torch.cat(losses), torch.cat(right)
