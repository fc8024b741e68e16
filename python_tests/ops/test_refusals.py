"""Wrong arguments of the ops are refused by name."""

import random

import pytest
import torch

from helpers.calls import LAYER_OPS, OPS, example
from helpers.cases import (
    bounded,
    build_tree,
    integers,
    tree_tensor,
)
from helpers.knowledge import Pass, empty_adjacency, empty_suffixes, histories
from msn_ext import _C, ops


def fewer_rows(x):
    return x[:1]


def flat(x):
    return x.flatten()


def scalar(x):
    return x.flatten()[0]


def as_int32(x):
    return x.int()


def as_float(x):
    return x.float()


def as_int64(x):
    return x.long()


def strided(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def sized(*shape):
    return lambda x: x.new_zeros(shape)


def number(value):
    return lambda x: value


# Seen from shapes and dtypes alone: op, changed arguments, the argument that the message names.
WRONG_FORMS = [
    ("tree_ancestors", {"parents": scalar}, "parents"),
    ("tree_ancestors", {"parents": lambda x: x[None]}, "parents"),
    ("tree_ancestors", {"parents": sized(2, 0)}, "parents"),
    ("tree_ancestors", {"parents": sized(257)}, "parents"),
    ("tree_ancestors", {"parents": lambda x: x.long()}, "parents"),
    ("tree_ancestors", {"parents": as_float}, "parents"),
    ("tree_attention", {"q": flat}, "q"),
    ("tree_attention", {"q": lambda x: x.int()}, "q"),
    ("tree_attention", {"q": sized(2, 4, 0, 8)}, "q"),
    ("tree_attention", {"q": sized(2, 4, 257, 8)}, "q"),
    ("tree_attention", {"q": sized(2, 0, 4, 8)}, "q"),
    ("tree_attention", {"q": sized(2, 4, 4, 257)}, "q"),
    ("tree_attention", {"q": sized(2, 4, 4, 0)}, "q"),
    ("tree_attention", {"k_cache": flat}, "k_cache"),
    ("tree_attention", {"k_cache": fewer_rows}, "k_cache"),
    ("tree_attention", {"k_cache": lambda x: x.half()}, "k_cache"),
    ("tree_attention", {"k_cache": lambda x: x[..., :-1]}, "k_cache"),
    ("tree_attention", {"k_cache": sized(2, 3, 16, 8)}, "k_cache"),
    ("tree_attention", {"k_cache": sized(2, 0, 16, 8)}, "k_cache"),
    ("tree_attention", {"v_cache": flat}, "v_cache"),
    ("tree_attention", {"v_cache": fewer_rows}, "v_cache"),
    ("tree_attention", {"v_cache": lambda x: x.half()}, "v_cache"),
    ("tree_attention", {"v_cache": lambda x: x[:, :, :-1]}, "v_cache"),
    ("tree_attention", {"v_cache": lambda x: x[:, :1]}, "v_cache"),
    ("tree_attention", {"v_cache": sized(2, 2, 16, 257)}, "v_cache"),
    ("tree_attention", {"lengths": fewer_rows}, "lengths"),
    ("tree_attention", {"lengths": scalar}, "lengths"),
    ("tree_attention", {"lengths": as_int32}, "lengths"),
    ("tree_attention", {"ancestors": fewer_rows}, "ancestors"),
    ("tree_attention", {"ancestors": flat}, "ancestors"),
    ("tree_attention", {"ancestors": as_int32}, "ancestors"),
    ("tree_attention", {"ancestors": sized(2, 4, 2)}, "ancestors"),
    ("tree_attention", {"offsets": fewer_rows}, "offsets"),
    ("tree_attention", {"offsets": as_int32}, "offsets"),
    ("tree_attention", {"sinks": lambda x: x[:-1]}, "sinks"),
    ("tree_attention", {"sinks": lambda x: x.half()}, "sinks"),
    ("tree_attention", {"window": lambda x: -1}, "window"),
    ("tree_attention", {"softcap": lambda x: -1.0}, "softcap"),
    ("tree_attention", {"softcap": lambda x: float("nan")}, "softcap"),
    ("verify_tree", {"tokens": flat}, "tokens"),
    ("verify_tree", {"tokens": as_int32}, "tokens"),
    ("verify_tree", {"tokens": as_float}, "tokens"),
    ("verify_tree", {"tokens": sized(2, 0)}, "tokens"),
    ("verify_tree", {"tokens": sized(2, 257)}, "tokens"),
    ("verify_tree", {"targets": fewer_rows}, "targets"),
    ("verify_tree", {"targets": as_int32}, "targets"),
    ("verify_tree", {"targets": lambda x: x[:, :-1]}, "targets"),
    ("verify_tree", {"parents": fewer_rows}, "parents"),
    ("verify_tree", {"parents": lambda x: x.long()}, "parents"),
    ("verify_tree", {"parents": lambda x: x[:, :-1]}, "parents"),
    ("verify_logits", {"logits": lambda x: x[0]}, "logits"),
    ("verify_logits", {"logits": fewer_rows}, "logits"),
    ("verify_logits", {"logits": as_int64}, "logits"),
    ("verify_logits", {"logits": lambda x: x[:, :, :0]}, "logits"),
    ("verify_logits", {"tokens": as_int32}, "tokens"),
    ("verify_logits", {"parents": fewer_rows}, "parents"),
    ("verify_logits", {"parents": lambda x: x.long()}, "parents"),
    ("commit_kv", {"caches": lambda x: [x[0], x[1][0]]}, r"caches\[1\]"),
    ("commit_kv", {"caches": lambda x: [x[0], x[1][:1]]}, r"caches\[1\]"),
    ("commit_kv", {"lengths": fewer_rows}, "lengths"),
    ("commit_kv", {"lengths": as_int32}, "lengths"),
    ("commit_kv", {"path": flat}, "path"),
    ("commit_kv", {"path": as_int32}, "path"),
    ("commit_kv", {"accept_length": fewer_rows}, "accept_length"),
    ("commit_kv", {"accept_length": as_int32}, "accept_length"),
    ("place_tree", {"tokens": flat}, "tokens"),
    ("place_tree", {"tokens": lambda x: x[:1].expand(2, -1)}, "tokens"),
    ("place_tree", {"history": fewer_rows}, "history"),
    ("place_tree", {"lengths": as_int32}, "lengths"),
    ("place_tree", {"offsets": fewer_rows}, "offsets"),
    ("place_tree", {"last_position": as_int32}, "last_position"),
    ("place_tree", {"depth": lambda x: x[:, :-1]}, "depth"),
    ("place_tree", {"vocabulary": number(0)}, "vocabulary"),
    ("keep_continuation", {"denoised": flat}, "denoised"),
    ("keep_continuation", {"denoised": fewer_rows}, "denoised"),
    ("keep_continuation", {"guesses": as_int64}, "guesses"),
    ("keep_continuation", {"continuation": lambda x: x[:, :-1]}, "continuation"),
    ("keep_tail", {"denoised": flat}, "denoised"),
    ("keep_tail", {"denoised": fewer_rows}, "denoised"),
    ("keep_tail", {"factors": fewer_rows}, "factors"),
    ("keep_tail", {"tables": lambda x: x[0]}, "tables"),
    ("keep_tail", {"guesses": as_int64}, "guesses"),
    ("keep_tail", {"continuation": lambda x: x[:, :-1]}, "continuation"),
    ("keep_tail", {"path": as_int32}, "path"),
    ("keep_tail", {"accept_length": fewer_rows}, "accept_length"),
    ("keep_tail", {"ends": flat}, "ends"),
    ("keep_tail", {"ends": fewer_rows}, "ends"),
    ("keep_tail", {"ends": lambda x: x.repeat(1, 2)}, "ends"),
    ("keep_tail", {"length": number(0)}, "length"),
    ("append_tails", {"tokens": scalar}, "tokens"),
    ("append_tails", {"tokens": as_int32}, "tokens"),
    ("append_tails", {"parents": lambda x: x[:, :-1]}, "parents"),
    ("append_tails", {"parents": as_int64}, "parents"),
    ("append_tails", {"probability": lambda x: x.float()}, "probability"),
    ("append_tails", {"probability": fewer_rows}, "probability"),
    ("append_tails", {"history": flat}, "history"),
    ("append_tails", {"history": fewer_rows}, "history"),
    ("append_tails", {"lengths": as_int32}, "lengths"),
    ("append_tails", {"nodes": number(0)}, "nodes"),
    ("append_tails", {"nodes": number(5)}, "nodes"),
    ("append_tails", {"tails": number(-1)}, "tails"),
    ("append_tails", {"tails": number(127)}, "tails"),
    ("append_tails", {"length": number(0)}, "length"),
    ("append_tails", {"noise": number(-2)}, "noise"),
    ("advance_text", {"history": flat}, "history"),
    ("advance_text", {"history": as_int32}, "history"),
    ("advance_text", {"lengths": fewer_rows}, "lengths"),
    ("advance_text", {"remaining": as_int32}, "remaining"),
    ("advance_text", {"targets": fewer_rows}, "targets"),
    ("advance_text", {"path": lambda x: x[:, :-1]}, "path"),
    ("advance_text", {"accept_length": fewer_rows}, "accept_length"),
    ("advance_text", {"ends": scalar}, "ends"),
    ("advance_text", {"ends": as_int32}, "ends"),
    ("lookup_ngram", {"history": scalar}, "history"),
    ("lookup_ngram", {"history": flat}, "history"),
    ("lookup_ngram", {"history": as_int32}, "history"),
    ("lookup_ngram", {"lengths": fewer_rows}, "lengths"),
    ("lookup_ngram", {"lengths": as_int32}, "lengths"),
    ("lookup_ngram", {"max_ngram": lambda x: 0}, "max_ngram"),
    ("lookup_ngram", {"max_ngram": lambda x: -5}, "max_ngram"),
    ("lookup_ngram", {"max_ngram": lambda x: 2**40}, "max_ngram"),
    ("lookup_ngram", {"length": lambda x: -1}, "length"),
    ("fill_tree", {"candidates": flat}, "candidates"),
    ("fill_tree", {"candidates": fewer_rows}, "candidates"),
    ("fill_tree", {"candidates": as_int32}, "candidates"),
    ("fill_tree", {"retrieved": flat}, "retrieved"),
    ("fill_tree", {"retrieved": fewer_rows}, "retrieved"),
    ("fill_tree", {"retrieved": as_int32}, "retrieved"),
    ("fill_tree", {"history": scalar}, "history"),
    ("fill_tree", {"history": flat}, "history"),
    ("fill_tree", {"history": as_int32}, "history"),
    ("fill_tree", {"lengths": fewer_rows}, "lengths"),
    ("fill_tree", {"lengths": as_int32}, "lengths"),
    ("fill_tree", {"depth": fewer_rows}, "depth"),
    ("fill_tree", {"depth": lambda x: x.long()}, "depth"),
    ("fill_tree", {"depth": lambda x: x[:, :-1]}, "depth"),
    ("fill_tree", {"rank": scalar}, "rank"),
    ("fill_tree", {"rank": lambda x: x.long()}, "rank"),
    ("fill_tree", {"rank": sized(0)}, "rank"),
    ("fill_tree", {"rank": sized(257)}, "rank"),
    ("fill_tree", {"seed": lambda x: x.repeat(2)}, "seed"),
    ("fill_tree", {"seed": as_int32}, "seed"),
    ("top_guesses", {"logits": scalar}, "logits"),
    ("top_guesses", {"logits": as_int64}, "logits"),
    ("top_guesses", {"logits": lambda x: x.to(torch.complex64)}, "logits"),
    ("index_suffixes", {"suffixes": flat}, "suffixes"),
    ("index_suffixes", {"suffixes": fewer_rows}, "suffixes"),
    ("index_suffixes", {"suffixes": as_int64}, "suffixes"),
    ("index_suffixes", {"suffixes": strided}, "suffixes"),
    ("index_suffixes", {"suffixes": sized(2, 7, 32)}, "suffixes"),
    ("index_suffixes", {"history": scalar}, "history"),
    ("index_suffixes", {"history": flat}, "history"),
    ("index_suffixes", {"history": as_int32}, "history"),
    ("index_suffixes", {"start": fewer_rows}, "start"),
    ("index_suffixes", {"start": as_int32}, "start"),
    ("index_suffixes", {"lengths": fewer_rows}, "lengths"),
    ("index_suffixes", {"lengths": as_int32}, "lengths"),
    ("remember_guesses", {"adjacency": flat}, "adjacency"),
    ("remember_guesses", {"adjacency": as_int64}, "adjacency"),
    ("remember_guesses", {"adjacency": strided}, "adjacency"),
    ("remember_guesses", {"adjacency": sized(2, 32, 9)}, "adjacency"),
    ("remember_guesses", {"adjacency": sized(3, 32, 8)}, "adjacency"),
    ("remember_guesses", {"history": flat}, "history"),
    ("remember_guesses", {"history": fewer_rows}, "history"),
    ("remember_guesses", {"history": as_int32}, "history"),
    ("remember_guesses", {"lengths": fewer_rows}, "lengths"),
    ("remember_guesses", {"lengths": as_int32}, "lengths"),
    ("remember_guesses", {"tokens": flat}, "tokens"),
    ("remember_guesses", {"tokens": as_int32}, "tokens"),
    ("remember_guesses", {"tokens": sized(2, 0)}, "tokens"),
    ("remember_guesses", {"tokens": sized(2, 257)}, "tokens"),
    ("remember_guesses", {"parents": fewer_rows}, "parents"),
    ("remember_guesses", {"parents": as_int64}, "parents"),
    ("remember_guesses", {"parents": lambda x: x[:, :-1]}, "parents"),
    ("remember_guesses", {"path": fewer_rows}, "path"),
    ("remember_guesses", {"path": as_int32}, "path"),
    ("remember_guesses", {"path": lambda x: x[:, :-1]}, "path"),
    ("remember_guesses", {"guesses": flat}, "guesses"),
    ("remember_guesses", {"guesses": as_int64}, "guesses"),
    ("remember_guesses", {"guesses": lambda x: x[..., :-1]}, "guesses"),
    ("remember_guesses", {"guesses": lambda x: x[:, :-1]}, "guesses"),
    ("draft_tree", {"history": scalar}, "history"),
    ("draft_tree", {"history": flat}, "history"),
    ("draft_tree", {"history": as_int32}, "history"),
    ("draft_tree", {"lengths": fewer_rows}, "lengths"),
    ("draft_tree", {"lengths": as_int32}, "lengths"),
    ("draft_tree", {"denoised": flat}, "denoised"),
    ("draft_tree", {"denoised": fewer_rows}, "denoised"),
    ("draft_tree", {"denoised": as_int64}, "denoised"),
    ("draft_tree", {"denoised": lambda x: x[..., :-1]}, "denoised"),
    ("draft_tree", {"adjacency": flat}, "adjacency"),
    ("draft_tree", {"adjacency": as_int64}, "adjacency"),
    ("draft_tree", {"adjacency": sized(2, 32, 9)}, "adjacency"),
    ("draft_tree", {"adjacency": sized(3, 32, 8)}, "adjacency"),
    ("draft_tree", {"habits": flat}, "habits"),
    ("draft_tree", {"habits": as_int64}, "habits"),
    ("draft_tree", {"habits": sized(2, 32, 9)}, "habits"),
    ("draft_tree", {"habits": sized(3, 32, 8)}, "habits"),
    ("draft_tree", {"suffixes": flat}, "suffixes"),
    ("draft_tree", {"suffixes": fewer_rows}, "suffixes"),
    ("draft_tree", {"suffixes": as_int64}, "suffixes"),
    ("draft_tree", {"suffixes": sized(2, 7, 32)}, "suffixes"),
    ("draft_tree", {"corpus": scalar}, "corpus"),
    ("draft_tree", {"corpus": lambda x: x[None]}, "corpus"),
    ("draft_tree", {"corpus": as_int64}, "corpus"),
    ("draft_tree", {"corpus_suffixes": flat}, "corpus_suffixes"),
    ("draft_tree", {"corpus_suffixes": lambda x: x[None]}, "corpus_suffixes"),
    ("draft_tree", {"corpus_suffixes": as_int64}, "corpus_suffixes"),
    ("draft_tree", {"corpus_suffixes": sized(7, 32)}, "corpus_suffixes"),
    ("draft_tree", {"factors": fewer_rows}, "factors"),
    ("draft_tree", {"factors": scalar}, "factors"),
    ("draft_tree", {"factors": as_float}, "factors"),
    ("draft_tree", {"nodes": number(0)}, "nodes"),
    ("draft_tree", {"nodes": number(-1)}, "nodes"),
    ("draft_tree", {"nodes": number(257)}, "nodes"),
    ("draft_tree", {"nodes": number(2**40)}, "nodes"),
    ("draft_tree", {"max_depth": number(-1)}, "max_depth"),
    ("draft_tree", {"max_depth": number(257)}, "max_depth"),
    ("draft_tree", {"foresight": number(-0.01)}, "foresight"),
    ("draft_tree", {"foresight": number(1.01)}, "foresight"),
    ("draft_tree", {"foresight": number(float("nan"))}, "foresight"),
    ("draft_tree", {"foresight": number(float("inf"))}, "foresight"),
    ("draw_noise", {"input_ids": scalar}, "input_ids"),
    ("draw_noise", {"input_ids": as_int32}, "input_ids"),
    ("draw_noise", {"labels": fewer_rows}, "labels"),
    ("draw_noise", {"labels": as_int32}, "labels"),
    ("draw_noise", {"samples": flat}, "samples"),
    ("draw_noise", {"samples": as_int32}, "samples"),
    ("draw_noise", {"samples": lambda x: x[:, :2]}, "samples"),
    ("draw_noise", {"keep_token_ids": scalar}, "keep_token_ids"),
    ("draw_noise", {"keep_token_ids": as_int32}, "keep_token_ids"),
    ("draw_noise", {"starts": flat}, "starts"),
    ("draw_noise", {"starts": fewer_rows}, "starts"),
    ("draw_noise", {"starts": as_int32}, "starts"),
    ("draw_noise", {"starts": lambda x: x[:, :0]}, "segments"),
    ("draw_noise", {"starts": lambda x: x.repeat(1, 129)}, "segments"),
    ("draw_noise", {"length": number(0)}, "length"),
    ("draw_noise", {"length": number(-3)}, "length"),
    ("draw_noise", {"length": number(65)}, "length"),
    ("draw_noise", {"random": number(-0.01)}, "random"),
    ("draw_noise", {"random": number(1.01)}, "random"),
    ("draw_noise", {"random": number(float("nan"))}, "random"),
    ("draw_noise", {"vocabulary": number(0)}, "vocabulary"),
    ("draw_noise", {"vocabulary": number(2**27 + 1)}, "vocabulary"),
]
# Values, which only the CPU reads back: op, arguments, the start of the message.
WRONG_VALUES = [
    ("tree_attention", {"lengths": [5, 13]}, r"lengths\[1\] is 13"),
    ("tree_attention", {"lengths": [-1, 9]}, r"lengths\[0\] is -1"),
    ("tree_attention", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("tree_attention", {"offsets": [6, 2]}, r"offsets\[0\] is 6"),
    ("tree_attention", {"offsets": [0, -1]}, r"offsets\[1\] is -1"),
    ("commit_kv", {"lengths": [5, 13]}, r"lengths"),
    ("commit_kv", {"lengths": [-1, 9]}, r"lengths\[0\] is -1"),
    ("commit_kv", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("commit_kv", {"accept_length": [4, 3]}, r"accept_length\[0\] is 4"),
    ("commit_kv", {"accept_length": [2, -1]}, r"accept_length\[1\] is -1"),
    ("commit_kv", {"path": [[0, 2, -1], [0, 3, 2]]}, r"path\[1\] is 2"),
    ("commit_kv", {"path": [[0, 0, -1], [0, 1, 2]]}, r"path\[0\] is 0"),
    ("commit_kv", {"path": [[-1, 2, -1], [0, 1, 2]]}, r"path\[0\] is -1"),
    ("commit_kv", {"path": [[0, 2, -1], [0, 1, 99]]}, r"path"),
    ("commit_kv", {"path": [[0, 2, -1], [0, 1, 2**63 - 1]]}, r"path\[1\]"),
    ("lookup_ngram", {"lengths": [0, 6]}, r"lengths\[0\] is 0"),
    ("lookup_ngram", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("lookup_ngram", {"lengths": [5, -(2**63)]}, r"lengths\[1\]"),
    ("fill_tree", {"lengths": [0, 4]}, r"lengths\[0\] is 0"),
    ("fill_tree", {"lengths": [3, 5]}, r"lengths\[1\] is 5"),
    ("index_suffixes", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("index_suffixes", {"lengths": [-1, 6]}, r"lengths\[0\] is -1"),
    ("index_suffixes", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("index_suffixes", {"start": [7, 0]}, r"start\[0\] is 7"),
    ("index_suffixes", {"start": [0, -1]}, r"start\[1\] is -1"),
    ("index_suffixes", {"start": [0, -(2**63)]}, r"start\[1\]"),
    ("remember_guesses", {"lengths": [0, 6]}, r"lengths\[0\] is 0"),
    ("remember_guesses", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("remember_guesses", {"lengths": [5, -(2**63)]}, r"lengths\[1\]"),
    ("draft_tree", {"lengths": [0, 6]}, r"lengths\[0\] is 0"),
    ("draft_tree", {"lengths": [5, 7]}, r"lengths\[1\] is 7"),
    ("draft_tree", {"lengths": [5, 2**63 - 1]}, r"lengths\[1\]"),
    ("draw_noise", {"samples": [[2, 0, 6], [1, 0, 5]]}, r"row of samples\[0\] is 2"),
    ("draw_noise", {"samples": [[0, 0, 6], [-1, 0, 5]]}, r"row of samples\[1\] is -1"),
    ("draw_noise", {"samples": [[0, 0, 7], [1, 0, 5]]}, r"end of samples\[0\] is 7"),
    ("draw_noise", {"samples": [[0, -1, 6], [1, 0, 5]]}, r"begin of samples\[0\] is -1"),
    ("draw_noise", {"samples": [[0, 0, 6], [1, 5, 4]]}, r"begin of samples\[1\] is 5"),
    ("draw_noise", {"samples": [[0, 0, 6], [1, 0, 2**63 - 1]]}, r"end of samples\[1\]"),
    ("draw_noise", {"starts": [[-1, -1], [1, -1]]}, r"starts\[1, 0\] is 1"),
    ("draw_noise", {"starts": [[-1, 6], [2, -1]]}, r"starts\[0, 1\] is 6"),
    ("draw_noise", {"starts": [[2**63 - 1, -1], [2, -1]]}, r"starts\[0, 0\]"),
]


@pytest.mark.parametrize("op, changes, named", WRONG_FORMS)
def test_a_wrong_shape_dtype_or_option_is_refused_by_name(device, op, changes, named):
    arguments = example(op, device)
    getattr(ops, op)(**arguments)
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=rf"\b{named}"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize("op, values, message", WRONG_VALUES)
def test_a_wrong_value_is_refused_by_name(op, values, message):
    arguments = example(op, "cpu") | {name: integers(value) for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        bounded(lambda: getattr(ops, op)(**arguments))


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_tensor_is_refused_by_name(device, op):
    """By torch's dispatcher; the kernels' own check is below."""
    arguments = example(op, device)
    for name, value in arguments.items():
        if isinstance(value, (torch.Tensor, list)):
            with pytest.raises((ValueError, RuntimeError), match=rf"\b{name}\b"):
                getattr(torch.ops.msn_ext, op)(**{**arguments, name: "text"})


@pytest.mark.parametrize(
    "wrong", [None, [-1, 0], "text", torch.zeros(2).numpy(), torch.zeros(2, device="meta").int()]
)
def test_kernels_refuse_what_is_no_dense_tensor(wrong):
    right = tree_tensor([-1, 0], "cpu")
    with pytest.raises(ValueError, match="^parents is "):
        _C.tree_ancestors(wrong, right, right)


@pytest.mark.parametrize("op", OPS)
def test_arguments_on_several_devices_are_refused_by_name(device, op):
    if op in LAYER_OPS:
        pytest.skip("for CPUs only")
    if device != "cuda":
        pytest.skip("needs a second device")
    arguments = example(op, device)
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for name in tensors[1:]:
        with pytest.raises(ValueError, match="on another device"):
            getattr(ops, op)(**{**arguments, name: arguments[name].cpu()})


def test_a_refused_call_has_changed_no_more_than_the_rows_before():
    """In place, row by row: the second row is wrong, the first may be in the table already, the
    third is not.
    """
    texts, parents = [[1, 2, 3]] * 3, [build_tree("random", 5, seed) for seed in range(3)]
    arguments = Pass.random(texts, parents, 3, random.Random(0)).arguments("cpu")
    adjacency, first = empty_adjacency(64, "cpu"), empty_adjacency(64, "cpu")
    ops.remember_guesses(first, **{name: x[:1] for name, x in arguments.items()})
    for name, at, value in [("parents", (1, 3), 3), ("lengths", 1, 0), ("lengths", 1, 7)]:
        wrong = {**arguments, name: arguments[name].clone()}
        wrong[name][at] = value
        adjacency.zero_()
        with pytest.raises(ValueError, match=name):
            ops.remember_guesses(adjacency, **wrong)
        assert torch.equal(adjacency, first) or not adjacency.any()

    history, lengths = histories(texts, "cpu")
    for name, value in [("start", -1), ("start", 7), ("lengths", -1), ("lengths", 7)]:
        suffixes, wrong = (
            empty_suffixes(3, 64, "cpu"),
            {"start": lengths * 0, "lengths": lengths.clone()},
        )
        wrong[name][1] = value
        with pytest.raises(ValueError, match=rf"{name}\[1\] is {value}; expected 0 to 6"):
            ops.index_suffixes(suffixes, history, **wrong)
        assert not suffixes[1:].any()
