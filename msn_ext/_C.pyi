"""The compiled kernels, called through :mod:`msn_ext.ops`, where shapes and dtypes are written.

Every tensor is contiguous, unless an op says otherwise; results are written into the last ones.
"""

from typing import Any, Final

from torch import Tensor

def build_info() -> dict[str, Any]: ...

# ---- tree

MAX_NODES: Final[int]

def tree_ancestors(parents: Tensor, ancestors: Tensor, depth: Tensor, /) -> None: ...
def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    offsets: Tensor | None,
    ancestors: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    out: Tensor,
    partial: Tensor | None,
    /,
) -> None: ...
def attention_space(q: Tensor, k_cache: Tensor, v_cache: Tensor, /) -> int: ...
def verify_tree(
    tokens: Tensor,
    targets: Tensor,
    parents: Tensor,
    accept_length: Tensor,
    path: Tensor,
    bonus: Tensor,
    continuation: Tensor,
    /,
) -> None: ...
def verify_logits(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    guesses: Tensor,
    targets: Tensor,
    accept_length: Tensor,
    path: Tensor,
    bonus: Tensor,
    continuation: Tensor,
    partial: Tensor | None,
    arrived: Tensor | None,
    /,
) -> None: ...
def commit_kv(
    caches: list[Tensor], lengths: Tensor, path: Tensor, accept_length: Tensor, /
) -> None: ...
def place_tree(
    tokens: Tensor,
    history: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    last_position: Tensor,
    depth: Tensor,
    vocabulary: int,
    positions: Tensor,
    prefix: Tensor,
    /,
) -> None: ...
def advance_text(
    history: Tensor,
    lengths: Tensor,
    remaining: Tensor,
    targets: Tensor,
    path: Tensor,
    accept_length: Tensor,
    ends: Tensor,
    vocabulary: int,
    gained: Tensor,
    status: Tensor,
    /,
) -> None: ...

# ---- drafting

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

def lookup_ngram(
    history: Tensor, lengths: Tensor, max_ngram: int, tokens: Tensor, matched: Tensor, /
) -> None: ...
def fill_tree(
    candidates: Tensor,
    retrieved: Tensor,
    history: Tensor,
    lengths: Tensor,
    depth: Tensor,
    rank: Tensor,
    seed: Tensor,
    tokens: Tensor,
    /,
) -> None: ...
def top_guesses(
    logits: Tensor, guesses: Tensor, partial: Tensor | None, arrived: Tensor | None, /
) -> None: ...
def guesses_space(logits: Tensor, /) -> tuple[int, int]: ...
def index_suffixes(
    suffixes: Tensor, history: Tensor, start: Tensor, lengths: Tensor, /
) -> None: ...
def remember_guesses(
    adjacency: Tensor,
    history: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    parents: Tensor,
    path: Tensor,
    guesses: Tensor,
    /,
) -> None: ...
def keep_continuation(denoised: Tensor, guesses: Tensor, continuation: Tensor, /) -> None: ...
def keep_tail(
    denoised: Tensor,
    factors: Tensor,
    tables: Tensor,
    guesses: Tensor,
    continuation: Tensor,
    path: Tensor,
    accept_length: Tensor,
    ends: Tensor,
    length: int,
    /,
) -> None: ...
def append_tails(
    tokens: Tensor,
    parents: Tensor,
    probability: Tensor,
    history: Tensor,
    lengths: Tensor,
    length: int,
    noise: int,
    drafted: Tensor,
    drafted_parents: Tensor,
    ancestors: Tensor,
    depth: Tensor,
    ends: Tensor,
    /,
) -> None: ...
def draft_tree(
    history: Tensor,
    lengths: Tensor,
    denoised: Tensor,
    adjacency: Tensor,
    habits: Tensor,
    suffixes: Tensor,
    corpus: Tensor,
    corpus_suffixes: Tensor,
    factors: Tensor,
    max_depth: int,
    foresight: float,
    tokens: Tensor,
    parents: Tensor,
    probability: Tensor,
    sources: Tensor,
    /,
) -> None: ...

# ---- noise

NO_LABEL: Final[int]
ATTEMPTS: Final[int]

def draw_noise(
    input_ids: Tensor,
    labels: Tensor,
    samples: Tensor,
    keep_token_ids: Tensor,
    seed: int,
    random: float,
    vocabulary: int,
    apart: bool,
    starts: Tensor,
    noise: Tensor,
    /,
) -> None: ...

# ---- fused

def residual_norm(
    h: Tensor,
    x: Tensor | None,
    scale: float,
    x_norm: str,
    x_weight: Tensor | None,
    x_bias: Tensor | None,
    x_eps: float,
    x_offset: float,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    out: Tensor,
    /,
) -> None: ...
def rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: Tensor,
    positions: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    norm: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    offset: float,
    norm_each_head: bool,
    out: Tensor,
    /,
) -> None: ...
def gated_activation(gate: Tensor, up: Tensor | None, activation: str, out: Tensor, /) -> None: ...

# ---- layers: their stages, and the native forward pass (msn_ext/decoding/forward)

CACHE_WIDTH: Final[int]
NARROW_STEP: Final[int]

def layer_isa(isa: str, /) -> dict[str, Any]: ...
def packed_bytes(weights: str, isa: str, outputs: int, inputs: int, halves: int, /) -> int: ...
def pack(weights: str, isa: str, pieces: list[Tensor], halves: int, packed: Tensor, /) -> None: ...
def coded_bytes(
    weights: str, isa: str, packed: Tensor, outputs: int, inputs: int, halves: int, /
) -> int: ...
def code(
    weights: str,
    isa: str,
    packed: Tensor,
    outputs: int,
    inputs: int,
    halves: int,
    coded: Tensor,
    /,
) -> None: ...
def unpack(
    weights: str,
    isa: str,
    packed: Tensor,
    outputs: int,
    inputs: int,
    halves: int,
    rows: Tensor,
    to: Tensor,
    /,
) -> None: ...
def screen_bytes(weights: str, isa: str, outputs: int, inputs: int, /) -> int: ...
def pack_screen(
    weights: str, isa: str, packed: Tensor, outputs: int, inputs: int, screen: Tensor, /
) -> bool: ...
def release_freed() -> None: ...
def sample_hash(tensors: list[Tensor], /) -> int: ...
def packed_linear(
    x: Tensor,
    packed: Tensor,
    weights: str,
    outputs: int,
    bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    epilogue: str,
    activation: str,
    scale: float,
    softcap: float,
    pick: Tensor | None,
    isa: str,
    threads: int,
    out: Tensor,
    /,
) -> None: ...
def add_norm(
    h: Tensor,
    x: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: float,
    isa: str,
    threads: int,
    /,
) -> None: ...
def embed_rows(
    tokens: Tensor,
    table: Tensor,
    weights: str,
    size: int,
    vocabulary: int,
    scale: float,
    positions: Tensor | None,
    position_table: Tensor | None,
    isa: str,
    threads: int,
    out: Tensor,
    /,
) -> None: ...
def rotary_write(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    cosines: Tensor | None,
    sines: Tensor | None,
    norm: str,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    norm_each_head: bool,
    isa: str,
    threads: int,
    /,
) -> None: ...
def packed_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix: Tensor,
    ancestors: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    isa: str,
    threads: int,
    out: Tensor,
    /,
) -> None: ...

class ForwardPass:
    def __init__(self, weights: str, isa: str, /) -> None: ...
    def set_embedding(
        self, table: Tensor | None, hidden: int, scale: float, positions: Tensor | None, /
    ) -> None: ...
    def add_rotary(self, turned: int, /) -> int: ...
    def set_rotary(self, which: int, cosines: Tensor, sines: Tensor, /) -> None: ...
    def add_layer(self, layer: dict[str, Any], /) -> None: ...
    def set_head(
        self, norm: tuple | None, head: tuple, scale: float, softcap: float, /
    ) -> None: ...
    def set_screen(self, screen: Tensor, dense: Tensor | None, /) -> None: ...
    def set_adapter(
        self, layers: list[dict[str, tuple[Tensor, int, Tensor, int, Tensor]]], /
    ) -> None: ...
    def set_cache(self, keys: Tensor, values: Tensor, batch: int, slots: int, /) -> None: ...
    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor,
        prefix: Tensor,
        logits: Tensor | None,
        verified: tuple[Tensor, ...] | None,
        tails: int,
        threads: int,
        /,
    ) -> None: ...
    def logits(self, logits: Tensor, threads: int, /) -> None: ...
    def read(
        self,
        batch: int,
        tokens: Tensor,
        positions: Tensor,
        start: int,
        keep: int,
        logits: Tensor,
        threads: int,
        /,
    ) -> None: ...
    def commit(self, prefix: Tensor, path: Tensor, accepted: Tensor, /) -> None: ...

def top_logits(logits: Tensor, values: Tensor, tokens: Tensor, /) -> bool: ...

class NativeSteps:
    def __init__(
        self,
        forward: ForwardPass,
        text: dict[str, Tensor],
        known: dict[str, Tensor] | None,
        vocabulary: int,
        max_depth: int,
        foresight: float,
        length: int,
        noise: int,
        /,
    ) -> None: ...
    def draft(self, nodes: int, rows: list[int], /) -> list[float]: ...
    def check(self, nodes: int, tails: int, threads: int, /) -> None: ...
    def look(
        self, nodes: int, tails: int, logits: Tensor, positions: Tensor, threads: int, /
    ) -> None: ...
    def accept(self, targets: Tensor, /) -> None: ...
    def pass_seconds(self, /) -> float: ...

class StepTimes:
    def __init__(self, curve: list[tuple[int, float]], slope: float, kink: float, /) -> None: ...
    def of(self, tokens: int, /) -> float: ...
    def at_best(self, tokens: int, /) -> float: ...
    def observe(self, tokens: int, seconds: float, /) -> None: ...

class TreeSizer:
    def __init__(self, times: StepTimes, rows: int, lesson: float, /) -> None: ...
    def choose(self, expected: list[float], sizes: tuple[int, ...], /) -> int: ...
    def observe(self, nodes: int, expected: float, accepted: float, seconds: float, /) -> None: ...
    def size(self, /) -> int: ...
