"""Models, sizes, and one op at one size."""

import dataclasses
import random
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int
    dtype: torch.dtype


MODELS = {
    "cpu": [Model("SmolLM2-135M", 9, 3, 64, 30, 49152, torch.float32)],
    "cuda": [
        Model("Llama-3-8B", 32, 8, 128, 32, 128256, torch.bfloat16),
        Model("SmolLM2-135M", 9, 3, 64, 30, 49152, torch.bfloat16),
    ],
}
NODES = [1, 8, 16, 64, 69]
CONTEXTS = {"cpu": [256, 1024, 4096], "cuda": [1024, 4096, 16384]}


@dataclasses.dataclass
class Case:
    """One op at one size; its calls hold while the generator that made it stays here. All but an
    ``eager`` that ``waits`` for the device can be captured as CUDA graphs.
    """

    size: str
    bytes: int
    run: Callable
    eager: Callable | None = None  # none: what is sequential has no vectorised equivalent
    others: dict[str, Callable] = dataclasses.field(default_factory=dict)
    check: Callable = torch.testing.assert_close  # called with what run and an equivalent returned
    waits: bool = False


def random_tree(nodes: int, device: str) -> torch.Tensor:
    """Return the parents of a tree about as deep and as wide as the paper's."""
    rng = random.Random(nodes)
    return torch.tensor(
        [-1, *(rng.randrange(i // 3, i) for i in range(1, nodes))], dtype=torch.int32, device=device
    )
