"""Guesses are rows beside right ones, which dynamic quantisation lets change each other."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic

from helpers.drafters import prompts, random_tree
from helpers.families import VOCAB, tiny_model
from msn_ext import BestFirst, DraftTree, generate
from msn_ext.decoding.rows import mixing_module

pytestmark = pytest.mark.usefixtures("each_engine")

SETTINGS = dict(do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
WIDE = dict(hidden_size=64, intermediate_size=64, head_dim=16)  # torchao's kernels ask for it


def quantised(dtype=torch.qint8, only=nn.Linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        return quantize_dynamic(tiny_model("llama", 1, torch.float32, **WIDE), {only}, dtype=dtype)


@pytest.mark.parametrize("draft", ["auto", "paper", "lookup", BestFirst(1), DraftTree.chain(2)])
def test_a_scale_over_all_rows_is_refused(draft):
    ids, _ = prompts(random.Random(0), 1)
    named = r"model\.layers\.0\.self_attn\.q_proj \(torch\.ao\..*\.Linear\) computes a token's"
    with pytest.raises(ValueError, match=f"{named}.* one prompt at a time with draft='none'"):
        generate(quantised(), ids, draft=draft, **SETTINGS)


def test_without_guesses_the_text_is_the_models():
    model = quantised()
    for seed in range(4):
        ids, _ = prompts(random.Random(seed), 1)
        expected = model.generate(ids, **SETTINGS)
        for draft in ("none", DraftTree.chain(1)):
            out = generate(model, ids, draft=draft, return_dict_in_generate=True, **SETTINGS)
            assert torch.equal(out.sequences, expected) and out.engine == "torch"


def test_rows_of_a_batch_are_guesses_to_each_other():
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="one prompt at a time with draft='none'"):
        generate(quantised(), ids, draft="none", **SETTINGS)


def test_the_native_engine_does_not_take_it():
    with pytest.raises(ValueError, match="engine is 'native', which LlamaForCausalLM cannot"):
        generate(quantised(), torch.tensor([[5, 6]]), draft="none", engine="native", **SETTINGS)


def test_quantised_weights_alone_are_followed():
    """float16 weights by the same function: no scale of activations."""
    model, rng = quantised(torch.float16), random.Random(3)
    ids, mask = prompts(rng, 3)
    expected = model.generate(ids, attention_mask=mask, **SETTINGS)
    for draft in ("auto", "paper", random_tree(rng)):
        found = generate(model, ids, attention_mask=mask, draft=draft, **SETTINGS)
        assert torch.equal(found, expected), draft


def test_one_such_layer_is_found_and_a_hook_sees_no_trial():
    model, seen = tiny_model("llama", 1, torch.float32), []
    assert mixing_module(model) is None
    layer = model.model.layers[1].mlp
    plain = layer.down_proj
    plain.register_forward_hook(lambda *arguments: seen.append(arguments))
    plain.forward = lambda x: nn.functional.linear(x, plain.weight)
    assert mixing_module(model) is None and not seen

    def by_all_rows(x):
        scale = x.abs().max() / 127
        return nn.functional.linear((x / scale).round() * scale, plain.weight)

    def by_row(x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear((x / scale).round() * scale, plain.weight)

    class Scaled(nn.Linear):
        forward = staticmethod(by_all_rows)

    layer.down_proj = Scaled(*plain.weight.shape[::-1])
    assert mixing_module(model) == ("model.layers.1.mlp.down_proj", layer.down_proj)
    Scaled.forward = staticmethod(by_row)
    layer.down_proj = Scaled(*plain.weight.shape[::-1])
    assert mixing_module(model) is None


@pytest.mark.parametrize("per", ["PerTensor", "PerRow"])
def test_torchao(per):
    """Its tensors take the place of weights in torch's own layers."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny_model("llama", 1, torch.float32, **WIDE)
    assert mixing_module(model) is None
    torchao.quantize_(
        model,
        torchao.Int8DynamicActivationInt8WeightConfig(granularity=getattr(torchao, per)()),
    )
    ids, _ = prompts(random.Random(0), 1)
    expected = model.generate(ids, **SETTINGS)
    assert torch.equal(generate(model, ids, draft="none", **SETTINGS), expected)
    if per == "PerRow":
        assert torch.equal(generate(model, ids, draft="paper", **SETTINGS), expected)
    else:
        with pytest.raises(ValueError, match=r"q_proj \(torchao\..*Tensor\) computes a token's"):
            generate(model, ids, draft="paper", **SETTINGS)
