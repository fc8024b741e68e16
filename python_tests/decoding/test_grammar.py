"""Grammars: what they forbid never comes, the text is plain decoding's, and what is bound to come
costs no passes of its own.
"""

import itertools
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import msn_ext
from helpers.conversations import repeating_llama
from helpers.drafters import RandomDrafter, random_tree
from helpers.families import tiny_model
from helpers.samples import byte_tokenizer
from msn_ext import generate

xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed")

CASES = int(os.environ.get("MSN_GRAMMAR_CASES", "30"))
VOCAB = 340  # more than the tokenizer's: such a token never comes
PERSON = dict(
    type="object",
    properties=dict(
        name=dict(enum=["a cat", "a car"]),
        age=dict(type="integer", minimum=10, maximum=99),
        alive=dict(type="boolean"),
    ),
    required=["name", "age", "alive"],
    additionalProperties=False,
)


@pytest.fixture(scope="module")
def tokenizer():
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    text = ['{"name": "a cat", "age": 31, "alive": true}, {"tags": ["a", "b"]}', "the cat sat"]
    own.train_from_iterator(
        text * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def prompts(rng: random.Random, rows: int):
    """Left-padded prompts and their mask."""
    ids = torch.tensor([[rng.randrange(3, 260) for _ in range(6)] for _ in range(rows)])
    mask = torch.ones_like(ids)
    for b in range(1, rows):
        mask[b, : rng.randrange(5)] = 0
    return ids * mask, mask


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    kinds = ["string", "integer", "boolean", "null", "enum"] + ["object", "array"] * (depth > 0)
    match kind := rng.choice(kinds):
        case "string":
            return dict(type=kind, maxLength=rng.randint(0, 5))
        case "integer":
            return dict(type=kind, minimum=rng.randint(-30, 3), maximum=rng.randint(4, 200))
        case "enum":
            return dict(enum=rng.sample(["the cat", "the car", "sat", 1, None, True], 3))
        case "object":
            names = rng.sample(["name", "age", "tags", "alive", "x y"], rng.randint(1, 3))
            return dict(
                type=kind,
                properties={name: random_schema(rng, depth - 1) for name in names},
                required=names[: rng.randint(0, 3)],
                additionalProperties=False,
            )
        case "array":
            items = random_schema(rng, depth - 1)
            return dict(type=kind, items=items, minItems=rng.randint(0, 2), maxItems=3)
    return dict(type=kind)


def random_regex(rng: random.Random, depth: int = 3) -> str:
    if not depth:
        return rng.choice(["the", "cat", "[a-c]", "[0-9]", "x", " ", "é", "name"])
    parts = [random_regex(rng, depth - 1) for _ in range(2)]
    return rng.choice(
        [
            "".join(parts),
            f"({'|'.join(parts)})",
            f"({parts[0]})?{parts[1]}",
            f"({parts[0]}){{1,3}}",
        ]
    )


def plain_xgrammar(grammar, input_ids, scores, prompt: int):
    """The oracle: a new matcher that reads the whole text anew, and xgrammar's own mask."""
    found = torch.full_like(scores, -torch.inf)
    info = grammar.compiled.tokenizer_info
    for row, text in enumerate(input_ids.tolist()):
        matcher = xgrammar.GrammarMatcher(grammar.compiled)
        if not all(token != 2 and matcher.accept_token(token) for token in text[prompt:]):
            found[row, 2] = 0  # it has ended
            continue
        mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
        matcher.fill_next_token_bitmask(mask)
        own = scores[row : row + 1, : info.vocab_size].clone()
        xgrammar.apply_token_bitmask_inplace(own, mask, backend="torch_native")
        found[row, : info.vocab_size] = own[0]
    return found


@pytest.mark.parametrize("case", range(CASES))
def test_random_grammars_give_plain_decodings_text(tokenizer, case):
    rng = random.Random(case)
    pattern = random_regex(rng)
    given = dict(regex=pattern) if case % 2 else dict(json_schema=random_schema(rng))
    grammar = msn_ext.grammar(tokenizer=tokenizer, **given)
    model = tiny_model(rng.choice(["llama", "gpt2"]), case, vocab_size=VOCAB)
    ids, mask = prompts(rng, rng.randint(1, 3))
    options = dict(attention_mask=mask, max_new_tokens=40, eos_token_id=2, pad_token_id=0)
    greedy = options | dict(do_sample=False)

    def oracle(input_ids, scores):
        return plain_xgrammar(grammar, input_ids, scores, ids.shape[1])

    expected = model.generate(ids, logits_processor=[oracle], **greedy)
    assert torch.equal(model.generate(ids, logits_processor=[grammar], **greedy), expected)
    drafts = ["none", rng.choice(["auto", "paper", "suffix", "recycling", "lookahead"])]
    drafts.append(rng.choice([random_tree, RandomDrafter])(rng))
    for draft in drafts:
        out = generate(model, ids, draft=draft, logits_processor=[grammar], **greedy)
        assert torch.equal(out, expected), (given, draft)
    sampled = options | dict(do_sample=True, temperature=2.0, top_k=20)
    outputs = []
    for draft, processor in ((drafts[1], grammar), (drafts[2], grammar), ("none", oracle)):
        torch.manual_seed(case)
        processor = msn_ext.stateless(processor) if processor is oracle else processor
        outputs.append(generate(model, ids, draft=draft, logits_processor=[processor], **sampled))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[2]), given
    for text in (expected, *outputs):
        for row in text[:, ids.shape[1] :].tolist():
            if 2 not in row:
                continue
            answer = tokenizer.decode(row[: row.index(2)], clean_up_tokenization_spaces=False)
            if case % 2:
                assert re.fullmatch(pattern, answer)
            else:
                json.loads(answer, strict=False)  # xgrammar's strings may have control characters


def test_what_is_bound_to_come_costs_no_passes(tokenizer):
    """A third of plain's passes at most, where most of the answer is the schema's."""
    grammar = msn_ext.grammar(json_schema=PERSON, tokenizer=tokenizer)
    model = tiny_model("llama", 3, vocab_size=VOCAB)
    ids, _ = prompts(random.Random(0), 1)
    options = dict(do_sample=False, max_new_tokens=90, eos_token_id=2, pad_token_id=0)
    passes = {}
    for draft in ("none", "auto", "suffix", "jacobi"):
        out = generate(
            model,
            ids,
            draft=draft,
            logits_processor=[grammar],
            return_dict_in_generate=True,
            **options,
        )
        answer = json.loads(tokenizer.decode(out.sequences[0, 6:], skip_special_tokens=True))
        assert list(answer) == ["name", "age", "alive"] and 10 <= answer["age"] <= 99
        passes[draft] = len(out.accept_lengths[0])
    assert all(passes[d] <= passes["none"] / 2 for d in ("auto", "suffix", "jacobi")), passes


def test_a_call_goes_on_from_the_end_of_another(tokenizer):
    """One object in several calls begins anew in each, also where the prompt is the last answer."""
    grammar = msn_ext.grammar(ebnf='root ::= ("a" | "b") ("c" | "d")', tokenizer=tokenizer)
    model = tiny_model("llama", 1, vocab_size=VOCAB)
    ids, _ = prompts(random.Random(0), 1)
    for decode in (model.generate, lambda *args, **kwargs: generate(model, *args, **kwargs)):
        text = ids
        for _ in range(3):
            options = dict(do_sample=False, max_new_tokens=1, eos_token_id=2, pad_token_id=0)
            text = decode(text, logits_processor=[grammar], **options)
            assert tokenizer.decode(text[0, -1:]) in ("a", "b")


def test_the_documents_examples(tokenizer):
    page = Path(__file__).parents[2] / "docs" / "grammars.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    model = tiny_model("llama", 1, vocab_size=VOCAB)
    model.generation_config.eos_token_id = 2
    names = dict(model=model, tokenizer=tokenizer, ids=torch.tensor([[5, 6, 7]]))
    for block in blocks:
        exec(block, names)
    assert re.match(r'\{"age": -?\d', names["answer"])
    options = dict(max_new_tokens=20, logits_processor=[names["no_repeat"]])
    row = generate(model, names["ids"], **options)[0, 2:].tolist()
    assert all(a != b for a, b in itertools.pairwise(row))


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(), "grammar got nothing; expected one of json_schema, regex, ebnf"),
        (dict(regex="a", ebnf="b"), "grammar got regex, ebnf; expected one"),
        (dict(regex="("), "regex is no grammar for xgrammar"),
        (dict(json_schema="{"), "json_schema is no grammar for xgrammar"),
        (dict(ebnf="root ::= other"), "ebnf is no grammar for xgrammar"),
        (dict(regex="a", tokenizer=None), "tokenizer is a NoneType without eos_token_id"),
    ],
)
def test_what_is_no_grammar_is_refused(tokenizer, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        msn_ext.grammar(**dict(tokenizer=tokenizer) | given)


@pytest.mark.parametrize("draft", ["auto", "paper", "lookup"])
def test_a_text_that_goes_on_after_the_grammars_end_is_plain_decodings(draft):
    """The model's end of text may be another token than the grammar's, which then comes again."""
    tokenizer = byte_tokenizer("")
    model = repeating_llama(200)
    options = dict(
        tokenizer("Once upon a time", return_tensors="pt"),
        max_new_tokens=20,
        logits_processor=[msn_ext.grammar(regex="(ab|cd){2}!", tokenizer=tokenizer)],
    )
    plain = generate(model, draft="none", **options)
    assert plain[0, -3:].tolist() == [tokenizer.eos_token_id] * 3
    assert torch.equal(generate(model, draft=draft, **options), plain)


@pytest.mark.parametrize("draft", ["none", "paper", "lookup"])
def test_scores_after_a_row_that_another_criterion_ended(draft):
    """In the middle of the grammar, which then forbids the padding, as in plain decoding."""
    tokenizer = byte_tokenizer("")
    model = repeating_llama(200).double()
    end = tokenizer.eos_token_id
    ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(1))

    def smallest(ids, scores, **kwargs):
        sums = ids.sum(1)
        return (sums == sums.min()) & (ids.shape[1] % 7 == 0)

    def options():
        return dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=90,
            eos_token_id=end,
            pad_token_id=end,
            return_dict_in_generate=True,
            output_scores=True,
            stopping_criteria=[smallest],
            logits_processor=[msn_ext.grammar(regex="[a-f ]{85}", tokenizer=tokenizer)],
        )

    want = model.generate(**options(), do_sample=False)
    out = generate(model, draft=draft, engine="torch", **options())
    assert torch.equal(out.sequences, want.sequences) and len(out.scores) == len(want.scores)
    new_tokens = (want.sequences[:, 9:] != end).sum(1)
    assert len(new_tokens.unique()) > 1, "rows end apart"
    for ours, theirs in zip(out.scores, want.scores):
        torch.testing.assert_close(ours, theirs)
