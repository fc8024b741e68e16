"""What is timed of a second turn is the same work but for the history."""

import sys

import pytest
import torch

from helpers import BENCHMARKS
from helpers.families import tiny_model

sys.path.insert(0, str(BENCHMARKS))
import turns


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_second_turn(engine):
    model = tiny_model("llama", 1)
    ids = torch.randint(3, 20, (1, 130), generator=torch.Generator().manual_seed(1))
    row = turns.measure(model, ids[:, :100], ids[:, 100:], engine, 2)
    assert row["same"] and row["tokens"] == 130 + turns.FIRST
    assert row["cached_tokens"] == 100 + turns.FIRST - 1
    assert row["again"] > 0 and row["cached"] > 0
