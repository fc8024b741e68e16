"""Read conversations from files, and make training samples of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from msn_ext.jsonl import rows

from .layouts import NO_LABEL

Conversation = list[dict[str, str]]
"""Its messages: ``role`` and ``content`` of every message, as chat templates take them."""


def read_conversations(source: str) -> list[Conversation]:
    """Return the conversations of a JSON-lines file (also ``.gz``), or of the split ``train`` of a
    dataset on the hub, one a row.

    A row has ``messages``, or ``prompt`` and ``response``; without a response the conversation ends
    with the prompt, to be answered by ``--self-distill``.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged or has other rows; names the file and the line.
    """
    found = [_conversation(row, place) for place, row in _rows(source)]
    if not found:
        raise ValueError(f"{source} holds no conversations")
    return found


def _rows(source: str) -> Iterator[tuple[str, dict]]:
    path = Path(source)
    if not path.exists() and "/" in source and path.suffix not in (".jsonl", ".json", ".gz"):
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"{source} is no file, and for a dataset of the hub: pip install datasets"
            ) from error
        yield from (
            (f"{source}: row {at}", row)
            for at, row in enumerate(load_dataset(source, split="train"), 1)
        )
        return
    yield from rows(source)


def _conversation(row: dict, place: str) -> Conversation:
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
        if row.get("response") is not None:
            messages.append({"role": "assistant", "content": row["response"]})
    if not messages or not isinstance(messages, list):
        raise ValueError(
            f"{place} has neither messages nor a prompt, but {', '.join(row) or 'nothing'}"
        )
    for message in messages:
        if not (
            isinstance(message, dict)
            and all(isinstance(message.get(key), str) for key in ("role", "content"))
        ):
            raise ValueError(
                f"{place}: expected messages with role and content as text, got"
                f" {json.dumps(message)[:80]}"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def encode(tokenizer, conversation: Conversation, max_length: int) -> dict[str, list[int]] | None:
    """Make a sample of a conversation: what the assistant says has labels, up to and including its
    end-of-text token.

    Args:
        tokenizer: with a chat template; without one, the contents follow each other, an end-of-text
            token after each answer.
        max_length: tokens that are kept, from the beginning.

    Returns:
        ``input_ids`` and ``labels``, up to where the template would write an answer in another way
        once another one follows (with a warning); None where no label is left.

    Raises:
        ValueError: the chat template writes a prompt in another way once it is answered.
    """
    ids: list[int] = []
    labels: list[int] = []
    answers = [at for at, message in enumerate(conversation) if message["role"] == "assistant"]
    for at in answers:
        prompt = prompt_ids(tokenizer, conversation[:at])
        whole = _ids(tokenizer, conversation[: at + 1])
        if prompt[: len(ids)] != ids:
            message = (
                "the chat template writes earlier answers in another way than the last; only first"
                " answers are learned"
            )
            warnings.warn(message, stacklevel=2)
            break
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                "the chat template does not begin an answered conversation as it begins the"
                " question, so that labels have no place; the conversation begins"
                f" {conversation[0]['content'][:60]!r}"
            )
        answer = whole[len(prompt) :]
        stop = tokenizer.eos_token_id
        # A line feed may follow the end-of-text token.
        size = len(answer) - answer[::-1].index(stop) if stop in answer else len(answer)
        labels += [NO_LABEL] * (len(prompt) - len(ids))
        labels += answer[:size] + [NO_LABEL] * (len(answer) - size)
        ids = whole
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == NO_LABEL for label in labels):
        return None
    return {"input_ids": ids, "labels": labels}


def prompt_ids(tokenizer, conversation: Conversation) -> list[int]:
    """Return the tokens of a conversation up to where the assistant's next answer begins."""
    if tokenizer.chat_template is None:
        return _ids(tokenizer, conversation)
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]


def _ids(tokenizer, conversation: Conversation) -> list[int]:
    if tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    ids: list[int] = []
    for at, message in enumerate(conversation):
        ids += tokenizer(message["content"], add_special_tokens=at == 0)["input_ids"]
        if message["role"] == "assistant" and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return ids


class Collate:
    """Makes a batch of samples, padded on the right to the longest; labels are -100 there."""

    def __init__(self, pad_token_id: int):
        self._pad = pad_token_id

    def __call__(self, samples: list[dict]) -> dict:
        import torch

        width = max(len(sample["input_ids"]) for sample in samples)
        ids = torch.full((len(samples), width), self._pad)
        labels, mask = torch.full_like(ids, NO_LABEL), torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            ids[row, :size] = torch.tensor(sample["input_ids"])
            labels[row, :size] = torch.tensor(sample["labels"])
            mask[row, :size] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
