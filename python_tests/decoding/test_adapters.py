"""PEFT's adapters: followed where they are in the model, refused by name where around it."""

import pytest
import torch

from helpers.families import VOCAB, tiny_model
from msn_ext import generate
from msn_ext.gates import mark_gated
from msn_ext.generation import DRAFTS

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("each_engine")

IDS = torch.tensor([[5, 9, 4, 7, 3, 8]])
SETTINGS = dict(do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
PROJECTIONS = ["q_proj", "v_proj"]


def adapted(config):
    """A tiny model with an adapter that changes its text."""
    plain = tiny_model("llama", 3)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model("llama", 3), config).eval().double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    assert not torch.equal(
        model.generate(input_ids=IDS, **SETTINGS), plain.generate(IDS, **SETTINGS)
    )
    return model


def through_peft(model, ids, **settings):
    return model.generate(input_ids=ids, custom_generate=generate, **settings)


PROMPT_LEARNING = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
    ),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("way", [generate, through_peft])
@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_virtual_tokens_are_refused(kind, way):
    model = adapted(PROMPT_LEARNING[kind]())
    for draft in ("none", "auto"):
        with pytest.raises(ValueError, match=rf"its adapter \({kind}\) puts virtual tokens"):
            way(model, IDS, draft=draft, **SETTINGS)
    base = tiny_model("llama", 3).generate(IDS, **SETTINGS)
    with model.disable_adapter():
        assert torch.equal(generate(model.get_base_model(), IDS, **SETTINGS), base)


@pytest.mark.parametrize("way", [generate, through_peft])
def test_adapters_of_weights_are_followed(way):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, r=4)
    model = adapted(config)
    expected = model.generate(input_ids=IDS, **SETTINGS)
    for draft in DRAFTS:
        assert torch.equal(way(model, IDS, draft=draft, **SETTINGS), expected), draft


def test_activated_lora_is_refused_once_it_is_active():
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=PROJECTIONS, r=4, alora_invocation_tokens=[7, 3]
    )
    model = adapted(config)
    for way in (generate, through_peft):
        with pytest.raises(ValueError, match=r"its adapter \(activated LoRA\) counts from the end"):
            way(model, IDS, **SETTINGS)


def test_adapters_that_mix_the_tokens_of_a_call():
    """Lily averages its router over all tokens of a call, guesses among them."""
    if not hasattr(peft, "LilyConfig"):
        pytest.skip("this PEFT has no Lily")
    model = adapted(peft.LilyConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS))
    expected = model.generate(input_ids=IDS, **SETTINGS)
    assert torch.equal(generate(model, IDS, draft="none", **SETTINGS), expected)
    with pytest.raises(ValueError, match=r"q_proj \(peft\.tuners\.lily\.layer\.Linear\) computes"):
        generate(model, IDS, **SETTINGS)
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="decode one prompt at a time with draft='none'"):
        generate(model, ids, draft="none", **SETTINGS)


@pytest.mark.parametrize("way", [generate, through_peft])
def test_gated_adapters_do_not_change_the_text(way, tmp_path):
    """Active or not, also as loaded from a folder: it is the base model's."""

    def config():
        return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, r=4)

    model = adapted(config())
    mark_gated(model.peft_config["default"], 2, "ahead")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", 3), tmp_path).eval()
    base = tiny_model("llama", 3).generate(IDS, **SETTINGS)
    for gated in (model, loaded):
        for draft in ("auto", "none"):
            assert torch.equal(way(gated, IDS, draft=draft, **SETTINGS), base)
        with gated.disable_adapter():
            assert torch.equal(generate(gated.get_base_model(), IDS, **SETTINGS), base)
    loaded.load_adapter(tmp_path, "other")
    loaded.add_adapter("plain", config())
    loaded.set_adapter("plain")
    assert torch.equal(way(loaded, IDS, **SETTINGS), base), "a new one does nothing yet"
