"""The compiled extension, for type checkers: csrc/bindings. Called through msn_ext.ops only."""

from typing import Any, Final

MAX_NODES: Final[int]

RETRIEVAL: Final[int]
GUESSES: Final[int]
LEVELS: Final[int]
ORDERS: Final[int]
CEILING: Final[float]
EDGES: Final[tuple[float, ...]]
SUFFIXES: Final[tuple[int, ...]]
DENOISED: Final[int]
ADJACENCY: Final[int]
SUFFIX: Final[int]
NOISE: Final[int]
FACTORS: Final[int]
FACTORS_BIAS: Final[int]
FACTORS_DENOISED: Final[int]
FACTORS_ADJACENCY: Final[int]
FACTORS_SUFFIX: Final[int]

NO_LABEL: Final[int]
ATTEMPTS: Final[int]

def build_info() -> dict[str, Any]: ...

# The ops: arguments and outputs as tensors, which the extension checks.
def __getattr__(name: str) -> Any: ...
