"""The fused pass decodes as the model does. It is for GPUs; here its ops' CPU kernels run, steps
one by one and on the tape.
"""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from helpers import families, runners
from helpers.cases import build_tree, integers, tree_tensor
from helpers.families import VOCAB
from helpers.plans import MODELS, InFloat64, made
from helpers.runners import ours, plain, prompts, sampled, tiny_model
from msn_ext import generate, ops
from msn_ext.decoding import BestFirst, engine
from msn_ext.decoding.attention import KernelAttention
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.fused import FusedForward, FusedPlan, in_one, lay_together
from msn_ext.decoding.forward.plan import NoPlan
from msn_ext.decoding.forward.transformers import TransformersForward

PER_LAYER = 9
"""Launches: a norm, queries with keys and values, rotary and cache, attention, its output; a norm,
gates with ups, activation, the MLP's output. The sums are the norms'.
"""


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The native engine fuses on the CPU, too."""
    monkeypatch.setattr(engine, "PACKED_ON", set())


def native(model, ids, mask, draft="auto", **options):
    return ours(model, ids, mask, draft, engine="native", **options)


def plan_of(model) -> FusedPlan:
    kept = engine._kept[model].plan
    assert isinstance(kept, FusedPlan)
    return kept


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_of_trees_are_the_models(name):
    """To float64's last digits: prompts with padding, a tree a row, what is kept of it, another."""
    rng, model = random.Random(name), made(name)
    attention = KernelAttention(model)
    with InFloat64():
        plan = plan_for(model)
        lay_together(model, plan)
        passes = (
            TransformersForward(model, attention),
            FusedForward(FusedPlan(plan), model, attention),
        )
        # Gemma in transformers' own attention gives NaN at padding.
        offsets = integers([0, 0 if name.startswith("gemma") else 3])
        slots, nodes = 17, 12
        ids = torch.randint(VOCAB, (2, slots), generator=torch.Generator().manual_seed(1))
        at = (torch.arange(slots) - offsets[:, None]).clamp(min=0)
        for one in passes:
            one.read(ids, at, offsets, 1)
        prefix = integers([slots, slots])
        for _ in range(2):
            parents = tree_tensor([build_tree("random", nodes, rng.randrange(99))] * 2, "cpu")
            ancestors, depth = ops.tree_ancestors(parents)
            tokens = torch.randint(VOCAB, (2, nodes))
            positions = (prefix - offsets)[:, None] + depth.long()
            end = int(prefix.max()) + nodes
            tree = tokens, positions, prefix, offsets, ancestors, end
            theirs, mine = (one.check(*tree).logits for one in passes)
            assert (theirs - mine).abs().max() <= 1e-9 * theirs.abs().max()
            targets = torch.randint(VOCAB, (2, nodes))
            accepted, path, *_ = ops.verify_tree(tokens, targets, parents)
            for one in passes:
                one.commit(prefix, path, accepted)
            prefix = prefix + accepted
        for caches in zip(*(one.cached(int(prefix.min())) for one in passes)):
            for theirs, mine in zip(*caches):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted({name for name, (_, more) in MODELS.items() if not more}))
def test_recorded_steps_give_plain_decodings_text(name, tapes):
    """Longer than the windows, batches with padding, other prompts by the same recording."""
    model = tiny_model(name, 3)
    for seed, batch in ((0, 2), (1, 1), (2, 2)):
        ids, mask = prompts(seed, batch, padded=not name.startswith("gemma"))
        options = dict(max_new_tokens=40, eos_token_id=None)
        out = native(model, ids, mask, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, plain(model, ids, mask, **options))
        assert out.engine == "native"
    assert len(tapes) == 2 and all(tape.replays for tape in tapes)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_sampled_text_is_the_torch_engines(family, tapes):
    model = tiny_model(family, 3)
    for seed in range(3):
        ids, mask = prompts(seed, 2, padded=family != "gemma3")
        both = [
            sampled(model, ids, mask, "auto", seed, temperature=0.8, engine=its)
            for its in ("native", "torch")
        ]
        assert torch.equal(*both)
    assert len(tapes) == 2, "the engines do not share recordings"
    assert all(tape.replays for tape in tapes)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_goes_on_from_a_cache(family):
    """Three turns, ours and transformers' own in turns."""
    model = tiny_model(family, 3)
    ids, _ = prompts(0, 2, padded=False)
    cache, options = DynamicCache(), dict(max_new_tokens=15, eos_token_id=None)
    for turn in range(3):
        want = plain(model, ids, torch.ones_like(ids), **options)
        if turn != 1:
            out = native(model, ids, torch.ones_like(ids), past_key_values=cache, **options)
        else:
            out = plain(model, ids, torch.ones_like(ids), past_key_values=cache, **options)
        assert torch.equal(out, want)
        assert cache.get_seq_length() == want.shape[1] - 1
        ids = torch.cat([want, prompts(turn + 1, 2, 3, padded=False)[0]], 1)


def operations(model, tapes) -> list[str]:
    """What a recorded step launches: every operation that is no view is at most one."""
    tapes.clear()
    native(model, *prompts(0, 1), BestFirst(16), max_new_tokens=20)
    captured = tapes[0].captures[-1]
    return [str(operation[0]) for operation in captured.operations]


def test_launches_of_a_layer(tapes):
    """Counted as those of docs/kernels.md; at most 11 a layer were asked for."""
    if runners.where != "cpu":
        pytest.skip("counted on the tape")
    two, three = (
        operations(families.tiny_model("llama", 3, num_hidden_layers=layers), tapes)
        for layers in (2, 3)
    )
    assert len(three) - len(two) == PER_LAYER <= 11
    # Beside the layers: the embedding, a first norm, the head; and what is no pass (test_runner).
    assert len(two) - 2 * PER_LAYER <= 3 + 14
    for family, most in (("qwen3", 9), ("gemma2", 9), ("olmo2", 9), ("gpt2", 9), ("gpt_neox", 11)):
        two, three = (
            operations(families.tiny_model(family, 3, num_hidden_layers=layers), tapes)
            for layers in (2, 3)
        )
        assert len(three) - len(two) <= most, family


def storages(model) -> dict[int, int]:
    its = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
    return {storage.data_ptr(): storage.nbytes() for storage in its}


def test_weights_stay_one_copy(tmp_path):
    """Projections of the same rows lie together; the model, its files and its training are as
    before.
    """
    model, twin = tiny_model("qwen2", 3), tiny_model("qwen2", 3)
    kept = dict(model.named_parameters())
    ids, mask = prompts(0)
    native(model, ids, mask, max_new_tokens=5)
    assert sum(storages(model).values()) == sum(storages(twin).values())
    assert len(storages(twin)) - len(storages(model)) == 2 * (2 + 2 + 1), "q, k, v; biases; gates"
    of_plan = {
        x.untyped_storage().data_ptr()
        for layer in plan_of(model).layers
        for product in (layer.qkv, layer.out, layer.up, layer.down)
        for part in product._parts
        for x in part
        if x is not None
    }
    assert of_plan <= set(storages(model))
    for (name, parameter), its in zip(model.named_parameters(), twin.parameters()):
        assert parameter is kept[name] and torch.equal(parameter, its)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(model.device)
    for parameter, its in zip(loaded.parameters(), twin.parameters()):
        assert torch.equal(parameter, its)
    for one in (model, twin):
        one.train()(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(one.parameters(), 0.1).step()
        one.eval()
    for parameter, its in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(parameter, its, rtol=1e-12, atol=1e-12)
    before = plan_of(model)
    assert torch.equal(
        native(model, ids, mask, max_new_tokens=20), plain(twin, ids, mask, max_new_tokens=20)
    )
    assert plan_of(model) is before, "weights that change in place are used as they are"


def test_weights_laid_together_in_inference_mode_are_ordinary_ones():
    """They could not be trained any more."""
    model = tiny_model("llama", 3)
    with torch.inference_mode():
        lay_together(model, plan_for(model, model.device))
    assert in_one(
        [x.weight for x in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj)]
    )
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_weights_that_move_are_found_again(tapes):
    model, other = tiny_model("llama", 3), tiny_model("llama", 4)
    ids, mask = prompts(0)
    native(model, ids, mask, max_new_tokens=20)
    for name in ("q_proj", "o_proj"):
        its = getattr(other.model.layers[0].self_attn, name).weight.detach().clone()
        getattr(model.model.layers[0].self_attn, name).weight = torch.nn.Parameter(its)
        assert torch.equal(
            native(model, ids, mask, max_new_tokens=20), plain(model, ids, mask, max_new_tokens=20)
        )
    assert len(tapes) == 3


def test_settings_that_change_are_noticed(tapes):
    model, (ids, mask) = tiny_model("llama", 3), prompts(0)
    texts = []
    for scaling in (0.5, 2.0, 4.0):
        model.model.layers[1].self_attn.scaling = scaling
        texts.append(native(model, ids, mask, max_new_tokens=20))
        assert torch.equal(texts[-1], plain(model, ids, mask, max_new_tokens=20))
    assert not torch.equal(*texts[:2])
    assert len(tapes) == 3


def shared_keys(model):
    """Two layers have the same memory for their keys."""
    first, second = (layer.self_attn.k_proj for layer in model.model.layers)
    second.weight = torch.nn.Parameter(first.weight.detach())


def one_buffer(model):
    """All of a layer's projections are views of one tensor, in another order than ours."""
    its = model.model.layers[0].self_attn
    modules = its.o_proj, its.v_proj, its.q_proj, its.k_proj
    flat = torch.cat([module.weight.detach().flatten() for module in modules])
    for module, part in zip(modules, flat.split([m.weight.numel() for m in modules])):
        module.weight.data = part.view_as(module.weight)


@pytest.mark.parametrize("change, parts", [(shared_keys, [3, 3]), (one_buffer, [1, 1])])
def test_shared_weights_stay_where_they_are(change, parts):
    model = tiny_model("llama", 3)
    change(model)
    before, (ids, mask) = storages(model), prompts(0)
    out = native(model, ids, mask, max_new_tokens=30)
    assert torch.equal(out, plain(model, ids, mask, max_new_tokens=30))
    assert [len(layer.qkv._parts) for layer in plan_of(model).layers] == parts
    assert [len(layer.up._parts) for layer in plan_of(model).layers] == [1, 1]
    assert sum(storages(model).values()) == sum(before.values())


def test_rows_are_found_in_any_order():
    whole = torch.arange(40.0).view(10, 4)
    pieces = whole[6:10], whole[0:4], whole[4:6]
    found = in_one(pieces)
    assert torch.equal(found.tensor, whole) and found.starts == [6, 0, 4]
    assert in_one((whole[:4], whole[5:])) is None, "a gap"
    assert in_one((whole[:4], whole[3:])) is None, "a row twice"
    assert in_one((whole[:4], whole[4:].clone())) is None, "elsewhere"
    assert in_one((whole[:4], whole[4:, :3])) is None, "not whole rows"
    assert in_one((whole.T[:2], whole.T[2:])).tensor.shape == (4, 10)


def test_a_wrong_plan_is_refused_before_it_is_used(monkeypatch):
    model, (ids, mask) = tiny_model("llama", 3), prompts(0)

    def wrong(*arguments, **settings):
        plan = plan_for(*arguments, **settings)
        its = (replace(x, attention=replace(x.attention, scale=0.1)) for x in plan.layers)
        return replace(plan, layers=tuple(its))

    monkeypatch.setattr(engine, "plan_for", wrong)
    with pytest.raises(ValueError, match="its plan does not give its own logits"):
        native(model, ids, mask, max_new_tokens=5)
    out = ours(model, ids, mask, "auto", max_new_tokens=5, return_dict_in_generate=True)
    assert out.engine == "torch"


def test_automatic_only_where_it_was_measured(monkeypatch):
    model, (ids, mask) = tiny_model("llama", 3), prompts(0)
    options = dict(max_new_tokens=5, return_dict_in_generate=True)
    assert ours(model, ids, mask, "auto", **options).engine == "native"
    monkeypatch.setattr(engine, "AUTOMATIC", set())
    assert ours(model, ids, mask, "auto", **options).engine == "torch"
    assert native(model, ids, mask, **options).engine == "native"


def test_what_cannot_be_fused_is_refused():
    model = families.tiny_model("llama", 0, head_dim=258)
    with pytest.raises(NoPlan, match="its heads have the size 258, more than 256"):
        FusedPlan(plan_for(model))
    plan = plan_for(families.tiny_model("qwen3", 0))
    its = plan.layers[1].attention
    its = replace(its, k_norm=replace(its.k_norm, eps=1.0))
    mixed = replace(plan, layers=(plan.layers[0], replace(plan.layers[1], attention=its)))
    with pytest.raises(NoPlan, match="its queries and its keys have norms of different kinds"):
        FusedPlan(mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    """Logits near those of the model; float32's text is its own."""
    model = families.tiny_model("llama", 3, dtype=dtype)
    ids, mask = prompts(0)
    ids, mask = ids.cpu(), mask.cpu()
    out = generate(
        model,
        ids,
        attention_mask=mask,
        engine="native",
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=0,
    )
    assert out.shape == (2, ids.shape[1] + 8)
    if dtype == torch.float32:
        assert torch.equal(out, plain(model, ids, mask, max_new_tokens=8))
