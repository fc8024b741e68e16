"""The recipe of `msn train`: the model's own answers, what is held out, batches."""

import json

import pytest
import torch

from helpers.conversations import CHAT, DATA, TEMPLATE, WORDS, tiny_llama
from helpers.samples import NONE, byte_tokenizer
from msn_ext import recipe

pytest.importorskip("accelerate")


def test_answers_are_the_model_s_own(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama().double().eval(), byte_tokenizer(TEMPLATE)
    conversations = [[{"role": "user", "content": row["prompt"]}] for row in DATA[:11]] + [CHAT]
    path = tmp_path / "answers.jsonl"
    rows = recipe.self_distill(
        model, tokenizer, conversations, path, max_new_tokens=12, batch_size=4, progress=False
    )
    assert [row["messages"] for row in rows] == [*conversations[:11], CHAT[:1]]
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        plain = model.generate(**ids, do_sample=False, max_new_tokens=12)[
            0, ids["input_ids"].shape[1] :
        ].tolist()
        assert row["tokens"] == plain and row["ended"] == (plain[-1] == 256)
    samples = recipe.samples_of(tokenizer, rows, 1000)
    for sample, row in zip(samples, rows):
        assert [label for label in sample["labels"] if label != NONE] == row["tokens"]
        assert sample["input_ids"][-len(row["tokens"]) :] == row["tokens"]

    # An interrupted run: the last line is cut off; only what is missing is asked for.
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])
    asked, original = [], recipe.generate
    monkeypatch.setattr(
        recipe,
        "generate",
        lambda model, ids, *rest, **options: (
            asked.append(len(ids)),
            original(model, ids, *rest, **options),
        )[1],
    )
    again = recipe.self_distill(
        model, tokenizer, conversations, path, max_new_tokens=12, batch_size=4, progress=False
    )
    assert again == rows and asked == [1]
    row = rows[0] | {
        "response": "a\u2028b\x85c\x0b"
    }  # ends of lines to str.splitlines, not to JSON lines
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert recipe.self_distill(model, tokenizer, conversations[:1], path, progress=False) == [row]
    path.write_text("{\n")
    with pytest.raises(ValueError, match="answers.jsonl is damaged"):
        recipe.self_distill(
            model, tokenizer, conversations, path, max_new_tokens=12, progress=False
        )


@torch.no_grad()
@pytest.mark.parametrize("period", [1, 2, 5, 30])
def test_answers_are_learned_until_they_go_round_in_circles(period):
    fresh, circles = list(range(100, 150)), list(range(period)) * 40
    # The first round is learned, and two tokens of the next, which could still go elsewhere.
    assert recipe.before_circling(fresh + circles) == fresh + circles[: period + 2]
    assert recipe.before_circling(fresh + fresh[:17]) == fresh + fresh[:17], "a quotation"
    assert recipe.before_circling([]) == []


def test_no_question_is_learned_and_held_out():
    conversations = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": str(n)}]
        for n in range(3)
        for word in WORDS
    ]
    learned, held = recipe.split(conversations, 4)
    assert len(held) == 4 and learned
    assert not {messages[0]["content"] for messages in learned} & {
        messages[0]["content"] for messages in held
    }


def test_batches_are_of_like_lengths_and_the_same_for_a_run_that_goes_on():
    lengths = [(7 * i) % 50 for i in range(200)]

    def batches(epoch: int) -> list[list[int]]:
        sampler = recipe.ByLength(lengths, 4, 3)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(200)) and len(sampler) == 200
        return [[lengths[i] for i in order[at : at + 4]] for at in range(0, 200, 4)]

    assert batches(1) == batches(1) != batches(0)
    assert sum(4 * max(batch) - sum(batch) for batch in batches(0)) < 0.1 * sum(lengths)
