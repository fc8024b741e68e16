"""Random knowledge of best-first drafting: texts, guesses, observed trees."""

import dataclasses
import random

import torch
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    assert_equal,
    build_tree,
    integers,
    padded,
    specified,
    tree_tensor,
)
from msn_ext import ops

FACTORS = ops.FACTORS
NOTHING = [-1] * 8


def guess(token: int, level: int = 0) -> int:
    return token * 16 + level


def only(*guesses: int) -> list[int]:
    """Eight guesses, of which these are some."""
    return padded([list(guesses)], 8)[0]


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
    rows: list[list[int]], device: str, after: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, C] and [B]; after each text lies the text again, which would count if it were read."""
    width = max(map(len, rows), default=0) + after
    history = [(row * width)[:width] for row in rows]
    return integers(history, device).view(len(rows), width), integers(
        [len(row) for row in rows], device
    )


def empty_suffixes(batch: int, slots: int, device: str) -> torch.Tensor:
    return torch.zeros(batch, 8, slots, dtype=torch.int32, device=device)


@dataclasses.dataclass
class Pass:
    """Arguments of remember_guesses, as lists."""

    texts: list[list[int]]
    tokens: list[list[int]]
    parents: list[list[int]]
    paths: list[list[int]]
    guesses: list[list[list[int]]]

    @classmethod
    def random(cls, texts, parents, vocabulary: int, rng: random.Random) -> "Pass":
        """Verified trees after the texts, with few enough tokens that something is accepted."""
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


def empty_adjacency(slots: int, device: str) -> torch.Tensor:
    return torch.zeros(3, slots, 9, dtype=torch.int32, device=device)


def corpus_of(texts: list[list[int]], slots: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] and [8, slots]"""
    corpus = [token for text in texts for token in [-1, *text]][1:]
    suffixes = empty_suffixes(1, slots, device)
    if corpus:
        ops.index_suffixes(
            suffixes,
            integers([corpus], device),
            integers([0], device),
            integers([len(corpus)], device),
        )
    return tree_tensor(corpus, device), suffixes[0]


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
    suffix_slots: int = 1 << 13
    corpus_texts: int = 0
    habit_passes: int = 0
    habit_slots: int = 1 << 13
    factors: str = "random"
    seed: int = 0

    def __post_init__(self):
        rng = random.Random(self.seed)
        self.texts = [self._text(rng) for _ in range(self.batch)]
        self.denoised = [
            [random_guesses(self.vocabulary, rng) for _ in range(self.depths)] for _ in self.texts
        ]
        passes = self.passes, self.habit_passes
        self.observed, self.habits = ([self._pass(rng, i) for i in range(n)] for n in passes)
        draw = {
            "random": lambda: 10 ** rng.uniform(-1, 1),
            "ones": lambda: 1.0,
            "few": lambda: rng.choice([0.5, 1.0, 2.0]),
            "extreme": lambda: rng.choice([1e-9, 1.0, 1e9]),
        }[self.factors]
        self.weights = [draw() for _ in range(FACTORS)]
        self.corpus = [self._corpus_text(rng) for _ in range(self.corpus_texts)]

    def _pass(self, rng: random.Random, i: int) -> Pass:
        parents = [
            build_tree(rng.choice(["random", "deep", "padded"]), 9, self.seed + i)
            for _ in self.texts
        ]
        texts = [text[: rng.randint(1, len(text))] for text in self.texts]
        return Pass.random(texts, parents, self.vocabulary, rng)

    def _text(self, rng: random.Random) -> list[int]:
        size = rng.randint(1, self.longest)
        text = [rng.randrange(self.vocabulary) for _ in range(size)]
        return [
            rng.choice(text) if rng.random() < 0.05 else text[i % rng.choice([3, 17, size])]
            for i in range(size)
        ]

    def _corpus_text(self, rng: random.Random) -> list[int]:
        """Some of what the texts say, and something else."""
        pieces = [rng.choice([self._text(rng), *self.texts]) for _ in range(3)]
        return [token for piece in pieces for token in piece[rng.randrange(len(piece)) :]]

    def arguments(self, device: str) -> dict:
        history, lengths = histories(self.texts, device)
        corpus, corpus_suffixes = corpus_of(self.corpus, self.suffix_slots, device)
        adjacency, habits, suffixes = (
            empty_adjacency(self.slots, device),
            empty_adjacency(self.habit_slots if self.habits else 0, device),
            empty_suffixes(self.batch, self.suffix_slots, device),
        )
        for table, passes in ((adjacency, self.observed), (habits, self.habits)):
            for observed in passes if self.texts else ():
                ops.remember_guesses(table, **observed.arguments(device))
        ops.index_suffixes(suffixes, history, torch.zeros_like(lengths), lengths)
        return {
            "history": history,
            "lengths": lengths,
            "denoised": tree_tensor(self.denoised, device).view(self.batch, self.depths, 8),
            "adjacency": adjacency,
            "habits": habits,
            "suffixes": suffixes,
            "corpus": corpus,
            "corpus_suffixes": corpus_suffixes,
            "factors": torch.tensor(self.weights, dtype=torch.float64, device=device),
        }

    def memories(self) -> tuple[dict, dict]:
        """Return what is remembered, and what is habit."""
        memory: dict = {}
        habits: dict = {}
        for observed in self.observed if self.slots and self.texts else []:
            observed.remember(memory)
        for observed in self.habits if self.habit_slots and self.texts else []:
            observed.remember(habits)
        return memory, habits

    def is_told_apart(self, arguments: dict) -> bool:
        """Tell whether every context and n-gram has a slot of its own."""
        whole = arguments["corpus"].tolist()
        ngrams, of_corpus = (
            sum(len(oracle.places(text, size)) for text in texts for size in oracle.NGRAMS)
            for texts in (self.texts, [whole])
        )
        kept = [int((arguments[name][..., 0] != 0).sum()) for name in ("adjacency", "habits")]
        return kept == list(map(len, self.memories())) and (
            self.suffix_slots == 0
            or (
                int((arguments["suffixes"] != 0).sum()) == ngrams
                and int((arguments["corpus_suffixes"] != 0).sum()) == of_corpus
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
        memory, habits = self.memories()
        factors = arguments["factors"].cpu()
        tokens, parents, probability, sources = (x.tolist() for x in got)
        for b, (text, denoised) in enumerate(zip(self.texts, self.denoised)):
            corpus = self.corpus if self.suffix_slots else []
            draft = oracle.Draft(
                text,
                denoised,
                memory,
                habits,
                self.suffix_slots > 0,
                corpus,
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
        suffix_slots=draw(st.sampled_from([0, 1, 7]) | st.just(1 << 13)),
        corpus_texts=draw(st.integers(0, 3)),
        habit_passes=draw(st.integers(0, 3)),
        habit_slots=draw(st.sampled_from([0, 1, 7]) | st.just(1 << 13)),
        factors=draw(st.sampled_from(["random", "ones", "few", "extreme"])),
        seed=draw(st.integers(0, 999)),
    )
