"""Wrong arguments of the stages of a decoder layer are refused by name."""

import pytest
import torch

from helpers.calls import example
from msn_ext import _C, ops


def value(new):
    return lambda x: new


def half(x):
    return x.half()


def short(x):
    return x[..., :-1].contiguous()


def fewer(x):
    return x[:1]


def flat(x):
    return x.flatten()


def to_int(x):
    return x.int()


WRONG = [
    ("packed_linear", "x", flat, "x has shape"),
    ("packed_linear", "x", half, "residual|x has dtype"),
    ("packed_linear", "x", short, "packed has shape"),
    ("packed_linear", "packed", short, "packed has shape"),
    ("packed_linear", "packed", lambda x: x.float(), "packed has shape"),
    ("packed_linear", "packed", lambda x: x.new_zeros(len(x) + 1)[1:], "packed is not aligned"),
    ("packed_linear", "weights", value("int4"), "weights is 'int4'; expected one of float64, "),
    ("packed_linear", "weights", value("int8"), "packed has shape"),
    ("packed_linear", "outputs", value(0), "residual"),
    ("packed_linear", "bias", short, "bias has shape"),
    ("packed_linear", "bias", half, "bias has dtype"),
    ("packed_linear", "norm", value("batch"), "norm is 'batch'; expected one of none, rms, layer"),
    ("packed_linear", "norm_weight", value(None), "norm_weight is missing"),
    ("packed_linear", "norm_weight", short, "norm_weight has shape"),
    ("packed_linear", "norm_bias", half, "norm_bias has dtype"),
    ("packed_linear", "eps", value(-1.0), "eps is -1"),
    ("packed_linear", "epilogue", value("store"), "residual is for epilogue 'add'"),
    ("packed_linear", "activation", value("elu"), "activation is 'elu'; expected one of silu, "),
    ("packed_linear", "softcap", value(-1.0), "softcap is -1"),
    ("packed_linear", "softcap", value(float("nan")), "softcap is nan"),
    ("packed_linear", "residual", value(None), "residual is for epilogue 'add'"),
    ("packed_linear", "residual", fewer, "residual has shape"),
    ("packed_linear", "residual", half, "residual has shape .* and dtype torch.float16"),
    ("packed_linear", "pick", value(torch.tensor([0, 3])), "pick is 3; expected 0 to 2"),
    ("packed_linear", "pick", value(torch.tensor([-1, 0])), "pick is -1; expected 0 to 2"),
    ("packed_linear", "pick", to_int, "pick has dtype int32"),
    ("packed_linear", "isa", value("sse"), "isa is 'sse', which this machine"),
    ("add_norm", "h", fewer, "x has shape"),
    ("add_norm", "h", half, "h has dtype float16"),
    ("add_norm", "x", lambda x: x.double(), "x has dtype float64"),
    ("add_norm", "norm", value("none"), "norm is 'none'"),
    ("add_norm", "norm_weight", value(None), "norm_weight is missing"),
    ("add_norm", "norm_bias", short, "norm_bias has shape"),
    ("embed_rows", "tokens", to_int, "tokens has dtype"),
    ("embed_rows", "tokens", value(torch.tensor([0, 9])), "token is 9; expected 0 to 8"),
    ("embed_rows", "tokens", value(torch.tensor([0, -1])), "token is -1; expected 0 to 8"),
    ("embed_rows", "table", to_int, "table has dtype int32"),
    ("embed_rows", "table", short, "table has shape"),
    ("embed_rows", "table", lambda x: x.flatten(), "table has shape"),
    ("embed_rows", "positions", value(None), "positions is missing"),
    ("embed_rows", "positions", value(torch.tensor([0, 2])), "position is 2; expected 0 to 1"),
    ("embed_rows", "position_table", half, "position_table has dtype float16"),
    ("rotary_write", "positions", value(torch.full((2, 3), 8)), "positions is 8; expected 0 to 7"),
    ("rotary_write", "positions", fewer, "positions has shape"),
    ("rotary_write", "cosines", value(torch.ones(8, 5)), "half of the cosines is 5"),
    ("rotary_write", "sines", value(None), "sines is missing"),
    ("rotary_write", "sines", fewer, "sines has shape"),
    ("rotary_write", "q_weight", short, "q_weight has shape"),
    ("rotary_write", "k_weight", value(None), "k_weight is missing"),
    ("rotary_write", "k_bias", half, "k_bias has dtype"),
    ("rotary_write", "norm_each_head", value(False), "q_weight has shape"),
]
WRONG += [
    (op, *case)
    for op in ("rotary_write", "packed_attention")
    for case in [
        ("qkv", flat, "qkv has shape"),
        ("qkv", half, "qkv has dtype"),
        ("qkv", short, "qkv has shape"),
        ("qkv", lambda x: x[:, :0], "qkv has 0 nodes"),
        ("keys", short, "keys has shape"),
        ("keys", fewer, "keys has shape"),
        ("keys", to_int, "keys has dtype int32"),
        ("values", short, "values has shape"),
        ("values", half, "values has dtype float16"),
        ("prefix", to_int, "prefix has dtype"),
        ("prefix", value(torch.tensor([0, 14])), "prefix is 14; expected 0 to 13"),
        ("prefix", value(torch.tensor([-1, 0])), "prefix is -1; expected 0 to 13"),
        ("ancestors", short, "ancestors has shape"),
        ("ancestors", to_int, "ancestors has dtype"),
        ("heads", value(0), "heads is 0"),
        ("kv_heads", value(0), "kv_heads is 0"),
        ("isa", value("avx1024"), "isa is 'avx1024'"),
    ]
]
WRONG += [
    ("packed_attention", "window", value(-1), "window is -1"),
    ("packed_attention", "softcap", value(-1.0), "softcap is -1"),
]


@pytest.mark.parametrize("op, name, change, message", WRONG)
def test_a_wrong_argument_is_refused_by_name(op, name, change, message):
    arguments = example(op, "cpu")
    getattr(ops, op)(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**arguments)


def test_gates_without_as_many_ups_are_refused():
    packed = ops.pack_weights(torch.ones(4, 8), "float32", halves=2)
    with pytest.raises(ValueError, match="outputs is 5; expected gates and as many ups"):
        ops.packed_linear(torch.ones(1, 8), packed, "float32", 5, epilogue="gate")


def test_packing_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="weight has shape"):
        ops.pack_weights(torch.ones(4), "float32")
    with pytest.raises(ValueError, match="weights has dtype"):
        ops.pack_weights(torch.ones(4, 4, dtype=torch.int64), "float32")
    with pytest.raises(ValueError, match="weights is 'int4'"):
        ops.pack_weights(torch.ones(4, 4), "int4")


def test_the_variable_names_an_instruction_set(monkeypatch):
    monkeypatch.setenv("MSN_ISA", "baseline")
    assert _C.layer_isa("")["name"] == "baseline"
    monkeypatch.setenv("MSN_ISA", "mmx")
    with pytest.raises(ValueError, match="MSN_ISA is 'mmx'; expected baseline, "):
        _C.layer_isa("")
