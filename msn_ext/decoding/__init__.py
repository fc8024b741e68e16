"""The decoding step, from draft to commit; see docs/how-it-works.md."""

from .step import Decoder, Gained
from .support import attention_for
from .tree import RETRIEVAL, DraftTree
from .verification import Sampler, greedy

__all__ = ["RETRIEVAL", "Decoder", "DraftTree", "Gained", "Sampler", "attention_for", "greedy"]
