"""Let a model answer, so that training keeps what it says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch

from msn_ext.generation import generate
from msn_ext.jsonl import whole_rows
from msn_ext.paths import naming
from msn_ext.terminal import progress_bar
from msn_ext.training.data import Conversation, prompt_ids

from .samples import Answer, pad_of, question_key, question_of
from .settings import SampleSettings


def self_distill(
    model,
    tokenizer,
    conversations: Iterable[Conversation],
    path: Path,
    *,
    max_new_tokens: int = SampleSettings.max_new_tokens,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Answer]:
    """Return the model's own greedy answers to the first questions, in their order.

    Args:
        path: a file of JSON lines that keeps the answers, one a line; what it has is not asked for
            again, so that an interrupted run can be resumed.
    """
    questions = [question_of(conversation) for conversation in conversations]
    known = cast("list[Answer]", whole_rows(path))
    answers = {question_key(answer["messages"]): answer for answer in known}
    missing = {key: each for each in questions if (key := question_key(each)) not in answers}
    prompts = {key: prompt_ids(tokenizer, question) for key, question in missing.items()}
    # Like lengths together: a batch takes as long as its longest prompt.
    order = sorted(missing, key=lambda key: len(prompts[key]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming(path),
        open(path, "a", encoding="utf-8") as file,
        progress_bar(
            total=len(questions),
            initial=len(questions) - len(order),
            unit="answer",
            desc="self-distill",
            disable=not progress,
        ) as bar,
    ):
        for at in range(0, len(order), batch_size):
            keys = order[at : at + batch_size]
            found = answer(model, tokenizer, [prompts[key] for key in keys], max_new_tokens)
            for key, tokens in zip(keys, found):
                answers[key] = {
                    "messages": missing[key],
                    "response": tokenizer.decode(tokens, skip_special_tokens=True),
                    "tokens": tokens,
                    "ended": tokens[-1:] == [tokenizer.eos_token_id],
                }
                file.write(json.dumps(answers[key], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(keys))
    return [answers[question_key(question)] for question in questions]


def answer(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the tokens of the greedy answer to each of a batch of prompts."""
    pad, width = pad_of(tokenizer), max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [[pad] * gap + prompt for gap, prompt in zip(gaps, prompts)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    out = generate(
        model,
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        pad_token_id=pad,
    )
    rows = out.sequences[:, width:].tolist()
    return [row[: int(lengths.sum())] for row, lengths in zip(rows, out.accept_lengths)]
