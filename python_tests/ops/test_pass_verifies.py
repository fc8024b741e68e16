"""The native pass verifies greedily where it makes the logits: as ``verify_logits`` does with them,
whatever the threads.
"""

import pytest
import torch

from helpers.cases import assert_equal, build_tree, integers, threads
from helpers.families import tiny_model
from helpers.layers import ISAS, WEIGHTS
from msn_ext import ops
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import PackedPlan

BATCH, NODES, VOCAB = 2, 5, 300  # several panels of outputs for each thread
CASES = "ties", "zeros", "NaN", "infinite", "all NaN", "rising", "falling"
KINDS = [kind for kind in WEIGHTS if kind != "float64"]


def wide_model(name, vocabulary=VOCAB):
    model = tiny_model(name, 1)
    torch.manual_seed(0)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


class Check:
    """Trees that a model is asked about; some of their guesses are right."""

    def __init__(self, model, weights="float32", isa="", team=1, shared=False):
        self.native = NativeForward(PackedPlan(plan_for(model), weights, isa), BATCH)
        trees = [build_tree("random", NODES, seed) for seed in range(BATCH)]
        self.parents = torch.tensor(trees[0] if shared else trees, dtype=torch.int32)
        self.ancestors, depth = ops.tree_ancestors(self.parents)
        self.positions = depth.long().expand(BATCH, -1)
        self.tokens = torch.arange(BATCH * NODES).view(BATCH, NODES) * 7 % model.config.vocab_size
        self.team = team
        _, targets, *_ = ops.verify_logits(
            self.answers(None).logits.float(), self.tokens, self.parents
        )
        above = self.parents.clamp(min=0).long().expand(BATCH, -1)
        right = torch.arange(NODES) % 3 < 2
        self.tokens[:, 1:] = torch.where(right, targets.gather(1, above), self.tokens)[:, 1:]

    def answers(self, parents):
        nothing = integers([0] * BATCH)
        with threads(self.team):
            return self.native.check(
                self.tokens, self.positions, nothing, nothing, self.ancestors, NODES, 0, parents
            )

    def check(self):
        answers = self.answers(self.parents)
        assert_equal(answers.logits, self.answers(None).logits)
        for got, expected in zip(
            answers.verified, ops.verify_logits(answers.logits, self.tokens, self.parents)
        ):
            assert_equal(got, expected)
        return answers.verified


@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])  # without and with a soft cap
def test_the_pass_verifies_as_the_op_does(name, weights, isa, team):
    _, _, accepted, *_ = Check(wide_model(name), weights, isa, team, shared=team == 2).check()
    assert accepted.min() >= 1 and accepted.max() > 1


def test_it_is_left_to_the_op_in_float64_and_where_it_is_not_asked_for():
    """The op compares what float64 rounds to."""
    check = Check(wide_model("llama"), "float64")
    assert check.answers(check.parents).verified is None
    assert Check(wide_model("llama")).answers(None).verified is None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_of_equals_the_first_and_NaN_before_all(case, team, isa):
    model = wide_model("llama")
    with torch.no_grad():
        head = model.lm_head.weight
        if case == "ties":
            head.copy_(head[torch.arange(VOCAB) % 3])
        elif case == "zeros":
            head.zero_()
            head[5::2] = -0.0
        elif case == "all NaN":
            head.fill_(torch.nan)
        elif case in ("rising", "falling"):
            order = torch.arange(VOCAB) if case == "rising" else VOCAB - torch.arange(VOCAB)
            head.copy_(head[:1] * order[:, None])
        else:
            head[[VOCAB - 1, 3, 40, 150]] = torch.nan if case == "NaN" else torch.inf
    Check(model, isa=isa, team=team).check()


@pytest.mark.parametrize("vocabulary", [5, 8, 9, 33])
def test_a_vocabulary_of_few_tokens(vocabulary):
    guesses, *_ = Check(wide_model("llama", vocabulary), team=3).check()
    assert (guesses >= 0).sum(-1).eq(min(vocabulary, 8)).all()
