"""The ops between a decoder layer's products, against their specification and the oracle."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import oracle
from helpers.calls import example
from helpers.cases import CPU_DTYPES, assert_equal, integers, one_thread, seeded
from msn_ext import ops
from msn_ext.ops import reference

KINDS = ["none", "rms", "layer"]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]
# Of what is stored, a rounding or two; of what is summed before, float32's
CLOSE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in CLOSE}


def drawn(dtype: torch.dtype, *shape: int, seed: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype).to(device)


def exact(x: torch.Tensor | None) -> np.ndarray | None:
    return None if x is None else x.cpu().double().numpy()


def assert_near(got: torch.Tensor, expected, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(got.cpu().double(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def norm_of(kind: str, size: int, dtype: torch.dtype, device: str, seed: int) -> tuple:
    """Kind, weight, bias, eps, offset."""
    if kind == "none":
        return kind, None, None, 0.0, 0.0
    bias = drawn(dtype, size, seed=seed + 1, device=device) if kind == "layer" else None
    return kind, drawn(dtype, size, seed=seed, device=device), bias, 1e-3, float(seed % 2)


def exactly(norm: tuple) -> tuple:
    kind, weight, bias, *rest = norm
    return kind, exact(weight), exact(bias), *rest


def dtypes_of(device: str):
    return st.sampled_from(CPU_DTYPES) if device == "cpu" else st.sampled_from(list(CLOSE))


@given(st.data())
def test_residual_norm(device, data):
    dtype, seed = data.draw(dtypes_of(device)), data.draw(st.integers(0, 999))
    rows, size = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([1, 7, 32, 100, 600]))
    h = drawn(dtype, rows, size, seed=seed, device=device)
    x = drawn(dtype, rows, size, seed=seed + 1, device=device) if data.draw(st.booleans()) else None
    x_norm, norm = (
        norm_of(data.draw(st.sampled_from(KINDS)), size, dtype, device, seed + at) for at in (2, 5)
    )
    scale = data.draw(st.sampled_from([1.0, 0.4]))
    before = h.clone()
    y = ops.residual_norm(h, x, scale, *x_norm, *norm)
    if x is None:
        assert_equal(h, before)
    for row in range(rows):
        branch = None if x is None else exact(x[row])
        how = scale, exactly(x_norm), exactly(norm), NAMES[dtype]
        stored, _ = oracle.fused.residual_row(exact(before[row]), branch, *how)
        assert_near(h[row], stored, dtype)
        _, normed = oracle.fused.residual_row(exact(h[row]), None, *how)
        assert_near(y[row], normed, dtype)
    with one_thread():
        given_ = [None if z is None else z.cpu() for z in (before, x)]
        norms = [tuple(z.cpu() if torch.is_tensor(z) else z for z in n) for n in (x_norm, norm)]
        specified = reference.residual_norm(*given_, scale, *norms[0], *norms[1])
    assert_near(h, given_[0], dtype)
    assert_near(y, specified, dtype)


@given(st.data())
def test_gated_activation(device, data):
    dtype, seed = data.draw(dtypes_of(device)), data.draw(st.integers(0, 999))
    rows, size = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([1, 7, 32, 600]))
    both = 5 * drawn(dtype, rows, 2 * size, seed=seed, device=device)
    gate, up = both[:, :size], both[:, size:] if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    y = ops.gated_activation(gate, up, activation)
    for row in range(rows):
        its = None if up is None else exact(up[row])
        assert_near(y[row], oracle.fused.gated_row(exact(gate[row]), its, activation), dtype)
    on_cpu = gate.cpu(), None if up is None else up.cpu(), activation
    assert_near(y, reference.gated_activation(*on_cpu), dtype)


@given(st.data())
def test_rotary_cache(device, data):
    dtype, rng = data.draw(dtypes_of(device)), random.Random(data.draw(st.integers(0, 999)))
    batch, nodes = rng.randrange(3), rng.choice([1, 2, 5])
    kv_heads, group, size = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([2, 6, 40])
    heads, seed = kv_heads * group, rng.randrange(1000)
    # As one product gives them, and as GPT-NeoX' does
    count = heads + 2 * kv_heads
    together = drawn(dtype, batch, nodes, count, size, seed=seed, device=device)
    q, k, v = together.split([heads, kv_heads, kv_heads], 2)
    if group == 1 and rng.random() < 0.5:
        q, k, v = together.unflatten(2, (heads, 3)).unbind(3)
    slots, known = nodes + 4, 9
    keys, values = (
        drawn(dtype, batch, slots, kv_heads, size, seed=seed + at, device=device).transpose(1, 2)
        for at in (1, 2)
    )
    prefix = torch.tensor([rng.randrange(5) for _ in range(batch)], dtype=torch.int64)
    positions = torch.randint(known, (batch, nodes), generator=seeded(seed))
    number = torch.float64 if dtype == torch.float64 else torch.float32
    half = rng.choice([0, 1, size // 2])
    angles = drawn(number, known, half, seed=seed + 3, device=device)
    tables = (angles.cos(), angles.sin()) if half or rng.random() < 0.5 else (None, None)
    each, kind = rng.random() < 0.5, rng.choice(KINDS)
    norms = [
        norm_of(kind, size if each else n * size, dtype, device, 2 * (seed // 2) + 4 * at)
        for at, n in enumerate((heads, kv_heads))
    ]
    weights = *norms[0][1:3], *norms[1][1:3]
    how = kind, *weights, *norms[0][3:], each
    after = keys.clone(), values.clone()
    at = prefix.to(device), positions.to(device)
    out = ops.rotary_cache(q, k, v, *after, *at, *tables, *how)

    caches = [exact(keys), exact(values)]
    for b in range(batch):
        for n in range(nodes):
            row = [np.zeros(0) if t is None else exact(t[positions[b, n]]) for t in tables]
            its = [
                oracle.fused.turned_heads(exact(x[b, n]), exactly(norm), each, *row)
                for x, norm in zip((q, k), norms)
            ]
            assert_near(out[b, n], its[0], dtype)
            caches[0][b, :, prefix[b] + n] = its[1]
            caches[1][b, :, prefix[b] + n] = exact(v[b, n])
    for got, expected in zip(after, caches):
        assert_near(got, expected, dtype)
    untouched = torch.ones(batch, slots, dtype=torch.bool)
    for b in range(batch):
        untouched[b, prefix[b] : prefix[b] + nodes] = False
    for got, before in zip(after, (keys, values)):
        assert_equal(got.transpose(1, 2)[untouched], before.transpose(1, 2)[untouched])
    with one_thread():
        on_cpu = [None if x is None else x.cpu().clone() for x in (q, k, v, keys, values)]
        rest = [x.cpu() if torch.is_tensor(x) else x for x in (*at, *tables, *how)]
        assert_near(out, reference.rotary_cache(*on_cpu, *rest), dtype)
    for got, expected in zip(after, on_cpu[3:]):
        assert_near(got, expected, dtype)


def test_compiled_ops_equal_the_eager_ones(device):
    """In one graph; the residual stream and the cache change in place."""

    def layer(arguments):
        y = ops.residual_norm(**arguments["residual_norm"])
        q = ops.rotary_cache(**arguments["rotary_cache"])
        z = ops.gated_activation(**arguments["gated_activation"])
        changed = arguments["rotary_cache"]
        return y * 2, q, z, arguments["residual_norm"]["h"] + 0, changed["keys"] + changed["values"]

    names = "residual_norm", "rotary_cache", "gated_activation"
    eager, compiled = ({name: example(name, device) for name in names} for _ in range(2))
    torch.compiler.reset()
    compile_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_equal(compile_layer(compiled), layer(eager))
    for name, changed in [("residual_norm", "h"), ("rotary_cache", "keys")]:
        assert_equal(compiled[name][changed], eager[name][changed])
        assert not torch.equal(compiled[name][changed], example(name, device)[changed])


def short(x):
    return x[..., :-1].contiguous()


def every_other(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def none(x):
    return None


WRONG = [
    ("residual_norm", "h", torch.flatten, "h"),
    ("residual_norm", "h", torch.Tensor.int, "h has dtype int32"),
    ("residual_norm", "h", every_other, "h is not contiguous"),
    ("residual_norm", "h", lambda x: x[:, :0], "size of h is 0"),
    ("residual_norm", "x", lambda x: x[:1], "x has shape"),
    ("residual_norm", "x", torch.Tensor.half, "x has dtype float16"),
    ("residual_norm", "x_norm", lambda x: "batch", "x_norm is 'batch'; expected one of none, rms"),
    ("residual_norm", "x_weight", none, "x_weight is missing"),
    ("residual_norm", "x_bias", short, "x_bias has shape"),
    ("residual_norm", "norm", lambda x: "", "norm is ''"),
    ("residual_norm", "weight", short, "weight has shape"),
    ("residual_norm", "weight", torch.Tensor.double, "weight has dtype float64"),
    ("residual_norm", "bias", torch.Tensor.half, "bias has dtype float16"),
    ("residual_norm", "eps", lambda x: -1.0, "eps is -1"),
    ("residual_norm", "eps", lambda x: float("nan"), "eps is nan"),
    ("rotary_cache", "q", torch.flatten, "q has shape"),
    ("rotary_cache", "q", torch.Tensor.int, "q has dtype int32"),
    ("rotary_cache", "q", lambda x: x[:, :0], "q has 0 nodes"),
    ("rotary_cache", "k", lambda x: x[0], "k has shape"),
    ("rotary_cache", "k", torch.Tensor.half, "k has dtype float16"),
    ("rotary_cache", "k", lambda x: x[:, :1], "k has shape"),
    ("rotary_cache", "v", lambda x: x[:, :, :1], "v has shape"),
    ("rotary_cache", "v", torch.Tensor.half, "v has dtype float16"),
    ("rotary_cache", "keys", lambda x: x[:1], "keys has shape"),
    ("rotary_cache", "keys", every_other, "keys has rows that are not contiguous"),
    ("rotary_cache", "values", lambda x: x[:, :, 1:], "values has shape"),
    ("rotary_cache", "values", torch.Tensor.half, "values has dtype float16"),
    ("rotary_cache", "prefix", lambda x: x[:1], "prefix has shape"),
    ("rotary_cache", "prefix", torch.Tensor.int, "prefix has dtype int32"),
    ("rotary_cache", "positions", lambda x: x[:, :1], "positions has shape"),
    ("rotary_cache", "cosines", lambda x: x.repeat(1, 2), "half of the cosines is 6"),
    ("rotary_cache", "cosines", torch.Tensor.double, "cosines has dtype float64"),
    ("rotary_cache", "cosines", lambda x: x[:0], "positions of cosines is 0"),
    ("rotary_cache", "sines", none, "sines is missing"),
    ("rotary_cache", "sines", short, "sines has shape"),
    ("rotary_cache", "norm", lambda x: "l2", "norm is 'l2'"),
    ("rotary_cache", "q_weight", none, "q_weight is missing"),
    ("rotary_cache", "k_bias", short, "k_bias has shape"),
    ("rotary_cache", "norm_each_head", lambda x: False, "q_weight has shape"),
    ("gated_activation", "gate", torch.flatten, "gate has shape"),
    ("gated_activation", "gate", torch.Tensor.int, "gate has dtype int32"),
    ("gated_activation", "gate", lambda x: x[:, :0], "size of gate is 0"),
    ("gated_activation", "up", lambda x: x[:1], "up has shape"),
    ("gated_activation", "up", torch.Tensor.half, "up has dtype float16"),
    (
        "gated_activation",
        "activation",
        lambda x: "elu",
        "activation is 'elu'; expected one of silu",
    ),
]


@pytest.mark.parametrize("op, name, change, message", WRONG)
def test_wrong_arguments_are_refused_by_name(device, op, name, change, message):
    arguments = example(op, device)
    getattr(ops, op)(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=rf"\b{message}"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("prefix", [5, -1], r"prefix\[1\] is -1; expected 0 to 13"),
        ("prefix", [14, 0], r"prefix\[0\] is 14"),
        ("prefix", [2**63 - 1, 0], r"prefix\[0\]"),
        ("positions", [[0, 0, 8], [0, 0, 0]], r"positions\[0\] is 8; expected 0 to 7"),
        ("positions", [[0, 0, 0], [-1, 0, 0]], r"positions\[1\] is -1"),
    ],
)
def test_a_wrong_slot_or_position_is_refused_and_nothing_written(name, values, message):
    arguments = example("rotary_cache", "cpu") | {name: integers(values)}
    with pytest.raises(ValueError, match=message):
        ops.rotary_cache(**arguments)
    assert torch.all(arguments["keys"] == 1) and torch.all(arguments["values"] == 1)
