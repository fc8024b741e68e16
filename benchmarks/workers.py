"""Processes that answer lines of JSON on their stdin with lines on their stdout, as many alive at
once as the memory holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

RESERVE = 1024  # MiB that stay free, beside what the largest worker so far took


class Failed(Exception):
    """A worker ended, or took too long; says what it wrote last on stderr."""


class Missing(Exception):
    """A worker's package is not installed; says which."""


class Worker:
    """One process, started at once and loaded when :meth:`load` returns.

    Args:
        command: what is run; it prints ``{"versions": ...}`` or ``{"missing": ...}`` first.
        timeout: seconds that an answer may take, the first one, for loading, included.
    """

    def __init__(self, command: list[str], timeout: float):
        self.timeout = timeout
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # a signal to the terminal is for the parent, which ends it
        )

    def load(self) -> dict:
        """Wait for the first line and return the versions of the packages in it.

        Raises:
            Missing, Failed
        """
        content = self._read()
        if "missing" in content:
            raise Missing(content["missing"])
        return content["versions"]

    def ask(self, request: dict) -> dict:
        """Return the answer to a request.

        Raises:
            Failed
        """
        with contextlib.suppress(OSError):  # it ended: reading says so
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict:
        timer, start = threading.Timer(self.timeout, self.process.kill), time.perf_counter()
        timer.start()
        line = self.process.stdout.readline()
        if line.endswith("\n"):
            timer.cancel()
            return json.loads(line)
        why = f"exit status {self.process.wait()}"
        timer.cancel()
        if time.perf_counter() - start >= self.timeout:
            why = f"no answer in {self.timeout:g} s"
        self._log.seek(0)
        words = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        raise Failed(": ".join([why, *words]))

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used; NaN where the system does not say."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what it did not read any more
            self.process.stdin.close()
        self.process.stdout.close()
        self._log.close()


class Pool:
    """Workers by name, started when they are first asked for.

    Where memory gets short, the one that was asked last is stopped, which is the one whose turn
    is furthest off when turns go round, and started anew at its next turn.

    Args:
        command: gives the command of a name's worker.
        warm: called with every worker that was loaded.
        alive: workers at once; None: as many as the memory holds.
        timeout: as for :class:`Worker`.
    """

    def __init__(
        self,
        command: Callable[[str], list[str]],
        warm: Callable[[Worker], object] = lambda worker: None,
        alive: int | None = None,
        timeout: float = 900,
    ):
        self._command, self._warm, self._alive, self._timeout = command, warm, alive, timeout
        self._workers: dict[str, Worker] = {}  # the one that was asked last is the last
        self.versions: dict[str, dict] = {}
        self._largest = 0
        self.idle_seconds = self.busy_seconds = 0.0

    def ask(self, name: str, request: dict) -> dict:
        """Return the answer of a name's worker, which is loaded if it is not there.

        Raises:
            Missing, Failed: the worker is gone, and is started again at the next request.
        """
        try:
            worker = self._loaded(name)
            others = [other for other in self._workers.values() if other is not worker]
            used, start = sum(other.cpu_seconds() for other in others), time.perf_counter()
            answer = worker.ask(request)
            self.busy_seconds += time.perf_counter() - start
            self.idle_seconds += sum(other.cpu_seconds() for other in others) - used
        except (Failed, Missing):
            self.stop(name)
            raise
        self._largest = max(self._largest, answer.get("peak", 0))
        return answer

    def _loaded(self, name: str) -> Worker:
        if name in self._workers:
            self._workers[name] = self._workers.pop(name)
            return self._workers[name]
        while self._workers and self._full():
            self.stop(next(reversed(self._workers)))
        worker = self._workers[name] = Worker(self._command(name), self._timeout)
        self.versions[name] = worker.load()
        self._warm(worker)
        return worker

    def _full(self) -> bool:
        if self._alive is not None:
            return len(self._workers) >= self._alive
        return available_memory() < self._largest + RESERVE

    def stop(self, name: str) -> None:
        if name in self._workers:
            self._workers.pop(name).stop()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for name in list(self._workers):
            self.stop(name)


def available_memory() -> float:
    """Return MiB; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024
