"""benchmarks/screen.py times a screened head against all logits."""

import pytest

from helpers import BENCHMARKS
from helpers.families import tiny_model
from helpers.layers import needs_screens


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import screen

    return screen


def test_both_say_the_same_and_are_timed(screen):
    models = {way: tiny_model("llama", 3) for way in screen.WAYS}
    rows = [screen.race(models, [3, 1, 4, 1, 5], nodes, 12) for nodes in (1, 8)]
    assert all(row["tokens"] == 12 and min(row["all"], row["screened"]) > 0 for row in rows)
    head, *lines = screen.table(rows).splitlines()
    assert "screened, ms/token" in head and [line.split()[0] for line in lines] == ["1", "8"]


def test_another_text_is_an_error(screen):
    models = {"all": tiny_model("llama", 3), "screened": tiny_model("llama", 4)}
    with pytest.raises(SystemExit, match="texts differ"):
        screen.race(models, [3, 1, 4, 1, 5], 8, 12)


@needs_screens
def test_one_has_a_screen(screen, monkeypatch):
    def load():
        return tiny_model("llama", 3).float()

    with pytest.raises(SystemExit, match="not screened"):
        screen.packed_both_ways(load)
    monkeypatch.setattr(screen.packed, "SCREENED", 0)
    models = screen.packed_both_ways(load)
    assert [screen.native_plan_for(m, "native").screen is None for m in models.values()] == [
        True,
        False,
    ]
