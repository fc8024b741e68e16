"""Noise rows of a gated adapter: beside the text, which stays the base model's in every bit."""

import random
import threading

import pytest
import torch

from helpers import runners
from helpers.cases import build_tree, integers, tree_tensor
from helpers.families import VOCAB, tiny_model
from helpers.noise import CapturableTails, WithTails, gated_tiny, random_tails
from helpers.runners import ours, plain, prompts, sampled
from msn_ext import Draft, generate, ops
from msn_ext.decoding import engine
from msn_ext.decoding.drafters.checks import TREE, checked_draft
from msn_ext.decoding.drafters.tails import chained_parents
from msn_ext.decoding.forward.adapter import noise_adapter_of
from msn_ext.decoding.support import attention_for

peft = pytest.importorskip("peft")


# ---- drafts with tails ---------------------------------------------------------------------------


def test_tails_are_chains_that_are_padding_to_all_but_attention():
    tokens, parents = torch.tensor([[5, 6, 7]] * 2), torch.tensor([-1, 0, 0], dtype=torch.int32)
    ends = torch.tensor([[1, -1], [2, 0]])
    draft = Draft.with_tails(tokens, parents, ends, 2, 9)
    assert len(draft) == 7 and draft.tails == 4
    assert draft.parents.tolist() == [[-1, 0, 0, -1, -1, -1, -1]] * 2
    assert draft.depth.tolist() == [[0, 1, 1, 2, 3, -1, -1], [0, 1, 1, 2, 3, 1, 2]]
    assert draft.tokens[:, 3:].tolist() == [[9] * 4] * 2
    bits = [[[j for j in range(7) if word >> j & 1] for [word] in row] for row in draft.ancestors]
    assert bits[0][3:] == [[0, 1, 3], [0, 1, 3, 4], [], []]
    assert bits[1][3:] == [[0, 2, 3], [0, 2, 3, 4], [0, 5], [0, 5, 6]]
    chained = chained_parents(draft.parents, draft.ancestors, 4)
    assert chained.tolist() == [[-1, 0, 0, 1, 3, -1, -1], [-1, 0, 0, 2, 3, 0, 5]]
    with pytest.raises(ValueError, match="3 nodes with 127 tails of 2 rows are 257; expected at"):
        Draft.with_tails(tokens, parents, ends[:, :1].expand(2, 127), 2, 9)


@pytest.mark.parametrize("seed", range(4))
def test_no_op_counts_a_tail(seed):
    """Whatever the model says of them: paths, continuations and what is remembered are those of the
    draft without them.
    """
    rng, batch, nodes = random.Random(seed), 3, 20
    parents = tree_tensor(
        [build_tree("random", nodes, rng.randrange(99)) for _ in range(batch)], "cpu"
    )
    draft = random_tails(rng, torch.randint(5, (batch, nodes)), parents, 5, 6, 3)
    assert len(draft) == nodes + 18
    targets = torch.randint(5, (batch, len(draft)))
    logits = torch.nn.functional.one_hot(targets, 9).float()
    bare = Draft.of(draft.tokens[:, :nodes], parents)
    found = ops.verify_tree(draft.tokens, targets, draft.parents)
    want = ops.verify_tree(bare.tokens, targets[:, :nodes].contiguous(), parents)
    by_logits = ops.verify_logits(logits, draft.tokens, draft.parents)
    for x, y in ((found, want), (by_logits[2:], want)):
        for ours_, its in zip(x, y):
            ours_ = ours_ if ours_.dim() < 2 else ours_[:, :nodes]
            assert torch.equal(ours_, its if its.dim() < 2 else its[:, :nodes])
        assert bool((x[1][:, nodes:] == -1).all())
    history, lengths = torch.randint(5, (batch, 30)), integers([20, 9, 30])
    tables = []
    for its, path in ((draft, found[1]), (bare, want[1])):
        table = torch.zeros(3, 1 << 8, 9, dtype=torch.int32)
        guesses = ops.top_guesses(logits)[:, : len(its)].contiguous()
        ops.remember_guesses(table, history, lengths, its.tokens, its.parents, path, guesses)
        tables.append(table)
    assert torch.equal(*tables) and tables[0].any()


def checked(draft):
    class Somebody:
        pass

    history = torch.zeros(len(draft.tokens), 9, dtype=torch.int64)
    return checked_draft(draft, Somebody(), history, VOCAB)


def test_drafts_of_others_are_checked():
    rng = random.Random(0)
    parents = tree_tensor([build_tree("random", 9, 1), build_tree("random", 9, 2)], "cpu")
    draft = random_tails(rng, torch.randint(VOCAB, (2, 9)), parents, VOCAB)
    want = draft.depth.clone(), draft.ancestors.clone(), draft.parents.clone()
    found, wrong = checked(draft)
    assert not wrong and found.tails == 6
    for x, y in zip((found.depth, found.ancestors, found.parents), want):
        assert torch.equal(x, y)
    for name, change in (("depth", 1), ("ancestors", 8), ("parents", 1)):
        draft = random_tails(rng, torch.randint(VOCAB, (2, 9)), parents, VOCAB)
        getattr(draft, name)[1, -1] += change
        found, wrong = checked(draft)
        assert int(wrong) == TREE, name
        assert bool((found.parents[:, -6:] == -1).all()) and bool((found.depth < 15).all())
    for tails in (15, -1, True, None):
        draft.tails = tails
        with pytest.raises(ValueError, match=f"gave tails {tails!r}; expected a number of nodes"):
            checked(draft)


def test_more_nodes_before_the_tails():
    """As a grammar puts them there."""
    parents = tree_tensor([build_tree("random", 5, 1), build_tree("random", 5, 2)], "cpu")
    ends = torch.tensor([[4, -1, 2], [0, 3, 3]])
    tokens = torch.randint(VOCAB, (2, 5))
    draft = Draft.with_tails(tokens, parents, ends, 2, 9)
    more = torch.tensor([[4, 5], [-1, -1]], dtype=torch.int32)
    wider = torch.cat([tokens, tokens[:, :2]], 1), torch.cat([parents, more], 1)
    want = Draft.with_tails(*wider, ends, 2, 9)
    found = draft.grown(*wider)
    for name, its in vars(want).items():
        assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(its)), name


# ---- generate ------------------------------------------------------------------------------------

SETTINGS = dict(max_new_tokens=24, eos_token_id=None)


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_text_is_the_base_models(family):
    """Greedy and sampled, batches with padding, tails anywhere; by PEFT's model and by its base."""
    bare, model = tiny_model(family, 3), gated_tiny(family)
    for seed, batch in ((0, 2), (1, 1)):
        ids, mask = prompts(seed, batch, padded=family != "gemma3")
        want = plain(bare, ids, mask, **SETTINGS)
        for its in (model, model.get_base_model()):
            drafter = WithTails(seed)
            assert torch.equal(ours(its, ids, mask, drafter, **SETTINGS), want)
            assert drafter.tails
            assert torch.equal(ours(its, ids, mask, "auto", **SETTINGS), want)
        want = sampled(bare, ids, mask, "none", seed)
        assert torch.equal(sampled(model, ids, mask, WithTails(seed), seed), want)


class Seen(CapturableTails):
    """Keeps what the last step said of tails, where a recording leaves it."""

    def observe(self, verified):
        if verified.draft.tails:
            self.verified = verified
        super().observe(verified)

    def plan(self):
        return super().plan()

    def observe_step(self, report, nodes, gained, seconds):
        super().observe_step(report, nodes, gained, seconds)

    def forget(self):
        super().forget()


@pytest.mark.parametrize("native", [False, True])
def test_recorded_steps_have_tails(native, tapes, monkeypatch):
    """A replay computes what a step does, by the model's own pass and by the fused one; also once
    the adapter's weights have changed where they lie.
    """
    monkeypatch.setattr(engine, "PACKED_ON", set())
    bare, found = tiny_model("llama", 3).to(runners.where), []
    ids, mask = prompts(0, 2)
    options = dict(max_new_tokens=40, eos_token_id=None)
    want = plain(bare, ids, mask, **options)
    for scales in ((1, 2), (2, 1), (1, 1)):
        model, drafter = gated_tiny("llama").to(runners.where), Seen(12)
        for scale in scales:
            with torch.no_grad():
                for name, x in model.named_parameters():
                    x.mul_(scale if "lora_B" in name else 1)
            its = ours(model, ids, mask, drafter, engine="native" if native else "torch", **options)
            assert torch.equal(its, want)
        found.append(drafter.verified.logits[:, -8:].clone())
    assert len(tapes) == 3 and all(len(tape.captures) == 1 for tape in tapes)
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.usefixtures("each_engine")
def test_processors_see_no_tail():
    """transformers' own that look at the text before, and one that is asked text by text."""
    bare, model = tiny_model("llama", 3), gated_tiny("llama")
    ids, mask = prompts(0, 2)
    for more in (dict(no_repeat_ngram_size=3), dict(repetition_penalty=1.3)):
        want = plain(bare, ids, mask, **SETTINGS, **more)
        assert torch.equal(ours(model, ids, mask, WithTails(1), **SETTINGS, **more), want)

    def allowed(batch, text):
        return list(range(int(text[-1]) % 3, VOCAB, 2)) or [3]

    want = plain(bare, ids, mask, prefix_allowed_tokens_fn=allowed, **SETTINGS)
    drafter = WithTails(1)
    found = ours(model, ids, mask, drafter, prefix_allowed_tokens_fn=allowed, **SETTINGS)
    assert torch.equal(found, want) and drafter.tails


@pytest.mark.usefixtures("each_engine")
def test_turned_off_it_has_no_part():
    bare, model = tiny_model("llama", 3), gated_tiny("llama")
    ids, mask = prompts(0, 1)
    want = plain(bare, ids, mask, **SETTINGS)
    base = model.get_base_model()
    assert noise_adapter_of(base).length == 2 and noise_adapter_of(base).content == "ahead"
    with model.disable_adapter():
        assert noise_adapter_of(base) is None
        assert torch.equal(ours(model, ids, mask, "auto", **SETTINGS), want)
    assert noise_adapter_of(bare) is None


def with_other(model, name="other", **settings):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, **settings)
    model.add_adapter(name, config)
    return model


def test_what_cannot_be_gated_is_refused():
    ids = torch.tensor([[5, 9, 4, 7]])
    together = with_other(gated_tiny("llama"))
    together.base_model.set_adapter(["default", "other"])
    merged = gated_tiny("llama")
    merged.merge_adapter()
    biased = gated_tiny("llama", target_modules=["q_proj"], bias="lora_only")
    embedding = gated_tiny("llama", target_modules=["q_proj", "embed_tokens"])
    dora = gated_tiny("llama", target_modules=["q_proj"], use_dora=True)
    replaced = gated_tiny("llama")
    layer = replaced.get_base_model().model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    for model, reason in (
        (together, "is active together with 'other'; activate it alone, by set_adapter"),
        (merged, r"is merged into the weights; call unmerge_adapter\(\) before"),
        (biased, "has bias='lora_only'; expected a LoRA"),
        (embedding, "is on model.embed_tokens, an embedding; expected linear layers"),
        (dora, "has use_dora=True"),
        (replaced, r"cannot be left out of model\.layers\.0\.self_attn\.q_proj, whose forward"),
    ):
        with pytest.raises(ValueError, match=f"its adapter 'default' is gated.*{reason}"):
            generate(model, ids, max_new_tokens=4)
    together.set_adapter("other")
    assert noise_adapter_of(together.get_base_model()) is None, "the active one is not gated"


def test_other_threads_see_the_adapter():
    """Nothing of the model is changed while a thread decodes with it, but for that thread."""
    model = gated_tiny("llama")
    base, ids = model.get_base_model(), torch.tensor([[5, 9, 4, 7]])
    adapted, bare = model(input_ids=ids).logits, tiny_model("llama", 3)(input_ids=ids).logits
    with noise_adapter_of(base).left_out():
        assert torch.equal(base(input_ids=ids).logits, bare)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(model(input_ids=ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], adapted) and torch.equal(model(input_ids=ids).logits, adapted)
    assert attention_for(base) is not None
