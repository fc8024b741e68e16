"""Draft trees of a fixed shape: every node's parent, and the guess that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import MAX_NODES, RETRIEVAL

# The tree of Medusa's `mc_sim_7b_63`, which the paper decodes with (appendix B): a path is the
# rank of each node from the root down.
MC_SIM_7B_63 = tuple(
    tuple(int(rank) for rank in path)
    for path in (
        "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 "
        "100 020 12 003 40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 "
        "200 31 22 80 050 15 101 021 90 060 0001 16 070"
    ).split()
)
PAPER_RETRIEVAL_LENGTH = 5


class TreeTensors(NamedTuple):
    """On a device: ``parents``, ``rank``, ``depth`` int32 [N], ``ancestors`` int64 [N, W]."""

    parents: Tensor
    rank: Tensor
    depth: Tensor
    ancestors: Tensor


@dataclass(frozen=True)
class DraftTree:
    """The shape of a draft: every node's parent, and which guess at its depth it takes.

    Args:
        parents: one entry a node; node 0 is the root (-1), any other has ``0 <= parents[i] < i``.
            At most 256 nodes.
        ranks: one entry a node; k >= 0: the k-th likeliest token at the node's depth;
            ``RETRIEVAL`` (-1): the retrieved text at this depth. The root's is ignored. None:
            a node's place among its siblings.

    Raises:
        ValueError: not a tree, too many nodes, or ranks that do not fit.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...] = None  # type: ignore[assignment]  # __post_init__ fills it in

    def __post_init__(self):
        parents = tuple(int(p) for p in self.parents)
        if not 1 <= len(parents) <= MAX_NODES:
            raise ValueError(f"parents has {len(parents)} nodes; expected 1 to {MAX_NODES}")
        for node, parent in enumerate(parents):
            if (parent != -1) if node == 0 else not 0 <= parent < node:
                expected = "-1 (the root)" if node == 0 else f"a node in [0, {node - 1}]"
                raise ValueError(f"parents[{node}] is {parent}; expected {expected}")
        if self.ranks is None:
            ranks = tuple(
                parents[:node].count(parent) if node else 0 for node, parent in enumerate(parents)
            )
        else:
            ranks = tuple(int(r) for r in self.ranks)
        if len(ranks) != len(parents):
            raise ValueError(f"ranks has {len(ranks)} entries; expected {len(parents)}, one a node")
        if min(ranks) < RETRIEVAL:
            raise ValueError(f"ranks has {min(ranks)}; expected {RETRIEVAL} (retrieval) or more")
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "ranks", ranks)

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> DraftTree:
        """Make a tree from paths of ranks, as Medusa writes them: ``[[0], [1], [0, 0]]``.

        Every prefix of a path must be a path too; the order of the paths is free.
        """
        index: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [-1], [0]
        for path in sorted(dict.fromkeys(tuple(p) for p in paths), key=len):
            if path[:-1] not in index or not path:
                raise ValueError(
                    f"paths has {list(path)} but not {list(path[:-1])}"
                    if path
                    else "paths has an empty path"
                )
            index[path] = len(parents)
            parents.append(index[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks))

    @classmethod
    def chain(cls, nodes: int, rank: int = 0) -> DraftTree:
        """Make one path of ``nodes`` nodes, root included, of one rank; of 1, it drafts nothing."""
        return cls(tuple(range(-1, nodes - 1)), (0,) + (rank,) * (nodes - 1))

    @classmethod
    def paper(cls) -> DraftTree:
        """Make the paper's tree (appendix B): ``mc_sim_7b_63``, 63 nodes, 5 retrieved, the root."""
        retrieved = [(RETRIEVAL,) * length for length in range(1, PAPER_RETRIEVAL_LENGTH + 1)]
        return cls.from_paths([*MC_SIM_7B_63, *retrieved])

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return tuple(depths)

    @property
    def max_depth(self) -> int:
        return max(self.depths)

    @property
    def top_k(self) -> int:
        """Guesses per depth that the tree uses; 0 if it only retrieves."""
        return max((rank + 1 for rank in self.ranks[1:]), default=0)

    @property
    def retrieval_length(self) -> int:
        """Retrieved tokens that the tree uses."""
        return max((d for d, rank in zip(self.depths, self.ranks) if rank == RETRIEVAL), default=0)

    @lru_cache(maxsize=64)  # noqa: B019  # trees are small, frozen and few
    def tensors(self, device: torch.device) -> TreeTensors:
        """Return the tree's tensors on ``device``, made once."""
        parents = torch.tensor(self.parents, dtype=torch.int32, device="cpu")
        ancestors, depth = ops.tree_ancestors(parents)
        rank = torch.tensor(self.ranks, dtype=torch.int32, device="cpu")
        return TreeTensors(*(x.to(device) for x in (parents, rank, depth, ancestors)))


def follow_likeliest(chain: Tensor, tokens: Tensor, parents: Tensor) -> None:
    """Write the likeliest path of trees into guesses, as far as it goes; on the device, which
    nothing waits for.

    Args:
        chain: int64 [B, n], changed in place.
        tokens, parents: int64 and int32 [B, N], as :func:`msn_ext.ops.draft_tree` gives them:
            of the children of a node the likeliest comes first.
    """
    node = torch.zeros_like(parents[:, :1])
    for depth in range(chain.shape[1]):
        children = parents == node
        has, node = children.any(1, keepdim=True), children.int().argmax(1, keepdim=True).int()
        guess = tokens.gather(1, node.long())
        chain[:, depth : depth + 1] = torch.where(has, guess, chain[:, depth : depth + 1])
        node = torch.where(has, node, -2)  # the parent of none
