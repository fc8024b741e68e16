"""Figures before and after training, and what they say."""

import copy

import pytest
import torch

from helpers.conversations import TEMPLATE, tiny_llama
from helpers.samples import byte_tokenizer
from msn_ext.recipe.metrics import DRAFTS, damage, figures, gain, verdict
from msn_ext.recipe.samples import samples_of

ALL = {"loss": 1.0, "accuracy": 0.9, "new": 0.8}


def conversation(seed: int) -> list[dict]:
    letters = torch.randint(97, 123, (40,), generator=torch.Generator().manual_seed(seed))
    question, answer = f"{seed}?", "".join(map(chr, letters.tolist()))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_that_repeats_itself_gains_nothing(dtype):
    """One that says the same token whatever comes would be accepted 8 tokens at a time."""
    tokenizer, model = byte_tokenizer(TEMPLATE), tiny_llama().eval()
    asked = [conversation(seed) for seed in range(6)]
    samples = samples_of(tokenizer, asked, 200)
    broken = copy.deepcopy(model)
    torch.nn.init.zeros_(broken.model.norm.weight)
    found = [
        figures(each, tokenizer, samples, asked, 2, max_new_tokens=40, dtype=dtype, progress=False)
        for each in (model, broken)
    ]
    before, after = found
    assert set(after["MAT"]) == set(DRAFTS) and before["passes"].keys() == after["passes"].keys()
    tokens = sum(41 for _ in asked)  # and the end of text
    for name, mat in after["MAT"].items():
        assert len(after["passes"][name]) == 6
        assert mat == tokens / sum(after["passes"][name]) < 1.4, name
    assert after["new"] < 0.1 < before["new"]
    assert any("repeats itself" in message for message in damage(before, after))
    assert verdict(before, after).startswith("did not pay: ")
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"loss": 1.06}, "next-token loss rose from 1.0000 to 1.0600 (more than 5%)"),
        ({"accuracy": 0.87}, "the next token is right 87.0% of the time, before 90.0%"),
        ({"new": 0.7}, "own answers' trigrams 70% are new, before 80%"),
    ],
)
def test_each_figure_can_say_damage(changed, said):
    (message,) = damage(ALL, ALL | changed)
    assert said in message


def test_what_is_no_damage():
    assert damage(ALL, {"loss": 1.04, "accuracy": 0.885, "new": 0.73}) == []
    assert damage(ALL, {"loss": 0.5, "accuracy": 0.95, "new": 0.9}) == []
    assert len(damage(ALL, {"loss": 2.0, "accuracy": 0.1, "new": 0.1})) == 3


def test_what_paid_is_said_with_its_chance():
    before = {"passes": {"auto@64": [10, 20, 30, 40]}, "MAT": {"auto@64": 2.0}}
    better = {"passes": {"auto@64": [8, 16, 24, 32]}, "MAT": {"auto@64": 2.5}}
    assert verdict(before, better) == (
        "paid: 2.00 to 2.50 tokens a pass (auto@64) on the same texts, × 1.25 [1.25–1.25]"
    )
    one = {"passes": {"auto@64": [9, 20, 30, 40]}, "MAT": {"auto@64": 2.02}}
    assert verdict(before, one).startswith("did not pay: 2.00 to 2.02 tokens a pass")
    ratio, low, high = gain([10, 20, 30, 40], [9, 22, 28, 36])
    assert ratio == 100 / 95 and low < ratio < high
