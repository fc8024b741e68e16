"""Random cases of the noise of training."""

import random

import torch
from fuzz_cases import FAR, Memory

from msn_ext import _C
from msn_ext.ops import reference


def fuzz_draw_noise(rng: random.Random, nodes: int) -> None:
    batch, columns = (
        rng.choice([1, 1, 2]),
        rng.choice([1, 2, 5, 40, 300, 700]),
    )  # a block has 256 threads
    vocabulary = rng.choice([1, 2, 9, 50000])
    tokens = torch.randint(0, vocabulary, (batch, columns))
    if rng.random() < 0.3:
        tokens = tokens + rng.choice(FAR)
    changes = torch.rand(batch, columns) < rng.choice([0.01, 0.2, 0.5])
    labels = torch.where(changes.cumsum(1) % 2 == 0, tokens, -100)
    count, segments, length = (
        rng.choice([0, 1, 3]),
        rng.choice([1, 2, 24, 256]),
        rng.choice([1, 4, 64]),
    )
    ends = torch.randint(0, columns + 1, (count, 2)).sort(1).values
    samples = torch.cat([torch.randint(0, batch, (count, 1)), ends], 1)
    starts = torch.full((count, segments), -1)
    keep = torch.tensor(
        sorted(rng.sample(range(vocabulary), min(vocabulary, rng.choice([0, 1, 5])))),
        dtype=torch.int64,
    )
    options = rng.choice([*FAR, 0, 7]), rng.choice([0.0, 0.4, 1.0]), vocabulary, rng.random() < 0.5

    def specified(samples, starts):
        seed, share, size, apart = options
        return reference.draw_noise(
            tokens, labels, samples, keep, starts, seed, length, share, size, apart
        )

    if rng.random() < 0.4:  # given starts, some of which are none
        starts = torch.where(torch.rand(starts.shape) < 0.5, specified(samples, starts)[0], -1)
    want = specified(samples, starts)
    if rng.random() < 0.4 and count:  # a sample outside the batch has nothing
        at = rng.randrange(count)
        samples[at, 0] = rng.choice([*FAR, -1, batch])
        want[0][at], want[1][at] = -1, -1
    if rng.random() < 0.3 and count and segments == 1:
        starts[at := rng.randrange(count)] = rng.choice([2**63 - 1, columns])
        want[0][at], want[1][at] = -1, -1
    memory = Memory(rng)
    inputs = map(memory.place, (tokens, labels, samples, keep))
    outputs = (
        memory.place(starts, want=want[0]),
        memory.place(torch.full_like(want[1], 77), want=want[1]),
    )
    _C.draw_noise(*inputs, *options, *outputs)
    memory.check()
