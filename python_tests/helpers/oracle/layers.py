"""A second opinion on the stages of a decoder layer: one row, one output, one head at a time."""

import math

import numpy as np


def rounded(x: np.ndarray, weights: str) -> np.ndarray:
    """Numbers as a format stores them, in float64; no subnormals and no overflow of bfloat16."""
    if weights == "bfloat16":  # eight bits, ties to even
        fraction, exponent = np.frexp(x.astype(np.float32).astype(np.float64))
        return np.ldexp(np.rint(fraction * 256) / 256, exponent)
    return x.astype({"float16": np.float16, "float64": np.float64}.get(weights, np.float32)).astype(
        np.float64
    )


def int8_row(row: np.ndarray) -> np.ndarray:
    """A row of weights in blocks of 64, each number the nearest of 255 multiples of its scale."""
    stored = np.zeros(len(row))
    for begin in range(0, len(row), 64):
        block = row[begin : begin + 64].astype(np.float32)
        most = float(np.abs(block).max())
        if most == 0:
            continue
        fraction, exponent = math.frexp(most / 127)
        scale = math.ldexp(math.ceil(fraction * 256) / 256, exponent)
        stored[begin : begin + 64] = np.rint(block / np.float32(scale)).astype(np.float64) * scale
    return stored


def int16_row(row: np.ndarray) -> np.ndarray:
    """A row that meets int8 weights, in blocks of 64: 65535 steps from minus to plus its largest
    number.
    """
    out = np.zeros(len(row))
    for begin in range(0, len(row), 64):
        block = row[begin : begin + 64]
        step = float(np.abs(block).max()) / 32767
        out[begin : begin + 64] = np.rint(block / step) * step if step else 0.0
    return out


def stored(weight: np.ndarray, weights: str) -> np.ndarray:
    """What a packed linear layer multiplies with."""
    if weights == "int8":
        return np.array([int8_row(row) for row in weight])
    return rounded(weight, weights)


def norm(row: np.ndarray, kind: str, weight: np.ndarray, bias, eps: float) -> np.ndarray:
    values = [float(x) for x in row]
    if kind == "layer":
        mean = math.fsum(values) / len(values)
        values = [x - mean for x in values]
    size = math.sqrt(math.fsum(x * x for x in values) / len(values) + eps)
    out = np.array([x / size * float(w) for x, w in zip(values, weight)])
    return out if bias is None else out + bias


def activation(name: str, x: float) -> float:
    if name == "relu":
        return max(x, 0.0)
    if name == "gelu":
        return x * 0.5 * math.erfc(-x / math.sqrt(2))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + math.exp(-x))


def soft_cap(x: float, cap: float) -> float:
    return cap * math.tanh(x / cap) if cap else x


def dot(x: np.ndarray, w: np.ndarray) -> float:
    return math.fsum((x * w).tolist())


def turn(head: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """A head whose pairs of numbers, as complex ones, are multiplied by those of the tables."""
    half, out = len(cosines), head.astype(np.float64)
    pairs = (out[:half] + 1j * out[half : 2 * half]) * (cosines + 1j * sines)
    out[:half], out[half : 2 * half] = pairs.real, pairs.imag
    return out


def attend(
    query: np.ndarray, keys: list, values: list, scale: float, window: int, softcap: float
) -> np.ndarray:
    """One query, and the keys and values of the tokens up to it, in their order."""
    first = max(0, len(keys) - window) if window else 0
    scores = [soft_cap(scale * dot(query, key), softcap) for key in keys[first:]]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    return sum((w / total * v for w, v in zip(weights, values[first:])), np.zeros(len(query)))
