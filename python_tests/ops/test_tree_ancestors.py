"""tree_ancestors against its specification and the oracle."""

import pytest
import torch
from hypothesis import given

from helpers import oracle
from helpers.cases import (
    EXTREMES,
    KINDS,
    SIZES,
    assert_equal,
    bounded,
    build_tree,
    malformed_trees,
    tree_tensor,
    trees,
)
from msn_ext import ops
from msn_ext.ops import reference


def check_ancestors(parents: list[list[int]], device: str) -> None:
    given_parents = tree_tensor(parents, device)
    got = ops.tree_ancestors(given_parents)
    assert_equal(got, reference.tree_ancestors(given_parents))
    nodes = len(parents[0])
    paths = [[oracle.path(row, i) for i in range(nodes)] for row in parents]
    assert got[0].tolist() == [[oracle.words(p, (nodes + 63) // 64) for p in row] for row in paths]
    assert got[1].tolist() == [[len(p) - 1 for p in row] for row in paths]
    assert_equal(ops.tree_ancestors(given_parents[0]), (got[0][0], got[1][0]))


@pytest.mark.parametrize("nodes", SIZES)
def test_ancestors_at_every_word_boundary(device, nodes):
    check_ancestors([build_tree(kind, nodes) for kind in KINDS], device)


@given(parents=trees(rows=2))
def test_ancestors_of_random_trees(device, parents):
    check_ancestors(parents, device)


def test_ancestors_take_strided_parents_and_no_rows(device):
    parents = tree_tensor([build_tree("random", 40, seed) for seed in range(3)], device)
    assert_equal(ops.tree_ancestors(parents.t().contiguous().t()), ops.tree_ancestors(parents))
    ancestors, depth = ops.tree_ancestors(parents[:0])
    assert ancestors.shape == (0, 40, 1) and depth.shape == (0, 40)


@given(malformed=malformed_trees())
def test_malformed_parents_are_refused_by_name(device, malformed):
    parents, first = malformed
    given_parents = tree_tensor(parents, device)
    message = rf"parents\[{first}\] is {parents[first]};"
    with pytest.raises(ValueError, match=message):
        bounded(lambda: ops.tree_ancestors(given_parents))
    tokens = torch.zeros(1, len(parents), dtype=torch.int64, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            bounded(lambda: ops.verify_tree(tokens, tokens, given_parents))
        with pytest.raises(ValueError, match=message):
            reference.tree_ancestors(given_parents)
    else:  # values are not read back: a malformed node is padding, and node 0 the root
        as_padding = tree_tensor([p if 0 <= p < i else -1 for i, p in enumerate(parents)], device)
        unread = bounded(lambda: ops.tree_ancestors(given_parents, validate=False))
        assert_equal(unread, reference.tree_ancestors(as_padding))
        verified = bounded(lambda: ops.verify_tree(tokens, tokens, given_parents))
        assert_equal(verified, reference.verify_tree(tokens, tokens, as_padding))


@pytest.mark.parametrize("value", [0, 1, *EXTREMES])
def test_a_root_with_a_parent_is_refused(device, value):
    with pytest.raises(ValueError, match=rf"parents\[0\] is {value}; expected -1$"):
        ops.tree_ancestors(tree_tensor([value, 0, 0], device))
