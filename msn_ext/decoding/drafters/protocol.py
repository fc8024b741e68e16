"""What a drafter is, and the paper's: TR-Jacobi on a tree of a fixed shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from msn_ext import ops

from .tree import RETRIEVAL, DraftTree, TreeTensors

MAX_NGRAM = 3
"""Longest suffix that retrieval looks up (arXiv 2406.17404, appendix B)."""


@dataclass
class Draft:
    """Guesses for the next tokens, laid out as a tree; all on the model's device. Made by
    :meth:`of`.

    Attributes:
        tokens: int64 [B, N], at most 256 nodes, all in the vocabulary, padding too; node 0 stands
            for the last token of the text, whatever it holds.
        parents: int32 [N] or [B, N]; -1 at the root and at padding, which is never accepted.
        ancestors: int64 [N, W] or [B, N, W], and
        depth: int32 [N] or [B, N], as :func:`msn_ext.ops.tree_ancestors` gives them for
            ``parents``.
    """

    tokens: Tensor
    parents: Tensor
    ancestors: Tensor
    depth: Tensor

    @classmethod
    def of(cls, tokens: Tensor, parents: Tensor) -> Draft:
        """A draft from its tokens and parents."""
        return cls(tokens, parents, *ops.tree_ancestors(parents, validate=False))

    @classmethod
    def shaped(cls, tokens: Tensor, shape: TreeTensors) -> Draft:
        """A draft on a tree whose tensors are there already."""
        return cls(tokens, shape.parents, shape.ancestors, shape.depth)

    def __len__(self) -> int:
        return self.tokens.shape[1]


@dataclass
class Verified:
    """What one forward pass showed about a draft; all on the model's device.

    Attributes:
        draft: the guesses.
        logits: [B, N, V], behind every node.
        targets: int64 [B, N], the token the model itself puts after each node.
        path, accept_length, continuation: as :func:`msn_ext.ops.verify_tree` gives them.
        history, lengths: the text before the pass, as :class:`Drafter` has it.
        guesses: int32 [B, N, 8], as :func:`msn_ext.ops.top_guesses` gives them of ``logits``; None:
            ask for them.
    """

    draft: Draft
    logits: Tensor
    targets: Tensor
    path: Tensor
    accept_length: Tensor
    continuation: Tensor
    history: Tensor
    lengths: Tensor
    guesses: Tensor | None = None


@runtime_checkable
class Drafter(Protocol):
    """A source of guesses. It can be wrong, never harmful: it only decides where the model looks.

    ``history[b, :lengths[b]]`` is the text of row b so far, prompt included, without padding; what
    lies behind is rubbish. Both grow in place: what is to be kept must be copied. docs/drafters.md
    has an example.

    Attributes:
        max_depth: bound on the depth of any node it proposes.
    """

    max_depth: int

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        """A new call of ``generate`` with ``batch`` rows begins."""

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        """The guesses behind the prompt in the first pass, one chain: int64 [B, n], n >= 0."""

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        """The tree of every later pass."""

    def observe(self, verified: Verified) -> None:
        """What came of a pass. Now and then that is the root alone, although more was proposed."""


class TreeDrafter:
    """TR-Jacobi drafting (arXiv 2406.17404, section 3.3 and appendix B) on a tree of a fixed shape.

    The guesses for depth d are the top-k of the logits at the d-th rejected node below the accepted
    path (Jacobi iteration: a node that was wrong still predicts what comes after it), and the text
    that followed the most recent match of the longest suffix. Noise stands where there is no guess.

    Args:
        tree: which guesses to keep, and where.
        seed: of the noise.
    """

    def __init__(self, tree: DraftTree, seed: int = 0):
        self._tree, self._seed_value = tree, seed
        self.max_depth = tree.max_depth
        rank = RETRIEVAL if RETRIEVAL in tree.ranks else 0
        self._chain = DraftTree.chain(tree.max_depth + 1, rank)

        self._of: tuple[int, int, torch.device] | None = None
        self.report, self.allocations = None, 0

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        if self._of == (batch, vocabulary, device):
            self._candidates.fill_(-1)
            return
        self._of = batch, vocabulary, device
        self.allocations += 1
        self._batch, self._device = batch, device
        self._top_k = min(self._tree.top_k, vocabulary)
        self._seed = torch.tensor([self._seed_value], device=device)
        # Held here, since recordings read them; the trees' own are forgotten when others come.
        self._shapes = {tree: tree.tensors(device) for tree in (self._tree, self._chain)}
        self._candidates, self._nothing = self._none(self.max_depth, self._top_k), self._none(0)

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

    def told(self, report: None, nodes: int, gained: list[int], seconds: float) -> None:
        """The shape is fixed, whatever comes of it."""
