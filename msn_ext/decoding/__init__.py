"""Decoding with draft trees: a request, its loop, and the steps from draft to commit; see
docs/how-it-works.md.
"""

from .decoder import Decoder, PassResult
from .drafters import (
    RETRIEVAL,
    BestFirst,
    CapturableDrafter,
    Corpus,
    Draft,
    Drafter,
    DraftTree,
    Habits,
    Lookahead,
    SamDecoding,
    TokenRecycling,
    TreeDrafter,
    Verified,
)
from .engine import prepare, unprepare
from .grammars import grammar
from .loop import decode
from .processors import stateless
from .request import Request
from .runner import runner_for
from .support import attention_for
from .verification import Sampler, greedy

__all__ = [
    "RETRIEVAL",
    "BestFirst",
    "CapturableDrafter",
    "Corpus",
    "Decoder",
    "Draft",
    "DraftTree",
    "Drafter",
    "Habits",
    "Lookahead",
    "PassResult",
    "Request",
    "SamDecoding",
    "Sampler",
    "TokenRecycling",
    "TreeDrafter",
    "Verified",
    "attention_for",
    "decode",
    "grammar",
    "greedy",
    "prepare",
    "runner_for",
    "stateless",
    "unprepare",
]
