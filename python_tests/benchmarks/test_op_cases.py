"""benchmarks/op_cases: what is timed as a CUDA graph can be captured."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import BENCHMARKS


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would be waited for: at questions about values, and at data of the host,
    which would be copied there.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        by_numbers = func is torch.ops.aten.index.Tensor and not any(
            x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]
        )
        asks = (
            torch.Tag.data_dependent_output in func.tags
            or (torch.Tag.dynamic_output_shape in func.tags and not by_numbers)
            or (func is torch.ops.aten.lift_fresh.default and inputs[0].ndim > 0)
        )
        if asks:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def op_cases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import op_cases
    from op_cases import drafting

    monkeypatch.setattr(drafting, "LONG", 300)
    monkeypatch.setattr(drafting, "CORPUS", 2000)
    return op_cases


def test_only_what_is_marked_waits_for_the_device(op_cases):
    """Which ends a capture, and leaves a process that can do nothing more."""
    waiting = set()
    model = op_cases.MODELS["cpu"][0]
    for op, cases in op_cases.CASES.items():
        for case in cases(model, [8], [64, 128, 256], "cpu"):
            for name, call in {"run": case.run, "eager": case.eager, **case.others}.items():
                if call is None:
                    continue
                call()  # what is prepared once
                try:
                    with NoWaiting():
                        call()
                except RuntimeError as error:
                    assert case.waits and name == "eager", f"{op} {case.size}, {name}: {error}"
                    waiting.add(op)
                else:
                    assert not (case.waits and name == "eager"), f"{op} {case.size} waits for none"
    assert waiting == {"commit_kv"}


def test_a_timer_finds_what_waits_before_it_captures(monkeypatch):
    """A capture that fails spoils the process; only the stream is what it was."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contextlib

    from timing import Timer

    events, mode = [], ["default"]

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def entered(name, *arguments, **options):
        events.append(name)
        yield

    def waits():
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: entered("capture"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda m: mode.__setitem__(0, m))
    timer = Timer("cpu", 3)
    timer.device = "cuda"
    monkeypatch.setattr(timer, "_once", lambda call: 1.0)
    with pytest.raises(RuntimeError, match="synchronizing"):
        timer(waits)
    assert "capture" not in events and mode == ["default"] and not timer.spoilt
    assert timer(waits, captured=False) == [1.0] * 3 and "capture" not in events

    def fails():
        if "capture" in events:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timer(fails)
    assert timer.spoilt and events[-2:] == ["stream", "capture"], "the stream is restored outside"
