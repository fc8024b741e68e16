"""Find the places where noise is easiest to learn (arXiv 2406.17404, appendix A)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from msn_ext.terminal import progress_bar

from .collator import Starts, identity
from .layouts import NO_LABEL, sample_bounds


@torch.no_grad()
def lowest_loss_starts(
    model,
    dataset: Iterable,
    collator: Callable | None = None,
    *,
    length: int = 4,
    batch_size: int = 8,
    progress: bool = True,
) -> Starts:
    """Find where in every sample the model finds ``length`` tokens of a response likeliest, for
    ``location=`` of a collator.

    Likeliest is the lowest mean of their cross-entropies, given the clean text (appendix A); of
    equal ones the first counts. A response shorter than ``length`` counts as a whole.

    Args:
        model: a causal language model; it is evaluated, its mode is restored.
        dataset: samples as the trainer gives them to its collator.
        collator: that collator, not yet noisy; None: samples have ``input_ids`` and ``labels`` and
            are taken one by one.
        length: tokens of a segment, as the :class:`NoisyCollator`'s.

    Returns:
        A dict of starts by sample, for samples that have a response.

    Raises:
        ValueError: the samples have no labels.
    """
    if collator is None:
        batch_size, collator = 1, _alone
    training, starts, samples = model.training, Starts(), []
    model.eval()
    try:
        with progress_bar(
            dataset, unit="sample", desc="lowest loss", leave=False, disable=not progress
        ) as bar:
            for sample in bar:
                samples.append(sample)
                if len(samples) == batch_size:
                    _find(model, collator(samples), length, starts)
                    samples = []
        if samples:
            _find(model, collator(samples), length, starts)
    finally:
        model.train(training)
    return starts


def _alone(samples: list) -> dict:
    sample = samples[0]
    if missing := {"input_ids", "labels"} - set(sample):
        raise ValueError(
            f"dataset has samples without {' and '.join(sorted(missing))}; expected a collator that"
            " makes them"
        )
    return {name: torch.as_tensor(sample[name])[None] for name in ("input_ids", "labels")}


def _find(model, batch: dict, length: int, starts: Starts) -> None:
    """Add the starts of a collated batch's samples to ``starts``."""
    inputs = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=NO_LABEL,
        reduction="none",
    )
    # The loss of each token, in the token's own column.
    loss = torch.cat([loss.new_zeros(len(labels), 1), loss.view(len(labels), -1)], dim=1)
    for row, begin, end in sample_bounds(inputs).tolist():
        response = (labels[row, begin:end] != NO_LABEL).tolist()
        best = _lowest(loss[row, begin:end].tolist(), response, length)
        if best is not None:
            starts[identity(inputs["input_ids"][row, begin:end])] = best


def _lowest(loss: list[float], response: list[bool], length: int) -> int | None:
    """Return the start of the segment with the lowest mean loss, of those that ``draw_noise`` could
    place: whole ones, or all of a shorter response.
    """
    response = [False, *response[1:]]  # the first token has nothing before it
    best: tuple[float, int] | None = None
    for at in range(len(loss)):
        size = 0
        while size < length and at + size < len(loss) and response[at + size]:
            size += 1
        if size == length or (size and not response[at - 1]):
            value = (sum(loss[at : at + size]) / size, at)
            best = min(best or value, value)
    return None if best is None else best[1]
