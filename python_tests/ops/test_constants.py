"""The numbers that Python and C++ share, written out once more."""

from helpers import oracle
from helpers.oracle.drafting import EDGES
from msn_ext import ops


def test_constants():
    assert ops.MAX_NODES == 256
    assert ops.RETRIEVAL == -1
    assert (ops.GUESSES, ops.LEVELS, ops.ORDERS) == (8, 12, 3)
    assert list(ops.EDGES) == EDGES and len(EDGES) == 11
    assert list(ops.SUFFIXES) == oracle.NGRAMS == [1, 2, 3, 4, 6, 8, 12, 16]
    assert (ops.DENOISED, ops.ADJACENCY, ops.SUFFIX, ops.NOISE) == (1, 2, 4, 8)
    assert ops.CEILING == 0.99
    assert (ops.NO_LABEL, ops.ATTEMPTS) == (-100, 64)


def test_tables_of_factors():
    """One after the other: 4 x 9 of biases, 3 x 2 x 12, 3 x 4 x 12 and 8 x 3 x 4."""
    assert ops.FACTORS_BIAS == 0
    assert ops.FACTORS_DENOISED == 36
    assert ops.FACTORS_ADJACENCY == 36 + 72
    assert ops.FACTORS_SUFFIX == 36 + 72 + 144
    assert ops.FACTORS == 36 + 72 + 144 + 96 == 348
