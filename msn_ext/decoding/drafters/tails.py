"""Tails: chains of noise rows below the nodes of a draft, for a gated noise adapter. They say what
might come after a node, and are never accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import MAX_NODES

WORD = 64


def with_tails(parents: Tensor, ends: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Append chains of rows to a tree; nothing waits for the device.

    Args:
        parents: int32 [N] or [B, N].
        ends: int64 [B, K], the node above each chain; every other number: none.
        length: rows of a chain.

    Returns:
        ``parents`` int32 [B, N + K * length], -1 at the new rows, and the ancestors and depths that
        they have nevertheless.

    Raises:
        ValueError: these are too many nodes.
    """
    rows, chains = ends.shape
    nodes, more = parents.shape[-1], chains * length
    if nodes + more > MAX_NODES:
        raise ValueError(
            f"{nodes} nodes with {chains} tails of {length} rows are {nodes + more}; expected at"
            f" most {MAX_NODES}"
        )
    parents = parents.expand(rows, nodes)
    if not more:
        return laid_out(parents.contiguous(), parents)
    first = torch.where((ends >= 0) & (ends < nodes), ends, -1).int()[..., None]
    below = torch.arange(nodes, nodes + more, dtype=torch.int32, device=ends.device)
    below = (below - 1).view(chains, length)[:, 1:].expand(rows, chains, length - 1)
    chained = torch.cat([parents, torch.cat([first, below], 2).flatten(1)], 1)
    hidden = torch.cat([parents, parents.new_full((rows, more), -1)], 1)
    return laid_out(chained, hidden)


def laid_out(chained: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``hidden``, and ancestors and depths of ``chained``, which names the nodes above
    tails, too; int32 [N] or [B, N].
    """
    return hidden, *ops.tree_ancestors(chained, validate=False)


def chained_parents(parents: Tensor, ancestors: Tensor, tails: int) -> Tensor:
    """Return the parents of a draft whose last ``tails`` nodes are tails, those of the tails as
    their ancestors have it, and -1 where the ancestors have no node above; nothing waits for the
    device.

    Args:
        parents: int32 [N] or [B, N].
        ancestors: int64 [N, W] or [B, N, W].
    """
    if not tails:
        return parents
    nodes = parents.shape[-1]
    of_tails = ancestors[..., nodes - tails :, :, None]
    bits = of_tails >> torch.arange(WORD, device=ancestors.device) & 1
    places = torch.arange(ancestors.shape[-1] * WORD, device=ancestors.device)
    own = torch.arange(nodes - tails, nodes, device=ancestors.device)[:, None]
    above = (bits.flatten(-2) > 0) & (places < own)
    deepest = torch.where(above, places, -1).amax(-1).int()
    return torch.cat([parents[..., : nodes - tails], deepest], -1)
