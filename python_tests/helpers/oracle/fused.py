"""A second opinion on the ops between a layer's products: one row, one head at a time, in float64;
what is stored is rounded by numpy. A norm is (kind, weight, bias, eps, offset).
"""

import numpy as np

from . import layers


def normed(row: np.ndarray, norm: tuple) -> np.ndarray:
    kind, weight, bias, eps, offset = norm
    if kind == "none":
        return row
    return layers.norm(row, kind, [w + offset for w in weight], bias, eps)


def residual_row(
    h: np.ndarray, x: np.ndarray | None, scale: float, x_norm: tuple, norm: tuple, stored: str
) -> tuple[np.ndarray, np.ndarray]:
    """The sum as it is stored, and its norm."""
    if x is not None:
        h = layers.rounded(h + scale * normed(x, x_norm), stored)
    return h, normed(h, norm)


def turned_heads(
    heads: np.ndarray, norm: tuple, each: bool, cosines: np.ndarray, sines: np.ndarray
) -> np.ndarray:
    """Heads [heads, size] of one row, normed and turned."""
    if each:
        rows = [normed(head, norm) for head in heads]
    else:
        rows = np.split(normed(heads.flatten(), norm), len(heads))
    return np.array([layers.turn(row, cosines, sines) for row in rows])


def gated_row(gate: np.ndarray, up: np.ndarray | None, activation: str) -> np.ndarray:
    ups = np.ones(len(gate)) if up is None else up
    return np.array([layers.activation(activation, g) * u for g, u in zip(gate.tolist(), ups)])
