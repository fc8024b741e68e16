"""Decode a text that is known: how many passes a draft takes for it, whatever the model would have
said instead.

So models before and after training are compared on the same texts; one that has learned to repeat
itself would seem fast on its own. The loop, the engine and the drafters are those of decoding, so
every model that can be decoded can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from msn_ext.decoding import stateless
from msn_ext.generation import generate
from msn_ext.terminal import progress_bar
from msn_ext.training.layouts import NO_LABEL


class Text(NamedTuple):
    """A text to decode.

    Attributes:
        tokens: all of it.
        prompt: how many of them are given, 1 or more.
    """

    tokens: list[int]
    prompt: int


def texts_of(samples: Sequence[dict], most: int | None = None) -> list[Text]:
    """Return samples up to the end of their first answer, of which ``most`` tokens at most."""
    texts = []
    for sample in samples:
        labels = sample["labels"]
        begin = next((at for at, label in enumerate(labels) if label != NO_LABEL), len(labels))
        begin = max(begin, 1)
        end = begin
        while end < len(labels) and labels[end] != NO_LABEL and end - begin != most:
            end += 1
        if end > begin:
            texts.append(Text(list(sample["input_ids"][:end]), begin))
    return texts


def accept_lengths(model, text: Text, draft) -> list[int]:
    """Return the tokens that every pass of greedy decoding gains, had the model said this text.

    Args:
        model: as :func:`msn_ext.generate` takes it.
        draft: of :func:`msn_ext.generate`.
    """
    ids = torch.tensor([text.tokens], device=model.device)
    prompt = ids[:, : text.prompt]
    out = generate(
        model,
        prompt,
        attention_mask=torch.ones_like(prompt),
        draft=draft,
        logits_processor=LogitsProcessorList([_Along(ids[0])]),
        do_sample=False,
        max_new_tokens=len(text.tokens) - text.prompt,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, ids), "the text was left"
    return out.accept_lengths[0].tolist()


@stateless
class _Along(LogitsProcessor):
    """Lets the model say what a text, int64 [T], has next; where a guess leaves the text, the model
    says what it says.

    Drafters see the model's own logits: those that processors are given are copies.
    """

    def __init__(self, text: Tensor):
        self._text = text

    def __call__(self, input_ids, scores):
        at = input_ids.shape[1]
        if at >= len(self._text):
            return scores
        on = (input_ids == self._text[:at]).all(1)
        said = torch.full_like(scores, -torch.inf)
        said[:, self._text[at]] = 0.0
        return torch.where(on[:, None], said, scores)


def passes(
    model, texts: Sequence[Text], drafts: dict[str, Callable[[], Any]], progress: bool = True
) -> dict[str, list[int]]:
    """Return how many passes each text takes, the prompt's included, by name of the draft.

    Args:
        drafts: functions that make a ``draft=`` for every text.
    """
    found: dict[str, list[int]] = {name: [] for name in drafts}
    for text in progress_bar(texts, desc="replay", unit="text", leave=False, disable=not progress):
        for name, make in drafts.items():
            found[name].append(len(accept_lengths(model, text, make())))
    return found


def mean_accept_length(texts: Sequence[Text], passes: Sequence[int]) -> float:
    """Return the tokens a pass (MAT) of texts that took so many passes."""
    return sum(len(text.tokens) - text.prompt for text in texts) / sum(passes)
