"""The op of noisy training."""

from collections.abc import Iterator

import torch

from msn_ext import ops

from .common import Case, Model


def noise_cases(model: Model, nodes: list[int], contexts: list[int], device: str) -> Iterator[Case]:
    """32 samples of 1024 tokens, half of them responses: 16 bytes a token read (ids, labels)."""
    count, tokens = 32, 1024
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary, (count, tokens), generator=generator).to(device)
    labels = ids.masked_fill(torch.arange(tokens, device=device) < tokens // 2, -100)
    rows = torch.arange(count, device=device)
    samples = torch.stack([rows, rows * 0, rows * 0 + tokens], 1)
    keep = torch.tensor([2], device=device)
    for segments in (1, 24):
        starts = torch.full((count, segments), -1, device=device)
        yield Case(
            f"tokens={count * tokens} segments={segments}",
            16 * count * tokens + 40 * count * segments,
            lambda: ops.draw_noise(ids, labels, samples, keep, starts, 0, 4, apart=segments == 1),
        )


CASES = {"draw_noise": noise_cases}
