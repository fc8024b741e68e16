"""The factors that weigh the sources of guesses: their layout, and the ones that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from msn_ext.ops.reference import FACTORS, LEVELS, ORDERS, SUFFIXES

SHAPES = {
    "bias": (ORDERS + 1, len(SUFFIXES) + 1),  # highest order known here, longest suffix known here
    "denoised": (3, 2, LEVELS),  # depth 0, 1, 2 and more; any context known here; level
    "adjacent": (ORDERS, ORDERS + 1, LEVELS),  # order, highest order known here, level
    "suffix": (len(SUFFIXES), 3, ORDERS + 1),  # n-gram; rank 0, 1, 2 and more; highest order known here
}
"""The tables in the order in which :func:`msn_ext.ops.draft_tree` takes them."""

SHIPPED = Path(__file__).with_name("factors.json")


def load(path: Path = SHIPPED) -> Tensor:
    """float64 [348] from a file that :func:`save` wrote.

    Raises:
        ValueError: a table is missing, has another shape, or holds a value outside 1e-9 to 1e9.
    """
    tables = json.loads(Path(path).read_text())
    parts = []
    for name, shape in SHAPES.items():
        table = torch.tensor(tables.get(name, []), dtype=torch.float64)
        if table.shape != shape:
            raise ValueError(f"{path}: {name} has shape {list(table.shape)}; expected {list(shape)}")
        if not bool(((table >= 1e-9) & (table <= 1e9)).all()):
            raise ValueError(f"{path}: {name} holds a value outside 1e-9 to 1e9")
        parts.append(table.flatten())
    return torch.cat(parts)


def save(factors: Tensor, path: Path, **about) -> None:
    """Write factors [348], three digits each, and what they come from."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    assert factors.shape == (FACTORS,) and sum(sizes) == FACTORS
    tables = {
        name: [[float(f"{x:.3g}") for x in row] for row in part.reshape(-1, shape[-1]).tolist()]
        for (name, shape), part in zip(SHAPES.items(), factors.split(sizes))
    }
    lines = [f' "{name}": {json.dumps(value)}' for name, value in about.items()]
    for name, shape in SHAPES.items():
        nested = tables[name]
        if len(shape) == 3:
            nested = [nested[i : i + shape[1]] for i in range(0, len(nested), shape[1])]
        rows = ",\n  ".join(json.dumps(row) for row in nested)
        lines.append(f' "{name}": [\n  {rows}\n ]')
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")
