"""A head is screened: a copy in int8 says which logits may be among the largest, and only these are
computed (csrc/cpu/layers/screen.h). What is found has to be what all logits say, bit for bit.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import msn_ext
from helpers.cases import assert_equal, build_tree, integers, threads
from helpers.layers import needs_screens
from msn_ext import BestFirst, generate, ops
from msn_ext.decoding.forward import packed as packing
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import PackedPlan

VOCAB = 5003  # no whole number of panels
DTYPES = torch.float32, torch.bfloat16, torch.float16
pytestmark = needs_screens


@pytest.fixture(autouse=True)
def _small_heads_too(monkeypatch):
    monkeypatch.setattr(packing, "SCREENED", 0)


def model_of(hidden=70, vocabulary=VOCAB, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


class Asked:
    """A model that is asked about a tree, by a screen and without."""

    def __init__(self, model, nodes=8, team=2):
        self.plan = PackedPlan(plan_for(model), str(model.dtype).removeprefix("torch."))
        self.native = NativeForward(self.plan, 1)
        self.parents = torch.tensor(build_tree("random", nodes, 3), dtype=torch.int32)
        self.ancestors, depth = ops.tree_ancestors(self.parents)
        self.positions = depth.long()[None]
        self.tokens = torch.arange(nodes)[None] * 131 % model.config.vocab_size
        self.nodes, self.team = nodes, team

    def answers(self, parents=None):
        nothing = integers([0])
        at = self.tokens, self.positions, nothing, nothing, self.ancestors, self.nodes, 0
        with threads(self.team):
            return self.native.check(*at, parents)

    def by_screen(self):
        assert self.plan.screen is not None
        self.native._reads_logits = False
        return self.answers(self.parents)

    def check(self):
        """Compare what is found, and the logits that are asked for afterwards, with all logits."""
        found = self.by_screen()
        late = found.logits
        every = self.answers().logits
        assert_equal(late, every)
        expected = ops.verify_logits(every, self.tokens, self.parents)
        for got, wanted in zip(found.verified, expected):
            assert_equal(got, wanted)


@pytest.mark.parametrize("team", [1, 3])
@pytest.mark.parametrize("nodes", [1, 4, 5, 8, 12, 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_random_heads(dtype, nodes, team):
    for hidden in (64, 67, 70) if team == 1 else (3, 260):
        Asked(model_of(hidden, dtype=dtype, seed=nodes), nodes, team).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_inputs_of_which_some_are_far_larger(dtype):
    model = model_of(96, dtype=dtype)
    with torch.no_grad():
        model.model.norm.weight[[3, 50]] = 300.0
        model.model.norm.weight[20:40] = 1e-3
        model.lm_head.weight[:, 7] *= 40
    for nodes in (1, 8):
        Asked(model, nodes).check()


def hard_heads():
    """Heads whose logits are nearly, or exactly, the same; or that are not numbers."""
    same = torch.arange(VOCAB) % 3
    order = torch.arange(VOCAB)[:, None]
    return {
        "ties": lambda w: w.copy_(w[same]),
        "zeros": lambda w: w.zero_(),
        "tiny": lambda w: w.copy_(w.sign() * 1e-39),
        "near ties": lambda w: w.copy_(w[:1] + order.to(w) * 1e-5),
        "rising": lambda w: w.copy_(w[:1] * order.to(w) / VOCAB),
        "falling": lambda w: w.copy_(w[:1] * (VOCAB - order).to(w) / VOCAB),
        "one far above": lambda w: w[4999].mul_(500),
        "a NaN": lambda w: w[77, 5:6].fill_(torch.nan),
        "an infinity": lambda w: w[78, 5:6].fill_(torch.inf),
    }


@pytest.mark.parametrize("case", hard_heads())
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_hard_heads(dtype, case):
    model = model_of(dtype=dtype)
    with torch.no_grad():
        hard_heads()[case](model.lm_head.weight)
    asked = Asked(model)
    if case in ("a NaN", "an infinity"):
        assert asked.plan.screen is None, "nothing bounds these"
    else:
        asked.check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_of_rows_without_numbers(value):
    model = model_of()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = value
        model.model.embed_tokens.weight[131 * 3, 5] = value
    Asked(model).check()


def test_a_wrong_bound_would_be_noticed():
    """And so is in use."""
    asked = Asked(model_of())
    screen = asked.plan.screen
    size = screen.numel() // -(-VOCAB // 32)
    panels = screen.view(-1, size)
    panels[:, -2 * 128 :] = 0  # the bounds of what rounding changed, and of the weights' size
    panels[:, :-3] ^= 0x55
    with pytest.raises(AssertionError):
        asked.check()


def test_who_reads_logits_gets_them_at_once_from_then_on(monkeypatch):
    asked = Asked(model_of())
    late = []
    original = asked.native._late
    monkeypatch.setattr(asked.native, "_late", lambda *a: late.append(a) or original(*a))
    first = asked.by_screen()
    assert_equal(first.logits, first.logits)
    second = asked.answers(asked.parents)
    assert late[0][0] is None, "the first pass had none"
    assert_equal(second.logits, first.logits)
    assert late[1][0] is not None and len(late) == 2
    asked.answers(asked.parents)
    asked.answers(asked.parents)
    assert_equal(asked.answers(asked.parents).logits, first.logits)
    assert late[2][0] is None, "nobody had read those before"


def test_logits_may_be_read_in_more_threads_than_the_pass_had():
    asked = Asked(model_of(), team=1)
    found = asked.by_screen()
    with threads(4):
        late = found.logits
    assert_equal(late, asked.answers().logits)


def test_logits_of_an_earlier_pass_are_refused():
    asked = Asked(model_of())
    first = asked.by_screen()
    asked.by_screen()
    with pytest.raises(RuntimeError, match="logits of an earlier pass.*in observe"):
        print(first.logits)


@pytest.mark.parametrize("setting", ["bias", "small"])
def test_heads_without_a_screen(setting, monkeypatch):
    model = model_of()
    if setting == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.ones(VOCAB))
    else:
        monkeypatch.setattr(packing, "SCREENED", VOCAB * 70 + 1)
    assert PackedPlan(plan_for(model), "float32").screen is None


@pytest.mark.parametrize("weights", ["float64", "int8"])
def test_weights_without_a_screen(weights):
    assert PackedPlan(plan_for(model_of()), weights).screen is None


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("draft", ["none", "paper", "recycling", BestFirst(8)])
def test_text_and_logits_are_those_without_a_screen(draft, tied, prepared, monkeypatch):
    def answer():
        model = model_of(dtype=torch.bfloat16)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        if prepared:
            msn_ext.prepare(model)
        ids = torch.arange(40).view(2, 20) * 17
        settings = dict(engine="native", max_new_tokens=60, draft=draft, output_logits=True)
        kept = generate(model, ids, do_sample=False, return_dict_in_generate=True, **settings)
        del settings["output_logits"]
        alone = generate(model, ids, do_sample=False, **settings)
        assert_equal(kept.sequences, alone)
        return alone, torch.stack(kept.logits)

    found = answer()
    monkeypatch.setattr(packing, "SCREENED", 1 << 60)
    for got, expected in zip(found, answer()):
        assert_equal(got, expected)
