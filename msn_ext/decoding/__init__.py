"""The decoding step, from draft to commit; see docs/how-it-works.md."""

from .decoder import Decoder, Gained
from .drafters.best_first import BestFirst
from .drafters.corpus import Corpus
from .drafters.lookahead import Lookahead
from .drafters.protocol import Draft, Drafter, TreeDrafter, Verified
from .drafters.recycling import TokenRecycling
from .drafters.sam import SamDecoding
from .drafters.tree import RETRIEVAL, DraftTree
from .processors import followed
from .runner import steps
from .support import attention_for
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
