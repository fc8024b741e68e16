"""`msn generate`: its text and its JSON."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from helpers.commands import CONTEXT, KEYS, TEMPLATE, generate_json
from helpers.samples import byte_tokenizer
from msn_ext import cli
from msn_ext.cli import common, loading
from msn_ext.decoding import engine


def test_the_listed_drafts_are_those_of_generate():
    from msn_ext.generation import DRAFTS

    assert tuple(DRAFTS) == common.DRAFTS


@pytest.mark.parametrize("draft", common.DRAFTS)
def test_json(draft, tiny, capsys):
    result = generate_json(
        capsys, "--model", tiny, "--prompt", "hello", "--max-new-tokens", "40", "--draft", draft
    )
    assert set(result) == KEYS
    assert result["draft"] == draft and result["dtype"] == "float32"
    assert sum(result["accept_lengths"]) == result["new_tokens"] == 40
    assert len(result["accept_lengths"]) == result["forward_passes"]
    assert result["mat"] == pytest.approx(40 / result["forward_passes"])
    assert result["tokens_per_second"] > 0
    assert draft != "none" or result["forward_passes"] == 40

    model = LlamaForCausalLM.from_pretrained(tiny).to(result["device"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    prompt = tokenizer("<user>hello<answer>", return_tensors="pt").input_ids.to(result["device"])
    plain = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert result["text"] == tokenizer.decode(plain, skip_special_tokens=True)


def test_text_and_json_agree(tiny, capsys, monkeypatch):
    options = ["--model", tiny, "--max-new-tokens", "40", "--raw"]
    result = generate_json(capsys, *options, "--prompt", "grün")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grün\n".encode())))
    assert cli.main(["generate", *options, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == result["text"] + "\n"


def test_raw_skips_the_chat_template(tiny):
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=CONTEXT), device="cpu")
    tokenizer = byte_tokenizer(TEMPLATE)
    chat, _ = loading.encode(model, tokenizer, "hi", True, 1)
    raw, _ = loading.encode(model, tokenizer, "hi", False, 1)
    assert tokenizer.decode(chat[0]) == "<user>hi<answer>"
    assert tokenizer.decode(raw[0]) == "hi"


def test_a_seed_means_the_same_text(tiny, capsys):
    options = [
        "--model",
        tiny,
        "--prompt",
        "hello",
        "--max-new-tokens",
        "30",
        "--do-sample",
        "--temperature",
        "0.9",
    ]
    texts = [generate_json(capsys, *options, "--seed", seed)["text"] for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


def test_context_bounds_the_answer(tiny, capsys):
    prompt = "x" * (CONTEXT - 5)
    assert cli.main(["generate", "--model", tiny, "--raw", "--json", "--prompt", prompt]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["new_tokens"] <= 5
    assert err == "msn: the model's context leaves room for 5 new tokens\n"


def test_dtype(tiny, capsys):
    options = ["--model", tiny, "--prompt", "hello", "--max-new-tokens", "4", "--dtype", "bfloat16"]
    assert generate_json(capsys, *options)["dtype"] == "bfloat16"


def test_int8_weights(tiny, capsys, monkeypatch):
    """Packed by our own forward pass; the text is the same with and without drafts."""
    packed = []
    pack = engine.pack_in_place
    monkeypatch.setattr(
        engine, "pack_in_place", lambda model, *rest: packed.append(rest[0]) or pack(model, *rest)
    )
    asked = ["--prompt", "hello", "--model", tiny, "--max-new-tokens", "40", "--weights", "int8"]
    texts = [generate_json(capsys, *asked, "--draft", draft)["text"] for draft in ("none", "paper")]
    assert texts[0] == texts[1] and packed == ["int8", "int8"]
