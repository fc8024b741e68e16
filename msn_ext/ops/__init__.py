"""The ops of a decoding step and of noisy training, each a :mod:`torch.library` op with a CPU and a
CUDA kernel: on trees (:mod:`.tree`), for drafting (:mod:`.drafting`), for noise (:mod:`.noise`),
between a decoder layer's matrix products (:mod:`.fused`); and the stages of a decoder layer, on the
CPU only (:mod:`.layers`).

Shapes: B rows of a batch, N tree nodes (1 to 256), W = ceil(N / 64) words, H query heads, H_kv key
and value heads, C cache slots, D and D_v head sizes. Trees are int32 (``parents``, ``depth``,
``rank``); tokens, lengths and everything torch indexes with are int64. ``parents[0]`` is -1 (the
root), a live node has ``0 <= parents[i] < i``, and a padding node, which is never accepted, has
``parents[i] == -1``. Wrong shapes, dtypes, devices and values raise :class:`ValueError`, which
names the argument; on CUDA, values are not read back: a malformed parent counts as padding and a
slot outside the cache is left alone.

The specification of each op is its plain PyTorch version in :mod:`msn_ext.ops.reference`.

The constants are those of the kernels' headers: MAX_NODES of a tree, RETRIEVAL (the rank of a node
that continues the retrieved text); GUESSES kept of every row of logits, LEVELS of their
probability, with EDGES between them; ORDERS of contexts in the adjacency table, SUFFIXES (lengths
of the indexed n-grams); DENOISED, ADJACENCY, SUFFIX and NOISE, the bits of a node's sources;
CEILING of a child's probability; FACTORS and where each of their tables begins; NO_LABEL, and
ATTEMPTS to draw a token that may be noise.
"""

import torch  # noqa: F401 -- before _C, which shares its OpenMP threads

from msn_ext import _C as _C
from msn_ext._C import (
    ADJACENCY,
    ATTEMPTS,
    CEILING,
    DENOISED,
    EDGES,
    FACTORS,
    FACTORS_ADJACENCY,
    FACTORS_BIAS,
    FACTORS_DENOISED,
    FACTORS_SUFFIX,
    GUESSES,
    LEVELS,
    MAX_NODES,
    NO_LABEL,
    NOISE,
    ORDERS,
    RETRIEVAL,
    SUFFIX,
    SUFFIXES,
)

from .drafting import (
    append_tails,
    draft_tree,
    fill_tree,
    index_suffixes,
    keep_continuation,
    keep_tail,
    lookup_ngram,
    remember_guesses,
    top_guesses,
)
from .fused import gated_activation, residual_norm, rotary_cache
from .layers import (
    add_norm,
    embed_rows,
    pack_weights,
    packed_attention,
    packed_linear,
    rotary_write,
)
from .noise import draw_noise
from .tree import (
    advance_text,
    commit_kv,
    place_tree,
    tree_ancestors,
    tree_attention,
    tree_mask,
    verify_logits,
    verify_tree,
)
from .workspace import Workspace

__all__ = [
    "ADJACENCY",
    "ATTEMPTS",
    "CEILING",
    "DENOISED",
    "EDGES",
    "FACTORS",
    "FACTORS_ADJACENCY",
    "FACTORS_BIAS",
    "FACTORS_DENOISED",
    "FACTORS_SUFFIX",
    "GUESSES",
    "LEVELS",
    "MAX_NODES",
    "NOISE",
    "NO_LABEL",
    "ORDERS",
    "RETRIEVAL",
    "SUFFIX",
    "SUFFIXES",
    "Workspace",
    "add_norm",
    "advance_text",
    "append_tails",
    "commit_kv",
    "draft_tree",
    "draw_noise",
    "embed_rows",
    "fill_tree",
    "gated_activation",
    "index_suffixes",
    "keep_continuation",
    "keep_tail",
    "lookup_ngram",
    "pack_weights",
    "packed_attention",
    "packed_linear",
    "place_tree",
    "remember_guesses",
    "residual_norm",
    "rotary_cache",
    "rotary_write",
    "top_guesses",
    "tree_ancestors",
    "tree_attention",
    "tree_mask",
    "verify_logits",
    "verify_tree",
]
