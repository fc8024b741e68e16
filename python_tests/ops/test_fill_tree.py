"""fill_tree against its specification and the oracle."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    assert_equal,
    build_tree,
    integers,
    tree_tensor,
    trees,
)
from msn_ext import ops
from msn_ext.ops import reference


def test_the_oracle_generator_gives_the_published_numbers():
    """SplitMix64 from seed 1234567, as in the reference implementation's test vector."""
    generator = oracle.SplitMix64(1234567)
    assert [generator.next() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def check_fill(
    candidates, retrieved, histories, lengths, depth, rank, seed, device
) -> torch.Tensor:
    """``depth`` is one list a row; what lies past a row's length is poison."""
    batch, ranks = len(histories), len(candidates[0][0]) if candidates[0] else 3
    arguments = [
        integers(candidates, device).view(batch, len(candidates[0]), ranks),
        integers(retrieved, device).view(batch, len(retrieved[0])),
        integers(histories, device),
        integers(lengths, device),
        tree_tensor(depth, device),
        tree_tensor(rank, device),
        integers([seed], device),
    ]
    arguments[2].masked_fill_(
        torch.arange(len(histories[0]), device=device) >= arguments[3][:, None], -999
    )
    rows = zip(candidates, retrieved, histories, lengths, depth)
    expected = [
        oracle.fill(c, r, text[:size], d, rank, seed, b)
        for b, (c, r, text, size, d) in enumerate(rows)
    ]
    shared = all(row == depth[0] for row in depth)
    for tree in [arguments[4]] + [arguments[4][0]] * shared:
        arguments[4] = tree
        got = ops.fill_tree(*arguments)
        assert_equal(got, reference.fill_tree(*arguments))
        assert got.tolist() == expected
    return got


@given(data=st.data())
def test_fill_random_trees(device, data):
    draw = data.draw
    batch = draw(st.integers(1, 3))
    parents = draw(trees()) * batch if draw(st.booleans()) else draw(trees(rows=batch))
    rng = random.Random(draw(st.integers(0, 999)))
    depths, ranks, found, capacity = (draw(st.integers(low, 6)) for low in (0, 1, 0, 1))

    def tokens(count):
        return [rng.choice([-1, rng.randrange(100)]) for _ in range(count)]

    check_fill(
        [[tokens(ranks) for _ in range(depths)] for _ in range(batch)],
        [tokens(found) for _ in range(batch)],
        [[rng.randrange(100) for _ in range(capacity)] for _ in range(batch)],
        [rng.randint(1, capacity) for _ in range(batch)],
        [[len(oracle.path(row, i)) - 1 for i in range(len(row))] for row in parents],
        [rng.randint(-2, ranks) for _ in parents[0]],
        draw(st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)),
        device,
    )


def test_fill_noise_is_uniform_over_the_text_and_comes_from_nowhere_else(device):
    """Chi-square of 40,960 draws over 50 tokens; the critical value belongs to p = 1e-6
    (Wilson-Hilferty).
    """
    size, nodes, batch = 50, 256, 4
    history = [[*range(1000, 1000 + size), *[0] * 14] for _ in range(batch)]
    depth = [[len(oracle.path(build_tree("random", nodes), i)) - 1 for i in range(nodes)]] * batch
    counts = torch.zeros(size, dtype=torch.int64)
    for seed in range(40):
        got = check_fill(
            [[]] * batch, [[]] * batch, history, [size] * batch, depth, [0] * nodes, seed, device
        )
        drawn = got[:, 1:].flatten().cpu() - 1000
        counts += torch.bincount(drawn, minlength=size)
    expected = counts.sum().item() / size
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    degrees = size - 1
    critical = degrees * (1 - 2 / (9 * degrees) + 4.753 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi_square < critical


def test_fill_noise_depends_on_seed_row_position_and_node(device):
    """Negative control for the generator: changing any one counter changes the draws."""
    history = torch.arange(100_000, device=device).expand(2, -1)
    no_candidates, nothing = integers([[[-1]]] * 2, device), integers([[-1]] * 2, device)

    def draw(seed=3, length=99_000, depth=1):
        depths, ranks = tree_tensor([0, *[depth] * 9], device), tree_tensor([0] * 10, device)
        lengths = integers([length] * 2, device)
        return ops.fill_tree(
            no_candidates, nothing, history, lengths, depths, ranks, integers([seed], device)
        )[:, 1:]

    base = draw()
    assert torch.equal(draw(), base)
    assert len(set(base.flatten().tolist())) == base.numel()
    for other in (draw(seed=4), draw(depth=2), draw(length=98_999)):
        assert not (other == base).any()
