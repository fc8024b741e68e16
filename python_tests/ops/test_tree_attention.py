"""tree_attention against its specification and the oracle."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import oracle
from helpers.attention import Attention
from helpers.cases import (
    CPU_DTYPES,
    KINDS,
    LAYOUTS,
    SIZES,
    ancestors_of,
    assert_equal,
    build_tree,
    integers,
    one_thread,
    threads,
    trees,
)
from msn_ext import ops

KERNELS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
"""Types that different kernels are for."""
POISONS = [float("nan"), float("inf"), -float("inf"), 1e30]


@st.composite
def attentions(draw, batch: int | None = None) -> Attention:
    batch = batch or draw(st.integers(1, 3))
    parents = draw(trees()) * batch if draw(st.booleans()) else draw(trees(rows=batch))
    lengths = draw(
        st.lists(st.integers(0, 40) | st.integers(0, 200), min_size=batch, max_size=batch)
    )
    sizes = st.sampled_from([1, 2, 3, 5, 8, 16, 31, 64, 80, 96, 128, 192, 255, 256])
    return Attention(
        parents,
        lengths,
        offsets=[draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None,
        dtype=draw(st.sampled_from(CPU_DTYPES)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        dim=draw(sizes),
        v_dim=draw(sizes),
        scale=draw(st.sampled_from([None, 0.25])),
        window=draw(st.just(0) | st.integers(1, 8) | st.integers(1, 200)),
        softcap=draw(st.sampled_from([0.0, 2.0, 30.0])),
        sinks=draw(st.booleans()),
        slack=draw(st.integers(0, 3)),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        poison=draw(st.sampled_from(POISONS)),
        seed=draw(st.integers(0, 999)),
    )


def on(device: str, case: Attention) -> Attention:
    """The case with a dtype that the device has shared memory for."""
    if device == "cuda" and case.dtype == torch.float64 and max(case.dim, case.v_dim) > 128:
        return dataclasses.replace(case, dtype=torch.float32)
    return case


@given(case=attentions())
def test_attention_of_random_calls(device, case):
    on(device, case).check(device)


@KERNELS
@pytest.mark.parametrize("nodes", SIZES)
def test_attention_at_every_word_boundary(device, dtype, nodes):
    parents = [build_tree(kind, nodes) for kind in KINDS]
    Attention(parents, [0, 7, 64, 65, 100], None, dtype, group=3, dim=8, v_dim=8).check(device)


@KERNELS
@pytest.mark.parametrize("length", [0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 1000])
def test_attention_at_every_block_boundary_of_the_prefix(device, dtype, length):
    parents, lengths = [build_tree("random", 9)] * 2, [length, length // 2]
    Attention(parents, lengths, [length // 3, 0], dtype).check(device)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize(
    "dim, v_dim",
    [(1, 1), (3, 5), (33, 31), (64, 64), (128, 128), (192, 128), (256, 255), (255, 256)],
)
def test_attention_head_sizes_and_dtypes(device, dtype, dim, v_dim):
    case = Attention(
        [build_tree("deep", 20), build_tree("padded", 20)],
        [70, 3],
        dtype=dtype,
        dim=dim,
        v_dim=v_dim,
    )
    on(device, case).check(device)


@KERNELS
@pytest.mark.parametrize("group", range(1, 9))
def test_attention_groups_of_query_heads(device, dtype, group):
    Attention([build_tree("random", 33)], [50], None, dtype, kv_heads=2, group=group).check(device)


@KERNELS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_takes_strides_as_they_come(device, dtype, layout):
    case = Attention([build_tree("random", 10)] * 2, [30, 20], None, dtype, kv_heads=2)
    dataclasses.replace(case, layouts=(layout,) * 3).check(device)


@KERNELS
@pytest.mark.parametrize("window", [1, 2, 3, 7, 64, 65, 70, 71, 10**12])
def test_attention_window_counts_logical_positions(device, dtype, window):
    parents = [build_tree("chain", 12), build_tree("deep", 12)]
    Attention(parents, [70, 66], [5, 1], dtype, window=window).check(device)


@given(case=attentions(), data=st.data())
def test_attention_reads_nothing_but_the_allowed_keys(device, case, data):
    """A node's output stays the same, whatever stands in the slots that this node may not see."""
    case = on(device, case)
    b, node = (
        data.draw(st.integers(0, len(case.parents) - 1)),
        data.draw(st.integers(0, case.nodes - 1)),
    )
    arguments = case.arguments(device)
    before = ops.tree_attention(**arguments)[b, node]
    slots = arguments["k_cache"].shape[2]
    forbidden = sorted(set(range(slots)).difference(case.allowed(b, node)))
    for name in ("k_cache", "v_cache"):
        arguments[name][b, :, forbidden] = torch.tensor(case.poison, device=device).to(case.dtype)
    after = ops.tree_attention(**arguments)[b, node]
    assert after.isfinite().all()
    assert torch.equal(after, before)


@given(case=attentions(), data=st.data())
def test_attention_would_notice_a_wrong_mask(device, case, data):
    """Negative control: poison in one allowed slot, or one wrong ancestor bit, shows, and only
    where it must.
    """
    case = dataclasses.replace(
        on(device, case), poison=1.0, softcap=2.0, sinks=False
    )  # no weight near 0
    b, node = (
        data.draw(st.integers(0, len(case.parents) - 1)),
        data.draw(st.integers(0, case.nodes - 1)),
    )
    allowed = case.allowed(b, node)
    assume(allowed)
    arguments = case.arguments(device)
    before = ops.tree_attention(**arguments)

    poisoned = {**arguments, "v_cache": arguments["v_cache"].clone()}
    slot = data.draw(st.sampled_from(allowed))
    poisoned["v_cache"][b, :, slot] = float("nan")
    after = ops.tree_attention(**poisoned)
    for i in range(case.nodes):
        assert bool(after[b, i].isnan().all()) == (slot in case.allowed(b, i))

    strangers = sorted(set(range(case.nodes)).difference(oracle.path(case.parents[b], node)))
    assume(strangers)
    stranger = data.draw(st.sampled_from(strangers))
    rows = ancestors_of(case.parents, device)
    rows[b, node, stranger // 64] ^= torch.tensor(1, device=device) << stranger % 64
    marked = arguments["v_cache"].clone()
    marked[b, :, case.lengths[b] + stranger] = 1e4
    seen = ops.tree_attention(**{**arguments, "v_cache": marked, "ancestors": rows})
    unseen = ops.tree_attention(**{**arguments, "v_cache": marked})
    if case.window == 0:
        assert not torch.equal(seen[b, node], unseen[b, node])
    seen[b, node] = unseen[b, node]
    assert torch.equal(seen, unseen)
    assert torch.equal(unseen[b, node], before[b, node])


@given(case=attentions(), data=st.data())
def test_attention_of_a_node_is_plain_decoding_of_its_path_bit_for_bit(case, data):
    """On the CPU, in every dtype: alone with its prefix and path in one contiguous cache, N = 1, B
    = 1.
    """
    b, node = (
        data.draw(st.integers(0, len(case.parents) - 1)),
        data.draw(st.integers(0, case.nodes - 1)),
    )
    slots = oracle.allowed_slots(case.parents[b], node, case.lengths[b], case.offset(b))
    arguments = case.arguments("cpu")
    in_tree = ops.tree_attention(**arguments)[b, node]
    if not slots:
        assert_equal(in_tree, torch.zeros_like(in_tree))
        return
    decoded = ops.tree_attention(
        **{
            **arguments,
            "q": arguments["q"][b : b + 1, :, node : node + 1],
            "k_cache": arguments["k_cache"][b : b + 1, :, slots],
            "v_cache": arguments["v_cache"][b : b + 1, :, slots],
            "lengths": integers([len(slots) - 1]),
            "ancestors": ancestors_of([-1], "cpu"),
            "offsets": None,
        }
    )
    assert torch.equal(decoded[0, 0], in_tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sinks, softcap, window", [(False, 0.0, 0), (True, 5.0, 40)])
def test_attention_of_a_row_ignores_batch_and_threads_bit_for_bit(dtype, sinks, softcap, window):
    parents = [build_tree(kind, 65) for kind in KINDS]
    case = Attention(
        parents, [0, 63, 64, 130, 40], dtype=dtype, sinks=sinks, softcap=softcap, window=window
    )
    arguments = case.arguments("cpu")
    with threads(4):  # workers that run side by side have one
        together = ops.tree_attention(**arguments)
    with one_thread():
        assert torch.equal(ops.tree_attention(**arguments), together)
    per_row = ("q", "k_cache", "v_cache", "lengths", "ancestors")
    for b in range(len(parents)):
        alone = ops.tree_attention(
            **{**arguments, **{name: arguments[name][b : b + 1] for name in per_row}}
        )
        assert torch.equal(alone[0], together[b])


def test_attention_takes_no_rows(device):
    case = Attention([build_tree("chain", 4)], [5])
    arguments = case.arguments(device)
    for name in ("q", "k_cache", "v_cache", "lengths"):
        arguments[name] = arguments[name][:0]
    assert ops.tree_attention(**arguments).shape == (0, 4, 2, 16)
