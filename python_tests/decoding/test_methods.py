"""``generate`` in the place of a model's own method, on wrappers, and on what has none."""

import functools
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, dynamic_module_utils

from helpers.families import tiny_model
from msn_ext import generate

IDS = torch.tensor([[5, 9, 4, 7, 5, 9]])
SETTINGS = dict(do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def plain():
    return tiny_model("llama", 3).generate(IDS, **SETTINGS)


WAYS = {
    "by position": lambda model: model.generate(IDS, **SETTINGS),
    "by name": lambda model: model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), **SETTINGS
    ),
    "inputs": lambda model: model.generate(inputs=IDS, **SETTINGS),
    "ours": lambda model: generate(model, IDS, **SETTINGS),
    "ours, inputs": lambda model: generate(model, inputs=IDS, **SETTINGS),
    "custom_generate": lambda model: model.generate(IDS, custom_generate=generate, **SETTINGS),
}


@pytest.mark.parametrize("way", WAYS)
def test_in_the_place_of_the_models_method(way, plain):
    model = tiny_model("llama", 3)
    model.generate = functools.partial(generate, model)
    assert torch.equal(WAYS[way](model), plain)


@pytest.mark.parametrize("way", WAYS)
def test_in_a_subclass(way, plain):
    class Ours(LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return generate(self, *args, **kwargs)

    model = tiny_model("llama", 3)
    model.__class__ = Ours
    assert torch.equal(WAYS[way](model), plain)


@pytest.mark.parametrize("replaced", ["base", "adapter", "both"])
def test_under_an_adapter(replaced):
    peft = pytest.importorskip("peft")
    base = tiny_model("llama", 3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = model.generate(input_ids=IDS, **SETTINGS)
    if replaced in ("base", "both"):
        base.generate = functools.partial(generate, base)
    if replaced in ("adapter", "both"):
        model.generate = functools.partial(generate, model)
    for way in ("by name", "ours", "ours, inputs"):
        assert torch.equal(WAYS[way](model), expected), way


FOLDERS = {
    "ours": "from msn_ext import generate\n",
    "a function": "import msn_ext\n\n\ndef generate(model, **given):\n"
    "    return msn_ext.generate(model, draft='paper', **given)\n",
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_as_the_function_of_a_models_folder(folder, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model("llama", 3)
    model.save_pretrained(tmp_path / "model")
    os.mkdir(tmp_path / "model" / "custom_generate")
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text(FOLDERS[folder])
    trust = dict(trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, local_files_only=True, **trust
    )
    assert isinstance(loaded.generate, functools.partial)
    # By position, a function of their own gets a prompt as its model, from transformers.
    for way in ("by name", "inputs", "ours", *(["by position"] if folder == "ours" else [])):
        assert torch.equal(WAYS[way](loaded), plain), way
    given = dict(custom_generate=str(tmp_path / "model"), **trust)
    assert torch.equal(model.generate(IDS, **given, **SETTINGS), plain)


def test_a_compiled_model_passes_its_method_on(plain):
    model = tiny_model("llama", 3)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(generate(compiled, IDS, **SETTINGS), plain)
    model.generate = functools.partial(generate, model)
    assert torch.equal(generate(compiled, IDS, **SETTINGS), plain)


@pytest.mark.parametrize(
    "wrap, message",
    [
        (lambda model: model.model, "model is a LlamaModel, which has no generate; expected a"),
        (torch.nn.DataParallel, "model is a DataParallel, .*, such as its .module"),
        (lambda model: "llama", "model is a str, which has no generate"),
    ],
    ids=["no head", "parallel", "name"],
)
def test_models_without_a_method(wrap, message):
    with pytest.raises(ValueError, match=message):
        generate(wrap(tiny_model("llama", 0)), IDS, **SETTINGS)


def test_another_decoding_method():
    def other(model, input_ids, **prepared):
        return input_ids

    with pytest.raises(ValueError, match="custom_generate is <function .*; expected None"):
        generate(tiny_model("llama", 0), IDS, custom_generate=other, **SETTINGS)
