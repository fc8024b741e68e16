"""The base model as the teacher of its own adapter: what it says of the clean text is learned, on
that text and after noise alike, so that the adapter learns to guess, and is held to what was said
before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .collator import NoisyCollator
from .figures import Figures
from .gate import DIVERGENCES, divergences, logits_at, part_of, share_of_step, without_adapter
from .layouts import ANNOTATIONS, NO_LABEL, branch_mask

TEACHERS = ("base",)
ROWS = 512  # of logits in float32 at a time


def check_teacher(model, teacher: str, divergence: str, settings: dict) -> None:
    """Raise ValueError where a model cannot be its own teacher, or not with these settings."""
    for name, value, known in (
        ("teacher", teacher, TEACHERS),
        ("divergence", divergence, DIVERGENCES),
    ):
        if value not in known:
            names = ", ".join(map(repr, known))
            raise ValueError(f"{name} is {value!r}; expected {names}")
    if getattr(model, "peft_config", None) is None or not hasattr(model, "disable_adapter"):
        raise ValueError(
            "teacher='base' needs a PEFT model, whose adapter can be left out for the teacher; the"
            f" model is a {type(model).__name__}"
        )
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ValueError(
            "teacher='base' and a PEFT prompt, which lengthens the text, do not go together;"
            " expected an adapter of weights, such as LoRA"
        )
    own = (model.base_model.prefix, "modules_to_save", "trainable_tokens")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in own):
            raise ValueError(
                f"teacher='base' keeps the base model as it is, but {name} would be trained;"
                " expected weights of the adapter alone"
            )
    if settings.get("content") == "self":
        raise ValueError(
            "teacher='base' and content='self' do not go together: it takes a pass of its own to"
            " guess; expected another content"
        )


class TaughtLoss:
    """The loss of a trainer whose labels give way to a teacher, in the place of its own; figures
    for the log.
    """

    def __init__(
        self,
        trainer,
        collator: NoisyCollator,
        divergence: str,
        weights: Callable[[], tuple[float, float]],
    ):
        self._trainer, self._collator, self._weights = trainer, collator, weights
        self._divergence = divergence
        # Divergence and tokens of the clean text; after noise divergence, tokens and right ones.
        self.figures = Figures(trainer)

    def around(self, compute_loss):
        """Return ``compute_loss`` of a trainer for annotated batches; others stay as they are."""

        @functools.wraps(compute_loss)
        def computed(model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
            if ANNOTATIONS[0] not in inputs:  # evaluation
                return compute_loss(
                    model,
                    inputs,
                    return_outputs,
                    num_items_in_batch=num_items_in_batch,
                    **kwargs,
                )
            batch = dict(inputs)
            depth = batch["noise_depth"]
            live = batch["labels"][:, 1:] != NO_LABEL
            teacher, student = self._both(model, batch, live)
            noisy = (depth[:, :-1] > 0)[live]
            losses = self._divergences(student, teacher)
            self._observe(losses.detach(), noisy, student, teacher)
            clean, noise = self._weights()
            weighted = torch.where(noisy, noise * losses, clean * losses)
            loss = share_of_step(self._trainer, weighted, num_items_in_batch)
            return (loss, {"logits": student}) if return_outputs else loss

        return computed

    def _both(self, model, batch: dict, live: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [n, V] at the labels: of the base model on the clean text, and of the
        model on the noisy batch.
        """
        config, length = self._collator.config, self._collator.length
        depth, before, sample = (batch.pop(name, None) for name in ANNOTATIONS)
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        batch["use_cache"] = False
        if hasattr(config, "output_router_logits"):  # to balance experts, which is not learned here
            batch["output_router_logits"] = False
        rows, columns = live.nonzero(as_tuple=True)
        if sample is None:  # what became noise is the label of the token before
            clean, places = {"input_ids": torch.where(depth > 0, labels, ids)}, columns
        else:
            batch["attention_mask"] = branch_mask(
                depth, before, sample, batch["position_ids"], config, length
            )
            clean, places = _text(ids, batch, depth), _places(rows, columns, depth, before)
        peft = self._trainer.accelerator.unwrap_model(model)
        with without_adapter(peft):
            teacher = logits_at(model, peft, places, rows, 0, **batch | clean)
        return teacher, logits_at(model, peft, columns, rows, 0, input_ids=ids, **batch)

    def _divergences(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return how far rows of logits are from the teacher's, [n]; in parts, which backward
        computes again: that bounds the memory.
        """
        of = functools.partial(divergences, kind=self._divergence)
        parts = zip(student.split(ROWS), teacher.split(ROWS))
        return torch.cat([checkpoint(of, *part, use_reentrant=False) for part in parts])

    @torch.no_grad()
    def _observe(self, losses: Tensor, noisy: Tensor, student: Tensor, teacher: Tensor) -> None:
        right = student.argmax(-1) == teacher.argmax(-1)
        self.figures.add([losses * ~noisy, ~noisy, losses * noisy, noisy, right & noisy])

    def read(self) -> dict[str, float]:
        """Return what was observed up to the last step that is to be logged, once."""
        clean, texts, noise, tokens, right = self.figures.read() or [0.0] * 5
        found = {"clean_loss": clean / texts} if texts else {}
        if tokens:
            found |= {"noise_loss": noise / tokens, "noise_accuracy": right / tokens}
        return found


def _text(ids: Tensor, batch: dict, depth: Tensor) -> dict:
    """Return what is the clean text's alone of a batch of branches, which stand after it."""
    noise = (depth > 0).any(0).nonzero()
    text = slice(0, int(noise[0]) if len(noise) else ids.shape[1])
    return {
        "input_ids": ids[:, text],
        "position_ids": batch["position_ids"][:, text],
        "attention_mask": part_of(batch["attention_mask"], text, text),
    }


def _places(rows: Tensor, columns: Tensor, depth: Tensor, before: Tensor) -> Tensor:
    """Return the columns of the clean text that tokens of branches stand for, int64 [n]; of others
    their own.
    """
    depths = depth[rows, columns]
    starts = before[rows, (columns - depths + 1).clamp(max=depth.shape[1] - 1)]
    return torch.where(depths > 0, starts + depths, columns)
