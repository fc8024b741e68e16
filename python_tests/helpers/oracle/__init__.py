"""A second opinion on every op, by another method than :mod:`msn_ext.ops.reference`.

Rows are plain Python lists. A node's keys are listed slot by slot and attended to as in plain
decoding; a tree is verified level by level from the root; an n-gram is found by measuring every
end; a commit is read from a snapshot; what is known is kept by context in a dict, or searched for
in the text; of a layer, a row is computed output by output (``layers``). No masks, no bit words, no
batches, and no hashes but to lay out a table.
"""

from . import fused, layers
from .drafting import (
    NGRAMS,
    Draft,
    fill,
    hashed,
    lookup,
    memory_table,
    places,
    places_table,
    remember,
    top,
)
from .noise import SplitMix64, noise_index
from .tree import allowed_slots, argmax, attention, commit, path, verify, words

__all__ = [
    "NGRAMS",
    "Draft",
    "SplitMix64",
    "allowed_slots",
    "argmax",
    "attention",
    "commit",
    "fill",
    "fused",
    "hashed",
    "layers",
    "lookup",
    "memory_table",
    "noise_index",
    "path",
    "places",
    "places_table",
    "remember",
    "top",
    "verify",
    "words",
]
