"""Stopping criteria: asked about every token, as plain decoding does, though rows gain several at a
time and come at their own pace.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation import MaxTimeCriteria, StopStringCriteria

from .decoder import Decoder
from .request import Request

OF_A_ROW = frozenset({StopStringCriteria, MaxTimeCriteria})
"""Criteria that look at each row by itself, and keep nothing. They are asked at once what they say
of a row; all others when all rows have come as far, in plain decoding's order.
"""


class Progress:
    """The tokens that the rows have gained, counted on the host.

    Attributes:
        totals: by row, the tokens that it has gained.
        ends: by row, its tokens where a criterion ended it, ``max_new_tokens`` where none has; a
            row still gains some where rows end together.
        asked: tokens of every row that the criteria were asked about, where they are asked about
            all rows at once.
        asks_rows: they are asked about each row by itself.
    """

    def __init__(self, request: Request):
        rows = len(request.input_ids)
        self.totals = [0] * rows
        self.ends = [request.max_new_tokens] * rows
        alone = rows == 1 or all(type(ask) in OF_A_ROW for ask in request.criteria)
        self.asks_rows = bool(request.criteria) and alone
        self.asked = 0 if request.criteria and not alone else request.max_new_tokens
        self._passes: list[list[int]] = []

    def add(self, counts: list[int]) -> None:
        """Count the tokens, by row, of one more pass."""
        self._passes.append(counts)
        self.totals = [total + count for total, count in zip(self.totals, counts)]

    def take_back(self, b: int, total: int) -> None:
        """Let row b have gained no more than ``total`` tokens, however many passes ago."""
        surplus = self.totals[b] - total
        self.totals[b] = total
        for counts in reversed(self._passes):
            taken = min(surplus, counts[b])
            counts[b] -= taken
            surplus -= taken

    @property
    def longest(self) -> int:
        return max(self.totals)

    @property
    def all_ended(self) -> bool:
        """Whether every row has come as far as the last one that a criterion ended."""
        return min(*self.totals, self.asked) >= max(self.ends)

    @property
    def settled(self) -> list[int]:
        """By row, the tokens that stay whatever comes: where rows end together, one may be ahead of
        the end; where criteria are asked about all of them, of the others.
        """
        least = min(self.asked, max(map(min, self.totals, self.ends)))
        return [min(total, least) for total in self.totals]

    @property
    def new_tokens(self) -> int:
        """New tokens of the output."""
        return min(self.longest, max(self.ends))

    def counts(self) -> Tensor:
        """Return what every pass gained of the output, int64 [passes, B]."""
        nothing = [0] * len(self.totals)
        totals = torch.tensor([nothing, *self._passes], dtype=torch.int64, device="cpu").cumsum(0)
        return totals.clamp(max=self.new_tokens).diff(dim=0)


def ask_rows(
    request: Request,
    decoder: Decoder,
    counts: list[int],
    remaining: list[int],
    progress: Progress,
) -> None:
    """Ask about each row by itself, after every token that a pass gained, up to the first one that
    ends it.

    ``counts`` and ``remaining``, by row, are the pass's, which ``progress`` does not have yet.
    Where rows end together, ``progress.ends`` is set; else the row is cut, and ``counts`` and
    ``remaining`` are corrected.
    """
    for b, count in enumerate(counts):
        if not count or progress.totals[b] >= progress.ends[b]:
            continue
        ids = decoder.row(b)[None]
        for kept in range(1, count + 1):
            seen = ids[:, : ids.shape[1] - count + kept]
            if not any(bool(torch.as_tensor(ask(seen, None)).all()) for ask in request.criteria):
                continue
            if request.ends_together:
                progress.ends[b] = progress.totals[b] + kept
            else:
                decoder.cut(b, count - kept)
                counts[b], remaining[b] = kept, 0
            break


def ask_together(
    request: Request, decoder: Decoder, remaining: list[int], progress: Progress
) -> None:
    """Ask about all rows at once, as far as all of them have come; those that ended are padded.

    ``remaining``, by row, is the last pass's. A row that ends takes back what it gained since, and
    ``remaining`` is corrected; where rows end together, ``progress.ends`` is set.
    """
    while progress.asked < _common(progress.totals, remaining) and not progress.all_ended:
        progress.asked += 1
        seen = decoder.sequences(progress.asked, request.pad_token_id)
        ended = torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
        for ask in request.criteria:
            ended = ended | torch.as_tensor(ask(seen, None), device=seen.device).bool()
        for b in ended.nonzero().flatten().tolist():
            if request.ends_together:
                progress.ends[b] = min(progress.ends[b], progress.asked)
            elif progress.totals[b] >= progress.asked:
                decoder.cut(b, progress.totals[b] - progress.asked)
                progress.take_back(b, progress.asked)
                remaining[b] = 0


def _common(totals: list[int], remaining: list[int]) -> int:
    """Return the tokens that all rows have come to, but those that have ended."""
    running = [total for total, left in zip(totals, remaining) if left]
    return min(running) if running else max(totals)
