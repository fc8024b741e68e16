"""A loop over the ops of a layer in Python has the bits of the native forward pass, which runs the
same stages in one call.
"""

import pytest
import torch

from helpers.cases import ancestors_of, assert_equal, build_tree, integers, threads
from helpers.families import VOCAB, tiny_model
from helpers.layers import ISAS, WEIGHTS
from msn_ext import ops
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import PackedPlan

# Gates, biases and layer norms, norms after branches and soft caps, parallel branches, head norms.
MODELS = ["llama", "gpt2", "gemma2", "gpt_neox", "qwen3", "olmo2"]
BATCH, PREFIX, NODES = 2, 19, 6


class Loop:
    """The ops, one after the other."""

    def __init__(self, packed: PackedPlan, slots: int):
        self.packed, self.plan = packed, packed.plan
        first = packed.plan.layers[0].attention
        size, kv_heads = first.head_size, first.kv_heads
        dims = len(packed.layers), BATCH, kv_heads
        key, value = (
            torch.zeros(*dims, slots * each, dtype=packed.cache_dtype)
            for each in (size, -(-size // 16) * 16)
        )
        self.keys, self.values = key, value
        self.tables = packed.tables(slots)

    def linear(self, layer: tuple, x, norm: tuple | None = None, **options):
        data, stored, outputs, _, bias = layer
        normed = self.norm(norm) if norm else {}
        options |= {"isa": self.packed.isa, **normed}
        return ops.packed_linear(x, data, stored, outputs, bias, **options)

    def norm(self, norm: tuple) -> dict:
        kind, weight, bias, eps = norm
        return {"norm": kind, "norm_weight": weight, "norm_bias": bias, "eps": eps}

    def branch(self, h, layer: dict, linear: str, after: str, x):
        scale, norm = layer["residual_scale"], layer[after]
        if norm is None:
            return self.linear(layer[linear], x, epilogue="add", scale=scale, residual=h)
        y = self.linear(layer[linear], x)
        return ops.add_norm(h, y, **self.norm(norm), scale=scale, isa=self.packed.isa)

    def up(self, layer: dict, h):
        epilogue = "gate" if layer["gated"] else "activate"
        options = {"epilogue": epilogue, "activation": layer["activation"]}
        return self.linear(layer["up"], h, layer["mlp_norm"], **options)

    def attention(self, at: int, layer: dict, h, chain: tuple, positions):
        qkv = self.linear(layer["qkv"], h, layer["attention_norm"]).view(*positions.shape, -1)
        heads = {"heads": layer["heads"], "kv_heads": layer["kv_heads"], "isa": self.packed.isa}
        inputs = qkv, self.keys[at], self.values[at], *chain
        turn = {"norm_each_head": layer["norm_each_head"]}
        if layer["rotary"] >= 0:
            turn["cosines"], turn["sines"] = self.tables[layer["rotary"]]
        if layer["q_norm"]:
            (kind, q_weight, q_bias, eps), (_, k_weight, k_bias, _) = (
                layer["q_norm"],
                layer["k_norm"],
            )
            turn |= {"norm": kind, "q_weight": q_weight, "q_bias": q_bias, "eps": eps}
            turn |= {"k_weight": k_weight, "k_bias": k_bias}
        ops.rotary_write(*inputs, positions, **heads, **turn)
        options = {name: layer[name] for name in ("scale", "window", "softcap")}
        return ops.packed_attention(*inputs, **heads, **options).flatten(0, 1)

    def run(self, tokens, positions, prefix, ancestors):
        plan, weights = self.plan, self.packed.weights
        table, ids, at = plan.embedding.detach(), tokens.flatten(), positions.flatten()
        placed = {"positions": at, "position_table": self.packed.positions, "isa": self.packed.isa}
        size, vocabulary = table.shape[1], table.shape[0]
        h = ops.embed_rows(ids, table, weights, size, vocabulary, plan.embedding_scale, **placed)
        for i, layer in enumerate(self.packed.layers):
            mixed = self.attention(i, layer, h, (prefix, ancestors), positions)
            middle = self.up(layer, h) if layer["parallel"] else None
            h = self.branch(h, layer, "out", "after_attention", mixed)
            middle = self.up(layer, h) if middle is None else middle
            h = self.branch(h, layer, "down", "after_mlp", middle)
        options = {"scale": plan.logit_scale, "softcap": plan.logit_softcap}
        packed = self.packed.head
        head = (
            packed.data,
            packed.weights,
            packed.outputs,
            packed.inputs,
            None,
        )  # no family's head has a bias
        logits = self.linear(head, h, self.packed.norm, epilogue="logits", **options)
        return logits.view(*tokens.shape, -1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_loop_over_the_ops_is_the_pass(name, weights, isa):
    packed = PackedPlan(plan_for(tiny_model(name, 1)), weights, isa)
    native, loop = NativeForward(packed, BATCH), Loop(packed, 256)
    source = torch.Generator().manual_seed(0)
    text = torch.randint(VOCAB, (BATCH, PREFIX), generator=source)
    tokens = torch.randint(VOCAB, (BATCH, NODES), generator=source)
    at = torch.arange(PREFIX).expand(BATCH, -1)
    offsets, prefix = torch.zeros(BATCH, dtype=torch.int64), integers([PREFIX] * BATCH)
    parents = [build_tree("random", NODES, seed) for seed in range(BATCH)]
    ancestors, depth = ops.tree_ancestors(torch.tensor(parents, dtype=torch.int32))
    chain = ancestors_of([build_tree("chain", PREFIX)] * BATCH, "cpu")
    with threads(2):
        assert_equal(loop.run(text, at, offsets, chain), native.read(text, at, offsets, PREFIX))
        positions = PREFIX + depth.long()
        step = native.check(tokens, positions, prefix, offsets, ancestors, PREFIX + NODES)
    assert_equal(loop.run(tokens, positions, prefix, ancestors), step.logits)
    assert step.logits.isfinite().all()
