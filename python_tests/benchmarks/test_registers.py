"""benchmarks/registers.py: no kernel spills."""

import os
import shutil
import subprocess
import sys

import pytest

from helpers import BENCHMARKS


@pytest.mark.skipif(shutil.which(os.environ.get("CUDACXX", "nvcc")) is None, reason="no nvcc")
def test_no_kernel_spills(tmp_path):
    """By ptxas's report for one architecture; the committed table has three, and every kernel."""
    file = tmp_path / "registers.txt"
    command = [
        sys.executable,
        str(BENCHMARKS / "registers.py"),
        "--architectures",
        "90",
        "--output",
        str(file),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = [line.rsplit(maxsplit=3)[0] for line in file.read_text().splitlines()[1:-1]]
    committed = (BENCHMARKS / "results" / "registers.txt").read_text().splitlines()[1:-1]
    assert sorted(kernels) == sorted(line.rsplit(maxsplit=5)[0] for line in committed)
