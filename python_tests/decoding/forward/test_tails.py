"""Every forward pass computes noise rows with a gated adapter, and the text in the same bits."""

import random

import pytest
import torch

from helpers.cases import build_tree, integers, tree_tensor
from helpers.families import VOCAB, tiny_model
from helpers.noise import by_peft, gated, gated_tiny, laid_out, random_tails
from helpers.plans import InFloat64, isas
from msn_ext import prepare
from msn_ext.decoding import engine
from msn_ext.decoding.attention import KernelAttention
from msn_ext.decoding.forward.adapter import leaving_out, noise_adapter_of
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.fused import FusedForward, FusedPlan, lay_together
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import WEIGHTS, PackedPlan
from msn_ext.decoding.forward.transformers import TransformersForward

pytest.importorskip("peft")

FAMILIES = {
    "llama": {},
    "mistral-window": {},
    "gemma3": {},
    "qwen2": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "olmo2": {},
    "phi3": {},
    "starcoder2": {},
    "granite": {},
}
# What adapters may be on, of any rank: PEFT's settings.
ADAPTERS = {
    "all": {},
    "odd rank": dict(r=3),
    "some": dict(target_modules=["q_proj", "v_proj", "down_proj"], r=2),
    "different ranks": dict(rank_pattern={"k_proj": 7, "up_proj": 1}, alpha_pattern={"k_proj": 3}),
    "the head": dict(target_modules=["gate_proj", "lm_head"]),
}


def passes(kind: str, model, bare, weights="float64", isa=""):
    """The pass of a PEFT model, and of the same model without an adapter."""
    base = model.get_base_model()
    noise = noise_adapter_of(base)
    if kind == "torch":
        made = [(base, noise), (bare, None)]
        return [TransformersForward(m, KernelAttention(m), noise=n) for m, n in made]
    if kind == "packed":
        made = [(base, (2, noise)), (bare, (2,))]
        return [NativeForward(PackedPlan(plan_for(m), weights, isa), *n) for m, n in made]
    found = []
    for m, n in ((base, noise), (bare, None)):
        plan = plan_for(m)
        lay_together(m, plan)
        found.append(FusedForward(FusedPlan(plan), m, KernelAttention(m), noise=n))
    return found


def read(one, texts: list[list[int]]):
    """Read texts with padding before the shorter ones; return the offsets."""
    slots = max(map(len, texts))
    offsets = integers([slots - len(text) for text in texts])
    ids = torch.tensor([[0] * (slots - len(text)) + text for text in texts])
    positions = (torch.arange(slots) - offsets[:, None]).clamp(min=0)
    one.read(ids, positions, offsets, 1)
    return offsets


def check(one, texts, draft, offsets, tails=None):
    lengths = integers([len(text) for text in texts])
    end = int((lengths + offsets).max()) + len(draft)
    where = laid_out(draft, lengths), lengths + offsets, offsets, draft.ancestors, end
    return one.check(draft.tokens, *where, draft.tails if tails is None else tails).logits


def case(name: str, seed: int, nodes: int = 9, **tails):
    rng = random.Random(f"{name} {seed}")
    short = 13 if name.startswith("gemma") else 8  # transformers' own Gemma has NaN at padding
    texts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (13, short)]
    trees = [build_tree("random", nodes, rng.randrange(99)) for _ in texts]
    tokens = torch.randint(VOCAB, (2, nodes), generator=torch.Generator().manual_seed(seed))
    return texts, random_tails(rng, tokens, tree_tensor(trees, "cpu"), VOCAB, **tails)


def agree(kind: str, name: str, model, bare) -> None:
    """Tails have what PEFT's own model gives noise, text what it has without an adapter."""
    texts, draft = case(name, 1)
    text = len(draft) - draft.tails
    with torch.no_grad(), InFloat64():
        one, other = passes(kind, model, bare)
        offsets = read(one, texts)
        read(other, texts)
        found, without = (check(its, texts, draft, offsets) for its in (one, other))
        want = torch.stack([by_peft(model, row, draft, b) for b, row in enumerate(texts)])
        live = draft.depth >= 0  # what padding gives means nothing
        torch.testing.assert_close(found[live], want[live], rtol=1e-9, atol=1e-9)
        assert torch.equal(found[:, :text], without[:, :text])
        changed = (found[:, text:] - without[:, text:]).abs().amax(-1)
        assert bool((changed[live[:, text:]] > 1e-3).all())
        assert torch.equal(check(one, texts, draft, offsets, 0), without)


@pytest.mark.parametrize("kind", ["torch", "packed", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tails_are_what_peft_gives_noise(family, kind):
    agree(kind, family, gated_tiny(family), tiny_model(family, 3))


@pytest.mark.parametrize("kind", ["torch", "packed", "fused"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_all_shapes(name, kind):
    agree(kind, name, gated_tiny("llama", **ADAPTERS[name]), tiny_model("llama", 3))


ODD = dict(hidden_size=72, intermediate_size=100, num_attention_heads=6, head_dim=12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("isa", isas())
@torch.no_grad()
def test_every_dtype_and_instruction_set(weights, isa):
    """Text in the bits without tails; tails near float64's, with the same bits in any company."""
    sizes = dict(settings=ODD, r=16, std=0.1)
    exact = passes("packed", gated_tiny("llama", **sizes), tiny_model("llama", 3, **ODD))[0]
    model = gated_tiny("llama", dtype=torch.float32, **sizes)
    bare = tiny_model("llama", 3, torch.float32, **ODD)
    one, other = passes("packed", model, bare, weights, isa)
    texts, draft = case("odd", 2, chains=5)
    text = len(draft) - draft.tails
    offsets = read(one, texts)
    for its in (other, exact):
        read(its, texts)
    found, without, want = (check(its, texts, draft, offsets) for its in (one, other, exact))
    assert torch.equal(found[:, :text], without[:, :text])
    assert not torch.equal(found[:, text:], without[:, text:])
    bound = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-2}.get(weights, 0.1)
    error = (found - want).abs().amax() / want.abs().amax()
    of_text = (without - check(exact, texts, draft, offsets, 0)).abs().amax() / want.abs().amax()
    assert error < max(bound, 3 * of_text)
    threads = torch.get_num_threads()
    try:
        for count in (2, 5):
            torch.set_num_threads(count)
            assert torch.equal(check(one, texts, draft, offsets), found)
    finally:
        torch.set_num_threads(threads)
    # The last chain alone, as text and noise that others' tails are gone from.
    keep = [*range(text), *range(len(draft) - 2, len(draft))]
    alone, _ = fewer(draft, keep)
    assert torch.equal(check(one, texts, alone, offsets), found[:, keep])


def fewer(draft, keep: list[int]):
    """The draft of some of its nodes."""
    from msn_ext import Draft

    bits = torch.zeros(len(draft.tokens), len(keep), 1, dtype=torch.int64)
    for b in range(len(draft.tokens)):
        for i, node in enumerate(keep):
            for j, other in enumerate(keep):
                bits[b, i, 0] |= (int(draft.ancestors[b, node, 0]) >> other & 1) << j
    parts = draft.tokens[:, keep], draft.parents[:, keep], bits, draft.depth[:, keep]
    return Draft(*(part.contiguous() for part in parts), tails=2), keep


def test_an_adapter_is_noticed_when_it_changes(monkeypatch):
    """Its weights, in every way; packed base weights stay where they are."""
    for native in ({"cpu"}, set()):
        monkeypatch.setattr(engine, "PACKED_ON", native)
        model = gated_tiny("llama")
        base = model.get_base_model()
        texts, draft = case("llama", 3)

        def logits():
            plan = engine.native_plan_for(base, "native")
            noise = noise_adapter_of(base)
            if native:
                one = NativeForward(plan, 2, noise)
            else:
                one = FusedForward(plan, base, KernelAttention(base), noise=noise)
            with torch.no_grad():
                return plan, check(one, texts, draft, read(one, texts))

        plan, before = logits()
        weights = [x for name, x in model.named_parameters() if "lora_" in name]
        with torch.no_grad():
            weights[0].mul_(2)
        same, after = logits()
        assert same is plan and not torch.equal(after, before)
        text = len(draft) - draft.tails
        assert torch.equal(after[:, :text], before[:, :text])


def test_a_model_with_an_adapter_is_not_prepared():
    model = gated_tiny("llama").get_base_model()
    with pytest.raises(ValueError, match="cannot be prepared: it has an adapter; unload it before"):
        prepare(model)
    with leaving_out(model):
        pass


def test_in_sixteen_bits_the_adapter_may_be_wider():
    """As PEFT has it: float32 beside bfloat16."""
    bare = tiny_model("llama", 3, torch.bfloat16)
    model = gated(tiny_model("llama", 3, torch.bfloat16), std=0.1)
    assert {x.dtype for name, x in model.named_parameters() if "lora_" in name} == {torch.float32}
    texts, draft = case("llama", 4)
    text = len(draft) - draft.tails
    for kind in ("torch", "packed", "fused"):
        with torch.no_grad():
            one, other = passes(kind, model, bare, "bfloat16")
            offsets = read(one, texts)
            read(other, texts)
            found, without = (check(its, texts, draft, offsets) for its in (one, other))
            want = torch.stack([by_peft(model, row, draft, b) for b, row in enumerate(texts)])
        assert torch.equal(found[:, :text], without[:, :text])
        live = draft.depth >= 0
        error = (found[live].float() - want[live].float()).abs().amax(-1) / want.float().abs().max()
        assert float(error.mean()) < 0.05, kind
