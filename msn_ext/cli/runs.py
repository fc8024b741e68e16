"""Time an answer, and show it while it comes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Run:
    """One generated answer.

    Attributes:
        accept_lengths: tokens gained, one entry a forward pass.
        engine: what computed the passes; None: transformers alone.
    """

    tokens: list[int]
    accept_lengths: list[int]
    seconds: float
    engine: str | None = None

    @property
    def passes(self) -> int:
        return len(self.accept_lengths)

    @property
    def mat(self) -> float:
        """Mean accept length: tokens per forward pass."""
        return len(self.tokens) / self.passes

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


def timed(model, input_ids: Tensor, draft, streamer, **options) -> Run:
    """Generate an answer to one prompt, int64 [1, P], and time it."""
    from msn_ext import generate

    start = time.perf_counter()
    out = generate(
        model, input_ids, draft=draft, streamer=streamer, return_dict_in_generate=True, **options
    )
    tokens = out.sequences[0, input_ids.shape[1] :].tolist()  # waits for the device
    seconds = time.perf_counter() - start
    return Run(tokens, out.accept_lengths[0].tolist(), seconds, out.engine)


def timed_plain(model, input_ids: Tensor, max_new_tokens: int) -> Run:
    """Generate an answer to one prompt, int64 [1, P], by transformers alone, and time it."""
    import torch

    start = time.perf_counter()
    out = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    tokens = out[0, input_ids.shape[1] :].tolist()
    return Run(tokens, [1] * len(tokens), time.perf_counter() - start)


class PassStreamer:
    """A streamer for ``generate`` that writes text as it comes and shows which pass gained it.

    Args:
        tokenizer: turns tokens into text.
        stream: where the text goes.
        color: the tokens of a pass that gained several in one colour, the next such pass in
        another.
        mark: put ‹ › around them.
    """

    colors = ("\033[32m", "\033[36m", "\033[35m")

    def __init__(
        self, tokenizer, stream: TextIO, *, color: bool = False, mark: bool = False
    ) -> None:
        self._decoder = _TextDecoder(tokenizer)
        self._stream = stream
        self._color, self._mark = color, mark
        self._prompt = True
        self._groups = 0

    def put(self, value: Tensor) -> None:
        """Write the tokens of one forward pass; the first call brings the prompt, and skips it."""
        if self._prompt:
            self._prompt = False
            return
        tokens = value.flatten().tolist()
        text = "".join(map(self._decoder.push, tokens))
        if len(tokens) > 1 and text:
            if self._color:
                text = f"{self.colors[self._groups % len(self.colors)]}{text}\033[0m"
            elif self._mark and (words := text.strip()):
                before, after = text.split(words)
                text = f"{before}‹{words}›{after}"
            self._groups += 1
        self._write(text)

    def end(self) -> None:
        """Write what was held back until the rest of a character would come."""
        self._write(self._decoder.rest())

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _TextDecoder:
    """Tokens to text, one by one: a token that ends inside a character waits for the next.

    Only the tokens since the last whole character and one piece before them are decoded again, so
    that a tokenizer that drops the first space of a text does so only once.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._open: list[int] = []

    def push(self, token: int) -> str:
        self._open.append(token)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        self._before, self._open = self._open, []
        return text

    def rest(self) -> str:
        text = self._text()
        self._before, self._open = self._open, []
        return text

    def _text(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._open)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
