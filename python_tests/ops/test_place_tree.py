"""place_tree and keep_continuation against their specifications, and both against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.calls import example
from helpers.cases import assert_equal
from msn_ext import ops
from msn_ext.ops import reference


@given(
    rows=st.integers(0, 3),
    nodes=st.sampled_from([1, 2, 7, 64, 65, 256]),
    shared=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 999),
)
def test_trees_stand_after_their_texts(device, rows, nodes, shared, wide, seed):
    """Also where the draft is the beginning of a wider one; what lies past a text is poison."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (rows,), generator=generator)
    history = torch.randint(0, 60, (rows, 30), generator=generator)
    history.masked_fill_(torch.arange(30) >= lengths[:, None], -(1 << 60))
    offsets = torch.randint(0, 9, (rows,), generator=generator)
    last = torch.randint(0, 40, (rows,), generator=generator)
    depth = torch.randint(-1, 12, (nodes,) if shared else (rows, nodes), generator=generator).int()
    tokens = torch.randint(0, 60, (rows, nodes + 3 * wide), generator=generator)
    given_tokens = tokens.to(device)
    rest = [x.to(device) for x in (history, lengths, offsets, last, depth)]
    got = ops.place_tree(given_tokens[:, :nodes], *rest, 50)

    expected = tokens.tolist()
    positions = [[0] * nodes for _ in range(rows)]
    for b in range(rows):
        expected[b][0] = min(int(history[b, lengths[b] - 1]), 49)
        for n in range(nodes):
            below = int(depth[n] if shared else depth[b, n])
            positions[b][n] = min(int(lengths[b]) - 1 + max(below, 0), int(last[b]))
    assert given_tokens.tolist() == expected
    assert got[0].tolist() == positions
    assert got[1].tolist() == (lengths - 1 + offsets).tolist()
    assert_equal(got, reference.place_tree(given_tokens[:, :nodes].clone(), *rest, 50))


@pytest.mark.parametrize("length", [0, -1, 7])
def test_a_length_outside_the_text_is_refused_on_the_cpu(length):
    arguments = example("place_tree", "cpu")
    arguments["lengths"] = torch.tensor([3, length])
    with pytest.raises(ValueError, match="lengths"):
        ops.place_tree(**arguments)


@given(
    rows=st.integers(0, 3),
    nodes=st.sampled_from([1, 2, 7, 64, 256]),
    depths=st.sampled_from([0, 1, 5, 20, 300]),
    seed=st.integers(0, 999),
)
def test_the_guesses_below_the_accepted_path_are_kept(device, rows, nodes, depths, seed):
    generator = torch.Generator().manual_seed(seed)
    guesses = torch.randint(0, 1 << 30, (rows, nodes, 8), generator=generator).int()
    continuation = torch.randint(-1, nodes, (rows, nodes), generator=generator)
    denoised = torch.full((rows, depths, 8), 77, dtype=torch.int32)
    there = denoised.to(device)
    ops.keep_continuation(there, guesses.to(device), continuation.to(device))
    for b in range(rows):
        for d in range(depths):
            node = int(continuation[b, d]) if d < nodes else -1
            wanted = guesses[b, node].tolist() if node >= 0 else [-1] * 8
            assert there[b, d].tolist() == wanted
    reference.keep_continuation(denoised, guesses, continuation)
    assert_equal(there.cpu(), denoised)


@pytest.mark.parametrize("node", [-2, 4])
def test_a_node_outside_the_tree_is_refused_on_the_cpu(node):
    arguments = example("keep_continuation", "cpu")
    arguments["continuation"][1, 1] = node
    with pytest.raises(ValueError, match="continuation"):
        ops.keep_continuation(**arguments)
