"""benchmarks/sampled.py times draws from candidates against draws from the vocabulary."""

import pytest

from helpers import BENCHMARKS
from helpers.families import tiny_model

SETTINGS = dict(
    temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=12, eos_token_id=None, pad_token_id=0
)


@pytest.fixture
def sampled(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sampled

    return sampled


def test_ours_say_the_same_and_all_are_timed(sampled, monkeypatch):
    asked = []
    largest = sampled.candidates.largest
    monkeypatch.setattr(
        sampled.candidates, "largest", lambda *args: (asked.append(1), largest(*args))[1]
    )
    model = tiny_model("llama", 3)
    rows = sampled.race(
        model, [3, 1, 4, 1, 5], list(sampled.WAYS), 1, SETTINGS | {"pad_token_id": 0}
    )
    assert [row["way"] for row in rows] == list(sampled.WAYS)
    assert all(row["tokens"] == 12 and row["seconds"] > 0 for row in rows)
    count = len(asked)
    assert count
    sampled.answer(model, [3, 1, 4], "auto, vocabulary", 1, SETTINGS)
    assert len(asked) == count, "the whole vocabulary is drawn from"
    head, *lines = sampled.table(rows).splitlines()
    assert head.split() == ["tokens/s"] and len(lines) == len(sampled.WAYS)


def test_another_text_is_an_error(sampled, monkeypatch):
    texts = iter([[1], [1], [2], [1]])
    monkeypatch.setattr(sampled, "answer", lambda *_: next(texts))
    with pytest.raises(SystemExit, match="texts differ"):
        sampled.race(None, [3], ["none", "auto", "none, vocabulary"], 1, {})
