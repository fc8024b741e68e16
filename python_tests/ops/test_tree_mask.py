"""The dense mask against its specification and the oracle."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import ancestors_of, assert_equal, integers, trees
from msn_ext import ops
from msn_ext.ops import reference


@given(
    rows=st.integers(1, 3).flatmap(lambda batch: trees(rows=batch)),
    window=st.sampled_from([0, 1, 2, 5, 40, 2**40]),
    padded=st.booleans(),
    room=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_tree_mask(device, rows, window, padded, room, seed):
    """Trees of their own or one for all, with left padding or without, room after the tree."""
    rng = random.Random(seed)
    lengths = [rng.randrange(9) for _ in rows]
    offsets = [rng.randint(0, length) if padded else 0 for length in lengths]
    slots = max(lengths) + len(rows[0]) + room
    given_offsets = integers(offsets, device) if padded else None
    for parents in (rows, [rows[0]] * len(rows)):
        of_all = parents if parents is rows else parents[0]
        arguments = integers(lengths, device), ancestors_of(of_all, device), slots
        mask = ops.tree_mask(*arguments, offsets=given_offsets, window=window)
        assert_equal(mask, reference.tree_mask(*arguments, offsets=given_offsets, window=window))
        for b, row in enumerate(parents):
            for node in range(len(row)):
                seen = oracle.allowed_slots(row, node, lengths[b], offsets[b], window)
                assert mask[b, 0, node].nonzero()[:, 0].tolist() == sorted(seen)


def test_what_lies_outside_the_cache_is_left_out():
    ancestors = ancestors_of([-1, 0, 1], "cpu")
    lengths = integers([2])
    for mask in (ops.tree_mask, reference.tree_mask):
        seen = mask(lengths, ancestors, 3)[0, 0]
        assert_equal(seen, torch.ones(3, 3, dtype=torch.bool))
