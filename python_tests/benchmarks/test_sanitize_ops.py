"""benchmarks/sanitize_ops.py finds the differences that there are, and no others."""

import subprocess
import sys

import pytest
import torch

from helpers import BENCHMARKS


def test_ops_do_not_differ_from_themselves():
    """Ops that change their arguments among them."""
    command = [sys.executable, str(BENCHMARKS / "sanitize_ops.py"), "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    for op in ("advance_text", "place_tree", "commit_kv", "draft_tree", "tree_attention"):
        assert f"{op} N=256" in run.stdout


def result_differs(x, calls):
    return x + len(calls)


def argument_differs(x, calls):
    x += len(calls)
    return x * 0


def result_is_nan(x, calls):
    return x * (1 if len(calls) > 1 else torch.nan)  # there; then here


@pytest.mark.parametrize("op", [result_differs, argument_differs, result_is_nan])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_a_difference_is_found(op, tolerance, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sanitize_ops import Differs, compare

    calls = []

    def called(x):
        calls.append(x)
        return op(x, calls)

    with pytest.raises(Differs, match="it"):
        compare("it", "cpu", called, torch.zeros(3), tolerance=tolerance)
