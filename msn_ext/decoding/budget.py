"""How many nodes pay: the time of a step, learned while decoding, against what its nodes are expected to gain."""

from __future__ import annotations

from bisect import bisect_left

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Trees that are considered."""
RATE = 0.2  # of forgetting
OUTLIER = 2.0  # a step that took so many times what was expected counts as one that took just that


class StepTimes:
    """Seconds of a step by the tokens that it computes, rows of the batch times nodes of a tree.

    Begins with a curve (measured by ``msn tune``, else a straight line that suits the kind of device) and
    corrects it, at every size that has been used, by what was seen there; sizes in between by what was
    seen on either side.

    Args:
        curve: tokens and seconds of measured steps; None: relative guesses by ``device_type``.
        device_type: ``"cpu"`` (a token costs 3 % of a step) or another (0.1 %).
    """

    def __init__(self, curve: dict[int, float] | None, device_type: str):
        slope = 0.03 if device_type == "cpu" else 0.001
        self._curve = sorted((curve or {1: 1.0 + slope, 101: 1.0 + 101 * slope}).items())
        self._corrections: dict[int, float] = {}

    def __call__(self, tokens: int) -> float:
        """Expected seconds (without a measured curve, and before anything was seen, in units of their own)."""
        return _between(self._curve, tokens, beyond=True) * self._correction(tokens)

    def _correction(self, tokens: int) -> float:
        return _between(sorted(self._corrections.items()), tokens, beyond=False) if self._corrections else 1.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of ``tokens`` took ``seconds``."""
        seen = seconds / _between(self._curve, tokens, beyond=True)
        if not self._corrections:
            self._corrections[tokens] = seen
            return
        before = self._correction(tokens)
        seen = min(max(seen, before / OUTLIER), before * OUTLIER)
        first = tokens not in self._corrections
        self._corrections[tokens] = seen if first else before + RATE * (seen - before)


def _between(points: list[tuple[int, float]], x: float, beyond: bool) -> float:
    """Linear interpolation; outside the nearest value, or with ``beyond`` to the right the last two's line."""
    at = bisect_left(points, (x,))
    if at == 0:
        return points[0][1]
    if at == len(points):
        if not beyond or len(points) == 1:
            return points[-1][1]
        at -= 1
    (x0, y0), (x1, y1) = points[at - 1 : at + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class Budget:
    """Picks the size of a tree.

    The expected gain of a tree is the sum of its nodes' probabilities. Whether they hold for this model
    and text is learned from what was accepted: the guesses' share is scaled by accepted over expected.

    Args:
        times: of a step.
        rows: of the batch.
    """

    def __init__(self, times: StepTimes, rows: int):
        self._times, self._rows = times, rows
        self._expected = self._accepted = 10.0  # guesses, with slow forgetting

    def choose(self, expected: list[float]) -> int:
        """The size with the most tokens per second; ``expected[n]``: guesses accepted of n + 1 nodes, per row."""
        trust = self._accepted / self._expected
        sizes = [size for size in SIZES if size <= len(expected)]
        return max(sizes, key=lambda size: (1 + trust * expected[size - 1]) / self._times(self._rows * size))

    def observe(self, expected: float, accepted: float) -> None:
        """Of a tree with ``expected`` accepted guesses per row, ``accepted`` were."""
        self._expected += expected - 0.02 * self._expected
        self._accepted += accepted - 0.02 * self._accepted
