"""The ops in plain PyTorch: the specification that every kernel is tested against.

Written to be read, not to be fast: loops over rows and nodes, one rule a line.
Signatures, shapes, dtypes and errors are those of :mod:`msn_ext.ops`.

For tests, and for fitting factors offline; nothing that decodes or trains imports it.
"""

from .drafting import (
    context_of,
    draft_tree,
    fill_tree,
    index_suffixes,
    keep_continuation,
    last_place,
    listed_after,
    lookup_ngram,
    remember_guesses,
    top_guesses,
)
from .fused import gated_activation, residual_norm, rotary_cache
from .layers import (
    add_norm,
    embed_rows,
    packed_attention,
    packed_linear,
    rotary_write,
    unpack_weights,
)
from .noise import draw_noise
from .rules import check_parents, counter_bits, splitmix64
from .tails import append_tails, keep_tail
from .tree import (
    advance_text,
    ancestor_matrix,
    commit_kv,
    place_tree,
    tree_ancestors,
    tree_attention,
    tree_mask,
    verify_logits,
    verify_tree,
)

__all__ = [
    "add_norm",
    "advance_text",
    "ancestor_matrix",
    "append_tails",
    "check_parents",
    "commit_kv",
    "context_of",
    "counter_bits",
    "draft_tree",
    "draw_noise",
    "embed_rows",
    "fill_tree",
    "gated_activation",
    "index_suffixes",
    "keep_continuation",
    "keep_tail",
    "last_place",
    "listed_after",
    "lookup_ngram",
    "packed_attention",
    "packed_linear",
    "place_tree",
    "remember_guesses",
    "residual_norm",
    "rotary_cache",
    "rotary_write",
    "splitmix64",
    "top_guesses",
    "tree_ancestors",
    "tree_attention",
    "tree_mask",
    "unpack_weights",
    "verify_logits",
    "verify_tree",
]
