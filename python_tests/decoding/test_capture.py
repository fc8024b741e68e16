"""Capturing by torch's CUDA graphs, torch.cuda played by stand-ins: what lies around a capture."""

import contextlib
import threading
import warnings

import pytest
import torch
from transformers.utils import import_utils

from msn_ext.decoding import capture

WAITS = "called a synchronizing CUDA operation"


class Side:
    device = torch.device("cuda:0")


@pytest.fixture
def cuda(monkeypatch):
    """What happens, in order, while torch.cuda captures; `fails` makes the capture fail at its end
    and leave its stream the current one, as torch's does.
    """

    class Cuda:
        def __init__(self):
            self.happened = []
            self.current, self.fails, self.allocating = "the user's", False, False

    log = Cuda()

    @contextlib.contextmanager
    def stream(other):
        before, log.current = log.current, other
        try:
            yield
        finally:
            log.current = before

    class Graph:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local", "other threads may go on"

        def __enter__(self):
            log.current, log.allocating = "the side stream", True
            log.happened.append("begin")

        def __exit__(self, *error):
            log.happened.append("end")
            if log.fails:
                raise RuntimeError("capture failed")
            log.allocating = False

    def end_allocation(device, pool):
        assert (device, pool) == (0, (0, 1))
        if not log.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        log.allocating = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: log.current)
    monkeypatch.setattr(
        torch._C,
        "_cuda_clearCublasWorkspaces",
        lambda: log.happened.append("clear"),
        raising=False,
    )
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation)
    return log


@pytest.fixture
def modes(monkeypatch):
    """The sync debug modes that were set, in order."""
    seen = ["error"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: seen[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", seen.append)
    return seen


def test_a_captured_steps_workspace_is_made_within_the_capture(cuda):
    step = capture.CudaCapturedStep(lambda: cuda.happened.append("step"), (0, 1), Side())
    assert cuda.happened == ["clear", "begin", "step", "end", "clear"] and step.result is None


def test_a_failed_capture_leaves_everything_as_it_was(cuda):
    """torch.cuda.graph's behaviour: where capturing fails at its end, its stream stays the current
    one, and until torch 2.12 the allocator goes on as if it captured.
    """
    cuda.fails = True
    with pytest.raises(RuntimeError, match="capture failed"):
        capture.CudaCapturedStep(lambda: None, (0, 1), Side())
    assert cuda.current == "the user's" and not cuda.allocating
    assert cuda.happened == ["clear", "begin", "end", "clear"]


def test_a_failed_capture_that_ended_its_allocation_itself(cuda):
    """As torch 2.13 does: its own error is the one that is seen."""
    cuda.fails = True

    def step():
        cuda.allocating = False

    with pytest.raises(RuntimeError, match="capture failed"):
        capture.CudaCapturedStep(step, (0, 1), Side())
    assert not cuda.allocating


def test_waits_of_this_thread_are_seen_and_nothing_else_is_lost(modes):
    """Other threads' waits are not ours, and others' warnings are shown."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with capture.watched_waits() as waits:
            assert modes[-1] == "warn"
            warnings.warn(WAITS, stacklevel=1)
            other = threading.Thread(target=warnings.warn, args=(WAITS,))
            other.start()
            other.join()
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            warnings.warn(WAITS, stacklevel=1)
    assert len(waits) == 2 and all(__file__ in place for place in waits)
    assert [str(w.message) for w in shown] == ["something else"]
    assert modes == ["error", "warn", "error"], "as it was"


def test_the_mode_is_restored_after_an_error(modes):
    with pytest.raises(ValueError), capture.watched_waits():
        raise ValueError
    assert modes[-1] == "error"


def test_transformers_leaves_its_questions_out_in_the_thread_that_rehearses():
    answers = []

    def ask():
        answers.append(import_utils.is_tracing())

    with capture.as_if_capturing():
        ask()
        other = threading.Thread(target=ask)
        other.start()
        other.join()
    ask()
    assert answers == [True, False, False]
