"""generate() beside transformers: custom_generate, streamers, autocast, threads."""

import random

import pytest
import torch
from transformers.generation import EosTokenCriteria

import msn_ext
from helpers.drafters import prompts
from helpers.families import VOCAB, tiny_model
from msn_ext import DraftTree, generate
from msn_ext.decoding import (
    BestFirst,
    TokenRecycling,
    TreeDrafter,
)
from msn_ext.generation import DRAFTS

pytestmark = pytest.mark.usefixtures("each_engine")


def test_custom_generate_is_the_same():
    model = tiny_model("llama", 4)
    ids, mask = prompts(random.Random(4), 3)
    settings = dict(do_sample=False, max_new_tokens=30, pad_token_id=0, eos_token_id=[2])
    expected = model.generate(ids, attention_mask=mask, **settings)
    through_transformers = model.generate(
        ids, attention_mask=mask, custom_generate=msn_ext.generate, **settings
    )
    assert torch.equal(through_transformers, expected)
    assert torch.equal(generate(model, ids, attention_mask=mask, **settings), expected)
    chain = model.generate(
        ids, attention_mask=mask, custom_generate=msn_ext.generate, draft="jacobi", **settings
    )
    assert torch.equal(chain, expected)


@pytest.mark.parametrize("through_transformers", [False, True])
def test_narrow_whole_numbers(through_transformers):
    """int32 ids and ends of text, which tokenizers and users make."""
    model = tiny_model("llama", 3)
    ids = torch.tensor([[5, 9, 4, 7]], dtype=torch.int32)
    settings = dict(do_sample=False, max_new_tokens=30, pad_token_id=0)
    end = model.generate(ids, eos_token_id=None, **settings)[0, 13:14].int()
    for options in (dict(eos_token_id=end), dict(stopping_criteria=[EosTokenCriteria(end)])):
        expected = model.generate(ids, **settings, **options)
        way = dict(custom_generate=generate) if through_transformers else {}
        found = (
            model.generate(ids, **settings, **options, **way)
            if way
            else generate(model, ids, **settings, **options)
        )
        assert (
            torch.equal(found, expected) and found.dtype == expected.dtype and found.shape[1] < 34
        )


class Recorder:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("through_transformers", [False, True, "partial"])
def test_streamer_gets_the_prompt_and_every_pass(through_transformers):
    import functools

    model, streamer = tiny_model("llama", 2), Recorder()
    ids = torch.tensor([[5, 9, 4, 7]])
    settings = dict(
        do_sample=False, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True
    )
    if through_transformers == "partial":
        out = model.generate(
            ids, custom_generate=functools.partial(generate, streamer=streamer), **settings
        )
    elif through_transformers:
        out = model.generate(ids, custom_generate=generate, streamer=streamer, **settings)
    else:
        out = generate(model, ids, streamer=streamer, **settings)
    assert torch.equal(streamer.puts[0], ids) and streamer.ended == 1
    assert [len(value) for value in streamer.puts[1:]] == out.accept_lengths[0].tolist()
    assert torch.cat(streamer.puts[1:]).tolist() == out.sequences[0, 4:].tolist()


def test_streamer_ends_when_decoding_fails():
    class Failing(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.puts) == 3:
                raise RuntimeError("reader went away")

    streamer = Failing()
    with pytest.raises(RuntimeError, match="reader went away"):
        generate(
            tiny_model("llama", 2),
            torch.tensor([[5]]),
            streamer=streamer,
            max_new_tokens=30,
            eos_token_id=None,
            do_sample=False,
        )
    assert streamer.ended == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen3"])
def test_autocast(family):
    """Trees attend under autocast as everything else does: tokens are the best ones within
    rounding.
    """
    model = tiny_model(family, 3, torch.float32)
    ids = torch.tensor([[5, 9, 4, 7]])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = generate(
            model, ids, draft="paper", do_sample=False, max_new_tokens=40, eos_token_id=None
        )
        logits = model(out[:, :-1]).logits[0, 3:].float()
    chosen = logits.gather(1, out[0, 4:, None]).squeeze(1)
    assert out.shape[1] == 44 and (logits.max(1).values - chosen).max() <= 0.05 * logits.abs().max()


@pytest.mark.parametrize(
    "draft",
    [*DRAFTS, lambda: BestFirst(16), lambda: TreeDrafter(DraftTree.paper()), TokenRecycling],
)
def test_inference_mode(draft):
    """Inside and outside of it, with one drafter, and with a model that was made in it."""
    draft = draft if isinstance(draft, str) else draft()
    settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None)
    with torch.inference_mode():
        made_inside, inside = tiny_model("llama", 2), torch.tensor([[5, 9, 4, 7]])
        expected = made_inside.generate(inside, **settings)
    for model in (made_inside, tiny_model("llama", 2)):
        with torch.inference_mode():
            assert torch.equal(
                generate(
                    model, inside, attention_mask=torch.ones_like(inside), draft=draft, **settings
                ),
                expected,
            )
        for ids in (inside, inside.clone()):
            assert torch.equal(generate(model, ids, draft=draft, **settings), expected)


def test_inference_mode_and_buffers_that_change():
    with torch.inference_mode():
        model, ids = tiny_model("phi3-longrope", 2), torch.tensor([[5, 9, 4, 7]])
        expected = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(
            generate(model, ids, do_sample=False, max_new_tokens=20, eos_token_id=None), expected
        )
    assert torch.equal(
        generate(model, ids, do_sample=False, max_new_tokens=20, eos_token_id=None), expected
    )


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_default_device_is_left_out(draft):
    """Tensors that the host needs are on the host, whatever the default device."""
    model, ids = tiny_model("llama", 2), torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **settings)
    DraftTree.tensors.cache_clear()
    torch.set_default_device("meta")
    try:
        found = generate(model, ids, draft=draft, **settings)
        generate(model, ids, draft=draft, **(settings | dict(do_sample=True)))
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_two_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model("llama", 3)
    inputs = [torch.tensor([[3 + i, 9, 4, 7 + i]]) for i in range(6)]
    settings = dict(do_sample=False, max_new_tokens=40, eos_token_id=None)
    expected = [model.generate(ids, **settings) for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: generate(model, ids, **settings), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert model.config._attn_implementation == "sdpa"


def test_half_precision_tokens_are_arg_max_to_within_rounding():
    """bfloat16: every token is within rounding of the best one, given the text before it."""
    model = tiny_model("qwen3", 1, torch.bfloat16)
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    out = generate(model, ids, do_sample=False, max_new_tokens=60, eos_token_id=None)
    with torch.no_grad():
        logits = model(out[:, :-1]).logits[0, 7:].float()
    chosen = logits.gather(1, out[0, 8:, None]).squeeze(1)
    assert (logits.max(1).values - chosen).max() <= 0.05 * logits.abs().max()
