"""verify_tree and verify_logits against their specification and the oracle."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    KINDS,
    SIZES,
    assert_equal,
    build_tree,
    integers,
    padded,
    tree_tensor,
    trees,
)
from msn_ext import ops
from msn_ext.ops import reference


def check_verify(
    tokens: list[list[int]], targets: list[list[int]], parents: list[list[int]], device: str
) -> None:
    nodes = len(tokens[0])
    arguments = integers(tokens, device), integers(targets, device)
    shared = all(row == parents[0] for row in parents)
    for tree in [tree_tensor(parents, device)] + [tree_tensor(parents[0], device)] * shared:
        got = ops.verify_tree(*arguments, tree)
        assert_equal(got, reference.verify_tree(*arguments, tree))
        lengths, paths, bonus, continuations = zip(*map(oracle.verify, tokens, targets, parents))
        expected = [list(lengths), padded(paths, nodes), list(bonus), padded(continuations, nodes)]
        assert [x.tolist() for x in got] == expected


@st.composite
def drafts(draw) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Tokens, targets and parents, with few enough tokens that much is accepted."""
    batch = draw(st.integers(1, 3))
    parents = draw(trees()) * batch if draw(st.booleans()) else draw(trees(rows=batch))
    rng = random.Random(draw(st.integers(0, 999)))
    vocabulary = draw(st.integers(1, 4))
    tokens, targets = (
        [[rng.randrange(vocabulary) for _ in row] for row in parents] for _ in range(2)
    )
    return tokens, targets, parents


@given(draft=drafts())
def test_verify_random_drafts(device, draft):
    check_verify(*draft, device)


@pytest.mark.parametrize("nodes", SIZES)
def test_verify_at_every_word_boundary(device, nodes):
    parents = [build_tree(kind, nodes) for kind in KINDS]
    rng = random.Random(nodes)
    tokens, targets = (
        [[int(rng.random() < 0.2) for _ in row] for row in parents] for _ in range(2)
    )
    check_verify(tokens, targets, parents, device)
    everything = [[7] * nodes for _ in parents]
    check_verify(everything, everything, parents, device)


def test_verify_never_accepts_padding(device):
    """Padding whose token is the root's target, or the root's own token (which the authors' decoder
    accepts).
    """
    parents = tree_tensor([-1, 0, -1, -1, 2], device)
    tokens, targets = integers([[5, 1, 9, 5, 9]], device), integers([[9, 9, 9, 9, 9]], device)
    accept_length, path, bonus, continuation = ops.verify_tree(tokens, targets, parents)
    assert (accept_length.item(), bonus.item()) == (1, 9)
    assert path.tolist() == [[0, -1, -1, -1, -1]] and continuation.tolist() == [[1, -1, -1, -1, -1]]


def test_verify_breaks_ties_by_the_lowest_index(device):
    parents = tree_tensor([-1, 0, 0, 1, 2, 3, 4], device)
    tokens = integers([[0, 1, 1, 1, 1, 2, 2]], device)
    accept_length, path, _, continuation = ops.verify_tree(tokens, torch.ones_like(tokens), parents)
    assert accept_length.item() == 3
    assert path[0, :3].tolist() == [0, 1, 3] and continuation[0, :2].tolist() == [5, -1]


def test_verify_would_notice_one_wrong_target(device):
    """Negative control: one wrong target on the accepted path ends the path there."""
    nodes = 70
    tokens = torch.arange(nodes, device=device)[None]
    parents = tree_tensor(build_tree("chain", nodes), device)
    for at in (0, 1, 31, 32, 63, 64, 68):
        targets = tokens + 1
        targets[0, at] += 1
        accept_length, path, bonus, continuation = ops.verify_tree(tokens, targets, parents)
        assert (accept_length.item(), bonus.item()) == (at + 1, at + 2)
        assert path.tolist() == [padded([list(range(at + 1))], nodes)[0]]
        assert continuation.tolist() == [padded([list(range(at + 1, nodes))], nodes)[0]]


@given(tree=trees(rows=2), seed=st.integers(0, 999))
def test_verify_follows_torch_in_nan_logits_and_ties(device, tree, seed):
    """Targets by torch.argmax: a NaN wins, else the first of the largest."""
    rng = random.Random(seed)
    values = [0.0, 1.0, 1.0, -float("inf"), float("inf"), float("nan")]
    logits = [
        [[rng.choice(values[: rng.choice([3, 6])]) for _ in range(5)] for _ in row] for row in tree
    ]
    targets = torch.tensor(logits, device=device).argmax(-1)
    assert targets.tolist() == [[oracle.argmax(row) for row in rows] for rows in logits]
    tokens = [[rng.randrange(3) for _ in row] for row in tree]
    check_verify(tokens, targets.tolist(), tree, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, 256])
def test_logits_are_verified_as_by_their_parts(device, nodes, dtype):
    """Rows that are read whole and value by value, strided ones among them, with NaN and equals."""
    generator = torch.Generator().manual_seed(nodes)
    for vocabulary in (1, 5, 1000, 1024):
        wide = torch.randn(2, nodes, vocabulary + 24, generator=generator).to(dtype)
        wide[:, ::3, : 2 + vocabulary // 2] = wide[:, ::3, :1]
        wide[0, nodes // 2, vocabulary // 3] = float("nan")
        tokens = torch.randint(0, min(vocabulary, 3), (2, nodes), generator=generator)
        parents = tree_tensor([build_tree("random", nodes, seed) for seed in range(2)], "cpu")
        for logits in (
            wide[:, :, :vocabulary],
            wide[:, :, :vocabulary].contiguous(),
            wide[:, :, 3 : 3 + vocabulary],
        ):
            want = reference.verify_logits(logits, tokens, parents)
            got = ops.verify_logits(logits.to(device), tokens.to(device), parents.to(device))
            assert_equal([x.cpu() for x in got], want)
            assert_equal(got[0], ops.top_guesses(logits.to(device)))
    empty = ops.verify_logits(logits[:0].to(device), tokens[:0].to(device), parents[:0].to(device))
    assert [len(x) for x in empty] == [0] * 6
