"""The size of a tree: the time of a step, learned while decoding, against what its nodes are
expected to gain.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from torch import Tensor

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Trees that are considered."""
CAPTURED_SIZES = (1, 8, 16, 32, 64, 128)
"""The same where steps are captured, since each size costs a capture (:mod:`.runner`)."""
FIRST_CAPTURED_SIZE = 16
"""The one to begin with there, before anything is known of the text."""
MEMORY = 0.95  # what the past still counts after one more step
OUTLIER = 2.0  # a step that took so many times what was expected counts as one that took just that


def reach_of(size: int) -> int:
    """Return how many nodes to look at after a tree of ``size``."""
    return min(max(16, 4 * size), SIZES[-1])


class StepTimes:
    """Seconds of a step by the tokens that it computes, rows of the batch times nodes of a tree.

    Where a curve of whole steps was measured (``msn tune``), that is it. Where it is of forward
    passes (the native engine's), the rest of a step is learned from the steps seen. Without a
    curve, a straight line is fitted to them, and one token, which CPUs compute in another way than
    several, is a point of its own. What has not been seen yet is taken for cheap, and so is tried.

    Args:
        curve: tokens and seconds of measured steps or passes; linear between them, the last two's
            line after them.
        device_type: ``"cpu"`` or another; without a curve, a first guess of what a token adds to a
            step.
        of_passes: the curve is of forward passes alone.
    """

    def __init__(self, curve: dict[int, float] | None, device_type: str, of_passes: bool = False):
        points = sorted(curve.items()) if curve else []
        # More tokens never take less time: what says so is noise.
        self._curve = list(
            zip((n for n, _ in points), accumulate((seconds for _, seconds in points), max))
        )
        self._rest = 0.0  # of a step, beside the curve's part of it
        self._rests = 0 if of_passes else None  # steps that it was learned from
        self._slope, self._kink = (0.03, 0.7) if device_type == "cpu" else (0.001, 1.0)
        self._single: float | None = None
        self._singles = 0  # steps that it was learned from
        self._cold = True  # the first step of all warms up, and says nothing
        self._sums = [0.0] * 5  # of 1, x, y, x x, x y over the steps of several tokens

    def __call__(self, tokens: int) -> float:
        """Return the expected seconds; before anything was measured or seen, in units of their
        own.
        """
        if self._curve:
            return _along(self._curve, tokens) + self._rest
        if tokens == 1 and self._single is not None:
            return self._single
        several = self._line(tokens)
        return several * self._kink if tokens == 1 else several

    def _line(self, tokens: float) -> float:
        n, x, y, xx, xy = self._sums
        if n == 0:
            return (1 + self._slope * tokens) * (self._single or self._kink) / self._kink
        middle, spread = x / n, xx - x * x / n
        # Where few sizes were seen, the slope is mostly the first guess.
        guess, weight = self._slope * y / (n + self._slope * x), 100.0
        slope = max(0.0, (xy - x * y / n + weight * guess) / (spread + weight))
        return max(y / n + slope * (tokens - middle), 0.1 * y / n)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn that a step of ``tokens`` took ``seconds``."""
        if self._curve and self._rests is None:
            return
        if self._cold:
            self._cold = False
            return
        if self._curve:
            self._learn_rest(tokens, seconds)
            return
        if self._single if tokens == 1 else self._sums[0]:
            expected = self(tokens)
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        if tokens == 1:
            self._singles += 1
            before = seconds if self._single is None else self._single
            self._single = before + max(1 - MEMORY, 1 / self._singles) * (seconds - before)
        else:
            new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
            self._sums = [MEMORY * old + value for old, value in zip(self._sums, new)]

    def _learn_rest(self, tokens: int, seconds: float) -> None:
        assert self._rests is not None
        of_pass = _along(self._curve, tokens)
        rest = min(max(seconds - of_pass, 0.0), OUTLIER * (of_pass + self._rest) - of_pass)
        self._rests += 1
        self._rest += max(1 - MEMORY, 1 / self._rests) * (rest - self._rest)


def _along(points: list[tuple[int, float]], x: float) -> float:
    """Return the value at ``x``: linear between the points, the first one's before them, on the
    line of the last two after them.
    """
    at = min(bisect_left(points, (x,)), len(points) - 1)
    if at == 0:
        return points[0][1]
    (x0, y0), (x1, y1) = points[at - 1 : at + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class TreeSizer:
    """Chooses the size of the next tree, and learns from what came of the ones before.

    The expected gain of a tree is the sum of its nodes' probabilities. Whether they hold for this
    model and text is learned from what was accepted: the guesses' share is scaled by accepted over
    expected.

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
            key=lambda size: (1 + trust * expected[size - 1]) / self._times(self._rows * size),
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
    return (probability.mean(0).cumsum(0) - 1).tolist()
