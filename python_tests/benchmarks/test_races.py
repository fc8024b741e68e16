"""benchmarks/gated.py and habits.py decode by turns with an adapter, or habits, and without."""

import json

import pytest
import torch

from helpers import BENCHMARKS
from helpers.families import tiny_model
from msn_ext import BestFirst, generate
from msn_ext.decoding.drafters.habits import HabitRecorder

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


def check(races, ways: dict) -> None:
    rows = [races.race(ways, PROMPT, nodes, 12) for nodes in races.sizes_of("8,auto")]
    for row, nodes in zip(rows, (8, "auto")):
        assert row["nodes"] == nodes and row["tokens"] == 12
        for way in ways:
            assert 1 <= row[way]["passes"] <= 12 and row[way]["seconds"] > 0
    head, *lines = races.table(rows, list(ways)).splitlines()
    assert all(f"{way}: tokens/s" in head for way in ways)
    assert [line.split()[0] for line in lines] == ["8", "auto"]
    assert all(line.count("×") == 1 for line in lines)


def test_an_adapter_is_raced(script):
    pytest.importorskip("peft")
    from helpers.noise import gated_tiny

    models = {"base": tiny_model("llama", 3), "gated": gated_tiny("llama")}
    check(script("races"), {name: (model, BestFirst) for name, model in models.items()})


def test_habits_are_raced_and_save_passes(script):
    model = tiny_model("llama", 3)
    recorder = HabitRecorder(BestFirst(1))
    options = dict(do_sample=False, max_new_tokens=20, attention_mask=torch.ones(1, 5))
    generate(model, torch.tensor([PROMPT]), draft=recorder, **options)
    habits = recorder.habits(model.config.vocab_size, (1, 1, 1))
    races, ways = script("races"), script("habits").ways_of(model, habits)
    check(races, ways)
    row = races.race(ways, PROMPT, 8, 20)
    assert row["habits"]["passes"] < row["without"]["passes"]


def test_a_file_is_summed_up(script, tmp_path):
    """By turns, of which the table may leave out the first, and by categories."""
    passes = [("qa", 8, 4), ("rag", 6, 6), ("qa", 6, 4)]
    rows = [
        dict(nodes=8, tokens=12, category=name)
        | {w: dict(passes=n, seconds=1.0) for w, n in (("a", a), ("b", b))}
        for name, a, b in passes
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"command": "it"}, *rows])))
    summary = script("races").summary
    _head, whole, _, _named, first, second = summary(file, ["a", "b"], 0).splitlines()
    assert whole.split()[:5] == ["8", "12.0", "1.80", "12.0", "2.57"] and "× 1.429 [" in whole
    assert "× 1.200 [" in summary(file, ["a", "b"], 1).splitlines()[1]
    assert first.split()[2:] == ["nan", "nan", "nan", "1.71", "nan", "2.00", "1.80"]
    assert second.split()[2:] == ["nan", "nan", "nan", "3.00", "nan", "2.00", "2.57"]


def test_another_text_is_an_error(script):
    models = {"base": tiny_model("llama", 3), "gated": tiny_model("llama", 4)}
    ways = {name: (model, BestFirst) for name, model in models.items()}
    with pytest.raises(SystemExit, match="base, gated differ"):
        script("races").race(ways, PROMPT, 8, 12)
