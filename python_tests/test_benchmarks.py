"""The benchmarks run and write what they promise."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_kernels_quick_run_writes_complete_json(tmp_path):
    file = tmp_path / "kernels.json"
    options = ["--quick", "--device", "cpu", "--ops", "verify_tree", "--json", str(file)]
    command = [str(BENCHMARKS / "kernels.py"), *options]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(file.read_text())
    about, results = report["environment"], report["results"]
    assert " ".join(command) in about["command"]
    assert about["msn_ext"]["version"] and about["torch"] and about["device"] and about["commit"]
    assert about["copy_bytes_per_second"] > 1e8
    assert [row["size"] for row in results] == ["N=1", "N=16", "N=69"]
    for row in results:
        lower, upper = row["seconds_quartiles"]
        assert row["op"] == "verify_tree" and 0 < lower <= row["seconds"] <= upper
        assert row["bytes"] == 36 * int(row["size"].removeprefix("N=")) + 16
        assert row["eager_ratio"] == row["eager_seconds"] / row["seconds"]
        assert 0 < row["share_of_copy"] < 1
        assert row["size"] in run.stdout
