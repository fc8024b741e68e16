"""Which forward pass a model is decoded by, and that changes of a model are noticed."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers.bits import decoded
from helpers.families import tiny_model
from msn_ext import generate
from msn_ext.decoding.engine import native_plan_for

IDS = torch.tensor([[5, 9, 4, 7, 11]])
SETTINGS = dict(do_sample=False, max_new_tokens=24, eos_token_id=None, return_dict_in_generate=True)


def made_in_inference_mode():
    with torch.inference_mode():
        return tiny_model("llama", 2)


def hooked():
    model = tiny_model("llama", 2)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    return model


def adapted():
    model = get_peft_model(tiny_model("llama", 2), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.double()


class EightBits(torch.nn.Module):
    """A linear layer of quantised weights."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).mT


def quantised():
    model = tiny_model("llama", 2)
    model.model.layers[0].mlp.down_proj = EightBits(model.model.layers[0].mlp.down_proj)
    return model


def compiled():
    model = tiny_model("llama", 2)
    model.model.layers[0].mlp.compile(backend="eager")
    return model


REFUSED = {
    "inference mode": (made_in_inference_mode, r"made under torch\.inference_mode"),
    "hook": (hooked, r"model\.layers\.1\.mlp has a hook on its forward"),
    "adapter": (adapted, "has an adapter|no plan is known|is not transformers' own"),
    "quantised": (quantised, r"down_proj is a \S*EightBits, which is not in its family"),
    "compiled": (compiled, r"model\.layers\.0\.mlp is compiled"),
    "mixture": (lambda: tiny_model("mixtral", 2), "no plan is known for the family 'mixtral'"),
    "longrope": (lambda: tiny_model("phi3-longrope", 2), "rope_type='longrope' is not in a plan"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason, caplog):
    """By "native" with an error that says why; "auto" says so and decodes by the model's own."""
    make, message = REFUSED[reason]
    model = make()
    with pytest.raises(ValueError, match=f"engine is 'native', which .* decoded by: .*({message})"):
        generate(model, IDS, engine="native", **SETTINGS)
    with caplog.at_level(logging.INFO, "msn_ext"):
        found = generate(model, IDS, **SETTINGS)
    assert found.engine == "torch"
    said = [line for line in caplog.messages if "the model's own forward pass" in line]
    assert len(said) == 1
    plain = model.generate(input_ids=IDS, **SETTINGS).sequences
    assert torch.equal(found.sequences, plain)


def test_no_engine_of_that_name(monkeypatch):
    model = tiny_model("llama", 2)
    with pytest.raises(ValueError, match="engine is 'gpu'; expected 'auto', 'native', 'torch'"):
        generate(model, IDS, engine="gpu", **SETTINGS)
    monkeypatch.setenv("MSN_ENGINE", "gpu")
    with pytest.raises(ValueError, match="MSN_ENGINE is 'gpu'; expected"):
        generate(model, IDS, **SETTINGS)
    assert generate(model, IDS, engine="torch", **SETTINGS).engine == "torch"


def test_autocast_is_refused():
    model = tiny_model("llama", 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="autocast is on"):
            generate(model, IDS, engine="native", **SETTINGS)
        assert generate(model, IDS, **SETTINGS).engine == "torch"
    assert generate(model, IDS, **SETTINGS).engine == "native"


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_defaults_of_the_caller_are_left_out(device, dtype):
    """Weights are packed and passes made under another default device and dtype, too."""
    expected = tiny_model("llama", 2).generate(IDS, **SETTINGS).sequences
    model, before = tiny_model("llama", 2), torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        found = generate(model, IDS, engine="native", **SETTINGS)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert torch.equal(found.sequences, expected)


# ---- changed weights and settings ----------------------------------------------------------------


def optimised(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(IDS, labels=IDS).loss.backward()
    optimiser.step()
    model.zero_grad()


def loaded(model):
    model.load_state_dict(tiny_model("llama", 7).state_dict())


def data_changed(model):
    """Which torch's version counters do not count."""
    weight = model.model.layers[1].mlp.down_proj.weight
    version = weight._version
    weight.data.mul_(-1)
    assert weight._version == version


def data_replaced(model):
    model.model.layers[0].self_attn.v_proj.weight.data = torch.ones(16, 16).double()


def parameter_replaced(model):
    old = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(old.detach().flip(0).clone())


def norm_changed(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-1, 1, 16))


CHANGES = {
    "optimiser": optimised,
    "load_state_dict": loaded,
    "data": data_changed,
    "other data": data_replaced,
    "parameter": parameter_replaced,
    "norm": norm_changed,
    "float32": lambda model: model.to(torch.float32),
    "and back": lambda model: model.to(torch.bfloat16).to(torch.float64),
    "scaling": lambda model: vars(model.model.layers[1].self_attn).update(scaling=2.0),
    "epsilon": lambda model: vars(model.model.norm).update(variance_epsilon=10.0),
    "rotary": lambda model: vars(model.model.rotary_emb).update(attention_scaling=3.0),
    "activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
    "order": lambda model: setattr(model.model, "layers", model.model.layers[::-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    """What was packed of the old ones is not used: text and logits are those of a model that was
    never decoded with before.
    """
    model, text = tiny_model("llama", 2), IDS.tolist()
    (before,) = decoded(model, text, "auto")
    CHANGES[change](model)
    fresh = copy.deepcopy(model)  # buffers included, which change with the dtype
    (found,), (expected,) = (decoded(one, text, "auto") for one in (model, fresh))
    assert found.is_bitwise(expected) and not found.is_bitwise(before)
    if model.dtype == torch.float64:
        plain = fresh.generate(IDS, **SETTINGS).sequences[0, IDS.shape[1] :]
        assert torch.equal(found.tokens, plain)


def test_settings_that_no_plan_has_change_nothing():
    """Weights are not packed again."""
    model = tiny_model("llama", 2)
    kept = native_plan_for(model, "native")
    model.config.name_or_path = "another"
    model.config.use_cache = False
    vars(model.model.layers[0]).update(note=1)
    assert native_plan_for(model, "native") is kept
    model.model.layers[0].self_attn.scaling = 2.0
    assert native_plan_for(model, "native") is not kept


@pytest.mark.parametrize("positions", [5, 8, 9])
def test_a_short_table_of_positions(positions):
    """The plan is tried on eight tokens and more; what cannot be tried so is the model's own."""
    model = tiny_model("gpt2", 1, n_positions=positions, max_position_embeddings=positions)
    settings = SETTINGS | dict(max_new_tokens=positions - 2)  # the last token is not read again
    out = generate(model, IDS[:, :3], **settings)
    assert torch.equal(out.sequences, model.generate(IDS[:, :3], **settings).sequences)
    assert out.engine == ("native" if positions > 8 else "torch")
