"""benchmarks/same_bits.py finds no difference, and one where there is one."""

import json

import pytest
import torch

from helpers import BENCHMARKS


@pytest.mark.parametrize("wrong", [False, True])
def test_small_model(wrong, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import same_bits

    usual, threads = same_bits.digests, torch.get_num_threads()
    if wrong:
        monkeypatch.setattr(
            same_bits, "digests", lambda *its: [(f"{its[2]}{x}", y) for x, y in usual(*its)]
        )
    data, output = tmp_path / "q.jsonl", tmp_path / "bits.jsonl"
    questions = [dict(question_id=i, category="qa", turns=["so " * i]) for i in (1, 2, 3)]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = ["--model", folder, "--data", str(data), "--output", str(output)]
    options += ["--new-tokens", "8", "--budgets", "1,8", "--batches", "2", "--threads", "1"]
    try:
        assert same_bits.main([*options, "--dtypes", "float32"]) == wrong
    finally:
        torch.set_num_threads(threads)
    header, *rows = map(json.loads, output.read_text().splitlines())
    assert "same_bits.py" in header["command"]
    assert sum(row["texts"] for row in rows) == 18
    assert sum(row["different"] for row in rows) == 9 * wrong
    assert sum(row["compared"] == "text" for row in rows) == 6
    assert "different" in capsys.readouterr().out
