"""What the native pass says of a token depends on the text before it alone, bit for bit: not on the
tree, the batch, the prompt's length, the threads, or on whether it was a step or a prompt.

float64 and one dtype of storage would hide much: all dtypes and all instruction sets of this
machine are tried. The last test shows that a pass whose sums have another order for several rows is
caught.
"""

import random
from dataclasses import replace

import pytest
import torch

from helpers.drafters import random_tree
from helpers.families import VOCAB, tiny_model
from helpers.plans import isas
from msn_ext import DraftTree
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import WEIGHTS, PackedPlan
from msn_ext.decoding.forward.plan import Linear, Plan

ODD = dict(hidden_size=72, intermediate_size=100, num_attention_heads=6, num_key_value_heads=2)
MODELS = {
    "odd sizes": ("llama", ODD | dict(head_dim=12)),
    "windows": ("gemma3", {}),
    "biases, norms with means": ("gpt_neox", {}),
}


def plan_of(name: str) -> tuple[torch.nn.Module, Plan]:
    family, settings = MODELS[name]
    model = tiny_model(family, 4, torch.float32, **settings)
    return model, plan_for(model)


def read(new: NativeForward, text: torch.Tensor, keep: int = 1) -> torch.Tensor:
    length = text.shape[1]
    return new.read(text, torch.arange(length)[None], torch.tensor([0]), keep)


def check(new: NativeForward, text: int, nodes: torch.Tensor, tree: DraftTree) -> torch.Tensor:
    tensors = tree.tensors(torch.device("cpu"))
    positions = text + tensors.depth.long()[None]
    at, none = torch.tensor([text]), torch.tensor([0])
    return new.check(nodes, positions, at, none, tensors.ancestors, text + len(tree)).logits


def commit(new: NativeForward, text: int, path: list[int]) -> None:
    new.commit(torch.tensor([text]), torch.tensor([path]), torch.tensor([len(path)]))


def by_trees(new: NativeForward, tokens: list[int], prompt: int, rng: random.Random) -> dict:
    """Return the logits of a text's positions from its prompt's last on, by trees that its tokens
    take random places of.
    """
    text = torch.tensor([tokens[:prompt]])
    found, at = {prompt - 1: read(new, text)[0, -1]}, prompt
    while at < len(tokens):
        shape = random_tree(rng)
        tree = DraftTree(shape.parents)
        nodes = torch.randint(VOCAB, (1, len(tree)))
        path = [rng.randrange(len(tree))]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        path = path[: len(tokens) - at]
        for i, node in enumerate(path):
            nodes[0, node] = tokens[at + i]
        logits = check(new, at, nodes, tree)
        for i, node in enumerate(path):
            found[at + i] = logits[0, node]
        commit(new, at, path)
        at += len(path)
    return found


def differences(new: NativeForward, other: NativeForward) -> int:
    """Return at how many positions of some texts trees give other logits than steps of one token,
    or prompts.
    """
    rng, count = random.Random(0), 0
    torch.manual_seed(0)
    for length in (9, 41, 130):
        tokens = torch.randint(VOCAB, (length,)).tolist()
        prompt = rng.randint(1, length - 4)
        found = by_trees(new, tokens, prompt, rng)
        whole = read(other, torch.tensor([tokens]), keep=length - prompt + 1)[0]
        for at, logits in found.items():
            count += not torch.equal(logits, whole[at - prompt + 1])
        read(other, torch.tensor([tokens[:prompt]]))
        for at in range(prompt, length):
            alone = check(other, at, torch.tensor([[tokens[at]]]), DraftTree.chain(1))[0, 0]
            commit(other, at, [0])
            count += not torch.equal(found[at], alone)
    return count


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", MODELS)
def test_trees_steps_and_prompts_give_the_same_bits(name, isa, weights):
    packed = PackedPlan(plan_of(name)[1], weights, isa)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        new = NativeForward(packed, 1)
        new.read(torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([0]), 1)
        torch.set_num_threads(1)
        assert differences(new, NativeForward(packed, 1)) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_whose_logits_nobody_wants_change_nothing(name, weights):
    """Their last layer ends with keys and values, which are there all the same."""
    packed = PackedPlan(plan_of(name)[1], weights)
    text = torch.randint(VOCAB, (1, 101), generator=torch.Generator().manual_seed(0))
    whole = NativeForward(packed, 1)
    want = read(whole, text, keep=101)
    for keep in (0, 1, 6, 50, 51, 100):  # 101 tokens are computed in parts of 50 and 51
        new = NativeForward(packed, 1)
        assert torch.equal(read(new, text, keep), want[:, 101 - keep :]), keep
        for layer, same in zip(new.cached(101), whole.cached(101), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(layer, same)), keep


def test_threads_change_no_bit():
    packed = PackedPlan(plan_of("odd sizes")[1], "bfloat16")
    text, threads, found = torch.randint(VOCAB, (1, 150)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(read(NativeForward(packed, 1), text, keep=150))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(logits, found[0]) for logits in found[1:])


class OtherSums:
    """A pass that makes the sums of one linear layer in another order where there are several rows:
    the numbers between an MLP's two halves change places, which changes nothing else.
    """

    def __init__(self, plan: Plan, weights: str):
        first, *rest = plan.layers
        order = torch.randperm(first.down.inputs, generator=torch.Generator().manual_seed(0))
        # gates, then ups; of one matrix or of two
        halves = torch.cat(first.up.weights).unflatten(0, (2, -1))[:, order]
        moved = replace(
            first,
            up=Linear((halves.flatten(0, 1).contiguous(),)),
            down=Linear((torch.cat(first.down.weights)[:, order].contiguous(),)),
        )
        other = replace(plan, layers=(moved, *rest))
        self._passes = [NativeForward(PackedPlan(each, weights), 1) for each in (plan, other)]

    def read(self, *inputs):
        first, _ = (each.read(*inputs) for each in self._passes)
        return first

    def check(self, tokens, *inputs):
        return [each.check(tokens, *inputs) for each in self._passes][tokens.shape[1] > 1]

    def commit(self, *inputs):
        for each in self._passes:
            each.commit(*inputs)


@pytest.mark.parametrize("weights", ["float64", "float32"])
def test_sums_in_another_order_are_caught(weights):
    _, plan = plan_of("odd sizes")
    assert differences(OtherSums(plan, weights), NativeForward(PackedPlan(plan, weights), 1)) > 50
