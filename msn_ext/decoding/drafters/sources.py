"""The sources of best-first drafting, and the tables that they keep."""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import GUESSES, ORDERS, SUFFIXES

from .protocol import Verified

SOURCES = ("denoised", "adjacency", "suffix")

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
