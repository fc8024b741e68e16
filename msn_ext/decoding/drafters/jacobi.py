"""The paper's drafter: TR-Jacobi on a tree of a fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import ops

from .protocol import Draft, Drafter, Verified
from .tree import RETRIEVAL, DraftTree

MAX_NGRAM = 3
"""Longest suffix that retrieval looks up (arXiv 2406.17404, appendix B)."""


class TreeDrafter:
    """TR-Jacobi drafting (arXiv 2406.17404, section 3.3 and appendix B) on a tree of a fixed shape.

    The guesses for depth d are the top-k of the logits at the d-th rejected node below the accepted
    path (Jacobi iteration: a node that was wrong still predicts what comes after it), and the text
    that followed the most recent match of the longest suffix. Noise stands where there is no guess.

    Args:
        tree: which guesses to keep, and where.
        seed: of the noise.
    """

    _candidates: Tensor  # int64 [B, depths, k]; -1: none

    def __init__(self, tree: DraftTree, seed: int = 0):
        self._tree, self._seed_value = tree, seed
        self.max_depth = tree.max_depth
        rank = RETRIEVAL if RETRIEVAL in tree.ranks else 0
        self._chain = DraftTree.chain(tree.max_depth + 1, rank)

        self._laid_out_for: tuple[int, int, torch.device] | None = None
        self.report: Tensor | None = None
        self.allocations = 0

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        if self._laid_out_for == (batch, vocabulary, device):
            self._candidates.fill_(-1)
            return
        self._laid_out_for = batch, vocabulary, device
        self.allocations += 1
        self._batch, self._device = batch, device
        self._top_k = min(self._tree.top_k, vocabulary)
        self._seed = torch.tensor([self._seed_value], device=device)
        # Held here, since captured steps read them; the trees' own are dropped when others come.
        self._shapes = {tree: tree.tensors(device) for tree in (self._tree, self._chain)}
        self._candidates = self._none(self.max_depth, self._top_k)
        self._nothing = self._none(0)

    def _none(self, *shape: int) -> Tensor:
        return torch.full((self._batch, *shape), -1, dtype=torch.int64, device=self._device)

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        return self._fill(self._chain, history, lengths).tokens[:, 1:]

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        return self._fill(self._tree, history, lengths)

    def _fill(self, tree: DraftTree, history: Tensor, lengths: Tensor) -> Draft:
        if tree.retrieval_length:
            retrieved, _ = ops.lookup_ngram(history, lengths, MAX_NGRAM, tree.retrieval_length)
        else:
            retrieved = self._nothing
        shape = self._shapes[tree]
        tokens = ops.fill_tree(
            self._candidates, retrieved, history, lengths, shape.depth, shape.rank, self._seed
        )
        return Draft.shaped(tokens, shape)

    def observe(self, verified: Verified) -> None:
        """Take the next guesses from the logits at the rejected continuation."""
        if not self._top_k:
            return
        nodes = verified.continuation[:, : self.max_depth]
        rows = torch.arange(self._batch, device=self._device)[:, None]
        top = verified.logits[rows, nodes.clamp(min=0)].topk(self._top_k, dim=-1).indices
        self._candidates[:, nodes.shape[1] :] = -1
        self._candidates[:, : nodes.shape[1]] = torch.where((nodes >= 0)[..., None], top, -1)

    def plan(self) -> int:
        return len(self._tree)

    def observe_step(
        self, report: Tensor | None, nodes: int, gained: list[int], seconds: float
    ) -> None:
        """Do nothing: the shape is fixed, whatever comes of it."""

    def forget(self) -> None:
        """Do nothing: every call begins without candidates."""


def drafts_nothing(drafter: Drafter) -> bool:
    """Return whether it is plain decoding: a tree of the root alone."""
    return type(drafter) is TreeDrafter and not drafter.max_depth
