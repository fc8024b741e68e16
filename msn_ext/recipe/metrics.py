"""Measure a model before and after training: losses, accuracy after noise, accept lengths on the
same texts; say whether the training paid, and whether it did damage.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from msn_ext.decoding import BestFirst
from msn_ext.terminal import progress_bar
from msn_ext.training.data import Collate, Conversation, prompt_ids
from msn_ext.training.evaluation import new_trigrams, noise_accuracy

from .replay import mean_accept_length, passes, texts_of
from .samples import pad_of, question_of
from .self_distill import answer

TEXTS, TOKENS = 16, 64  # that are replayed, and of each
SAID, AT_ONCE = 128, 8  # tokens of an answer of the model's own, and answers of a batch
DEFAULT = "auto@64"
DRAFTS: dict[str, Callable[[], Any]] = {
    "paper": lambda: "paper",
    DEFAULT: lambda: BestFirst(64),
    "auto@8": lambda: BestFirst(8),
}
LOSS, ACCURACY, NEW = 0.05, 0.02, 0.1
"""A model is damaged whose next-token loss rises by more than 5 %, whose next token is right 2
points less often, or whose answers lose a tenth of their new trigrams."""


def figures(
    model,
    tokenizer,
    samples: list[dict],
    questions: list[Conversation],
    length: int,
    *,
    max_new_tokens: int = SAID,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Return the figures that are compared.

    Args:
        samples: held out, for losses and accuracy; the first 64 tokens of the first 16 answers are
            the texts that are replayed.
        questions: of which the model answers the first 16 itself.
        length: noise tokens of a segment.
        max_new_tokens: of its answers, of which no more than 128 count.
        dtype: of a copy of the model that decodes; None: the model does.

    Returns:
        The fields of :class:`msn_ext.training.evaluation.NoiseAccuracy`; passes of every text, and
        accept lengths, by draft (``passes``, ``MAT``); and the share of the trigrams of the model's
        own answers that are new to their answer (``new``).
    """
    collate = Collate(pad_of(tokenizer))
    found = asdict(noise_accuracy(model, samples, collate, length=length, progress=progress))
    decoding = model if dtype is None else copy.deepcopy(model).to(dtype)
    found |= replayed(decoding, samples, progress)
    prompts = [prompt_ids(tokenizer, question_of(asked)) for asked in questions[:TEXTS]]
    said: list[list[int]] = []
    for at in progress_bar(
        range(0, len(prompts), AT_ONCE),
        desc="own answers",
        unit="batch",
        leave=False,
        disable=not progress,
    ):
        batch = prompts[at : at + AT_ONCE]
        said += answer(decoding, tokenizer, batch, min(SAID, max_new_tokens))
    return found | {"new": new_trigrams(said)}


def replayed(model, samples: list[dict], progress: bool = True) -> dict[str, Any]:
    """Return the passes of every text, and accept lengths, by draft (``passes``, ``MAT``): of the
    first 64 tokens of the first 16 answers.
    """
    texts = texts_of(samples[:TEXTS], TOKENS)
    taken = passes(model, texts, DRAFTS, progress)
    mats = {name: mean_accept_length(texts, each) for name, each in taken.items()}
    return {"passes": taken, "MAT": mats}


def damage(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what says that a training damaged the model, a sentence each, by its figures before
    and after.
    """
    found = []
    if not after["loss"] <= (1 + LOSS) * before["loss"]:  # NaN is no good loss
        found.append(
            f"next-token loss rose from {before['loss']:.4f} to {after['loss']:.4f}"
            f" (more than {LOSS:.0%})"
        )
    if after["accuracy"] < before["accuracy"] - ACCURACY:
        found.append(
            f"the next token is right {after['accuracy']:.1%} of the time, before"
            f" {before['accuracy']:.1%} (more than {100 * ACCURACY:.0f} points less)"
        )
    if after["new"] < (1 - NEW) * before["new"]:
        found.append(
            f"of its own answers' trigrams {after['new']:.0%} are new, before {before['new']:.0%}"
            f" (more than {NEW:.0%} fewer): it repeats itself"
        )
    return found


def verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return in a line whether a training paid: whether the default drafting takes fewer passes for
    the same texts, beyond the chance of which texts they are.
    """
    ratio, low, high = gain(before["passes"][DEFAULT], after["passes"][DEFAULT])
    return (
        f"{'paid' if low > 1 else 'did not pay'}: {before['MAT'][DEFAULT]:.2f} to"
        f" {after['MAT'][DEFAULT]:.2f} tokens a pass ({DEFAULT}) on the same texts, × {ratio:.2f}"
        f" [{low:.2f}–{high:.2f}]"
    )


def gain(before: list[int], after: list[int]) -> tuple[float, float, float]:
    """Return how many times the passes after were needed before; and 2.5 and 97.5 % of that over
    1000 resamples of the texts.
    """
    pairs, rng = list(zip(before, after)), random.Random(0)

    def of(part: list[tuple[int, int]]) -> float:
        return sum(b for b, _ in part) / sum(a for _, a in part)

    resampled = sorted(of(rng.choices(pairs, k=len(pairs))) for _ in range(1000))
    return of(pairs), resampled[25], resampled[974]
