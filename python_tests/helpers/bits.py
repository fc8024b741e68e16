"""What a text was computed from: the logits behind every token of it, to the bit."""

from dataclasses import dataclass

import torch

from msn_ext import generate
from msn_ext.decoding.drafters import ObservedDrafter
from msn_ext.generation import drafter_for

NEW = 24
"""Tokens a text."""


@dataclass
class Row:
    """New tokens, int64 [n], and the logits [n, V] that each was taken from."""

    tokens: torch.Tensor
    logits: torch.Tensor
    accepts: list[int]

    def after(self, count: int) -> "Row":
        return Row(self.tokens[count:], self.logits[count:], self.accepts)

    def is_bitwise(self, other: "Row") -> bool:
        whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[self.logits.element_size()]
        return torch.equal(self.tokens, other.tokens) and torch.equal(
            self.logits.contiguous().view(whole), other.logits.contiguous().view(whole)
        )


class LogitKeeper(ObservedDrafter):
    """Drafts as another drafter does, and keeps the logits of every accepted node."""

    def start(self, batch, vocabulary, device):
        super().start(batch, vocabulary, device)
        self.rows = [[] for _ in range(batch)]

    def observe(self, verified):
        for row, logits, path, accepted in zip(
            self.rows, verified.logits, verified.path, verified.accept_length.tolist()
        ):
            row.append(logits[path[:accepted].long()].clone())
        super().observe(verified)


def decoded(model, prompts: list[list[int]], draft, **options) -> list[Row]:
    """Decode prompts as one left-padded batch, by our own forward pass."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    keeper = LogitKeeper(drafter_for(draft, model))
    settings = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    out = generate(
        model,
        ids,
        attention_mask=mask,
        draft=keeper,
        engine="native",
        return_dict_in_generate=True,
        **(settings | options),
    )
    rows = []
    for sequence, logits, accepts in zip(out.sequences, keeper.rows, out.accept_lengths):
        count = int(accepts.sum())
        new = sequence[longest : longest + count]
        rows.append(Row(new, torch.cat(logits)[:count], accepts.tolist()))
    return rows
