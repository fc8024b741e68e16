"""Cases run in a process beside this one: what fails, hangs or takes the process down costs one."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

Key = tuple
"""What tells a case from others: the values that it begins with."""


class Report:
    """What the process that runs the cases tells the other. Every case begins, then ends with
    ``row`` or ``error``; nothing else tells a case that is missing from one that is done.

    Attributes:
        done: rows of earlier processes, by case.
    """

    def __init__(self, connection: Connection, done: dict[Key, dict], device: str):
        self.done, self._connection, self._device = done, connection, device

    def about(self, conditions: dict) -> None:
        """Tell what the figures depend on, before the first case."""
        self._connection.send(("about", conditions))

    def begin(self, **case) -> None:
        self._case = case
        self._connection.send(("begin", case))

    def row(self, **figures) -> None:
        self._connection.send(("row", self._case | figures))

    def error(self, error: Exception, spoilt: bool = False) -> None:
        """Tell why the case has no figures; then as :meth:`go_on`."""
        self.row(error=said(error))
        self.go_on(spoilt)

    def go_on(self, spoilt: bool = False) -> None:
        """End this process if it is ``spoilt`` or the GPU can't be used any more; another one goes
        on with the next case.
        """
        if spoilt or not usable(self._device):
            sys.exit()


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def usable(device: str) -> bool:
    """Return whether a GPU still computes for this process: no kernel has failed, and no capture
    that failed is still under way, which later calls would be taken for parts of.
    """
    if device != "cuda":
        return True
    import torch

    try:
        if torch.cuda.is_current_stream_capturing():
            return False
        torch.cuda.synchronize()
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def _run(work: Callable, connection: Connection, done: dict[Key, dict], device: str, options):
    work(Report(connection, done, device), options)
    connection.send(("end", None))


def isolated(
    work: Callable, options, device: str, seconds: float, done: dict[Key, dict]
) -> Iterator[tuple[str, dict]]:
    """Run ``work(report, options)`` in a process of its own, and what it leaves undone in another.

    Args:
        work: of a module's top level; reports its cases one by one, but for those in
            ``report.done``.
        seconds: that a case, or the time before the first one, may take.
        done: rows by case. Rows are added as they come.

    Yields:
        What was reported: ``("about", conditions)``, ``("begin", case)``, ``("row", row)``. A case
        that its process did not survive, or that took too long, has a row with an ``error``.

    Raises:
        RuntimeError: a process ended before its first case.
    """
    context = multiprocessing.get_context("spawn")
    ended = False
    while not ended:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (work, sender, dict(done), device, options)
        process = context.Process(target=_run, args=arguments)
        process.start()
        sender.close()
        case, why, before = None, "", len(done)
        since = time.monotonic()
        try:
            while not ended:
                if not receiver.poll(max(0.0, since + seconds - time.monotonic())):
                    why = f"took longer than {seconds:.0f} s"
                    break
                kind, content = receiver.recv()
                if kind == "begin":
                    case, since = content, time.monotonic()
                elif kind == "row":
                    done[tuple(case.values())], case = content, None
                    since = time.monotonic()
                if kind == "end":
                    case, ended = None, True
                else:
                    yield kind, content
        except EOFError:
            process.join(30)
        finally:
            if not ended:
                process.kill()
            process.join(30)
        why = why or f"ended its process, exit status {process.exitcode}"
        if case is not None:
            row = case | {"error": why}
            done[tuple(case.values())] = row
            yield "row", row
        elif not ended and len(done) == before:
            raise RuntimeError(f"the process of the cases ended before the first of them: {why}")
