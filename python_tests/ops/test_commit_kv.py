"""commit_kv against its specification and the oracle."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    CPU_DTYPES,
    LAYOUTS,
    SIZES,
    assert_equal,
    integers,
    lay_out,
    padded,
    seeded,
)
from msn_ext import ops
from msn_ext.ops import reference

CACHE_DTYPES = [*CPU_DTYPES, torch.int8, torch.uint8, torch.int64, torch.bool]


@dataclasses.dataclass
class Commit:
    lengths: list[int]
    paths: list[list[int]]  # accepted nodes of each row
    width: int
    caches: list[torch.Tensor]
    surroundings: list[torch.Tensor]  # whole storages of the caches

    def check(self, device: str) -> None:
        before = [whole.clone() for whole in self.surroundings]
        expected = [oracle.commit(cache, self.lengths, self.paths) for cache in self.caches]
        specified = [cache.clone() for cache in self.caches]
        arguments = (
            integers(self.lengths, device),
            integers(padded(self.paths, self.width), device).view(len(self.paths), self.width),
            integers([len(p) for p in self.paths], device),
        )
        reference.commit_kv(specified, *arguments)
        ops.commit_kv(self.caches, *arguments)
        assert_equal(self.caches, expected)
        assert_equal(self.caches, specified)
        for cache, whole, was in zip(self.caches, self.surroundings, before):
            cache.zero_()
            was.as_strided(cache.shape, cache.stride(), cache.storage_offset()).zero_()
            assert_equal(whole, was)


def cache_like(
    batch, heads, slots, size, dtype, layout, device, seed
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache of random bits and the flat storage that it lies in."""
    values = torch.randint(
        0, 2 if dtype == torch.bool else 100, (batch, heads, slots, size), generator=seeded(seed)
    )
    cache = lay_out(values.to(device, dtype), layout, 1)
    storage = torch.empty(0, dtype=dtype, device=device).set_(cache.untyped_storage())
    return cache, storage


@given(data=st.data())
def test_commit_random_calls(device, data):
    draw = data.draw
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 12) | st.sampled_from(SIZES))
    rng = random.Random(draw(st.integers(0, 999)))
    paths = [
        sorted({0, *rng.sample(range(nodes), rng.randint(0, min(nodes, 20)))}) for _ in range(batch)
    ]
    if draw(st.booleans()):
        paths[0] = []
    lengths = draw(st.lists(st.integers(0, 30), min_size=batch, max_size=batch))
    slots = max(lengths) + nodes + draw(st.integers(0, 2))
    made = [
        cache_like(
            batch,
            draw(st.integers(1, 3)),
            slots + draw(st.integers(0, 1)),
            draw(st.sampled_from([1, 3, 8, 16, 33, 64])),
            draw(st.sampled_from(CACHE_DTYPES)),
            draw(st.sampled_from(LAYOUTS)),
            device,
            rng.randrange(999),
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    width = max(map(len, paths)) + draw(st.integers(0, 2))
    Commit(lengths, paths, width, [m[0] for m in made], [m[1] for m in made]).check(device)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_commit_every_dtype_and_layout_in_one_call(device, dtype):
    made = [
        cache_like(2, 3, 40, size, dtype, layout, device, 1)
        for size in (5, 16)
        for layout in LAYOUTS
    ]
    paths = [[0, 3, 4, 9], [0, 1, 2, 30]]
    Commit([0, 9], paths, 31, [m[0] for m in made], [m[1] for m in made]).check(device)


def test_commit_would_notice_another_path(device):
    """Negative control: a cache of distinct values differs after every other path."""
    seen = []
    for path in ([0, 1, 2], [0, 2, 3], [0, 1, 3], [0, 1]):
        cache = torch.arange(10.0, device=device).view(1, 1, 10, 1).clone()
        ops.commit_kv(
            [cache], integers([4], device), integers([path], device), integers([len(path)], device)
        )
        seen.append(tuple(cache.flatten().tolist()))
    assert seen[0] == seen[3] == tuple(range(10)) and len(set(seen)) == 3


def test_commit_of_no_caches_or_no_nodes_does_nothing(device):
    cache = torch.rand(2, 1, 4, 3, device=device)
    before = cache.clone()
    none = integers([0, 0], device)
    ops.commit_kv([], none, integers([[0], [0]], device), none + 1)
    ops.commit_kv([cache], none, integers([[], []], device), none)
    assert_equal(cache, before)


def test_a_refused_commit_moves_nothing():
    """The second cache is too short for the second row."""
    caches = [torch.rand(2, 1, 9, 3), torch.rand(2, 1, 7, 3)]
    before = [cache.clone() for cache in caches]
    with pytest.raises(ValueError, match="lengths"):
        ops.commit_kv(caches, integers([2, 4]), integers([[0, 3], [0, 3]]), integers([2, 2]))
    assert_equal(caches, before)


def test_commit_on_cuda_leaves_slots_outside_the_cache_alone(device):
    if device != "cuda":
        pytest.skip("the CPU raises")
    whole = torch.rand(2, 1, 30, 3, device=device)
    cache, before = whole[:, :, 10:20], whole.clone()
    huge = 2**62
    for lengths, path, accepted in [
        ([8, -9], [[0, 5], [0, 3]], [2, 2]),
        ([huge, -huge], [[0, 5], [0, 3]], [2, 2]),
        ([2, 2], [[0, huge], [0, -huge]], [2, 2]),
        ([2, 2], [[0, 1], [0, 1]], [huge, -huge]),
    ]:
        ops.commit_kv([cache], *(integers(x, device) for x in (lengths, path, accepted)))
        torch.cuda.synchronize()
        assert_equal(whole[:, :, :10], before[:, :, :10])
        assert_equal(whole[:, :, 20:], before[:, :, 20:])
