"""tree_attention in the shapes that its kernels on tensor cores are chosen by (docs/kernels.md):
head sizes, query rows, tiles a block goes round with, splits, layouts that bulk copies read.

Queries are sharp here: a lost tile among many is then most of what some row says, not a rounding.
"""

import dataclasses
import os

import pytest
import torch

from helpers.attention import Attention
from helpers.cases import build_tree
from msn_ext import ops
from msn_ext.ops import reference

SIZES = [(64, 64), (72, 72), (96, 96), (104, 104), (128, 128), (128, 64), (64, 128), (8, 128)]
ROWS = [(17, 1), (16, 4), (65, 1), (32, 4), (43, 3), (64, 4)]
"""Nodes, and query heads for each of keys: 17, 64, 65, 128, 129 and 256 query rows."""
LENGTHS = [0, 1, 63, 64, 65, 640]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def shaped(size: tuple[int, int], rows: tuple[int, int], lengths: list[int], dtype) -> Attention:
    (dim, v_dim), (nodes, group) = size, rows
    parents = [build_tree(kind, nodes) for kind in ("random", "padded")]
    return Attention(
        parents, lengths, None, dtype, 2, group, dim, v_dim, sharp=4.0, seed=dim + nodes
    )


@HALVES
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_head_sizes_and_query_rows(device, size, rows, dtype):
    at = SIZES.index(size) + ROWS.index(rows)
    lengths = [LENGTHS[at % len(LENGTHS)], LENGTHS[(at + 3) % len(LENGTHS)]]
    shaped(size, rows, lengths, dtype).check(device)


@HALVES
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_of_the_prefix(device, length, dtype):
    shaped((128, 128), (64, 4), [length, length // 2], dtype).check(device)


@HALVES
@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (128, 128)])
def test_many_tiles(device, size, kv_heads, dtype):
    """With eight heads a block of an H100 has some twenty tiles, five times as many as it holds;
    with one there are that many splits.
    """
    case = shaped(size, (16, 8), [5000, 4711], dtype)
    dataclasses.replace(case, kv_heads=kv_heads).check(device)


@HALVES
def test_a_lost_tile_would_show(dtype):
    """Negative control: the same without the first 64 of some thousand keys is too far off."""
    case = shaped((128, 128), (64, 4), [5000, 4711], dtype)
    without = dataclasses.replace(case, offsets=[64, 64])
    lost = reference.tree_attention(**without.arguments("cpu"))
    for row, expected in zip(ops.tree_attention(**case.arguments("cpu")), lost):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(row, expected, **case.tolerance("cuda"))


@HALVES
@pytest.mark.parametrize("layout", ["contiguous", "slots first", "layers"])
@pytest.mark.parametrize("window, offsets", [(0, None), (0, [37, 0]), (100, None), (7, [5, 64])])
def test_layouts_windows_and_padding(device, layout, window, offsets, dtype):
    case = shaped((64, 64), (32, 4), [700, 300], dtype)
    case = dataclasses.replace(case, layouts=(layout,) * 3, window=window, offsets=offsets)
    case.check(device)


@HALVES
@pytest.mark.parametrize("options", [dict(softcap=3.0), dict(sinks=True), dict(scale=-0.3)])
def test_softcap_sinks_and_scale(device, options, dtype):
    dataclasses.replace(shaped((128, 128), (43, 3), [333, 70], dtype), **options).check(device)


@HALVES
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernel_of_warp_groups_runs(device, rows, dtype):
    """Where it is to run: another one would give the same, later."""
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for compute capability 9.0")
    if os.environ.get("MSN_WGMMA") == "off":
        pytest.skip("MSN_WGMMA is off")
    from torch.profiler import ProfilerActivity, profile

    arguments = shaped((128, 128), rows, [640, 65], dtype).arguments(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        ops.tree_attention(**arguments)
        torch.cuda.synchronize()
    names = [event.key for event in seen.key_averages()]
    assert any("tree_attention_wgmma_kernel" in name for name in names), names
