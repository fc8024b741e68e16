"""Runners on the device under test: what they record is counted."""

from typing import ClassVar

import torch
from transformers import StoppingCriteria

from helpers import families
from helpers.families import VOCAB
from msn_ext import DraftTree, generate
from msn_ext.decoding import BestFirst, capture

DRAFTS = {
    "auto": lambda: "auto",
    "auto of 16": lambda: BestFirst(16),
    "paper": lambda: "paper",
    "a chain": lambda: DraftTree.chain(4),
    "none": lambda: "none",
}


class CountingBackend(capture.CudaCaptureBackend):
    """Counts as the tape's does."""

    made: ClassVar[list] = []

    def __init__(self, device):
        super().__init__(device)
        self.captures, self.warm_ups, self.replays = [], 0, 0
        CountingBackend.made.append(self)

    def warm_up(self, step):
        self.warm_ups += 1
        return super().warm_up(step)

    def capture(self, step):
        captured, backend = super().capture(step), self
        replay = captured.replay

        def counted():
            backend.replays += 1
            replay()

        captured.replay = counted
        self.captures.append(captured)
        return captured


where = "cpu"  # the device, set by the fixture `tapes`


def tiny_model(family: str, seed: int):
    return families.tiny_model(family, seed).to(where)


def prompts(seed: int, batch: int = 2, length: int = 12, padded: bool = True):
    """Left-padded ids and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for b in range(1, batch * padded):
        mask[b, : 3 * b] = 0
    return ids.masked_fill(mask == 0, 0).to(where), mask.to(where)


def plain(model, ids, mask, **options):
    return model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)


def ours(model, ids, mask, draft, **options):
    return generate(
        model, ids, attention_mask=mask, draft=draft, do_sample=False, pad_token_id=0, **options
    )


def sampled(model, ids, mask, draft, seed: int, **options):
    torch.manual_seed(seed)
    return generate(
        model,
        ids,
        attention_mask=mask,
        draft=draft,
        do_sample=True,
        pad_token_id=0,
        max_new_tokens=30,
        eos_token_id=None,
        **{"top_k": 0} | options,
    )


class EndsAfter(StoppingCriteria):
    def __init__(self, tokens: int):
        self._tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(
            input_ids.shape[:1], input_ids.shape[1] >= self._tokens, device=input_ids.device
        )
