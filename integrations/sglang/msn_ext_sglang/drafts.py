"""Drafts for SGLang: an object with the methods of its ``NgramCorpus``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msn_ext import ops
from msn_ext.decoding.drafters import factors
from msn_ext.decoding.drafters.best_first import FORESIGHT
from msn_ext.decoding.drafters.habits import Habits
from msn_ext.decoding.drafters.sources import SLOTS
from msn_ext.ops import GUESSES, MAX_NODES, ORDERS

from .texts import LiveTexts, PastTexts

MAX_DEPTH = 20


def named_habits() -> Habits | None:
    """Return what ``msn habits`` wrote to the file that ``MSN_HABITS`` names; None: it names none.

    Raises:
        ValueError: there are no habits in it.
    """
    path = os.environ.get("MSN_HABITS")
    if not path:
        return None
    try:
        return Habits.load(os.path.expanduser(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"MSN_HABITS is {path}; expected a file of msn habits: {error}") from error


class _Drafted(NamedTuple):
    """Trees on their way through the model, of a batch of requests."""

    requests: list[str]
    tokens: Tensor  # int64 [B, N]
    parents: Tensor  # int32 [B, N]
    before: Tensor  # int64 [B, 3], the last tokens of the texts
    sizes: Tensor  # int64 [B], how many of these there are


class Drafts:
    """Trees of a fixed width, the best-first ones of :func:`msn_ext.ops.draft_tree`.

    They are made of the request's own text, of the last answers to anyone and of external corpora,
    and, where :meth:`remember` is told what the model said, of what it guessed after the same
    tokens (of anyone) and below the nodes it rejected; with habits also of what it usually says
    after them. The same calls give the same trees, whatever the process.

    Args:
        draft_token_num: N, nodes of a tree, the text's last token included, 2 to 256.
        capacity: tokens of finished answers to keep.
        external_corpus_max_tokens: of all external corpora together.
        vocabulary: of the model: no token of a tree is outside.
        habits: of the model, if any.
        of_ngram: what else ``NgramCorpus`` is told; it means nothing here.
    """

    def __init__(
        self,
        *,
        draft_token_num: int,
        capacity: int,
        vocabulary: int,
        external_corpus_max_tokens: int = 10_000_000,
        habits: Habits | None = None,
        **of_ngram: object,
    ):
        if not 2 <= draft_token_num <= MAX_NODES:
            raise ValueError(
                f"draft_token_num is {draft_token_num}; expected 2 to {MAX_NODES}, the text's last"
                " token included"
            )
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}; expected 0 or more tokens")
        if vocabulary < 1:
            raise ValueError(f"vocabulary is {vocabulary}; expected the model's vocab_size")
        if habits is not None and habits.vocabulary != vocabulary:
            raise ValueError(
                f"habits are of a vocabulary of {habits.vocabulary} tokens; expected the model's,"
                f" {vocabulary}"
            )
        self.draft_token_num, self._capacity = draft_token_num, capacity
        self._vocabulary, self._most_external = vocabulary, external_corpus_max_tokens
        self._factors = factors.load() if habits is None else habits.factors
        none = torch.zeros(ORDERS, 0, 1 + GUESSES, dtype=torch.int32)
        self._habits = none if habits is None else habits.on(none.device)
        self._corpora: dict[str, Tensor] = {}
        self._loading: dict[str, tuple[Tensor, PastTexts]] = {}
        self._live = LiveTexts(MAX_DEPTH)
        self.reset()

    def reset(self) -> None:
        """Forget all but the external corpora."""
        self._live.forget()
        self._past = self._past_with(self._corpora.values())
        self._adjacency = torch.zeros(ORDERS, SLOTS, 1 + GUESSES, dtype=torch.int32)
        self._drafted: _Drafted | None = None
        self._guesses: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the requests at hand, of what is remembered, and of habits."""
        past = (self._past.tokens, self._past.suffixes)
        return self._live.nbytes + sum(x.nbytes for x in (self._adjacency, self._habits, *past))

    # Texts.

    def __contains__(self, request: str) -> bool:
        return request in self._live.row_of

    def open(self, request: str, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Take the whole text of a request so far, at least one token. One that is not opened is
        known from the tails that :meth:`batch_get` gets.
        """
        self._live.open(request, prompt, answer, 0)

    def erase_match_state(self, req_ids: list[str]) -> None:
        """Forget requests; their answers become texts of the past."""
        # SGLang lists a set, in an order that differs between processes.
        for request in sorted(req_ids):
            if request in self._live.row_of:
                self._past.add(self._live.close(request))

    def batch_put(self, batch_tokens: list[list[int]]) -> None:
        """Do nothing: the texts have come with :meth:`batch_get`."""

    def synchronize(self) -> None:
        """Do nothing: nothing is done in the background."""

    # Trees.

    def batch_get(
        self, req_ids: list[str], batch_tokens: list[list[int]], total_lens: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draft a tree for each of some requests.

        Args:
            batch_tokens: the last tokens of the texts, at least one each; what a text has gained
                since the last call and one token more.
            total_lens: tokens of the whole texts.

        Returns:
            int64 [B * N], the trees' tokens, a parent before its children, first the last token of
            the text; int64 [B * N * N], 1 where a node (row) comes after another or is itself.
        """
        live = self._live
        gained = [live.extend(*one) for one in zip(req_ids, batch_tokens, total_lens)]
        rows = torch.tensor([live.row_of[request] for request in req_ids])
        self._learn(dict(zip(req_ids, gained)))
        live.index()
        used = live.rows
        tokens, parents, _, _ = ops.draft_tree(
            live.history[:used],
            live.lengths[:used],
            live.denoised[:used],
            self._adjacency,
            self._habits,
            live.suffixes[:used],
            self._past.tokens,
            self._past.suffixes,
            self._factors,
            self.draft_token_num,
            MAX_DEPTH,
            FORESIGHT,
        )
        tokens, parents = tokens[rows].clamp_(max=self._vocabulary - 1), parents[rows]
        _hang_up(parents)
        self._drafted = _Drafted(req_ids, tokens, parents, *self._ends(rows))
        return tokens.flatten().numpy(), _mask(parents).flatten().numpy()

    def _ends(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last tokens of some rows, int64 [B, 3], and how many of them there are."""
        lengths = self._live.lengths[rows]
        sizes = lengths.clamp(max=ORDERS)
        places = (lengths - sizes)[:, None] + torch.arange(ORDERS)
        places = places.clamp(max=self._live.history.shape[1] - 1)
        return self._live.history[rows[:, None], places], sizes

    # What the model said.

    def remember(self, guesses: Tensor) -> None:
        """Take what the model guessed at every node of the last trees, int32 [B, N, 8] on the CPU,
        as :func:`msn_ext.ops.top_guesses` gives it, for the next call of :meth:`batch_get`.
        """
        if self._drafted is None:  # since forgotten
            return
        expected = [*self._drafted.tokens.shape, GUESSES]
        if list(guesses.shape) != expected or guesses.dtype != torch.int32:
            raise ValueError(
                f"guesses has shape {list(guesses.shape)} and dtype {guesses.dtype}; expected"
                f" {expected}, int32"
            )
        self._guesses = guesses

    def _learn(self, gained: dict[str, Sequence[int]]) -> None:
        """Learn what the model said at the last trees, now that it is known what was accepted."""
        drafted, guesses = self._drafted, self._guesses
        self._drafted = self._guesses = None
        if drafted is None:
            return
        here = [at for at, request in enumerate(drafted.requests) if request in gained]
        rows = torch.tensor([self._live.row_of[drafted.requests[at]] for at in here], dtype=int)
        self._live.denoised[rows] = -1  # of the tree before
        if guesses is None or not here:
            return
        tokens, parents, guesses = drafted.tokens[here], drafted.parents[here], guesses[here]
        # What follows a node is the model's first guess, but on the accepted path the token that
        # SGLang drew there.
        targets = (guesses[..., 0] >> 4).long()
        for at, place in enumerate(here):
            children = list(zip(parents[at].tolist(), tokens[at].tolist()))
            node = 0
            for token in gained[drafted.requests[place]]:
                targets[at, node] = token
                if (node, token) not in children:
                    break
                node = children.index((node, token))
        _, path, _, continuation = ops.verify_tree(tokens, targets, parents)
        ops.remember_guesses(
            self._adjacency,
            drafted.before[here],
            drafted.sizes[here],
            tokens,
            parents,
            path,
            guesses,
        )
        denoised = self._live.denoised[rows]
        ops.keep_continuation(denoised, guesses, continuation)
        self._live.denoised[rows] = denoised

    # External corpora. Loading may run in another thread: what drafts look into changes only when
    # it is committed.

    def _past_with(self, corpora: Iterable[Tensor]) -> PastTexts:
        apart = torch.tensor([-1])
        parts = [part for corpus in corpora for part in (apart, corpus)]
        return PastTexts(self._capacity, torch.cat(parts) if parts else apart[:0])

    @property
    def remaining_token_budget(self) -> int:
        return self._most_external - sum(map(len, self._corpora.values()))

    def load_external_corpus_named(self, corpus_id: str, chunks: Iterable[Sequence[int]]) -> int:
        """Index a corpus, a negative number between its texts, and return its tokens' number."""
        if corpus_id in self._corpora:
            raise ValueError(f"there is an external corpus {corpus_id!r}; remove it first")
        parts = [torch.as_tensor(chunk, dtype=torch.int64) for chunk in chunks]
        corpus = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        if len(corpus) > self.remaining_token_budget:
            raise ValueError(
                f"external corpus {corpus_id!r} has {len(corpus)} tokens; expected at most"
                f" {self.remaining_token_budget} (--speculative-ngram-external-corpus-max-tokens)"
            )
        if len(corpus) and int(corpus.max()) >= self._vocabulary:
            raise ValueError(
                f"external corpus {corpus_id!r} has a token {int(corpus.max())}; expected less than"
                f" the vocabulary, {self._vocabulary}"
            )
        corpus = corpus.clamp(min=-1)
        past = self._past_with([*self._corpora.values(), corpus])
        self._loading[corpus_id] = corpus, past
        return len(corpus)

    def commit_external_corpus_load(self, corpus_id: str, loaded_token_count: int) -> None:
        """Draft from a corpus that was loaded; the answers of the past are forgotten."""
        self._corpora[corpus_id], self._past = self._loading.pop(corpus_id)

    def remove_external_corpus(self, corpus_id: str) -> None:
        """Draft from it no more; the answers of the past are forgotten."""
        if self._corpora.pop(corpus_id, None) is None:
            raise ValueError(
                f"there is no external corpus {corpus_id!r}; there are {sorted(self._corpora)}"
            )
        self._past = self._past_with(self._corpora.values())

    def list_external_corpora(self) -> dict[str, int]:
        return {name: len(corpus) for name, corpus in self._corpora.items()}


def _hang_up(parents: Tensor) -> None:
    """Give nodes that stand for nothing (parent -1) a place in the tree, in place: SGLang knows no
    such nodes.

    They become a chain under the node before them, where each is an only child: two equal siblings
    would be twice as likely to be accepted when SGLang draws.
    """
    nodes = torch.arange(parents.shape[1], dtype=parents.dtype)
    idle = parents < 0
    idle[:, 0] = False
    parents.copy_(torch.where(idle, nodes - 1, parents))


def _mask(parents: Tensor) -> Tensor:
    """Return int64 [B, N, N]: 1 where a node comes after another or is itself."""
    ancestors, _ = ops.tree_ancestors(parents, validate=False)
    bits = (ancestors[..., None] >> torch.arange(64)) & 1
    return bits.flatten(-2)[..., : parents.shape[1]]
