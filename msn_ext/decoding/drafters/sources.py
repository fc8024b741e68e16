"""The sources of best-first drafting, and the tables that they keep."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import GUESSES, ORDERS, SUFFIXES

from .protocol import Draft, Noise, Verified

SOURCES = ("denoised", "adjacency", "suffix")

LONGEST_TAIL = 1
TAILS_FROM = (8, 32, 48, 64)
"""Nodes from which on a tree has one tail, two, … (benchmarks/tails.py)."""

SLOTS = 1 << 16
"""Contexts of one order that :class:`Adjacency` remembers."""


class Denoised:
    """The model's guesses at the rejected nodes below the accepted path, by depth (Jacobi
    iteration).

    Attributes:
        guesses: int32 [B, depths, 8], as :func:`msn_ext.ops.draft_tree` takes them; -1: none.
    """

    def __init__(self, batch: int, depths: int, device: torch.device):
        self.guesses = torch.full((batch, depths, GUESSES), -1, dtype=torch.int32, device=device)

    def forget(self) -> None:
        self.guesses.fill_(-1)

    def update(self, verified: Verified, guesses: Tensor) -> None:
        """Take the guesses [B, N, 8] at the rejected continuation of a checked tree."""
        ops.keep_continuation(self.guesses, guesses, verified.continuation)


class Adjacency:
    """The model's last guesses after the same one, two and three tokens, from every verified node.

    One table for all rows: 7 MB whatever the vocabulary. A newer context takes an older one's slot.

    Attributes:
        adjacency: int32 [3, slots, 9], as :func:`msn_ext.ops.remember_guesses` keeps it.
    """

    def __init__(self, device: torch.device, slots: int = SLOTS):
        self.adjacency = torch.zeros(ORDERS, slots, 1 + GUESSES, dtype=torch.int32, device=device)

    def forget(self) -> None:
        self.adjacency.zero_()

    def update(self, verified: Verified, guesses: Tensor) -> None:
        """Remember the guesses [B, N, 8] at every node of a checked tree."""
        draft = verified.draft
        ops.remember_guesses(
            self.adjacency,
            verified.history,
            verified.lengths,
            draft.tokens,
            draft.parents,
            verified.path,
            guesses,
        )


class Suffix:
    """The tokens after the last place of the text's last n-grams, up to 16 tokens long.

    32 bytes a token of room, at most 4 MB a row; a step costs the same however long the text is.

    Attributes:
        suffixes: int32 [B, 8, slots], as :func:`msn_ext.ops.index_suffixes` keeps it.
    """

    def __init__(self, batch: int, room: int, device: torch.device):
        self.room = room
        slots = min(1 << max(room - 1, 0).bit_length(), 1 << 17) if room else 0
        self.suffixes = torch.zeros(batch, len(SUFFIXES), slots, dtype=torch.int32, device=device)
        self._indexed = torch.zeros(batch, dtype=torch.int64, device=device)

    def forget(self) -> None:
        self.suffixes.zero_()
        self._indexed.zero_()

    def update(self, history: Tensor, lengths: Tensor) -> None:
        """Index what the text has gained."""
        ops.index_suffixes(self.suffixes, history, self._indexed, lengths)
        self._indexed.copy_(lengths)


class NoiseTails:
    """What noise rows say below the node where the accepted path ends: guesses in the place of the
    denoised ones, by a gated adapter (arXiv 2507.11851, 2609.04010).

    A tree ends in a few tails, chains of noise rows below the nodes where the path most likely
    ends: where a node's probability is larger than the sum of its children's. Where it ends
    elsewhere, the denoised guesses stay.

    Args:
        usual, fitted: float64 [348], the factors of guesses that no tail, and that a tail made.

    Attributes:
        factors: float64 [B, 348], those of the next draft.
    """

    def __init__(self, noise: Noise, usual: Tensor, fitted: Tensor, batch: int):
        self.length, self._content = min(noise.length, LONGEST_TAIL), noise.content
        self._usual, self._fitted = usual, fitted
        self.factors = usual.repeat(batch, 1)
        self._ends = torch.empty(batch, 0, dtype=torch.int64, device=usual.device)

    def forget(self) -> None:
        self.factors.copy_(self._usual.expand_as(self.factors))

    def drafted(self, nodes: int) -> int:
        """Return how many nodes of a tree of so many are no tails."""
        return nodes - tails_of(nodes) * self.length

    def below(
        self,
        draft: tuple[Tensor, Tensor, Tensor],
        count: int,
        history: Tensor,
        lengths: Tensor,
    ) -> Draft:
        """Return the draft of these tokens, parents and probabilities, with so many tails."""
        tokens, parents, probability = draft
        self._ends = likely_ends(parents, probability, count)
        token: int | Tensor = self._content if isinstance(self._content, int) else 0
        if isinstance(self._content, str):  # tokens of the text, which all such noise resembles
            at = (torch.arange(count * self.length, device=lengths.device) + 1) * 7919
            token = history.gather(1, (lengths[:, None] + at) % lengths[:, None])
        return Draft.with_tails(tokens, parents, self._ends, self.length, token)

    def update(self, verified: Verified, guesses: Tensor, denoised: Denoised) -> None:
        """Take the guesses [B, N, 8] of the tail below the last accepted node, where it has one."""
        if not verified.draft.tails:
            self.forget()
            return
        last = verified.path.gather(1, (verified.accept_length[:, None] - 1).clamp(min=0))
        found = (self._ends == last) & (last >= 0)
        hit = found.any(1, keepdim=True)
        depths = min(self.length, denoised.guesses.shape[1])
        first = guesses.shape[1] - verified.draft.tails + found.int().argmax(1) * self.length
        rows = first[:, None, None] + torch.arange(depths, device=first.device)[:, None]
        said = torch.full_like(denoised.guesses, -1)
        said[:, :depths] = guesses.gather(1, rows.expand(-1, -1, GUESSES))
        denoised.guesses.copy_(torch.where(hit[..., None], said, denoised.guesses))
        self.factors.copy_(torch.where(hit, self._fitted, self._usual))


def tails_of(nodes: int) -> int:
    """Return how many tails a tree of so many nodes has, their rows included in it."""
    return bisect_right(TAILS_FROM, nodes)


def likely_ends(parents: Tensor, probability: Tensor, count: int) -> Tensor:
    """Return the nodes where the accepted path ends most likely, int64 [B, count]; -1: no more.

    Args:
        parents: int32 [B, N]; probability: float64 [B, N], that a node is accepted.
    """
    live = parents >= 0
    of_children = torch.where(live, probability, 0.0)
    ends = probability.scatter_add(1, parents.clamp(min=0).long(), -of_children)
    chance, nodes = ends.topk(min(count, ends.shape[1]), dim=1)
    nodes = torch.where(chance > 0, nodes, -1)
    return torch.nn.functional.pad(nodes, (0, count - nodes.shape[1]), value=-1)
