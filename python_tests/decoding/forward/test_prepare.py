"""Models whose weights are packed in place: the same text, state and gradients, in one copy."""

import copy
import io
import logging
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import msn_ext
from helpers.families import VOCAB, tiny_model

MODELS = {
    "untied": ("llama", {}),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "conv1d": ("gpt2", {}),
    "fused": ("phi3", {}),
    "interleaved": ("gpt_neox", {}),
    "scaled-embedding": ("gemma3", {}),
}
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
TEXTS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def made(name: str, dtype=torch.float32):
    family, settings = MODELS[name]
    return tiny_model(family, 1, dtype, **settings).eval()


def text(model, engine="native", **settings):
    mask = torch.ones_like(TEXTS)
    return msn_ext.generate(
        model, TEXTS, engine=engine, attention_mask=mask, max_new_tokens=12, **settings
    )


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert type(tensor) in (torch.Tensor, torch.nn.Parameter)
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def shapes(model):
    return [
        (name, weight.shape, weight.dtype, weight.requires_grad)
        for name, weight in model.named_parameters()
    ]


def packed_in(model) -> list[str]:
    return [name for name, one in model.named_parameters() if type(one) is not torch.nn.Parameter]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_text_and_state_are_the_same_bits(name, dtype):
    plain, model = made(name, dtype), made(name, dtype)
    state = copied(plain.state_dict())
    assert msn_ext.prepare(model) is model
    assert packed_in(model) and shapes(model) == shapes(plain)
    for engine in ("native", "auto"):
        assert torch.equal(text(model, engine), text(plain, "native"))
    found = text(model, "auto", return_dict_in_generate=True)
    assert found.engine == "native"
    assert_same(model.state_dict(), state)
    assert msn_ext.unprepare(model) is model
    assert not packed_in(model) and shapes(model) == shapes(plain)
    assert_same(model.state_dict(), state)
    assert torch.equal(text(model), text(plain))


@pytest.mark.parametrize("name", MODELS)
def test_its_own_forward_is_the_same_bits(name):
    plain, model = made(name), msn_ext.prepare(made(name))
    for mode in (True, False):
        logits = []
        for one in (plain, model):
            torch.manual_seed(0)  # of dropout
            with torch.no_grad():
                logits.append(one.train(mode)(TEXTS).logits)
        assert torch.equal(*logits)
    assert torch.equal(text(model, "torch"), text(plain, "torch"))
    options = dict(attention_mask=torch.ones_like(TEXTS), max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(TEXTS, **options), plain.generate(TEXTS, **options))


def test_gradients_reach_the_weights_and_optimizers_are_refused():
    plain, model = made("tied"), msn_ext.prepare(made("tied"))
    for one in (plain, model):
        one(TEXTS, labels=TEXTS).loss.backward()
    for (name, weight), (_, other) in zip(plain.named_parameters(), model.named_parameters()):
        assert torch.equal(weight.grad, other.grad), name
    with pytest.raises(RuntimeError, match=r"msn_ext\.unprepare\(model\) first"):
        torch.optim.AdamW(model.parameters()).step()
    assert torch.equal(model.lm_head.weight.dense(), plain.lm_head.weight)
    msn_ext.unprepare(model)
    torch.optim.AdamW(model.parameters()).step()


@pytest.mark.parametrize("name", ["tied", "untied", "conv1d"])
def test_saved_and_loaded_it_is_the_model_before(tmp_path, name):
    plain, model = made(name), msn_ext.prepare(made(name))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), plain.state_dict())
    assert not packed_in(loaded)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert_same(torch.load(io.BytesIO(file.getvalue())), plain.state_dict())


def test_tied_weights_stay_tied():
    model = msn_ext.prepare(made("tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    msn_ext.unprepare(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_lowered(name):
    plain, model = made(name).to(torch.bfloat16), made(name)
    for one, other in zip(plain.buffers(), made(name).buffers()):
        one.data = other.data  # .to() rounds buffers, too, which from_pretrained does not
    msn_ext.prepare(model, dtype=torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert torch.equal(text(model), text(plain))
    assert shapes(model) == shapes(plain)
    assert_same(model.state_dict(), plain.state_dict())


def test_int8_is_near_and_says_so(caplog):
    plain, model = made("tied"), made("tied")
    msn_ext.prepare(model, weights="int8")
    assert text(model).shape == text(plain).shape
    with caplog.at_level(logging.WARNING, "msn_ext"):
        state = model.state_dict()
    assert "int8" in caplog.text
    for name, weight in plain.state_dict().items():
        error = (state[name] - weight).abs().max() / weight.abs().max()
        assert error < 0.01
        assert (error > 0) == (weight.dim() == 2)
    msn_ext.unprepare(model)
    caplog.clear()
    assert_same(model.state_dict(), state)
    assert not caplog.text


def test_twice_is_once_and_otherwise_is_again():
    model = msn_ext.prepare(made("tied"))
    weight = model.lm_head.weight
    assert msn_ext.prepare(model).lm_head.weight is weight
    msn_ext.prepare(model, dtype=torch.bfloat16)
    assert model.lm_head.weight is not weight
    assert torch.equal(text(model), text(msn_ext.prepare(made("tied"), dtype=torch.bfloat16)))


# ---- weights that change -------------------------------------------------------------------------


def test_writing_is_refused_or_right():
    model, other = msn_ext.prepare(made("untied")), tiny_model("llama", 2, torch.float32)
    with pytest.raises(RuntimeError, match=r"msn_ext\.unprepare\(model\) first"):
        model.load_state_dict(other.state_dict())
    with torch.no_grad(), pytest.raises(RuntimeError, match="unprepare"):
        model.lm_head.weight[0] = 1
    with torch.no_grad(), pytest.raises(RuntimeError, match="unprepare"):
        model.lm_head.weight.data += 1
    msn_ext.unprepare(model).load_state_dict(other.state_dict())
    assert torch.equal(text(msn_ext.prepare(model)), text(other.eval()))


def test_what_is_not_packed_may_change():
    plain, model = made("biases"), msn_ext.prepare(made("biases"))
    text(model)
    for one in (plain, model):
        with torch.no_grad():
            one.model.norm.weight *= 1.5
            one.model.layers[0].self_attn.q_proj.bias += 0.5
            one.model.embed_tokens.weight *= -2
    assert torch.equal(text(model), text(plain))


def test_another_dtype_makes_it_dense():
    plain, model = made("tied"), msn_ext.prepare(made("tied"))
    for one in (plain, model):
        one.to(torch.bfloat16)
    assert not packed_in(model)
    assert_same(model.state_dict(), plain.state_dict())
    assert torch.equal(text(model), text(plain))
    assert model.to(torch.bfloat16) is model


def test_a_replaced_weight_is_noticed():
    plain, model = made("untied"), msn_ext.prepare(made("untied"))
    for one in (plain, model):
        one.lm_head.weight = torch.nn.Parameter(-one.state_dict()["lm_head.weight"])
    with pytest.raises(ValueError, match=r"msn_ext\.unprepare\(model\), then prepare"):
        text(model, "native")
    assert torch.equal(text(model, "auto"), text(plain, "torch"))
    assert torch.equal(text(msn_ext.prepare(model)), text(plain, "native"))


def test_adapters_are_run_by_the_model_itself():
    plain, model = made("untied"), msn_ext.prepare(made("untied"))
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    logits = []
    for one in (plain, model):
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(get_peft_model(one, config)(TEXTS).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="adapter|peft"):
        text(model)


def test_copies_are_dense():
    model = msn_ext.prepare(made("tied"))
    twin = copy.deepcopy(model)
    assert not packed_in(twin) and twin.lm_head.weight is twin.model.embed_tokens.weight
    assert_same(twin.state_dict(), made("tied").state_dict())
    assert torch.equal(text(twin), text(model))


def test_a_model_of_many_users_is_left_alone():
    model = made("tied")
    held = model.lm_head.weight
    expected = held.detach().clone()
    msn_ext.prepare(model)
    assert torch.equal(held, expected)


# ---- refusals and memory -------------------------------------------------------------------------


def test_models_without_a_plan_are_refused():
    model = tiny_model("mixtral", 1, torch.float32)
    with pytest.raises(ValueError, match="cannot be prepared: no plan is known"):
        msn_ext.prepare(model)
    with pytest.raises(ValueError, match="on meta, not on the CPU"):
        msn_ext.prepare(made("tied").to("meta"))
    with pytest.raises(ValueError, match="expected None or 'int8'"):
        msn_ext.prepare(model, weights="int4")
    with pytest.raises(ValueError, match="dtype is torch.int8"):
        msn_ext.prepare(model, dtype=torch.int8)


MEMORY = """
import sys, torch
import msn_ext
from transformers import LlamaConfig, LlamaForCausalLM

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

def made(size, layers):
    return LlamaForCausalLM(LlamaConfig(hidden_size=size, intermediate_size=3 * size,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=4096, tie_word_embeddings=True)).eval()

msn_ext.prepare(made(320, 2))  # what is loaded once
msn_ext.ops._C.release_freed()
model = made(640, 16)
weights = sum(weight.nbytes for weight in model.parameters())
base = status("VmRSS") - weights
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
msn_ext.prepare(model, **eval(sys.argv[1]))
print(weights, status("VmHWM") - base, status("VmRSS") - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(
    "options, most, after",
    [("{}", 1.15, 1.06), ("dict(dtype=torch.bfloat16)", 1.15, 0.56)],
)
def test_one_copy_of_the_weights(options, most, after, tmp_path):
    call = [sys.executable, "-c", MEMORY, options]
    # From elsewhere: Python would import the checkout's msn_ext/, where nothing is compiled.
    run = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    out = run.stdout
    weights, peak, left = map(int, out.split())
    assert peak / weights < most and left / weights < after
