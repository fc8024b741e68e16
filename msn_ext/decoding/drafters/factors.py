"""The factors that weigh the sources of guesses: their layout, and the ones that come with the
package.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from msn_ext.ops import LEVELS, ORDERS, SUFFIXES

SHAPES: dict[str, tuple[int, ...]] = {
    # highest order known here, longest suffix known here
    "bias": (ORDERS + 1, len(SUFFIXES) + 1),
    # depth 0, 1, 2 and more; any context known here; level
    "denoised": (3, 2, LEVELS),
    # order, highest order known here, level; of the adjacency table
    "adjacent": (ORDERS, ORDERS + 1, LEVELS),
    # n-gram; rank 0, 1, 2 and more; highest order known here
    "suffix": (len(SUFFIXES), 3, ORDERS + 1),
}
"""The tables in the order in which :func:`msn_ext.ops.draft_tree` takes them, by their names in
files.
"""

SHIPPED = Path(__file__).with_name("factors.json")
OF_TAILS = Path(__file__).with_name("tail_factors.json")
OF_HABITS = Path(__file__).with_name("habit_factors.json")


def load() -> Tensor:
    """Return float64 [348], fitted as the file beside this module says."""
    return from_tables(json.loads(SHIPPED.read_text(encoding="utf-8")), SHIPPED.name)


def load_of_tails() -> Tensor:
    """Return float64 [348], the same for guesses that a gated adapter's noise rows made in the
    place of the denoised ones.
    """
    return from_tables(json.loads(OF_TAILS.read_text(encoding="utf-8")), OF_TAILS.name)


def load_of_habits() -> Tensor:
    """Return float64 [348], fitted where a model's habits stand behind the adjacency table."""
    return from_tables(json.loads(OF_HABITS.read_text(encoding="utf-8")), OF_HABITS.name)


def of_tails_with(factors: Tensor) -> Tensor:
    """Return these factors, a tail's guesses counting as :func:`load_of_tails` has it."""
    first = math.prod(SHAPES["bias"])
    denoised = slice(first, first + math.prod(SHAPES["denoised"]))
    fitted = factors.clone()
    fitted[denoised] = load_of_tails()[denoised].to(factors)
    return fitted


def from_tables(given: dict, name: str) -> Tensor:
    """Return float64 [348] from tables in lists.

    Raises:
        ValueError: a table of ``name`` is missing, has another shape, or holds a value outside 1e-9
            to 1e9.
    """
    parts = []
    for table, shape in SHAPES.items():
        try:
            values = torch.tensor(given.get(table, []), dtype=torch.float64, device="cpu")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {table} is no table of numbers: {error}") from error
        check(values, shape, f"{name}: {table}")
        parts.append(values.flatten())
    return torch.cat(parts)


def check(values: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raise ValueError where ``values`` cannot be factors of this shape."""
    if values.shape != shape or values.dtype != torch.float64:
        raise ValueError(
            f"{name} has shape {list(values.shape)} and dtype {values.dtype}; expected"
            f" {list(shape)}, float64"
        )
    if not bool(((values >= 1e-9) & (values <= 1e9)).all()):
        raise ValueError(f"{name} holds a value outside 1e-9 to 1e9")


def tables(factors: Tensor) -> dict[str, list]:
    """Return the tables that :func:`from_tables` takes, three digits each."""
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    rounded = torch.tensor(
        [float(f"{x:.3g}") for x in factors.tolist()], dtype=torch.float64, device="cpu"
    )
    return {
        name: part.view(shape).tolist()
        for (name, shape), part in zip(SHAPES.items(), rounded.split(sizes))
    }
