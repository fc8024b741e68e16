"""Who calls the model while we decode with it gets what the model says alone."""

import copy
import random
import signal
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.cases import bounded
from helpers.families import tiny_model
from msn_ext import generate

PROMPT = torch.tensor([[5, 9, 4, 7, 5, 9]])
OTHER = torch.tensor([[7, 8, 3, 11, 6], [4, 4, 12, 9, 20]])
SETTINGS = dict(do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
TREES = dict(draft="paper", engine="torch", **SETTINGS)
FAMILIES = ["llama", "phi3", "gemma3", "qwen2-window", "gpt2", "deepseek_v3", "mixtral"]


def model_of(family: str, implementation: str = "sdpa"):
    model = tiny_model(family, 3)
    model.set_attn_implementation(implementation)
    return model


def calls(model) -> dict:
    """What others may ask of a model, and what it says to them."""
    return {
        "logits": lambda: model(OTHER).logits,
        "text": lambda: model.generate(OTHER, attention_mask=torch.ones_like(OTHER), **SETTINGS),
    }


class Meanwhile:
    """Does something in another thread in the middle of every forward pass of this one."""

    def __init__(self, model, do):
        self.results = []

        def hook(*_):
            if threading.current_thread() is here:
                with ThreadPoolExecutor(1) as pool:
                    self.results.append(pool.submit(do).result())

        here = threading.current_thread()
        self._hook = model.get_decoder().layers[-1].register_forward_pre_hook(hook)

    def __enter__(self):
        return self.results

    def __exit__(self, *_):
        self._hook.remove()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2-window", "deepseek_v3"])
@torch.no_grad()
def test_within_a_pass_others_get_what_they_get_alone(family, implementation):
    model = model_of(family, implementation)
    expected = model.generate(PROMPT, **SETTINGS)
    for name, call in calls(model).items():
        alone = call()
        with Meanwhile(model, torch.no_grad()(call)) as results:
            assert torch.equal(generate(model, PROMPT, **TREES), expected), name
        assert len(results) >= 3
        assert all(torch.equal(result, alone) for result in results), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_threads_hammer_a_model(family, implementation):
    """Two threads decode trees, each by its engine, one calls the model, one decodes plainly."""
    model = model_of(family, implementation)
    work = calls(model)
    expected = model.generate(PROMPT, **SETTINGS)
    work["tree"] = lambda: generate(model, PROMPT, **TREES)
    work["trees"] = lambda: generate(model, PROMPT, **TREES | dict(engine="auto"))
    alone = {name: expected if name.startswith("tree") else call() for name, call in work.items()}
    start, stop = threading.Barrier(len(work)), threading.Event()

    @torch.no_grad()
    def hammer(name: str) -> int:
        start.wait()
        for round in range(1000):
            if not name.startswith("tree") and stop.is_set():
                break
            try:
                assert torch.equal(work[name](), alone[name]), (name, round)
            except BaseException:
                stop.set()
                raise
            if name.startswith("tree") and round == 3:
                break
        stop.set()
        return round

    with ThreadPoolExecutor(len(work)) as pool:
        assert all(rounds >= 1 for rounds in pool.map(hammer, work))


def test_copies_made_meanwhile_are_as_the_user_set_the_model_up():
    """Of its config, and of all of it."""
    model = model_of("llama", "eager")
    with Meanwhile(model, lambda: copy.deepcopy(model.config)) as results:
        generate(model, PROMPT, **TREES)
    assert {config._attn_implementation for config in results} == {"eager"}
    with Meanwhile(model, lambda: copy.deepcopy(model)(OTHER).logits) as results:
        generate(model, PROMPT, **TREES)
    alone = model(OTHER).logits
    assert len(results) >= 3 and all(torch.equal(result, alone) for result in results)


@torch.no_grad()
def test_compiled_models(fresh_compiler):
    """What torch.compile traced for one thread is not what runs in the other."""
    model = model_of("llama")
    alone, expected = calls(model)["logits"](), model.generate(PROMPT, **SETTINGS)
    model.model.layers[0].compile(backend="eager")
    call = torch.no_grad()(calls(model)["logits"])
    assert torch.equal(call(), alone)
    with Meanwhile(model, call) as results:
        assert torch.equal(generate(model, PROMPT, **TREES), expected)
    assert len(results) >= 3 and all(torch.equal(result, alone) for result in results)
    assert torch.equal(call(), alone)
    other = model_of("llama")
    whole = torch.compile(other.model.layers[1], backend="eager", fullgraph=True)
    h = torch.zeros(1, 3, 16, dtype=torch.float64)
    turns = other.model.rotary_emb(h, torch.arange(3)[None])
    given = dict(attention_mask=None, position_embeddings=turns)
    assert torch.equal(whole(h + 1, **given), other.model.layers[1](h + 1, **given))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_call_within_a_pass():
    """A hook of the model's may decode with it, trees within a tree."""
    model = model_of("llama")
    expected = model.generate(PROMPT, **SETTINGS)
    found, inside = [], threading.Event()

    def hook(*_):
        if not inside.is_set():
            inside.set()
            found.append(generate(model, PROMPT, **TREES))
            inside.clear()

    model.model.layers[-1].register_forward_pre_hook(hook)
    found.append(bounded(lambda: generate(model, PROMPT, **TREES), 60))
    assert len(found) >= 4 and all(torch.equal(text, expected) for text in found)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_within_a_pass_leaves_the_model_as_it_was(error):
    model = model_of("llama", "eager")
    alone, passes = model(OTHER).logits, []

    def hook(*_):
        passes.append(model.config._attn_implementation)
        if len(passes) == 3:
            raise error

    handle = model.model.layers[-1].register_forward_pre_hook(hook)
    with pytest.raises(error):
        generate(model, PROMPT, **TREES)
    handle.remove()
    assert passes[0] == "eager" != passes[2]
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(OTHER).logits, alone)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers on this system")
def test_interrupts_at_any_moment_leave_the_model_as_it_was():
    model, rng = model_of("llama"), random.Random(0)
    alone, expected = model(OTHER).logits, model.generate(PROMPT, **SETTINGS)
    within_a_pass = 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.03))
                generate(model, PROMPT, **TREES)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt as interrupt:
                called = {frame.name for frame in traceback.extract_tb(interrupt.__traceback__)}
                within_a_pass += "over_tree" in called
            assert torch.equal(model(OTHER).logits, alone)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert within_a_pass > 10
    assert torch.equal(generate(model, PROMPT, **TREES), expected)
