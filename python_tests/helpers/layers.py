"""Shared by the tests of a layer's stages: instruction sets, kinds of weights, bounds of error."""

import numpy as np
import pytest
import torch

from helpers.cases import seeded
from msn_ext import _C

WEIGHTS = ["float64", "float32", "bfloat16", "float16", "int8"]
CACHES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALL_ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def runs_here(isa: str) -> bool:
    try:
        return bool(_C.layer_isa(isa))
    except ValueError:
        return False


needs_codes = pytest.mark.skipif(not runs_here("avx512_bf16"), reason="no codes here")
needs_screens = pytest.mark.skipif(not runs_here("avx512_bf16"), reason="no screens here")
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(not runs_here(isa), reason=f"no {isa} here"))
    for isa in ALL_ISAS
]


def number(weights: str | torch.dtype) -> torch.dtype:
    """The dtype of sums and rows."""
    return torch.float64 if weights in ("float64", torch.float64) else torch.float32


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def rounds_inputs(weights: str, isa: str) -> bool:
    return weights == "bfloat16" and _C.layer_isa(isa)["rounds_to_bfloat16"]


def sum_bound(x: np.ndarray, w: np.ndarray, weights: str, isa: str, norm: str) -> np.ndarray:
    """How far a sum over inputs in floats may be from the exact one, [rows, outputs].

    A chain of k additions is off by k roundings of the sum of magnitudes: 256 in a block, then the
    blocks. A norm's sum of squares, of which every input has a share, is as long a chain. Where
    inputs are rounded to bfloat16 after a norm, any of them may be rounded the other way; to int16,
    also without one, since the quotient is a float's.
    """
    inputs = x.shape[1]
    unit = 2.0**-53 if weights == "float64" else 2.0**-24
    chain = min(inputs, 256) + inputs / 32 + 4
    if norm != "none":
        chain += inputs + 16
    bound = chain * unit * (np.abs(x) @ np.abs(w).T)
    if norm != "none" and rounds_inputs(weights, isa):
        bound += 2.0**-8 * np.abs(x) @ np.abs(w).T
    if weights == "int8":
        blocks = np.pad(np.abs(x), ((0, 0), (0, -inputs % 64))).reshape(len(x), -1, 64)
        steps = np.repeat(blocks.max(-1), 64, axis=1)[:, :inputs] / 32767
        bound += 1.1 * steps @ np.abs(w).T
    return bound + unit


def assert_within(got: torch.Tensor, exact: np.ndarray, bound) -> None:
    off = np.abs(got.double().numpy() - exact)
    assert got.shape == exact.shape and bool((off <= bound).all()), (off - bound).max()
