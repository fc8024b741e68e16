"""Best-first drafting: the most probable nodes of a tree of everything that is known, as many as
pay.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.ops import FACTORS, GUESSES, MAX_NODES, ORDERS, SUFFIXES

from ..sizing import FIRST_RECORDED, RECORDED, Budget, StepTimes, reach_of
from ..verification import as_compared
from . import factors as weights
from .corpus import Corpus
from .protocol import Draft, TreeDrafter, Verified
from .tree import RETRIEVAL, DraftTree

OPENING = 5
"""Guesses behind the prompt, a chain: text that followed its end before, noise where there is none.
"""
FORESIGHT = 0.05
SLOTS = 1 << 16
"""Contexts of one order that are remembered."""


class Denoised:
    """The model's guesses at the rejected nodes below the accepted path, by depth (Jacobi
    iteration).

    Attributes:
        guesses: int32 [B, depths, 8], as :func:`msn_ext.ops.draft_tree` takes them; -1: none.
    """

    def __init__(self, batch: int, depths: int, device: torch.device):
        self._depths = depths
        self.guesses = torch.full((batch, depths, GUESSES), -1, dtype=torch.int32, device=device)

    def forget(self) -> None:
        self.guesses.fill_(-1)

    def update(self, verified: Verified, guesses: Tensor) -> None:
        nodes = verified.continuation[:, : self._depths, None]
        found = guesses.gather(1, nodes.clamp(min=0).expand(-1, -1, GUESSES)).masked_fill(
            nodes < 0, -1
        )
        self.guesses[:, found.shape[1] :] = -1
        self.guesses[:, : found.shape[1]] = found


class Adjacency:
    """What the model last guessed after the same one, two and three tokens, from every verified
    node.

    One table for all rows: 7 MB whatever the vocabulary. A newer context takes an older one's slot.

    Attributes:
        contexts: int32 [3, slots, 9], as :func:`msn_ext.ops.remember_guesses` keeps it.
    """

    def __init__(self, device: torch.device, slots: int = SLOTS):
        self.contexts = torch.zeros(ORDERS, slots, 1 + GUESSES, dtype=torch.int32, device=device)

    def forget(self) -> None:
        self.contexts.zero_()

    def update(self, verified: Verified, guesses: Tensor) -> None:
        draft = verified.draft
        ops.remember_guesses(
            self.contexts,
            verified.history,
            verified.lengths,
            draft.tokens,
            draft.parents,
            verified.path,
            guesses,
        )


class Suffix:
    """What followed the last place of the text's last n-grams, up to 16 tokens long.

    32 bytes a token of room, at most 4 MB a row; a step costs the same however long the text is.

    Attributes:
        heads: int32 [B, 8, slots], as :func:`msn_ext.ops.index_suffixes` keeps it.
    """

    def __init__(self, batch: int, room: int, device: torch.device):
        self.room = room
        slots = min(1 << max(room - 1, 0).bit_length(), 1 << 17) if room else 0
        self.heads = torch.zeros(batch, len(SUFFIXES), slots, dtype=torch.int32, device=device)
        self._indexed = torch.zeros(batch, dtype=torch.int64, device=device)

    def forget(self) -> None:
        self.heads.zero_()
        self._indexed.zero_()

    def update(self, history: Tensor, lengths: Tensor) -> None:
        ops.index_suffixes(self.heads, history, self._indexed, lengths)
        self._indexed.copy_(lengths)


SOURCES = ("denoised", "adjacency", "suffix")


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

    An object that is passed to several calls of ``generate`` keeps what it remembers, and what it
    learned of step times, from call to call.
    """

    def __init__(
        self,
        budget: int | None = None,
        sources: tuple[str, ...] = SOURCES,
        factors: Tensor | None = None,
        times: StepTimes | None = None,
        max_depth: int = 20,
        foresight: float = FORESIGHT,
        corpus: Corpus | None = None,
    ):
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
            weights.check(factors, (FACTORS,), "factors")
        if not (corpus is None or isinstance(corpus, Corpus)):
            raise ValueError(
                f"corpus is {corpus!r}; expected None or a Corpus, as Corpus.load(path) gives it"
            )
        if corpus is not None and "suffix" not in sources:
            raise ValueError(
                f"sources is {tuple(sources)!r}; expected 'suffix' among them, which looks into the"
                " corpus"
            )
        self.max_depth, self.budget, self._sources, self.corpus = (
            max_depth,
            budget,
            tuple(sources),
            corpus,
        )
        self._factors = weights.load() if factors is None else factors
        self._foresight, self._times = foresight, times
        self._of: tuple[int, torch.device] | None = None  # whose tokens the table of contexts holds
        self._rows: tuple[int, torch.device] | None = (
            None  # and for how many rows the other tables are
        )
        self._suffix: Suffix | None = None
        self._planned: int | None = None
        self.allocations = 0
        self.probability: Tensor | None = None
        self._opening = TreeDrafter(DraftTree.chain(1 + min(OPENING, max_depth), RETRIEVAL))

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        device = torch.device(device)
        if self.corpus is not None and self.corpus.vocabulary != vocabulary:
            raise ValueError(
                f"corpus is of a vocabulary of {self.corpus.vocabulary} tokens, the model has"
                f" {vocabulary}; expected one that was built with the model's own tokenizer"
            )
        self._vocabulary, self._corpus_tables = vocabulary, self._corpus_on(device)
        self._opening.start(batch, vocabulary, device)
        self._factors = self._factors.to(device)
        if self._rows == (batch, device):
            self._denoised.forget()
            if self._suffix is not None:
                self._suffix.forget()
        else:
            self._rows = batch, device
            self.allocations += 1
            self._denoised = Denoised(
                batch, self.max_depth if "denoised" in self._sources else 0, device
            )
            self._suffix = None
        if self._of != (vocabulary, device):  # another vocabulary's tokens may be none here
            self._of = vocabulary, device
            self.allocations += 1
            self._adjacency = Adjacency(device, slots=SLOTS if "adjacency" in self._sources else 0)
        if self._times is None:
            self._times = StepTimes(None, device.type)
        self._choice = Budget(self._times, batch)
        self._planned = None
        self._late: list[float] | None = (
            None  # guesses accepted, by nodes, as the last report promised
        )
        self._draft: Draft | None = None  # what was proposed last,
        self._accepted: Tensor | None = None  # its accept lengths, once it was verified,
        self._lengths: Tensor | None = None  # and the texts behind which it was proposed

    def forget(self) -> None:
        """The tokens that were remembered from call to call."""
        self._adjacency.forget()

    def _corpus_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.corpus is not None:
            return self.corpus.on(device)
        nothing = torch.zeros(len(SUFFIXES), 0, dtype=torch.int32, device=device)
        return nothing[0], nothing

    def _listen(self, history: Tensor, lengths: Tensor) -> Suffix:
        """The suffixes of the text so far."""
        room = history.shape[1] if "suffix" in self._sources else 0
        if self._suffix is None or self._suffix.room != room:
            self.allocations += 1
            self._suffix = Suffix(len(lengths), room, history.device)
        self._suffix.update(history, lengths)
        return self._suffix

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        return self._opening.first(history, lengths)

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        free = self.budget is None and self._planned is None
        if free:
            self._look_back(lengths)
        tokens, parents, self.probability, self.sources = ops.draft_tree(
            history,
            lengths,
            self._denoised.guesses,
            self._adjacency.contexts,
            self._listen(history, lengths).heads,
            *self._corpus_tables,
            self._factors,
            self.budget or (self._choice.reach if free else reach_of(self._planned)),
            self.max_depth,
            self._foresight,
        )
        if self.corpus is not None:  # a damaged file may hold any number
            tokens.clamp_(max=self._vocabulary - 1)
        nodes = self.budget or self._planned or self._pay()
        self._draft = Draft.of(tokens[:, :nodes], parents[:, :nodes])
        return self._draft

    @property
    def report(self) -> Tensor | None:
        """Of recorded steps (:mod:`..runner`): the probabilities that the size of the next tree is
        chosen by.
        """
        return None if self.budget else self.probability

    def plan(self) -> int:
        """The nodes of the next tree, by what was said of the last step but one."""
        if self._late is None:
            self._planned = self.budget or FIRST_RECORDED
        elif not self.budget:
            self._planned = self._choice.choose(self._late, RECORDED)
        return self._planned

    def told(self, report: Tensor | None, nodes: int, gained: list[int], seconds: float) -> None:
        growing = [b for b, tokens in enumerate(gained) if tokens]
        if report is None or not growing:
            return
        expected = (report[growing].mean(0).cumsum(0) - 1).tolist()
        self._times.observe(len(gained) * nodes, seconds)
        self._choice.observe(
            expected[nodes - 1], sum(gained[b] for b in growing) / len(growing) - 1
        )
        self._late = expected

    def _pay(self) -> int:
        """The nodes that give the most tokens per second; waits for the device."""
        growing = (
            self.probability if len(self.probability) == 1 else self.probability[self._growing]
        )
        expected = (growing.mean(0).cumsum(0) - 1).tolist()
        nodes = self._choice.choose(expected)
        self._expected = expected[nodes - 1]
        return nodes

    def _look_back(self, lengths: Tensor) -> None:
        """Learn from the step before: how long it took, what it gained, and which rows go on."""
        now = time.perf_counter()
        if self._accepted is not None:
            self._times.observe(self._draft.tokens.numel(), now - self._began)
            accepted = self._accepted if len(lengths) == 1 else self._accepted[self._growing]
            self._choice.observe(self._expected, sum(accepted.tolist()) / len(accepted) - 1)
        if (
            len(lengths) > 1
        ):  # a row that gained nothing has ended, and goes on only beside the others
            growing = (
                torch.ones_like(lengths, dtype=torch.bool)
                if self._lengths is None
                else lengths > self._lengths
            )
            self._growing = growing | ~growing.any()
        self._began, self._lengths, self._accepted = now, lengths.clone(), None

    def observe(self, verified: Verified) -> None:
        if verified.draft is self._draft and self.budget is None and self._planned is None:
            self._accepted = verified.accept_length
        guesses = (
            ops.top_guesses(as_compared(verified.logits))
            if verified.guesses is None
            else verified.guesses
        )
        self._denoised.update(verified, guesses)
        if "adjacency" in self._sources:
            self._adjacency.update(verified, guesses)
