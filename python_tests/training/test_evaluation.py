"""Figures of a model: new trigrams, accuracy after noise."""

import pytest
import torch

from helpers.conversations import DATA, TEMPLATE, tiny_llama
from helpers.samples import NONE, byte_tokenizer
from msn_ext.training.data import Collate, encode
from msn_ext.training.evaluation import new_trigrams, noise_accuracy


def test_new_trigrams_are_counted_within_an_answer():
    assert new_trigrams([[1, 2, 3, 1, 2, 3]]) == 3 / 4
    assert new_trigrams([[1, 2, 3, 4], [1, 2, 3, 4]]) == 1
    assert new_trigrams([[5] * 102, [1, 2]]) == 1 / 100
    assert new_trigrams([]) == 0


def test_figures_are_those_of_the_noisy_text():
    """Behind one noise token: each segment put into its text, and the model asked."""
    from msn_ext import NoisyCollator

    model, tokenizer = tiny_llama().double().train(), byte_tokenizer(TEMPLATE)
    samples = [
        encode(
            tokenizer,
            [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["response"]},
            ],
            99,
        )
        for r in DATA[:9]
    ]
    found = noise_accuracy(model, samples, Collate(256), length=1, progress=False)
    assert model.training
    model.eval()
    loss = count = right = 0
    hits = {1: [], 10: []}
    noisy = NoisyCollator(
        Collate(256), length=1, segments=12, layout="branch", seed=0, config=model.config
    )
    noisy.annotate = True
    for sample in samples:
        ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
        said = model(input_ids=ids[None]).logits[0].float()
        live = labels[1:] != NONE
        loss += float(
            torch.nn.functional.cross_entropy(said[:-1][live], labels[1:][live], reduction="sum")
        )
        right += int((said[:-1].argmax(-1) == labels[1:])[live].sum())
        count += int(live.sum())
        batch = noisy([sample])
        for at in (batch["noise_depth"][0] == 1).nonzero()[:, 0].tolist():
            place = int(batch["position_ids"][0, at])
            if place + 1 == len(ids) or labels[place + 1] == NONE:
                continue
            text = ids.clone()
            text[place] = batch["input_ids"][0, at]
            order = model(input_ids=text[None]).logits[0, place].argsort(descending=True).tolist()
            for top in hits:
                hits[top].append(int(ids[place + 1]) in order[:top])
    assert found.tokens == count and found.loss == pytest.approx(loss / count, rel=1e-5)
    assert found.accuracy == pytest.approx(right / count)
    assert found.top1 == [pytest.approx(sum(hits[1]) / len(hits[1]))]
    assert found.top10 == [pytest.approx(sum(hits[10]) / len(hits[10]))]
