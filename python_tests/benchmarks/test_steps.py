"""benchmarks/steps.py runs and writes what it promises."""

import json
import subprocess
import sys

from helpers import BENCHMARKS


def test_steps_are_timed_next_to_transformers(tmp_path):
    file = tmp_path / "steps.jsonl"
    options = [
        "--shape",
        "tiny",
        "--context",
        "20",
        "--nodes",
        "1,16",
        "--batch",
        "1,2",
        "--output",
        str(file),
    ]
    command = [sys.executable, str(BENCHMARKS / "steps.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    header, *rows = map(json.loads, file.read_text().splitlines())
    assert "steps.py" in header["command"] and header["commit"]
    ways = ["1 one by one", "16 one by one", "transformers eager"]
    assert [(row["batch"], row["way"]) for row in rows] == [
        (batch, way) for batch in (1, 2) for way in ways
    ]
    for row in rows:
        assert (
            min(row["all"]) <= row["seconds"] <= max(row["all"])
            and 0 < row["limit"] < row["seconds"]
        )
        assert row["way"] in run.stdout


def test_engines_side_by_side(tmp_path):
    options = ["--shape", "tiny", "--context", "20", "--nodes", "4", "--engine", "torch,native"]
    command = [sys.executable, str(BENCHMARKS / "steps.py"), *options, "--no-transformers"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 torch one by one" in run.stdout and "4 native one by one" in run.stdout
