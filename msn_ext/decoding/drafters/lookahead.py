"""Lookahead decoding (Fu et al., ICML 2024, arXiv 2402.02057): n-grams from parallel Jacobi
trajectories.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from msn_ext.ops import MAX_NODES

from .protocol import Draft, Verified


class Lookahead:
    """Drafts n-grams collected from a window of Jacobi iterations that runs beside the text.

    The window has ``ngram - 1`` levels of ``window`` columns. Level 0 is a chain that starts at the
    root; below each of its tokens hangs a column, one token a level. The model's answer below the
    last level completes one n-gram per column; then every level takes the place of the one above.
    The n-grams go into a pool, keyed by their first token; the root's entries are the guesses, each
    a chain below the root. All of it is one tree, so that, unlike in the authors' program, a token
    of the window that happens to be right is accepted too.

    Args:
        window: columns (W), >= 1.
        ngram: tokens of an n-gram (N), >= 3.
        guesses: n-grams kept per first token (G), the most recently found; the tree has up to
            ``(window + guesses) * (ngram - 1)`` nodes.
        seed: of the random prompt tokens that level 0 begins with.

    The pool is a dictionary on the host, so a step reads the window back: a baseline, not for
    speed.
    """

    def __init__(self, window: int = 7, ngram: int = 5, guesses: int = 7, seed: int = 0):
        for name, value, least in (
            ("window", window, 1),
            ("ngram", ngram, 3),
            ("guesses", guesses, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
        # While it fills, the window has fewer levels but more columns.
        filling = max(levels * (window + ngram - 1 - levels) for levels in range(1, ngram))
        nodes = max(filling, (window + guesses) * (ngram - 1))
        if nodes > MAX_NODES:
            raise ValueError(
                f"window, ngram and guesses make a tree of {nodes} nodes; expected at most"
                f" {MAX_NODES}"
            )
        self._window, self._ngram, self._guesses, self._seed = window, ngram, guesses, seed
        self.max_depth = window + 2 * ngram

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        self._batch, self._device = batch, device
        # int64 [B, columns]; level 0 is without the root, its first column.
        self._levels: list[Tensor] = []
        # Per row: the n-grams that begin with a token, the most recently found last.
        self._pools: list[dict[int, OrderedDict[tuple[int, ...], None]]] = [
            {} for _ in range(batch)
        ]

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self._seed)
        width = self._window + self._ngram - 3
        draws = torch.rand(self._batch, width, generator=generator, device="cpu").to(self._device)
        self._levels = [history.gather(1, (draws * lengths[:, None]).long())]
        return self._levels[0]

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        if not self._levels:  # the first pass could not draft
            self.first(history, lengths)
        root = history.gather(1, lengths[:, None] - 1)
        columns = self._levels[0].shape[1] + 1
        tokens = torch.cat([root, *self._levels], dim=1)
        shape = [*range(-1, columns - 1)]
        for level in range(1, len(self._levels)):
            shape += range(columns * (level - 1), columns * level)
        first_guess, length = tokens.shape[1], self._ngram - 1
        entries = [[*pool.get(token, ())] for pool, token in zip(self._pools, root[:, 0].tolist())]
        widest = max(map(len, entries))
        parents = torch.tensor(shape, dtype=torch.int32, device="cpu").repeat(self._batch, 1)
        guesses = root.new_zeros(self._batch, widest, length)
        chains = parents.new_full((self._batch, widest, length), -1)
        below = (
            torch.arange(widest * length, dtype=torch.int32, device="cpu").view(widest, length)
            + first_guess
            - 1
        )
        below[:, 0] = 0
        for b, row in enumerate(entries):
            if row:
                guesses[b, : len(row)] = torch.tensor(row, device=self._device)
                chains[b, : len(row)] = below[: len(row)]
        tokens = torch.cat([tokens, guesses.flatten(1)], dim=1)
        parents = torch.cat([parents, chains.flatten(1)], dim=1).to(self._device)
        return Draft.of(tokens, parents)

    def observe(self, verified: Verified) -> None:
        draft = verified.draft
        if len(draft) == 1:
            return
        columns = self._levels[0].shape[1] + 1
        below_last = slice(columns * (len(self._levels) - 1), columns * len(self._levels))
        answers = verified.targets[:, below_last]
        # The window is still filling: one level more, one column less.
        if len(self._levels) < self._ngram - 1:
            self._levels = [level[:, 1:] for level in self._levels] + [answers[:, 1:]]
            return
        keys = draft.tokens[:, :columns]
        found = torch.stack([*self._levels[1:], answers], dim=2)
        for pool, row_keys, row in zip(self._pools, keys.tolist(), found.tolist()):
            for key, ngram in zip(row_keys, map(tuple, row)):
                entries = pool.setdefault(key, OrderedDict())
                entries[ngram] = None
                entries.move_to_end(ngram)
                if len(entries) > self._guesses:
                    entries.popitem(last=False)
        self._levels = [self._levels[1][:, 1:], *self._levels[2:], answers]
