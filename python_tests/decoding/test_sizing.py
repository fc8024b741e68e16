"""The size of a tree follows the time of a step and what came true."""

import copy
import math
import random

import pytest

from helpers.drafters import passes
from helpers.sizing import PlainSizer, PlainTimes
from msn_ext.decoding import BestFirst
from msn_ext.decoding.sizing import LESSON, SIZES, StepTimes, TreeSizer


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("curve", [None, {1: 3.0, 4: 3.5, 8: 3.4, 64: 20.0}])
def test_sizes_are_those_of_the_plain_form(device, curve):
    """Step by step, by whatever was seen; and so are the times that they are chosen by."""
    generator = random.Random(0)
    for rows in range(1, 40):
        times, plain = StepTimes(curve, device), PlainTimes(curve, device)
        ours, theirs = TreeSizer(times, rows), PlainSizer(plain, rows)
        for _ in range(60):
            expected = [0.0]
            while len(expected) < ours.reach:
                expected.append(expected[-1] + generator.random() / (1 + len(expected)))
            nodes = ours.choose(expected)
            assert nodes == theirs.choose(expected, SIZES)
            seconds = generator.choice([1.0, 1.0, 5.0]) * generator.uniform(0.8, 1.2) * (3 + nodes)
            step = nodes, expected[nodes - 1], generator.choice([0, 0, 1, 3]), seconds
            ours.observe(*step)
            theirs.observe(*step)
        for tokens in (*range(1, 130), 1000):
            assert times(tokens) == pytest.approx(plain(tokens), rel=1e-12)
            assert times.at_best(tokens) == pytest.approx(plain.at_best(tokens), rel=1e-12)


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
    rate = {n: (1 + expected[n - 1] + LESSON * math.sqrt(n)) / times(n) for n in SIZES}
    assert sizer.choose(expected) == max(SIZES, key=rate.get) == 12
    for _ in range(400):
        sizer.observe(12, 2.0, 0.0, 1.0)  # nothing ever comes true
    assert sizer.choose(expected) == 1
    assert TreeSizer(times, rows=64).choose(expected) == 1, "a large batch has no time to spare"
    assert TreeSizer(times, rows=1).choose(expected[:1]) == 1


def test_a_larger_tree_is_worth_what_is_learned_from_it():
    """Where nothing is known, a tree of one node would learn least and stay."""
    nearly_free = StepTimes({1: 1.0, 8: 1.02, 16: 1.3}, "cpu")
    assert TreeSizer(nearly_free, rows=1).choose([0.001 * n for n in range(64)]) == 8


def test_a_drafter_can_be_copied():
    """Its copy knows how long steps take."""
    drafter = BestFirst()
    passes(drafter)
    other = copy.deepcopy(drafter)
    assert other._times is drafter._times
    assert passes(other) and other._sizer is not drafter._sizer


def test_trees_grow_from_step_to_step():
    """More nodes are looked at next, if more pay than are looked at now."""
    sizer = TreeSizer(StepTimes({1: 1.0, 512: 1.0}, "cpu"), rows=1)
    seen = []
    for _ in range(4):
        seen.append(sizer.reach)
        sizer.choose([0.1 * n for n in range(sizer.reach)])
    assert seen == [16, 64, 128, 128]


CURVES = {  # milliseconds of a step by nodes
    "flat to 8": lambda n: 7 + (n - 1) / 7 if n <= 8 else 8 + 0.5 * (n - 8),
    "flat to 16": lambda n: 8 + 0.5 * max(0, n - 16),
    "linear from the start": lambda n: 7 + 0.5 * (n - 1),
    "a node costs a step": lambda n: 1 + n,
    "flat throughout": lambda n: 8.0,
    "one is cheap": lambda n: 10 + 0.3 * n if n > 1 else 6.0,
}
GAINS = {  # guesses that are accepted, by guesses
    "many": lambda n: 3 * (1 - math.exp(-n / 12)),
    "some": lambda n: 1.2 * (1 - math.exp(-n / 5)),
    "few": lambda n: 0.3 * (1 - math.exp(-n / 3)),
    "ever more": lambda n: 0.25 * math.log2(1 + n),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("gain", GAINS.values(), ids=GAINS)
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_the_best_budget_is_found_within_ten_steps(curve, gain, noise, device):
    """Without a measured curve: from then on the rate is within 10 % of the best fixed budget's,
    retries of other sizes included, and what later steps learn from a tree.
    """
    worth = {n: 1 + gain(n - 1) + LESSON * math.sqrt(n) for n in SIZES}
    generator, sizer = random.Random(0), TreeSizer(StepTimes(None, device), rows=1)
    chosen = []
    for step in range(74):
        expected = [gain(n) for n in range(sizer.reach)]
        nodes = sizer.choose(expected)
        chosen.append(nodes)
        seconds = curve(nodes) * generator.uniform(1 - noise, 1 + noise) / 1e3
        warm_up = 0.2 if step == 0 else 0.0
        sizer.observe(nodes, expected[nodes - 1], expected[nodes - 1], seconds + warm_up)
    best = max(worth[n] / curve(n) for n in SIZES)
    for later in (chosen[10:42], chosen[42:]):
        rate = sum(worth[n] for n in later) / sum(curve(n) for n in later)
        assert rate > 0.9 * best, chosen


def test_a_size_that_was_seen_once_in_a_bad_moment_is_tried_again():
    times = StepTimes(None, "cpu")
    sizer = TreeSizer(times, rows=1)
    curve, expected = CURVES["flat to 8"], [GAINS["some"](n) for n in range(16)]
    for size in (1, 1, 4, 8, 16):  # something else takes the machine in the only step of 8
        times.observe(size, 3 * curve(size) / 1e3 if size == 8 else curve(size) / 1e3)
    chosen = []
    for _ in range(400):
        chosen.append(sizer.choose(expected))
        times.observe(chosen[-1], curve(chosen[-1]) / 1e3)
    assert chosen[-100:].count(8) > 50
