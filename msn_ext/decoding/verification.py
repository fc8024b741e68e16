"""The model's own next token after every node: arg-max, or one draw per node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessorList

from msn_ext import ops

from .candidates import candidates
from .processors import Texts, processed

Targets = Callable[[Tensor, Tensor, LogitsProcessorList, Texts], Tensor]
"""Gives the model's own next tokens [B, N] for logits [B, N, V] of nodes at positions [B, N]."""

_NODE = 1 << 32  # apart from the node numbers that drafting noise counts with


def _wrap(constant: int) -> int:
    """Return an unsigned 64-bit constant as the signed integer that torch holds."""
    return constant - (1 << 64) if constant >> 63 else constant


def _splitmix64(x: Tensor) -> Tensor:
    """Apply `ops.reference.splitmix64` to int64 tensors, which wrap like unsigned ones."""
    x = x + _wrap(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _wrap(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def counter_uniform(seed: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return uniform float64 numbers in [0, 1), each a function of (seed, row, position) alone,
    which are int64 tensors.
    """
    x = _splitmix64(_splitmix64(rows) ^ seed)
    x = _splitmix64(_splitmix64(x ^ positions) ^ _NODE)
    # 52 bits, so that the largest one times a sum is less than the sum in float64.
    return ((x >> 12) & ((1 << 52) - 1)).double() / float(1 << 52)


def counter_uniform_on_host(seed: int, positions: list[list[int]]) -> Tensor:
    """Return the same numbers, float64 [B, N], for rows of positions, where the device is the
    host: for a few numbers torch's small ops take longer than Python's.
    """
    mask = (1 << 64) - 1

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    numbers = []
    for b, row in enumerate(positions):
        of_row = mixed(mixed(b) ^ seed)
        numbers.append([(mixed(mixed(of_row ^ at) ^ _NODE) >> 12) / (1 << 52) for at in row])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def greedy(
    logits: Tensor, positions: Tensor, processors: LogitsProcessorList, texts: Texts
) -> Tensor:
    """Return the arg-max [B, N] of logits [B, N, V]."""
    targets = torch.zeros_like(positions).flatten()
    for places, scores in processed(logits, processors, texts):
        targets[places] = ops.top_guesses(scores[None])[0, :, 0].long() >> 4
    return targets.view(positions.shape)


class Sampler:
    """Lossless sampling: each node's target is a draw from its own processed distribution.

    The draw at a position inverts the distribution function at a number that depends on the seed,
    the row and the position only. So which token comes next is settled by the text and the seed;
    drafts decide where it is looked for, never what it is.

    Args:
        seed: less than 2**63.
        device: the model's.

    Attributes:
        may_wait: whether the host may wait for the device here; not in a step that is captured.
    """

    def __init__(self, seed: int, device: torch.device | str):
        # On the device, where a captured step finds the seed of another call.
        self._seed = torch.tensor(seed, device=device)
        self.may_wait = False

    def begin(self, other: Sampler) -> None:
        """Draw as ``other`` does."""
        self._seed.copy_(other._seed)

    def __call__(
        self, logits: Tensor, positions: Tensor, processors: LogitsProcessorList, texts: Texts
    ) -> Tensor:
        """Return targets [B, N] for logits [B, N, V] of nodes at ``positions`` [B, N]."""
        if self.may_wait and logits.device.type == "cpu":
            uniform = counter_uniform_on_host(int(self._seed), positions.tolist())
        else:
            rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
            uniform = counter_uniform(self._seed, rows, positions)
        uniform = uniform.flatten()[:, None]
        targets = torch.zeros_like(positions).flatten()
        for places, scores, tokens in candidates(logits, processors, texts, self.may_wait):
            drawn = _draw(scores, uniform[places])
            if tokens is not None:
                # One that is none of the vocabulary, which :mod:`.loop` refuses, for none.
                drawn = pad(tokens, (0, 1), value=logits.shape[-1]).gather(1, drawn)
            targets[places] = drawn.squeeze(-1)
        return targets.view(positions.shape)


def _draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Return the places [R, 1] in rows of scores [R, K] whose cumulative probability passes the
    numbers [R, 1] first: never one of probability 0. NaN passes nothing and gives K.
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
