"""The texts that drafts look into: those of the requests at hand, and those of the past."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import GUESSES, SUFFIXES

CONTEXT = SUFFIXES[-1]
"""Tokens before an answer that are kept with it, which its first n-grams are found by."""
ROOM = 1 << 10
"""Tokens a row has room for at first."""
MOST_SLOTS = 1 << 17  # of a row, 4 MB, as in msn_ext's own decoder


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


class LiveTexts:
    """The texts of the requests at hand, each a row of the same tables, so that one call of an op
    serves all: 8 bytes a token of the longest, 32 a slot (as many as tokens, at most 2^17).

    Attributes:
        row_of: rows by request.
        history: int64 [rows, room]; lengths: int64 [rows], at least 1.
        suffixes: int32 [rows, 8, slots], as :func:`msn_ext.ops.index_suffixes` keeps it.
        denoised: int32 [rows, depths, 8], guesses for the next tokens; -1: none.
    """

    def __init__(self, depths: int):
        self._depths = depths
        self.forget()

    def forget(self) -> None:
        self.row_of: dict[str, int] = {}
        self._free: list[int] = []
        self._starts: dict[str, int] = {}  # where what is kept of the text begins in the request's
        self._answers: dict[str, int] = {}  # where the answer begins in the row
        self._lay_out(0, ROOM)

    @property
    def rows(self) -> int:
        """Rows up to the last one in use."""
        return 1 + max(self.row_of.values(), default=-1)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.history, self.lengths, self.suffixes, self.denoised))

    def _lay_out(self, rows: int, room: int) -> None:
        """Make tables of this size; texts that are there are to be indexed anew."""
        slots = min(_power_of_two(room), MOST_SLOTS)
        history = torch.zeros(rows, room, dtype=torch.int64)
        lengths = torch.ones(rows, dtype=torch.int64)
        denoised = torch.full((rows, self._depths, GUESSES), -1, dtype=torch.int32)
        if self.row_of:
            kept, width = slice(0, len(self.lengths)), self.history.shape[1]
            history[kept, :width], lengths[kept] = self.history, self.lengths
            denoised[kept] = self.denoised
        self.history, self.lengths, self.denoised = history, lengths, denoised
        self.suffixes = torch.zeros(rows, len(SUFFIXES), slots, dtype=torch.int32)
        self._indexed = torch.ones(rows, dtype=torch.int64)
        self._rows = history.numpy()  # the same memory, cheaper to write a few tokens into

    def open(self, request: str, prompt: Sequence[int], answer: Sequence[int], start: int) -> None:
        """Begin or begin again with the text of a request, of which ``start`` tokens are left out
        before the prompt; at least one token.
        """
        size = len(prompt) + len(answer)
        row = self.row_of.get(request, -1)
        if row < 0:
            row = heapq.heappop(self._free) if self._free else len(self.row_of)
        rows, room = self.history.shape
        if row >= rows or size > room:
            self._lay_out(
                max(rows, _power_of_two(row + 1)), room if size <= room else _power_of_two(size)
            )
        self.row_of[request], self._starts[request] = row, start
        self._answers[request] = len(prompt)
        self._rows[row, : len(prompt)] = prompt
        self._rows[row, len(prompt) : size] = answer
        self.lengths[row], self._indexed[row] = size, 1
        self.suffixes[row].zero_()
        self.denoised[row].fill_(-1)

    def extend(self, request: str, tail: Sequence[int], total: int) -> Sequence[int]:
        """Take what a text of ``total`` tokens has gained, of which ``tail`` is the end, and return
        it. A request that is new, or does not go on from where it was, begins again with its tail.
        """
        row = self.row_of.get(request)
        if row is not None:
            size = int(self.lengths[row])
            gained = total - self._starts[request] - size
            if 0 <= gained < len(tail) and self._rows[row, size - 1] == tail[-gained - 1]:
                if size + gained > self.history.shape[1]:
                    self._lay_out(len(self.history), _power_of_two(size + gained))
                new = tail[len(tail) - gained :]
                self._rows[row, size : size + gained] = new
                self.lengths[row] = size + gained
                return new
        self.open(request, tail, (), total - len(tail))
        return ()

    def close(self, request: str) -> Tensor:
        """Forget a request and return its answer and some tokens before it, int64 [n]; empty where
        it has none.
        """
        row, answer = self.row_of.pop(request), self._answers.pop(request)
        del self._starts[request]
        size = int(self.lengths[row])
        text = self.history[row, max(answer - CONTEXT, 0) if size > answer else size : size].clone()
        heapq.heappush(self._free, row)
        self.lengths[row] = self._indexed[row] = 1
        if not self.row_of:  # nothing is left: give memory back
            self.forget()
        return text

    def index(self) -> None:
        """Index what the texts have gained."""
        rows = self.rows
        ops.index_suffixes(
            self.suffixes[:rows], self.history[:rows], self._indexed[:rows], self.lengths[:rows]
        )
        self._indexed.copy_(self.lengths)


class PastTexts:
    """Texts of the past in a ring, the oldest overwritten, behind texts that stay.

    An n-gram's place is looked at before it is believed (:func:`msn_ext.ops.draft_tree`), so what
    pointed at an overwritten text points at nothing. 28 to 44 bytes a token.

    Args:
        capacity: tokens of the ring; 0: nothing is kept.
        staying: int64 [n], texts that stay, a negative number between them.

    Attributes:
        tokens: int32 [T]; suffixes: int32 [8, S]; as :func:`msn_ext.ops.draft_tree` takes a corpus.
    """

    def __init__(self, capacity: int, staying: Tensor):
        staying = torch.cat([staying, staying.new_full((1,), -1)]) if len(staying) else staying
        self._first = self._end = len(staying)
        room = len(staying) + capacity
        slots = _power_of_two(room) // 2 or 1 if room else 0
        # Memory that nothing was written to is none yet.
        self._history = torch.zeros(1, room, dtype=torch.int64)
        self._tokens = torch.zeros(room, dtype=torch.int32)
        self.suffixes = torch.zeros(len(SUFFIXES), slots, dtype=torch.int32)
        self._filled = self._fresh = 0
        self._write(staying, 0)

    @property
    def tokens(self) -> Tensor:
        return self._tokens[: self._filled]

    def add(self, text: Tensor) -> None:
        """Keep a text, int64 [n]; of one that is longer than the ring, its end."""
        room = self._history.shape[1] - self._first
        text = text[len(text) - min(len(text), max(room - 1, 0)) :]
        if not len(text):
            return
        if self._end + len(text) + 1 > self._history.shape[1]:
            self._end = self._first
        # What stands behind it ends there, or nothing of it would be its continuation.
        self._end = self._write(torch.cat([text, text.new_full((1,), -1)]), self._end)
        self._refresh(len(text))

    def _write(self, text: Tensor, at: int) -> int:
        """Write a text and index it; return where it ends."""
        end = at + len(text)
        self._history[0, at:end], self._tokens[at:end] = text, text
        self._filled = max(self._filled, end)
        self._index(at + 1, end)
        return end

    def _refresh(self, written: int) -> None:
        """Index some of what stays again, all of it while the ring goes round once: texts that were
        written since took its slots.
        """
        ring = self._history.shape[1] - self._first
        end = min(self._fresh + -(-written * self._first // ring), self._first)
        self._index(self._fresh, end)
        self._fresh = end % max(self._first, 1)

    def _index(self, start: int, end: int) -> None:
        if end > start:
            places = torch.tensor([[start], [end]])
            ops.index_suffixes(self.suffixes[None], self._history, *places)
