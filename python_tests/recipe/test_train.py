"""The order of samples in training."""

from msn_ext.recipe.train import ByLength


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
