"""Answers that follow a grammar: equal to plain decoding with the same grammar, never a token that
it forbids.
"""

import json
import os
import random
import re

import pytest
import torch

import msn_ext
from helpers.conversations import repeating_llama
from helpers.samples import byte_tokenizer

xgrammar = pytest.importorskip("xgrammar", reason="msn_ext[grammar] is not installed")
CASES = int(os.environ.get("MSN_GRAMMAR_CASES", 24))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["first of them", "second of them"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
DRAFTS = "none", "auto", "paper", "lookup", "recycling"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer("")


@pytest.fixture(scope="module")
def model(tokenizer):
    model = repeating_llama(400).double()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model


def prompts(rows: int, seed: int, tokenizer) -> dict[str, torch.Tensor]:
    """Ragged prompts, left-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for b in range(1, rows):
        mask[b, : 2 * b] = 0
        ids[b, : 2 * b] = tokenizer.eos_token_id
    return dict(input_ids=ids, attention_mask=mask)


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    kinds = ["string", "integer", "boolean", "enum", "const", "null"]
    kind = rng.choice([*kinds, "object", "array"] if depth else kinds)
    if kind == "object":
        names = rng.sample(["a", "bee", "name", "the value", "x"], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": names[: rng.randint(0, len(names))],
            "additionalProperties": False,
        }
    if kind == "array":
        return {
            "type": "array",
            "items": random_schema(rng, depth - 1),
            "minItems": rng.randint(0, 2),
            "maxItems": 3,
        }
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 5)}
    if kind == "enum":
        return {"enum": rng.sample(["north", "east", "no one", "nothing", 3, True], 3)}
    return {"const": rng.choice(["always this", 42])} if kind == "const" else {"type": kind}


def random_regex(rng: random.Random) -> str:
    parts = ["[a-f]{1,4}", "(yes|yellow|no)", r"\d{2,3}", "x*", "(ab)+", "constant text", "[^x]?"]
    return "".join(rng.choice(parts) for _ in range(rng.randint(1, 4))) + "!"


def follows(kind: str, source, text: str) -> bool:
    if kind == "regex":
        return re.fullmatch(source, text) is not None
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(text, strict=False), source)  # xgrammar lets controls stand
    return True


@pytest.mark.parametrize("case", range(CASES))
def test_an_answer_is_that_of_plain_decoding(case, model, tokenizer):
    """Greedy: of ``model.generate`` with an xgrammar matcher of its own. Sampled: of draft="none"
    after the same seed. One grammar object for all calls.
    """
    rng = random.Random(case)
    kind = rng.choice(["json_schema", "regex"])
    source = random_schema(rng) if kind == "json_schema" else random_regex(rng)
    ours = msn_ext.grammar(**{kind: source}, tokenizer=tokenizer)
    inputs, draft = prompts(rng.choice([1, 1, 2, 3]), case, tokenizer), rng.choice(DRAFTS[1:])
    engine = rng.choice(["native", "torch"])
    options = dict(inputs, max_new_tokens=60)
    grammar = {
        "json_schema": lambda: xgrammar.Grammar.from_json_schema(json.dumps(source)),
        "regex": lambda: xgrammar.Grammar.from_regex(source),
    }[kind]()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(grammar)
    theirs = xgrammar.contrib.hf.LogitsProcessor(compiled)
    want = model.generate(**options, logits_processor=[theirs], do_sample=False)
    options["logits_processor"] = [ours]
    assert torch.equal(
        msn_ext.generate(model, draft=draft, engine="torch", do_sample=False, **options), want
    )
    found = {}
    for each in ("none", draft):
        torch.manual_seed(case)
        found[each] = msn_ext.generate(
            model, draft=each, engine=engine, do_sample=True, top_k=0, **options
        )
    assert torch.equal(found["none"], found[draft])
    for row in (*want, *found[draft]):
        new = row[inputs["input_ids"].shape[1] :].tolist()
        if tokenizer.eos_token_id in new:
            text = tokenizer.decode(new[: new.index(tokenizer.eos_token_id)])
            assert follows(kind, source, text), text


def test_tokens_without_a_choice_are_guesses_that_cannot_be_wrong(model, tokenizer):
    grammar = msn_ext.grammar(json_schema=SCHEMA, tokenizer=tokenizer)
    options = dict(
        prompts(1, 0, tokenizer),
        max_new_tokens=120,
        logits_processor=[grammar],
        return_dict_in_generate=True,
    )
    plain, drafted = (
        msn_ext.generate(model, draft=draft, **options) for draft in ("none", "lookup")
    )
    assert torch.equal(plain.sequences, drafted.sequences)
    passes, tokens = len(drafted.accept_lengths[0]), len(plain.accept_lengths[0])
    assert tokens > 40 and passes < 0.6 * tokens, (passes, tokens)


def test_a_grammar_is_not_replayed_from_the_start(model, tokenizer, monkeypatch):
    """Matchers accept a few tokens a node, however long the answer is; also of a batch."""
    accepted = []
    accept = xgrammar.GrammarMatcher.accept_token
    monkeypatch.setattr(
        xgrammar.GrammarMatcher,
        "accept_token",
        lambda self, token, **options: accepted.append(token) or accept(self, token, **options),
    )
    for rows in (1, 3):
        accepted.clear()
        grammar = msn_ext.grammar(regex="[a-z ]{300}", tokenizer=tokenizer)
        options = dict(prompts(rows, 1, tokenizer), max_new_tokens=150)
        out = msn_ext.generate(
            model,
            draft=msn_ext.BestFirst(8),
            logits_processor=[grammar],
            return_dict_in_generate=True,
            **options,
        )
        nodes = 8 * sum(len(row) for row in out.accept_lengths)
        assert len(accepted) < 6 * nodes, "replayed, it would be some 75 times the nodes"


def test_one_object_serves_plain_generate_again_and_again(model, tokenizer):
    grammar = msn_ext.grammar(regex="(ab|cd){3,9}!", tokenizer=tokenizer)
    for seed in range(3):
        options = dict(prompts(2, seed, tokenizer), max_new_tokens=30, logits_processor=[grammar])
        plain = model.generate(**options, do_sample=False)
        assert torch.equal(msn_ext.generate(model, engine="torch", **options), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got none of them; expected one of"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "got regex, ebnf; expected one of"),
        ({"regex": "(a"}, "regex cannot be read"),
        ({"json_schema": "{"}, "json_schema cannot be read"),
        ({"ebnf": "root = a"}, "ebnf cannot be read"),
    ],
)
def test_wrong_grammars_are_refused(arguments, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        msn_ext.grammar(**arguments, tokenizer=tokenizer)
