"""Measure what noisy fine-tuning is to raise, and what it is not to lower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msn_ext.terminal import progress_bar

from .collator import NoisyCollator
from .layouts import NO_LABEL, unmark

SEGMENTS = 12
TOP = 10


@dataclass
class NoiseAccuracy:
    """Losses and accuracy of a model on clean text, and after noise.

    Attributes:
        loss: mean cross-entropy of the responses' tokens after clean text, natural logarithm.
        accuracy: share of these that were the likeliest.
        top1, top10: after 1, 2, … noise tokens, the share of right tokens among the likeliest 1
            and 10.
        tokens: labels after clean text.
    """

    loss: float
    accuracy: float
    top1: list[float]
    top10: list[float]
    tokens: int


@torch.no_grad()
def noise_accuracy(
    model,
    samples: list[dict],
    collate,
    *,
    length: int = 4,
    batch_size: int = 4,
    progress: bool = True,
) -> NoiseAccuracy:
    """Measure next-token loss on clean text and accuracy after noise, the same noise every time.

    Args:
        model: where it takes the branch layout, up to 12 segments of a sample are asked about in
            one pass; where not, one in place, in a pass of its own.
        samples: ``input_ids`` and ``labels``, held out from training.
        collate: makes a batch of them.
        length: noise tokens of a segment.
    """
    try:
        noisy = NoisyCollator(
            collate, length=length, segments=SEGMENTS, layout="branch", seed=0, config=model.config
        )
    except ValueError:
        noisy = NoisyCollator(collate, length=length, seed=0)
    noisy.annotate = True
    # After 0, 1, … noise tokens: labels, right ones, right among ten; and the loss after none.
    counts, loss = torch.zeros(length + 1, 3, dtype=torch.float64), 0.0
    training = model.training
    model.eval()
    try:
        starts = range(0, len(samples), batch_size)
        for at in progress_bar(
            starts, desc="evaluation", unit="batch", leave=False, disable=not progress
        ):
            for batch, depth in _passes(noisy, samples[at : at + batch_size], model.device):
                labels, depth = batch.pop("labels")[:, 1:], depth[:, :-1]
                live = (labels != NO_LABEL) & (depth >= 0)
                logits = model(**batch).logits[:, :-1][live].float()
                right, depth = labels[live], depth[live]
                counts += _counts(logits, right, depth, length)
                clean = depth == 0
                loss += float(
                    torch.nn.functional.cross_entropy(logits[clean], right[clean], reduction="sum")
                )
    finally:
        model.train(training)
    shares = (counts[:, 1:] / counts[:, :1]).tolist()
    tokens = int(counts[0, 0])
    return NoiseAccuracy(
        loss=loss / max(tokens, 1),
        accuracy=shares[0][0],
        top1=[top1 for top1, _ in shares[1:]],
        top10=[top10 for _, top10 in shares[1:]],
        tokens=tokens,
    )


def _passes(noisy: NoisyCollator, samples: list[dict], device) -> list[tuple[dict, Tensor]]:
    """Make batches for the model, each with the depth of its tokens in noise, int64 [B, T']: 0 at
    clean ones, -1 at those that do not count.
    """
    batch = {name: x.to(device) for name, x in noisy(samples).items()}
    depth, _ = unmark(batch, noisy.config, noisy.length)
    if noisy.layout == "branch":
        return [(batch, depth)]
    with noisy.paused():
        clean = {name: x.to(device) for name, x in noisy(samples).items()}
    return [(clean, torch.zeros_like(depth)), (batch, torch.where(depth > 0, depth, -1))]


def _counts(logits: Tensor, right: Tensor, depth: Tensor, length: int) -> Tensor:
    """Count per depth: labels, right ones, right ones among the likeliest ten."""
    best = logits.topk(min(TOP, logits.shape[-1]), -1).indices == right[:, None]
    found = torch.stack([torch.ones_like(best[:, 0]), best[:, 0], best.any(1)], 1).cpu().double()
    return torch.zeros(length + 1, 3, dtype=torch.float64).index_add(0, depth.cpu(), found)


def new_trigrams(answers: list[list[int]]) -> float:
    """Return the share of the trigrams of answers that are new to their answer, 0 to 1; low where a
    model repeats itself.
    """
    trigrams = [list(zip(answer, answer[1:], answer[2:])) for answer in answers]
    return sum(len(set(of)) for of in trigrams) / max(1, sum(map(len, trigrams)))
