"""Progress on a terminal, and where there is none."""

import contextlib
import io
import time

import pytest

from msn_ext import terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


streams = pytest.mark.parametrize("kind", [io.StringIO, Terminal], ids=["file", "terminal"])


def work(stream, steps: int, seconds: float):
    with (
        contextlib.redirect_stderr(stream),
        terminal.progress_bar(total=steps, desc="training", unit="step", leave=False) as bar,
    ):
        for at in range(steps):
            time.sleep(seconds)
            bar.set_postfix(loss=f"{1 / (at + 1):.2f}", refresh=False)
            bar.update()


@streams
def test_long_work_is_seen(kind, monkeypatch):
    """In a file a line now and then, which says how far it is; no control characters."""
    monkeypatch.setattr(terminal, "INTERVAL", 0.05)
    stream = kind()
    work(stream, 20, 0.02)
    said = stream.getvalue()
    if kind is Terminal:
        assert "\r" in said and "20/20" in said
        return
    lines = said.splitlines()
    assert 3 <= len(lines) <= 12 and all(line.startswith("training:") for line in lines)
    assert not any(sign in said for sign in "\r\033") and "/20 [" in lines[0]
    assert "loss=" in lines[-1] and "20/20" in lines[-1]


@streams
def test_short_work_leaves_nothing_in_a_file(kind):
    stream = kind()
    work(stream, 3, 0.0)
    said = stream.getvalue()
    assert bool(said) == (kind is Terminal)
