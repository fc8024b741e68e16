"""`output_scores` and `output_logits` are plain decoding's, row by row and token by token."""

import random

import pytest
import torch

from helpers import runners
from helpers.drafters import RandomDrafter, prompts, random_tree
from helpers.families import FAMILIES, tiny_model
from msn_ext import generate

OUT = dict(pad_token_id=0, return_dict_in_generate=True, output_scores=True, output_logits=True)
PROCESSED = {
    "none": {},
    "on all nodes": dict(repetition_penalty=1.3, suppress_tokens=[7]),
    "by their texts": dict(no_repeat_ngram_size=3, min_new_tokens=5, repetition_penalty=1.2),
}


def is_exact(family: str, engine: str) -> bool:
    """Transformers computes nothing in float32 that the forward pass computes otherwise: rotary
    embeddings and norms (native), soft-max (our attention).
    """
    if engine == "torch":
        return not family.startswith(("gemma", "deepseek", "gptj", "codegen"))
    return family in ("gpt2", "gpt_neox", "opt", "starcoder2")


def plain_scores(model, ids, new: torch.Tensor, monkeypatch, **options):
    """What transformers says of a sampled text: its draws are the new tokens [B, n]."""
    columns = iter(new.T)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda probs, num_samples: next(columns)[:, None])
        out = model.generate(ids, **options)
    assert torch.equal(out.sequences[:, ids.shape[1] :], new)
    return out


def assert_same(found: tuple, expected: tuple, exact: bool) -> None:
    """Float64 rounded to float32, as transformers has them: at most a last bit is another one."""
    found, expected = torch.stack(found), torch.stack(expected)
    assert found.dtype == expected.dtype == torch.float32 and found.shape == expected.shape
    if not exact:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-9)
    assert (found == expected).double().mean() > 0.999


@pytest.mark.parametrize("processors", PROCESSED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral-window", "mixtral"])
def test_greedy(family, processors, each_engine):
    """Rows that end apart, and the padding after them."""
    apart, exact = 0, is_exact(family, each_engine)
    for seed in range(3):
        rng = random.Random(f"{family}{seed}")
        model = tiny_model(family, seed)
        ids, mask = prompts(rng, 1 + seed, padded=family != "gemma3")
        options = OUT | PROCESSED[processors]
        options |= dict(attention_mask=mask, max_new_tokens=25, eos_token_id=[2, 5, 11, 4, 8, 17])
        plain = model.generate(ids, do_sample=False, **options)
        for draft in ("auto", "paper", random_tree(rng), RandomDrafter(rng)):
            out = generate(model, ids, do_sample=False, draft=draft, **options)
            assert torch.equal(out.sequences, plain.sequences)
            assert_same(out.scores, plain.scores, exact)
            assert_same(out.logits, plain.logits, exact)
        apart += len({int(accepts.sum()) for accepts in out.accept_lengths}) > 1
    assert apart, "rows should end apart"


@pytest.mark.parametrize("processors", PROCESSED)
def test_sampled(processors, each_engine, monkeypatch):
    model = tiny_model("gpt2", 2)
    for seed in range(3):
        ids, mask = prompts(random.Random(seed), 1 + seed)
        options = OUT | PROCESSED[processors]
        options |= dict(attention_mask=mask, max_new_tokens=25, eos_token_id=[2, 5, 11, 4, 8, 17])
        options |= dict(do_sample=True, temperature=0.7, top_k=9)
        torch.manual_seed(seed)
        out = generate(model, ids, **options)
        new = out.sequences[:, ids.shape[1] :]
        plain = plain_scores(model, ids, new, monkeypatch, **options)
        assert_same(out.scores, plain.scores, exact=True)
        assert_same(out.logits, plain.logits, exact=True)
        assert torch.stack(out.scores).isinf().any() and not torch.stack(out.logits).isinf().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, each_engine):
    model, ids = tiny_model(family, 1), torch.tensor([[5, 9, 4, 7]])
    options = OUT | dict(do_sample=False, max_new_tokens=30, eos_token_id=None)
    plain, out = model.generate(ids, **options), generate(model, ids, **options)
    assert_same(out.logits, plain.logits, is_exact(family, out.engine))
    assert_same(out.scores, plain.scores, is_exact(family, out.engine))


@pytest.mark.parametrize("end", [None, 2])
def test_rows_that_a_criterion_ends(end, each_engine):
    """Inside accepted paths; without an end of text all go on until the last one has ended."""
    model = tiny_model("gpt2", 1)
    ids, mask = prompts(random.Random(1), 3)
    options = OUT | dict(do_sample=False, max_new_tokens=50, eos_token_id=end, attention_mask=mask)
    free = model.generate(ids, **options).sequences
    stops = torch.tensor([int(row[ids.shape[1] + at]) for row, at in zip(free, (3, 9, 20))])
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.isin(ids[:, -1], stops)]
    plain = model.generate(ids, **options)
    out = generate(model, ids, **options)
    assert torch.equal(out.sequences, plain.sequences)
    assert_same(out.logits, plain.logits, exact=True)
    assert_same(out.scores, plain.scores, exact=True)


def test_one_row_far_ahead_of_the_padding(each_engine):
    """More padding than is read at once."""
    model, ids = tiny_model("gpt2", 1), torch.tensor([[5, 9, 4, 7], [6, 3, 3, 8]])
    options = OUT | dict(do_sample=False, max_new_tokens=200, eos_token_id=None)
    ends = [lambda ids, scores, **_: (ids[:, 0] == 5) & (ids.shape[1] > 5)]
    options |= dict(stopping_criteria=ends, eos_token_id=100)
    plain, out = model.generate(ids, **options), generate(model, ids, **options)
    assert out.accept_lengths[0].sum() == 2 and out.accept_lengths[1].sum() == 200
    assert_same(out.logits, plain.logits, exact=True)
    again = generate(model, ids, **(options | dict(output_scores=False)))
    assert again.scores is None and len(again.logits) == 200


def test_nothing_is_kept_that_nobody_asked_for(each_engine):
    model, ids = tiny_model("llama", 1), torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=9, eos_token_id=None)
    out = generate(model, ids, return_dict_in_generate=True, **settings)
    assert out.scores is None and out.logits is None
    alone = generate(model, ids, output_logits=True, **settings)
    assert torch.equal(alone, out.sequences), "a tensor, as transformers gives it"


def test_only_the_rows_of_the_text_are_kept(each_engine):
    """The tensors hold their own numbers, not those of a pass or of its tree."""
    model, ids = tiny_model("llama", 1), torch.tensor([[5, 9, 4, 7]])
    options = OUT | dict(do_sample=False, max_new_tokens=40, eos_token_id=None)
    out = generate(model, ids, draft="paper", **options)
    assert max(out.accept_lengths[0]) > 1
    for row in (*out.scores, *out.logits):
        assert row.untyped_storage().nbytes() == row.nbytes


def test_recorded_steps_are_not_for_them(tapes):
    """They would have to be copied out of every step."""
    model, ids = tiny_model("llama", 1), torch.tensor([[5, 9, 4, 7]])
    model, ids = model.to(runners.where), ids.to(runners.where)
    options = OUT | dict(do_sample=False, max_new_tokens=20, eos_token_id=None)
    out, plain = generate(model, ids, **options), model.generate(ids, **options)
    assert_same(out.logits, plain.logits, exact=True)
    assert not tapes
