"""The order of samples in training, and its last step."""

import pytest
import torch

from helpers.conversations import TEMPLATE, tiny_llama
from helpers.samples import byte_tokenizer, samples
from msn_ext.recipe.settings import NoiseSettings, TrainSettings
from msn_ext.recipe.train import ByLength, train


def test_batches_are_of_like_lengths_and_the_same_for_a_resumed_run():
    lengths = [(7 * i) % 50 for i in range(200)]

    def batches(epoch: int) -> list[list[int]]:
        sampler = ByLength(lengths, 4, 3)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(200)) and len(sampler) == 200
        return [[lengths[i] for i in order[at : at + 4]] for at in range(0, 200, 4)]

    assert batches(1) == batches(1) != batches(0)
    assert sum(4 * max(batch) - sum(batch) for batch in batches(0)) < 0.1 * sum(lengths)


@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_that_has_taken_its_last_step_takes_no_further_one(tmp_path, rank):
    """Killed between the last checkpoint and the figures, amid an epoch."""
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    rows = [{name: x.tolist() for name, x in row.items()} for row in samples(16, 200)]
    settings = TrainSettings(lora_rank=rank, max_steps=2, save_steps=1, batch_size=4)

    def run():
        noise = NoiseSettings(segments=2)
        return train(
            tiny_llama(), byte_tokenizer(TEMPLATE), rows, tmp_path, noise, settings, progress=False
        )

    model, log = run()
    again, same = run()
    assert [x for x in log if "loss" in x] == [x for x in same if "loss" in x] and len(log) > 1
    for x, y in zip(model.parameters(), again.parameters()):
        assert torch.equal(x, y)
    assert not (tmp_path / "checkpoint-3").exists()
