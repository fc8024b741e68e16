"""append_tails and keep_tail against their specifications, and both against plain loops."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.calls import example
from helpers.cases import KINDS, assert_equal, build_tree, tree_tensor
from msn_ext import Draft, ops
from msn_ext.ops import reference

FAR = 1 << 60


def random_draft(rng, rows, wide, chances):
    """Tokens, parents and probabilities of trees; ``chances``: of which some are equal, or none
    ends anywhere.
    """
    parents = [build_tree(rng.choice(KINDS), wide, rng.randrange(99)) for _ in range(rows)]
    probability = torch.zeros(rows, wide, dtype=torch.float64)
    for b, above in enumerate(parents):
        for node, parent in enumerate(above):
            p = float(probability[b, parent]) if node and parent >= 0 else 1.0
            if chances == "equal":
                p *= rng.choice([0.0, 0.25, 0.5])
            elif chances == "random":
                p *= rng.random()
            probability[b, node] = p if parent >= 0 or not node else 0.0
    tokens = torch.tensor([rng.randrange(99) for _ in range(rows * wide)], dtype=torch.int64)
    return tokens.view(rows, wide), tree_tensor(parents, "cpu").view(rows, wide), probability


def likeliest(parents, probability, tails):
    """By plain loops."""
    chance = [
        p - sum((c for c, above in zip(probability, parents) if above == node), 0.0)
        for node, p in enumerate(probability)
    ]
    exact = list(probability)  # children one after the other
    for node, above in enumerate(parents):
        if above >= 0:
            exact[above] -= probability[node]
    assert exact == pytest.approx(chance, abs=1e-12)
    found = []
    for _ in range(tails):
        best = max((p for p in exact if p > 0), default=None)
        found.append(-1 if best is None else exact.index(best))
        if best is not None:
            exact[found[-1]] = 0.0
    return found


@given(
    rows=st.integers(0, 3),
    nodes=st.sampled_from([1, 2, 7, 60, 64, 65, 200, 256]),
    more=st.integers(0, 9),
    tails=st.integers(0, 9),
    length=st.integers(1, 3),
    chances=st.sampled_from(["random", "equal", "one path"]),
    noise=st.sampled_from([-1, 0, 77]),
    seed=st.integers(0, 999),
)
def test_tails_stand_below_likely_ends(
    device, rows, nodes, more, tails, length, chances, noise, seed
):
    """Whatever the nodes that are left out and what lies past the text hold."""
    rng = random.Random(seed)
    tails = min(tails, (256 - nodes) // length)
    draft = random_draft(rng, rows, nodes + more, chances)
    tokens, parents, probability = draft
    lengths = torch.tensor([rng.randrange(1, 31) for _ in range(rows)], dtype=torch.int64)
    history = torch.randint(0, 60, (rows, 30), generator=torch.Generator().manual_seed(seed))
    history.masked_fill_(torch.arange(30) >= lengths[:, None], -FAR)
    first = [x[:, :nodes].clone() for x in draft]
    tokens[:, nodes:], parents[:, nodes:], probability[:, nodes:] = -FAR, 1 << 30, float("nan")
    given_ = *draft, history, lengths
    got = ops.append_tails(*(x.to(device) for x in given_), nodes, tails, length, noise)
    got = [x.cpu() for x in got]
    assert_equal(got, reference.append_tails(*given_, nodes, tails, length, noise))

    ends = torch.full((rows, tails), -1)
    text = torch.full((rows, tails * length), noise)
    for b in range(rows):
        ends[b] = torch.tensor(likeliest(first[1][b].tolist(), first[2][b].tolist(), tails))
        if noise < 0:
            size = int(lengths[b])
            text[b] = torch.tensor(
                [int(history[b, (size + (at + 1) * 7919) % size]) for at in range(tails * length)]
            )
    assert torch.equal(got[-1], ends)
    if rows:
        want = Draft.with_tails(*first[:2], ends, length, text if tails else 0)
        for x, y in zip(got, (want.tokens, want.parents, want.ancestors, want.depth)):
            assert torch.equal(x, y)


def test_of_equal_ends_the_first_nodes_have_the_tails(device):
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    parents = torch.tensor([[-1, *[0] * 7, -1]], dtype=torch.int32)
    chance = torch.tensor([[1.0, *[0.125] * 7, 0.0]], dtype=torch.float64)
    text = torch.ones(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    given_ = [x.to(device) for x in (tokens, parents, chance, *text)]
    assert ops.append_tails(*given_, 9, 3, 1, 5)[-1].tolist() == [[0, 1, 2]]
    assert ops.append_tails(*given_, 9, 10, 1, 5)[-1].tolist() == [[*range(8), -1, -1]]
    given_[2][0, 0] = 0.875  # which its children have all of
    assert ops.append_tails(*given_, 9, 3, 1, 5)[-1].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("name, value", [("lengths", 0), ("lengths", 7), ("parents", 3)])
def test_values_outside_are_refused_on_the_cpu(name, value):
    arguments = example("append_tails", "cpu")
    arguments[name] = arguments[name].clone()
    arguments[name].view(-1)[1] = value
    with pytest.raises(ValueError, match=name):
        ops.append_tails(**arguments)


@given(
    rows=st.integers(0, 3),
    nodes=st.sampled_from([1, 2, 7, 64, 246]),
    tails=st.integers(0, 4),
    length=st.integers(1, 2),
    depths=st.sampled_from([0, 1, 5, 20, 300]),
    hits=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_tail_at_the_end_of_the_path_is_kept(
    device, rows, nodes, tails, length, depths, hits, seed
):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    n = nodes + tails * length
    guesses = torch.randint(0, 1 << 30, (rows, n, 8), generator=generator).int()
    continuation, path = torch.randint(-1, n, (2, rows, n), generator=generator)
    accepted = torch.randint(0, n + 1, (rows,), generator=generator)
    ends = torch.tensor([(rng.sample(range(nodes), min(tails, nodes)) + [-1] * tails)[:tails]
                         for _ in range(rows)], dtype=torch.int64).view(rows, tails)  # fmt: skip
    for b, count in enumerate(accepted.tolist()):
        if hits and tails and count:
            path[b, count - 1] = ends[b, rng.randrange(tails)]
    tables = torch.randn(2, ops.FACTORS, dtype=torch.float64, generator=generator)
    denoised = torch.full((rows, depths, 8), 77, dtype=torch.int32)
    factors = torch.full((rows, ops.FACTORS), 77.0, dtype=torch.float64)
    there = denoised.to(device), factors.to(device)
    seen = tables, guesses, continuation, path, accepted, ends
    ops.keep_tail(*there, *(x.to(device) for x in seen), length)
    for b, count in enumerate(accepted.tolist()):
        last = int(path[b, count - 1]) if count else -1
        tail = ends[b].tolist().index(last) if last >= 0 and last in ends[b] else None
        assert torch.equal(there[1][b].cpu(), tables[int(tail is not None)])
        for d in range(depths):
            node = int(continuation[b, d]) if d < n else -1
            if tail is not None:
                node = nodes + tail * length + d if d < length else -1
            wanted = guesses[b, node].tolist() if node >= 0 else [-1] * 8
            assert there[0][b, d].tolist() == wanted
    reference.keep_tail(denoised, factors, *seen, length)
    assert_equal([x.cpu() for x in there], (denoised, factors))


@pytest.mark.parametrize(
    "name, at, value", [("continuation", 0, 4), ("accept_length", 1, 5), ("accept_length", 1, -1)]
)
def test_values_outside_a_draft_are_refused_on_the_cpu(name, at, value):
    arguments = example("keep_tail", "cpu")
    arguments[name] = arguments[name].clone()
    arguments[name].view(-1)[at] = value
    with pytest.raises(ValueError, match=name):
        ops.keep_tail(**arguments)
