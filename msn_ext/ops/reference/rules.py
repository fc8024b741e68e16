"""Rules that several ops share: paths of a tree, numbers that only a counter decides."""

import torch

MASK64 = (1 << 64) - 1


def path_to(parents: list[int], node: int) -> list[int]:
    """Return the path from the root down to ``node``, both included; empty if ``node`` is dead."""
    path = [node]
    while path[-1] > 0:
        path.append(parents[path[-1]])
    return path[::-1] if path[-1] == 0 else []


def check_parents(parents: torch.Tensor) -> None:
    """Raise ValueError where a node's parent is neither -1 nor an earlier node."""
    for row in parents.reshape(-1, parents.shape[-1]).tolist():
        for node, parent in enumerate(row):
            if parent < -1 or parent >= node:
                expected = "-1" if node == 0 else f"-1 or a node in [0, {node - 1}]"
                raise ValueError(f"parents[{node}] is {parent}; expected {expected}")


def splitmix64(x: int) -> int:
    """Return SplitMix64 (Steele, Lea, Flood 2014) of an unsigned 64-bit integer."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def counter_bits(seed: int, row: int, position: int, node: int) -> int:
    """Return 63 random bits that depend on nothing but their counter."""
    x = splitmix64((seed & MASK64) ^ splitmix64(row))
    return splitmix64(splitmix64(x ^ position) ^ node) >> 1
