"""benchmarks/ops.py runs and writes what it promises."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from helpers import BENCHMARKS

pytest.importorskip("matplotlib")  # for the picture


def test_a_quick_run_writes_a_complete_line_per_case(tmp_path):
    file = tmp_path / "ops.jsonl"
    options = ["--quick", "--device", "cpu", "--ops", "verify_tree", "--output", str(file)]
    command = [str(BENCHMARKS / "ops.py"), *options]
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    about, *results = map(json.loads, file.read_text().splitlines())
    assert " ".join(command) in about["command"]
    assert about["msn_ext"]["version"] and about["torch"] and about["device"] and about["commit"]
    assert about["copy_bytes_per_second"] > 1e8 and 0 < about["least_seconds"] < 1e-2
    assert [row["size"] for row in results] == ["N=1", "N=16", "N=69"]
    for row in results:
        lower, upper = row["seconds_quartiles"]
        assert row["op"] == "verify_tree" and 0 < lower <= row["seconds"] <= upper
        assert row["bytes"] == 36 * int(row["size"].removeprefix("N=")) + 16
        assert not row["captured"] and not row["errors"], "on a CPU"
        assert row["eager_ratio"] == row["eager_seconds"] / row["seconds"]
        assert 0 < row["share_of_copy"] < 1
        assert row["size"] in run.stdout
    svg = "{http://www.w3.org/2000/svg}"
    groups = ElementTree.parse(file.with_suffix(".svg")).iter(f"{svg}g")
    dots = {
        group.get("id").removeprefix("times: "): len(list(group.iter(f"{svg}use")))
        for group in groups
        if group.get("id", "").startswith("times: ")
    }
    # A copy so short that no call could be as quick is left out.
    copies = sum(row["bytes"] / about["copy_bytes_per_second"] > 1e-6 for row in results)
    assert dots == {"msn_ext": len(results), "eager PyTorch": len(results)} | (
        {"a copy": copies} if copies else {}
    )
