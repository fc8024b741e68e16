"""The workspace that kernels take their memory from."""

import torch

from msn_ext import ops


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
