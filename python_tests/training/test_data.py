"""Samples from conversations."""

import gzip
import json

import pytest

from helpers.conversations import CHAT, TEMPLATE
from helpers.samples import NONE, byte_tokenizer
from msn_ext.training.data import encode, read_conversations


def learned(tokenizer, sample: dict) -> list[str]:
    """The parts that have labels, which are the tokens there."""
    parts, on = [], False
    for token, label in zip(sample["input_ids"], sample["labels"]):
        assert label in (NONE, token)
        if label != NONE:
            parts.append([]) if not on else None
            parts[-1].append(token)
        on = label != NONE
    return [tokenizer.decode(part) for part in parts]


def test_what_the_assistant_says_is_learned_with_its_end():
    tokenizer = byte_tokenizer(TEMPLATE)
    sample = encode(tokenizer, CHAT, 1000)
    assert learned(tokenizer, sample) == ["A1<eos>", "A2<eos>"]
    assert (
        tokenizer.decode(sample["input_ids"])
        == "<user>Q1<assistant>A1<eos>\n<user>Q2<assistant>A2<eos>\n"
    )
    assert learned(tokenizer, encode(tokenizer, CHAT[:2], 1000)) == ["A1<eos>"]
    assert learned(tokenizer, encode(tokenizer, CHAT, 20)) == ["A"]
    assert encode(tokenizer, CHAT, 19) is None and encode(tokenizer, CHAT[:1], 1000) is None


def test_without_a_template_answers_follow_their_questions():
    tokenizer = byte_tokenizer()
    sample = encode(tokenizer, CHAT, 1000)
    assert tokenizer.decode(sample["input_ids"]) == "Q1A1<eos>Q2A2<eos>"
    assert learned(tokenizer, sample) == ["A1<eos>", "A2<eos>"]


def test_a_template_that_rewrites_the_question_is_refused():
    tokenizer = byte_tokenizer(
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match="chat template does not begin an answered conversation .* begins 'Q1'"
    ):
        encode(tokenizer, CHAT, 1000)


def test_earlier_answers_that_a_template_rewrites_are_left_out():
    """Qwen 3's template takes thoughts out of all answers but the last."""
    template = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}{{ m['content'] }}",
    )
    tokenizer = byte_tokenizer(template)
    with pytest.warns(UserWarning, match="only first answers are learned"):
        sample = encode(tokenizer, CHAT, 1000)
    assert learned(tokenizer, sample) == ["(thinks)A1<eos>"]


def test_conversations_are_read(tmp_path):
    rows = [{"messages": CHAT}, {"prompt": "Q", "response": "A", "more": 1}, {"prompt": "Q"}]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read_conversations(str(tmp_path / name)) == [CHAT, [question, answer], [question]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no conversations"),
        ('{"prompt": "a"}\n{', "line 2 is no JSON"),
        ("[1]", "line 1 is no object"),
        ('{"text": "a"}', "line 1 has neither messages nor a prompt, but text"),
        ('{"messages": [{"role": "user"}]}', "line 1: expected messages with role and content"),
        ('{"messages": ["a"]}', "line 1: expected messages with role and content"),
        ('{"prompt": "a", "response": 3}', "line 1: expected messages with role and content"),
    ],
)
def test_wrong_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_conversations(str(path))
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(b"\x1f\x8b no")
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(str(damaged))
    with pytest.raises(OSError):
        read_conversations(str(tmp_path / "none.jsonl"))
