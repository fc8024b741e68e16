"""The workspace that kernels take their memory from."""

import torch

from msn_ext import ops
from msn_ext.ops import workspace


def test_a_workspace_grows_a_few_times_only():
    """Ops want floats and counters by turns; what was handed out once stays, for the recordings
    that know it.
    """
    space, like = ops.Workspace(), torch.empty(0)
    seen = {}
    for _ in range(100):
        for wanted in ((1000, 1), (1, 70), (10, 10)):
            floats, counters = space.get(like, *wanted)
            assert len(floats) >= wanted[0] and len(counters) >= wanted[1] and not counters.any()
            assert (floats.dtype, counters.dtype) == (torch.float32, torch.int32)
            seen |= {x.data_ptr(): x for x in (floats, counters)}
    assert len(seen) == 3
    for size in range(1, 5000):
        seen |= {x.data_ptr(): x for x in space.get(like, size, 1)}
    assert sum(map(len, seen.values())) < 4 * 5000


def test_what_a_capture_would_make_larger_is_its_own(monkeypatch):
    """It is set to 0 by the replays alone, so that no other launch may have it."""
    capturing = False

    monkeypatch.setattr(workspace, "_captured", lambda like: capturing)
    space, like = ops.Workspace(), torch.empty(0)
    before = space.get(like, 10, 10)
    capturing = True
    assert [x.data_ptr() for x in space.get(like, 10, 5)] == [x.data_ptr() for x in before]
    captured = space.get(like, 11, 11)
    again = space.get(like, 11, 11)
    capturing = False
    after = space.get(like, 11, 11)
    assert len({x.data_ptr() for x in (*before, *captured, *again, *after)}) == 8
    assert [x.data_ptr() for x in space.get(like, 11, 11)] == [x.data_ptr() for x in after]
