"""The decoding step, from draft to commit; see docs/how-it-works.md."""

from .best_first import BestFirst
from .corpus import Corpus
from .drafting import Draft, Drafter, TreeDrafter, Verified
from .graph import steps
from .lookahead import Lookahead
from .processors import followed
from .recycling import TokenRecycling
from .sam import SamDecoding
from .step import Decoder, Gained
from .support import attention_for
from .tree import RETRIEVAL, DraftTree
from .verification import Sampler, greedy

__all__ = [
    "RETRIEVAL",
    "BestFirst",
    "Corpus",
    "Decoder",
    "Draft",
    "DraftTree",
    "Drafter",
    "Gained",
    "Lookahead",
    "SamDecoding",
    "Sampler",
    "TokenRecycling",
    "TreeDrafter",
    "Verified",
    "attention_for",
    "followed",
    "greedy",
    "steps",
]
