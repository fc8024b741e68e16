"""benchmarks/gated.py times a gated adapter against its base model."""

import pytest

from helpers import BENCHMARKS
from helpers.families import tiny_model
from helpers.noise import gated_tiny

pytest.importorskip("peft")


@pytest.fixture
def gated(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gated

    return gated


def test_both_say_the_same_and_are_counted(gated):
    models = {"base": tiny_model("llama", 3), "gated": gated_tiny("llama")}
    rows = [gated.race(models, [3, 1, 4, 1, 5], nodes, 12) for nodes in (8, None)]
    for row, nodes in zip(rows, (8, "auto")):
        assert row["nodes"] == nodes and row["tokens"] == 12
        for way in gated.WAYS:
            assert 1 <= row[way]["passes"] <= 12 and row[way]["seconds"] > 0
    head, *lines = gated.table(rows).splitlines()
    assert "gated: tokens/s" in head and [line.split()[0] for line in lines] == ["8", "auto"]


def test_another_text_is_an_error(gated):
    models = {"base": tiny_model("llama", 3), "gated": tiny_model("llama", 4)}
    with pytest.raises(SystemExit, match="changed the text"):
        gated.race(models, [3, 1, 4, 1, 5], 8, 12)
