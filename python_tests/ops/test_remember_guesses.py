"""remember_guesses against its specification and the oracle."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    assert_equal,
    bounded,
    build_tree,
    integers,
    malformed_trees,
    specified,
    tree_tensor,
    trees,
)
from helpers.knowledge import SLOTS, Pass, empty_adjacency, guess, only, texts
from msn_ext import ops


def check_remembered(passes: list[Pass], slots: int, device: str) -> torch.Tensor:
    adjacency, memory = empty_adjacency(slots, device), {}
    for observed in passes:
        arguments = observed.arguments(device)
        shared = all(row == observed.parents[0] for row in observed.parents)
        expected = specified("remember_guesses", adjacency=adjacency, **arguments)
        for parents in [arguments["parents"]] + [arguments["parents"][0]] * shared:
            got = adjacency.clone()
            ops.remember_guesses(got, **{**arguments, "parents": parents})
            assert_equal(got, expected)
        adjacency = got
        observed.remember(memory)
        assert adjacency.tolist() == oracle.memory_table(memory, slots)
    return adjacency


@given(data=st.data())
def test_remembering_random_passes(device, data):
    draw = data.draw
    batch, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rng = random.Random(draw(st.integers(0, 999)))
    passes = []
    for _ in range(draw(st.integers(1, 2))):
        parents = draw(trees()) * batch if draw(st.booleans()) else draw(trees(rows=batch))
        passes.append(Pass.random([draw(texts(5)) for _ in range(batch)], parents, vocabulary, rng))
    check_remembered(passes, draw(st.sampled_from(SLOTS)), device)


@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, 255, 256])
def test_remembering_trees_of_every_size(device, nodes):
    parents = [build_tree(kind, nodes) for kind in ("random", "chain", "padded")]
    check_remembered(
        [Pass.random([[1], [2, 1], [0, 2, 1, 1]], parents, 3, random.Random(nodes))], 61, device
    )


def remembered(observed: Pass, context: list[int], device: str) -> list[int] | None:
    """The guesses in the table after a context; None: nothing."""
    table = check_remembered([observed], 512, device)
    slot = table[len(context) - 1, oracle.hashed(tuple(context)) % 512].tolist()
    return slot[1:] if slot[0] else None


def test_the_accepted_path_and_later_rows_have_the_last_word(device):
    """Nodes 1 to 3 of both rows have token 5 after token 4: whichever is accepted stays, else the
    last.
    """
    guesses = [[only(guess(10 * b + i)) for i in range(4)] for b in range(2)]
    draft = [[4, 5, 5, 5]] * 2, [[-1, 0, 0, 0]] * 2
    for paths, last in [
        ([[0], [0, 1]], 11),
        ([[0], [0, 2]], 12),
        ([[0, 3], [0]], 13),
        ([[0, 1], [0]], 13),
    ]:
        observed = Pass([[4], [4]], *draft, paths, guesses)
        assert (
            remembered(observed, [5], device)
            == remembered(observed, [4, 5], device)
            == only(guess(last))
        )
        assert remembered(observed, [4], device) == only(guess(10))


def test_padding_and_what_is_below_it_is_not_remembered(device):
    guesses = [[only(guess(i)) for i in range(4)]]
    observed = Pass([[1, 2, 3]], [[3, 7, 8, 9]], [[-1, -1, 1, 0]], [[0, 3]], guesses)
    assert remembered(observed, [7], device) is remembered(observed, [8], device) is None
    assert remembered(observed, [1, 2, 3], device) == only(guess(0))
    assert remembered(observed, [2, 3, 9], device) == only(guess(3))


@given(seed=st.integers(0, 999), slots=st.sampled_from([7, 512]))
def test_remembering_reads_nothing_but_its_own(device, seed, slots):
    """The root's token is the text's end; padding, gaps in the path and what lies past the text
    do not count.
    """
    rng = random.Random(seed)
    texts, parents = (
        [[1], [0, 2, 2, 1]],
        [
            build_tree("padded", 20, seed),
            build_tree("random", 20, seed),
        ],
    )
    arguments = Pass.random(texts, parents, 3, rng).arguments(device)
    before, after = empty_adjacency(slots, device), empty_adjacency(slots, device)
    ops.remember_guesses(before, **arguments)
    for b, text in enumerate(texts):
        arguments["history"][b, len(text) :] = rng.randrange(-9, 9)
        arguments["tokens"][b, 0] = rng.randrange(-9, 9)
        dead = [i for i in range(20) if not oracle.path(parents[b], i)]
        arguments["tokens"][b, dead] = rng.randrange(-9, 9)
        arguments["guesses"][b, dead] = rng.randrange(999)
        gaps = [-1] * 19 + [0]
        rng.shuffle(gaps)
        if arguments["path"][b].max() == 0:
            arguments["path"][b] = integers([gap if gap == 0 else -1 for gap in gaps], device)
    ops.remember_guesses(after, **arguments)
    assert_equal(after, before)


def test_remembering_would_notice_a_change(device):
    """Negative control: every token, parent and guess of a live node counts."""
    observed = Pass(
        [[1, 2]], [[2, 3, 4, 5]], [[-1, 0, 1, 1]], [[0, 1]], [[only(guess(i)) for i in range(4)]]
    )
    before = check_remembered([observed], 512, device)
    changes = [("tokens", node, 9) for node in (1, 2, 3)] + [
        ("parents", 2, 0),
        ("parents", 3, 2),
        ("parents", 1, -1),
    ]
    changes += [("guesses", node, [guess(9)] * 8) for node in range(4)] + [
        ("history", 0, 9),
        ("history", 1, 9),
    ]
    for name, at, value in changes:
        arguments = observed.arguments(device)
        arguments[name][0, at] = torch.tensor(value, dtype=arguments[name].dtype)
        after = empty_adjacency(512, device)
        ops.remember_guesses(after, **arguments)
        assert not torch.equal(after, before), (name, at)


def test_remembering_takes_strides_no_slots_and_no_rows(device):
    parents = [build_tree("random", 12), build_tree("deep", 12)]
    arguments = Pass.random([[1, 2], [2]], parents, 3, random.Random(0)).arguments(device)
    before, after = empty_adjacency(64, device), empty_adjacency(64, device)
    ops.remember_guesses(before, **arguments)
    apart = {
        name: (
            x.repeat_interleave(2, 0)[::2]
            if x.dim() == 1
            else x.transpose(0, 1).contiguous().transpose(0, 1)
        )
        for name, x in arguments.items()
    }
    ops.remember_guesses(after, **apart)
    assert_equal(after, before)
    ops.remember_guesses(after, **{name: x[:0] for name, x in arguments.items()})
    assert_equal(after, before)
    ops.remember_guesses(empty_adjacency(0, device), **arguments)


@given(malformed=malformed_trees())
def test_malformed_parents_are_not_remembered(device, malformed):
    parents, first = malformed
    nodes = len(parents)
    observed = Pass(
        [[1]], [[1] * nodes], [parents], [[0]], [[only(guess(i)) for i in range(nodes)]]
    )
    adjacency, arguments = empty_adjacency(7, device), observed.arguments(device)
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"parents\[{first}\] is {parents[first]};"):
            bounded(lambda: ops.remember_guesses(adjacency, **arguments))
        assert_equal(adjacency, empty_adjacency(7, device))
    else:  # values are not read back: a malformed node is padding, and node 0 the root
        as_padding = tree_tensor([[p if 0 <= p < i else -1 for i, p in enumerate(parents)]], device)
        bounded(lambda: ops.remember_guesses(adjacency, **arguments))
        expected = {**arguments, "parents": as_padding}
        assert_equal(
            adjacency,
            specified("remember_guesses", adjacency=empty_adjacency(7, device), **expected),
        )
