"""Processors of logits that are functions of the text: transformers' own, and declared ones."""

import functools
import random

import pytest
import torch
from transformers import LogitsProcessor, WatermarkingConfig
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor, logits_process

import msn_ext
from helpers.drafters import RandomDrafter, prompts, random_best_first, random_tree
from helpers.families import VOCAB, tiny_model
from msn_ext import generate
from msn_ext.decoding.processors import PREFIX_BOUND, PREFIX_FREE, REFUSED

pytestmark = pytest.mark.usefixtures("each_engine")


class Cumulative(LogitsProcessor):
    """Adds what depends on every token of the text, and on their order."""

    stateless = True

    def __call__(self, input_ids, scores):
        place = torch.arange(1, input_ids.shape[1] + 1)
        number = (input_ids * place).sum(1, keepdim=True)
        return scores.add_(torch.sin(number + torch.arange(scores.shape[1])))  # in place


@msn_ext.stateless
def odd_after_even(input_ids, scores):
    """Forbids every other token, by the last one; the end of the text never."""
    same = (torch.arange(scores.shape[1]) - input_ids[:, -1:]) % 2 == 0
    same[:, 2] = False
    return scores.masked_fill(same, -torch.inf)


def allowed(row: int, text: torch.Tensor) -> list[int]:
    """Other tokens by row and by the whole text; fails after texts that may not be."""
    tokens = text.tolist()
    while tokens[:1] == [0]:
        del tokens[:1]
    for end in range(allowed.prompts[row], len(tokens)):
        assert tokens[end] in [0, *choice(row, tokens[:end])], "nobody asks about such texts"
        assert tokens[end] not in (0, 2) or end == len(tokens) - 1 or not any(tokens[end + 1 :])
    return choice(row, tokens)


def choice(row: int, tokens: list[int]) -> list[int]:
    return [2, *random.Random(f"{row} {tokens[-1]}").sample(range(3, VOCAB), 4)]


def encoder(ids, ngram):
    return EncoderNoRepeatNGramLogitsProcessor(ngram, ids)


DECLARED = {
    "prefix": lambda ids: dict(prefix_allowed_tokens_fn=allowed),
    "encoder penalty": lambda ids: dict(encoder_repetition_penalty=1.7),
    "encoder n-grams": lambda ids: dict(encoder_no_repeat_ngram_size=1),
    "encoder n-grams of rows": lambda ids: dict(logits_processor=[encoder(ids[:, :3], 1)]),
    "watermark": lambda ids: dict(watermarking_config=WatermarkingConfig(bias=4.0)),
    "class": lambda ids: dict(logits_processor=[Cumulative()]),
    "function": lambda ids: dict(logits_processor=[odd_after_even]),
    "partial": lambda ids: dict(
        logits_processor=[msn_ext.stateless(functools.partial(odd_after_even))]
    ),
    "several": lambda ids: dict(
        logits_processor=[Cumulative()],
        repetition_penalty=1.2,
        prefix_allowed_tokens_fn=allowed,
    ),
}


@pytest.mark.parametrize("settings", DECLARED)
def test_functions_of_the_text_are_followed(settings):
    changed, longest = False, 0
    for seed in range(3):
        rng = random.Random(f"{settings}{seed}")
        model = tiny_model(rng.choice(["llama", "gpt2", "qwen2"]), seed)
        ids, mask = prompts(rng, 1 + seed)
        allowed.prompts = mask.sum(1).tolist()
        plain = dict(do_sample=False, max_new_tokens=30, eos_token_id=[2], pad_token_id=0)
        options = plain | DECLARED[settings](ids)
        expected = model.generate(ids, attention_mask=mask, **options)
        for draft in ("auto", "recycling", random_tree(rng), RandomDrafter(rng)):
            out = generate(
                model,
                ids,
                attention_mask=mask,
                draft=draft,
                return_dict_in_generate=True,
                **options,
            )
            assert torch.equal(out.sequences, expected), draft
            longest = max(longest, *(int(accepts.max()) for accepts in out.accept_lengths))
        changed |= not torch.equal(model.generate(ids, attention_mask=mask, **plain), expected)
    assert changed and longest > 1, "settings that matter, and guesses that come true beside them"


@pytest.mark.parametrize("settings", DECLARED)
def test_sampled_text_is_the_same_for_every_draft(settings):
    rng = random.Random(settings)
    model = tiny_model("llama", 1)
    ids, mask = prompts(rng, 3)
    allowed.prompts = mask.sum(1).tolist()
    options = dict(do_sample=True, temperature=0.7, max_new_tokens=30, eos_token_id=[2])
    outputs = []
    for draft in ("none", "auto", random_tree(rng), random_best_first(rng)):
        torch.manual_seed(7)
        options |= dict(pad_token_id=0, attention_mask=mask, draft=draft)
        outputs.append(generate(model, ids, **options, **DECLARED[settings](ids)))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_every_processor_of_transformers_is_classified():
    """One that is new in transformers is looked at before it is followed or left out."""
    other_kinds_of_models = {
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
        "WhisperNoSpeechDetection",
        "WhisperTimeStampLogitsProcessor",
    }
    there = {
        name
        for name, kind in vars(logits_process).items()
        if isinstance(kind, type)
        and issubclass(kind, LogitsProcessor)
        and kind is not LogitsProcessor
    }
    followed = {kind.__name__ for kind in PREFIX_FREE | PREFIX_BOUND}
    assert there == followed | REFUSED.keys() | other_kinds_of_models
    assert not followed & REFUSED.keys()
