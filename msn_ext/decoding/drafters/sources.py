"""The sources of best-first drafting, and the tables that they keep."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.memory import table
from msn_ext.ops import GUESSES, MAX_NODES, ORDERS, SUFFIXES

from .protocol import Draft, Noise, Verified

SOURCES = ("denoised", "adjacency", "suffix")

LONGEST_TAIL = 1
TAILS_FROM = (8, 32, 48, 64)
"""Nodes from which on a tree has one tail, two, … (benchmarks/tails.py)."""
WORTH_OF_TAILS = (0.0, 0.15, 0.2, 0.22, 0.25)
"""Guesses that none, one, … of them add to those of the next tree that are accepted (the same)."""

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
        self.adjacency = table((ORDERS, slots, 1 + GUESSES), device)

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
        indexed: int64 [B], how many tokens of the text are in it.
    """

    def __init__(self, batch: int, room: int, device: torch.device):
        self.room = room
        slots = min(1 << max(room - 1, 0).bit_length(), 1 << 17) if room else 0
        self.suffixes = torch.zeros(batch, len(SUFFIXES), slots, dtype=torch.int32, device=device)
        self.indexed = torch.zeros(batch, dtype=torch.int64, device=device)

    def forget(self) -> None:
        self.suffixes.zero_()
        self.indexed.zero_()

    def update(self, history: Tensor, lengths: Tensor) -> None:
        """Index what the text has gained."""
        ops.index_suffixes(self.suffixes, history, self.indexed, lengths)
        self.indexed.copy_(lengths)


class NoiseTails:
    """What noise rows say below the node where the accepted path ends: guesses in the place of the
    denoised ones, by a gated adapter (arXiv 2507.11851, 2609.04010).

    A tree ends in a few tails, chains of noise rows below the nodes where the path most likely
    ends: where a node's probability is larger than the sum of its children's. Where it ends
    elsewhere, the denoised guesses stay.

    Args:
        usual, fitted: float64 [348], the factors of guesses that no tail, and that a tail made.

    Attributes:
        factors: float64 [B, 348], those of the next draft; ``tables`` [2, 348]: both.
        length: rows of a tail; ``noise``: their token, -1: tokens of the text.
    """

    def __init__(self, noise: Noise, usual: Tensor, fitted: Tensor, batch: int):
        self.length = min(noise.length, LONGEST_TAIL)
        self.noise = noise.content if isinstance(noise.content, int) else -1  # of the text
        self.tables = torch.stack([usual, fitted])
        self.factors = usual.repeat(batch, 1)
        self._ends = torch.empty(batch, 0, dtype=torch.int64, device=usual.device)
        # By nodes: those that are no tails, and what the tails are worth.
        self._sizes = [
            (self.drafted(nodes), WORTH_OF_TAILS[tails_of(nodes)])
            for nodes in range(1, MAX_NODES + 1)
        ]

    def forget(self) -> None:
        self.factors.copy_(self.tables[0].expand_as(self.factors))

    def drafted(self, nodes: int) -> int:
        """Return how many nodes of a tree of so many are no tails."""
        return nodes - tails_of(nodes) * self.length

    def expected(self, drafted: list[float]) -> list[float]:
        """Return how many guesses are expected to be accepted of n + 1 nodes, tails included, with
        those of the next tree that tails add; ``drafted``: of n + 1 nodes that are none.
        """
        found = []
        for first, worth in self._sizes:
            if first > len(drafted):
                break
            found.append(drafted[first - 1] + worth)
        return found

    def below(
        self, drafted: tuple[Tensor, Tensor, Tensor], nodes: int, history: Tensor, lengths: Tensor
    ) -> Draft:
        """Return the draft of so many nodes, tails included, of these tokens, parents and
        probabilities.
        """
        tails, first = tails_of(nodes), self.drafted(nodes)
        tokens, parents, ancestors, depth, self._ends = ops.append_tails(
            *drafted, history, lengths, first, tails, self.length, self.noise
        )
        return Draft(tokens, parents, ancestors, depth, nodes - first)

    def update(self, verified: Verified, guesses: Tensor, denoised: Denoised) -> None:
        """Take the guesses [B, N, 8] of the tail below the last accepted node, where it has one."""
        if verified.draft.tails != self._ends.shape[1] * self.length:  # the root alone
            denoised.update(verified, guesses)
            self.forget()
            return
        ops.keep_tail(
            denoised.guesses,
            self.factors,
            self.tables,
            guesses,
            verified.continuation,
            verified.path,
            verified.accept_length,
            self._ends,
            self.length,
        )


def tails_of(nodes: int) -> int:
    """Return how many tails a tree of so many nodes has, their rows included in it."""
    return bisect_right(TAILS_FROM, nodes)
