"""Streamers: one for all rows, as transformers feeds it, or one for each row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from .request import Request, one_a_row


def _streamers(streamer) -> list[BaseStreamer]:
    return list(streamer) if one_a_row(streamer) else [streamer]


class Streaming:
    """Hands tokens to streamers, once it is settled that they will stay.

    Args:
        ends: by row, what ends its streamer; of one streamer for several rows none.
    """

    def __init__(self, request: Request, ends: Sequence[Callable[[], None]]):
        streamer = request.streamer
        assert streamer is not None
        self._ends, self._pad = ends, request.pad_token_id
        self._of_rows = _streamers(streamer)
        self._texts: list[list[int]] = [[] for _ in request.input_ids]
        self._sent = [0] * len(self._of_rows)

    def put(self, tokens: Tensor, counts: list[int], settled: list[int], ended: list[bool]) -> None:
        """Take what a pass gained, ``tokens[b, :counts[b]]``.

        Args:
            settled: by row, how many of its new tokens will stay.
            ended: by row, whether nothing comes after these.
        """
        for text, row, count in zip(self._texts, tokens.tolist(), counts):
            text += row[:count]
        if len(self._of_rows) < len(self._texts):
            self._put_columns(settled, ended)
            return
        for b, (streamer, end) in enumerate(zip(self._of_rows, self._ends)):
            if self._sent[b] < settled[b]:
                streamer.put(_on_host(self._texts[b][self._sent[b] : settled[b]]))
                self._sent[b] = settled[b]
            if ended[b]:
                end()

    def _put_columns(self, settled: list[int], ended: list[bool]) -> None:
        """Put a token of every row at a time, padding after those that ended."""
        going = [count for count, over in zip(settled, ended) if not over]
        until = min(going) if going else max(settled)
        for at in range(self._sent[0], until):
            column = [text[at] if at < len(text) else self._pad for text in self._texts]
            self._of_rows[0].put(_on_host(column))
        self._sent[0] = max(self._sent[0], until)


def _on_host(tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device="cpu")


@contextlib.contextmanager
def streaming(request: Request) -> Iterator[Streaming | None]:
    """Give the streamers their prompts, and end them whatever happens within; None: there are
    none.
    """
    streamer, ids = request.streamer, request.input_ids
    with contextlib.ExitStack() as stack:
        if streamer is None:
            yield None
            return
        streamers = _streamers(streamer)
        ends = [stack.enter_context(_ending(each)) for each in streamers]
        if one_a_row(streamer):
            for row, offset, each in zip(ids, request.offsets.tolist(), streamers):
                each.put(row[None, offset:].cpu())
        elif not request.streamer_has_prompt:
            streamers[0].put(ids.cpu())
        yield Streaming(request, ends)


@contextlib.contextmanager
def _ending(streamer: BaseStreamer) -> Iterator[Callable[[], None]]:
    """Give what ends a streamer, unless it has ended; end it in any case."""
    todo = [streamer]

    def end() -> None:
        while todo:
            todo.pop().end()

    try:
        yield end
    finally:
        end()
