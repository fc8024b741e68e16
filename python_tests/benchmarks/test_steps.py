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
    ways = ["1 one by one", "16 one by one"]
    assert [(row["batch"], row["round"], row["way"]) for row in rows] == [
        (batch, turn, way)
        for group in (ways, ["transformers eager"])
        for batch in (1, 2)
        for turn in range(5)
        for way in group
    ], "ours first, in turns"
    for row in rows:
        # A model as small lies in a cache, and takes less than memory would.
        assert 0 < row["limit"] < 10 and 0 < row["seconds"] < 10
        assert row["way"] in run.stdout


def test_stretches_that_are_there_are_not_run_again(tmp_path):
    """The last one was cut off; an engine that is none is said, and costs the others nothing."""
    file = tmp_path / "steps.jsonl"
    options = "--shape tiny --context 20 --nodes 1 --who ours --engine torch,steam".split()
    command = [sys.executable, str(BENCHMARKS / "steps.py"), *options, "--output", str(file)]
    header = {"command": "steps.py"}
    done = [
        dict(batch=1, context=20, way="1 torch one by one", round=turn, seconds=9.0, limit=1.0)
        for turn in range(4)
    ]
    lines = "".join(json.dumps(line) + "\n" for line in (header, *done))
    file.write_text(lines + '{"batch": 1, "con')
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 1, run.stdout + run.stderr
    text = file.read_text()
    assert text.startswith(lines)
    failed, last = map(json.loads, text.removeprefix(lines).splitlines())
    assert failed["way"] == "1 steam one by one" and "engine is 'steam'" in failed["error"]
    assert last["way"] == "1 torch one by one" and last["round"] == 4 and last["seconds"] < 9
    assert "steam" in run.stdout and "9000.000" in run.stdout, "the median of five"
