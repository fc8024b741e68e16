"""Best-first drafting with tails: noise rows below the nodes where the path likely ends."""

import random

import pytest
import torch

from helpers import runners
from helpers.drafters import CPU, verify
from helpers.families import VOCAB, tiny_model
from helpers.noise import gated_tiny
from helpers.runners import ours, plain, prompts, sampled
from msn_ext import ops
from msn_ext.decoding import BestFirst, Draft
from msn_ext.decoding.drafters import ObservedDrafter, factors, sources
from msn_ext.decoding.sizing import StepTimes
from msn_ext.ops import reference

peft = pytest.importorskip("peft")
SIZES = [1, 7, 8, 16, 64, 100, None]


class Noise:
    def __init__(self, length=2, content=5):
        self.length, self.content = length, content


@pytest.mark.parametrize("seed", range(5))
def test_paths_end_where_the_children_leave_probability(seed):
    """By a second way: paths that are drawn by the probabilities end there so often."""
    rng, nodes = random.Random(seed), 12
    parents, chance = [-1], [1.0]
    left = [1.0]
    for _ in range(1, nodes):
        above = rng.randrange(len(parents))
        share = rng.random() * left[above]
        left[above] -= share
        parents.append(above)
        chance.append(share)
        left.append(share)
    parents[-1], chance[-1] = -1, 0.0  # padding
    left[-1] = 0.0
    tensors = torch.tensor([parents], dtype=torch.int32), torch.tensor([chance]).double()
    text = torch.ones(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)

    def ends(tails):
        return ops.append_tails(tensors[0].long(), *tensors, *text, nodes, tails, 1, 5)[-1][0]

    want = {
        node: chance[node] - sum(c for c, p in zip(chance, parents) if p == node)
        for node in range(nodes)
    }
    best = sorted(want, key=want.get, reverse=True)[:4]
    assert ends(4).tolist() == [node if want[node] > 0 else -1 for node in best]
    assert ends(20)[nodes:].tolist() == [-1] * 8


def drafted(drafter, history, lengths, generator):
    draft = drafter.propose(history, lengths)
    logits = torch.randn(len(lengths), len(draft), VOCAB, generator=generator)
    logits[..., :4] += 2  # few tokens, so that guesses come true
    verified = verify(draft, logits, history, lengths)
    drafter.observe(verified)
    return verified, reference.top_guesses(logits)


def test_the_tail_at_the_end_of_the_path_has_the_next_guesses():
    """Row by row: what the tail said and its factors, or what is there without tails."""
    drafter, bare = BestFirst(budget=24), BestFirst(budget=24, tails=False)
    for one in (drafter, bare):
        one.use_noise(Noise())
        one.start(3, VOCAB, CPU)
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(0, 4, (3, 90), generator=generator)
    lengths = torch.tensor([9, 12, 17])
    usual, fitted = factors.load(), factors.load_of_tails()
    hits = []
    for _ in range(12):
        verified, guesses = drafted(drafter, history, lengths, generator)
        draft, ends = verified.draft, drafter.tails._ends
        assert len(draft) == 24 and draft.tails == sources.tails_of(24) > 0
        assert bool((draft.tokens[:, -draft.tails :] == 5).all())
        for b, count in enumerate(verified.accept_length.tolist()):
            end = int(verified.path[b, count - 1])
            hit = end in ends[b].tolist()
            hits.append(hit)
            assert torch.equal(drafter.tails.factors[b], fitted if hit else usual)
            held = drafter.denoised.guesses[b]
            if hit:
                row = 24 - draft.tails + ends[b].tolist().index(end)
                assert torch.equal(held[0], guesses[b, row])
                assert bool((held[1:] == -1).all())
            else:
                chain = [node for node in verified.continuation[b].tolist() if node >= 0]
                assert torch.equal(held[: len(chain)], guesses[b, chain])
            history[b, lengths[b] : lengths[b] + count] = verified.targets[
                b, verified.path[b, :count]
            ]
        lengths = lengths + verified.accept_length
    assert 0 < sum(hits) < len(hits)
    without, _ = drafted(bare, history, lengths, generator)
    assert bare.tails is None and not without.draft.tails
    assert drafter.max_depth == bare.max_depth + sources.LONGEST_TAIL


def test_a_tail_is_worth_a_row_that_costs_a_little():
    """Where 8 nodes take 6 % longer than 6, and more take long, a tree is of 8 with a tail, of 6
    without.
    """
    times = {6: 1.0, 8: 1.06, 12: 3.0}
    generator = torch.Generator().manual_seed(0)
    history, lengths = torch.randint(VOCAB, (1, 64), generator=generator), torch.tensor([60])
    found = {}
    for tails in (True, False):
        drafter = BestFirst(times=StepTimes(times, "cpu"), tails=tails)
        drafter.use_noise(Noise())
        drafter.start(1, VOCAB, CPU)
        draft = drafter.propose(history, lengths)
        found[tails] = len(draft), draft.tails
    assert found == {True: (8, 1), False: (6, 0)}


def test_a_pass_without_tails_leaves_the_denoised_guesses():
    drafter = BestFirst(budget=24)
    drafter.use_noise(Noise())
    drafter.start(1, VOCAB, CPU)
    generator = torch.Generator().manual_seed(0)
    history, lengths = torch.randint(0, 4, (1, 64), generator=generator), torch.tensor([9])
    while not torch.equal(drafter.tails.factors[0], factors.load_of_tails()):
        drafted(drafter, history, lengths, generator)
    root = Draft.of(history[:, :1], torch.tensor([-1], dtype=torch.int32))
    drafter.observe(verify(root, torch.randn(1, 1, VOCAB), history, lengths))
    assert torch.equal(drafter.tails.factors[0], factors.load())
    assert bool((drafter.denoised.guesses == -1).all())


def test_one_that_is_kept_drafts_for_each_model():
    """Another adapter's noise is another token, which another vocabulary may not have."""
    drafter = BestFirst(24)
    history, lengths = torch.randint(0, 4, (1, 64)), torch.tensor([9])
    for content in (5, 9, 5):
        drafter.use_noise(Noise(content=content))
        drafter.start(1, VOCAB, CPU)
        draft = drafter.propose(history, lengths)
        assert draft.tails and bool((draft.tokens[:, -draft.tails :] == content).all())
    laid_out = drafter.allocations
    drafter.use_noise(Noise(content=5))
    drafter.start(1, VOCAB, CPU)
    assert drafter.allocations == laid_out, "recorded steps read the same memory"


def test_one_that_is_looked_at_has_tails_as_well():
    inner = BestFirst(24)
    watched = ObservedDrafter(inner)
    ids, mask = prompts(0, 1)
    ours(gated_tiny("llama"), ids, mask, watched, engine="torch", max_new_tokens=8)
    assert inner.tails is not None and watched.max_depth == inner.max_depth > BestFirst().max_depth
    ours(tiny_model("llama", 3), ids, mask, watched, engine="torch", max_new_tokens=8)
    assert inner.tails is None and watched.max_depth == BestFirst().max_depth


def test_noise_is_a_token_or_of_the_text():
    for content, expected in ((7, {7}), ("ahead", {11, 12, 13})):
        drafter = BestFirst(budget=40)
        drafter.use_noise(Noise(content=content))
        drafter.start(1, VOCAB, CPU)
        history = torch.tensor([[11, 12, 13] * 4 + [9] * 30])
        draft = drafter.propose(history, torch.tensor([12]))
        assert set(draft.tokens[0, -draft.tails :].tolist()) <= expected


@pytest.mark.usefixtures("each_engine")
@pytest.mark.parametrize("content", [5, "ahead"])
def test_the_text_is_the_base_models(content):
    """Of every size, greedy and sampled, in batches."""
    bare, model = tiny_model("llama", 3), gated_tiny("llama")
    model.peft_config["default"].auto_mapping["msn_ext"]["content"] = content
    settings = dict(max_new_tokens=30, eos_token_id=None)
    for seed, batch in ((0, 3), (1, 1)):
        ids, mask = prompts(seed, batch)
        want = plain(bare, ids, mask, **settings)
        drawn = sampled(bare, ids, mask, "none", seed)
        for size in SIZES:
            drafter = BestFirst(size)
            assert torch.equal(ours(model, ids, mask, drafter, **settings), want), size
            assert drafter.tails is not None
            assert torch.equal(sampled(model, ids, mask, BestFirst(size), seed), drawn), size
        drafter = BestFirst(16)
        ours(bare, ids, mask, drafter, **settings)
        assert drafter.tails is None


def test_captured_steps_have_tails(tapes):
    bare, model = (x.to(runners.where) for x in (tiny_model("llama", 3), gated_tiny("llama")))
    settings = dict(max_new_tokens=40, eos_token_id=None)
    for seed in range(3):
        ids, mask = prompts(seed, 2)
        want = plain(bare, ids, mask, **settings)
        for draft in (BestFirst(16), "auto"):
            assert torch.equal(ours(model, ids, mask, draft, **settings), want)
    assert tapes and any(tape.replays for tape in tapes)
