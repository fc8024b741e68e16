"""The ops in torch: registration, compilation, autograd."""

import inspect

import pytest
import torch

from helpers.calls import LAYER_OPS, OPS, example
from helpers.cases import (
    assert_equal,
)
from msn_ext import ops


def test_every_op_is_here():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions == {*OPS, "tree_mask", "pack_weights"}


@pytest.mark.parametrize("op", OPS)
def test_the_schema_names_the_arguments_of_the_function(op):
    """By position and by name, the function with its options last."""
    schema = getattr(torch.ops.msn_ext, op).default._schema
    parameters = list(inspect.signature(getattr(ops, op)).parameters)
    named = [argument.name for argument in schema.arguments]
    assert parameters == named + ["validate"] * (op == "tree_ancestors")


def test_the_function_says_what_the_op_returns():
    assert inspect.signature(ops.verify_tree).return_annotation == tuple[(torch.Tensor,) * 4]
    assert inspect.signature(ops.top_guesses).return_annotation is torch.Tensor
    assert inspect.signature(ops.commit_kv).return_annotation is None


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    torch.library.opcheck(getattr(torch.ops.msn_ext, op).default, (), example(op, device))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_step_equals_the_eager_one(device, backend):
    """All ops in one graph; caches and tables change in place."""

    def step(arguments):
        ancestors, depth = ops.tree_ancestors(**arguments["tree_ancestors"], validate=False)
        out = ops.tree_attention(**{**arguments["tree_attention"], "ancestors": ancestors}) * 2
        gained, status = ops.advance_text(**arguments["advance_text"])
        retrieved, matched = ops.lookup_ngram(**arguments["lookup_ngram"])
        filled = ops.fill_tree(**{**arguments["fill_tree"], "depth": depth, "retrieved": retrieved})
        drafted = {
            **arguments["verify_tree"],
            "tokens": filled,
            "targets": filled * 0 + 3,
        }  # row 0 retrieved a 3
        accept_length, path, bonus, continuation = ops.verify_tree(**drafted)
        ops.commit_kv(**{**arguments["commit_kv"], "path": path, "accept_length": accept_length})
        guesses = ops.top_guesses(arguments["top_guesses"]["logits"] * 2)
        checked = ops.verify_logits(**{**arguments["verify_logits"], "tokens": filled})
        observed = {
            **arguments["remember_guesses"],
            "tokens": filled,
            "path": path,
            "guesses": guesses,
        }
        ops.remember_guesses(**observed)
        ops.index_suffixes(**arguments["index_suffixes"])
        ops.keep_continuation(
            **{**arguments["keep_continuation"], "guesses": guesses, "continuation": continuation}
        )
        ops.keep_tail(**{**arguments["keep_tail"], "guesses": guesses, "path": path})
        placed = ops.place_tree(**arguments["place_tree"])
        tables = {
            "adjacency": observed["adjacency"],
            "suffixes": arguments["index_suffixes"]["suffixes"],
        }
        draft = ops.draft_tree(**{**arguments["draft_tree"], **tables, "denoised": guesses})
        known = dict(zip(("tokens", "parents", "probability"), draft))
        tails = ops.append_tails(**{**arguments["append_tails"], **known})
        verified = accept_length, path, bonus, continuation
        noise = ops.draw_noise(
            **{**arguments["draw_noise"], "labels": arguments["draw_noise"]["labels"] + 0}
        )
        return (
            ancestors,
            depth,
            out,
            gained,
            status,
            retrieved,
            matched,
            filled,
            *verified,
            guesses,
            *checked,
            *draft,
            *tails,
            *noise,
            *placed,
        )

    torch.compiler.reset()
    used = [op for op in OPS if op not in LAYER_OPS]
    eager, compiled = ({op: example(op, device) for op in used} for _ in range(2))
    assert_equal(torch.compile(step, fullgraph=True, backend=backend)(compiled), step(eager))
    for op, changed in [
        ("commit_kv", "caches"),
        ("remember_guesses", "adjacency"),
        ("index_suffixes", "suffixes"),
        ("keep_continuation", "denoised"),
        ("keep_tail", "denoised"),
        ("keep_tail", "factors"),
        ("place_tree", "tokens"),
        ("advance_text", "history"),
    ]:
        assert_equal(compiled[op][changed], eager[op][changed])
        assert not all(
            torch.equal(x, y) for x, y in zip(compiled[op][changed], example(op, device)[changed])
        )


def test_a_compiled_layer_equals_the_eager_one():
    """In one graph; the cache changes in place."""

    def layer(arguments):
        h = ops.embed_rows(**arguments["embed_rows"])
        ops.rotary_write(**arguments["rotary_write"])
        cache = {name: arguments["rotary_write"][name] for name in ("qkv", "keys", "values")}
        mixed = ops.packed_attention(**{**arguments["packed_attention"], **cache})
        out = ops.packed_linear(
            **{**arguments["packed_linear"], "x": mixed[..., :12].reshape(3, 24)}
        )
        return h, ops.add_norm(**arguments["add_norm"]), out, *cache.values()

    torch.compiler.reset()
    eager, compiled = ({op: example(op, "cpu") for op in LAYER_OPS} for _ in range(2))
    compile_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_equal(compile_layer(compiled), layer(eager))


@pytest.mark.parametrize(
    "op, name", [("tree_attention", "q"), ("top_guesses", "logits"), ("draft_tree", "factors")]
)
def test_ops_take_tensors_that_require_grad(op, name):
    arguments = example(op, "cpu")
    expected = getattr(ops, op)(**arguments)
    arguments[name] = torch.nn.Parameter(arguments[name])
    assert_equal(getattr(ops, op)(**arguments), expected)


def test_missing_and_surplus_arguments_are_type_errors():
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="targets"):
        ops.verify_tree(tokens)
    with pytest.raises(TypeError, match="root"):
        ops.verify_tree(tokens, tokens, tokens.int(), root=0)


@pytest.mark.parametrize("op", OPS)
def test_plain_calls_pass_the_dispatcher_by_and_others_do_not(op):
    """With the same results; what wants to know of an op still does."""
    direct, dispatched = example(op, "cpu"), example(op, "cpu")
    gained = getattr(ops, op)(**direct)
    with torch.profiler.profile() as profile:
        assert_equal(getattr(ops, op)(**dispatched), gained)
    for name, changed in direct.items():
        if not isinstance(changed, str):
            assert_equal(changed, dispatched[name])
    seen = [event.key for event in profile.key_averages()]
    assert any(key.startswith("msn_ext::") for key in seen)
