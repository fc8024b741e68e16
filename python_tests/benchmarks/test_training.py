"""benchmarks/training.py compares the ways to train."""

import json
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from helpers import BENCHMARKS
from helpers.cases import one_thread

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")


def test_the_ways_to_train_are_compared(folder, data, tmp_path, monkeypatch, capsys):
    """benchmarks/training.py: a line an experiment, done ones are not run again, the plots are
    pictures.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training

    output, names = tmp_path / "out", "base,branch-4,replace-4-ppl,sft-compute,gated"
    options = [
        "--model",
        folder,
        "--data",
        data,
        "--samples",
        "30",
        "--held-out",
        "4",
        "--max-new-tokens",
        "12",
        "--output",
        str(output),
    ]

    command = [sys.executable, str(BENCHMARKS / "training.py"), *options]
    first = subprocess.run(
        [*command, "--only", "base,branch-4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert first.returncode == 0, first.stderr[-2000:]
    with one_thread():
        assert training.main([*options, "--only", names]) == 0
    said = capsys.readouterr().out
    assert "== base" in first.stdout and "== base" not in said and "== sft-compute" in said
    header, *rows = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert header["command"].startswith("python benchmarks/training.py") and [
        row["experiment"] for row in rows
    ] == names.split(",")
    by_name = {row["experiment"]: row for row in rows}
    assert by_name["sft-compute"]["epochs"] > 1.5 and by_name["branch-4"]["epochs"] == 1
    assert all(len(row["top1"]) == 8 and row["MAT"]["paper"] >= 1 for row in rows)
    losses = [row["loss"] for row in rows]
    assert losses.pop() == pytest.approx(by_name["base"]["loss"], rel=1e-5)  # gated, another sum
    assert len(set(losses)) == 4
    assert by_name["gated"]["MAT"]["paper"] == by_name["base"]["MAT"]["paper"]
    for name in ("accuracy", "chains", "losses"):
        ElementTree.parse(output / f"{name}.svg")
