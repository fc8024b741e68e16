"""The ops of best-first drafting against their specification (msn_ext.ops.reference) and the
oracle.
"""

import dataclasses
import itertools
import random

import oracle
import pytest
import torch
from cases import (
    CPU_DTYPES,
    EXTREMES,
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

from msn_ext import ops
from msn_ext.ops import reference

FACTORS = reference.FACTORS
NOTHING = [-1] * 8


def specified(op: str, **arguments):
    """The specification's outputs and, where the op works in place, the changed table."""
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    copies = {
        name: x.detach().cpu().clone() if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }
    with one_thread():
        outputs = getattr(reference, op)(**copies)
    if outputs is None:
        outputs = next(iter(copies.values()))
    return (
        outputs.to(device)
        if isinstance(outputs, torch.Tensor)
        else tuple(x.to(device) for x in outputs)
    )


def guess(token: int, level: int = 0) -> int:
    return token * 16 + level


def only(*guesses: int) -> list[int]:
    """Eight guesses, of which these are some."""
    return padded([list(guesses)], 8)[0]


# ---- top_guesses ---------------------------------------------------------------------------------

VALUES = ["normal", "ties", "constant", "any bits"]
PLACES = ["contiguous", "slice", "every other", "transposed", "expanded"]
STORAGE = dict(zip(CPU_DTYPES, [torch.int32, torch.int64, torch.int16, torch.int16]))


def on(device: str, dtype: torch.dtype) -> torch.dtype:
    """A dtype that the device has."""
    return torch.float32 if device == "cuda" and dtype == torch.float64 else dtype


def special_bits(dtype: torch.dtype) -> list[int]:
    """Zeros, infinities, the least and the largest NaN and the smallest number, all with both
    signs.
    """
    sign, infinity = (
        torch.tensor(x, dtype=dtype).view(STORAGE[dtype]).item() for x in (-0.0, float("inf"))
    )
    patterns = [0, 1, infinity, infinity + 1, -sign - 1]
    return [*patterns, *(sign + x for x in patterns)]


def random_logits(
    values: str, rows: int, vocabulary: int, dtype, specials: int, seed: int
) -> torch.Tensor:
    source, storage = seeded(seed), STORAGE[dtype]
    if values == "any bits":
        limits = torch.iinfo(storage)
        bits = torch.randint(limits.min, limits.max, (rows, vocabulary), generator=source).to(
            storage
        )
    else:
        scale = {"normal": 3.0, "ties": 1.0, "constant": 0.0}[values]
        numbers = torch.randn(rows, vocabulary, generator=source, dtype=torch.float64) * scale
        bits = (numbers.round() if values == "ties" else numbers).to(dtype).view(storage)
    patterns = special_bits(dtype)
    for _ in range(specials if bits.numel() else 0):
        row, token, which = (
            int(torch.randint(n, (), generator=source)) for n in (rows, vocabulary, len(patterns))
        )
        bits[row, token] = patterns[which]
    return bits.view(dtype)


def lay_out(x: torch.Tensor, place: str) -> torch.Tensor:
    """The same values with other strides, between NaN."""
    rows, vocabulary = x.shape
    nan = float("nan")
    if place == "contiguous":
        return x
    if place == "expanded":
        return x[:1].expand(rows, vocabulary)
    view = {
        "slice": lambda: x.new_full((rows + 1, vocabulary + 3), nan)[1:, 1:-2],
        "every other": lambda: x.new_full((rows, 2 * vocabulary), nan)[:, ::2],
        "transposed": lambda: x.new_full((vocabulary, rows), nan).t(),
    }[place]()
    view.view(STORAGE[x.dtype]).copy_(
        x.view(STORAGE[x.dtype])
    )  # so that every NaN stays the one it is
    return view


def check_guesses(logits: torch.Tensor) -> torch.Tensor:
    """Against the specification, the oracle and torch.argmax; returns rows of guesses."""
    got = ops.top_guesses(logits)
    assert_equal(got, specified("top_guesses", logits=logits))
    rows = logits.cpu().reshape(-1, logits.shape[-1])
    found = got.view(len(rows), 8)
    assert_equal(found[:, 0] >> 4, logits.argmax(-1).flatten().int())
    for row, guesses in zip(rows, found.tolist()):
        tokens, levels = oracle.top(row)
        assert [g // 16 for g in guesses] == padded([tokens], 8)[0]
        assert all(g % 16 in allowed for g, allowed in zip(guesses, levels))
    return found


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 0)])
def test_guesses_of_no_vocabulary_are_refused_by_name(device, shape):
    with pytest.raises(ValueError, match="logits"):
        ops.top_guesses(torch.zeros(shape, device=device))


def test_guesses_of_no_rows_take_any_strides(device):
    assert ops.top_guesses(torch.zeros(0, 10, device=device)[:, ::2]).shape == (0, 8)


@given(
    values=st.sampled_from(VALUES),
    place=st.sampled_from(PLACES),
    rows=st.integers(0, 3),
    vocabulary=st.integers(1, 12) | st.sampled_from([255, 256, 257, 300, 513]),
    dtype=st.sampled_from(CPU_DTYPES),
    specials=st.integers(0, 12),
    seed=st.integers(0, 999),
)
def test_guesses_of_random_logits(device, values, place, rows, vocabulary, dtype, specials, seed):
    logits = random_logits(values, rows, vocabulary, on(device, dtype), specials, seed).to(device)
    check_guesses(lay_out(logits, place if rows else "contiguous"))


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("vocabulary", [1000, 49_152, 65_537])
def test_guesses_of_large_vocabularies(device, dtype, vocabulary):
    """In float16 and bfloat16 the best of so many are equal."""
    check_guesses(random_logits("normal", 2, vocabulary, on(device, dtype), 0, 1).to(device))


@pytest.mark.parametrize(
    "shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (1, 2, 1, 2, 7), (0, 7), (2, 0, 7)]
)
def test_guesses_take_any_leading_dimensions(device, shape):
    logits = torch.randn(shape, generator=seeded(0)).to(device)
    assert check_guesses(logits).shape == (logits.numel() // 7, 8)
    assert ops.top_guesses(logits).shape == (*shape[:-1], 8)


@pytest.mark.parametrize(
    "equal, level", [(1, 11), (2, 6), (3, 4), (4, 4), (5, 4), (6, 3), (7, 3), (8, 3), (9, 3)]
)
def test_a_probability_on_an_edge_has_the_level_above_it(device, equal, level):
    """One of two equals has 0.5 and one of five 0.2, which are edges; the lowest tokens of equals
    come first.
    """
    logits = torch.full((20,), -float("inf"), device=device)
    logits[2 : 2 + equal] = 3.0
    found = check_guesses(logits)[0].tolist()
    best = [guess(token, level) for token in range(2, 2 + equal)][:8]
    rest = [guess(token) for token in (0, 1, *range(2 + equal, 20))]
    assert found == [*best, *rest][:8]


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), -float("inf")])
def test_guesses_where_no_softmax_is_have_the_lowest_level(device, logit):
    logits = torch.zeros(20, device=device)
    logits[7] = logits[5] = logit
    first = [0, 1, 2, 3, 4, 6, 8, 9] if logit == -float("inf") else [5, 7, 0, 1, 2, 3, 4, 6]
    levels = check_guesses(logits)[0] & 15
    assert (check_guesses(logits)[0] >> 4).tolist() == first
    assert set(levels.tolist()) == ({3} if logit == -float("inf") else {0})
    logits[:] = logit
    assert check_guesses(logits)[0].tolist() == [guess(token) for token in range(8)]


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_guesses_would_notice_a_changed_logit(device, dtype):
    """Negative control: of the eight best every single one counts, and of the rest none."""
    logits = torch.randperm(50, generator=seeded(0)).to(device, on(device, dtype)).repeat(2, 1) / 8
    before = ops.top_guesses(logits)
    assert (before >> 4).tolist() == logits.argsort(-1, descending=True)[:, :8].tolist()
    for token in range(50):
        changed = logits.clone()
        changed[0, token] = -1
        after = ops.top_guesses(changed)
        assert torch.equal(after[0], before[0]) == (token not in (before[0] >> 4).tolist())
        assert torch.equal(after[1], before[1])


# ---- index_suffixes ------------------------------------------------------------------------------

SLOTS = [1, 2, 7, 64, 1000]


@st.composite
def texts(draw, longest: int = 60) -> list[int]:
    """Few different tokens, often repeating; what the tokens are does not matter."""
    tokens = draw(
        st.sampled_from([range(1), range(3), range(50), [0, 2**27, 2**62, -1, -(2**63), 2**63 - 1]])
    )
    rng = random.Random(draw(st.integers(0, 999)))
    text = [rng.choice(tokens) for _ in range(draw(st.integers(1, longest)))]
    period = draw(st.integers(1, longest))
    return [
        rng.choice(tokens) if rng.random() < 0.02 else text[i % period] for i in range(len(text))
    ]


def histories(
    rows: list[list[int]], device: str, behind: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, C] and [B]; behind each text lies the text again, which would count if it were read."""
    width = max(map(len, rows), default=0) + behind
    history = [(row * width)[:width] for row in rows]
    return integers(history, device).view(len(rows), width), integers(
        [len(row) for row in rows], device
    )


def no_places(batch: int, slots: int, device: str) -> torch.Tensor:
    return torch.zeros(batch, 8, slots, dtype=torch.int32, device=device)


@given(rows=st.lists(texts(), min_size=0, max_size=3), slots=st.sampled_from(SLOTS), data=st.data())
def test_suffixes_of_random_texts(device, rows, slots, data):
    """At once, and in two pieces, of which the first may be empty and the second may begin too
    early or too late.
    """
    history, lengths = histories(rows, device)
    arguments = {"history": history, "start": torch.zeros_like(lengths), "lengths": lengths}
    heads = no_places(len(rows), slots, device)
    ops.index_suffixes(heads, **arguments)
    assert_equal(heads, specified("index_suffixes", heads=torch.zeros_like(heads), **arguments))
    assert heads.tolist() == [oracle.places_table(row, slots) for row in rows]

    until = integers([data.draw(st.integers(0, len(row))) for row in rows], device)
    pieces = torch.zeros_like(heads)
    ops.index_suffixes(pieces, history, torch.zeros_like(until), until)
    assert pieces.tolist() == [
        oracle.places_table(row[:size], slots) for row, size in zip(rows, until.tolist())
    ]
    ops.index_suffixes(pieces, history, until, lengths)
    assert_equal(pieces, heads)
    ops.index_suffixes(pieces, history, lengths, lengths)
    ops.index_suffixes(pieces, history, lengths + 1, lengths)
    assert_equal(pieces, heads)


@given(rows=st.lists(texts(), min_size=1, max_size=3), slots=st.sampled_from(SLOTS), data=st.data())
def test_suffixes_from_a_place_on_leave_the_places_before_it_alone(device, rows, slots, data):
    """Whatever stands in the table stays, unless an n-gram behind ``start`` takes its slot."""
    history, lengths = histories(rows, device)
    start = integers([data.draw(st.integers(0, len(row) + 3)) for row in rows], device)
    heads = (
        torch.randint(-(2**31), 2**31, (len(rows), 8, slots), generator=seeded(1)).int().to(device)
    )
    expected = specified(
        "index_suffixes", heads=heads, history=history, start=start, lengths=lengths
    )
    by_oracle = heads.clone()
    for b, (row, begin) in enumerate(zip(rows, start.tolist())):
        for level, size in enumerate(oracle.NGRAMS):
            for ngram, end in sorted(
                oracle.places(row, size, begin).items(), key=lambda item: item[1]
            ):
                by_oracle[b, level, oracle.hashed(ngram) % slots] = end
    ops.index_suffixes(heads, history, start, lengths)
    assert_equal(heads, expected)
    assert_equal(heads, by_oracle)


@pytest.mark.parametrize("size", [15, 16, 17, 18, 255, 256, 257, 2000])
def test_suffixes_of_long_texts(device, size):
    rows = [[random.Random(size + top).randrange(top) for _ in range(size)] for top in (1, 2, 1000)]
    history, lengths = histories(rows, device)
    arguments = {"history": history, "start": torch.zeros_like(lengths), "lengths": lengths}
    heads = no_places(3, 509, device)
    ops.index_suffixes(heads, **arguments)
    assert_equal(heads, specified("index_suffixes", heads=torch.zeros_like(heads), **arguments))


def test_suffixes_take_strided_texts_no_slots_and_no_text(device):
    history, lengths = histories([[1, 2, 1, 2, 1], [3, 3, 3, 3, 3]], device)
    heads, strided = no_places(2, 64, device), no_places(2, 64, device)
    ops.index_suffixes(heads, history, lengths * 0, lengths)
    ops.index_suffixes(strided, history.t().contiguous().t(), lengths * 0, lengths)
    assert_equal(strided, heads)
    ops.index_suffixes(no_places(2, 0, device), history, lengths * 0, lengths)
    ops.index_suffixes(no_places(0, 4, device), history[:0], lengths[:0], lengths[:0])
    ops.index_suffixes(strided, history, lengths * 0, lengths * 0)
    assert_equal(strided, heads)


def test_suffixes_would_notice_a_changed_token(device):
    """Negative control: a changed token shows in its row, unless it is the last one or lies behind
    the text.
    """
    text = list(range(20))
    history, lengths = histories([text, text], device)
    before = no_places(2, 4096, device)
    ops.index_suffixes(before, history, lengths * 0, lengths)
    for place in range(history.shape[1]):
        changed = history.clone()
        changed[0, place] = 77
        heads = torch.zeros_like(before)
        ops.index_suffixes(heads, changed, lengths * 0, lengths)
        assert torch.equal(heads[0], before[0]) == (place >= 19)
        assert torch.equal(heads[1], before[1])


# ---- what is known: texts, guesses, observed trees -----------------------------------------------


@dataclasses.dataclass
class Pass:
    """What remember_guesses is given."""

    texts: list[list[int]]
    tokens: list[list[int]]
    parents: list[list[int]]
    paths: list[list[int]]
    guesses: list[list[list[int]]]

    @classmethod
    def random(cls, texts, parents, vocabulary: int, rng: random.Random) -> "Pass":
        """Verified trees behind the texts, with few enough tokens that something is accepted."""
        tokens, targets = (
            [[rng.randrange(vocabulary) for _ in row] for row in parents] for _ in range(2)
        )
        paths = [oracle.verify(*row)[1] for row in zip(tokens, targets, parents)]
        return cls(
            texts,
            tokens,
            parents,
            paths,
            [[random_guesses(vocabulary, rng) for _ in row] for row in parents],
        )

    def arguments(self, device: str) -> dict:
        batch, nodes = len(self.texts), len(self.parents[0])
        history, lengths = histories(self.texts, device)
        return {
            "history": history,
            "lengths": lengths,
            "tokens": integers(self.tokens, device),
            "parents": tree_tensor(self.parents, device),
            "path": integers(padded(self.paths, nodes), device),
            "guesses": tree_tensor(self.guesses, device).view(batch, nodes, 8),
        }

    def remember(self, memory: dict) -> None:
        for row in zip(self.texts, self.tokens, self.parents, self.paths, self.guesses):
            oracle.remember(memory, *row)


def random_guesses(vocabulary: int, rng: random.Random) -> list[int]:
    """Different tokens at any level, with gaps; now and then nothing."""
    tokens = rng.sample(range(vocabulary), min(vocabulary, rng.choice([0, 2, 8, 8])))
    guesses = [guess(token, rng.randrange(12)) for token in tokens] + NOTHING[len(tokens) :]
    if rng.random() < 0.2:
        rng.shuffle(guesses)
    return guesses


def no_contexts(slots: int, device: str) -> torch.Tensor:
    return torch.zeros(3, slots, 9, dtype=torch.int32, device=device)


def corpus_of(
    documents: list[list[int]], slots: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] and [8, slots]"""
    corpus = [token for document in documents for token in [-1, *document]][1:]
    heads = no_places(1, slots, device)
    if corpus:
        ops.index_suffixes(
            heads,
            integers([corpus], device),
            integers([0], device),
            integers([len(corpus)], device),
        )
    return tree_tensor(corpus, device), heads[0]


@dataclasses.dataclass
class Known:
    """All that draft_tree reads. The tables are made by the ops; without slots a source is left
    out.
    """

    batch: int = 2
    vocabulary: int = 4
    longest: int = 40
    depths: int = 3
    passes: int = 3
    slots: int = 1 << 14
    head_slots: int = 1 << 13
    documents: int = 0
    factors: str = "random"
    seed: int = 0

    def __post_init__(self):
        rng = random.Random(self.seed)
        self.texts = [self._text(rng) for _ in range(self.batch)]
        self.denoised = [
            [random_guesses(self.vocabulary, rng) for _ in range(self.depths)] for _ in self.texts
        ]
        self.observed = []
        for i in range(self.passes if self.texts else 0):
            parents = [
                build_tree(rng.choice(["random", "deep", "padded"]), 9, self.seed + i)
                for _ in self.texts
            ]
            texts = [text[: rng.randint(1, len(text))] for text in self.texts]
            self.observed.append(Pass.random(texts, parents, self.vocabulary, rng))
        draw = {
            "random": lambda: 10 ** rng.uniform(-1, 1),
            "ones": lambda: 1.0,
            "few": lambda: rng.choice([0.5, 1.0, 2.0]),
            "extreme": lambda: rng.choice([1e-9, 1.0, 1e9]),
        }[self.factors]
        self.weights = [draw() for _ in range(FACTORS)]
        self.corpus = [self._document(rng) for _ in range(self.documents)]

    def _text(self, rng: random.Random) -> list[int]:
        size = rng.randint(1, self.longest)
        text = [rng.randrange(self.vocabulary) for _ in range(size)]
        return [
            rng.choice(text) if rng.random() < 0.05 else text[i % rng.choice([3, 17, size])]
            for i in range(size)
        ]

    def _document(self, rng: random.Random) -> list[int]:
        """Some of what the texts say, and something else."""
        pieces = [rng.choice([self._text(rng), *self.texts]) for _ in range(3)]
        return [token for piece in pieces for token in piece[rng.randrange(len(piece)) :]]

    def arguments(self, device: str) -> dict:
        history, lengths = histories(self.texts, device)
        corpus, corpus_heads = corpus_of(self.corpus, self.head_slots, device)
        contexts, heads = (
            no_contexts(self.slots, device),
            no_places(self.batch, self.head_slots, device),
        )
        for observed in self.observed:
            ops.remember_guesses(contexts, **observed.arguments(device))
        ops.index_suffixes(heads, history, torch.zeros_like(lengths), lengths)
        return {
            "history": history,
            "lengths": lengths,
            "denoised": tree_tensor(self.denoised, device).view(self.batch, self.depths, 8),
            "contexts": contexts,
            "heads": heads,
            "corpus": corpus,
            "corpus_heads": corpus_heads,
            "factors": torch.tensor(self.weights, dtype=torch.float64, device=device),
        }

    def memory(self) -> dict:
        memory = {}
        for observed in self.observed if self.slots else []:
            observed.remember(memory)
        return memory

    def is_told_apart(self, arguments: dict) -> bool:
        """Whether every context and n-gram has a slot of its own."""
        whole = arguments["corpus"].tolist()
        ngrams, of_corpus = (
            sum(len(oracle.places(text, size)) for text in texts for size in oracle.NGRAMS)
            for texts in (self.texts, [whole])
        )
        return int((arguments["contexts"][..., 0] != 0).sum()) == len(self.memory()) and (
            self.head_slots == 0
            or (
                int((arguments["heads"] != 0).sum()) == ngrams
                and int((arguments["corpus_heads"] != 0).sum()) == of_corpus
            )
        )

    def check(
        self, nodes: int, max_depth: int, foresight: float, device: str, by_oracle: bool = True
    ) -> None:
        arguments = {
            **self.arguments(device),
            "nodes": nodes,
            "max_depth": max_depth,
            "foresight": foresight,
        }
        got = ops.draft_tree(**arguments)
        assert_equal(got, specified("draft_tree", **arguments))
        if not by_oracle or not self.is_told_apart(arguments):
            return
        memory, factors = self.memory(), arguments["factors"].cpu()
        tokens, parents, probability, sources = (x.tolist() for x in got)
        for b, (text, denoised) in enumerate(zip(self.texts, self.denoised)):
            documents = self.corpus if self.head_slots else []
            draft = oracle.Draft(
                text,
                denoised,
                memory,
                self.head_slots > 0,
                documents,
                factors,
                max_depth,
                foresight,
            )
            row = draft.nodes(nodes)
            row += [(text[-1], -1, 0.0, 0)] * (nodes - len(row))
            assert list(zip(tokens[b], parents[b], probability[b], sources[b])) == row


@st.composite
def knowledge(draw) -> Known:
    return Known(
        batch=draw(st.integers(0, 3)),
        vocabulary=draw(st.sampled_from([1, 2, 4, 30, 1000])),
        longest=draw(st.sampled_from([1, 3, 20, 40])),
        depths=draw(st.integers(0, 4)),
        passes=draw(st.integers(0, 4)),
        slots=draw(st.sampled_from([0, 1, 7]) | st.just(1 << 14)),
        head_slots=draw(st.sampled_from([0, 1, 7]) | st.just(1 << 13)),
        documents=draw(st.integers(0, 3)),
        factors=draw(st.sampled_from(["random", "ones", "few", "extreme"])),
        seed=draw(st.integers(0, 999)),
    )


# ---- remember_guesses ----------------------------------------------------------------------------


def check_remembered(passes: list[Pass], slots: int, device: str) -> torch.Tensor:
    contexts, memory = no_contexts(slots, device), {}
    for observed in passes:
        arguments = observed.arguments(device)
        shared = all(row == observed.parents[0] for row in observed.parents)
        expected = specified("remember_guesses", contexts=contexts, **arguments)
        for parents in [arguments["parents"]] + [arguments["parents"][0]] * shared:
            got = contexts.clone()
            ops.remember_guesses(got, **{**arguments, "parents": parents})
            assert_equal(got, expected)
        contexts = got
        observed.remember(memory)
        assert contexts.tolist() == oracle.memory_table(memory, slots)
    return contexts


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
    """The guesses in the table behind a context; None: nothing."""
    table = check_remembered([observed], 512, device)
    slot = table[len(context) - 1, oracle.hashed(tuple(context)) % 512].tolist()
    return slot[1:] if slot[0] else None


def test_the_accepted_path_and_later_rows_have_the_last_word(device):
    """Nodes 1 to 3 of both rows have token 5 behind token 4: whichever is accepted stays, else the
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
    """The root's token is the text's end; padding, gaps in the path and what lies behind the text
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
    before, after = no_contexts(slots, device), no_contexts(slots, device)
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
        after = no_contexts(512, device)
        ops.remember_guesses(after, **arguments)
        assert not torch.equal(after, before), (name, at)


def test_remembering_takes_strides_no_slots_and_no_rows(device):
    parents = [build_tree("random", 12), build_tree("deep", 12)]
    arguments = Pass.random([[1, 2], [2]], parents, 3, random.Random(0)).arguments(device)
    before, after = no_contexts(64, device), no_contexts(64, device)
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
    ops.remember_guesses(no_contexts(0, device), **arguments)


@given(malformed=malformed_trees())
def test_malformed_parents_are_not_remembered(device, malformed):
    parents, first = malformed
    nodes = len(parents)
    observed = Pass(
        [[1]], [[1] * nodes], [parents], [[0]], [[only(guess(i)) for i in range(nodes)]]
    )
    contexts, arguments = no_contexts(7, device), observed.arguments(device)
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"parents\[{first}\] is {parents[first]};"):
            bounded(lambda: ops.remember_guesses(contexts, **arguments))
        assert_equal(contexts, no_contexts(7, device))
    else:  # values are not read back: a malformed node is padding, and node 0 the root
        as_padding = tree_tensor([[p if 0 <= p < i else -1 for i, p in enumerate(parents)]], device)
        bounded(lambda: ops.remember_guesses(contexts, **arguments))
        expected = {**arguments, "parents": as_padding}
        assert_equal(
            contexts, specified("remember_guesses", contexts=no_contexts(7, device), **expected)
        )


# ---- draft_tree ----------------------------------------------------------------------------------

FORESIGHT = [0.0, 0.05, 0.5, 1.0]


@given(
    known=knowledge(),
    nodes=st.integers(1, 20),
    max_depth=st.sampled_from([0, 1, 2, 5, 256]),
    foresight=st.sampled_from(FORESIGHT),
)
def test_drafts_of_random_knowledge(device, known, nodes, max_depth, foresight):
    known.check(nodes, max_depth, foresight, device)


@pytest.mark.parametrize("documents", [0, 3])
@pytest.mark.parametrize("factors", ["random", "few"])
@pytest.mark.parametrize("seed", range(8))
def test_drafts_of_much_knowledge(device, seed, factors, documents):
    """Whole texts, so that every list has its say, by the oracle too."""
    options = {"head_slots": 1 << 19, "documents": documents, "factors": factors, "seed": seed}
    known = Known(1, 2 + seed, longest=80, depths=4, passes=4, **options)
    assert known.is_told_apart(known.arguments(device))
    known.check(30, 6, 0.05 * (seed % 2), device)


@pytest.mark.parametrize("places", [1, 2, 3, 4, 8])
def test_every_ngram_may_have_a_follower_of_its_own(device, places):
    """The end of the text stood there before: its last 16 tokens, its last 12, ..., each before
    another token.
    """
    end = list(range(16))
    known = Known(1, 30, depths=0, passes=2, head_slots=1 << 16)
    sizes = oracle.NGRAMS[-places:]
    known.texts = [
        [t for size in reversed(sizes) for t in (99, *end[-size:], 2**40 + size)] + [99, *end]
    ]
    arguments = known.arguments(device)
    assert known.is_told_apart(arguments)
    known.check(places + 2, 1, 0.0, device)
    tokens, _, _, sources = ops.draft_tree(**arguments, nodes=60, max_depth=1, foresight=0.0)
    assert sorted(tokens[sources == 4].tolist()) == [2**40 + size for size in sizes]


@pytest.mark.parametrize("of_text", [*range(9)])
def test_the_corpus_is_asked_for_the_ngrams_that_the_text_does_not_have(device, of_text):
    """The text has the shorter n-grams of its end, the corpus all of them: each answers for its
    own.
    """
    end, short = list(range(16)), oracle.NGRAMS[:of_text]
    known = Known(1, 30, depths=0, passes=0, head_slots=1 << 16)
    known.texts = [[t for size in reversed(short) for t in (99, *end[-size:], 100 + size)] + end]
    known.corpus = [[98, *end[-size:], 200 + size] for size in reversed(oracle.NGRAMS)]
    arguments = known.arguments(device)
    assert known.is_told_apart(arguments)
    known.check(10, 1, 0.0, device)
    tokens, _, _, sources = ops.draft_tree(**arguments, nodes=60, max_depth=1, foresight=0.0)
    expected = [100 + size if size in short else 200 + size for size in oracle.NGRAMS]
    assert sorted(tokens[sources == 4].tolist()) == sorted(expected)
    for name in (
        "corpus",
        "corpus_heads",
    ):  # negative control: without either there are only the text's
        tokens, _, _, sources = ops.draft_tree(
            **{**arguments, name: arguments[name][..., :0]}, nodes=60, max_depth=1, foresight=0.0
        )
        assert sorted(tokens[sources == 4].tolist()) == [100 + size for size in short]


def test_documents_do_not_continue_each_other(device):
    """Neither is the next one's beginning behind the end of one, nor is what stands between them a
    guess or a match.
    """
    known = Known(1, depths=0, slots=0, head_slots=64, passes=0)
    for text, corpus, expected in [
        ([1, 2, 3], [[9, 1, 2, 3], [4, 5]], set()),
        ([1, 2, 3], [[1, 2, 3, 8], [9, 1, 2, 3], [4, 5]], {8}),
        ([5, 1, -1, 2], [[1], [2, 7]], {7}),  # 7 behind the 2, not behind 1 -1 2
    ]:
        known.texts, known.corpus = [text], corpus
        arguments = {**known.arguments(device), "nodes": 60, "max_depth": 1, "foresight": 0.0}
        got = ops.draft_tree(**arguments)
        assert_equal(got, specified("draft_tree", **arguments))
        assert set(got[0][got[3] > 0].tolist()) == expected
    # Heads that lead to what stands between two documents, or to an n-gram with it inside.
    arguments["factors"] = torch.arange(1.0, FACTORS + 1, dtype=torch.float64, device=device)
    before = ops.draft_tree(**arguments)
    for level, ngram, end in [(0, (2,), 1), (1, (-1, 2), 3), (2, (1, -1, 2), 3)]:
        arguments["corpus_heads"][level, oracle.hashed(ngram) % 64] = end
        got = ops.draft_tree(**arguments)
        assert_equal(got, specified("draft_tree", **arguments))
        if level:
            assert_equal(got, before)
        else:
            assert not (got[3] > 0).any()
            arguments["corpus_heads"][0, oracle.hashed((2,)) % 64] = 3


@given(known=knowledge(), foresight=st.sampled_from(FORESIGHT))
def test_without_a_corpus_a_draft_is_what_it_was(device, known, foresight):
    """No tokens, no heads, or only gaps: bit for bit the same."""
    options = {"nodes": 30, "max_depth": 5, "foresight": foresight}
    known = dataclasses.replace(known, documents=0)
    arguments = known.arguments(device)
    assert arguments["corpus"].numel() == 0
    expected = ops.draft_tree(**arguments, **options)
    tokens, heads = corpus_of([text * 2 for text in known.texts] or [[1]], 64, device)
    for corpus, corpus_heads in [
        (tokens[:0], heads),
        (tokens, heads[:, :0]),
        (tokens * 0 - 1, heads),
        (tokens, heads * 0),
    ]:
        assert_equal(
            ops.draft_tree(
                **{**arguments, "corpus": corpus, "corpus_heads": corpus_heads}, **options
            ),
            expected,
        )


@pytest.mark.parametrize("foresight", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, 255, 256])
def test_drafts_of_every_size(device, nodes, foresight):
    Known(batch=3, vocabulary=3).check(nodes, 256, foresight, device, by_oracle=False)


@pytest.mark.parametrize("factors", ["random", "ones", "extreme"])
def test_drafts_of_many_guesses(device, factors):
    """More than a thousand candidates wait for their turn."""
    known = Known(1, vocabulary=60, longest=500, depths=8, passes=30, factors=factors)
    known.check(100, 8, 0.05, device, by_oracle=False)


@pytest.mark.parametrize("factors", ["random", "ones", "extreme"])
@pytest.mark.parametrize(
    "depths, slots, head_slots", [*itertools.product([0, 3], [0, 1 << 14], [0, 1 << 13])]
)
@pytest.mark.parametrize("foresight", [0.0, 0.05])
def test_drafts_of_some_sources(device, depths, slots, head_slots, factors, foresight):
    known = Known(3, 4, depths=depths, slots=slots, head_slots=head_slots, factors=factors)
    known.check(16, 4, foresight, device)
    arguments = known.arguments(device)
    assert known.is_told_apart(arguments)
    sources = ops.draft_tree(**arguments, nodes=64, max_depth=4, foresight=foresight)[3]
    expected = (depths > 0) + 2 * (slots > 0) + 4 * (head_slots > 0)
    assert sum(bit for bit in (1, 2, 4) if (sources & bit).any()) == expected
    assert bool((sources == 8).any()) <= (foresight > 0) and not (sources > 8).any()


def test_a_draft_of_nothing_is_the_root_and_with_foresight_noise_behind_it(device):
    """Noise has no probability, so there is none behind noise."""
    known = Known(3, depths=0, slots=0, head_slots=0)
    arguments = {**known.arguments(device), "nodes": 4, "max_depth": 9}
    last = [text[-1] for text in known.texts]
    tokens, parents, probability, sources = ops.draft_tree(**arguments, foresight=0.0)
    assert tokens.tolist() == [[token] * 4 for token in last]
    assert parents.tolist() == [[-1] * 4] * 3 and sources.tolist() == [[0] * 4] * 3
    assert probability.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3
    tokens, parents, probability, sources = ops.draft_tree(**arguments, foresight=1e-300)
    noise = [text[oracle.noise_index(0, 0, len(text), 1, 0)] for text in known.texts]
    assert tokens.tolist() == [[end, token, end, end] for end, token in zip(last, noise)]
    assert parents.tolist() == [[-1, 0, -1, -1]] * 3 and sources.tolist() == [[0, 8, 0, 0]] * 3
    assert probability.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3


def test_a_draft_in_numbers(device):
    """Two guesses behind the root, 0.6 and 0.3, and one with 0.5 behind either."""
    factors = torch.ones(FACTORS, dtype=torch.float64)
    factors[36:60].view(2, 12)[:, 1:3] = torch.tensor(
        [6.0, 3.0]
    )  # denoised, depth 0, levels 1 and 2
    denoised = [[only(guess(1, 1), guess(2, 2)), only(guess(7))]]
    arguments = {
        "history": integers([[5]], device),
        "lengths": integers([1], device),
        "denoised": tree_tensor(denoised, device),
        "contexts": no_contexts(0, device),
        "heads": no_places(1, 0, device),
        **dict(zip(("corpus", "corpus_heads"), corpus_of([], 0, device))),
        "factors": factors.to(device),
    }

    def draft(**options):
        return [x[0].tolist() for x in ops.draft_tree(**arguments, **options)]

    tokens, parents, probability, sources = draft(nodes=6, max_depth=9, foresight=0.0)
    assert tokens == [5, 1, 2, 7, 7, 5] and parents == [
        -1,
        0,
        0,
        1,
        2,
        -1,
    ]  # of equals, the one behind the root
    assert probability == pytest.approx([1, 0.6, 0.3, 0.3, 0.15, 0]) and sources == [
        0,
        1,
        1,
        1,
        1,
        0,
    ]
    tokens, parents, probability, _ = draft(nodes=5, max_depth=2, foresight=0.2)
    assert tokens == [5, 1, 7, 2, 7] and parents == [-1, 0, 1, 0, 3]  # 7 is worth 0.3 + 0.2 * 0.6
    assert probability == pytest.approx([1, 0.6, 0.3, 0.3, 0.15])
    tokens, parents, probability, sources = draft(nodes=7, max_depth=9, foresight=1.0)
    assert tokens == [5, 1, 7, 2, 7, 5, 5] and parents == [
        -1,
        0,
        1,
        0,
        3,
        2,
        4,
    ]  # noise: 5 is all the text
    assert probability == pytest.approx([1, 0.6, 0.3, 0.3, 0.15, 0, 0]) and sources == [
        0,
        1,
        1,
        1,
        1,
        8,
        8,
    ]


def worked_example(device: str) -> dict:
    """Behind 1 2 3 1 2: 8, denoised and remembered behind the 2, and 3, remembered and behind the
    earlier 1 2.
    """
    factors = torch.ones(FACTORS, dtype=torch.float64)
    bias, denoised, remembered, suffix = factors.split([36, 72, 144, 96])
    bias.view(4, 9)[1, 2] = 2
    denoised.view(3, 2, 12)[0, 1, 11] = 3
    remembered.view(3, 4, 12)[0, 1, :5:4] = torch.tensor([5.0, 7.0])
    suffix.view(8, 3, 4)[1, 0, 1] = 11
    contexts, heads = no_contexts(64, device), no_places(1, 64, device)
    observed = Pass([[2]], [[2]], [[-1]], [[0]], [[only(guess(3, 4), guess(8, 0))]])
    ops.remember_guesses(contexts, **observed.arguments(device))
    history, lengths = histories([[1, 2, 3, 1, 2]], device)
    ops.index_suffixes(heads, history, lengths * 0, lengths)
    return {
        "history": history,
        "lengths": lengths,
        "denoised": tree_tensor([[only(guess(8, 11)), only(guess(6, 5))]], device),
        "contexts": contexts,
        "heads": heads,
        **dict(
            zip(("corpus", "corpus_heads"), corpus_of([[7, 2, 1], [5, 1, 2, 4, 4]], 1024, device))
        ),
        "factors": factors.to(device),
        "nodes": 4,
        "max_depth": 1,
        "foresight": 0.0,
    }


def test_scores_are_the_products_of_the_factors(device):
    tokens, parents, probability, sources = (
        x[0].tolist() for x in ops.draft_tree(**worked_example(device))
    )
    scores = {3: 2 * 7 * 11, 8: 2 * 3 * 5}
    assert tokens == [2, 3, 8, 2] and parents == [-1, 0, 0, -1] and sources == [0, 2 + 4, 1 + 2, 0]
    assert probability == pytest.approx(
        [1, *(score / (1 + sum(scores.values())) for score in scores.values()), 0]
    )


def test_a_draft_would_notice_a_changed_factor(device):
    """Negative control: exactly the five factors of the example count."""
    arguments = worked_example(device)
    before = ops.draft_tree(**arguments)[2]
    used = [0 + 1 * 9 + 2, 36 + 12 + 11, 108 + 12, 108 + 12 + 4, 252 + 12 + 1]
    for i in range(FACTORS):
        factors = arguments["factors"].clone()
        factors[i] *= 1.01
        after = ops.draft_tree(**{**arguments, "factors": factors})[2]
        assert torch.equal(after, before) == (i not in used), i


def test_a_draft_would_notice_a_changed_entry(device):
    """Negative control: what is known behind the root counts, what is known elsewhere does not."""
    arguments = worked_example(device)
    slot = oracle.hashed((2,)) % 64
    place = oracle.hashed((1, 2)) % 64
    before = ops.draft_tree(**arguments)

    def changes(name: str, at, value) -> bool:
        changed = arguments[name].clone()
        changed[at] = value
        return any(
            not torch.equal(x, y)
            for x, y in zip(before, ops.draft_tree(**{**arguments, name: changed}))
        )

    assert changes("contexts", (0, slot, 0), 1)  # another context has the slot
    assert changes("contexts", (0, slot, 1), guess(4, 4)) and changes(
        "contexts", (0, slot, 2), guess(8, 4)
    )
    assert changes("contexts", (0, slot, 8), guess(4)) and not changes(
        "contexts", (0, slot, 8), -77
    )
    assert not changes("contexts", (0, (slot + 1) % 64), 77) and not changes(
        "contexts", (slice(1, 3),), 77
    )
    assert changes("heads", (0, 1, place), 0) and not changes("heads", (0, 7), 3)
    for wrong in (1, 3, 4, 5, 6, -1, *EXTREMES):  # not the n-gram, or outside the text
        assert changes("heads", (0, 1, place), wrong)
    assert changes("denoised", (0, 0, 0), -1) and changes("denoised", (0, 0, 1), guess(8, 11))
    assert not changes("denoised", (0, 1), guess(8, 11))  # behind max_depth
    assert (
        changes("history", (0, 2), 4)
        and changes("history", (0, 0), 4)
        and changes("history", (0, 1), 4)
    )
    assert changes("history", (0, 3), 4) and changes("history", (0, 4), 4)
    assert not changes("history", (0, slice(5, None)), 4)

    arguments["factors"] = torch.arange(1.0, FACTORS + 1, dtype=torch.float64, device=device)
    arguments["history"] = integers(
        [[6, 7, 5, 1, 2]], device
    )  # whose end is in the corpus only, before a 4
    before = ops.draft_tree(**arguments)
    ends = {size: oracle.hashed((5, 1, 2)[3 - size :]) % 1024 for size in (1, 2, 3)}
    assert all(arguments["corpus_heads"][size - 1, slot] == 7 for size, slot in ends.items())
    assert (
        changes("corpus", 7, 3) and changes("corpus", 6, 9) and changes("corpus", slice(None), -1)
    )
    assert changes("corpus", 4, 9) and changes(
        "corpus", 5, 9
    )  # a shorter n-gram weighs something else
    assert not changes("corpus", 8, 9) and not changes("corpus", slice(0, 4), 3)
    for wrong in (0, 1, 3, 5, 6, 9, -1, *EXTREMES):
        assert changes("corpus_heads", (2, ends[3]), wrong)
    assert not changes("corpus_heads", 7, 7)


@given(known=knowledge(), foresight=st.sampled_from(FORESIGHT), junk=st.integers(0, 999))
def test_drafts_survive_any_tables(device, known, foresight, junk):
    """Junk in every table is taken for what the specification takes it for, levels and tokens out
    of range included.
    """
    known = dataclasses.replace(
        known, slots=min(known.slots, 64), head_slots=min(known.head_slots, 64)
    )
    arguments = {**known.arguments(device), "nodes": 12, "max_depth": 4, "foresight": foresight}
    source = seeded(junk)

    def chance(table: torch.Tensor) -> torch.Tensor:
        return torch.rand(table.shape, generator=source).to(device)

    tables = (
        arguments["denoised"],
        arguments["contexts"][..., 1:],
        arguments["heads"],
    )  # no context is forgotten
    for table in (*tables, arguments["corpus"], arguments["corpus_heads"]):
        noise = torch.randint(-(2**31), 2**31, table.shape, generator=source).int().to(device)
        noise = torch.where(chance(table) < 0.5, noise, noise % 50)
        table.copy_(torch.where(chance(table) < 0.3, table, noise))
    assert_equal(ops.draft_tree(**arguments), specified("draft_tree", **arguments))


@given(
    known=knowledge(), max_depth=st.sampled_from([1, 3, 9]), foresight=st.sampled_from(FORESIGHT)
)
def test_fewer_nodes_are_the_first_of_more(device, known, max_depth, foresight):
    arguments = {**known.arguments(device), "max_depth": max_depth, "foresight": foresight}
    most = ops.draft_tree(**arguments, nodes=256)
    for nodes in (1, 2, 3, 17, 64, 100, 255):
        assert_equal(
            ops.draft_tree(**arguments, nodes=nodes), tuple(x[:, :nodes].contiguous() for x in most)
        )


@given(
    known=knowledge(), max_depth=st.sampled_from([0, 1, 3, 9]), foresight=st.sampled_from(FORESIGHT)
)
def test_a_draft_is_a_tree_of_shrinking_probability(device, known, max_depth, foresight):
    arguments = known.arguments(device)
    draft = ops.draft_tree(**arguments, nodes=100, max_depth=max_depth, foresight=foresight)
    _, depth = ops.tree_ancestors(draft[1])
    for text, tokens, parents, p, sources, depths in zip(
        known.texts, *(x.tolist() for x in (*draft, depth))
    ):
        live = sum(d >= 0 for d in depths)
        assert max(depths) <= max_depth and min(depths[:live]) == 0
        assert (tokens[0], parents[0], p[0], sources[0]) == (text[-1], -1, 1.0, 0)
        assert list(zip(tokens, parents, p, sources))[live:] == [(text[-1], -1, 0.0, 0)] * (
            100 - live
        )
        for node in range(live):
            children = [i for i in range(node + 1, live) if parents[i] == node]
            assert len({tokens[i] for i in children}) == len(children)
            assert all(p[i] <= 0.99 * p[node] for i in children)
            assert sum(p[i] for i in children) <= p[node] * (1 + 1e-12)
            if known.factors != "extreme" and p[node] > 0:
                assert sum(p[i] for i in children) < p[node]
        assert all(
            1 <= s <= 7 or (s == 8 and q == 0 and foresight > 0)
            for s, q in zip(sources[1:live], p[1:live])
        )
        if foresight == 0:
            assert p == sorted(p, reverse=True) and min(p[:live]) > 0


@given(known=knowledge(), max_depth=st.sampled_from([3, 256]), foresight=st.sampled_from(FORESIGHT))
def test_the_draft_of_a_row_ignores_the_others_bit_for_bit(device, known, max_depth, foresight):
    """Nor does it matter what lies behind the text or deeper than the tree, or how the arguments
    are strided.
    """
    arguments = {
        **known.arguments(device),
        "nodes": 30,
        "max_depth": max_depth,
        "foresight": foresight,
    }
    together = ops.draft_tree(**arguments)
    per_row = ("history", "lengths", "denoised", "heads")
    for b in range(known.batch):
        alone = ops.draft_tree(
            **{**arguments, **{name: arguments[name][b : b + 1] for name in per_row}}
        )
        assert_equal(alone, tuple(x[b : b + 1] for x in together))
    behind = (
        torch.arange(arguments["history"].shape[1], device=device) >= arguments["lengths"][:, None]
    )
    arguments["history"].masked_fill_(behind, -(2**63))
    arguments["denoised"][:, max_depth:] = guess(1, 11)
    for name in ("history", "denoised", "contexts", "heads", "corpus_heads"):
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("corpus", "factors"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    assert_equal(ops.draft_tree(**arguments), together)


@given(known=knowledge(), nodes=st.integers(2, 5))
def test_a_draft_without_foresight_is_the_best_of_all_trees_of_its_size(device, known, nodes):
    """Of all that can be chosen from the whole tree of guesses, none is accepted further on
    average.
    """
    known = dataclasses.replace(known, vocabulary=2)
    arguments = {**known.arguments(device), "max_depth": 3, "foresight": 0.0}
    _, parents, probability, _ = (x.tolist() for x in ops.draft_tree(**arguments, nodes=15))
    best = ops.draft_tree(**arguments, nodes=nodes)[2].sum(1).tolist()
    for b in range(known.batch):
        live = [i for i in range(1, 15) if parents[b][i] >= 0]
        assume(len(live) >= nodes - 1)
        chosen = itertools.combinations(live, nodes - 1)
        whole = [c for c in chosen if all(parents[b][i] in (0, *c) for i in c)]
        assert best[b] == pytest.approx(
            1 + max(sum(probability[b][i] for i in c) for c in whole), rel=1e-12
        )


@pytest.mark.parametrize("foresight", [0.0, 0.05, 1.0])
def test_the_sum_of_the_probabilities_is_the_expected_accept_length(device, foresight):
    """Models that continue every node as the draft supposes, 20,000 of them; the bound is six
    standard errors.
    """
    samples, nodes = 20_000, 40
    arguments = Known(1, 5, factors="few").arguments(device)
    tokens, parents, probability, _ = ops.draft_tree(
        **arguments, nodes=nodes, max_depth=9, foresight=foresight
    )
    targets = torch.full((samples, nodes), -7)
    for node, p in enumerate(probability[0].tolist()):
        children = (parents[0] == node).nonzero().flatten().tolist()
        if children and p > 0:
            weights = torch.tensor([probability[0, i].item() / p for i in children])
            weights = torch.cat([weights, 1 - weights.sum(0, True)])
            chosen = torch.multinomial(weights, samples, True, generator=seeded(node))
            targets[:, node] = torch.cat([tokens[0, children].cpu(), integers([-7])])[chosen]
    accepted = ops.verify_tree(tokens.expand(samples, -1), targets.to(device), parents[0])[
        0
    ].double()
    error = accepted.std().item() / samples**0.5
    assert error > 0 and abs(accepted.mean().item() - probability.sum().item()) < 6 * error


def test_a_draft_of_no_rows(device):
    arguments = Known(batch=0).arguments(device)
    shapes = [x.shape for x in ops.draft_tree(**arguments, nodes=7, max_depth=3, foresight=0.5)]
    assert shapes == [(0, 7)] * 4


# ---- refusals: what test_ops.py does not have in its tables
# ---------------------------------------


@pytest.mark.parametrize(
    "factor", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 9e-10, 1.1e9]
)
@pytest.mark.parametrize("at", [0, 100, FACTORS - 1])
def test_a_wrong_factor_is_refused_by_name(factor, at):
    arguments = worked_example("cpu")
    arguments["factors"][at] = factor
    with pytest.raises(ValueError, match=rf"^factors\[{at}\] is .*; expected 1e-9 to 1e9$"):
        ops.draft_tree(**arguments)


def test_the_largest_and_smallest_factors_are_taken(device):
    """Even where all that is listed is one token: a bias, 32 guesses and a suffix."""
    arguments = worked_example(device)
    arguments["denoised"][:] = guess(3, 1)
    observed = Pass([[3, 1, 2]], [[2]], [[-1]], [[0]], [[[guess(3, 1)] * 8]])
    ops.remember_guesses(arguments["contexts"], **observed.arguments(device))
    for factor, probability in [(1e-9, 1e-306), (1e9, 0.99)]:
        arguments["factors"][:] = factor
        got = ops.draft_tree(**arguments)
        assert_equal(got, specified("draft_tree", **arguments))
        assert got[0].tolist() == [[2, 3, 2, 2]] and got[3].tolist() == [[0, 7, 0, 0]]
        assert got[2][0, 1].item() == pytest.approx(probability, rel=1e-9, abs=0)


def test_a_vocabulary_that_guesses_cannot_hold_is_refused(device):
    logits = torch.empty(1, 2**27 + 1, dtype=torch.float16, device=device)  # never read
    with pytest.raises(ValueError, match=r"logits is 134217729; expected 1 to 134217728"):
        ops.top_guesses(logits)


def test_a_refused_call_has_changed_no_more_than_the_rows_before():
    """In place, row by row: the second row is wrong, the first may be in the table already, the
    third is not.
    """
    texts, parents = [[1, 2, 3]] * 3, [build_tree("random", 5, seed) for seed in range(3)]
    arguments = Pass.random(texts, parents, 3, random.Random(0)).arguments("cpu")
    contexts, first = no_contexts(64, "cpu"), no_contexts(64, "cpu")
    ops.remember_guesses(first, **{name: x[:1] for name, x in arguments.items()})
    for name, at, value in [("parents", (1, 3), 3), ("lengths", 1, 0), ("lengths", 1, 7)]:
        wrong = {**arguments, name: arguments[name].clone()}
        wrong[name][at] = value
        contexts.zero_()
        with pytest.raises(ValueError, match=name):
            ops.remember_guesses(contexts, **wrong)
        assert torch.equal(contexts, first) or not contexts.any()

    history, lengths = histories(texts, "cpu")
    for name, value in [("start", -1), ("start", 7), ("lengths", -1), ("lengths", 7)]:
        heads, wrong = no_places(3, 64, "cpu"), {"start": lengths * 0, "lengths": lengths.clone()}
        wrong[name][1] = value
        with pytest.raises(ValueError, match=rf"{name}\[1\] is {value}; expected 0 to 6"):
            ops.index_suffixes(heads, history, **wrong)
        assert not heads[1:].any()
