"""lookup_ngram against its specification and the oracle."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    assert_equal,
    integers,
    padded,
)
from msn_ext import ops
from msn_ext.ops import reference


def check_lookup(
    texts: list[list[int]], after: list[list[int]], max_ngram: int, length: int, device: str
) -> None:
    """``after`` is what lies in the history after each text."""
    width = max(len(t) + len(p) for t, p in zip(texts, after))
    history = integers(padded([t + p for t, p in zip(texts, after)], width), device)
    lengths = integers([len(t) for t in texts], device)
    got = ops.lookup_ngram(history, lengths, max_ngram, length)
    assert_equal(got, reference.lookup_ngram(history, lengths, max_ngram, length))
    found, matched = zip(*(oracle.lookup(t, max_ngram, length) for t in texts))
    assert got[0].tolist() == padded(found, length) and got[1].tolist() == list(matched)


@st.composite
def texts(draw) -> list[int]:
    alphabet = st.integers(0, draw(st.integers(0, 3)))
    return draw(st.lists(alphabet, min_size=1, max_size=60))


@given(
    rows=st.lists(texts(), min_size=1, max_size=3),
    max_ngram=st.integers(1, 8) | st.just(2**20),
    length=st.integers(0, 12),
)
def test_lookup_in_random_texts(device, rows, max_ngram, length):
    """Behind every text lies a longer match than any in it."""
    check_lookup(rows, [row * 2 for row in rows], max_ngram, length, device)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1023, 1024, 1025, 5000])
def test_lookup_in_long_texts(device, size):
    rng = random.Random(size)
    rows = [[rng.randrange(top) for _ in range(size)] for top in (2, 50, 10**9)]
    check_lookup(rows, [[], [1, 2], [3]], 4, 5, device)


def test_lookup_never_matches_itself(device):
    tokens, matched = ops.lookup_ngram(
        integers([[1, 2, 3, 4], [7, 0, 0, 0]], device), integers([4, 1], device), 3, 2
    )
    assert tokens.tolist() == [[-1, -1]] * 2 and matched.tolist() == [0, 0]


def test_lookup_takes_the_most_recent_of_equal_matches_and_the_longest_of_all(device):
    recent = [1, 2, 8, 1, 2, 9, 1, 2]
    longest = [5, 1, 2, 8, 7, 2, 9, 5, 1, 2]
    for text, expected, size in [(recent, [9, 1, 2], 2), (longest, [8, 7, 2], 3)]:
        tokens, matched = ops.lookup_ngram(
            integers([text], device), integers([len(text)], device), 3, 3
        )
        assert tokens.tolist() == [expected] and matched.tolist() == [size]


def test_lookup_would_notice_what_lies_past_the_text(device):
    """Negative control: one token more, and the match past the text counts."""
    history = integers([[1, 2, 3, 9, 1, 2, 3]], device)
    shorter = ops.lookup_ngram(history, integers([6], device), 3, 2)
    longer = ops.lookup_ngram(history, integers([7], device), 3, 2)
    assert [x.tolist() for x in shorter] == [[[3, 9]], [2]] and [x.tolist() for x in longer] == [
        [[9, 1]],
        [3],
    ]
