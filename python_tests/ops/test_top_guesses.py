"""top_guesses against its specification and the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    CPU_DTYPES,
    assert_equal,
    one_thread,
    padded,
    seeded,
    specified,
    threads,
)
from helpers.knowledge import guess
from msn_ext import ops

VALUES = ["normal", "ties", "constant", "any bits"]
PLACES = ["contiguous", "slice", "every other", "transposed", "expanded"]
STORAGE = dict(zip(CPU_DTYPES, [torch.int32, torch.int64, torch.int16, torch.int16]))


def on(device: str, dtype: torch.dtype) -> torch.dtype:
    """A dtype that the device has."""
    return torch.float32 if device == "cuda" and dtype == torch.float64 else dtype


def special_bits(dtype: torch.dtype) -> list[int]:
    """Zeros, infinities, the least and the largest NaN and the smallest number, all with both
    signs.
    """
    sign, infinity = (
        torch.tensor(x, dtype=dtype).view(STORAGE[dtype]).item() for x in (-0.0, float("inf"))
    )
    patterns = [0, 1, infinity, infinity + 1, -sign - 1]
    return [*patterns, *(sign + x for x in patterns)]


def random_logits(
    values: str, rows: int, vocabulary: int, dtype, specials: int, seed: int
) -> torch.Tensor:
    source, storage = seeded(seed), STORAGE[dtype]
    if values == "any bits":
        limits = torch.iinfo(storage)
        bits = torch.randint(limits.min, limits.max, (rows, vocabulary), generator=source).to(
            storage
        )
    else:
        scale = {"normal": 3.0, "ties": 1.0, "constant": 0.0}[values]
        numbers = torch.randn(rows, vocabulary, generator=source, dtype=torch.float64) * scale
        bits = (numbers.round() if values == "ties" else numbers).to(dtype).view(storage)
    patterns = special_bits(dtype)
    for _ in range(specials if bits.numel() else 0):
        row, token, which = (
            int(torch.randint(n, (), generator=source)) for n in (rows, vocabulary, len(patterns))
        )
        bits[row, token] = patterns[which]
    return bits.view(dtype)


def lay_out(x: torch.Tensor, place: str) -> torch.Tensor:
    """The same values with other strides, between NaN."""
    rows, vocabulary = x.shape
    nan = float("nan")
    if place == "contiguous":
        return x
    if place == "expanded":
        return x[:1].expand(rows, vocabulary)
    view = {
        "slice": lambda: x.new_full((rows + 1, vocabulary + 3), nan)[1:, 1:-2],
        "every other": lambda: x.new_full((rows, 2 * vocabulary), nan)[:, ::2],
        "transposed": lambda: x.new_full((vocabulary, rows), nan).t(),
    }[place]()
    view.view(STORAGE[x.dtype]).copy_(
        x.view(STORAGE[x.dtype])
    )  # so that every NaN stays the one it is
    return view


def check_guesses(logits: torch.Tensor) -> torch.Tensor:
    """Against the specification, the oracle and torch.argmax; returns rows of guesses."""
    got = ops.top_guesses(logits)
    assert_equal(got, specified("top_guesses", logits=logits))
    rows = logits.cpu().reshape(-1, logits.shape[-1])
    found = got.view(len(rows), 8)
    assert_equal(found[:, 0] >> 4, logits.argmax(-1).flatten().int())
    for row, guesses in zip(rows, found.tolist()):
        tokens, levels = oracle.top(row)
        assert [g // 16 for g in guesses] == padded([tokens], 8)[0]
        assert all(g % 16 in allowed for g, allowed in zip(guesses, levels))
    return found


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 0)])
def test_guesses_of_no_vocabulary_are_refused_by_name(device, shape):
    with pytest.raises(ValueError, match="logits"):
        ops.top_guesses(torch.zeros(shape, device=device))


def test_guesses_of_no_rows_take_any_strides(device):
    assert ops.top_guesses(torch.zeros(0, 10, device=device)[:, ::2]).shape == (0, 8)


@given(
    values=st.sampled_from(VALUES),
    place=st.sampled_from(PLACES),
    rows=st.integers(0, 3),
    vocabulary=st.integers(1, 12) | st.sampled_from([255, 256, 257, 300, 513]),
    dtype=st.sampled_from(CPU_DTYPES),
    specials=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_guesses_of_random_logits(device, values, place, rows, vocabulary, dtype, specials, seed):
    logits = random_logits(values, rows, vocabulary, on(device, dtype), specials, seed).to(device)
    check_guesses(lay_out(logits, place if rows else "contiguous"))


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("vocabulary", [1000, 49_152, 65_537])
def test_guesses_of_large_vocabularies(device, dtype, vocabulary):
    """In float16 and bfloat16 the best of so many are equal."""
    check_guesses(random_logits("normal", 2, vocabulary, on(device, dtype), 0, 1).to(device))


@pytest.mark.parametrize(
    "shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (1, 2, 1, 2, 7), (0, 7), (2, 0, 7)]
)
def test_guesses_take_any_leading_dimensions(device, shape):
    logits = torch.randn(shape, generator=seeded(0)).to(device)
    assert check_guesses(logits).shape == (logits.numel() // 7, 8)
    assert ops.top_guesses(logits).shape == (*shape[:-1], 8)


@pytest.mark.parametrize(
    "equal, level", [(1, 11), (2, 6), (3, 4), (4, 4), (5, 4), (6, 3), (7, 3), (8, 3), (9, 3)]
)
def test_a_probability_on_an_edge_has_the_level_above_it(device, equal, level):
    """One of two equals has 0.5 and one of five 0.2, which are edges; the lowest tokens of equals
    come first.
    """
    logits = torch.full((20,), -float("inf"), device=device)
    logits[2 : 2 + equal] = 3.0
    found = check_guesses(logits)[0].tolist()
    best = [guess(token, level) for token in range(2, 2 + equal)][:8]
    rest = [guess(token) for token in (0, 1, *range(2 + equal, 20))]
    assert found == [*best, *rest][:8]


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), -float("inf")])
def test_guesses_where_no_softmax_is_have_the_lowest_level(device, logit):
    logits = torch.zeros(20, device=device)
    logits[7] = logits[5] = logit
    first = [0, 1, 2, 3, 4, 6, 8, 9] if logit == -float("inf") else [5, 7, 0, 1, 2, 3, 4, 6]
    levels = check_guesses(logits)[0] & 15
    assert (check_guesses(logits)[0] >> 4).tolist() == first
    assert set(levels.tolist()) == ({3} if logit == -float("inf") else {0})
    logits[:] = logit
    assert check_guesses(logits)[0].tolist() == [guess(token) for token in range(8)]


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_guesses_would_notice_a_changed_logit(device, dtype):
    """Negative control: of the eight best every single one counts, and of the rest none."""
    logits = torch.randperm(50, generator=seeded(0)).to(device, on(device, dtype)).repeat(2, 1) / 8
    before = ops.top_guesses(logits)
    assert (before >> 4).tolist() == logits.argsort(-1, descending=True)[:, :8].tolist()
    for token in range(50):
        changed = logits.clone()
        changed[0, token] = -1
        after = ops.top_guesses(changed)
        assert torch.equal(after[0], before[0]) == (token not in (before[0] >> 4).tolist())
        assert torch.equal(after[1], before[1])


def test_a_vocabulary_that_guesses_cannot_hold_is_refused(device):
    logits = torch.empty(1, 2**27 + 1, dtype=torch.float16, device=device)  # never read
    with pytest.raises(ValueError, match=r"logits is 134217729; expected 1 to 134217728"):
        ops.top_guesses(logits)


def test_guesses_ignore_threads():
    logits = torch.randn(65, 5000, generator=torch.Generator().manual_seed(0))
    with threads(4):
        together = ops.top_guesses(logits)
    with one_thread():
        assert torch.equal(ops.top_guesses(logits), together)


def test_many_rows_are_shared_by_threads_and_stay_the_same():
    logits = torch.randn(12, 50_000, generator=seeded(0)).round(decimals=1)  # full of equals
    logits[3, 40_000:40_010], logits[4, 49_999] = float("nan"), float("nan")
    every = ops.top_guesses(logits)
    assert_equal(every, torch.cat([ops.top_guesses(row[None]) for row in logits]))
    assert_equal(every[:, 0] >> 4, logits.argmax(-1).int())
