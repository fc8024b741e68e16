"""Best-first drafting: the most probable nodes of a tree of everything that is known, as many as
pay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import FACTORS, GUESSES, MAX_NODES, ORDERS, SUFFIXES

from ..ranks import seconds
from ..sizing import (
    CAPTURED_SIZES,
    FIRST_CAPTURED_SIZE,
    StepTimes,
    TreeSizer,
    expected_accepts,
    reach_of,
)
from .corpus import Corpus
from .factors import check as check_factors
from .factors import load as load_factors
from .factors import load_of_tails, of_tails_with
from .habits import Habits
from .jacobi import TreeDrafter
from .protocol import Draft, Noise, Verified
from .sources import LONGEST_TAIL, SLOTS, SOURCES, Adjacency, Denoised, NoiseTails, Suffix
from .tree import RETRIEVAL, DraftTree, follow_likeliest

OPENING = 5
"""Guesses after the prompt, a chain: with habits the likeliest path of a tree, else text that
followed the prompt's end before; noise where there is none.
"""
OPENING_TREE = 24
"""Nodes of that tree."""
FORESIGHT = 0.05


class BestFirst:
    """A tree of the most probable guesses of several sources, of a size that pays on this machine.

    Args:
        budget: nodes per tree, root included, 1 to 256; None: what gives the most tokens per second
            by the expected accept length (the sum of the nodes' probabilities) and the time of a
            step.
        sources: which of :data:`SOURCES` to use.
        factors: float64 [348], what :func:`msn_ext.ops.draft_tree` weighs the sources with; None:
            those of the package, fitted to answers of a small model.
        times: of a step, for the budget; they go on learning. None: nothing is known yet.
        max_depth: of the tree.
        foresight: 0 to 1, what a prediction for the next step is worth, see
            :func:`msn_ext.ops.draft_tree`.
        corpus: where the source "suffix" looks for n-grams that the text does not have, of the
            model's vocabulary.
        habits: where the source "adjacency" looks for contexts that it does not remember, of the
            model's vocabulary; they bring factors of their own, unless some are given.
        tails: whether noise rows stand below some nodes, where the model has a gated noise adapter
            (:class:`.sources.NoiseTails`); they count as nodes.

    An object that is passed to several calls of ``generate`` keeps what it remembers, and what it
    learned of step times, from call to call.

    Attributes:
        draft: what :meth:`propose` gave last; None: nothing yet in this call.
        probability: float64 [B, M], of the nodes that it was chosen from, as
            :func:`msn_ext.ops.draft_tree` expects them to be accepted.
        sources: int32 [B, M], where they come from.
        depth: of the tree without its tails, at most.
        denoised, adjacency, suffix: the tables of the sources (:mod:`.sources`); ``suffix`` is None
            before the first proposal.
    """

    denoised: Denoised
    adjacency: Adjacency
    sources: Tensor
    _growing: Tensor  # bool [B], rows that go on; where there are several
    _began: float  # when the last step did

    def __init__(
        self,
        budget: int | None = None,
        sources: tuple[str, ...] = SOURCES,
        factors: Tensor | None = None,
        times: StepTimes | None = None,
        max_depth: int = 20,
        foresight: float = FORESIGHT,
        corpus: Corpus | None = None,
        tails: bool = True,
        habits: Habits | None = None,
    ):
        _check_settings(budget, sources, factors, max_depth, foresight, corpus, habits)
        self.budget, self.max_depth, self.corpus, self.habits = budget, max_depth, corpus, habits
        self._sources = tuple(sources)
        if factors is None:
            factors = load_factors() if habits is None else habits.factors
        self._factors = factors
        self.foresight, self._times = foresight, times
        self.depth, self._may_have_tails = max_depth, tails
        self._noise: Noise | None = None
        self.tails: NoiseTails | None = None
        self._adjacency_for: tuple[int, torch.device] | None = None  # vocabulary, device
        self._rows_for: tuple | None = None  # batch, device, noise: the other tables'
        self._planned: int | None = None
        self.allocations = 0
        self.draft: Draft | None = None
        self.probability: Tensor | None = None
        self.suffix: Suffix | None = None
        self._opening = TreeDrafter(DraftTree.chain(1 + min(OPENING, max_depth), RETRIEVAL))

    def use_noise(self, noise: Noise | None) -> None:
        """Draft for a model with a gated adapter from the next start on; None: without one."""
        self._noise = noise if self._may_have_tails and "denoised" in self._sources else None
        self.max_depth = self.depth + (LONGEST_TAIL if self._noise else 0)

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        device = torch.device(device)
        if self.corpus is not None and self.corpus.vocabulary != vocabulary:
            raise ValueError(
                f"corpus is of a vocabulary of {self.corpus.vocabulary} tokens, the model has"
                f" {vocabulary}; expected one that was built with the model's own tokenizer"
            )
        if self.habits is not None and self.habits.vocabulary != vocabulary:
            raise ValueError(
                f"habits are of a vocabulary of {self.habits.vocabulary} tokens, the model has"
                f" {vocabulary}; expected those of this model"
            )
        self._vocabulary, self._corpus_tables = vocabulary, self.corpus_tables(device)
        self._habit_table = self.habit_table(device)
        self._opening.start(batch, vocabulary, device)
        self._factors = self._factors.to(device)
        self._lay_out_tables(batch, vocabulary, device)
        if self._times is None:
            self._times = StepTimes(None, device.type)
        self._sizer = TreeSizer(self._times, batch)
        self._planned = None  # nodes of the next tree of a captured step
        self._reported: list[float] | None = None  # expected_accepts of the last report
        self.draft = None
        self._accepted: Tensor | None = None  # accept lengths of the draft, once it was verified
        self._lengths: Tensor | None = None  # of the texts that it was proposed for, if several

    def _lay_out_tables(self, batch: int, vocabulary: int, device: torch.device) -> None:
        """Make the tables for these rows and tokens, or empty the ones that are there."""
        noise = self._noise and (self._noise.length, self._noise.content)
        if self._rows_for == (batch, device, noise):
            self.denoised.forget()
            if self.tails is not None:
                self.tails.forget()
            if self.suffix is not None:
                self.suffix.forget()
        else:
            self._rows_for = batch, device, noise
            self.allocations += 1
            self.denoised = Denoised(
                batch, self.depth if "denoised" in self._sources else 0, device
            )
            self.suffix = self.tails = None
            if self._noise is not None:
                of_tails = load_of_tails() if self.habits is None else of_tails_with(self._factors)
                fitted = of_tails.to(device)
                self.tails = NoiseTails(self._noise, self._factors, fitted, batch)
        if self._adjacency_for != (vocabulary, device):  # another vocabulary's tokens may be none
            self._adjacency_for = vocabulary, device
            self.allocations += 1
            self.adjacency = Adjacency(device, slots=SLOTS if "adjacency" in self._sources else 0)

    def forget(self) -> None:
        """Forget the tokens that are remembered from call to call."""
        if self._adjacency_for is not None:
            self.adjacency.forget()

    def corpus_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the corpus's tokens and suffixes on a device, empty ones without a corpus."""
        if self.corpus is not None:
            return self.corpus.on(device)
        nothing = torch.zeros(len(SUFFIXES), 0, dtype=torch.int32, device=device)
        return nothing[0], nothing

    def habit_table(self, device: torch.device) -> Tensor:
        """Return the habits on a device, an empty table without any."""
        if self.habits is not None:
            return self.habits.on(device)
        return torch.zeros(ORDERS, 0, 1 + GUESSES, dtype=torch.int32, device=device)

    def _suffix_for(self, history: Tensor) -> Suffix:
        """Return the index of these texts, an empty one where they are new."""
        room = history.shape[1] if "suffix" in self._sources else 0
        if self.suffix is None or self.suffix.room != room:
            self.allocations += 1
            self.suffix = Suffix(len(history), room, history.device)
        return self.suffix

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        chain = self._opening.first(history, lengths)
        if self.habits is not None:
            tokens, parents, *_ = self._tree(history, lengths, OPENING_TREE, chain.shape[1], 0.0)
            follow_likeliest(chain, tokens, parents)
        return chain

    def _tree(
        self, history: Tensor, lengths: Tensor, nodes: int, max_depth: int, foresight: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what :func:`msn_ext.ops.draft_tree` does, of all that is known of these texts."""
        suffix = self._suffix_for(history)
        suffix.update(history, lengths)
        return ops.draft_tree(
            history,
            lengths,
            self.denoised.guesses,
            self.adjacency.adjacency,
            self._habit_table,
            suffix.suffixes,
            *self._corpus_tables,
            self._factors if self.tails is None else self.tails.factors,
            nodes,
            max_depth,
            foresight,
        )

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        looked_at = self.look(lengths)
        tokens, parents, self.probability, self.sources = self._tree(
            history, lengths, looked_at, self.depth, self.foresight
        )
        if self.corpus is not None:  # a damaged file may hold any number
            tokens.clamp_(max=self._vocabulary - 1)
        nodes = self.budget or self._planned
        if not nodes:
            one = len(self.probability) == 1
            growing = self.probability if one else self.probability[self._growing]
            nodes = self.choose(expected_accepts(growing))
        if self.tails is not None:
            drafted = tokens, parents, self.probability
            self.draft = self.tails.below(drafted, nodes, history, lengths)
        else:
            self.draft = Draft.of(tokens[:, :nodes], parents[:, :nodes])
        return self.draft

    def _drafted(self, nodes: int) -> int:
        """Return how many nodes of so many are no tails."""
        return nodes if self.tails is None else self.tails.drafted(nodes)

    def _with_tails(self, expected: list[float]) -> list[float]:
        return expected if self.tails is None else self.tails.expected(expected)

    def observe(self, verified: Verified) -> None:
        if verified.draft is self.draft:
            self.count(verified.accept_length)
        guesses = verified.top_guesses()
        if self.tails is not None:
            self.tails.update(verified, guesses, self.denoised)
        else:
            self.denoised.update(verified, guesses)
        if "adjacency" in self._sources:
            self.adjacency.update(verified, guesses)

    # A step in parts, for who has his own ways to draft from the tables and to learn from a pass
    # (:mod:`..native_steps`): look, draft, choose where there is no budget, check, count.

    def tables(self, history: Tensor) -> dict[str, Tensor]:
        """Return what :func:`msn_ext.ops.draft_tree` and the ops that fill its tables take for
        these texts; "tables" where there are tails.
        """
        suffix = self._suffix_for(history)
        corpus, corpus_suffixes = self._corpus_tables
        tails = self.tails
        of_tails = {} if tails is None else {"tables": tails.tables}
        return of_tails | dict(
            denoised=self.denoised.guesses,
            adjacency=self.adjacency.adjacency,
            habits=self._habit_table,
            suffixes=suffix.suffixes,
            indexed=suffix.indexed,
            corpus=corpus,
            corpus_suffixes=corpus_suffixes,
            factors=self._factors if tails is None else tails.factors,
        )

    def look(self, lengths: Tensor) -> int:
        """Begin a step behind texts of these lengths: learn from the one before, and return how
        many nodes, tails left out, to draft and to choose from.
        """
        if self._sizes_by_itself:
            self._observe_last_step(lengths)
        looked_at = reach_of(self._planned) if self._planned else self._sizer.reach
        return self._drafted(self.budget or looked_at)

    def growing_rows(self) -> list[int]:
        """Return the rows whose expected gains decide on the size; none where it is fixed."""
        if not self._sizes_by_itself:
            return []
        return [0] if self._lengths is None else self._growing.nonzero().flatten().tolist()

    def choose(self, expected: list[float]) -> int:
        """Return the nodes, tails included, that give the most tokens per second, where
        ``expected[n]`` guesses are accepted of n + 1 nodes that are no tails.
        """
        expected = self._with_tails(expected)
        self._size = self._sizer.choose(expected)
        self._expected = expected[self._size - 1]
        return self._size

    def count(self, accept_length: Tensor) -> None:
        """Take the accept lengths [B] of the tree that was drafted last."""
        if self._sizes_by_itself:
            self._accepted = accept_length

    # Sizes, where steps run one by one: each tree's by its own probabilities.

    @property
    def _sizes_by_itself(self) -> bool:
        return self.budget is None and self._planned is None

    def _observe_last_step(self, lengths: Tensor) -> None:
        """Learn from the step before: how long it took, what it gained, and which rows go on."""
        now = seconds()
        if self._accepted is not None:
            accepted = self._accepted if len(lengths) == 1 else self._accepted[self._growing]
            mean = sum(accepted.tolist()) / len(accepted)
            self._sizer.observe(self._size, self._expected, mean - 1, now - self._began)
        if len(lengths) > 1:
            # A row that gained nothing has ended, and goes on only beside the others.
            if self._lengths is None:
                growing = torch.ones_like(lengths, dtype=torch.bool)
            else:
                growing = lengths > self._lengths
            self._growing, self._lengths = growing | ~growing.any(), lengths.clone()
        self._began, self._accepted = now, None

    # Sizes, where steps are captured: the next tree's by the last report, which is one step late.

    @property
    def report(self) -> Tensor | None:
        return None if self.budget else self.probability

    def plan(self) -> int:
        if self.budget:
            self._planned = self.budget
        elif self._reported is None:
            self._planned = FIRST_CAPTURED_SIZE
        else:
            self._planned = self._sizer.choose(self._reported, CAPTURED_SIZES)
        return self._planned

    def observe_step(
        self, report: Tensor | None, nodes: int, gained: list[int], seconds: float
    ) -> None:
        growing = [b for b, tokens in enumerate(gained) if tokens]
        if report is None or not growing:
            return
        self._reported = self._with_tails(expected_accepts(report[growing]))
        mean = sum(gained[b] for b in growing) / len(growing)
        self._sizer.observe(nodes, self._reported[nodes - 1], mean - 1, seconds)


def _check_settings(budget, sources, factors, max_depth, foresight, corpus, habits) -> None:
    """Raise ValueError where a setting of :class:`BestFirst` cannot be right."""
    if budget is not None and not (type(budget) is int and 1 <= budget <= MAX_NODES):
        raise ValueError(f"budget is {budget!r}; expected None or 1 to {MAX_NODES}")
    if isinstance(sources, str):
        raise ValueError(f"sources is {sources!r}; expected a tuple of {', '.join(SOURCES)}")
    if unknown := set(sources) - set(SOURCES):
        raise ValueError(
            f"sources has {', '.join(map(repr, sorted(unknown)))}; expected some of"
            f" {', '.join(SOURCES)}"
        )
    if not 0 <= max_depth <= MAX_NODES:
        raise ValueError(f"max_depth is {max_depth}; expected 0 to {MAX_NODES}")
    if not 0 <= foresight <= 1:
        raise ValueError(f"foresight is {foresight}; expected 0 to 1")
    if factors is not None:
        check_factors(factors, (FACTORS,), "factors")
    for name, given, kind, source in (
        ("corpus", corpus, Corpus, "suffix"),
        ("habits", habits, Habits, "adjacency"),
    ):
        if given is None:
            continue
        if not isinstance(given, kind):
            raise ValueError(
                f"{name} is {given!r}; expected None or what {kind.__name__}.load(path) gives"
            )
        if source not in sources:
            raise ValueError(
                f"sources is {tuple(sources)!r}; expected {source!r} among them, which looks into"
                f" the {name}"
            )
