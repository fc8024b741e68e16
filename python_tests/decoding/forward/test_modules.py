"""A model's modules: those of torch, without adapters that are left out; walked once a call."""

from collections import Counter

import pytest
import torch
from torch import nn

from helpers.families import tiny_model
from helpers.noise import gated_tiny
from helpers.trainers import with_adapter
from msn_ext import generate
from msn_ext.decoding.forward import modules as walked
from msn_ext.decoding.forward.adapter import CannotGate
from msn_ext.decoding.forward.modules import Modules

pytest.importorskip("peft")

IDS = torch.tensor([[5, 9, 4, 7]])


def same(found, wanted):
    return list(map(id, found)) == list(map(id, wanted))


def kinds(modules):
    return [type(module) for module in modules]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "adapted"])
def test_they_are_torchs_in_its_order(name):
    model = with_adapter(tiny_model("llama", 2)).get_base_model() if name == "adapted" else None
    model = model or tiny_model(name, 2)
    model.again = model.get_input_embeddings()  # what stands twice is there once
    model.none = None
    model.register_module("no_module", None)
    its = Modules(model)
    assert same(its.all, model.modules()) and same(its.base, its.all)
    assert same(its.parameters, model.parameters()) and same(its.buffers, model.buffers())


def off(model):
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    "make", [lambda: gated_tiny("llama"), lambda: off(with_adapter(tiny_model("llama", 2)))]
)
def test_adapters_that_are_left_out_are_none_of_them(make):
    bare, model = tiny_model("llama", 2), make().get_base_model()
    its = Modules(model)
    assert kinds(its.base) == kinds(bare.modules())
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    assert layers and same(its.adapted, layers)
    assert same(its.all, (x for x in model.modules() if x in {*its.base, *layers}))
    matrices = {x for name, x in model.named_parameters() if "lora_" in name}
    assert matrices
    expected = {*model.parameters()} - (set() if its.noise_adapter else matrices)
    assert {*its.parameters} == expected


def test_one_that_cannot_be_left_out():
    model = gated_tiny("llama")
    model.merge_adapter()
    its = Modules(model.get_base_model())
    assert same(its.all, model.get_base_model().modules())
    for _ in range(2):
        with pytest.raises(CannotGate, match="is merged into the weights"):
            _ = its.base


# ---- how often they are walked -------------------------------------------------------------------


def walks(monkeypatch, model, engine) -> tuple[Counter, int]:
    """Return of a call of ``generate`` how many modules torch's walks go to, and our own walks."""
    visits: Counter = Counter()
    with monkeypatch.context() as patch:
        for owner, name in (
            (nn.Module, "named_modules"),
            (nn.Module, "named_children"),
            (walked, "_walk"),
        ):
            counted(patch, owner, name, visits)
        out = generate(model, IDS, engine=engine, max_new_tokens=8, return_dict_in_generate=True)
    assert out.engine == engine
    return visits, visits.pop("_walk")


def counted(patch, owner, name, visits):
    function = getattr(owner, name)

    def call(*args, **kwargs):
        visits[name] += 1  # a walk of torch's calls it on every module
        return function(*args, **kwargs)

    patch.setattr(owner, name, call)


MODELS = {
    "base": lambda layers: tiny_model("llama", 2, num_hidden_layers=layers),
    "gated": lambda layers: gated_tiny("llama", settings=dict(num_hidden_layers=layers)),
    "off": lambda layers: off(with_adapter(MODELS["base"](layers))),
    "adapted": lambda layers: with_adapter(MODELS["base"](layers)),
}


# The native engine takes no ordinary adapters.
BY_ENGINE = [(name, "torch") for name in MODELS] + [(x, "native") for x in ("base", "gated", "off")]


@pytest.mark.parametrize("name, engine", BY_ENGINE)
def test_a_call_walks_once(monkeypatch, name, engine):
    """However many layers a model has, nobody goes through them but our one walk, and a second one
    into ordinary adapters.
    """
    found = []
    for layers in (2, 7):
        model = MODELS[name](layers).eval()
        walks(monkeypatch, model, engine)  # the first call packs and tries
        found.append(walks(monkeypatch, model, engine))
    (few, ours), (many, again) = found
    assert few == many and few.total() < 60
    assert ours == again == (2 if name == "adapted" else 1)
