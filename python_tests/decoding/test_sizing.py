"""The size of a tree follows the time of a step and what came true."""

from random import Random

import pytest

from helpers.drafters import passes
from msn_ext.decoding import BestFirst
from msn_ext.decoding.forward.native import TIMED
from msn_ext.decoding.sizing import SIZES, StepTimes, TreeSizer


def test_the_size_follows_the_time_of_a_step():
    """Nothing is drafted where a node costs a whole step, the largest tree where nodes are free."""
    free, dear = StepTimes({1: 1.0, 512: 1.0}, "cpu"), StepTimes({1: 1.0, 512: 512.0}, "cpu")
    for times in (free, dear):
        times.observe = lambda tokens, seconds: None
    sizes = {}
    for name, times in (("free", free), ("dear", dear)):
        drafter, sizes[name] = BestFirst(times=times), []
        propose = drafter.propose
        drafter.propose = lambda *text, propose=propose, seen=sizes[name]: (
            draft := propose(*text),
            seen.append(len(draft)),
        )[0]
        passes(drafter)
    assert set(sizes["dear"]) == {1}
    assert sizes["free"][5:] and min(sizes["free"][5:]) > 16


@pytest.mark.parametrize("device, kink", [("cpu", 0.6), ("cpu", 1.0), ("cuda", 1.0)])
def test_step_times_learn_what_they_are_shown(device, kink):
    times = StepTimes(None, device)

    def truth(tokens):
        return 0.01 * (1 + 0.05 * tokens) * (kink if tokens == 1 else 1)

    assert times(1) < times(8) < times(64)
    times.observe(8, 50.0)  # the first step of all allocates, loads, compiles
    for tokens in (8, 1, 64):
        times.observe(tokens, truth(tokens))
        assert times(tokens) == pytest.approx(truth(tokens), rel=0.4)
    for tokens in (1, 8, 64) * 15:
        times.observe(tokens, truth(tokens))
    for tokens in (1, 8, 24, 64):
        assert times(tokens) == pytest.approx(truth(tokens), rel=0.02)
    times.observe(8, 100.0)  # somebody stopped the machine
    assert times(8) == pytest.approx(truth(8), rel=0.25)
    for tokens in (1, 64) * 20:  # another program has come, everything takes longer
        times.observe(tokens, 3 * truth(tokens))
    assert times(64) == pytest.approx(3 * truth(64), rel=0.2) and times(1) == pytest.approx(
        3 * truth(1), rel=0.3
    )


def test_measured_step_times_are_read_between_and_after():
    times = StepTimes({16: 4.0, 1: 1.0, 8: 2.0, 12: 1.9}, "cuda")
    assert [times(n) for n in (1, 8, 12, 14, 16, 24)] == [1.0, 2.0, 2.0, 3.0, 4.0, 8.0]
    times.observe(8, 50.0)
    assert times(8) == 2.0
    assert StepTimes({4: 2.0}, "cpu")(100) == 2.0


def test_the_budget_is_the_best_rate_and_trusts_what_came_true():
    times = StepTimes({1: 1.0, 101: 2.0}, "cpu")
    expected = [min(2.0, 0.2 * n) for n in range(SIZES[-1])]
    sizer = TreeSizer(times, rows=1)
    rate = {n: (1 + expected[n - 1]) / times(n) for n in SIZES}
    assert sizer.choose(expected) == max(SIZES, key=rate.get) == 12
    for _ in range(400):
        sizer.observe(12, 2.0, 0.0, 1.0)  # nothing ever comes true
    assert sizer.choose(expected) == 1
    assert TreeSizer(times, rows=64).choose(expected) == 1, "a large batch has no time to spare"
    assert TreeSizer(times, rows=1).choose(expected[:1]) == 1


def test_trees_grow_from_step_to_step():
    """More nodes are looked at next, if more pay than are looked at now."""
    sizer = TreeSizer(StepTimes({1: 1.0, 512: 1.0}, "cpu"), rows=1)
    seen = []
    for _ in range(4):
        seen.append(sizer.reach)
        sizer.choose([0.1 * n for n in range(sizer.reach)])
    assert seen == [16, 64, 128, 128]


def test_of_passes_the_rest_of_a_step_is_learned():
    times = StepTimes({1: 1.0, 8: 1.0, 16: 2.0}, "cpu", of_passes=True)
    assert times(1) == 1.0 and times(16) == 2.0
    times.observe(8, 70.0)  # the first step of all
    for tokens in (1, 8, 16, 12) * 3:
        times.observe(tokens, times._curve[0][1] * max(1, tokens / 8) + 0.25)
    assert [times(n) for n in (1, 8, 12, 16)] == pytest.approx([1.25, 1.25, 1.75, 2.25])
    for _ in range(60):
        times.observe(1, 0.5)  # faster than was measured
    assert times(1) < 1.02, "less than nothing is no rest"


CURVES = {
    "flat to 8": lambda n: max(8, n) / 8,
    "flat to 16": lambda n: max(16, n) / 16,
    "rising from the first": lambda n: 0.5 + 0.5 * n,
    "flat throughout": lambda n: 1.0,
    "one is dearer a node": lambda n: 1.0 if n < 4 else 1.1 + 0.02 * n,
}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", CURVES)
def test_ten_steps_find_the_size_that_pays(name, noise):
    """From the eleventh step on, sizes gain within a tenth of what the best one does, where passes
    were timed before, each off by up to ``noise``, and the rest of a step was not.
    """
    curve, rest, random = CURVES[name], 0.1, Random(name)
    known = {n: curve(n) * random.uniform(1, 1 + noise) for n in TIMED}
    sizer = TreeSizer(StepTimes(known, "cpu", of_passes=True), rows=1)
    expected = [sum(0.45 * 0.9**i for i in range(n)) for n in range(SIZES[-1])]

    def rate(size: int) -> float:
        return (1 + expected[size - 1]) / (curve(size) + rest)

    best = max(map(rate, SIZES))
    for step in range(60):
        size = sizer.choose(expected)
        if step >= 10:
            assert rate(size) >= 0.9 * best, (step, size)
        gained = expected[size - 1] * random.uniform(0.7, 1.3)
        seconds = (curve(size) + rest) * random.uniform(1, 1 + noise)
        sizer.observe(size, expected[size - 1], gained, seconds)
