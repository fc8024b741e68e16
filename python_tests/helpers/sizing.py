"""Sizes of trees in plain Python: what ``csrc/sizing.h`` computes, said once more."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from math import sqrt

from msn_ext.decoding.sizing import FIRST_GUESS, FIRST_GUESS_ELSEWHERE, LESSON

NEWEST = 0.1  # what a step counts at least against those of its size before
DRIFT = 0.05  # and against those of the other sizes: all get slower where the machine does
FORGET = 0.99  # what is left of the steps that a size was seen in, after one of another size
DOUBT = 0.1  # how much faster a size may be than the one step that it was seen in
OUTLIER = 2.0  # a step that took so many times what was expected counts as one that took just that


class PlainTimes:
    def __init__(self, curve: dict[int, float] | None, device_type: str):
        points = sorted(curve.items()) if curve else []
        # More tokens never take less time: what says so is noise.
        self._curve = list(
            zip((n for n, _ in points), accumulate((seconds for _, seconds in points), max))
        )
        self._slope, self._kink = FIRST_GUESS.get(device_type, FIRST_GUESS_ELSEWHERE)
        self._cold = True  # the first step of all warms up, and says nothing
        self._seen: dict[int, float] = {}  # seconds by tokens
        self._counts: dict[int, float] = {}  # steps, with slow forgetting

    def __call__(self, tokens: int) -> float:
        if self._curve:
            return _along(self._curve, tokens)
        if tokens in self._seen or (len(self._seen) > 1 and tokens > min(self._seen)):
            return _along(sorted(self._seen.items()), tokens)
        if not self._seen:
            return self._guess(tokens)
        nearest = min(self._seen)
        return self._seen[nearest] * self._guess(tokens) / self._guess(nearest)

    def _guess(self, tokens: int) -> float:
        return (1 + self._slope * tokens) * (self._kink if tokens == 1 else 1)

    def at_best(self, tokens: int) -> float:
        if self._curve or not self._seen:
            return self(tokens)
        if tokens in self._seen:
            seconds = min(self._seen[n] for n in self._seen if n >= tokens)
            return seconds * max(0.5, 1 - DOUBT / self._counts[tokens])
        smallest, largest = min(self._seen), max(self._seen)
        if tokens < smallest:
            return self._seen[smallest] * (tokens / smallest) ** 0.5
        below = self._seen[max(n for n in self._seen if n < tokens)]
        if tokens < largest:
            return below
        if tokens > 2 * largest:
            below *= self._guess(tokens) / self._guess(largest)
        return max(below, self(tokens)) if len(self._seen) > 1 else below

    def observe(self, tokens: int, seconds: float) -> None:
        if self._curve:
            return
        if self._cold:
            self._cold = False
            return
        for other in self._counts:
            self._counts[other] *= FORGET
        count = self._counts[tokens] = self._counts.get(tokens, 0.0) / FORGET + 1
        if tokens not in self._seen:
            self._seen[tokens] = seconds
            return
        before = self._seen[tokens]
        ratio = min(max(seconds / before, 1 / OUTLIER), OUTLIER)
        for other in self._seen:
            share = max(NEWEST, 1 / count) if other == tokens else DRIFT
            self._seen[other] *= 1 + share * (ratio - 1)


def _along(points: list[tuple[int, float]], x: float) -> float:
    """Return the value at ``x``: linear between the points, the first one's before them, on the
    line of the last two after them, which does not fall.
    """
    at = min(bisect_left(points, (x,)), len(points) - 1)
    if at == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[at - 1 : at + 1]
    slope = (y1 - y0) / (x1 - x0)
    return y1 + max(slope, 0.0) * (x - x1) if x > x1 else y1 + slope * (x - x1)


class PlainSizer:
    def __init__(self, times: PlainTimes, rows: int):
        self._times, self._rows = times, rows
        self._expected = self._accepted = 10.0

    def choose(self, expected: list[float], sizes: tuple[int, ...]) -> int:
        trust = self._accepted / self._expected
        return max(
            (size for size in sizes if size <= len(expected)),
            key=lambda size: (
                (1 + trust * (expected[size - 1] + LESSON * sqrt(size)))
                / self._times.at_best(self._rows * size)
            ),
        )

    def observe(self, nodes: int, expected: float, accepted: float, seconds: float) -> None:
        self._times.observe(self._rows * nodes, seconds)
        self._expected += expected - 0.02 * self._expected
        self._accepted += accepted - 0.02 * self._accepted
