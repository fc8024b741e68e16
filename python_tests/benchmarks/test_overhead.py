"""overhead.py: a step of the real loop over a recorded forward pass, part by part."""

import json

import pytest
import torch

from helpers import BENCHMARKS
from helpers.families import VOCAB, tiny_model


class Tokenizer:
    @staticmethod
    def apply_chat_template(*_, **__):
        return {"input_ids": torch.arange(7)[None] % VOCAB}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return what runs the script and returns its rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overhead

    model = tiny_model("llama", 0)
    monkeypatch.setattr(overhead, "load_model", lambda _: (model, Tokenizer()))
    monkeypatch.setattr(overhead, "WEIGHTS", 1 << 12)

    def rows(*options):
        overhead.main(["--tokens", "48", "--json", str(tmp_path / "out.jsonl"), *options])
        lines = (tmp_path / "out.jsonl").read_text().splitlines()[1:]
        found = [json.loads(line) for line in lines]
        assert all(row["steps"] > 0 and row["accept_length"] >= 1 for row in found)
        return found

    return rows


def test_parts_of_a_step_are_its_total(run):
    rows = run()
    assert [row["draft"] for row in rows] == ["8", "auto"]
    for row in rows:
        assert all(row[part]["median"] > 0 for part in ("total", "propose", "verify", "advance"))
        assert row["propose"]["median"] < row["total"]["p90"]


def test_native_steps(run):
    rows = run("--engine", "native", "--draft", "none,4")
    assert [row["draft"] for row in rows] == ["none", "4"]
    assert rows[0]["accept_length"] == 1
    for row in rows:
        assert 0 < row["total"]["median"] < 1e6 and 0 < row["pass"]["median"] < 1e6
