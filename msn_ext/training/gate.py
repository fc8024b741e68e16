"""Train an adapter that works on noise alone: the text is computed by the untouched model, in every
bit, and teaches.

The layout is that of branches (:func:`.layouts.branch`), computed in two parts: the clean text by
the base model, without a gradient, of which keys, values and distributions are kept; then the noise
by the model with its adapter. A noise token learns the distribution that the base model has at the
same place of the clean text (a gated LoRA as in arXiv 2507.11851; here no label is needed).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from msn_ext.gates import why_not_gated

from .collator import NoisyCollator
from .figures import Figures
from .layouts import ANNOTATIONS, branch_mask, shorten

DIVERGENCES = ("kl", "tv", "both")
AMONG = 8  # guesses that decoding keeps of a row
CHECKPOINTED = (
    "gate=True keeps the text's keys and values for the noise, which gradient checkpointing drops;"
    " turn it off (the text has no gradient, and needs little memory)"
)


def check_gate(model, divergence: str) -> None:
    """Raise ValueError where a model's adapter cannot be kept from the text."""
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence is {divergence!r}; expected {', '.join(map(repr, DIVERGENCES))}"
        )
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "disable_adapter"):
        raise ValueError(
            "gate=True needs a PEFT model with a LoRA adapter, which can be left out for the text;"
            f" the model is a {type(model).__name__}"
        )
    for name in model.active_adapters:
        if wrong := why_not_gated(configs[name]):
            raise ValueError(
                f"gate=True needs a LoRA whose effect is a sum that can be left out, but adapter"
                f" {name!r} has {wrong}"
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            raise ValueError(
                f"gate=True keeps the base model as it is, but {name} would be trained; expected"
                " LoRA weights alone"
            )
    # What transformers' models say themselves has another name in later releases.
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(CHECKPOINTED)


class NoisePass(NamedTuple):
    """What a batch of branches gave.

    Attributes:
        teacher, student: for every noise token the logits [n, V] of the base model at the clean
            text, and of the model with its adapter at the noise in its place.
        text: logits [m, V] of the base model at places of the text that were asked for.
    """

    teacher: Tensor
    student: Tensor
    text: Tensor


def noise_pass(
    model, peft, batch: dict, config, length: int, text: Tensor | None = None
) -> NoisePass:
    """Compute a batch of branches in two parts.

    Args:
        model: what is called, such as ``peft`` wrapped for several processes.
        peft: the PEFT model itself.
        batch: of :func:`.layouts.branch`; the annotations are taken out of it.
        config: of the model's text.
        length: of the longest branch, or more.
        text: places of the text whose logits are asked for, too, int64 [m, 2]: rows and columns.
    """
    from transformers import DynamicCache  # a data loader's workers would wait for it

    depth, before, sample = (batch.pop(name) for name in ANNOTATIONS)
    batch.pop("labels", None)
    ids, positions = batch.pop("input_ids"), batch.pop("position_ids")
    batch.pop("attention_mask", None)
    mask = branch_mask(depth, before, sample, positions, config, length)
    rows, columns = depth.nonzero(as_tuple=True)
    width = int(columns.min()) if len(columns) else ids.shape[1] - 1  # of the clean text
    depths = depth[rows, columns]
    clean = before[rows, columns - depths + 1] + depths  # the places that the noise stands for
    asked = rows.new_zeros(0, 2) if text is None else text
    cache = DynamicCache()
    with without_adapter(peft):
        base = logits_at(
            model,
            peft,
            torch.cat([clean, asked[:, 1]]),
            torch.cat([rows, asked[:, 0]]),
            0,
            input_ids=ids[:, :width],
            position_ids=positions[:, :width],
            attention_mask=part_of(mask, slice(0, width), slice(0, width)),
            past_key_values=cache,
            use_cache=True,
            **batch,
        )
    student = logits_at(
        model,
        peft,
        columns,
        rows,
        width,
        input_ids=ids[:, width:],
        position_ids=positions[:, width:],
        attention_mask=part_of(mask, slice(width, None), slice(None)),
        past_key_values=cache,
        use_cache=True,
        **batch,
    )
    return NoisePass(base[: len(rows)], student, base[len(rows) :])


@contextlib.contextmanager
def without_adapter(peft) -> Iterator[None]:
    """Leave the adapter out, and dropout and gradients, within this context."""
    modes = [(module, module.training) for module in peft.modules()]
    peft.eval()
    try:
        with torch.no_grad(), peft.disable_adapter():
            yield
    finally:
        for module, training in modes:
            module.training = training


def part_of(mask, queries: slice, keys: slice):
    if isinstance(mask, dict):
        return {kind: part_of(of, queries, keys) for kind, of in mask.items()}
    return mask[:, :, queries, keys]


def logits_at(model, peft, columns: Tensor, rows: Tensor, begin: int, **inputs) -> Tensor:
    """Return the logits [n, V] at some rows and columns, of which ``begin`` is the first one of the
    inputs.
    """
    kept, at = torch.unique(columns - begin, return_inverse=True)
    if "logits_to_keep" in inspect.signature(peft.get_base_model().forward).parameters:
        inputs["logits_to_keep"] = kept
    else:
        at = columns - begin
    logits = model(**inputs).logits
    if logits is None:
        raise ValueError("gate=True needs the logits of the model, which gives none")
    return logits[rows, at]


def divergences(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return how far each row of logits is from the teacher's, float32 (float64 of float64) [n],
    natural logarithm: the Kullback-Leibler divergence from the teacher's distribution, the total
    variation, or their sum.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    said, right = (x.to(dtype).log_softmax(-1) for x in (student, teacher))
    found = said.new_zeros(len(said))
    if kind != "tv":
        found = found + torch.nn.functional.kl_div(
            said, right, reduction="none", log_target=True
        ).sum(-1)
    if kind != "kl":
        found = found + (said.exp() - right.exp()).abs().sum(-1) / 2
    return found


def share_of_step(trainer, losses: Tensor, items) -> Tensor:
    """Return the share of a batch's losses [n] in the step's mean over all of them, as the trainer
    divides the loss of a model: by ``items`` of all its batches, where it counts them.
    """
    if items is None or not trainer.model_accepts_loss_kwargs:
        return losses.sum() / max(len(losses), 1)
    loss = losses.sum() / items
    if trainer.args.average_tokens_across_devices:
        loss = loss * trainer.accelerator.num_processes
    return loss


class GatedLoss:
    """The loss of a trainer with a gate, in the place of its own; figures for the log."""

    def __init__(self, trainer, collator: NoisyCollator, divergence: str):
        self._trainer, self._collator, self._divergence = trainer, collator, divergence
        self.figures = Figures(trainer)  # divergence, tokens, right ones, right among AMONG

    def growing(self, get_batch_samples):
        """Return ``get_batch_samples`` of a trainer, with segments of 1, 2, … ``length`` tokens in
        equal shares of its steps.

        Batches are shortened here, where the step that they are of is known (a data loader works
        ahead) and the trainer counts their labels.
        """

        @functools.wraps(get_batch_samples)
        def taken(epoch_iterator, *args, **kwargs):
            state, longest = self._trainer.state, self._collator.length
            grown = 1 + longest * state.global_step // max(state.max_steps, 1)
            cut = functools.partial(shorten, length=min(grown, longest))
            return get_batch_samples(map(cut, epoch_iterator), *args, **kwargs)

        return taken

    def around(self, compute_loss):
        """Return ``compute_loss`` of a trainer for annotated batches; others stay as they are."""

        @functools.wraps(compute_loss)
        def computed(model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
            peft = self._trainer.accelerator.unwrap_model(model)
            if ANNOTATIONS[0] not in inputs:  # evaluation, of text
                with peft.disable_adapter():
                    return compute_loss(
                        model,
                        inputs,
                        return_outputs,
                        num_items_in_batch=num_items_in_batch,
                        **kwargs,
                    )
            found = noise_pass(
                model, peft, dict(inputs), self._collator.config, self._collator.length
            )
            losses = divergences(found.student, found.teacher, self._divergence)
            self._observe(losses, found)
            loss = share_of_step(self._trainer, losses, num_items_in_batch)
            return (loss, {"logits": found.student}) if return_outputs else loss

        return computed

    def _observe(self, losses: Tensor, found: NoisePass) -> None:
        right = found.teacher.argmax(-1, keepdim=True)
        said = found.student.topk(min(AMONG, found.student.shape[-1]), -1).indices == right
        self.figures.add([losses, torch.ones_like(losses), said[:, 0], said])

    def read(self) -> dict[str, float]:
        """Return what was observed up to the last step that is to be logged, once."""
        loss, tokens, right, among = self.figures.read() or [0.0] * 4
        if not tokens:
            return {}
        return {
            "noise_loss": loss / tokens,
            "noise_accuracy": right / tokens,
            f"noise_accuracy_{AMONG}": among / tokens,
        }
