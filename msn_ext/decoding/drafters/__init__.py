"""Drafters: where guesses come from. They know trees, texts and the model's answers, and nothing
of models.
"""

from .best_first import BestFirst
from .corpus import Corpus
from .habits import Habits
from .jacobi import TreeDrafter
from .lookahead import Lookahead
from .protocol import (
    CapturableDrafter,
    Draft,
    Drafter,
    NoiseDrafter,
    ObservedDrafter,
    Verified,
    as_compared,
)
from .recycling import TokenRecycling
from .sam import SamDecoding
from .tree import RETRIEVAL, DraftTree

__all__ = [
    "RETRIEVAL",
    "BestFirst",
    "CapturableDrafter",
    "Corpus",
    "Draft",
    "DraftTree",
    "Drafter",
    "Habits",
    "Lookahead",
    "NoiseDrafter",
    "ObservedDrafter",
    "SamDecoding",
    "TokenRecycling",
    "TreeDrafter",
    "Verified",
    "as_compared",
]
