"""Measure a model before and after training: losses, accuracy after noise, accept lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from msn_ext.decoding import BestFirst
from msn_ext.generation import generate
from msn_ext.terminal import progress_bar
from msn_ext.training.data import Collate, Conversation, prompt_ids
from msn_ext.training.evaluation import new_trigrams, noise_accuracy

from .samples import pad_of, question_of

DECODED = 16  # questions that accept lengths are measured on
DRAFTS: dict[str, Callable[[], Any]] = {
    "paper": lambda: "paper",
    "auto@64": lambda: BestFirst(64),
    "auto@8": lambda: BestFirst(8),
}


def figures(
    model,
    tokenizer,
    samples: list[dict],
    questions: list[Conversation],
    length: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Return the figures that are compared.

    Args:
        samples: held out, for losses and accuracy.
        questions: for accept lengths, of which the first 16 are asked.
        length: noise tokens of a segment.

    Returns:
        The fields of :class:`msn_ext.training.evaluation.NoiseAccuracy`; accept lengths by draft
        (``MAT``); and the share of the answers' trigrams that are new to their answer (``new``),
        since accept lengths are high, too, where a model repeats itself.
    """
    collate = Collate(pad_of(tokenizer))
    found = asdict(noise_accuracy(model, samples, collate, length=length, progress=progress))
    asked = questions[:DECODED]
    decoded = {
        name: mean_accept_length(model, tokenizer, asked, draft, progress=progress)
        for name, draft in DRAFTS.items()
    }
    return found | {
        "MAT": {name: mat for name, (mat, _) in decoded.items()},
        "new": min(new for _, new in decoded.values()),
    }


def mean_accept_length(
    model,
    tokenizer,
    questions: list[Conversation],
    draft: Callable[[], Any],
    max_new_tokens: int = 64,
    progress: bool = True,
) -> tuple[float, float]:
    """Return the tokens per forward pass of greedy decoding (MAT), the prompt's pass included, and
    the share of the answers' trigrams that are new to their answer.

    Args:
        draft: makes a ``draft=`` for every question.
    """
    tokens = passes = 0
    answers = []
    for question in progress_bar(
        questions, desc="accept length", unit="prompt", leave=False, disable=not progress
    ):
        ids = torch.tensor([prompt_ids(tokenizer, question_of(question))], device=model.device)
        out = generate(
            model,
            ids,
            draft=draft(),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
        )
        answers.append(out.sequences[0, ids.shape[1] :].tolist())
        tokens, passes = tokens + len(answers[-1]), passes + len(out.accept_lengths[0])
    return tokens / passes, new_trigrams(answers)
