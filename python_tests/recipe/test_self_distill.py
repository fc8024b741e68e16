"""The model's own answers, and a file of them that is cut off."""

import json

import pytest

import msn_ext
from helpers.conversations import CHAT, DATA, TEMPLATE, tiny_llama
from helpers.samples import NONE, byte_tokenizer
from msn_ext.recipe.samples import samples_of
from msn_ext.recipe.self_distill import self_distill


def test_answers_are_the_model_s_own(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama().double().eval(), byte_tokenizer(TEMPLATE)
    conversations = [[{"role": "user", "content": row["prompt"]}] for row in DATA[:11]] + [CHAT]
    path = tmp_path / "answers.jsonl"
    answers = self_distill(
        model, tokenizer, conversations, path, max_new_tokens=12, batch_size=4, progress=False
    )
    assert [answer["messages"] for answer in answers] == [*conversations[:11], CHAT[:1]]
    for answer in answers:
        ids = tokenizer.apply_chat_template(
            answer["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        plain = model.generate(**ids, do_sample=False, max_new_tokens=12)[
            0, ids["input_ids"].shape[1] :
        ].tolist()
        assert answer["tokens"] == plain and answer["ended"] == (plain[-1] == 256)
    samples = samples_of(tokenizer, answers, 1000)
    for sample, answer in zip(samples, answers):
        assert [label for label in sample["labels"] if label != NONE] == answer["tokens"]
        assert sample["input_ids"][-len(answer["tokens"]) :] == answer["tokens"]

    # An interrupted run: the last line is cut off; only what is missing is asked for.
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])
    asked, original = [], msn_ext.generate
    monkeypatch.setattr(
        "msn_ext.recipe.self_distill.generate",
        lambda model, ids, *rest, **options: (
            asked.append(len(ids)),
            original(model, ids, *rest, **options),
        )[1],
    )
    again = self_distill(
        model, tokenizer, conversations, path, max_new_tokens=12, batch_size=4, progress=False
    )
    assert again == answers and asked == [1]
    answer = answers[0] | {
        "response": "a\u2028b\x85c\x0b"
    }  # ends of lines to str.splitlines, not to JSON lines
    path.write_text(json.dumps(answer, ensure_ascii=False) + "\n")
    assert self_distill(model, tokenizer, conversations[:1], path, progress=False) == [answer]
    path.write_text("{\n")
    with pytest.raises(ValueError, match="answers.jsonl is damaged"):
        self_distill(model, tokenizer, conversations, path, max_new_tokens=12, progress=False)
