"""What a batch with noise looks like: in place (arXiv 2406.17404, section 3.1), or as branches
beside the clean text.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_LABEL = -100
PACKING = {
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
}  # of kernels without a mask
ANNOTATIONS = ("noise_depth", "noise_before", "noise_document")
"""Of a batch, int64 [B, T']: i at the i-th noise token of a segment and 0 at clean ones; the column
of the token that the noise token comes behind, -1 at clean ones; and with branches, whose mask is
made of these, which sample of its row a token belongs to, from 1 on, 0 at padding.
"""
# Families whose clean part is compared with the text alone in
# python_tests/training/test_collator.py.
TESTED = frozenset(
    (
        "llama qwen2 qwen3 mistral phi3 gemma2 gemma3_text gpt2 gpt_neox opt starcoder2 "
        "deepseek_v2 deepseek_v3 mixtral qwen3_moe gptj codegen"
    ).split()
)
MASKED = torch.finfo(torch.float32).min


def documents_of(batch: dict) -> Tensor:
    """The samples of a collated batch, int64 [D, 3]: row, begin and end of each, in order.

    A row is one sample, without the padding that ``attention_mask`` [B, T] shows, unless it is
    packed: then a sample begins wherever ``position_ids`` [B, T] do not go on by one, or as
    ``cu_seq_lens_q`` says.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    positions, bounds = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    live = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}; expected that of input_ids,"
                f" {list(ids.shape)}"
            )
        live = mask.bool()
    first = live.clone()
    first[:, 1:] &= ~live[:, :-1]
    if positions is not None:
        if positions.shape != ids.shape:
            raise ValueError(
                f"position_ids has shape {list(positions.shape)}; expected that of input_ids,"
                f" {list(ids.shape)}"
            )
        first[:, 1:] |= live[:, 1:] & (positions[:, 1:] != positions[:, :-1] + 1)
    elif bounds is not None:
        first.view(-1)[bounds[:-1].long()] = True
        first &= live
    last = live.clone()
    last[:, :-1] &= ~live[:, 1:] | first[:, 1:]
    begins, ends = first.nonzero(), last.nonzero()
    return torch.cat([begins, ends[:, 1:] + 1], dim=1)


def replace(batch: dict, documents: Tensor, starts: Tensor, noise: Tensor) -> dict:
    """Noise in place of the tokens; the labels stay (Eq. 3 and 4)."""
    ids = batch["input_ids"].clone()
    depth, before = torch.zeros_like(ids), torch.full_like(ids, -1)
    rows, columns, tokens, depths = _placed(documents, starts, noise)
    ids[rows, columns] = tokens
    depth[rows, columns], before[rows, columns] = depths + 1, columns - 1
    return batch | {"input_ids": ids, "noise_depth": depth, "noise_before": before}


def branch(batch: dict, documents: Tensor, starts: Tensor, noise: Tensor) -> dict:
    """The clean text, and behind it every segment as a branch that shall only see the text before
    its start and itself (:func:`branch_mask`); ``attention_mask`` [B, T'] says what is no padding.

    Of a branch each token stands at the position of the token that it replaces, and its label is
    the clean token behind that one. A label stands one place behind the token that shall predict
    it, as models shift them; so one column of padding ends the row.
    """
    ids, labels = batch["input_ids"], batch["labels"]
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
    same = documents[1:, 0] == documents[:-1, 0]
    if (gaps := same & (documents[1:, 1] > documents[:-1, 2])).any():
        row = int(documents[1:][gaps][0, 0])
        raise ValueError(
            f"attention_mask has a gap in row {row}; layout='branch' expects padding at the ends of"
            " a row only"
        )
    (batch_size, width), length = ids.shape, noise.shape[2]
    rows, columns, tokens, depths = _placed(documents, starts, noise)
    document, segment, _ = (noise >= 0).nonzero(as_tuple=True)
    # Segments of a row stand behind the text one after the other.
    used = starts >= 0
    place = torch.zeros_like(starts)
    place[used] = _count_within(documents[:, 0][used.nonzero(as_tuple=True)[0]])
    at = width + place[document, segment] * length + depths
    total = int(at.max()) + 2 if len(at) else width + 1

    def widened(x: Tensor, value: int) -> Tensor:
        return torch.cat([x, x.new_full((batch_size, total - width), value)], dim=1)

    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(width, device=ids.device).expand(batch_size, width)
    new_ids, new_labels, new_positions = (
        widened(ids, 0),
        widened(labels, NO_LABEL),
        widened(positions, 0),
    )
    new_ids[rows, at] = tokens
    new_positions[rows, at] = positions[rows, columns]
    ends = documents[document, 2]
    target = labels[rows, (columns + 1).clamp(max=width - 1)]
    new_labels[rows, at + 1] = torch.where(columns + 1 < ends, target, NO_LABEL)
    depth, before = torch.zeros_like(new_ids), torch.full_like(new_ids, -1)
    depth[rows, at], before[rows, at] = depths + 1, torch.where(depths == 0, columns, at) - 1

    sample = torch.zeros_like(new_ids)
    number = _count_within(documents[:, 0]) + 1
    for (row, begin, end), n in zip(documents.tolist(), number.tolist()):
        sample[row, begin:end] = n
    sample[rows, at] = number[document]
    kept = {name: value for name, value in batch.items() if name not in PACKING}
    changed = {
        "input_ids": new_ids,
        "labels": new_labels,
        "position_ids": new_positions,
        "attention_mask": (sample > 0).long(),
    }
    return kept | changed | {"noise_depth": depth, "noise_before": before, "noise_document": sample}


def branch_mask(
    depth: Tensor, before: Tensor, document: Tensor, positions: Tensor, config, length: int
) -> Tensor | dict[str, Tensor]:
    """Who sees what in a batch of :func:`branch`: the text as usual; a branch the text before its
    start, and itself so far.

    Args:
        depth, before, document: :data:`ANNOTATIONS`, int64 [B, T'].
        positions: int64 [B, T'].
        length: of the longest branch, or more; a GPU is not asked for it.

    Returns:
        As the model's attention takes it: bool, or for "eager" float32 to be added, [B, 1, T', T'];
        for a model with windows, which count positions, a dict of them by kind of layer.
    """
    width = depth.shape[1]
    column, live = torch.arange(width, device=depth.device).expand_as(depth), document > 0
    # Of the text a token sees the columns from its sample's first one to the last before its
    # branch, or to itself.
    anchor = torch.where(
        depth > 0, before.gather(1, (column - depth + 1).clamp(max=width - 1)), column
    )
    opens = torch.ones_like(live)
    opens[:, 1:] = document[:, 1:] != document[:, :-1]
    begin = torch.where(opens, column, 0).cummax(1).values.gather(1, anchor.clamp(min=0))
    begin, end = torch.where(live, begin, 0), torch.where(live, anchor + 1, 0)
    below = (
        column[:1] < torch.arange(width + 1, device=depth.device)[:, None]
    )  # rows of it are copied, which is fast
    sees = below[end]
    if sees.is_cuda or bool(begin.any()):
        sees &= ~below[begin]
    # Of its branch those so far; itself anyway, so that no row is empty.
    for back in range(max(1, length)):
        sees.scatter_(2, torch.where(depth > back, column - back, column)[..., None], True)
    return _masks(sees[:, None], positions, config)


def unmark(batch: dict, config, length: int) -> tuple[Tensor, Tensor]:
    """Make a batch with :data:`ANNOTATIONS` one that a model takes, in place, with the mask of
    branches where there are any; gives what said how deep in noise its tokens are, and behind which
    column.
    """
    depth, before, document = (batch.pop(name, None) for name in ANNOTATIONS)
    if document is not None:
        batch["attention_mask"] = branch_mask(
            depth, before, document, batch["position_ids"], config, length
        )
    return depth, before


def check_branches(config) -> None:
    """Raise ValueError where a model cannot take the branch layout's mask."""
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
    """As the model's attention takes them; windows count positions."""

    def form(mask: Tensor) -> Tensor:
        if config._attn_implementation == "eager":
            return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, MASKED)
        return mask

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds == {"full_attention"} or not (kinds or window):
        return form(sees)
    near = sees & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    near |= torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)
    if not kinds:
        return form(near)
    return {kind: form(near if kind == "sliding_attention" else sees) for kind in sorted(kinds)}


def _placed(
    documents: Tensor, starts: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column, token and depth (0 for the first of a segment) of every noise token."""
    document, segment, depth = (noise >= 0).nonzero(as_tuple=True)
    return (
        documents[document, 0],
        starts[document, segment] + depth,
        noise[document, segment, depth],
        depth,
    )


def _count_within(groups: Tensor) -> Tensor:
    """For every entry of an ascending tensor, how many equal ones stand before it."""
    groups, at = groups.contiguous(), torch.arange(len(groups), device=groups.device)
    return at - torch.searchsorted(groups, groups)
