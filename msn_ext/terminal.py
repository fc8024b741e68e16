"""Show how far long work is, on a terminal and in a file; keep transformers' messages away."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

INTERVAL = 30.0
"""Seconds between two lines about the same work, where there is no terminal."""


class _Lines:
    """A stream for tqdm, which goes back to the beginning of its line: each time is a line here."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(iterable=None, **settings) -> tqdm:
    """Return a bar of tqdm, with its settings, on standard error; where that is no terminal, lines:
    one every half a minute, none for work that takes less.
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        lines = _Lines(sys.stderr)
        settings |= dict(file=lines, mininterval=INTERVAL, delay=INTERVAL, ncols=100, leave=True)
    return tqdm(iterable, **settings)


@contextlib.contextmanager
def quiet_transformers(bars: bool = False) -> Iterator[None]:
    """Keep transformers' warnings, also of names that will go, and (unless ``bars``) progress bars
    off the terminal, then restore both.
    """
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


class StageBar:
    """Show a heading, then a bar of stages with the seconds that passed; on a file, one line a
    stage.

    Args:
        stream: where to; None: nowhere.
        heading: printed when the work begins.
        stages: how many times :meth:`stage` will be called.
    """

    def __init__(self, stream: TextIO | None, heading: str, stages: int):
        self._stream, self._heading, self._stages = stream, heading, stages
        self._terminal = stream is not None and stream.isatty()
        self._done = -1
        self._name = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> StageBar:
        if self._stream:
            self._start = time.monotonic()
            print(self._heading, file=self._stream, flush=True)
            if self._terminal:
                self._thread.start()
        return self

    def stage(self, name: str) -> None:
        """Say that the next stage begins."""
        self._done += 1
        self._name = name
        if self._stream and not self._terminal:
            print(f"  {self._done + 1}/{self._stages} {name}", file=self._stream, flush=True)

    def _tick(self) -> None:
        while not self._stop.wait(0.1):
            self._draw()

    def _draw(self) -> None:
        assert self._stream is not None
        bar = ("█" * 5 * self._done).ljust(5 * self._stages, "░")
        seconds = time.monotonic() - self._start
        self._stream.write(f"\r\033[K  {bar} {seconds:4.0f} s  {self._name}")
        self._stream.flush()

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if self._stream and self._terminal:
            self._stop.set()
            self._thread.join()
            if kind is None:
                self._done, self._name = self._stages, "done"
                self._draw()
            self._stream.write("\n")
