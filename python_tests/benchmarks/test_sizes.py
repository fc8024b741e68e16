"""benchmarks/sizes.py counts what "auto" gains by given step times."""

import pytest

from helpers import BENCHMARKS
from helpers.families import tiny_model


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sizes

    return sizes


def test_every_run_gives_the_same_and_sizes_are_those_asked_for(sizes):
    model = tiny_model("llama", 3)
    prompt = [3, 1, 4, 1, 5]
    ways = sizes.AUTO, sizes.WITHOUT, "4"
    runs = [
        [sizes.measured(model, prompt, "rows nearly free", way, 24) for way in ways]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    auto, without, four = runs[0]
    assert all(row["tokens"] == 24 for row in runs[0])
    assert four["nodes"] == 4 * four["passes"]
    # Between 1 and 8 nodes the curve is a line.
    assert four["ms"] == pytest.approx(four["passes"] * (1 + 0.02 * 3 / 7))
    assert auto["nodes"] / auto["passes"] > without["nodes"] / without["passes"]
    head, *lines = sizes.table(runs[0]).splitlines()
    assert "tokens/s" in head and len(lines) == len(ways)
