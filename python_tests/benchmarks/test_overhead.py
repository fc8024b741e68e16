"""overhead.py: a step of the real loop over a recorded forward pass, part by part."""

import json

import torch

from helpers import BENCHMARKS
from helpers.families import VOCAB, tiny_model


class Tokenizer:
    @staticmethod
    def apply_chat_template(*_, **__):
        return {"input_ids": torch.arange(7)[None] % VOCAB}


def test_parts_of_a_step_are_its_total(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overhead

    model = tiny_model("llama", 0)
    monkeypatch.setattr(overhead, "load_model", lambda _: (model, Tokenizer()))
    monkeypatch.setattr(overhead, "WEIGHTS", 1 << 12)
    overhead.main(["--tokens", "48", "--json", str(tmp_path / "out.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["draft"] for row in rows if "draft" in row] == ["8", "auto"]
    for row in rows[1:]:
        assert row["steps"] > 0 and row["accept_length"] >= 1
        assert all(row[part]["median"] > 0 for part in ("total", "propose", "verify", "advance"))
        assert row["propose"]["median"] < row["total"]["p90"]
