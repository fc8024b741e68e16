"""What is drawn from: of a row of logits the few that top-k keeps, where nothing after it needs the
others.

Top-p sorts what it gets, and to sort a vocabulary takes as long as a small model's pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from msn_ext import _C

from .processors import Texts, at_once, processed, processed_at_once

INDIFFERENT = frozenset(
    {
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
        TypicalLogitsWarper,
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        LogitNormalization,
    }
)
"""Processors that do with some logits what they do with these among others of -infinity."""

MOST = 1024
"""The largest k for which a row's largest logits are picked out."""


def candidates(
    logits: Tensor, processors: LogitsProcessorList, texts: Texts, may_wait: bool
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | None]]:
    """Yield places of nodes and their processed logits, as :func:`.processors.processed` does, and
    the tokens that these are of, int64 [R, K], ascending; None: of all, as ever where the host may
    not wait for the device to say how many they are.
    """
    first = narrowing(processors) if may_wait else None
    if first is None:
        for places, scores in processed(logits, processors, texts):
            yield places, scores, None
        return
    before = LogitsProcessorList(processors[:first])
    rows = logits.flatten(0, 1)
    if (few := _few(rows, before, processors[first].top_k)) is not None:
        yield slice(0, len(rows)), _processed(few[0], [*before, *processors[first + 1 :]]), few[1]
        return
    for places, scores in processed_at_once(rows, before, texts):
        scores, tokens = largest(scores, processors[first].top_k)
        yield places, _processed(scores, processors[first + 1 :]), tokens


def _processed(scores: Tensor, processors: Iterable) -> Tensor:
    """Return scores [R, K] as processors that read no text leave them."""
    text = scores.new_zeros(len(scores), 1, dtype=torch.int64)
    for processor in processors:
        scores = processor(text, scores)
    return scores


def _few(logits: Tensor, before: LogitsProcessorList, k: int) -> tuple[Tensor, Tensor] | None:
    """Return the k largest of logits [R, V] and their tokens, as :func:`largest` does, where those
    are what top-k would keep after ``before``; None: elsewhere, or where that is not plain.
    """
    plain = logits.dtype == torch.float32 and logits.device.type == "cpu" and k <= MOST
    if not plain or k >= logits.shape[1] or not all(map(_keeps_order, before)):
        return None
    values = logits.new_empty(len(logits), k)
    tokens = torch.empty_like(values, dtype=torch.int64)
    return (values, tokens) if _C.top_logits(logits.detach(), values, tokens) else None


def _keeps_order(processor: LogitsProcessor) -> bool:
    return type(processor) is TemperatureLogitsWarper and 1e-4 <= processor.temperature <= 1e4


def narrowing(processors: LogitsProcessorList) -> int | None:
    """Return which processor keeps the candidates; None: there is none that may."""
    for at, processor in enumerate(processors):
        if type(processor) is TopKLogitsWarper:
            rest = all(type(later) in INDIFFERENT for later in processors[at + 1 :])
            return at if rest and processor.filter_value == -float("inf") else None
        if not at_once(processor):
            return None
    return None


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what ``TopKLogitsWarper`` keeps of scores [R, V], and of which tokens it is, int64,
    ascending: [R, K], k of them, or more where some equal the last one; then other rows have
    -infinity in the place of what they have not.
    """
    k = min(k, scores.shape[-1])
    values, tokens = scores.topk(min(k + 1, scores.shape[-1]))
    least, following = values[:, k - 1 : k], values[:, k:]
    tied = (following >= least) & ~least.isneginf()  # of -infinity it does not matter how many
    if bool(tied.any()):
        counts = (scores >= least).sum(-1).where(tied[:, 0], k)
        values, tokens = scores.topk(int(counts.max()))
        values = values.masked_fill(values < least, -float("inf"))
    else:
        values, tokens = values[:, :k], tokens[:, :k]
    tokens, order = tokens.sort(-1)
    return values.gather(-1, order), tokens
