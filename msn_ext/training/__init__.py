"""Noisy supervised fine-tuning (arXiv 2406.17404, section 3): what makes a model guess well for its
own decoding.
"""

from .attach import add_noise
from .collator import NoisyCollator, Starts
from .location import lowest_loss_starts

__all__ = ["NoisyCollator", "Starts", "add_noise", "lowest_loss_starts"]
