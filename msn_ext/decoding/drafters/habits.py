"""What a model usually says after one, two and three tokens: counted over answers that it gave
before, and looked up where the text at hand has not shown it yet.
"""

from __future__ import annotations

import array
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_of
from torch import Tensor

from msn_ext import ops
from msn_ext.memory import table
from msn_ext.ops import EDGES, FACTORS, GUESSES, LEVELS, ORDERS
from msn_ext.paths import replacing

from . import factors as of_package
from .protocol import Drafter, ObservedDrafter, Verified

_VERSION = "1"
LEAST = 1, 2, 2
"""How often a context of one, two and three tokens must have stood to be kept: most that stood once
does not come again."""
_NO_GUESS = 15
"""In the place of a level."""
_BATCH = 1 << 14
"""Contexts that go into the table at once."""


class Habits:
    """The guesses of a model after contexts of one, two and three tokens, each the mean of what it
    said wherever the context stood: n-grams of the model's own, as in arXiv 2411.03786, which has
    them of single tokens.

    Made by :meth:`count` or :meth:`load`.

    Args:
        vocabulary: ``vocab_size`` of the model.
        contexts: of every order, int32 [n, 1], [n, 2] and [n, 3], the newest token last.
        guesses: of every order, int32 [n, 8], as :func:`msn_ext.ops.top_guesses` gives them.
        factors: float64 [348], what to weigh the sources of guesses with where there are these
            habits; None: those of the package.

    Raises:
        ValueError: these are no such tables, or a token is outside the vocabulary.
    """

    def __init__(
        self,
        vocabulary: int,
        contexts: list[Tensor],
        guesses: list[Tensor],
        factors: Tensor | None = None,
    ):
        for order, (found, said) in enumerate(zip(contexts, guesses, strict=True), 1):
            _check(found, said, vocabulary, order)
        if factors is not None:
            of_package.check(factors, (FACTORS,), "factors")
        self.vocabulary, self.contexts, self.guesses = vocabulary, contexts, guesses
        self.factors = of_package.load_of_habits() if factors is None else factors
        self._tables: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return sum(map(len, self.contexts))

    @classmethod
    def count(
        cls, contexts: Tensor, guesses: Tensor, vocabulary: int, least: tuple[int, ...] = LEAST
    ) -> Habits:
        """Count what a model said.

        Args:
            contexts: int [n, 3], the last three tokens of a text, the newest last.
            guesses: int32 [n, 8], what the model said next, as :func:`msn_ext.ops.top_guesses`
                gives it.
            vocabulary: ``vocab_size`` of the model.
            least: of every order, how often a context must have stood to be kept.

        Raises:
            ValueError: there is nothing to count, or a token is outside the vocabulary.
        """
        if contexts.dim() != 2 or contexts.shape[1] != ORDERS or not len(contexts):
            raise ValueError(f"contexts has shape {list(contexts.shape)}; expected [n, {ORDERS}]")
        _check(contexts.int(), guesses, vocabulary, ORDERS)
        share = _shares(guesses)
        kept = [
            _means(contexts[:, -order:].long(), guesses.long() >> 4, share, times)
            for order, times in enumerate(least, 1)
        ]
        return cls(vocabulary, [found for found, _ in kept], [said for _, said in kept])

    def on(self, device: torch.device) -> Tensor:
        """Return the table on a device, int32 [3, S, 9] as :func:`msn_ext.ops.draft_tree` takes it,
        the same one every time.
        """
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = self._table().to(device)
        return self._tables[device]

    def _table(self) -> Tensor:
        most = max(map(len, self.contexts))
        # At most every second slot is taken; of two contexts in one the last counts.
        slots = 1 << (2 * max(most, 1) - 1).bit_length()
        whole = table((ORDERS, slots, 1 + GUESSES), torch.device("cpu"))
        for order, (found, said) in enumerate(zip(self.contexts, self.guesses)):
            scratch = torch.zeros_like(whole)  # has what comes after contexts' ends, too
            for text, guess in zip(found.long().split(_BATCH), said.split(_BATCH)):
                ops.remember_guesses(
                    scratch,
                    text,
                    torch.full_like(text[:, 0], text.shape[1]),
                    text[:, -1:].contiguous(),
                    torch.tensor([-1], dtype=torch.int32, device="cpu"),
                    torch.zeros_like(text[:, :1]),
                    guess[:, None].contiguous(),
                )
            whole[order] = scratch[order]
        return whole

    def save(self, path: str | os.PathLike) -> None:
        """Write the file whole or not at all.

        Raises:
            OSError: it cannot be written; names the path.
        """
        tensors = {"factors": self.factors}
        narrow = torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32
        for order, (found, said) in enumerate(zip(self.contexts, self.guesses), 1):
            tensors[f"contexts.{order}"] = found.to(narrow)
            tensors[f"tokens.{order}"] = (said >> 4).clamp(min=0).to(narrow)
            tensors[f"levels.{order}"] = torch.where(said < 0, _NO_GUESS, said & 15).to(torch.uint8)
        about = {"msn_ext habits": _VERSION, "vocabulary": str(self.vocabulary)}
        with replacing(path) as unfinished:
            # Not by save_file, which makes another file, that nobody else may read.
            dense = {name: x.contiguous() for name, x in tensors.items()}
            unfinished.write_bytes(safetensors_of(dense, about))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Habits:
        """Read a file that :meth:`save` wrote, and check it.

        Raises:
            OSError: it cannot be opened.
            ValueError: it holds no habits, or of another version, or is damaged; names the file.
        """
        with open(path, "rb"):
            pass  # says what is wrong with the path better than what follows
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("msn_ext habits") != _VERSION:
                    raise ValueError(
                        f"expected what msn habits wrote, version {_VERSION}; it says"
                        f" {json.dumps(about)}"
                    )
                contexts, tokens, levels = (
                    [file.get_tensor(f"{name}.{order}").int() for order in range(1, ORDERS + 1)]
                    for name in ("contexts", "tokens", "levels")
                )
                guesses = [
                    torch.where(level == _NO_GUESS, -1, token * 16 + level)
                    for token, level in zip(tokens, levels, strict=True)
                ]
                return cls(int(about["vocabulary"]), contexts, guesses, file.get_tensor("factors"))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} holds no habits: {error}") from error


class HabitRecorder(ObservedDrafter):
    """Keeps what the model says along the texts that it writes, a call's last pass left out.

    Args:
        drafter: the one that drafts.
    """

    def __init__(self, drafter: Drafter):
        super().__init__(drafter)
        # Flat, and grown in place: a few hundred thousand tensors would take a hundred times this.
        self._contexts, self._guesses = array.array("i"), array.array("i")
        # Of every row: the length of its text, and what the last pass said of it. That counts once
        # the text has grown by it: a row that has ended goes on beside the others.
        self._waiting: list[tuple[int, list[int], list[int]]] = []

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        self._waiting = []
        super().start(batch, vocabulary, device)

    def observe(self, verified: Verified) -> None:
        lengths, guesses = verified.lengths.tolist(), verified.top_guesses().tolist()
        paths, accepted = verified.path.tolist(), verified.accept_length.tolist()
        tokens = verified.draft.tokens.tolist()
        for length, (before, heard, answers) in zip(lengths, self._waiting):
            if length > before:
                self._contexts.extend(heard)
                self._guesses.extend(answers)
        self._waiting = []
        for b, length in enumerate(lengths):
            text = verified.history[b, max(0, length - ORDERS) : length].tolist()
            nodes = paths[b][: accepted[b]]
            text += [tokens[b][node] for node in nodes[1:]]
            contexts: list[int] = []
            said: list[int] = []
            for at, node in enumerate(nodes, len(text) - len(nodes) + 1):
                if at >= ORDERS:
                    contexts += text[at - ORDERS : at]
                    said += guesses[b][node]
            self._waiting.append((length, contexts, said))
        super().observe(verified)

    def __len__(self) -> int:
        return len(self._contexts) // ORDERS

    def habits(self, vocabulary: int, least: tuple[int, ...] = LEAST) -> Habits:
        """Return what was recorded, counted as :meth:`Habits.count` does.

        Raises:
            ValueError: no answer was recorded.
        """
        if not self._contexts:
            raise ValueError("there is nothing to count: no answer was recorded")
        contexts = torch.frombuffer(self._contexts, dtype=torch.int32).view(-1, ORDERS)
        guesses = torch.frombuffer(self._guesses, dtype=torch.int32).view(-1, GUESSES)
        return Habits.count(contexts, guesses, vocabulary, least)


def _check(contexts: Tensor, guesses: Tensor, vocabulary: int, order: int) -> None:
    """Raise ValueError where these are no contexts of an order with their guesses."""
    if contexts.dtype != torch.int32 or contexts.dim() != 2 or contexts.shape[1] != order:
        raise ValueError(
            f"contexts have shape {list(contexts.shape)} and dtype {contexts.dtype}; expected"
            f" int32 [n, {order}]"
        )
    if guesses.dtype != torch.int32 or guesses.shape != (len(contexts), GUESSES):
        raise ValueError(
            f"guesses have shape {list(guesses.shape)} and dtype {guesses.dtype}; expected int32"
            f" {[len(contexts), GUESSES]}"
        )
    for name, tokens in (("contexts", contexts), ("guesses", guesses[guesses >= 0] >> 4)):
        if bool(((tokens < 0) | (tokens >= vocabulary)).any()):
            raise ValueError(
                f"{name} have tokens {int(tokens.min())} to {int(tokens.max())}; expected 0 to"
                f" {vocabulary - 1}"
            )
    if bool(((guesses & 15) >= LEVELS)[guesses >= 0].any()):
        raise ValueError(f"guesses have a level of probability above {LEVELS - 1}")


def _shares(guesses: Tensor) -> Tensor:
    """Return how likely each guess is among its row's, float64 [n, 8]: the middle of its level."""
    edges = torch.tensor([0.0, *EDGES, 1.0], dtype=torch.float64, device="cpu")
    middle = (edges[1:] + edges[:-1]) / 2
    shares = middle[(guesses.long() & 15).clamp(max=LEVELS - 1)] * (guesses >= 0)
    return shares / shares.sum(1, keepdim=True).clamp(min=1e-9)


def _means(contexts: Tensor, tokens: Tensor, share: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return the different contexts that stood often enough, int32 [m, order], and the eight
    likeliest tokens after each on average, as guesses int32 [m, 8].
    """
    found, which, times = contexts.unique(dim=0, return_inverse=True, return_counts=True)
    said = tokens >= 0
    width = int(tokens.max()) + 1 if len(tokens) else 1
    pairs = (which[:, None] * width + tokens)[said]
    pairs, slot = pairs.unique(return_inverse=True)
    sums = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, slot, share[said])
    owner, token = pairs // width, pairs % width
    mean = sums / times[owner]
    # Likeliest first within a context: by two stable sorts, of which the second is the context's.
    order = mean.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    owner, token, mean = owner[order], token[order], mean[order]
    first = torch.searchsorted(owner, torch.arange(len(found)))
    rank = torch.arange(len(owner)) - first[owner]
    best = rank < GUESSES
    edges = torch.tensor(EDGES, dtype=torch.float64)
    guesses = torch.full((len(found), GUESSES), -1, dtype=torch.int32)
    level = torch.bucketize(mean[best], edges, right=True)
    guesses[owner[best], rank[best]] = (token[best] * 16 + level).int()
    kept = times.argsort(stable=True)  # the most frequent last, which shall not be lost
    kept = kept[times[kept] >= least]
    return found[kept].int(), guesses[kept]
