"""Measure what noisy fine-tuning is to raise, and what it is not to lower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from msn_ext.gates import gated_noise
from msn_ext.terminal import progress_bar

from .collator import NoisyCollator
from .gate import AMONG, noise_pass
from .layouts import NO_LABEL, unmark

SEGMENTS = 12
TOP = 10


@dataclass
class NoiseAccuracy:
    """Losses and accuracy of a model on clean text, and after noise.

    Attributes:
        loss: mean cross-entropy of the responses' tokens after clean text, natural logarithm.
        accuracy: share of these that were the likeliest.
        top1, top8, top10: after 1, 2, … noise tokens, the share of right tokens among the likeliest
            1, 8 and 10.
        tokens: labels after clean text.
    """

    loss: float
    accuracy: float
    top1: list[float]
    top8: list[float]
    top10: list[float]
    tokens: int


@torch.no_grad()
def noise_accuracy(
    model,
    samples: list[dict],
    collate,
    *,
    length: int = 4,
    content: str | int = "ahead",
    batch_size: int = 4,
    progress: bool = True,
) -> NoiseAccuracy:
    """Measure next-token loss on clean text and accuracy after noise, the same noise every time.

    Args:
        model: where it takes the branch layout, up to 12 segments of a sample are asked about in
            one pass; where not, one in place, in a pass of its own. An active adapter that is gated
            (:mod:`msn_ext.gates`) has part in the noise alone.
        samples: ``input_ids`` and ``labels``, held out from training.
        collate: makes a batch of them.
        length, content: of the noise, as :class:`NoisyCollator` has them, all but "self".
    """
    noise = dict(length=length, content=content, seed=0, config=model.config)
    try:
        noisy = NoisyCollator(collate, segments=SEGMENTS, layout="branch", **noise)
    except ValueError:
        noisy = NoisyCollator(collate, **noise)
    noisy.annotate = True
    asked = _ask_gated if _is_gated(model) else _ask
    # After 0, 1, … noise tokens: labels, right ones, right among so many; and the loss after none.
    counts, loss = torch.zeros(length + 1, 4, dtype=torch.float64), 0.0
    training = model.training
    model.eval()
    try:
        starts = range(0, len(samples), batch_size)
        for at in progress_bar(
            starts, desc="evaluation", unit="batch", leave=False, disable=not progress
        ):
            for logits, right, depth in asked(model, noisy, samples[at : at + batch_size]):
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
        top1=[share for share, _, _ in shares[1:]],
        top8=[share for _, share, _ in shares[1:]],
        top10=[share for _, _, share in shares[1:]],
        tokens=tokens,
    )


Asked = tuple[Tensor, Tensor, Tensor]
"""Logits, float32 [n, V], before labels; the labels and how many noise tokens stand right before
them, int64 [n] each.
"""


def _ask(model, noisy: NoisyCollator, samples: list[dict]) -> Iterator[Asked]:
    """Ask a model about a batch, text and noise alike."""
    for batch, depth in _passes(noisy, samples, model.device):
        labels, depth = batch.pop("labels")[:, 1:], depth[:, :-1]
        live = (labels != NO_LABEL) & (depth >= 0)
        yield model(**batch).logits[:, :-1][live].float(), labels[live], depth[live]


def _is_gated(model) -> bool:
    names = getattr(model, "active_adapters", ()) if hasattr(model, "disable_adapter") else ()
    return any(gated_noise(model.peft_config[name]) for name in names)


def _ask_gated(model, noisy: NoisyCollator, samples: list[dict]) -> Iterator[Asked]:
    """Ask the base model about the text of a batch, and its adapter about the noise."""
    batch = {name: x.to(model.device) for name, x in noisy(samples).items()}
    labels, depth = batch["labels"][:, 1:], batch["noise_depth"][:, :-1]
    live = labels != NO_LABEL
    text = live & (depth == 0)
    found = noise_pass(model, model, batch, noisy.config, noisy.length, text=text.nonzero())
    yield found.text.float(), labels[text], depth[text]
    rows, columns = (depth > 0).nonzero(as_tuple=True)
    known = live[rows, columns]
    rows, columns = rows[known], columns[known]
    yield found.student[known].float(), labels[rows, columns], depth[rows, columns]


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
    """Count per depth: labels, right ones, right ones among the likeliest :data:`AMONG` and
    :data:`TOP`.
    """
    best = logits.topk(min(TOP, logits.shape[-1]), -1).indices == right[:, None]
    kinds = [torch.ones_like(best[:, 0]), best[:, 0], best[:, :AMONG].any(1), best.any(1)]
    found = torch.stack(kinds, 1).cpu().double()
    return torch.zeros(length + 1, 4, dtype=torch.float64).index_add(0, depth.cpu(), found)


def new_trigrams(answers: list[list[int]]) -> float:
    """Return the share of the trigrams of answers that are new to their answer, 0 to 1; low where a
    model repeats itself.
    """
    trigrams = [list(zip(answer, answer[1:], answer[2:])) for answer in answers]
    return sum(len(set(of)) for of in trigrams) / max(1, sum(map(len, trigrams)))
