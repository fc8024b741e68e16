"""index_suffixes against its specification and the oracle."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    assert_equal,
    integers,
    seeded,
    specified,
)
from helpers.knowledge import SLOTS, empty_suffixes, histories, texts
from msn_ext import ops


@given(rows=st.lists(texts(), min_size=0, max_size=3), slots=st.sampled_from(SLOTS), data=st.data())
def test_suffixes_of_random_texts(device, rows, slots, data):
    """At once, and in two pieces, of which the first may be empty and the second may begin too
    early or too late.
    """
    history, lengths = histories(rows, device)
    arguments = {"history": history, "start": torch.zeros_like(lengths), "lengths": lengths}
    suffixes = empty_suffixes(len(rows), slots, device)
    ops.index_suffixes(suffixes, **arguments)
    assert_equal(
        suffixes, specified("index_suffixes", suffixes=torch.zeros_like(suffixes), **arguments)
    )
    assert suffixes.tolist() == [oracle.places_table(row, slots) for row in rows]

    until = integers([data.draw(st.integers(0, len(row))) for row in rows], device)
    pieces = torch.zeros_like(suffixes)
    ops.index_suffixes(pieces, history, torch.zeros_like(until), until)
    assert pieces.tolist() == [
        oracle.places_table(row[:size], slots) for row, size in zip(rows, until.tolist())
    ]
    ops.index_suffixes(pieces, history, until, lengths)
    assert_equal(pieces, suffixes)
    ops.index_suffixes(pieces, history, lengths, lengths)
    ops.index_suffixes(pieces, history, lengths + 1, lengths)
    assert_equal(pieces, suffixes)


@given(rows=st.lists(texts(), min_size=1, max_size=3), slots=st.sampled_from(SLOTS), data=st.data())
def test_suffixes_from_a_place_on_leave_the_places_before_it_alone(device, rows, slots, data):
    """Whatever stands in the table stays, unless an n-gram after ``start`` takes its slot."""
    history, lengths = histories(rows, device)
    start = integers([data.draw(st.integers(0, len(row) + 3)) for row in rows], device)
    suffixes = (
        torch.randint(-(2**31), 2**31, (len(rows), 8, slots), generator=seeded(1)).int().to(device)
    )
    expected = specified(
        "index_suffixes", suffixes=suffixes, history=history, start=start, lengths=lengths
    )
    by_oracle = suffixes.clone()
    for b, (row, begin) in enumerate(zip(rows, start.tolist())):
        for level, size in enumerate(oracle.NGRAMS):
            for ngram, end in sorted(
                oracle.places(row, size, begin).items(), key=lambda item: item[1]
            ):
                by_oracle[b, level, oracle.hashed(ngram) % slots] = end
    ops.index_suffixes(suffixes, history, start, lengths)
    assert_equal(suffixes, expected)
    assert_equal(suffixes, by_oracle)


@pytest.mark.parametrize("size", [15, 16, 17, 18, 255, 256, 257, 2000])
def test_suffixes_of_long_texts(device, size):
    rows = [[random.Random(size + top).randrange(top) for _ in range(size)] for top in (1, 2, 1000)]
    history, lengths = histories(rows, device)
    arguments = {"history": history, "start": torch.zeros_like(lengths), "lengths": lengths}
    suffixes = empty_suffixes(3, 509, device)
    ops.index_suffixes(suffixes, **arguments)
    assert_equal(
        suffixes, specified("index_suffixes", suffixes=torch.zeros_like(suffixes), **arguments)
    )


def test_suffixes_take_strided_texts_no_slots_and_no_text(device):
    history, lengths = histories([[1, 2, 1, 2, 1], [3, 3, 3, 3, 3]], device)
    suffixes, strided = empty_suffixes(2, 64, device), empty_suffixes(2, 64, device)
    ops.index_suffixes(suffixes, history, lengths * 0, lengths)
    ops.index_suffixes(strided, history.t().contiguous().t(), lengths * 0, lengths)
    assert_equal(strided, suffixes)
    ops.index_suffixes(empty_suffixes(2, 0, device), history, lengths * 0, lengths)
    ops.index_suffixes(empty_suffixes(0, 4, device), history[:0], lengths[:0], lengths[:0])
    ops.index_suffixes(strided, history, lengths * 0, lengths * 0)
    assert_equal(strided, suffixes)


def test_suffixes_would_notice_a_changed_token(device):
    """Negative control: a changed token shows in its row, unless it is the last one or lies past
    the text.
    """
    text = list(range(20))
    history, lengths = histories([text, text], device)
    before = empty_suffixes(2, 4096, device)
    ops.index_suffixes(before, history, lengths * 0, lengths)
    for place in range(history.shape[1]):
        changed = history.clone()
        changed[0, place] = 77
        suffixes = torch.zeros_like(before)
        ops.index_suffixes(suffixes, changed, lengths * 0, lengths)
        assert torch.equal(suffixes[0], before[0]) == (place >= 19)
        assert torch.equal(suffixes[1], before[1])
