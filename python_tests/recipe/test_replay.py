"""Accept lengths on a text that is known."""

import pytest
import torch

from helpers import BENCHMARKS
from helpers.families import VOCAB, tiny_model
from msn_ext import generate
from msn_ext.decoding import BestFirst
from msn_ext.recipe.replay import Text, accept_lengths, mean_accept_length, passes, texts_of

DRAFTS = {"paper": lambda: "paper", "auto@64": lambda: BestFirst(64), "none": lambda: "none"}
# With windows, with logits that are capped, with a mask alone, with experts.
FAMILIES = ["llama", "gemma3", "mistral-window", "gemma2", "gptj", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_its_own_text_takes_the_passes_of_decoding(family):
    model, ids = tiny_model(family, 3), torch.tensor([[5, 9, 3, 7, 2]])
    gained = []
    for make in DRAFTS.values():
        out = generate(
            model,
            ids,
            attention_mask=torch.ones_like(ids),
            draft=make(),
            do_sample=False,
            max_new_tokens=60,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        found = accept_lengths(model, Text(out.sequences[0].tolist(), 5), make())
        assert found == out.accept_lengths[0].tolist()
        gained.append(max(found))
    assert gained[0] > 1 and gained[1] > 2 and gained[2] == 1


def test_a_strange_text_takes_the_passes_of_another_replay(monkeypatch):
    """benchmarks/replay.py has its own loop, and the model's answers from passes of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from replay import make_drafter, replay_all

    model = tiny_model("llama", 3)
    scratch = torch.full((256, VOCAB), -torch.inf)
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        prompt = torch.randint(3, VOCAB, (1, 6), generator=generator)
        own = model.generate(prompt, max_new_tokens=30, eos_token_id=None, do_sample=False)
        text = own[0].tolist()
        for at in range(9, len(text), 7):  # which the model would not say
            text[at] = 3 + (text[at] + seed) % (VOCAB - 3)
        text += text[6:20]
        drafts = ["paper", "auto@64", "auto@8"]
        with torch.no_grad():
            drafters = {name: make_drafter(name) for name in drafts}
            want = replay_all(drafters, model, text, 6, scratch)
        for name, make in zip(drafts, (*list(DRAFTS.values())[:2], lambda: BestFirst(8))):
            assert accept_lengths(model, Text(text, 6), make()) == want[name], name


def test_text_goes_on_after_an_end_and_passes_are_summed():
    model = tiny_model("llama", 3)
    texts = [Text([5, 9, 3, 2, 2, 7, 2], 2), Text([4, 4, 4], 1)]
    found = passes(model, texts, DRAFTS, progress=False)
    assert found["none"] == [5, 2] and mean_accept_length(texts, found["none"]) == 1
    assert sum(found["auto@64"]) <= 7


def test_texts_are_first_answers():
    samples = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, -100, 6]},
        {"input_ids": [7, 8, 9], "labels": [7, 8, 9]},
        {"input_ids": [7, 8], "labels": [-100, -100]},
    ]
    assert texts_of(samples) == [Text([1, 2, 3, 4], 2), Text([7, 8, 9], 1)]
    assert texts_of(samples, 1) == [Text([1, 2, 3], 2), Text([7, 8], 1)]
