"""The page of an answer: its data are the recording, its tokens are text, it needs nothing else."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers.answers import STRANGE, Words, random_answer
from helpers.families import VOCAB, tiny_model
from msn_ext import generate
from msn_ext.explain import as_html, record_answer
from msn_ext.explain.html import page_data, pieces, shown
from msn_ext.explain.outline import token_text


class Parsed(HTMLParser):
    """A page's elements, as [name, attributes, its text up to the next tag]."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.inside = [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.elements[-1][2] += data

    def all(self, tag: str) -> list:
        return [element for element in self.elements if element[0] == tag]

    def text(self, identity: str) -> str:
        (found,) = (text for _, attrs, text in self.elements if attrs.get("id") == identity)
        return found


@pytest.mark.parametrize("seed", range(20))
def test_the_data_are_the_recording(seed):
    answer = random_answer(seed)
    data = json.loads(Parsed(as_html(answer, Words(), number=2)).text("answer"))
    assert (data["first"], data["least"], data["opening"]) == (2, 0, len(answer.opening))
    assert data["text"] == [f"w{token}" for token in answer.tokens]
    assert len(data["passes"]) == len(answer.steps)
    for values, step in zip(data["passes"], answer.steps):
        found = dict(zip(data["fields"], values, strict=True))
        for field in ("tokens", "parents", "sources", "path", "bonus", "kept"):
            assert found[field] == getattr(step, field)
        assert found["probability"] == pytest.approx(step.probability, rel=0.005)
        assert found["expected"] == pytest.approx(step.expected, abs=0.006)
        assert f"gained {step.accept_length} token" in found["outcome"]
        for token in [*step.tokens, step.bonus]:
            assert data["tokens"][str(token)] == f"w{token}"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_is_what_plain_decoding_says(family):
    model = tiny_model(family, 0)
    model.generation_config.eos_token_id = None
    # a prompt that repeats itself, so that its own pass may gain more than one token
    prompt = torch.randint(3, VOCAB, (1, 6), generator=torch.Generator().manual_seed(1)).tile(1, 2)
    plain = generate(model, prompt, max_new_tokens=40, draft="none")[0].tolist()
    answer = record_answer(model, prompt, 16, 40)
    assert [*answer.prompt, *answer.tokens] == plain
    assert answer.prompt == prompt[0].tolist() and answer.steps
    assert len(answer.opening) + sum(step.kept for step in answer.steps) == 40


@pytest.mark.parametrize("word", STRANGE, ids=lambda word: ascii(word)[:30])
def test_tokens_are_never_markup(word):
    answer = random_answer(3)
    usual = Parsed(as_html(answer, Words(), "heading"))
    page = as_html(answer, Words([word] * 3000), word)
    page.encode()  # no half of a character
    found = Parsed(page)
    assert [e[:2] for e in found.elements if e[0] not in ("meta", "style")] == [
        e[:2] for e in usual.elements if e[0] not in ("meta", "style")
    ]
    assert found.all("script")[1][2] == usual.all("script")[1][2]
    assert found.all("h1")[0][2] == shown(word) and found.text("prompt").count(shown(word)) > 0
    block = found.text("answer")
    assert block.isascii() and not re.search(r"[<>&\x00-\x1f]", block)
    data = json.loads(block)
    words = Words([word] * 3000)
    assert data["tokens"] == {token: token_text(words, int(token)) for token in data["tokens"]}
    assert "".join(data["text"]) == shown(word * len(answer.tokens))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\r\nb\tc\n", "a\nb\tc\n"),
        ("\x00\x1b[31m\x7f\x85\r", "\\x00\\x1b[31m\\x7f\\x85\\r"),
        ("\u202eabc\u2066\u200f", "\\u202eabc\\u2066\\u200f"),
        ("\ud83d", "\\ud83d"),
        ("\u2028\ufeff\uffff", "\\u2028\\ufeff\\uffff"),
        ("שלום\u00a0日本", "שלום\u00a0日本"),
        ("👩\u200d🔬 می\u200cخواهم", "👩\u200d🔬 می\u200cخواهم"),
    ],
)
def test_what_commands_a_page_is_written_out(text, expected):
    assert shown(text) == expected


def bytes_tokenizer():
    """Token i is the byte i."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_characters_of_several_tokens():
    text = "a é日😀\n"
    tokens = list(text.encode())
    found = pieces(bytes_tokenizer(), tokens)
    assert found == ["a", " ", "", "é", "", "", "日", "", "", "", "😀", "\n"]
    before = list("schön ".encode())
    assert pieces(bytes_tokenizer(), tokens, before) == found
    broken = pieces(bytes_tokenizer(), [*b"ab", 0xE6, 0x97])  # the answer ends in a character
    assert "".join(broken[:2]) == "ab" and set(broken[-1]) == {"\ufffd"}


def test_spaces_that_a_tokenizer_drops_at_the_beginning():
    class Dropping(Words):
        def decode(self, tokens, **_):
            return super().decode(tokens).removeprefix(" ")

    assert pieces(Dropping([" one", " two"]), [1, 0], [0]) == [" two", " one"]


def test_it_needs_nothing_else_and_may_not():
    page = as_html(random_answer(0), Words())
    found = Parsed(page)
    assert not found.all("img") + found.all("iframe") + found.all("base")
    assert [attrs for _, attrs, _ in found.all("link")] == [{"rel": "icon", "href": "data:,"}]
    for _, attrs, _ in found.elements:
        assert not {"src", "srcset", "action", "style"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert set(re.findall(r"https?://[^\"' )]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page and "@import" not in page and "innerHTML" not in page
    (policy,) = (
        attrs["content"]
        for _, attrs, _ in found.all("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    (style,), (_, script) = found.all("style"), found.all("script")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for (_, _, code), kind in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_a_long_answer_is_a_small_page():
    answer = random_answer(0, passes=600, nodes=64)
    assert len(answer.steps) == 600 and min(len(step.tokens) for step in answer.steps) == 64
    assert len(as_html(answer, Words())) < 2_000_000


@pytest.mark.parametrize("number", [0, 6, -1])
def test_no_such_pass(number):
    answer = random_answer(0)
    with pytest.raises(ValueError, match=f"number is {number}; expected a pass from 1 to 5"):
        as_html(answer, Words(), number=number)


def test_names_of_fields_are_those_of_the_passes():
    data = page_data(random_answer(1), Words())
    assert all(len(values) == len(data["fields"]) for values in data["passes"])
