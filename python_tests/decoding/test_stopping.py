"""Decoding stops where plain decoding does: time, criteria, stop strings."""

import random

import pytest
import torch
from transformers import (
    GenerationConfig,
)
from transformers.generation import MaxLengthCriteria

from helpers.drafters import RandomDrafter, prompts, random_tree
from helpers.families import VOCAB, tiny_model
from msn_ext import generate

pytestmark = pytest.mark.usefixtures("each_engine")


def test_max_time_stops():
    model = tiny_model("llama", 6)
    out = generate(
        model,
        torch.tensor([[4, 5]]),
        max_new_tokens=400,
        max_time=0.0,
        eos_token_id=None,
        do_sample=False,
    )
    assert out.shape[1] == 3, "the first token is past the deadline already"


def test_custom_stopping_criterion_inside_an_accepted_path():
    """Asked after every token, as plain decoding asks: nothing after the stop is kept."""
    model = tiny_model("llama", 2)
    ids = torch.tensor([[5, 9, 4, 7]])

    def at_13(input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 13)

    expected = model.generate(
        ids, do_sample=False, max_new_tokens=60, stopping_criteria=[at_13], eos_token_id=None
    )
    out = generate(
        model, ids, do_sample=False, max_new_tokens=60, stopping_criteria=[at_13], eos_token_id=None
    )
    assert torch.equal(out, expected) and out.shape[1] == 13


def test_a_maximum_of_the_users_takes_the_place_of_the_settings():
    model, ids = tiny_model("llama", 2), torch.tensor([[5, 9, 4, 7]])
    for most in (6, 50):
        settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None)
        expected = model.generate(ids, stopping_criteria=[MaxLengthCriteria(most)], **settings)
        assert expected.shape[1] == most
        assert torch.equal(
            generate(model, ids, stopping_criteria=[MaxLengthCriteria(most)], **settings), expected
        )


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_a_criterion_ends(seed, end):
    """With an end of text they are padded; without one they continue, as in plain decoding, until
    the last row has ended.
    """
    rng = random.Random(seed)
    model = tiny_model("llama", seed)
    ids, mask = prompts(rng, 3)
    settings = dict(
        do_sample=False,
        max_new_tokens=50,
        eos_token_id=end,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    free = model.generate(ids, attention_mask=mask, **settings).sequences
    stops = [int(row[ids.shape[1] + at]) for row, at in zip(free, (3, 9, 20))]

    def meets(input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], torch.tensor(stops[: 1 + seed % 3]))

    expected = model.generate(
        ids, attention_mask=mask, stopping_criteria=[meets], **settings
    ).sequences
    for draft in ("auto", "paper", random_tree(rng), RandomDrafter(rng)):
        out = generate(
            model, ids, attention_mask=mask, draft=draft, stopping_criteria=[meets], **settings
        )
        assert torch.equal(out.sequences, expected)
        lengths = [int(accepts.sum()) for accepts in out.accept_lengths]
        assert max(lengths) == expected.shape[1] - ids.shape[1] and (end or len(set(lengths)) == 1)


def test_stop_strings_as_in_plain_decoding():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.BPE({chr(ord("a") + i): i for i in range(VOCAB)}, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    model = tiny_model("llama", 2)
    ids = torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=60, eos_token_id=None, tokenizer=tokenizer)
    free = tokenizer.convert_ids_to_tokens(generate(model, ids, **settings)[0, 4:])
    for at in (3, 11, 20):  # somewhere in the text, in the middle of accepted paths
        expected = model.generate(ids, stop_strings=free[at], **settings)
        assert torch.equal(generate(model, ids, stop_strings=free[at], **settings), expected)
        assert expected.shape[1] <= 4 + at + 1
        model.generation_config.stop_strings = [free[at]]
        given = GenerationConfig(
            **{key: value for key, value in settings.items() if key != "tokenizer"}
        )
        assert torch.equal(generate(model, ids, **settings), expected)
        assert torch.equal(
            generate(model, ids, generation_config=given, tokenizer=tokenizer), expected
        )
        for nothing in (None, []):
            assert (
                generate(model, ids, stop_strings=nothing, **settings).shape[1] > expected.shape[1]
            )
        model.generation_config.stop_strings = ["never"]
        given.stop_strings = [free[at]]
        assert torch.equal(
            generate(model, ids, generation_config=given, tokenizer=tokenizer), expected
        )
        assert given.stop_strings == [free[at]], "the user's own is left alone"
        model.generation_config.stop_strings = None


class SeenBy:
    """Ends all rows once each has had a token of some, as lm-evaluation-harness does: it keeps who
    has, by number.
    """

    def __init__(self, tokens: set[int], prompt: int, rows: int):
        self.tokens, self.prompt, self.done = tokens, prompt, [False] * rows

    def __call__(self, input_ids, scores, **kwargs):
        for row, text in enumerate(input_ids[:, self.prompt :].tolist()):
            self.done[row] |= bool(self.tokens & set(text[-3:]))
        return all(self.done)


class Behind:
    """Ends the rows whose sum is the smallest, at times: it compares rows."""

    def __call__(self, input_ids, scores, **kwargs):
        sums = input_ids.sum(1)
        return (sums == sums.min()) & (input_ids.shape[1] % 7 == 0)


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("kind", ["keeps", "compares", "both"])
def test_criteria_about_all_rows_are_asked_in_plain_decodings_order(kind, end):
    stopped = 0
    for seed in range(6):
        rng = random.Random(f"{kind} {end} {seed}")
        model = tiny_model(rng.choice(["llama", "qwen2"]), seed)
        ids, mask = prompts(rng, 1 + seed % 3)
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        ids[-1, -1] = 3 + seed
        tokens = set(rng.sample(range(3, VOCAB), 5))

        def criteria(tokens=tokens, ids=ids):
            seen = SeenBy(tokens, ids.shape[1], len(ids))
            return {"keeps": [seen], "compares": [Behind()], "both": [seen, Behind()]}[kind]

        settings = dict(
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=end,
            pad_token_id=0,
        )
        expected = model.generate(ids, stopping_criteria=criteria(), **settings)
        stopped += expected.shape[1] < ids.shape[1] + 30
        for draft in ("none", "lookup", random_tree(rng), RandomDrafter(rng)):
            out = generate(
                model,
                ids,
                stopping_criteria=criteria(),
                draft=draft,
                return_dict_in_generate=True,
                **settings,
            )
            assert torch.equal(out.sequences, expected), (seed, draft)
            for row, gained in zip(out.sequences, out.accept_lengths):
                new = row[ids.shape[1] :]
                kept = len(new) if end is None else int((new != 0).sum())
                assert kept <= int(gained.sum()) <= len(new)
    assert stopped
