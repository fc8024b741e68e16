"""draw_noise: against its specification, what the paper says of noise, and chance."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cases import assert_equal, integers, one_thread, seeded
from msn_ext import ops
from msn_ext.ops import reference

NONE = -100


@st.composite
def batches(draw, device: str) -> dict:
    """Rows of several samples each, with responses anywhere in them, padding between them."""
    rows, columns = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 9, 30, 70]))
    rng = random.Random(draw(st.integers(0, 10**9)))
    vocabulary = draw(st.sampled_from([2, 5, 1000]))
    tokens = [[rng.randrange(vocabulary) for _ in range(columns)] for _ in range(rows)]
    few = draw(st.sampled_from([0.02, 0.2, 1.0]))  # how often a response begins or ends
    labels, on = [], rng.random() < 0.5
    for row in tokens:
        labels.append([])
        for token in row:
            on ^= rng.random() < few
            labels[-1].append(token if on else NONE)
    samples = []
    for row in range(rows):
        cuts = sorted(rng.randrange(columns + 1) for _ in range(rng.choice([2, 2, 4])))
        samples += [[row, begin, end] for begin, end in zip(cuts[::2], cuts[1::2])]
    rng.shuffle(samples)
    keep = sorted(rng.sample(range(vocabulary), rng.choice([0, 1, min(3, vocabulary)])))
    return {
        "input_ids": integers(tokens, device),
        "labels": integers(labels, device),
        "samples": integers(samples, device).reshape(-1, 3),
        "keep_token_ids": integers(keep, device),
        "starts": torch.full(
            (len(samples), draw(st.sampled_from([1, 2, 5, 40]))), -1, device=device
        ),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "length": draw(st.sampled_from([1, 2, 4, 64])),
        "random": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "vocabulary": vocabulary,
        "apart": draw(st.booleans()),
    }


def specified(arguments: dict):
    with one_thread():
        on_cpu = {
            name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
        }
        return tuple(x.to(arguments["input_ids"].device) for x in reference.draw_noise(**on_cpu))


@settings(max_examples=300)
@given(data=st.data())
def test_equals_the_specification(device, data):
    arguments = data.draw(batches(device))
    got = ops.draw_noise(**arguments)
    assert_equal(got, specified(arguments))
    # Starts that are given stay, and the noise there is what it was: all of them, and some of them.
    assert_equal(ops.draw_noise(**{**arguments, "starts": got[0]}), got)
    some = torch.where(torch.rand(got[0].shape, generator=seeded(0)).to(device) < 0.5, got[0], -1)
    assert_equal(
        ops.draw_noise(**{**arguments, "starts": some}), specified({**arguments, "starts": some})
    )


@settings(max_examples=300)
@given(data=st.data())
def test_noise_is_where_and_what_the_paper_says(device, data):
    """Written from the op's promises, not from the specification's code."""
    arguments = data.draw(batches(device))
    starts, noise = (x.tolist() for x in ops.draw_noise(**arguments))
    tokens, labels = arguments["input_ids"].tolist(), arguments["labels"].tolist()
    keep, length = set(arguments["keep_token_ids"].tolist()), arguments["length"]
    for (row, begin, end), places, drawn in zip(arguments["samples"].tolist(), starts, noise):
        response = {at for at in range(begin + 1, end) if labels[row][at] != NONE}
        covered: Counter = Counter()
        for start, segment in zip(places, drawn):
            if start < 0:
                assert set(segment) == {-1}
                continue
            assert start in response
            size = sum(token >= 0 for token in segment)
            assert segment[size:] == [-1] * (length - size)
            assert response >= set(range(start, start + size))
            if size < length:  # all of a short response
                assert start - 1 not in response and start + size not in response
            covered.update(range(start, start + size))
            for at, token in enumerate(segment[:size], start):
                clean = tokens[row][at]
                if clean in keep:
                    assert token == clean
                    continue
                before = set(tokens[row][begin:at]) - keep
                from_vocabulary = (
                    arguments["random"] > 0
                    and token not in keep
                    and token < arguments["vocabulary"]
                )
                assert token in before or from_vocabulary or (token == clean and not before)
        used = [start for start in places if start >= 0]
        assert len(used) == len(set(used)) and places == used + [-1] * (len(places) - len(used))
        if arguments["apart"]:
            assert not covered or max(covered.values()) == 1
        if len(used) < len(places) and not arguments["apart"]:  # every place was used
            runs = "".join("x" if at in response else " " for at in range(end)).split(" ")
            assert len(used) == sum(max(len(run) - length + 1, 1) for run in runs if run)


def one_sample(tokens: list[int], prompt: int, **options) -> dict:
    ids = integers([tokens])
    labels = ids.masked_fill(torch.arange(len(tokens)) < prompt, NONE)
    return {
        "input_ids": ids,
        "labels": labels,
        "samples": integers([[0, 0, len(tokens)]]),
        "keep_token_ids": integers([]),
        "starts": integers([[-1]]),
        "seed": 0,
        "length": 4,
    } | options


def chi_square(counts: Counter, places) -> float:
    """Standard deviations of the statistic over its mean, if all places were equally likely."""
    places = list(places)
    expected = sum(counts.values()) / len(places)
    assert set(counts) <= set(places)
    statistic = sum((counts[place] - expected) ** 2 / expected for place in places)
    free = len(places) - 1
    return (statistic - free) / math.sqrt(2 * free)


def draws(arguments: dict, rounds: int) -> list:
    return [
        tuple(x[0, 0].tolist() for x in ops.draw_noise(**{**arguments, "seed": seed}))
        for seed in range(rounds)
    ]


def test_starts_are_uniform():
    arguments = one_sample(list(range(40)), prompt=9)
    starts = Counter(start for start, _ in draws(arguments, 8000))
    assert chi_square(starts, range(9, 37)) < 4
    assert (
        chi_square(
            Counter(start for start, _ in draws(arguments, 4000) if start < 20), range(9, 20)
        )
        < 4
    )
    with pytest.raises(AssertionError):  # the test would see one place more
        assert chi_square(starts, range(9, 38)) < 4


def test_starts_are_uniform_over_several_responses():
    arguments = one_sample(list(range(40)), prompt=0)
    arguments["labels"][0, [0, 1, 2, 10, 20, 21, 24, 39]] = (
        NONE  # one of two tokens, which is short, is 22 and 23
    )
    places = [*range(3, 7), *range(11, 17), 22, *range(25, 36)]
    assert chi_square(Counter(start for start, _ in draws(arguments, 8000)), places) < 4


@pytest.mark.parametrize("random_share", [0.0, 1.0])
def test_noise_is_uniform_over_its_source(random_share):
    arguments = one_sample(list(range(100, 130)), prompt=20, random=random_share, vocabulary=50)
    by_place: dict = {}
    for start, segment in draws(arguments, 12000):
        for at, token in enumerate(segment, start):
            by_place.setdefault(at, Counter())[token] += 1
    for at, counts in by_place.items():
        assert chi_square(counts, range(50) if random_share else range(100, 100 + at)) < 4.5


def test_a_share_of_the_noise_is_random():
    arguments = one_sample(list(range(100, 130)), prompt=20, random=0.3, vocabulary=50)
    tokens = [token for _, segment in draws(arguments, 4000) for token in segment]
    assert sum(token < 50 for token in tokens) / len(tokens) == pytest.approx(0.3, abs=0.02)


def test_later_segments_are_uniform_where_there_is_room():
    arguments = one_sample(list(range(40)), prompt=9, starts=integers([[12, -1]]))
    second = Counter(
        int(ops.draw_noise(**{**arguments, "seed": seed})[0][0, 1]) for seed in range(6000)
    )
    assert chi_square(second, [*range(16, 37)]) < 4
    arguments["apart"] = False
    second = Counter(
        int(ops.draw_noise(**{**arguments, "seed": seed})[0][0, 1]) for seed in range(6000)
    )
    assert chi_square(second, [at for at in range(9, 37) if at != 12]) < 4


def test_what_is_drawn_belongs_to_the_sample(device):
    """Alone, in a batch, after padding or after another sample: the same noise at the same
    places.
    """
    rng = random.Random(0)
    samples = [[rng.randrange(90) for _ in range(rng.randrange(6, 60))] for _ in range(12)]
    responses = [rng.randrange(1, len(sample)) for sample in samples]

    def drawn(rows: list[list[int]], columns: int, gap: int, seed: int = 3) -> dict:
        tokens, labels = torch.full((len(rows), columns), 7), torch.full((len(rows), columns), NONE)
        bounds, names = [], []
        for row, members in enumerate(rows):
            at = gap
            for i in members:
                end = at + len(samples[i])
                tokens[row, at:end] = integers(samples[i])
                labels[row, at + responses[i] : end] = tokens[row, at + responses[i] : end]
                bounds.append([row, at, end])
                names.append(i)
                at = end + gap
        tokens, labels, bounds = (
            tokens.to(device),
            labels.to(device),
            integers(bounds, device),
        )
        starts = torch.full((len(bounds), 3), -1, device=device)
        found, noise = ops.draw_noise(
            tokens, labels, bounds, integers([5], device), starts, seed, 4, 0.4, 90
        )
        inside = torch.where(found < 0, found, found - bounds[:, 1:2])
        return {i: (a, b) for i, a, b in zip(names, inside.tolist(), noise.tolist())}

    alone = {i: drawn([[i]], len(samples[i]), 0)[i] for i in range(12)}
    assert drawn([[i] for i in range(12)], 70, 2) == alone
    assert drawn([[3, 1, 0], [2, 4], [11, 10, 9, 8, 7, 6, 5]], 500, 1) == alone
    assert len({str(value) for value in alone.values()}) == 12
    other = drawn([[i] for i in range(12)], 70, 2, seed=4)
    assert sum(other[i] != alone[i] for i in range(12)) >= 11


def test_nothing_is_drawn_where_there_is_no_response(device):
    tokens = torch.arange(12, device=device).view(2, 6)
    starts = torch.full((3, 2), -1, device=device)
    samples = integers([[0, 0, 6], [1, 2, 3], [1, 4, 4]], device)  # no label, one token, nothing
    labels = torch.stack([torch.full_like(tokens[0], NONE), tokens[1]])
    found, noise = ops.draw_noise(tokens, labels, samples, integers([], device), starts, 0, 4)
    assert found.eq(-1).all() and noise.eq(-1).all()
    found, noise = ops.draw_noise(
        tokens, labels, samples[:0], integers([], device), starts[:0], 0, 4
    )
    assert found.shape == (0, 2) and noise.shape == (0, 2, 4)


def test_inputs_are_left_alone():
    arguments = one_sample(list(range(40)), prompt=9)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    ops.draw_noise(**arguments)
    for name, x in before.items():
        assert_equal(arguments[name], x)
