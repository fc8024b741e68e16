"""The form of a batch with noise: in place (arXiv 2406.17404, section 3.1), or as branches beside
the clean text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msn_ext.families import TESTED

NO_LABEL = -100
# What attention kernels without a mask take; branches have a mask instead.
PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
ANNOTATIONS = ("noise_depth", "noise_before", "noise_sample")
"""Entries of an annotated batch, int64 [B, T']:

noise_depth: i at the i-th noise token of a segment, 0 at clean tokens.
noise_before: at noise tokens the column of the token before, -1 at clean tokens.
noise_sample: with branches only, whose mask is made of these: the number of a token's sample in its
    row, from 1 on, 0 at padding.
"""
MASKED = torch.finfo(torch.float32).min


def sample_bounds(batch: dict) -> Tensor:
    """Return the samples of a collated batch, int64 [S, 3]: row, begin and end of each, in order.

    A row is one sample, without the padding that ``attention_mask`` [B, T] shows, unless it is
    packed: then a sample begins wherever ``position_ids`` [B, T] do not go on by one, or as
    ``cu_seq_lens_q`` says.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    positions, bounds = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    live = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        _check_shape("attention_mask", mask, ids)
        live = mask.bool()
    first = live.clone()
    first[:, 1:] &= ~live[:, :-1]
    if positions is not None:
        _check_shape("position_ids", positions, ids)
        first[:, 1:] |= live[:, 1:] & (positions[:, 1:] != positions[:, :-1] + 1)
    elif bounds is not None:
        first.view(-1)[bounds[:-1].long()] = True
        first &= live
    last = live.clone()
    last[:, :-1] &= ~live[:, 1:] | first[:, 1:]
    begins, ends = first.nonzero(), last.nonzero()
    return torch.cat([begins, ends[:, 1:] + 1], dim=1)


def _check_shape(name: str, x: Tensor, ids: Tensor) -> None:
    if x.shape != ids.shape:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; expected that of input_ids, {list(ids.shape)}"
        )


class _NoiseTokens(NamedTuple):
    """All noise tokens of a batch; every field int64 [n].

    Attributes:
        sample, segment: indices of the token's sample in the batch and of its segment there.
        depth: place in the segment, 0 for the first token.
        row, column: place in the clean batch.
        token: the noise.
    """

    sample: Tensor
    segment: Tensor
    depth: Tensor
    row: Tensor
    column: Tensor
    token: Tensor


def _noise_tokens(samples: Tensor, starts: Tensor, noise: Tensor) -> _NoiseTokens:
    sample, segment, depth = (noise >= 0).nonzero(as_tuple=True)
    return _NoiseTokens(
        sample=sample,
        segment=segment,
        depth=depth,
        row=samples[sample, 0],
        column=starts[sample, segment] + depth,
        token=noise[sample, segment, depth],
    )


def replace(batch: dict, samples: Tensor, starts: Tensor, noise: Tensor) -> dict:
    """Return the annotated batch with noise in place of tokens; labels stay (Eq. 3 and 4).

    Args:
        batch: collated, not changed.
        samples: int64 [S, 3], of :func:`sample_bounds`.
        starts, noise: int64 [S, N] and [S, N, L], of ``draw_noise``.
    """
    ids = batch["input_ids"].clone()
    depth, before = torch.zeros_like(ids), torch.full_like(ids, -1)
    tokens = _noise_tokens(samples, starts, noise)
    at = tokens.row, tokens.column
    ids[at], depth[at], before[at] = tokens.token, tokens.depth + 1, tokens.column - 1
    return batch | {"input_ids": ids, "noise_depth": depth, "noise_before": before}


def branch(batch: dict, samples: Tensor, starts: Tensor, noise: Tensor) -> dict:
    """Return the annotated batch with the clean text and, after it, every segment as a branch.

    A branch shall only see the text before its start and itself (:func:`branch_mask`). Each of its
    tokens has the position of the token that it replaces, and as label the clean token after that
    one. A label stands one column after the token that shall predict it, as models shift them; so
    one column of padding ends the row. ``attention_mask`` [B, T'] tells tokens from padding.

    Args:
        batch: collated, not changed.
        samples: int64 [S, 3], of :func:`sample_bounds`.
        starts, noise: int64 [S, N] and [S, N, L], of ``draw_noise``.

    Raises:
        ValueError: the batch has entries per token that are not known, or padding inside a row.
    """
    _check_branches_fit(batch, samples)
    ids, labels = batch["input_ids"], batch["labels"]
    width = ids.shape[1]
    tokens = _noise_tokens(samples, starts, noise)
    row = tokens.row
    at = width + _branch_columns(samples, starts, tokens, noise.shape[2])
    total = int(at.max()) + 2 if len(at) else width + 1

    def widened(x: Tensor, value: int) -> Tensor:
        return torch.cat([x, x.new_full((len(x), total - width), value)], dim=1)

    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(width, device=ids.device).expand_as(ids)
    new_ids, new_positions = widened(ids, 0), widened(positions, 0)
    new_ids[row, at] = tokens.token
    new_positions[row, at] = positions[row, tokens.column]

    new_labels, next_column = widened(labels, NO_LABEL), tokens.column + 1
    targets = labels[row, next_column.clamp(max=width - 1)]
    inside = next_column < samples[tokens.sample, 2]
    new_labels[row, at + 1] = torch.where(inside, targets, NO_LABEL)

    depth, before = torch.zeros_like(new_ids), torch.full_like(new_ids, -1)
    depth[row, at] = tokens.depth + 1
    before[row, at] = torch.where(tokens.depth == 0, tokens.column, at) - 1

    sample = torch.zeros_like(new_ids)
    number = _count_within(samples[:, 0]) + 1
    for (r, begin, end), n in zip(samples.tolist(), number.tolist()):
        sample[r, begin:end] = n
    sample[row, at] = number[tokens.sample]

    kept = {name: value for name, value in batch.items() if name not in PACKING}
    return kept | {
        "input_ids": new_ids,
        "labels": new_labels,
        "position_ids": new_positions,
        "attention_mask": (sample > 0).long(),
        "noise_depth": depth,
        "noise_before": before,
        "noise_sample": sample,
    }


def _check_branches_fit(batch: dict, samples: Tensor) -> None:
    ids = batch["input_ids"]
    known = PACKING | {"input_ids", "labels", "attention_mask", "position_ids"}
    if others := [
        name
        for name, x in batch.items()
        if name not in known and getattr(x, "shape", None) == ids.shape
    ]:
        raise ValueError(
            f"layout='branch' does not know what {', '.join(others)} {list(ids.shape)} would be at"
            " the branches; leave it out of the batch"
        )
    same_row = samples[1:, 0] == samples[:-1, 0]
    if (gaps := same_row & (samples[1:, 1] > samples[:-1, 2])).any():
        row = int(samples[1:][gaps][0, 0])
        raise ValueError(
            f"attention_mask has a gap in row {row}; layout='branch' expects padding at the ends of"
            " a row only"
        )


def _branch_columns(samples: Tensor, starts: Tensor, tokens: _NoiseTokens, length: int) -> Tensor:
    """Return where noise tokens stand after the text, int64 [n]: segment by segment of their row,
    ``length`` columns each.
    """
    used = starts >= 0
    place = torch.zeros_like(starts)  # of a segment among those of its row
    place[used] = _count_within(samples[used.nonzero(as_tuple=True)[0], 0])
    return place[tokens.sample, tokens.segment] * length + tokens.depth


def branch_mask(
    depth: Tensor, before: Tensor, sample: Tensor, positions: Tensor, config, length: int
) -> Tensor | dict[str, Tensor]:
    """Return who sees what in a batch of :func:`branch`: text the text before it, as usual; a
    branch the text before its start, and itself so far.

    Args:
        depth, before, sample: :data:`ANNOTATIONS`, int64 [B, T'].
        positions: int64 [B, T'].
        config: of the model's text.
        length: of the longest branch, or more; a GPU is not asked for it.

    Returns:
        As the model's attention takes it: bool, or for "eager" float32 to be added, [B, 1, T', T'];
        for a model with windows, which count positions, a dict of them by kind of layer.
    """
    width = depth.shape[1]
    column, live = torch.arange(width, device=depth.device).expand_as(depth), sample > 0
    # Of the text a token sees the columns from its sample's first one to the last before its
    # branch, or to itself.
    anchor = torch.where(
        depth > 0, before.gather(1, (column - depth + 1).clamp(max=width - 1)), column
    )
    opens = torch.ones_like(live)
    opens[:, 1:] = sample[:, 1:] != sample[:, :-1]
    begin = torch.where(opens, column, 0).cummax(1).values.gather(1, anchor.clamp(min=0))
    begin, end = torch.where(live, begin, 0), torch.where(live, anchor + 1, 0)
    # Copying rows of a table of all columns below 0, 1, … is fast.
    below = column[:1] < torch.arange(width + 1, device=depth.device)[:, None]
    sees = below[end]
    if sees.is_cuda or bool(begin.any()):
        sees &= ~below[begin]
    # Of its branch a token sees those so far, and in any case itself, so that no row is empty.
    for back in range(max(1, length)):
        sees.scatter_(2, torch.where(depth > back, column - back, column)[..., None], True)
    return _masks(sees[:, None], positions, config)


def unmark(batch: dict, config, length: int) -> tuple[Tensor, Tensor]:
    """Take :data:`ANNOTATIONS` out of a batch and put in the mask of branches where there are any,
    in place, so that a model can take it.

    Returns:
        ``noise_depth`` and ``noise_before``, int64 [B, T'].
    """
    depth, before, sample = (batch.pop(name, None) for name in ANNOTATIONS)
    if sample is not None:
        batch["attention_mask"] = branch_mask(
            depth, before, sample, batch["position_ids"], config, length
        )
    return depth, before


def check_branches(config) -> None:
    """Raise ValueError where a model, by its text's config, cannot take the mask of branches."""
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"layout='branch' needs a mask that attn_implementation={attention!r} does not take;"
            " load the model with attn_implementation='sdpa'"
        )
    if config.model_type not in TESTED:
        raise ValueError(
            "layout='branch' needs a model that follows a dense mask and position_ids, which is"
            f" not known of {config.model_type}; expected one of {', '.join(sorted(TESTED))}, or"
            " layout='replace'"
        )


def _masks(sees: Tensor, positions: Tensor, config) -> Tensor | dict[str, Tensor]:
    """Turn bool [B, 1, T', T'] into what the model's attention takes; windows count positions."""

    def form(mask: Tensor) -> Tensor:
        if config._attn_implementation == "eager":
            return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, MASKED)
        return mask

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds == {"full_attention"} or not (kinds or window):
        return form(sees)
    assert window is not None, "layers with windows and no sliding_window"
    near = sees & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    near |= torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)
    if not kinds:
        return form(near)
    return {kind: form(near if kind == "sliding_attention" else sees) for kind in sorted(kinds)}


def shorten(batch: dict, length: int) -> dict:
    """Return an annotated batch of branches whose labels are :func:`labels_of_noise`, with the
    first ``length`` tokens of every branch alone.
    """
    depth = batch["noise_depth"]
    if int(depth.max()) <= length:
        return batch
    column = torch.arange(depth.shape[1], device=depth.device).expand_as(depth)
    first = torch.where(depth > 0, column, depth.shape[1]).amin()  # the first column of noise
    kept = (column < first) | ((depth > 0) & (depth <= length))
    # What is kept moves to the front, and one column of padding still ends the row.
    order = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max()) + 1]
    live = kept.gather(1, order)
    short = {
        name: torch.where(live, x.gather(1, order), -1 if name == "noise_before" else 0)
        if getattr(x, "shape", None) == depth.shape
        else x
        for name, x in batch.items()
    }
    depth = short["noise_depth"]
    # Within its branch a token stands right behind the one before.
    column = column[:, : depth.shape[1]]
    short["noise_before"] = torch.where(depth > 1, column - 1, short["noise_before"])
    return short | {"labels": labels_of_noise(depth)}


def labels_of_noise(depth: Tensor) -> Tensor:
    """Return labels that say nothing but how many noise tokens a batch has, which a trainer counts
    them by: int64 [B, T'], one column after each token.
    """
    labels = torch.full_like(depth, NO_LABEL)
    labels[:, 1:] = torch.where(depth[:, :-1] > 0, 0, NO_LABEL)
    return labels


def _count_within(groups: Tensor) -> Tensor:
    """Count, for every entry of an ascending tensor, the equal ones before it."""
    groups, at = groups.contiguous(), torch.arange(len(groups), device=groups.device)
    return at - torch.searchsorted(groups, groups)
