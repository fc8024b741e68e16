"""The op of noisy training."""

from collections.abc import Iterator

import torch
from torch import Tensor

from msn_ext import _C

from .registration import expect_dims, op


def draw_noise(
    input_ids: Tensor,
    labels: Tensor,
    samples: Tensor,
    keep_token_ids: Tensor,
    starts: Tensor,
    seed: int,
    length: int,
    random: float = 0.0,
    vocabulary: int = 0,
    apart: bool = True,
) -> tuple[Tensor, Tensor]:
    """Draw where noise goes in every sample of a batch, and what it is (arXiv 2406.17404, Eq. 3 and
    4).

    A sample's response are its tokens with a label other than -100 (:data:`.NO_LABEL`), but for the
    sample's first. A segment starts anywhere in it with equal chance where ``length`` tokens of one
    response follow, or at the beginning of a shorter response, which it fills. The noise of a place
    is a token drawn with equal chance from the sample's clean tokens before it, or from the
    vocabulary. What is drawn depends on the seed, the sample's tokens and the number of the segment
    alone, not on the batch that the sample comes in.

    Args:
        input_ids, labels: int64 [B, T].
        samples: int64 [D, 3]: row, begin and end (one past the last token) of every sample.
        keep_token_ids: int64 [K], ascending: tokens that are neither replaced nor drawn.
        starts: int64 [D, S], 1 to 256 segments each: columns where segments shall start; -1: drawn.
        seed: any 64-bit integer.
        length: of a segment, 1 to 64.
        random: 0 to 1, the share of tokens that are drawn from the vocabulary.
        vocabulary: its size; needed where ``random`` is not 0.
        apart: segments of a sample do not overlap; else their starts differ.

    Returns:
        The starts int64 [D, S], -1 where there was no room left; the noise int64 [D, S, L], -1
        after the end of a segment that is shorter.

    Raises:
        ValueError: also where a given start is not in the sample's response (on CUDA it counts as
            no segment).
    """
    return _draw_noise(
        input_ids, labels, samples, keep_token_ids, starts, seed, length, random, vocabulary, apart
    )


@op(
    "draw_noise(Tensor input_ids, Tensor labels, Tensor samples, Tensor keep_token_ids, Tensor"
    " starts, int seed, int length, float random, int vocabulary, bool apart) -> (Tensor, Tensor)"
)
def _draw_noise(
    input_ids: Tensor,
    labels: Tensor,
    samples: Tensor,
    keep_token_ids: Tensor,
    starts: Tensor,
    seed: int,
    length: int,
    random: float,
    vocabulary: int,
    apart: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    expect_dims("starts", starts, "[D, S]")
    drawn = torch.empty_like(starts, memory_format=torch.contiguous_format)
    noise = starts.new_empty(*starts.shape, max(length, 0))
    yield drawn, noise
    drawn.copy_(starts)
    ids, labels = input_ids.contiguous(), labels.contiguous()
    samples, keep = samples.contiguous(), keep_token_ids.contiguous()
    _C.draw_noise(ids, labels, samples, keep, seed, random, vocabulary, apart, drawn, noise)
