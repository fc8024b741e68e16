"""From conversations to training samples."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from typing import TypedDict

from msn_ext.training.data import Conversation, encode, prompt_ids
from msn_ext.training.layouts import NO_LABEL

REPEATED = 16
"""So many trigrams in a row that an answer has had before: from there on it repeats itself."""


class Answer(TypedDict):
    """A model's answer to a conversation's first question.

    Attributes:
        messages: the question.
        tokens, response: the answer, and its text.
        ended: whether it is complete.
    """

    messages: Conversation
    response: str
    tokens: list[int]
    ended: bool


def split(
    conversations: Sequence[Conversation], held_out: int, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """Shuffle conversations and return those to learn and those held out, at most a fifth.

    No first question is in both.
    """
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    held_out = min(held_out, len(shuffled) // 5)
    held = shuffled[:held_out]
    return unasked(shuffled[held_out:], held), held


def unasked(conversations: list[Conversation], others: list[Conversation]) -> list[Conversation]:
    """Return the conversations whose first question none of the others has."""
    asked = {question_key(question_of(other)) for other in others}
    return [found for found in conversations if question_key(question_of(found)) not in asked]


def askable(tokenizer, conversations: list[Conversation], room: int) -> list[Conversation]:
    """Return the conversations that begin with a question, of fewer than ``room`` tokens."""
    asked = [(question_of(conversation), conversation) for conversation in conversations]
    return [
        conversation
        for question, conversation in asked
        if question and len(prompt_ids(tokenizer, question)) < room
    ]


def question_of(conversation: Conversation) -> Conversation:
    """Return the messages before the first answer."""
    answers = [at for at, message in enumerate(conversation) if message["role"] == "assistant"]
    return conversation[: answers[0]] if answers else conversation


def question_key(question: Conversation) -> str:
    """Return a name that only equal questions have."""
    text = json.dumps(question, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def before_repetition(tokens: list[int]) -> list[int]:
    """Return an answer up to where it begins to repeat itself at length, as small models do under
    greedy decoding.

    Learned, the rest would teach to repeat, and repetition passes for fast decoding.
    """
    seen: set[tuple[int, ...]] = set()
    run = 0
    for at, trigram in enumerate(zip(tokens, tokens[1:], tokens[2:])):
        run = run + 1 if trigram in seen else 0
        if run == REPEATED:
            return tokens[: at - REPEATED + 3]
        seen.add(trigram)
    return tokens


def samples_of(
    tokenizer, answered: Sequence[Conversation] | Sequence[Answer], max_length: int
) -> list[dict]:
    """Make samples of conversations, or of a model's answers, those only
    :func:`before_repetition`.

    Returns:
        ``input_ids`` and ``labels`` of each, without those that have no label left.
    """
    samples = []
    for each in answered:
        if isinstance(each, dict):
            samples.append(_sample_of_answer(tokenizer, each, max_length))
        else:
            samples.append(encode(tokenizer, each, max_length))
    return [sample for sample in samples if sample is not None]


def _sample_of_answer(tokenizer, answer: Answer, max_length: int) -> dict | None:
    prompt = prompt_ids(tokenizer, answer["messages"])
    tokens = before_repetition(answer["tokens"])
    if len(prompt) >= max_length or not tokens:
        return None
    return {
        "input_ids": (prompt + tokens)[:max_length],
        "labels": ([NO_LABEL] * len(prompt) + tokens)[:max_length],
    }


def context_of(model) -> int:
    """Return the number of tokens that a model reads at most, as its configuration says."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def pad_of(tokenizer) -> int:
    """Return the token that fills rows up; masked, so that any token will do."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in tokens if token is not None), 0)
