"""A plan that was read computes its model's logits; models that no plan can describe are refused.

The plan is run by ``helpers/plan_in_torch.py``.
"""

import operator
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as hooks
from transformers.models.llama.modeling_llama import LlamaMLP

from helpers.families import VOCAB, tiny_model
from helpers.plan_in_torch import logits_of
from helpers.plans import MODELS, InFloat64, made
from msn_ext.decoding.forward.families import READERS, plan_for
from msn_ext.decoding.forward.families.parts import rotary
from msn_ext.decoding.forward.plan import NoPlan, Plan

TEXTS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def difference(plan: Plan, model) -> float:
    """The largest of the logits, relative to the largest logit."""
    with InFloat64(), torch.no_grad():
        expected = model(TEXTS).logits
        return float((logits_of(plan, TEXTS) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_computes_what_its_model_does(name):
    model = made(name)
    plan = plan_for(model)
    assert difference(plan, model) < 1e-10
    with torch.no_grad():  # with tables as they are used
        torch.testing.assert_close(logits_of(plan, TEXTS), model(TEXTS).logits, rtol=0, atol=1e-4)


def test_every_reader_is_tested():
    assert {tiny_model(name, 0, **more).config.model_type for name, more in MODELS.values()} == {
        *READERS
    }


def every_layer(**changes):
    return lambda plan: replace(plan, layers=tuple(replace(one, **changes) for one in plan.layers))


def every_attention(change):
    def changed(plan):
        its = (replace(one, attention=change(one.attention)) for one in plan.layers)
        return replace(plan, layers=tuple(its))

    return changed


def offset_away(plan):
    return replace(plan, norm=replace(plan.norm, offset=0.0))


def queries_and_keys_swapped(plan):
    first, *rest = plan.layers
    q, k, v = first.qkv.weights
    return replace(plan, layers=(replace(first, qkv=replace(first.qkv, weights=(k, q, v))), *rest))


WRONG = {
    "eps": ("llama", lambda plan: replace(plan, norm=replace(plan.norm, eps=1e-3))),
    "offset": ("gemma2", offset_away),
    "kind": ("gpt2", lambda plan: replace(plan, norm=replace(plan.norm, kind="rms"))),
    "layers": ("llama", lambda plan: replace(plan, layers=plan.layers[::-1])),
    "qkv": ("llama-bias-mha", queries_and_keys_swapped),
    "scale": ("granite", every_attention(lambda one: replace(one, scale=8**-0.5))),
    "window": ("mistral-window", every_attention(lambda one: replace(one, window=10))),
    "softcap": ("gemma2-caps", every_attention(lambda one: replace(one, softcap=0.0))),
    "rotary": ("smollm3", every_attention(lambda one: replace(one, rotary=0))),
    "rotaries": ("gemma3", lambda plan: replace(plan, rotaries=plan.rotaries[::-1])),
    "q_norm": ("qwen3", every_attention(lambda one: replace(one, q_norm=None))),
    "k_norm": ("olmo2", every_attention(lambda one: replace(one, k_norm=None))),
    "activation": ("gpt2", every_layer(activation="gelu")),
    "after_mlp": ("olmo2", every_layer(after_mlp=None)),
    "parallel": ("gpt_neox", every_layer(parallel=False)),
    "residual_scale": ("granite", every_layer(residual_scale=1.0)),
    "embedding_scale": ("gemma3", lambda plan: replace(plan, embedding_scale=1.0)),
    "positions": ("opt", lambda plan: replace(plan, positions=plan.positions[1:])),
    "logit_scale": ("granite", lambda plan: replace(plan, logit_scale=1.0)),
    "logit_softcap": ("gemma3-caps", lambda plan: replace(plan, logit_softcap=0.0)),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_plan_does_not(field):
    name, change = WRONG[field]
    model = made(name)
    assert difference(change(plan_for(model)), model) > 1e-6


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value if isinstance(value, tuple) else vars(value).values() if is_part(value) else ()
    return [tensor for one in inside for tensor in tensors_of(one)]


def is_part(value) -> bool:
    return type(value).__module__ == Plan.__module__


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_nothing_is_copied(family):
    model = tiny_model(family, 0)
    its = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    plan = plan_for(model)
    # Of rotary embeddings, by which plans are told apart.
    samples = {rotary.sample.untyped_storage().data_ptr() for rotary in plan.rotaries}
    found = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(plan)}
    assert found == its | samples


@pytest.mark.parametrize(
    "dtype, wanted", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_tables_are_not_rounded(dtype, wanted):
    model = tiny_model("gemma3", 0, dtype=dtype)
    positions = torch.tensor([3, 500, 0])
    for number, kind in enumerate(["full_attention", "sliding_attention"]):
        tables = plan_for(model).rotaries[number].tables(positions)
        its = model.model.rotary_emb(torch.empty(0, dtype=wanted), positions[None], kind)
        for table, whole in zip(tables, its):
            assert table.dtype == wanted and table.is_contiguous()
            assert torch.equal(torch.cat([table, table], -1), whole[0])
            assert not torch.equal(table, table.to(torch.bfloat16).to(wanted))


def test_what_changes_nothing_is_allowed():
    model = tiny_model("llama", 0).train()  # without dropout
    model(TEXTS, output_hidden_states=True)  # transformers leaves its hooks where they are
    assert model.model.layers[0]._forward_hooks
    assert difference(plan_for(model), model) < 1e-10


@pytest.mark.parametrize("attention, softcap", [("eager", 2.0), ("sdpa", 0.0)])
def test_sdpa_leaves_the_soft_cap_out(attention, softcap):
    model = tiny_model("gemma2", 0, attn_logit_softcapping=2.0)
    model.config._attn_implementation_internal = attention
    assert {layer.attention.softcap for layer in plan_for(model).layers} == {softcap}


def other(family, change=None, **settings):
    """A maker of a model, changed in place or into what ``change`` returns."""

    def make():
        model = tiny_model(family, 0, **settings)
        changed = change(model) if change else None
        return model if changed is None else changed

    return make


llama = partial(other, "llama")


def subclass(module):
    module.__class__ = type("Mine", (type(module),), {})


def setting(name, value):
    """Set an attribute, by its dotted name from the model on."""

    def change(model):
        path, _, last = name.rpartition(".")
        setattr(operator.attrgetter(path)(model) if path else model, last, value)

    return change


class Packed(torch.Tensor):
    """Quantised weights come as such."""


def packed(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Packed))
    assert type(model.lm_head) is nn.Linear and type(model.lm_head.weight) is Packed


def one_byte(model):
    weight = torch.zeros(VOCAB, 16, dtype=torch.int8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)


def with_adapters(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def small_embedding(model):
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight[:20].detach())


def without_bias(model):
    model.model.layers[1].self_attn.q_proj.bias = None


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


REFUSED = {
    "mixture": (other("mixtral"), "no plan is known for the family 'mixtral'"),
    "mla": (other("deepseek_v3"), "no plan is known for the family 'deepseek_v3'"),
    "no-model": (lambda: nn.Linear(1, 1), "no plan is known for the family None"),
    "subclass": (llama(subclass), r"Mine is not transformers' own LlamaForCausalLM"),
    "linear-subclass": (
        llama(lambda model: subclass(model.lm_head)),
        r"lm_head is a .*\.Mine, which is not in its family's plan",
    ),
    "norm-subclass": (llama(lambda model: subclass(model.model.norm)), r"model\.norm is a .*Mine"),
    "quantised": (llama(setting("hf_quantizer", object())), "its weights are quantised"),
    "one-byte": (llama(one_byte), r"lm_head\.weight is int8, which no plan is run in"),
    "packed": (llama(packed), r"lm_head\.weight is a .*\.Packed of torch\.strided"),
    "mixed": (
        llama(lambda model: model.model.norm.float() and None),
        r"its weights are of mixed dtypes \(float32, float64\)",
    ),
    "elsewhere": (
        llama(lambda model: model.lm_head.to("meta") and None),
        r"lm_head\.weight lies on meta, not on the CPU",
    ),
    "compiled": (llama(torch.compile), "the model is compiled"),
    "compiled-in-place": (llama(lambda model: model.compile()), "the model is compiled"),
    "compiled-part": (
        llama(lambda model: setattr(model.model, "norm", torch.compile(model.model.norm))),
        r"model\.norm is compiled",
    ),
    "hook": (
        llama(lambda model: model.model.norm.register_forward_hook(print) and None),
        r"model\.norm has a hook on its forward",
    ),
    "pre-hook": (
        llama(lambda model: model.register_forward_pre_hook(print) and None),
        "the model has a hook on its forward",
    ),
    "forward": (
        llama(lambda model: setattr(model.model.norm, "forward", torch.sin)),
        r"model\.norm has a forward of its own",
    ),
    "adapters": (llama(with_adapters), r"q_proj has an adapter"),
    "adapters-inside": (
        llama(lambda model: with_adapters(model).get_base_model()),
        r"model\.layers\.0\.self_attn\.q_proj has an adapter",
    ),
    "parametrised": (llama(parametrised), "lm_head is parametrised"),
    "attention-dropout": (
        llama(lambda model: model.train(), attention_dropout=0.1),
        r"self_attn is in training mode with a dropout of 0\.1",
    ),
    "dropout": (other("gpt2", lambda model: model.train()), "in training mode with a dropout"),
    "layerdrop": (
        other("opt", lambda model: model.train(), dropout=0.0, layerdrop=0.3),
        r"in training mode with a dropout of 0\.3",
    ),
    "longrope": (other("phi3-longrope"), "rope_type='longrope' is not in a plan"),
    "dynamic": (
        llama(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        "rope_type='dynamic' is not in a plan",
    ),
    "partly-rotary": (
        llama(
            rope_parameters=dict(
                rope_type="linear", rope_theta=1e4, factor=2.0, partial_rotary_factor=0.5
            )
        ),
        "its rotary embedding turns 4 of the 8 numbers of a head",
    ),
    "activation": (llama(hidden_act="relu2"), "its activation ReLUSquared.* is not in a plan"),
    "odd-heads": (other("gpt2", hidden_size=12), "its heads have the odd size 3"),
    "chunks": (llama(attention_chunk_size=8), "its attention is in chunks"),
    "bidirectional": (
        other("gemma3", use_bidirectional_attention=True),
        "its attention looks ahead",
    ),
    "not-causal": (llama(setting("config.is_causal", False)), "its attention looks ahead"),
    "not-causal-layer": (
        llama(setting("model.layers.1.self_attn.is_causal", False)),
        "its attention looks ahead",
    ),
    "attention": (
        llama(setting("config._attn_implementation_internal", "mine")),
        "the attention 'mine' is not known",
    ),
    "window": (llama(sliding_window=16), "sliding_window is set, which its attention does not"),
    "kinds": (
        other("mistral", layer_types=["full_attention", "sliding_attention"]),
        "layer_types is set, which its attention does not follow",
    ),
    "kind": (
        other("qwen2", setting("config.layer_types", ["chunked_attention"] * 2)),
        "layer 0 has chunked_attention, which is not in a plan",
    ),
    "windows-differ": (
        other("qwen2-window", setting("model.layers.1.self_attn.sliding_window", 5)),
        "layer 1 has sliding_attention with a window of 5, and its mask one of 9",
    ),
    "layer-count": (
        llama(setting("config.num_hidden_layers", 1)),
        "it has 2 layers, and its configuration says 1",
    ),
    "biases": (other("qwen2", without_bias), "some of its .* projections have a bias, others not"),
    "sizes": (
        other("phi3", setting("model.layers.0.self_attn.num_key_value_heads", 1)),
        "1 heads of keys of size 8 do not explain",
    ),
    "no-linear": (
        llama(setting("lm_head", nn.Embedding(VOCAB, 16, dtype=torch.float64))),
        "a Embedding stands where a linear layer is expected",
    ),
    "max-norm": (
        llama(setting("model.embed_tokens.max_norm", 1.0)),
        r"its embedding rescales rows \(max_norm\)",
    ),
    "vocabulary": (llama(small_embedding), "its head has 24 outputs, and its embedding 20 rows"),
    "cross-attention": (other("gpt2", add_cross_attention=True), "it has cross-attention"),
    "opt-after": (
        other("opt", do_layer_norm_before=False),
        "its norms stand after the residual sums",
    ),
    "opt-projected": (other("opt", word_embed_proj_dim=8), "its embedding is projected"),
    "opt-no-norm": (
        other("opt", _remove_final_layer_norm=True),
        "it has no norm before its head",
    ),
    "no-weight": (
        other("opt", layer_norm_elementwise_affine=False),
        "a LayerNorm of it has no weight of its own",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    make, message = REFUSED[reason]
    with pytest.raises(NoPlan, match=message):
        plan_for(make())


def test_circumstances_are_refused(monkeypatch):
    model = tiny_model("llama", 0)
    with torch.autocast("cpu"), pytest.raises(NoPlan, match="autocast is on"):
        plan_for(model)
    handle = hooks.register_module_forward_pre_hook(lambda *_: None)
    try:
        with pytest.raises(NoPlan, match="there are hooks on the forward of all modules"):
            plan_for(model)
    finally:
        handle.remove()
    plan_for(model)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    with pytest.raises(NoPlan, match=r"the forward of .*\.LlamaMLP has been replaced"):
        plan_for(model)


def test_other_rotary_embeddings_are_refused():
    class Interleaved(nn.Module):
        rope_type = "default"

        def forward(self, x, positions):
            angles = (positions[..., None] * torch.tensor([1.0, 0.1])).repeat_interleave(2, -1)
            return angles.cos(), angles.sin()

    with pytest.raises(NoPlan, match="does not turn the halves of a head together"):
        rotary(Interleaved(), torch.float32)
