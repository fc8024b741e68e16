"""benchmarks/tails.py looks up what decoding computes."""

import random

import pytest
import torch

from helpers import BENCHMARKS
from helpers.families import VOCAB, tiny_model
from helpers.noise import gated_tiny
from msn_ext.decoding import BestFirst
from msn_ext.decoding.drafters import factors, sources

pytest.importorskip("peft")
MASK = 5


@pytest.fixture
def tails(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tails

    return tails


def test_a_tail_that_is_looked_up_is_worth_what_a_computed_one_is(tails):
    """Accept lengths of trees of 24 nodes, of which one is a tail."""
    bare, model = tiny_model("llama", 3), gated_tiny("llama")
    model.peft_config["default"].auto_mapping["msn_ext"]["content"] = MASK
    shape, differs = tails.Shape.of(f"24:{sources.tails_of(24)}x1"), False
    for seed in range(6):
        rng = random.Random(seed)
        prompt = [rng.randrange(3, VOCAB) for _ in range(9)]
        text, without = tails.decode(bare, prompt, BestFirst(24), 50)
        said = tails.said_by_tails(model, text, len(prompt), MASK)
        looked_up = tails.TailDrafter(shape, said, factors.load_of_tails())
        found = [
            tails.decode(its, prompt, drafter, 50)
            for its, drafter in ((bare, looked_up), (model, BestFirst(24)))
        ]
        assert found[0] == found[1] and found[0][0] == text
        differs |= found[0][1] != without
    assert differs, "tails change what is drafted"


def test_shapes_are_named(tails):
    for name, drafted in (("8", 8), ("16:2x2", 12), ("64:4x2:free", 64)):
        shape = tails.Shape.of(name)
        assert shape.name == name and shape.drafted == drafted


def test_a_better_adapter_has_the_shares_that_were_asked_for(tails):
    rng = random.Random(0)
    text, prompt = [rng.randrange(1000) for _ in range(3000)], 10
    said = torch.randint(1000, (len(text), tails.LONGEST, 8), dtype=torch.int32) * 16 + 7
    better = tails.better(said, text, prompt, 0.4, 0.7, seed=1)
    places, first, among = tails.accuracy(better, text, prompt).double()
    assert float(first[0] / places[0]) == pytest.approx(0.4, abs=0.03)
    assert float(among[0] / places[0]) == pytest.approx(0.7, abs=0.03)
