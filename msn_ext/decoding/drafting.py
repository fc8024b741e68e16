"""TR-Jacobi drafting (arXiv 2406.17404, section 3.3 and appendix B): denoised guesses and retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import ops

from .tree import DraftTree

MAX_NGRAM = 3
"""Longest suffix that retrieval looks up (appendix B)."""


class TreeDrafter:
    """Fills a tree of a fixed shape.

    The guesses for depth d are the top-k of the logits at the d-th rejected node below the accepted
    path (Jacobi iteration: a node that was wrong still predicts what comes after it), and the text
    that followed the most recent match of the longest suffix.

    Args:
        tree: which guesses to keep, and where.
        batch: rows.
        device: of the model.
        seed: of the noise that stands where there is no guess.
    """

    def __init__(self, tree: DraftTree, batch: int, device: torch.device, seed: int = 0):
        self._depth, self._top_k, self._retrieval = tree.max_depth, tree.top_k, tree.retrieval_length
        self._batch, self._device = batch, device
        self._seed = torch.tensor([seed], device=device)
        self._candidates = self._none(0, 0)

    def _none(self, *shape: int) -> Tensor:
        return torch.full((self._batch, *shape), -1, dtype=torch.int64, device=self._device)

    def propose(self, tree: DraftTree, history: Tensor, lengths: Tensor) -> Tensor:
        """Tokens int64 [B, N] for ``tree``, given the text so far (``history`` [B, C], ``lengths`` [B])."""
        if self._retrieval:
            retrieved, _ = ops.lookup_ngram(history, lengths, MAX_NGRAM, self._retrieval)
        else:
            retrieved = self._none(0)
        shape = tree.tensors(self._device)
        return ops.fill_tree(self._candidates, retrieved, history, lengths, shape.depth, shape.rank, self._seed)

    def observe(self, logits: Tensor, continuation: Tensor) -> None:
        """Take the next guesses from the logits [B, N, V] at the rejected ``continuation`` [B, N]."""
        if not self._top_k:
            return
        nodes = continuation[:, : self._depth]
        rows = torch.arange(self._batch, device=self._device)[:, None]
        top = logits[rows, nodes.clamp(min=0)].topk(self._top_k, dim=-1).indices
        self._candidates = torch.where((nodes >= 0)[..., None], top, -1)
