"""A recording is used again, made anew where it no longer holds, and let go in the end."""

import contextlib
import gc
import itertools
import random
import weakref

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from helpers import runners
from helpers.runners import EndsAfter, ours, plain, prompts, sampled, tiny_model
from msn_ext import DraftTree
from msn_ext.decoding import BestFirst, TreeDrafter, capture, decoder, runner

pytestmark = pytest.mark.usefixtures("tapes")  # steps on the CPU are recorded, too


def test_a_drafter_that_was_elsewhere_in_between_is_recorded_anew(tapes):
    """Its tables lie at other places then; recordings that point to the old ones would read what is
    not theirs.
    """
    model, drafter = tiny_model("llama", 3), BestFirst(16)
    for batch in (2, 1, 2, 2, 1):
        ids, mask = prompts(batch, batch)
        for _ in range(2):
            assert torch.equal(
                ours(model, ids, mask, drafter, max_new_tokens=30),
                plain(model, ids, mask, max_new_tokens=30),
            )
    assert sum(len(tape.captures) for tape in tapes) == 4


def test_a_failed_call_leaves_nothing_behind(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)

    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyError("broken")

    want = plain(model, ids, mask, max_new_tokens=20)
    assert torch.equal(ours(model, ids, mask, "auto", max_new_tokens=20), want)
    with pytest.raises(KeyError):
        ours(
            model,
            ids,
            mask,
            "auto",
            max_new_tokens=20,
            stopping_criteria=StoppingCriteriaList([Broken()]),
        )
    assert torch.equal(ours(model, ids, mask, "auto", max_new_tokens=20), want)


def test_recordings_are_few_and_go_with_their_model(tapes):
    model = tiny_model("llama", 3)
    rng = random.Random(0)
    for batch in range(1, 8):
        ids, mask = prompts(rng.randrange(100), 1 + batch % 3)
        drafter = rng.choice(["auto", "paper", "none", "jacobi"])
        ours(model, ids, mask, drafter, max_new_tokens=12)
    kept = list(runner.pools[model])
    assert len(kept) == runner.MAX_RUNNERS
    watched = [weakref.ref(one.decoder) for one in kept] + [weakref.ref(model)]
    del kept, model
    gc.collect()
    assert not any(ref() for ref in watched)


def test_caches_that_are_kept_are_bounded(tapes, monkeypatch):
    model = tiny_model("llama", 3)
    for batch in (1, 2, 3):
        ours(model, *prompts(0, batch), "auto", max_new_tokens=5)
    sizes = [kept.decoder.cache_bytes for kept in runner.pools[model]]
    assert len(sizes) == 3 and sizes[0] > 0 and sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]
    kind = type(tapes[0])
    monkeypatch.setattr(kind, "memory", sizes[0] + sizes[2] - 1, raising=False)
    for kept in runner.pools[model]:
        kept.backend.memory = kind.memory
    ours(model, *prompts(1, 3), "auto", max_new_tokens=5)
    assert [kept.decoder.cache_bytes for kept in runner.pools[model]] == [sizes[2]]


def test_other_weights_are_not_taken_for_the_recorded_ones(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    ours(model, ids, mask, "auto", max_new_tokens=30)
    other = tiny_model("llama", 4)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(
        ours(model, ids, mask, "auto", max_new_tokens=30),
        plain(other, ids, mask, max_new_tokens=30),
    )


def hook(model):
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0.1)
    yield
    handle.remove()
    yield


def hook_before(model):
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, args: (args[0] * 3, *args[1:])
    )
    yield
    handle.remove()
    yield


def replaced(model):
    module, forward = model.model.layers[0].mlp, model.model.layers[0].mlp.forward
    module.forward = lambda x: forward(x) * 0.1
    yield
    del module.forward
    yield


def implementation(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if before == "sdpa" else "sdpa")
    yield
    model.set_attn_implementation(before)
    yield


def training(model):
    model.train()
    yield
    model.eval()
    yield


def adapters(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    for name in "ab":
        settings = dict(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model.add_adapter(peft.LoraConfig(**settings), adapter_name=name)
    model.to(torch.float64)
    for name in "aba":
        model.set_adapter(name)
        yield
    model.disable_adapters()
    yield
    model.enable_adapters()
    yield


def one_adapter(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    ).double()
    yield
    with adapted.disable_adapter():
        yield
    yield
    adapted.merge_adapter()
    yield


@pytest.mark.parametrize(
    "change", [hook, hook_before, replaced, implementation, training, adapters, one_adapter]
)
def test_a_recording_is_of_the_way_that_the_model_computes(change, tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0, padded=False)
    texts = []
    for _ in itertools.chain([None], change(model)):
        want = plain(model, ids, mask, max_new_tokens=30, eos_token_id=None)
        for _ in range(2):
            assert torch.equal(
                ours(model, ids, mask, "paper", max_new_tokens=30, eos_token_id=None), want
            )
        texts.append(want.tolist())
    assert len(tapes) > 1 and all(tape.replays for tape in tapes)
    assert change in (implementation, training) or texts[1] != texts[0], "a change that matters"


@contextlib.contextmanager
def unrecorded():
    backend = capture.BACKENDS.pop(runners.where)
    yield
    capture.BACKENDS[runners.where] = backend


def test_recordings_under_autocast_read_the_weights_themselves(tapes):
    """Autocast keeps narrow copies of weights while it is on, and none afterwards."""
    model = tiny_model("llama", 3).float()
    other = tiny_model("llama", 4).float().state_dict()
    ids, mask = prompts(0)
    options = dict(max_new_tokens=30, eos_token_id=None)
    wanted, found = [], []
    for weights in (model.state_dict(), other):
        model.load_state_dict(weights)
        with torch.autocast(runners.where, dtype=torch.bfloat16):
            with unrecorded():
                wanted.append(ours(model, ids, mask, "paper", **options).tolist())
            found.append(ours(model, ids, mask, "paper", **options).tolist())
        assert torch.equal(
            ours(model, ids, mask, "paper", **options), plain(model, ids, mask, **options)
        )
    assert found == wanted and found[0] != found[1]
    assert len(tapes) == 2 and all(tape.replays for tape in tapes)


def test_a_cache_grows_with_its_text(tapes, monkeypatch):
    """It begins with few slots; where they end, everything moves and is recorded anew."""
    monkeypatch.setattr(decoder, "AT_FIRST", 520)
    for family in ("llama", "gptj"):
        tapes.clear()
        model = tiny_model(family, 3)
        kept = []
        for seed, length in ((0, 8), (1, 8), (2, 100)):
            ids, mask = prompts(seed, 2, length=length)
            options = dict(max_new_tokens=360, eos_token_id=None)
            assert torch.equal(
                ours(model, ids, mask, DraftTree.chain(4), **options),
                plain(model, ids, mask, **options),
            )
            (only,) = runner.pools[model]
            kept.append(only.decoder._pass._cache.capacity)
        assert 8 + 520 < kept[0] == kept[1] == kept[2] == runner.room_for(460)
        assert len(tapes[0].captures) == 2, "before it grew, and after"
        assert tapes[0].warm_ups == 3, "one more to see that nothing waits"
    long = dict(max_new_tokens=100_000, eos_token_id=int(ids[0, -1]))
    ours(
        model,
        ids,
        mask,
        "none",
        **long,
        stopping_criteria=StoppingCriteriaList([EndsAfter(ids.shape[1] + 9)]),
    )
    *_, last = runner.pools[model]
    assert last.decoder.cache_bytes < 1e7, "no room for tokens that may never come"


def test_equal_trees_share_a_recording(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    for _ in range(4):
        ours(model, ids, mask, DraftTree.chain(4), max_new_tokens=20)
    assert len(tapes) == 1 and len(tapes[0].captures) == 1


def test_what_a_recording_reads_of_a_tree_stays(tapes):
    """The tensors of a tree are forgotten when many others come; kernels would go on reading where
    they were.
    """
    model, drafter = tiny_model("llama", 3), TreeDrafter(DraftTree.chain(4))
    ids, mask = prompts(0)
    ours(model, ids, mask, drafter, max_new_tokens=20)
    read = weakref.ref(drafter._tree.tensors(ids.device).parents)
    for tape in tapes:
        tape.captures.clear()
    for kept in runner.pools[model]:
        kept.captures.clear()
    DraftTree.tensors.cache_clear()
    gc.collect()
    assert read() is not None


def test_failed_calls_leave_no_keys(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0, padded=False)

    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyError("broken")

    for penalty in (1.1, 1.2, 1.3):
        ours(model, ids, mask, "none", max_new_tokens=5, repetition_penalty=penalty)
        with pytest.raises(KeyError):
            ours(
                model,
                ids,
                mask,
                "none",
                max_new_tokens=5,
                repetition_penalty=penalty,
                stopping_criteria=[Broken()],
            )
    assert len(runner.pools[model]) == 0


def test_a_step_under_way_is_awaited_before_its_recording_may_go(tapes, monkeypatch):
    model, waits = tiny_model("llama", 3), []
    monkeypatch.setattr(
        capture.BACKENDS[runners.where], "synchronize", lambda self: waits.append(self)
    )
    ours(model, *prompts(0), "paper", max_new_tokens=5)
    assert waits == tapes
    with pytest.raises(ValueError, match="NaN"):
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        sampled(model, *prompts(0), "paper", 0)
    assert waits == tapes and len(tapes) == 2
