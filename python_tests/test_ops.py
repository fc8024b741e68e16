"""Every op against its specification (msn_ext.ops.reference) and an independent oracle (oracle.py).

Those of best-first drafting have a file of their own; what concerns all ops alike is here.
"""

import dataclasses
import random

import oracle
import pytest
import torch
from cases import (
    CPU_DTYPES,
    EXTREMES,
    KINDS,
    SIZES,
    assert_equal,
    bounded,
    build_tree,
    integers,
    malformed_trees,
    one_thread,
    padded,
    seeded,
    tree_tensor,
    trees,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from msn_ext import _C, ops
from msn_ext.ops import reference

OPS = [
    "tree_ancestors",
    "tree_attention",
    "verify_tree",
    "verify_logits",
    "commit_kv",
    "advance_text",
    "lookup_ngram",
    "fill_tree",
    "top_guesses",
    "remember_guesses",
    "index_suffixes",
    "draft_tree",
    "draw_noise",
]
POISONS = [float("nan"), float("inf"), -float("inf"), 1e30]


def ancestors_of(parents, device: str) -> torch.Tensor:
    return ops.tree_ancestors(tree_tensor(parents, device))[0]


# ---- tree_ancestors ------------------------------------------------------------------------------


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


def test_a_workspace_grows_a_few_times_only():
    """Ops want floats and counters by turns; what was handed out once stays, for the recordings
    that know it.
    """
    space, like = ops.Workspace(), torch.empty(0)
    seen = {}
    for _ in range(100):
        for wanted in ((1000, 1), (1, 70), (10, 10)):
            floats, counters = space.get(like, *wanted)
            assert len(floats) >= wanted[0] and len(counters) >= wanted[1] and not counters.any()
            assert (floats.dtype, counters.dtype) == (torch.float32, torch.int32)
            seen |= {x.data_ptr(): x for x in (floats, counters)}
    assert len(seen) == 3
    for size in range(1, 5000):
        seen |= {x.data_ptr(): x for x in space.get(like, size, 1)}
    assert sum(map(len, seen.values())) < 4 * 5000


# ---- tree_attention ------------------------------------------------------------------------------

LAYOUTS = ["contiguous", "slots first", "slice", "every other", "layers"]


def lay_out(x: torch.Tensor, layout: str, around: float) -> torch.Tensor:
    """The same values with other strides; the storage around them holds ``around``."""
    b, h, c, d = x.shape
    if layout == "contiguous":
        return x.contiguous()
    view = {
        "slots first": lambda: x.new_full((b, c, h, d), around).transpose(1, 2),
        "slice": lambda: x.new_full((b + 1, h + 2, c + 3, d + 5), around)[1:, 1:-1, 2:-1, 3:-2],
        "every other": lambda: x.new_full((b, h, c, 2 * d), around)[..., ::2],
        "layers": lambda: x.new_full((b, c, 3, h, d), around)[:, :, 1].transpose(1, 2),
    }[layout]()
    return view.copy_(x)


@dataclasses.dataclass
class Attention:
    """A tree_attention call. Slots that no node may see hold ``poison``."""

    parents: list[list[int]]
    lengths: list[int]
    offsets: list[int] | None = None
    dtype: torch.dtype = torch.float32
    kv_heads: int = 1
    group: int = 2
    dim: int = 16
    v_dim: int = 16
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slack: int = 3
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    poison: float = float("nan")
    seed: int = 0

    @property
    def nodes(self) -> int:
        return len(self.parents[0])

    def offset(self, b: int) -> int:
        return self.offsets[b] if self.offsets else 0

    def allowed(self, b: int, node: int) -> list[int]:
        return oracle.allowed_slots(
            self.parents[b], node, self.lengths[b], self.offset(b), self.window
        )

    def arguments(self, device: str) -> dict:
        """The op's arguments; ``ancestors`` is shared where all rows have the same tree."""
        random_source = seeded(self.seed)
        poison = torch.tensor(self.poison).to(self.dtype).item()
        batch, slots = len(self.parents), max(self.lengths) + self.nodes + self.slack
        heads = self.kv_heads * self.group

        def normal(*shape):
            return torch.randn(*shape, generator=random_source, dtype=torch.float64).to(
                device, self.dtype
            )

        q = normal(batch, heads, self.nodes, self.dim)
        k, v = (
            normal(batch, self.kv_heads, slots, self.dim),
            normal(batch, self.kv_heads, slots, self.v_dim),
        )
        sinks = normal(heads) if self.sinks else None
        for b in range(batch):
            unseen = set(range(slots)).difference(*(self.allowed(b, i) for i in range(self.nodes)))
            k[b, :, list(unseen)] = poison
            v[b, :, list(unseen)] = poison
        q, k, v = (lay_out(x, layout, poison) for x, layout in zip((q, k, v), self.layouts))
        shared = all(row == self.parents[0] for row in self.parents)
        return {
            "q": q,
            "k_cache": k,
            "v_cache": v,
            "lengths": integers(self.lengths, device),
            "ancestors": ancestors_of(self.parents[0] if shared else self.parents, device),
            "offsets": integers(self.offsets, device) if self.offsets else None,
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": sinks,
        }

    def tolerance(self, device: str) -> dict:
        """Float sums in another order, and one rounding to the dtype (on CUDA two)."""
        if self.dtype == torch.float64:
            return {"rtol": 1e-11, "atol": 1e-11}
        rounding = 0.0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps
        return {"rtol": 1e-5 + rounding, "atol": 3e-5 + (rounding if device == "cuda" else 0.0)}

    def check(self, device: str) -> None:
        arguments = self.arguments(device)
        out = ops.tree_attention(**arguments)
        heads = self.kv_heads * self.group
        assert (
            out.shape == (len(self.parents), self.nodes, heads, self.v_dim) and out.is_contiguous()
        )
        assert out.dtype == self.dtype and out.device == arguments["q"].device
        with one_thread():
            exact = oracle.attention(
                parents=self.parents, **{k: x for k, x in arguments.items() if k != "ancestors"}
            )
            specified = reference.tree_attention(**arguments)
        for expected in (exact, specified.cpu().double()):
            torch.testing.assert_close(out.cpu().double(), expected, **self.tolerance(device))


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


@pytest.mark.parametrize("nodes", SIZES)
def test_attention_at_every_word_boundary(device, nodes):
    parents = [build_tree(kind, nodes) for kind in KINDS]
    Attention(parents, [0, 7, 64, 65, 100], group=3, dim=8, v_dim=8).check(device)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 1000])
def test_attention_at_every_block_boundary_of_the_prefix(device, length):
    Attention([build_tree("random", 9)] * 2, [length, length // 2], offsets=[length // 3, 0]).check(
        device
    )


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


@pytest.mark.parametrize("group", range(1, 9))
def test_attention_groups_of_query_heads(device, group):
    Attention([build_tree("random", 33)], [50], kv_heads=2, group=group).check(device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_takes_strides_as_they_come(device, layout):
    Attention([build_tree("random", 10)] * 2, [30, 20], kv_heads=2, layouts=(layout,) * 3).check(
        device
    )


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64, 65, 70, 71, 10**12])
def test_attention_window_counts_logical_positions(device, window):
    parents = [build_tree("chain", 12), build_tree("deep", 12)]
    Attention(parents, [70, 66], offsets=[5, 1], window=window).check(device)


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


# ---- verify_tree ---------------------------------------------------------------------------------


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


# ---- verify_logits -------------------------------------------------------------------------------


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


# ---- commit_kv -----------------------------------------------------------------------------------

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


# ---- advance_text --------------------------------------------------------------------------------


@st.composite
def texts_that_grow(draw):
    """Arguments of advance_text: ends inside the path, at its end and behind it, rows that may gain
    little or nothing.
    """
    rows, nodes = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 7, 33, 64, 65, 256]))
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    accepted = torch.randint(1, nodes + 1, (rows,), generator=generator)
    path = torch.full((rows, nodes), -1)
    for b in range(rows):
        path[b, : accepted[b]] = (
            torch.randperm(nodes, generator=generator)[: accepted[b]].sort().values
        )
    lengths = torch.randint(0, 30, (rows,), generator=generator)
    vocabulary = draw(st.sampled_from([2, 5, 1000]))
    return {
        "history": torch.randint(0, 99, (rows, 30 + nodes), generator=generator),
        "lengths": lengths,
        "remaining": torch.randint(
            0, draw(st.sampled_from([1, 3, 300])), (rows,), generator=generator
        ),
        "targets": torch.randint(
            0, vocabulary + draw(st.integers(0, 1)), (rows, nodes), generator=generator
        ),
        "path": path,
        "accept_length": accepted,
        "ends": torch.randint(0, vocabulary, (draw(st.integers(0, 3)),), generator=generator),
        "vocabulary": vocabulary,
    }


@given(arguments=texts_that_grow())
def test_texts_grow_as_specified(device, arguments):
    expected = {
        name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    given_ones = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    want, got = reference.advance_text(**expected), ops.advance_text(**given_ones)
    assert_equal([x.cpu() for x in got], want)
    for name in ("history", "lengths", "remaining"):
        assert torch.equal(given_ones[name].cpu(), expected[name]), name


def test_a_text_without_room_is_refused_on_the_cpu():
    arguments = example("advance_text", "cpu")
    for name, value in (
        ("lengths", 9),
        ("lengths", -1),
        ("accept_length", 5),
        ("path", 4),
        ("path", -2),
    ):
        wrong = arguments[name].clone()
        wrong.view(-1)[0] = value
        with pytest.raises(ValueError, match=name):
            ops.advance_text(**{**example("advance_text", "cpu"), name: wrong})


# ---- lookup_ngram --------------------------------------------------------------------------------


def check_lookup(
    texts: list[list[int]], behind: list[list[int]], max_ngram: int, length: int, device: str
) -> None:
    """``behind`` is what lies in the history after each text."""
    width = max(len(t) + len(p) for t, p in zip(texts, behind))
    history = integers(padded([t + p for t, p in zip(texts, behind)], width), device)
    lengths = integers([len(t) for t in texts], device)
    got = ops.lookup_ngram(history, lengths, max_ngram, length)
    assert_equal(got, reference.lookup_ngram(history, lengths, max_ngram, length))
    found, matched = zip(*(oracle.lookup(t, max_ngram, length) for t in texts))
    assert got[0].tolist() == padded(found, length) and got[1].tolist() == list(matched)


@st.composite
def texts(draw) -> list[int]:
    alphabet = st.integers(0, draw(st.integers(0, 3)))
    return draw(st.lists(alphabet, min_size=1, max_size=60))


@given(
    rows=st.lists(texts(), min_size=1, max_size=3),
    max_ngram=st.integers(1, 8) | st.just(2**20),
    length=st.integers(0, 12),
)
def test_lookup_in_random_texts(device, rows, max_ngram, length):
    """Behind every text lies a longer match than any in it."""
    check_lookup(rows, [row * 2 for row in rows], max_ngram, length, device)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1023, 1024, 1025, 5000])
def test_lookup_in_long_texts(device, size):
    rng = random.Random(size)
    rows = [[rng.randrange(top) for _ in range(size)] for top in (2, 50, 10**9)]
    check_lookup(rows, [[], [1, 2], [3]], 4, 5, device)


def test_lookup_never_matches_itself(device):
    tokens, matched = ops.lookup_ngram(
        integers([[1, 2, 3, 4], [7, 0, 0, 0]], device), integers([4, 1], device), 3, 2
    )
    assert tokens.tolist() == [[-1, -1]] * 2 and matched.tolist() == [0, 0]


def test_lookup_takes_the_most_recent_of_equal_matches_and_the_longest_of_all(device):
    recent = [1, 2, 8, 1, 2, 9, 1, 2]
    longest = [5, 1, 2, 8, 7, 2, 9, 5, 1, 2]
    for text, expected, size in [(recent, [9, 1, 2], 2), (longest, [8, 7, 2], 3)]:
        tokens, matched = ops.lookup_ngram(
            integers([text], device), integers([len(text)], device), 3, 3
        )
        assert tokens.tolist() == [expected] and matched.tolist() == [size]


def test_lookup_would_notice_what_lies_behind(device):
    """Negative control: one token more, and the match behind the text counts."""
    history = integers([[1, 2, 3, 9, 1, 2, 3]], device)
    shorter = ops.lookup_ngram(history, integers([6], device), 3, 2)
    longer = ops.lookup_ngram(history, integers([7], device), 3, 2)
    assert [x.tolist() for x in shorter] == [[[3, 9]], [2]] and [x.tolist() for x in longer] == [
        [[9, 1]],
        [3],
    ]


# ---- fill_tree -----------------------------------------------------------------------------------


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
    """``depth`` is one list a row; what lies behind a row's length is poison."""
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


# ---- torch: registration, compilation ------------------------------------------------------------


def example(op: str, device: str) -> dict:
    """Arguments that the op takes."""
    parents = tree_tensor([[-1, 0, 0, 1], [-1, 0, 1, -1]], device)
    lengths = integers([5, 9], device)
    source = seeded(0)
    shapes = [(2, 4, 4, 8), (2, 2, 16, 8), (2, 2, 16, 6)]
    q, k, v = (torch.randn(shape, generator=source).to(device) for shape in shapes)
    tokens = integers([[1, 2, 3, 4], [1, 2, 3, 4]], device)
    text = integers([[1, 2, 3, 1, 2, 0], [5, 5, 5, 5, 5, 5]], device)
    guesses = (
        torch.arange(2 * 4 * 8, dtype=torch.int32, device=device).view(2, 4, 8) * 17
    )  # levels 0 to 15
    return {
        "tree_ancestors": lambda: {"parents": parents},
        "tree_attention": lambda: {
            "q": q,
            "k_cache": k,
            "v_cache": v,
            "lengths": lengths,
            "ancestors": ops.tree_ancestors(parents)[0],
            "offsets": integers([0, 2], device),
            "scale": 0.5,
            "window": 7,
            "softcap": 3.0,
            "sinks": torch.ones(4, device=device),
        },
        "verify_tree": lambda: {"tokens": tokens, "targets": tokens + 1, "parents": parents},
        "verify_logits": lambda: {
            "logits": torch.randn(2, 4, 20, generator=source).to(device),
            "tokens": tokens,
            "parents": parents,
        },
        "commit_kv": lambda: {
            "caches": [k, v],
            "lengths": lengths,
            "path": integers([[0, 2, -1], [0, 1, 3]], device),
            "accept_length": integers([2, 3], device),
        },
        "advance_text": lambda: {
            "history": torch.nn.functional.pad(text, (0, 4)),
            "lengths": integers([5, 6], device),
            "remaining": integers([9, 2], device),
            "targets": tokens,
            "path": integers([[0, 2, -1, -1], [0, 1, 3, -1]], device),
            "accept_length": integers([2, 3], device),
            "ends": integers([7, 0], device),
            "vocabulary": 50,
        },
        "lookup_ngram": lambda: {
            "history": text,
            "lengths": integers([5, 6], device),
            "max_ngram": 3,
            "length": 4,
        },
        "fill_tree": lambda: {
            "candidates": integers([[[5, 6], [7, 8]]] * 2, device),
            "retrieved": integers([[9, -1]] * 2, device),
            "history": integers([[1, 2, 3, 4], [5, 6, 7, 8]], device),
            "lengths": integers([3, 4], device),
            "depth": tree_tensor([[0, 1, 1, 2], [0, 1, 2, -1]], device),
            "rank": tree_tensor([0, 0, -1, 1], device),
            "seed": integers([42], device),
        },
        "top_guesses": lambda: {"logits": torch.randn(2, 4, 20, generator=source).to(device)},
        "remember_guesses": lambda: {
            "contexts": torch.zeros(3, 32, 9, dtype=torch.int32, device=device),
            "history": text,
            "lengths": integers([5, 6], device),
            "tokens": tokens,
            "parents": parents,
            "path": integers([[0, 1, 3, -1], [0, -1, -1, -1]], device),
            "guesses": guesses,
        },
        "index_suffixes": lambda: {
            "heads": torch.zeros(2, 8, 32, dtype=torch.int32, device=device),
            "history": text,
            "start": integers([0, 2], device),
            "lengths": integers([5, 6], device),
        },
        "draft_tree": lambda: {
            "history": text,
            "lengths": integers([5, 6], device),
            "denoised": guesses[:, :3],
            "contexts": torch.zeros(3, 32, 9, dtype=torch.int32, device=device),
            "heads": torch.zeros(2, 8, 32, dtype=torch.int32, device=device),
            "corpus": torch.arange(50, dtype=torch.int32, device=device),
            "corpus_heads": torch.ones(8, 32, dtype=torch.int32, device=device),
            "factors": torch.ones(reference.FACTORS, dtype=torch.float64, device=device),
            "nodes": 6,
            "max_depth": 3,
            "foresight": 0.05,
        },
        "draw_noise": lambda: {
            "input_ids": text,
            "labels": text.masked_fill(torch.arange(6, device=device) < 2, -100),
            "documents": integers([[0, 0, 6], [1, 0, 5]], device),
            "keep_token_ids": integers([3], device),
            "starts": integers([[-1, -1], [2, -1]], device),
            "seed": 7,
            "length": 2,
            "random": 0.5,
            "vocabulary": 20,
            "apart": True,
        },
    }[op]()


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    torch.library.opcheck(getattr(torch.ops.msn_ext, op).default, (), example(op, device))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_step_equals_the_eager_one(device, backend):
    """All ops in one graph; caches and tables change in place."""

    def step(arguments):
        ancestors, depth = ops.tree_ancestors(**arguments["tree_ancestors"], validate=False)
        out = ops.tree_attention(**{**arguments["tree_attention"], "ancestors": ancestors}) * 2
        gained, status = ops.advance_text(**arguments["advance_text"])
        retrieved, matched = ops.lookup_ngram(**arguments["lookup_ngram"])
        filled = ops.fill_tree(**{**arguments["fill_tree"], "depth": depth, "retrieved": retrieved})
        drafted = {
            **arguments["verify_tree"],
            "tokens": filled,
            "targets": filled * 0 + 3,
        }  # row 0 retrieved a 3
        accept_length, path, bonus, continuation = ops.verify_tree(**drafted)
        ops.commit_kv(**{**arguments["commit_kv"], "path": path, "accept_length": accept_length})
        guesses = ops.top_guesses(arguments["top_guesses"]["logits"] * 2)
        checked = ops.verify_logits(**{**arguments["verify_logits"], "tokens": filled})
        observed = {
            **arguments["remember_guesses"],
            "tokens": filled,
            "path": path,
            "guesses": guesses,
        }
        ops.remember_guesses(**observed)
        ops.index_suffixes(**arguments["index_suffixes"])
        tables = {"contexts": observed["contexts"], "heads": arguments["index_suffixes"]["heads"]}
        draft = ops.draft_tree(**{**arguments["draft_tree"], **tables, "denoised": guesses})
        verified = accept_length, path, bonus, continuation
        noise = ops.draw_noise(
            **{**arguments["draw_noise"], "labels": arguments["draw_noise"]["labels"] + 0}
        )
        return (
            ancestors,
            depth,
            out,
            gained,
            status,
            retrieved,
            matched,
            filled,
            *verified,
            guesses,
            *checked,
            *draft,
            *noise,
        )

    torch.compiler.reset()
    eager, compiled = ({op: example(op, device) for op in OPS} for _ in range(2))
    assert_equal(torch.compile(step, fullgraph=True, backend=backend)(compiled), step(eager))
    for op, changed in [
        ("commit_kv", "caches"),
        ("remember_guesses", "contexts"),
        ("index_suffixes", "heads"),
        ("advance_text", "history"),
    ]:
        assert_equal(compiled[op][changed], eager[op][changed])
        assert not all(
            torch.equal(x, y) for x, y in zip(compiled[op][changed], example(op, device)[changed])
        )


@pytest.mark.parametrize(
    "op, name", [("tree_attention", "q"), ("top_guesses", "logits"), ("draft_tree", "factors")]
)
def test_ops_take_tensors_that_require_grad(op, name):
    arguments = example(op, "cpu")
    expected = getattr(ops, op)(**arguments)
    arguments[name] = torch.nn.Parameter(arguments[name])
    assert_equal(getattr(ops, op)(**arguments), expected)


# ---- refusals ------------------------------------------------------------------------------------


def fewer_rows(x):
    return x[:1]


def flat(x):
    return x.flatten()


def scalar(x):
    return x.flatten()[0]


def as_int32(x):
    return x.int()


def as_float(x):
    return x.float()


def as_int64(x):
    return x.long()


def strided(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def sized(*shape):
    return lambda x: x.new_zeros(shape)


def number(value):
    return lambda x: value


# Seen from shapes and dtypes alone: op, changed arguments, the argument that the message names.
WRONG_FORMS = [
    ("tree_ancestors", {"parents": scalar}, "parents"),
    ("tree_ancestors", {"parents": lambda x: x[None]}, "parents"),
    ("tree_ancestors", {"parents": sized(2, 0)}, "parents"),
    ("tree_ancestors", {"parents": sized(257)}, "parents"),
    ("tree_ancestors", {"parents": lambda x: x.long()}, "parents"),
    ("tree_ancestors", {"parents": as_float}, "parents"),
    ("tree_attention", {"q": flat}, "q"),
    ("tree_attention", {"q": lambda x: x.int()}, "q"),
    ("tree_attention", {"q": sized(2, 4, 0, 8)}, "q"),
    ("tree_attention", {"q": sized(2, 4, 257, 8)}, "q"),
    ("tree_attention", {"q": sized(2, 0, 4, 8)}, "q"),
    ("tree_attention", {"q": sized(2, 4, 4, 257)}, "q"),
    ("tree_attention", {"q": sized(2, 4, 4, 0)}, "q"),
    ("tree_attention", {"k_cache": flat}, "k_cache"),
    ("tree_attention", {"k_cache": fewer_rows}, "k_cache"),
    ("tree_attention", {"k_cache": lambda x: x.half()}, "k_cache"),
    ("tree_attention", {"k_cache": lambda x: x[..., :-1]}, "k_cache"),
    ("tree_attention", {"k_cache": sized(2, 3, 16, 8)}, "k_cache"),
    ("tree_attention", {"k_cache": sized(2, 0, 16, 8)}, "k_cache"),
    ("tree_attention", {"v_cache": flat}, "v_cache"),
    ("tree_attention", {"v_cache": fewer_rows}, "v_cache"),
    ("tree_attention", {"v_cache": lambda x: x.half()}, "v_cache"),
    ("tree_attention", {"v_cache": lambda x: x[:, :, :-1]}, "v_cache"),
    ("tree_attention", {"v_cache": lambda x: x[:, :1]}, "v_cache"),
    ("tree_attention", {"v_cache": sized(2, 2, 16, 257)}, "v_cache"),
    ("tree_attention", {"lengths": fewer_rows}, "lengths"),
    ("tree_attention", {"lengths": scalar}, "lengths"),
    ("tree_attention", {"lengths": as_int32}, "lengths"),
    ("tree_attention", {"ancestors": fewer_rows}, "ancestors"),
    ("tree_attention", {"ancestors": flat}, "ancestors"),
    ("tree_attention", {"ancestors": as_int32}, "ancestors"),
    ("tree_attention", {"ancestors": sized(2, 4, 2)}, "ancestors"),
    ("tree_attention", {"offsets": fewer_rows}, "offsets"),
    ("tree_attention", {"offsets": as_int32}, "offsets"),
    ("tree_attention", {"sinks": lambda x: x[:-1]}, "sinks"),
    ("tree_attention", {"sinks": lambda x: x.half()}, "sinks"),
    ("tree_attention", {"window": lambda x: -1}, "window"),
    ("tree_attention", {"softcap": lambda x: -1.0}, "softcap"),
    ("tree_attention", {"softcap": lambda x: float("nan")}, "softcap"),
    ("verify_tree", {"tokens": flat}, "tokens"),
    ("verify_tree", {"tokens": as_int32}, "tokens"),
    ("verify_tree", {"tokens": as_float}, "tokens"),
    ("verify_tree", {"tokens": sized(2, 0)}, "tokens"),
    ("verify_tree", {"tokens": sized(2, 257)}, "tokens"),
    ("verify_tree", {"targets": fewer_rows}, "targets"),
    ("verify_tree", {"targets": as_int32}, "targets"),
    ("verify_tree", {"targets": lambda x: x[:, :-1]}, "targets"),
    ("verify_tree", {"parents": fewer_rows}, "parents"),
    ("verify_tree", {"parents": lambda x: x.long()}, "parents"),
    ("verify_tree", {"parents": lambda x: x[:, :-1]}, "parents"),
    ("verify_logits", {"logits": lambda x: x[0]}, "logits"),
    ("verify_logits", {"logits": fewer_rows}, "logits"),
    ("verify_logits", {"logits": as_int64}, "logits"),
    ("verify_logits", {"logits": lambda x: x[:, :, :0]}, "logits"),
    ("verify_logits", {"tokens": as_int32}, "tokens"),
    ("verify_logits", {"parents": fewer_rows}, "parents"),
    ("verify_logits", {"parents": lambda x: x.long()}, "parents"),
    ("commit_kv", {"caches": lambda x: [x[0], x[1][0]]}, r"caches\[1\]"),
    ("commit_kv", {"caches": lambda x: [x[0], x[1][:1]]}, r"caches\[1\]"),
    ("commit_kv", {"lengths": fewer_rows}, "lengths"),
    ("commit_kv", {"lengths": as_int32}, "lengths"),
    ("commit_kv", {"path": flat}, "path"),
    ("commit_kv", {"path": as_int32}, "path"),
    ("commit_kv", {"accept_length": fewer_rows}, "accept_length"),
    ("commit_kv", {"accept_length": as_int32}, "accept_length"),
    ("advance_text", {"history": flat}, "history"),
    ("advance_text", {"history": as_int32}, "history"),
    ("advance_text", {"lengths": fewer_rows}, "lengths"),
    ("advance_text", {"remaining": as_int32}, "remaining"),
    ("advance_text", {"targets": fewer_rows}, "targets"),
    ("advance_text", {"path": lambda x: x[:, :-1]}, "path"),
    ("advance_text", {"accept_length": fewer_rows}, "accept_length"),
    ("advance_text", {"ends": scalar}, "ends"),
    ("advance_text", {"ends": as_int32}, "ends"),
    ("lookup_ngram", {"history": scalar}, "history"),
    ("lookup_ngram", {"history": flat}, "history"),
    ("lookup_ngram", {"history": as_int32}, "history"),
    ("lookup_ngram", {"lengths": fewer_rows}, "lengths"),
    ("lookup_ngram", {"lengths": as_int32}, "lengths"),
    ("lookup_ngram", {"max_ngram": lambda x: 0}, "max_ngram"),
    ("lookup_ngram", {"max_ngram": lambda x: -5}, "max_ngram"),
    ("lookup_ngram", {"max_ngram": lambda x: 2**40}, "max_ngram"),
    ("lookup_ngram", {"length": lambda x: -1}, "length"),
    ("fill_tree", {"candidates": flat}, "candidates"),
    ("fill_tree", {"candidates": fewer_rows}, "candidates"),
    ("fill_tree", {"candidates": as_int32}, "candidates"),
    ("fill_tree", {"retrieved": flat}, "retrieved"),
    ("fill_tree", {"retrieved": fewer_rows}, "retrieved"),
    ("fill_tree", {"retrieved": as_int32}, "retrieved"),
    ("fill_tree", {"history": scalar}, "history"),
    ("fill_tree", {"history": flat}, "history"),
    ("fill_tree", {"history": as_int32}, "history"),
    ("fill_tree", {"lengths": fewer_rows}, "lengths"),
    ("fill_tree", {"lengths": as_int32}, "lengths"),
    ("fill_tree", {"depth": fewer_rows}, "depth"),
    ("fill_tree", {"depth": lambda x: x.long()}, "depth"),
    ("fill_tree", {"depth": lambda x: x[:, :-1]}, "depth"),
    ("fill_tree", {"rank": scalar}, "rank"),
    ("fill_tree", {"rank": lambda x: x.long()}, "rank"),
    ("fill_tree", {"rank": sized(0)}, "rank"),
    ("fill_tree", {"rank": sized(257)}, "rank"),
    ("fill_tree", {"seed": lambda x: x.repeat(2)}, "seed"),
    ("fill_tree", {"seed": as_int32}, "seed"),
    ("top_guesses", {"logits": scalar}, "logits"),
    ("top_guesses", {"logits": as_int64}, "logits"),
    ("top_guesses", {"logits": lambda x: x.to(torch.complex64)}, "logits"),
    ("index_suffixes", {"heads": flat}, "heads"),
    ("index_suffixes", {"heads": fewer_rows}, "heads"),
    ("index_suffixes", {"heads": as_int64}, "heads"),
    ("index_suffixes", {"heads": strided}, "heads"),
    ("index_suffixes", {"heads": sized(2, 7, 32)}, "heads"),
    ("index_suffixes", {"history": scalar}, "history"),
    ("index_suffixes", {"history": flat}, "history"),
    ("index_suffixes", {"history": as_int32}, "history"),
    ("index_suffixes", {"start": fewer_rows}, "start"),
    ("index_suffixes", {"start": as_int32}, "start"),
    ("index_suffixes", {"lengths": fewer_rows}, "lengths"),
    ("index_suffixes", {"lengths": as_int32}, "lengths"),
    ("remember_guesses", {"contexts": flat}, "contexts"),
    ("remember_guesses", {"contexts": as_int64}, "contexts"),
    ("remember_guesses", {"contexts": strided}, "contexts"),
    ("remember_guesses", {"contexts": sized(2, 32, 9)}, "contexts"),
    ("remember_guesses", {"contexts": sized(3, 32, 8)}, "contexts"),
    ("remember_guesses", {"history": flat}, "history"),
    ("remember_guesses", {"history": fewer_rows}, "history"),
    ("remember_guesses", {"history": as_int32}, "history"),
    ("remember_guesses", {"lengths": fewer_rows}, "lengths"),
    ("remember_guesses", {"lengths": as_int32}, "lengths"),
    ("remember_guesses", {"tokens": flat}, "tokens"),
    ("remember_guesses", {"tokens": as_int32}, "tokens"),
    ("remember_guesses", {"tokens": sized(2, 0)}, "tokens"),
    ("remember_guesses", {"tokens": sized(2, 257)}, "tokens"),
    ("remember_guesses", {"parents": fewer_rows}, "parents"),
    ("remember_guesses", {"parents": as_int64}, "parents"),
    ("remember_guesses", {"parents": lambda x: x[:, :-1]}, "parents"),
    ("remember_guesses", {"path": fewer_rows}, "path"),
    ("remember_guesses", {"path": as_int32}, "path"),
    ("remember_guesses", {"path": lambda x: x[:, :-1]}, "path"),
    ("remember_guesses", {"guesses": flat}, "guesses"),
    ("remember_guesses", {"guesses": as_int64}, "guesses"),
    ("remember_guesses", {"guesses": lambda x: x[..., :-1]}, "guesses"),
    ("remember_guesses", {"guesses": lambda x: x[:, :-1]}, "guesses"),
    ("draft_tree", {"history": scalar}, "history"),
    ("draft_tree", {"history": flat}, "history"),
    ("draft_tree", {"history": as_int32}, "history"),
    ("draft_tree", {"lengths": fewer_rows}, "lengths"),
    ("draft_tree", {"lengths": as_int32}, "lengths"),
    ("draft_tree", {"denoised": flat}, "denoised"),
    ("draft_tree", {"denoised": fewer_rows}, "denoised"),
    ("draft_tree", {"denoised": as_int64}, "denoised"),
    ("draft_tree", {"denoised": lambda x: x[..., :-1]}, "denoised"),
    ("draft_tree", {"contexts": flat}, "contexts"),
    ("draft_tree", {"contexts": as_int64}, "contexts"),
    ("draft_tree", {"contexts": sized(2, 32, 9)}, "contexts"),
    ("draft_tree", {"contexts": sized(3, 32, 8)}, "contexts"),
    ("draft_tree", {"heads": flat}, "heads"),
    ("draft_tree", {"heads": fewer_rows}, "heads"),
    ("draft_tree", {"heads": as_int64}, "heads"),
    ("draft_tree", {"heads": sized(2, 7, 32)}, "heads"),
    ("draft_tree", {"corpus": scalar}, "corpus"),
    ("draft_tree", {"corpus": lambda x: x[None]}, "corpus"),
    ("draft_tree", {"corpus": as_int64}, "corpus"),
    ("draft_tree", {"corpus_heads": flat}, "corpus_heads"),
    ("draft_tree", {"corpus_heads": lambda x: x[None]}, "corpus_heads"),
    ("draft_tree", {"corpus_heads": as_int64}, "corpus_heads"),
    ("draft_tree", {"corpus_heads": sized(7, 32)}, "corpus_heads"),
    ("draft_tree", {"factors": fewer_rows}, "factors"),
    ("draft_tree", {"factors": scalar}, "factors"),
    ("draft_tree", {"factors": as_float}, "factors"),
    ("draft_tree", {"nodes": number(0)}, "nodes"),
    ("draft_tree", {"nodes": number(-1)}, "nodes"),
    ("draft_tree", {"nodes": number(257)}, "nodes"),
    ("draft_tree", {"nodes": number(2**40)}, "nodes"),
    ("draft_tree", {"max_depth": number(-1)}, "max_depth"),
    ("draft_tree", {"max_depth": number(257)}, "max_depth"),
    ("draft_tree", {"foresight": number(-0.01)}, "foresight"),
    ("draft_tree", {"foresight": number(1.01)}, "foresight"),
    ("draft_tree", {"foresight": number(float("nan"))}, "foresight"),
    ("draft_tree", {"foresight": number(float("inf"))}, "foresight"),
    ("draw_noise", {"input_ids": scalar}, "input_ids"),
    ("draw_noise", {"input_ids": as_int32}, "input_ids"),
    ("draw_noise", {"labels": fewer_rows}, "labels"),
    ("draw_noise", {"labels": as_int32}, "labels"),
    ("draw_noise", {"documents": flat}, "documents"),
    ("draw_noise", {"documents": as_int32}, "documents"),
    ("draw_noise", {"documents": lambda x: x[:, :2]}, "documents"),
    ("draw_noise", {"keep_token_ids": scalar}, "keep_token_ids"),
    ("draw_noise", {"keep_token_ids": as_int32}, "keep_token_ids"),
    ("draw_noise", {"starts": flat}, "starts"),
    ("draw_noise", {"starts": fewer_rows}, "starts"),
    ("draw_noise", {"starts": as_int32}, "starts"),
    ("draw_noise", {"starts": lambda x: x[:, :0]}, "segments"),
    ("draw_noise", {"starts": lambda x: x.repeat(1, 129)}, "segments"),
    ("draw_noise", {"length": number(0)}, "length"),
    ("draw_noise", {"length": number(-3)}, "length"),
    ("draw_noise", {"length": number(65)}, "length"),
    ("draw_noise", {"random": number(-0.01)}, "random"),
    ("draw_noise", {"random": number(1.01)}, "random"),
    ("draw_noise", {"random": number(float("nan"))}, "random"),
    ("draw_noise", {"vocabulary": number(0)}, "vocabulary"),
    ("draw_noise", {"vocabulary": number(2**27 + 1)}, "vocabulary"),
]

# Values, which only the CPU reads back: op, arguments, the start of the message.
WRONG_VALUES = [
    ("tree_attention", {"lengths": [5, 13]}, r"lengths\[1\] is 13"),
    ("tree_attention", {"lengths": [-1, 9]}, r"lengths\[0\] is -1"),
    ("tree_attention", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("tree_attention", {"offsets": [6, 2]}, r"offsets\[0\] is 6"),
    ("tree_attention", {"offsets": [0, -1]}, r"offsets\[1\] is -1"),
    ("commit_kv", {"lengths": [5, 13]}, r"lengths"),
    ("commit_kv", {"lengths": [-1, 9]}, r"lengths\[0\] is -1"),
    ("commit_kv", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("commit_kv", {"accept_length": [4, 3]}, r"accept_length\[0\] is 4"),
    ("commit_kv", {"accept_length": [2, -1]}, r"accept_length\[1\] is -1"),
    ("commit_kv", {"path": [[0, 2, -1], [0, 3, 2]]}, r"path\[1\] is 2"),
    ("commit_kv", {"path": [[0, 0, -1], [0, 1, 2]]}, r"path\[0\] is 0"),
    ("commit_kv", {"path": [[-1, 2, -1], [0, 1, 2]]}, r"path\[0\] is -1"),
    ("commit_kv", {"path": [[0, 2, -1], [0, 1, 99]]}, r"path"),
    ("commit_kv", {"path": [[0, 2, -1], [0, 1, 2**63 - 1]]}, r"path\[1\]"),
    ("lookup_ngram", {"lengths": [0, 6]}, r"lengths\[0\] is 0"),
    ("lookup_ngram", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("lookup_ngram", {"lengths": [5, -(2**63)]}, r"lengths\[1\]"),
    ("fill_tree", {"lengths": [0, 4]}, r"lengths\[0\] is 0"),
    ("fill_tree", {"lengths": [3, 5]}, r"lengths\[1\] is 5"),
    ("index_suffixes", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("index_suffixes", {"lengths": [-1, 6]}, r"lengths\[0\] is -1"),
    ("index_suffixes", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("index_suffixes", {"start": [7, 0]}, r"start\[0\] is 7"),
    ("index_suffixes", {"start": [0, -1]}, r"start\[1\] is -1"),
    ("index_suffixes", {"start": [0, -(2**63)]}, r"start\[1\]"),
    ("remember_guesses", {"lengths": [0, 6]}, r"lengths\[0\] is 0"),
    ("remember_guesses", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("remember_guesses", {"lengths": [5, -(2**63)]}, r"lengths\[1\]"),
    ("draft_tree", {"lengths": [0, 6]}, r"lengths\[0\] is 0"),
    ("draft_tree", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("draft_tree", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("draw_noise", {"documents": [[2, 0, 6], [1, 0, 5]]}, r"row of documents\[0\] is 2"),
    ("draw_noise", {"documents": [[0, 0, 6], [-1, 0, 5]]}, r"row of documents\[1\] is -1"),
    ("draw_noise", {"documents": [[0, 0, 7], [1, 0, 5]]}, r"end of documents\[0\] is 7"),
    ("draw_noise", {"documents": [[0, -1, 6], [1, 0, 5]]}, r"begin of documents\[0\] is -1"),
    ("draw_noise", {"documents": [[0, 0, 6], [1, 5, 4]]}, r"begin of documents\[1\] is 5"),
    ("draw_noise", {"documents": [[0, 0, 6], [1, 0, 2**63 - 1]]}, r"end of documents\[1\]"),
    ("draw_noise", {"starts": [[-1, -1], [1, -1]]}, r"starts\[1, 0\] is 1"),
    ("draw_noise", {"starts": [[-1, 6], [2, -1]]}, r"starts\[0, 1\] is 6"),
    ("draw_noise", {"starts": [[2**63 - 1, -1], [2, -1]]}, r"starts\[0, 0\]"),
]


@pytest.mark.parametrize("op, changes, named", WRONG_FORMS)
def test_a_wrong_shape_dtype_or_option_is_refused_by_name(device, op, changes, named):
    arguments = example(op, device)
    getattr(ops, op)(**arguments)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=rf"\b{named}"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize("op, values, message", WRONG_VALUES)
def test_a_wrong_value_is_refused_by_name(op, values, message):
    arguments = example(op, "cpu") | {name: integers(value) for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        bounded(lambda: getattr(ops, op)(**arguments))


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_tensor_is_refused_by_name(device, op):
    """By torch's dispatcher; the kernels' own check is below."""
    arguments = example(op, device)
    for name, value in arguments.items():
        if isinstance(value, (torch.Tensor, list)):
            with pytest.raises((ValueError, RuntimeError), match=rf"\b{name}\b"):
                getattr(torch.ops.msn_ext, op)(**{**arguments, name: "text"})


@pytest.mark.parametrize(
    "wrong", [None, [-1, 0], "text", torch.zeros(2).numpy(), torch.zeros(2, device="meta").int()]
)
def test_kernels_refuse_what_is_no_dense_tensor(wrong):
    right = tree_tensor([-1, 0], "cpu")
    with pytest.raises(ValueError, match="^parents is "):
        _C.tree_ancestors(wrong, right, right)


@pytest.mark.parametrize("op", OPS)
def test_arguments_on_several_devices_are_refused_by_name(device, op):
    if device != "cuda":
        pytest.skip("needs a second device")
    arguments = example(op, device)
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for name in tensors[1:]:
        with pytest.raises(ValueError, match="on another device"):
            getattr(ops, op)(**{**arguments, name: arguments[name].cpu()})
