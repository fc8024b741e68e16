"""Training samples, collators and a tokenizer for the tests of training and of the command line.

Workers of a data loader import this, so that it imports little itself.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NONE = -100


def sample(tokens: int, prompt: int, vocabulary: int = 24, seed: int = 0) -> dict:
    """Random tokens (3 and above: others have a meaning), the first ``prompt`` without labels."""
    ids = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:prompt] = NONE
    return {"input_ids": ids, "labels": labels}


def samples(count: int, vocabulary: int = 24, longest: int = 40, seed: int = 0) -> list[dict]:
    """Responses of twelve tokens or more."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        tokens = rng.randrange(16, longest)
        made.append(sample(tokens, rng.randrange(1, tokens - 11), vocabulary, seed * 1000 + i))
    return made


class Pad:
    """Rows padded with 0 on one side."""

    def __init__(self, side: str = "right", to: int = 0):
        self.side, self.to = side, to

    def __call__(self, rows: list[dict]) -> dict:
        width = max(self.to, *(len(row["input_ids"]) for row in rows))

        def stacked(name: str, value: int) -> torch.Tensor:
            filled = []
            for row in rows:
                x = row[name] if name in row else torch.ones_like(row["input_ids"])
                gap = x.new_full((width - len(x),), value)
                filled.append(torch.cat([x, gap] if self.side == "right" else [gap, x]))
            return torch.stack(filled)

        return {
            "input_ids": stacked("input_ids", 0),
            "labels": stacked("labels", NONE),
            "attention_mask": stacked("attention_mask", 0),
        }


def flatten(rows: list[dict]) -> dict:
    """Padding-free: one row, told apart by positions."""
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat(
            [torch.cat([row["labels"][:1] * 0 + NONE, row["labels"][1:]]) for row in rows]
        )[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
    }


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token per byte, 256 is the end: every character beyond ASCII is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({character: i for i, character in enumerate([*alphabet, "<eos>"])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One that TRL accepts for data that has tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        pad_token="t0",
        eos_token="t2",
        unk_token="t0",
    )
