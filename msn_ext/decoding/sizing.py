"""The size of a tree: the time of a step, learned while decoding, against what its nodes are
expected to gain.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from math import sqrt

from torch import Tensor

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Trees that are considered."""
CAPTURED_SIZES = (1, 8, 16, 32, 64, 128)
"""The same where steps are captured, since each size costs a capture (:mod:`.runner`)."""
FIRST_CAPTURED_SIZE = 16
"""The one to begin with there, before anything is known of the text."""
NEWEST = 0.1  # what a step counts at least against those of its size before
DRIFT = 0.05  # and against those of the other sizes: all get slower where the machine does
FORGET = 0.99  # what is left of the steps that a size was seen in, after one of another size
DOUBT = 0.1  # how much faster a size may be than the one step that it was seen in
OUTLIER = 2.0  # a step that took so many times what was expected counts as one that took just that
LESSON = 0.1
"""Tokens that a tree of one node is worth for later steps, since what the model says at every node
is remembered; one of n nodes, the square root of n times as much. Fitted to whole answers: without
it, trees stay small where little is known, and so does what is known."""


def reach_of(size: int) -> int:
    """Return how many nodes to look at after a tree of ``size``."""
    return min(max(16, 4 * size), SIZES[-1])


class StepTimes:
    """Seconds of a step by the tokens that it computes, rows of the batch times nodes of a tree.

    Where a curve was measured (``msn tune``), that is it. Else every size that was seen has its
    own time, with lines between them. What has not been seen yet, or not for long, is taken for as
    cheap as the others allow (:meth:`at_best`), and so is tried.

    Args:
        curve: tokens and seconds of measured steps; linear between them, the last two's line
            after them.
        device_type: ``"cpu"`` or another; without a curve, a first guess of what a token adds to a
            step.
    """

    def __init__(self, curve: dict[int, float] | None, device_type: str):
        points = sorted(curve.items()) if curve else []
        # More tokens never take less time: what says so is noise.
        self._curve = list(
            zip((n for n, _ in points), accumulate((seconds for _, seconds in points), max))
        )
        self._slope, self._kink = (0.03, 0.7) if device_type == "cpu" else (0.001, 1.0)
        self._cold = True  # the first step of all warms up, and says nothing
        self._seen: dict[int, float] = {}  # seconds by tokens
        self._counts: dict[int, float] = {}  # steps, with slow forgetting

    def __call__(self, tokens: int) -> float:
        """Return the expected seconds; before anything was measured or seen, in units of their
        own.
        """
        if self._curve:
            return _along(self._curve, tokens)
        if tokens in self._seen or (len(self._seen) > 1 and tokens > min(self._seen)):
            return _along(sorted(self._seen.items()), tokens)
        if not self._seen:
            return self._guess(tokens)
        nearest = min(self._seen)
        return self._seen[nearest] * self._guess(tokens) / self._guess(nearest)

    def _guess(self, tokens: int) -> float:
        """Return the seconds in units of their own, before anything is known."""
        return (1 + self._slope * tokens) * (self._kink if tokens == 1 else 1)

    def at_best(self, tokens: int) -> float:
        """Return the fewest seconds that what was seen leaves possible, near enough.

        More tokens take no less time; fewer than were ever seen take at least as much as the square
        root of their share. After the largest size seen the line goes on; more than twice as many
        tokens cost as much as was guessed before anything was seen, so that sizes are tried one
        after the other.
        """
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
        """Learn that a step of ``tokens`` took ``seconds``."""
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


class TreeSizer:
    """Chooses the size of the next tree, and learns from what came of the ones before.

    The expected gain of a tree is the sum of its nodes' probabilities, and what later steps learn
    from it (:data:`LESSON`). Whether the probabilities hold for this model and text is learned from
    what was accepted: the guesses' share is scaled by accepted over expected.

    Args:
        times: of a step.
        rows: of the batch.
    """

    def __init__(self, times: StepTimes, rows: int):
        self._times, self._rows = times, rows
        self._expected = self._accepted = 10.0  # guesses, with slow forgetting
        self._size = 1  # that was chosen last

    @property
    def reach(self) -> int:
        """Nodes to look at next: more are not worth the time to draft them, from one step to the
        next.
        """
        return reach_of(self._size)

    def choose(self, expected: list[float], sizes: tuple[int, ...] = SIZES) -> int:
        """Return the size with the most tokens per second.

        Args:
            expected: ``expected[n]`` guesses are accepted of n + 1 nodes, per row.
            sizes: to choose from; the smallest is 1.
        """
        trust = self._accepted / self._expected
        self._size = max(
            (size for size in sizes if size <= len(expected)),
            key=lambda size: (
                (1 + trust * (expected[size - 1] + LESSON * sqrt(size)))
                / self._times.at_best(self._rows * size)
            ),
        )
        return self._size

    def observe(self, nodes: int, expected: float, accepted: float, seconds: float) -> None:
        """Learn from a step with a tree of ``nodes`` nodes that took ``seconds``: of ``expected``
        accepted guesses per row, ``accepted`` were.
        """
        self._times.observe(self._rows * nodes, seconds)
        self._expected += expected - 0.02 * self._expected
        self._accepted += accepted - 0.02 * self._accepted


def expected_accepts(probability: Tensor) -> list[float]:
    """Return how many guesses are expected to be accepted of the first n + 1 nodes, by n: the mean
    over the rows of ``probability`` [B, N]. Waits for the device.
    """
    mean = probability[0] if len(probability) == 1 else probability.mean(0)
    return list(accumulate(mean.tolist(), initial=-1.0))[1:]
