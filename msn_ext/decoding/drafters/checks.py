"""What a drafter of somebody else's proposes, checked: shapes here, on the host, and values on the
device, where nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import MAX_NODES

from .protocol import Draft, Drafter, ObservedDrafter
from .tails import chained_parents, laid_out

TOKENS, TREE = 2, 4
"""What is wrong with the values of a proposal, added up; 1 is left for the model."""

PACKAGE = __name__.partition(".")[0]


def is_others(drafter: Drafter) -> bool:
    """Return whether a class that is none of this package's has a say in the proposals."""
    while isinstance(drafter, ObservedDrafter) and _is_ours(drafter):
        drafter = drafter.drafter
    return not _is_ours(drafter)


def _is_ours(drafter: Drafter) -> bool:
    return type(drafter).__module__.partition(".")[0] == PACKAGE


def checked_chain(
    guesses: Any, drafter: Drafter, history: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Return what ``drafter.first`` gave, and on the device int64 [], what is wrong with it; tokens
    that are none are others then.

    Args:
        guesses: what it gave, of any type.
        history: int64 [B, C], of the texts that it was given.

    Raises:
        ValueError: it is no int64 [B, n] beside the text; says what it is.
    """
    source = f"{type(drafter).__name__}.first"
    rows = len(history)
    n = guesses.shape[1] if isinstance(guesses, Tensor) and guesses.dim() == 2 else 0
    _expect(source, "gave", guesses, torch.int64, (rows, min(n, MAX_NODES - 1)), history, "n")
    inside = guesses.clamp(0, vocabulary - 1)
    return inside, TOKENS * (inside != guesses).any()


def checked_draft(
    draft: Any, drafter: Drafter, history: Tensor, vocabulary: int
) -> tuple[Draft, Tensor]:
    """The same of what ``drafter.propose`` gave; ancestors and depths that are not its parents' are
    those.

    Raises:
        ValueError: it is no :class:`Draft`, or one of tensors that do not fit together or are not
            beside the text; on the CPU also malformed parents.
    """
    source = f"{type(drafter).__name__}.propose"
    if not isinstance(draft, Draft):
        raise ValueError(f"{source} gave {_named(draft)}; expected a Draft")
    rows, tokens, parents = len(history), draft.tokens, draft.parents
    nodes = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() == 2 else 0
    nodes = min(max(nodes, 1), MAX_NODES)
    _expect(source, "gave tokens", tokens, torch.int64, (rows, nodes), history, f"1 to {MAX_NODES}")
    each = (rows,) if isinstance(parents, Tensor) and parents.dim() == 2 else ()
    _expect(source, "gave parents", parents, torch.int32, (*each, nodes), history)
    words = -(-nodes // 64)
    _expect(source, "gave ancestors", draft.ancestors, torch.int64, (*each, nodes, words), history)
    _expect(source, "gave depth", draft.depth, torch.int32, (*each, nodes), history)
    if type(draft.tails) is not int or not 0 <= draft.tails < nodes:
        raise ValueError(
            f"{source} gave tails {draft.tails!r}; expected a number of nodes, 0 to {nodes - 1}"
        )
    if draft.tails:
        chained, of_text = chained_parents(parents, draft.ancestors, draft.tails), parents.clone()
        of_text[..., nodes - draft.tails :] = -1
        draft.parents, ancestors, depth = laid_out(chained, of_text)
    else:
        ancestors, depth = ops.tree_ancestors(parents, validate=False)
    other_tree = (ancestors != draft.ancestors).any() | (depth != draft.depth).any()
    other_tree |= (parents != draft.parents).any()
    inside = tokens.clamp(0, vocabulary - 1)
    inside[:, 0] = tokens[:, 0]  # whatever it holds
    wrong = TOKENS * (inside != tokens).any() + TREE * other_tree
    tokens.copy_(inside)  # in place, as the root is: it may propose the same draft again
    draft.ancestors, draft.depth = ancestors, depth
    return draft, wrong


def error_of(wrong: int, drafter: Drafter, vocabulary: int) -> ValueError:
    """Return the error that says what is wrong with the values of a proposal."""
    name = type(drafter).__name__
    if wrong & TOKENS:
        return ValueError(
            f"{name} proposed a token that is none of the vocabulary; expected 0 to"
            f" {vocabulary - 1}, at padding, too"
        )
    return ValueError(
        f"{name}.propose gave ancestors or depth that are not those of its parents; expected"
        " Draft.of(tokens, parents) or Draft.with_tails(...), which make them"
    )


def _named(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _expect(
    source: str, what: str, value: Any, dtype: torch.dtype, shape: tuple, beside: Tensor, last=None
) -> None:
    """Raise ValueError where a value is no tensor of this type and shape on the text's device;
    ``last`` says what may stand for the last number.
    """
    if isinstance(value, Tensor) and (value.dtype, tuple(value.shape), value.device) == (
        dtype,
        shape,
        beside.device,
    ):
        return
    sizes = ", ".join(map(str, (*shape[:-1], last or shape[-1])))
    raise ValueError(
        f"{source} {what} {_named(value)}; expected {dtype} [{sizes}] on {beside.device}"
    )
