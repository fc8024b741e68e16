"""The decoding step, from draft to commit; see docs/how-it-works.md."""

from .drafting import Draft, Drafter, TreeDrafter, Verified
from .lookahead import Lookahead
from .recycling import TokenRecycling
from .step import Decoder, Gained
from .support import attention_for
from .tree import RETRIEVAL, DraftTree
from .verification import Sampler, greedy

__all__ = [
    "RETRIEVAL",
    "Decoder",
    "Draft",
    "DraftTree",
    "Drafter",
    "Gained",
    "Lookahead",
    "Sampler",
    "TokenRecycling",
    "TreeDrafter",
    "Verified",
    "attention_for",
    "greedy",
]
