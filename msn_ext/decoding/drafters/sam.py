"""SAM-Decoding (Hu et al., ACL 2025, arXiv 2411.10666): copies what followed the longest earlier
match.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import Draft, Verified


class SuffixAutomaton:
    """All substrings of a growing text, and the longest of its ends that also stands earlier.

    Attributes:
        text: the tokens.
        matched: length of that end.
        follows: where what followed its *first* place begins.
    """

    def __init__(self):
        self.text: list[int] = []
        # Of every state: tokens that lead on, the state of the longest suffix of another class, the
        # length of its longest string, and where that first ended.
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]
        self._last = self._state = self.matched = 0

    @property
    def follows(self) -> int:
        return self._end[self._state]

    def append(self, token: int) -> None:
        """The text grows; amortised constant time."""
        if self.text:
            self._extend(self.text[-1])  # one token late, so that the end cannot match itself
        while self._state and token not in self._next[self._state]:
            self._state = self._link[self._state]
            self.matched = self._length[self._state]
        if token in self._next[self._state]:
            self._state = self._next[self._state][token]
            self.matched += 1
        self.text.append(token)

    def _new(self, following: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    def _extend(self, token: int) -> None:
        """Blumer et al. 1985: the automaton of the text and one more token."""
        length = self._length[self._last] + 1
        state, self._last = self._last, self._new({}, 0, length, length)
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = self._last
            state = self._link[state]
        if state == -1:
            return
        target = self._next[state][token]
        # Split: its shorter strings now end here too.
        if self._length[target] != self._length[state] + 1:
            whole = target
            target = self._new(
                dict(self._next[whole]),
                self._link[whole],
                self._length[state] + 1,
                self._end[whole],
            )
            self._link[whole] = target
            while state != -1 and self._next[state].get(token) == whole:
                self._next[state][token] = target
                state = self._link[state]
            if self._state == whole and self.matched <= self._length[target]:
                self._state = target
        self._link[self._last] = target


class SamDecoding:
    """A chain that copies what followed the first place of the text's longest end that stands there
    too.

    As the authors' program does without a second drafter and without a corpus: ``growth`` tokens
    for every token that matched. The automaton is kept on the host: a baseline, not for speed.

    Args:
        most: tokens of a chain, root included, 2 to 256.
        growth: > 0.
    """

    def __init__(self, most: int = 60, growth: float = 4.0):
        if not 2 <= most <= 256:
            raise ValueError(f"most is {most}; expected 2 to 256")
        if not growth > 0:
            raise ValueError(f"growth is {growth}; expected more than 0")
        self._most, self._growth = most, growth
        self.max_depth = most - 1

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        self._texts = [SuffixAutomaton() for _ in range(batch)]

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        return history.new_empty(history.shape[0], 0)

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        copies = []
        for text, row, length in zip(self._texts, history, lengths.tolist()):
            for token in row[len(text.text) : length].tolist():
                text.append(token)
            most = min(self._most - 1, int(self._growth * text.matched))
            copies.append(text.text[text.follows : text.follows + most])
        nodes = 1 + max(map(len, copies))
        tokens = [
            text.text[-1:] + copy + text.text[-1:] * (nodes - 1 - len(copy))
            for text, copy in zip(self._texts, copies)
        ]
        parents = [
            [node - 1 if node <= len(copy) else -1 for node in range(nodes)] for copy in copies
        ]
        device = history.device
        return Draft.of(
            torch.tensor(tokens, device=device),
            torch.tensor(parents, dtype=torch.int32, device=device),
        )

    def observe(self, verified: Verified) -> None:
        pass
