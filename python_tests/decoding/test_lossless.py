"""Decoding with a draft tree gives what plain decoding gives.

In float64, on randomly initialised models of every family, the comparison is token for token with
``model.generate(do_sample=False)``. The weights are large, so that text repeats, guesses come true
and sibling paths alias; a test at the end checks that they do.
"""

import random

import pytest
import torch

from helpers.drafters import RandomDrafter, prompts, random_best_first, random_tree
from helpers.families import FAMILIES, LONGROPE_ERRS, VOCAB, tiny_model
from msn_ext import DraftTree, generate
from msn_ext.decoding import (
    BestFirst,
    Decoder,
    Request,
    TreeDrafter,
    attention_for,
)
from msn_ext.decoding.attention import KernelAttention, MaskAttention
from msn_ext.decoding.forward.families import READERS
from msn_ext.families import TESTED
from msn_ext.generation import DRAFTS

pytestmark = pytest.mark.usefixtures("each_engine")

SEEDS = 10  # x 25 families: the 200 models and more of the acceptance test


def paper_decoder(model, attention, ids, mask) -> Decoder:
    drafter = TreeDrafter(DraftTree.paper())
    offsets, no_end = (mask == 0).sum(1), ids[0, :0]
    return Decoder(Request(model, attention, ids, offsets, drafter, drafter, 40, no_end))


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_decoding(family, seed, each_engine):
    """Random trees and the paper's; batches of 1 to 4, ragged; end-of-text inside accepted paths;
    `max_new_tokens` cutting a path."""
    rng = random.Random(f"{family}{seed}")
    model = tiny_model(family, seed)
    # transformers' own eager attention in float64, which these two use, gives NaN at padding
    # (softmax in float32 of a row of least float64s); longrope switches its factors for a whole
    # batch.
    batch = 1 if family == "phi3-longrope" else 1 + seed % 4
    ids, mask = prompts(rng, batch, padded=family not in ("gemma2", "gemma3"))
    settings = dict(
        do_sample=False,
        max_new_tokens=rng.choice([1, 2, 7, 48]),
        eos_token_id=rng.choice([None, [2, 5], [3, 8, 11]]),
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    expected = model.generate(ids, attention_mask=mask, **settings).sequences
    named = rng.choice(["auto", "jacobi", "lookup", "suffix", "recycling", "lookahead", "none"])
    for draft in ("paper", random_tree(rng), RandomDrafter(rng), random_best_first(rng), named):
        out = generate(model, ids, attention_mask=mask, draft=draft, **settings)
        assert torch.equal(out.sequences, expected), draft
        native = each_engine == "auto" and model.config.model_type in READERS
        native &= family != "phi3-longrope"
        assert out.engine == ("native" if native else "torch")
        for row, accepts in zip(out.sequences, out.accept_lengths):
            new = int(accepts.sum())
            assert accepts.min() >= 1 and new <= settings["max_new_tokens"]
            assert not row[ids.shape[1] + new :].any(), "something other than padding after the end"


def test_every_tested_family_is_here():
    assert {tiny_model(family, 0).config.model_type for family in FAMILIES} == TESTED


def test_guesses_come_true_and_alias():
    """The comparison above would prove little if nothing were accepted, or no two paths agreed."""
    accepts, aliased = [], 0
    for seed in range(8):
        model = tiny_model("llama", seed)
        ids, mask = prompts(random.Random(seed), 2)
        decoder = paper_decoder(model, attention_for(model), ids, mask)
        gained = decoder.prefill()
        for _ in range(12):
            accepts += gained.status[0].tolist()
            decoder.advance(int((decoder._lengths - (mask.sum(1))).max()))
            proposed = decoder.drafter.propose(decoder._history, decoder._lengths).tokens
            children = [i for i, parent in enumerate(DraftTree.paper().parents) if parent == 0]
            aliased += sum(len(children) - len(set(row[children].tolist())) for row in proposed)
            gained = decoder.step()
    assert sum(accepts) / len(accepts) > 1.5 and max(accepts) >= 5
    assert aliased > 10


def test_random_drafters_try_what_they_are_for():
    """Accepted guesses, padding between live nodes, rows with different trees."""
    drafter = RandomDrafter(random.Random(0))
    model = tiny_model("llama", 3)
    ids, mask = prompts(random.Random(0), 3)
    generate(
        model,
        ids,
        attention_mask=mask,
        draft=drafter,
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=None,
        pad_token_id=0,
    )
    trees = [
        verified.draft.parents for verified in drafter.seen if verified.draft.parents.dim() == 2
    ]
    assert max(int(verified.accept_length.max()) for verified in drafter.seen) >= 3
    assert sum(bool(((tree[:, 1:-1] < 0) & (tree[:, 2:] >= 0)).any()) for tree in trees) > 5
    assert sum(not torch.equal(tree[0], tree[1]) for tree in trees) > 5


@pytest.mark.parametrize(
    "family", ["llama", "qwen2-window", "gemma3", "mistral-window", "gpt2", "deepseek_v3"]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dense_masks_equal_the_kernel(family, implementation):
    """The fallback for models that take no attention function of ours, tried on models that do."""
    model = tiny_model(family, 3)
    model.set_attn_implementation(implementation)
    ids, mask = prompts(random.Random(3), 3, padded=implementation == "sdpa")  # eager: see above
    results = []
    for attention in (KernelAttention(model), MaskAttention(model)):
        decoder = paper_decoder(model, attention, ids, mask)
        decoder.prefill()
        for _ in range(10):
            decoder.advance(int((decoder._lengths - mask.sum(1)).max()))
            decoder.step()
        results.append(decoder._history[:, : int(decoder._lengths.min())])
    common = min(result.shape[1] for result in results)
    assert common >= 11 and torch.equal(results[0][:, :common], results[1][:, :common])


@pytest.mark.skipif(LONGROPE_ERRS, reason="this transformers itself errs past the boundary")
@pytest.mark.parametrize("length", [3, 28, 35, 38, 39, 40, 41])
def test_longrope_switches_as_plain_decoding_does(length):
    """At 40 tokens the factors of all positions change, and the text is read anew."""
    model = tiny_model("phi3-longrope", length % 3)
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
    settings = dict(do_sample=False, max_new_tokens=60, eos_token_id=None)
    expected = model.generate(ids, **settings)
    for draft in (*DRAFTS, BestFirst(8, max_depth=0), BestFirst(16, max_depth=3), BestFirst(64)):
        assert torch.equal(generate(model, ids, draft=draft, **settings), expected), draft


def test_attention_implementation_is_restored():
    model = tiny_model("llama", 0)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        generate(model, torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=10)
        assert model.config._attn_implementation == implementation
