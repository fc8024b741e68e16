"""Models whose prompts attend to later tokens: a guess after the prompt would change it."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.drafters import RandomDrafter, prompts, random_best_first
from helpers.families import VOCAB, tiny_model
from msn_ext import generate
from msn_ext.decoding import attention_for

pytestmark = pytest.mark.usefixtures("each_engine")

BOTH_WAYS = dict(use_bidirectional_attention=True)
NOT_CAUSAL = dict(is_causal=False)
FAMILIES = "llama qwen2-window mistral-window gemma3 gpt2 deepseek_v3 mixtral codegen".split()
CASES = [("gemma3", BOTH_WAYS), *((family, NOT_CAUSAL) for family in FAMILIES)]


@pytest.mark.parametrize("family, switch", CASES, ids=str)
def test_equals_plain_decoding(family, switch):
    changed = False
    for seed in range(3):
        rng = random.Random(f"{family}{seed}")
        model = tiny_model(family, seed, **switch)
        ids, mask = prompts(rng, 1 + seed % 2, padded=family != "gemma3")
        settings = dict(do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
        expected = model.generate(ids, attention_mask=mask, **settings)
        for draft in ("auto", "paper", "none", RandomDrafter(rng), random_best_first(rng)):
            found = generate(model, ids, attention_mask=mask, draft=draft, **settings)
            assert torch.equal(found, expected), draft
        causal = tiny_model(family, seed).generate(ids, attention_mask=mask, **settings)
        changed |= not torch.equal(causal, expected)
    assert changed, "a switch that matters"


def test_its_trees_are_used():
    model = tiny_model("gemma3", 1, **BOTH_WAYS)
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    out = generate(model, ids, max_new_tokens=48, eos_token_id=None, return_dict_in_generate=True)
    accepts = out.accept_lengths[0].tolist()
    assert accepts[0] == 1 and max(accepts) > 1


def test_an_untested_family_is_refused():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        **BOTH_WAYS,
    )
    with pytest.raises(ValueError, match="its prompts attend to later tokens"):
        attention_for(AutoModelForCausalLM.from_config(config).eval())
