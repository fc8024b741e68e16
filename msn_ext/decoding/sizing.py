"""The size of a tree: the time of a step, learned while decoding, against what its nodes are
expected to gain. Asked in every step, so it is computed in C++ (``csrc/sizing.h``).
"""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor

from msn_ext import _C

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Trees that are considered."""
CAPTURED_SIZES = (1, 8, 16, 32, 64, 128)
"""The same where steps are captured, since each size costs a capture (:mod:`.runner`)."""
FIRST_CAPTURED_SIZE = 16
"""The one to begin with there, before anything is known of the text."""
LESSON = 0.1
"""Tokens that a tree of one node is worth for later steps, since what the model says at every node
is remembered; one of n nodes, the square root of n times as much. Fitted to whole answers: without
it, trees stay small where little is known, and so does what is known."""
FIRST_GUESS = {"cpu": (0.03, 0.7)}
FIRST_GUESS_ELSEWHERE = 0.001, 1.0
"""By device type, before anything was seen: what a token adds to a step, as a share, and what is
left of that step where it is the only one."""


def reach_of(size: int) -> int:
    """Return how many nodes to look at after a tree of ``size``."""
    return min(max(16, 4 * size), SIZES[-1])


class StepTimes(_C.StepTimes):
    """Seconds of a step by the tokens that it computes, rows of the batch times nodes of a tree.

    Where a curve was measured (``msn tune``), that is it. Else every size that was seen has its
    own time, with lines between them. What has not been seen yet, or not for long, is taken for as
    cheap as the others allow, and so is tried.

    ``at_best(tokens)`` are the fewest seconds that seem possible; ``observe(tokens, seconds)``
    learns from a step.

    Args:
        curve: tokens and seconds of measured steps; linear between them, the last two's line
            after them.
        device_type: ``"cpu"`` or another; without a curve, a first guess of what a token adds to a
            step.
    """

    def __init__(self, curve: dict[int, float] | None, device_type: str):
        guess = FIRST_GUESS.get(device_type, FIRST_GUESS_ELSEWHERE)
        super().__init__(sorted((curve or {}).items()), *guess)

    def __call__(self, tokens: int) -> float:
        """Return the expected seconds; before anything was measured or seen, in units of their
        own.
        """
        return self.of(tokens)

    def __deepcopy__(self, memo: dict) -> StepTimes:
        return self  # they are a machine's and a model's, whoever drafts


class TreeSizer(_C.TreeSizer):
    """Chooses the size of the next tree, and learns from what came of the ones before.

    The expected gain of a tree is the sum of its nodes' probabilities, and what later steps learn
    from it (:data:`LESSON`). Whether the probabilities hold for this model and text is learned from
    what was accepted: the guesses' share is scaled by accepted over expected.

    ``observe(nodes, expected, accepted, seconds)`` learns from a step with a tree of ``nodes``
    nodes: of ``expected`` accepted guesses per row, ``accepted`` were.

    Args:
        times: of a step.
        rows: of the batch.
    """

    def __init__(self, times: StepTimes, rows: int):
        super().__init__(times, rows, LESSON)

    @property
    def reach(self) -> int:
        """Nodes to look at next: more are not worth the time to draft them, from one step to the
        next.
        """
        return reach_of(self.size())

    def choose(self, expected: list[float], sizes: tuple[int, ...] = SIZES) -> int:
        """Return the size with the most tokens per second.

        Args:
            expected: ``expected[n]`` guesses are accepted of n + 1 nodes, per row.
            sizes: to choose from, from 1 upwards.
        """
        return super().choose(expected, sizes)

    def __deepcopy__(self, memo: dict) -> TreeSizer:
        return self  # a drafter's copy makes another one when it starts


def expected_accepts(probability: Tensor) -> list[float]:
    """Return how many guesses are expected to be accepted of the first n + 1 nodes, by n: the mean
    over the rows of ``probability`` [B, N]. Waits for the device.
    """
    mean = probability[0] if len(probability) == 1 else probability.mean(0)
    return list(accumulate(mean.tolist(), initial=-1.0))[1:]
