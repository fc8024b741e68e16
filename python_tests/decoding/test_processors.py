"""Logits processors see the text before every node of a tree."""

import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from helpers.drafters import RandomDrafter, prompts, random_best_first, random_tree
from helpers.families import VOCAB, tiny_model
from msn_ext import Draft, generate
from msn_ext.decoding.processors import Texts
from msn_ext.generation import DRAFTS

pytestmark = pytest.mark.usefixtures("each_engine")


def test_greedy_takes_prefix_free_processors():
    model = tiny_model("llama", 5)
    ids = torch.tensor([[4, 5, 6]])
    settings = dict(
        do_sample=False,
        max_new_tokens=20,
        logits_processor=LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
    )
    assert torch.equal(generate(model, ids, **settings), model.generate(ids, **settings))


LOOKING_BACK = {
    "repetition": dict(repetition_penalty=1.3),
    "repetition in the answer": dict(
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3, 9)])
    ),
    "no pair twice": dict(no_repeat_ngram_size=2),
    "not before": dict(min_new_tokens=9),
    "not below": dict(min_length=30),
    "bad words": dict(
        bad_words_ids=[
            [7],
            [11],
            *([a, b] for a in range(3, VOCAB) for b in range(3, VOCAB) if (a + b) % 3),
        ]
    ),
    "bias": dict(sequence_bias=[[[5], 3.0], [[6, 7], -3.0], [[4, 3], 4.0]]),
    "decay": dict(exponential_decay_length_penalty=(3, 1.2)),
    "forced end": dict(forced_eos_token_id=2),
    "begin": dict(begin_suppress_tokens=list(range(2, VOCAB, 2))),
    "several": dict(
        repetition_penalty=1.1, no_repeat_ngram_size=4, suppress_tokens=[4, 5], min_new_tokens=5
    ),
}


@pytest.mark.parametrize("settings", LOOKING_BACK)
def test_processors_see_the_text_before_every_node(settings):
    """Those that look at it give plain decoding's tokens, on ragged batches and random trees."""
    changed, longest = False, 0
    for seed in range(4):
        rng = random.Random(f"{settings}{seed}")
        model = tiny_model(rng.choice(["llama", "gpt2", "qwen2"]), seed)
        ids, mask = prompts(rng, 1 + seed)
        plain = dict(
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=[2, 3] if seed % 2 else [2],
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        options = plain | LOOKING_BACK[settings]
        expected = model.generate(ids, attention_mask=mask, **options).sequences
        for draft in (
            "auto",
            "paper",
            "recycling",
            random_tree(rng),
            RandomDrafter(rng),
            random_best_first(rng),
        ):
            out = generate(model, ids, attention_mask=mask, draft=draft, **options)
            assert torch.equal(out.sequences, expected), draft
            longest = max(longest, *(int(accepts.max()) for accepts in out.accept_lengths))
        changed |= not torch.equal(
            model.generate(ids, attention_mask=mask, **plain).sequences, expected
        )
    assert changed and longest > 1, "settings that matter, and guesses that come true beside them"


def test_masked_tokens_are_penalised_too():
    """transformers' processor sees what a mask hides, whichever tokens they are; newer ones, made
    for a batch, leave it out.
    """
    changed = False
    for seed in range(6):
        model = tiny_model("llama", seed)
        ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, :6] = mask[1, :2] = 0
        settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
        texts = [model.generate(ids, attention_mask=mask, **settings)]
        for penalty in (
            dict(logits_processor=[RepetitionPenaltyLogitsProcessor(3.0)]),
            dict(repetition_penalty=3.0),
        ):
            texts.append(model.generate(ids, attention_mask=mask, **penalty, **settings))
            assert torch.equal(
                generate(model, ids, attention_mask=mask, **penalty, **settings), texts[-1]
            )
        changed |= not torch.equal(texts[0], texts[1])
    assert changed


@pytest.mark.parametrize("nodes", [1, 64, 65, 200])
def test_a_nodes_text_has_the_same_tokens_however_it_is_asked_for(nodes):
    rng = random.Random(nodes)
    ids, mask = prompts(rng, 3)
    ids = torch.where(
        mask == 0, torch.randint(3, VOCAB - 1, ids.shape), ids
    )  # masked tokens may be any
    offsets = (mask == 0).sum(1)
    history = torch.full((3, 30), VOCAB - 1)  # no tokens of the text
    for b, offset in enumerate(offsets.tolist()):
        history[b, : ids.shape[1] - offset] = ids[b, offset:]
    parents = torch.tensor(
        [[-1] + [rng.randrange(-1, i) for i in range(1, nodes)] for _ in range(3)],
        dtype=torch.int32,
    )
    draft = Draft.of(torch.randint(VOCAB - 1, (3, nodes)), parents)
    draft.tokens[:, 0] = ids[:, -1]
    texts = Texts(draft, history, mask.sum(1), ids, offsets, mask.sum(1), ids.new_empty(0))
    before = texts.before(VOCAB)
    chunks = [texts.seen(before, slice(begin, begin + 64)) for begin in range(0, 3 * nodes, 64)]
    found = [row.nonzero()[:, 0].tolist() for row in torch.cat(chunks)]
    named = 0
    for row, places, text in texts.by_depth():
        for place, tokens in zip(places.tolist(), text.tolist()):
            assert (
                row == place // nodes
                and tokens[: ids.shape[1]] == ids[row].tolist()
                and found[place] == sorted(set(tokens))
            )
            named += 1
    assert named == int((draft.depth >= 0).sum())


@pytest.mark.parametrize("settings", ["repetition", "no pair twice", "several"])
def test_sampling_looks_back_the_same_for_every_draft(settings):
    rng = random.Random(settings)
    model = tiny_model("llama", 1)
    ids, mask = prompts(rng, 3)
    options = dict(
        do_sample=True,
        temperature=0.7,
        max_new_tokens=40,
        eos_token_id=[2],
        pad_token_id=0,
        **LOOKING_BACK[settings],
    )
    outputs = []
    for draft in (*DRAFTS, random_tree(rng), RandomDrafter(rng), random_best_first(rng)):
        torch.manual_seed(7)
        outputs.append(generate(model, ids, attention_mask=mask, draft=draft, **options))
    assert all(torch.equal(out, outputs[0]) for out in outputs)
