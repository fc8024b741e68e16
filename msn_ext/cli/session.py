"""A conversation with a model, whose keys and values stay from turn to turn."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from msn_ext.decoding.engine import engine_of, native_plan_for
from msn_ext.generation import drafter_for

from .common import CommandError
from .loading import context_of, conversation_tokens
from .runs import PassStreamer, Run, timed


class TurnStreamer(PassStreamer):
    """Writes an answer as it comes, and notes when its first token did."""

    first_at: float | None = None

    def put(self, value: Tensor) -> None:
        if self.first_at is None and not self._prompt:
            self.first_at = time.perf_counter()
        super().put(value)


@dataclass
class Turn:
    """One answer.

    Attributes:
        first_token: seconds until it came; None: not streamed.
        reused: tokens of the conversation that were not read again.
        ended: "" by the model, else what ended it: "interrupt", "context" or "limit".
    """

    run: Run
    first_token: float | None
    reused: int
    ended: str


class Session:
    """A conversation.

    After an error or an interrupt by exception it is as it was before the turn.

    Args:
        draft: the name of a draft.
        engine: what :func:`msn_ext.generate` takes.
        system: a message before all others; None: none.
        max_new_tokens: of an answer.
        options: of :func:`msn_ext.generate`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        draft: str = "auto",
        engine: str = "auto",
        system: str | None = None,
        max_new_tokens: int = 1024,
        **options,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._asked_engine, self._options = engine, options
        self._max_new_tokens, self._system = max_new_tokens, system
        self.engine = engine_of(native_plan_for(model, engine))
        self.context: int | None = context_of(model)
        self.set_draft(draft)
        self.reset()

    def set_draft(self, name: str) -> None:
        """Draft by another way from now on; raises ValueError where there is none of this name."""
        self._drafter = drafter_for(name, self._model, self.engine)
        self.draft = name

    def reset(self) -> None:
        """Begin anew."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._forget()

    def _forget(self) -> None:
        self._cache, self._read = DynamicCache(), list[int]()

    @property
    def tokens(self) -> int:
        """How many tokens were read and answered, which the cache holds but for the last."""
        return len(self._read)

    @property
    def cache_bytes(self) -> int:
        layers = cast(list[Any], self._cache.layers)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def answer(self, text: str, streamer: TurnStreamer | None, stop: threading.Event) -> Turn:
        """Answer a message, until ``stop`` is set, and keep both.

        Raises:
            CommandError: the context has no room for an answer.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = conversation_tokens(self._tokenizer, messages).to(self._model.device)
        limit = self._limit(ids.shape[1])
        reused = self._crop(ids[0].tolist())
        before, began = self._cache.layers, time.perf_counter()
        try:
            run = timed(
                self._model,
                ids,
                self._drafter,
                streamer,
                attention_mask=torch.ones_like(ids),
                past_key_values=self._cache,
                max_new_tokens=limit,
                engine=self._asked_engine,
                stopping_criteria=[lambda ids, scores, **_: _all(ids, stop.is_set())],
                **self._options,
            )
        except BaseException:
            if self._cache.layers is not before:
                self._forget()  # which was filled already
            raise
        self._read = [*ids[0].tolist(), *run.tokens][: self._cache.get_seq_length()]
        content = self._tokenizer.decode(run.tokens, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": content}]
        first_at = None if streamer is None else streamer.first_at
        first_token = None if first_at is None else first_at - began
        return Turn(run, first_token, reused, self._ended(run.tokens, limit, stop))

    def _limit(self, length: int) -> int:
        """Return how many tokens an answer may have after so many."""
        if length == 0:
            raise CommandError("the message is empty")
        if self.context is None:
            return self._max_new_tokens
        if length >= self.context:
            raise CommandError(
                f"the conversation would have {length} tokens, and the model's context holds"
                f" {self.context}, answer included; this message was left out: send a shorter one,"
                " or begin anew by /reset"
            )
        return min(self._max_new_tokens, self.context - length)

    def _crop(self, ids: list[int]) -> int:
        """Keep of the cache what the conversation begins with; return how many tokens that is."""
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, self._read))
        count = sum(1 for _ in same)
        if count < len(self._read):  # templates may write earlier turns in another way
            self._cache.crop(count - len(self._read))
            del self._read[count:]
        return min(count, len(ids) - 1)

    def _ended(self, tokens: list[int], limit: int, stop: threading.Event) -> str:
        ends = self._model.generation_config.eos_token_id
        if tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            return ""
        if stop.is_set():
            return "interrupt"
        return "limit" if limit == self._max_new_tokens else "context"


def _all(ids: Tensor, value: bool) -> Tensor:
    return torch.full((len(ids),), value, device=ids.device)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within: the first Ctrl-C sets the event that this gives, later ones raise
    KeyboardInterrupt.
    """
    stop = threading.Event()

    def on_interrupt(_number, _frame) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
