"""Rotary embedding, the packed cache and attention of a decoder layer against the specification and
the oracle.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import layers, oracle
from helpers.cases import (
    ancestors_of,
    assert_equal,
    build_tree,
    integers,
    one_thread,
    threads,
)
from helpers.layers import ALL_ISAS, CACHES, ISAS, normal, number, runs_here
from msn_ext import ops
from msn_ext.ops import reference
from msn_ext.ops.reference.layers import key_places, value_places

EPS = 1e-5


def empty_cache(
    dtype, batch: int, kv_heads: int, slots: int, size: int, fill: float = float("nan")
):
    """Keys and values; every slot holds ``fill``."""
    even = size + size % 2 if dtype == torch.bfloat16 else size
    sizes = slots * even, slots * (-(-size // 16) * 16)
    return tuple(torch.full((batch, kv_heads, n), fill, dtype=dtype) for n in sizes)


@dataclasses.dataclass
class Step:
    """The nodes of a tree each behind a prefix, whose texts were written before, as one chain."""

    dtype: torch.dtype = torch.float32
    isa: str = ""
    prefix: tuple[int, ...] = (5, 0, 17)
    nodes: int = 7
    kind: str = "random"
    kv_heads: int = 2
    group: int = 2
    size: int = 20
    turned: int = 8
    norm: str = "none"
    norm_each_head: bool = True
    scale: float = 0.3
    window: int = 0
    softcap: float = 0.0
    seed: int = 0
    fill: float = float("nan")

    def __post_init__(self):
        self.number, self.heads = number(self.dtype), self.kv_heads * self.group
        batch, longest = len(self.prefix), max(self.prefix)
        self.parents = [build_tree(self.kind, self.nodes, self.seed + b) for b in range(batch)]
        self.slots = -(-(longest + self.nodes) // 16) * 16 + 16
        row = (self.heads + 2 * self.kv_heads) * self.size
        self.texts = normal(batch, longest, row, seed=self.seed, dtype=self.number)
        self.qkv = normal(batch, self.nodes, row, seed=self.seed + 1, dtype=self.number)
        angles = normal(longest + self.nodes + 1, self.turned // 2, seed=2, dtype=self.number)
        each = 1 if self.norm_each_head else 0
        q_size, k_size = (
            self.size if each else self.size * count for count in (self.heads, self.kv_heads)
        )
        self.stage = {"heads": self.heads, "kv_heads": self.kv_heads, "isa": self.isa}
        self.turn = {"cosines": angles.cos(), "sines": angles.sin(), **self.stage}
        self.turn |= {"norm": self.norm, "eps": EPS, "norm_each_head": self.norm_each_head}
        if self.norm != "none":
            self.turn["q_weight"] = normal(q_size, seed=3, dtype=self.number)
            self.turn["k_weight"] = normal(k_size, seed=4, dtype=self.number)
        if self.norm == "layer":
            self.turn["q_bias"] = normal(q_size, seed=5, dtype=self.number)
            self.turn["k_bias"] = normal(k_size, seed=6, dtype=self.number)
        self.attend = {"scale": self.scale, "window": self.window, "softcap": self.softcap}
        self.positions = torch.stack(
            [
                integers([before + len(oracle.path(tree, i)) for i in range(self.nodes)])
                for before, tree in zip(self.prefix, self.parents)
            ]
        )

    def written(self, write=ops.rotary_write, **changes) -> tuple:
        """The cache with texts and trees, and the trees' queries."""
        cache = empty_cache(
            self.dtype, len(self.prefix), self.kv_heads, self.slots, self.size, self.fill
        )
        for b, count in enumerate(self.prefix):
            row = slice(b, b + 1)
            for begin in range(0, count, 16):
                text = self.texts[row, begin : min(count, begin + 16)].clone()
                nodes = text.shape[1]
                chain = ancestors_of(build_tree("chain", nodes), "cpu")
                at = torch.arange(begin, begin + nodes)[None]
                of_row = [part[row] for part in cache]
                write(text, *of_row, integers([begin]), chain, at, **self.turn)
        qkv = self.qkv.clone()
        ancestors = ancestors_of(self.parents, "cpu")
        inputs = integers(self.prefix), ancestors, self.positions
        write(qkv, *cache, *inputs, **{**self.turn, **changes})
        return qkv, *cache

    def attention(self, qkv, keys, values, attention=ops.packed_attention) -> torch.Tensor:
        inputs = integers(self.prefix), ancestors_of(self.parents, "cpu")
        return attention(qkv, keys, values, *inputs, **self.stage, **self.attend)

    # ---- by the oracle ---------------------------------------------------------------------------

    def token(self, row: torch.Tensor, position: int) -> tuple[list, list, list]:
        """A token's queries, keys and values, heads of each, as they are attended with."""
        parts = row.double().numpy().reshape(-1, self.size)
        q, k, v = np.split(parts, [self.heads, self.heads + self.kv_heads])

        def prepared(heads, which):
            if self.norm != "none":
                each = heads if self.norm_each_head else heads.reshape(1, -1)
                weight, bias = (self.turn.get(f"{which}_{part}") for part in ("weight", "bias"))
                bias = None if bias is None else bias.numpy()
                each = [oracle.layers.norm(x, self.norm, weight.numpy(), bias, EPS) for x in each]
                heads = np.array(each).reshape(heads.shape)
            tables = (self.turn[name][position].double().numpy() for name in ("cosines", "sines"))
            cos, sin = tables
            return [oracle.layers.turn(head, cos, sin) for head in heads]

        return prepared(q, "q"), prepared(k, "k"), list(v)

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Attention [B, N, heads * D], and the sizes of the values in it."""
        name = str(self.dtype)[6:]
        out, sizes = [], []
        for b, before in enumerate(self.prefix):
            text = [self.token(self.texts[b, i], i) for i in range(before)]
            tree = [
                self.token(self.qkv[b, i], int(self.positions[b, i])) for i in range(self.nodes)
            ]
            for i in range(self.nodes):
                path = oracle.path(self.parents[b], i) or [i]
                seen = [*text, *(tree[j] for j in path)]
                for h in range(self.heads):
                    kv = h // self.group
                    keys, values = (
                        [oracle.layers.rounded(token[part][kv], name) for token in seen]
                        for part in (1, 2)
                    )
                    query = tree[i][0][h]
                    out.append(oracle.layers.attend(query, keys, values, **self.attend))
                    sizes.append(np.abs(values).max())
        shape = len(self.prefix), self.nodes, self.heads
        sizes = np.repeat(np.array(sizes).reshape(*shape, 1), self.size, 3)
        flat = *shape[:2], self.heads * self.size
        return np.array(out).reshape(flat), sizes.reshape(flat)

    def tolerance(self) -> float:
        """Of attention, in sizes of the values. Scores are off by a chain of D roundings of numbers
        of a few units; 16 bits may be rounded the other way after a norm or turn, which moves a
        number by a unit in the last place of few of them.
        """
        unit = {torch.float64: 1e-13, torch.float32: 4e-6}.get(self.dtype, 4e-6)
        return unit + {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(self.dtype, 0.0)

    def check(self) -> None:
        qkv, keys, values = self.written()
        got = self.attention(qkv, keys, values)
        exact, sizes = self.exact()
        layers.assert_within(got, exact, self.tolerance() * sizes)
        specified = self.attention(qkv, keys, values, reference.packed_attention)
        unit = 1e-13 if self.dtype == torch.float64 else 4e-6  # of the same cache
        layers.assert_within(got, specified.double().numpy(), unit * sizes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", CACHES, ids=str)
class TestEveryKernel:
    """Every kind of cache with every instruction set that is here."""

    @pytest.mark.parametrize("size, turned", [(2, 2), (20, 8), (64, 64), (33, 0), (96, 24)])
    def test_head_sizes(self, isa, dtype, size, turned):
        Step(dtype, isa, size=size, turned=turned).check()

    @pytest.mark.parametrize("norm, each", [("rms", True), ("rms", False), ("layer", True)])
    def test_norms_of_queries_and_keys(self, isa, dtype, norm, each):
        Step(dtype, isa, norm=norm, norm_each_head=each).check()

    @pytest.mark.parametrize("window", [1, 4, 18])
    def test_windows(self, isa, dtype, window):
        # A slot before the window is multiplied by zero, so that it has to hold a number.
        Step(dtype, isa, window=window, prefix=(0, 30, 5, 16), softcap=2.0).check()

    def test_soft_caps(self, isa, dtype):
        Step(dtype, isa, softcap=1.5, scale=2.0).check()

    def test_groups_and_trees(self, isa, dtype):
        for kv_heads, group, nodes, kind in [(1, 9, 3, "star"), (3, 1, 17, "deep")]:
            Step(dtype, isa, (33,), nodes, kind, kv_heads, group).check()

    def test_writing_is_specified(self, isa, dtype):
        for options in ({}, {"norm": "rms"}, {"norm": "layer", "norm_each_head": False}):
            step = Step(dtype, isa, fill=0.0, **options)
            got, specified = step.written(), step.written(reference.rotary_write)
            eps = torch.finfo(dtype).eps
            unit = 1e-14 if dtype == torch.float64 else 4e-6
            for x, y, rounding in zip(got, specified, (0, eps, eps)):
                torch.testing.assert_close(x, y, rtol=rounding + unit, atol=unit)

    def test_what_is_not_written_is_untouched(self, isa, dtype):
        step = Step(dtype, isa, prefix=(5, 17), nodes=4)
        _, keys, values = step.written()
        at_key, at_value = key_places(keys, step.size), value_places(values, step.size)
        for b, before in enumerate(step.prefix):
            end = before + step.nodes
            for cache, places in ((keys, at_key), (values, at_value)):
                assert cache[b][:, places[:end]].isfinite().all()
                untouched = torch.ones(cache.shape[2], dtype=torch.bool)
                untouched[places[:end]] = False
                assert cache[b][:, untouched].isnan().all()

    def test_queries_and_values_stay_where_they_are(self, isa, dtype):
        step = Step(dtype, isa, turned=0)
        assert_equal(step.written()[0], step.qkv)

    def test_threads_change_no_bit(self, isa, dtype):
        step = Step(dtype, isa, norm="rms", nodes=9)
        results = []
        for count in (1, 2, 3, 7):
            with threads(count):
                written = step.written()
                results.append((step.attention(*written), *written))
        for result in results[1:]:
            assert_equal(result, results[0])

    @pytest.mark.parametrize("window", [0, 6])
    def test_a_path_has_the_bits_of_a_prefix(self, isa, dtype, window):
        """The last node of a chain, however many of the nodes above it were committed before."""
        length = 40
        whole = normal(1, length, 80 * 2, seed=1, dtype=number(dtype))
        stage = {"heads": 4, "kv_heads": 2, "isa": isa}
        results = set()
        for begin in (0, 1, 7, 15, 16, 17, 31, 39):
            cache = empty_cache(dtype, 1, 2, 48, 20)
            for first, last in ((0, begin), (begin, length)):
                if first == last:
                    continue
                chain = ancestors_of([build_tree("chain", last - first)], "cpu")
                at = torch.arange(first, last)[None]
                part = whole[:, first:last].clone()
                inputs = *cache, integers([first]), chain
                ops.rotary_write(part, *inputs, at, **stage)
            out = ops.packed_attention(part, *inputs, scale=0.3, window=window, **stage)
            results.add(out[0, -1].numpy().tobytes())
        assert len(results) == 1

    def test_a_node_has_the_same_bits_alone_and_in_a_tree(self, isa, dtype):
        step = Step(dtype, isa, (21,), nodes=30, group=3)
        qkv, keys, values = step.written()
        whole = step.attention(qkv, keys, values)
        at_key, at_value = key_places(keys, step.size), value_places(values, step.size)
        for node in (0, 3, 17, 29):
            path = oracle.path(step.parents[0], node)
            alone = keys.clone(), values.clone()
            for i, above in enumerate(path):
                for cache, old, at in zip(alone, (keys, values), (at_key, at_value)):
                    cache[0][:, at[21 + i]] = old[0][:, at[21 + above]]
            chain = ancestors_of([build_tree("chain", len(path))], "cpu")
            inputs = qkv[:, path].contiguous(), *alone, integers([21]), chain
            out = ops.packed_attention(*inputs, **step.stage, **step.attend)
            assert_equal(out[0, -1], whole[0, node])

    def test_what_is_no_number_reaches_who_attends_to_it_only(self, isa, dtype):
        step = Step(dtype, isa, (9, 9), nodes=8, kind="deep")
        qkv, keys, values = step.written()
        clean = step.attention(qkv, keys, values)
        for cache, places in ((keys, key_places), (values, value_places)):
            kept = cache.clone()
            cache[1, 0, places(cache, step.size)[9 + 3, 0]] = float("nan")
            got = step.attention(qkv, keys, values)
            seen = [i for i in range(8) if 3 in oracle.path(step.parents[1], i)]
            for i in range(8):
                of_first = got[1, i].view(step.heads, -1)[: step.group]
                assert bool(of_first.isnan().any()) == (i in seen)
                if i not in seen:
                    assert_equal(got[1, i], clean[1, i])
            assert_equal(got[0], clean[0])
            cache.copy_(kept)


@st.composite
def steps(draw) -> Step:
    size = draw(st.integers(1, 70))
    return Step(
        draw(st.sampled_from(CACHES)),
        draw(st.sampled_from([isa for isa in ALL_ISAS if runs_here(isa)])),
        tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))),
        draw(st.integers(1, 20)),
        draw(st.sampled_from(["random", "chain", "star", "deep"])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        size,
        2 * draw(st.integers(0, size // 2)),
        draw(st.sampled_from(["none", "rms", "layer"])) if size > 2 else "none",
        draw(st.booleans()),
        0.3,
        draw(st.sampled_from([0, 0, 1, 5, 33])),
        draw(st.sampled_from([0.0, 2.0])),
        draw(st.integers(0, 99)),
    )


@given(steps())
def test_attention_is_specified(step):
    with one_thread():
        step.check()
