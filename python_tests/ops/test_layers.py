"""Linear layers, norms and embeddings of a decoder layer against the specification and the
oracle.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import layers, oracle
from helpers.cases import assert_equal, one_thread, seeded, threads
from helpers.layers import ALL_ISAS, ISAS, WEIGHTS, normal, number, runs_here
from msn_ext import _C, ops
from msn_ext.ops import reference

EPS = 1e-5
SIZES = [(1, 1), (5, 31), (33, 257), (40, 300), (97, 64)]  # outputs, inputs


@dataclasses.dataclass
class Call:
    """A packed_linear call."""

    weights: str = "float32"
    isa: str = ""
    rows: int = 3
    outputs: int = 33
    inputs: int = 40
    bias: bool = False
    norm: str = "none"
    epilogue: str = "store"
    activation: str = "silu"
    scale: float = 1.0
    softcap: float = 0.0
    seed: int = 0

    def __post_init__(self):
        def of(*shape):
            self.seed += 1
            return normal(*shape, seed=self.seed, dtype=number(self.weights))

        self.halves = 2 if self.epilogue == "gate" else 1
        self.x, self.weight = of(self.rows, self.inputs), of(self.outputs, self.inputs) / 4
        self.arguments = {
            "weights": self.weights,
            "outputs": self.outputs,
            "bias": of(self.outputs) if self.bias else None,
            "norm": self.norm,
            "norm_weight": None if self.norm == "none" else of(self.inputs),
            "norm_bias": of(self.inputs) if self.norm == "layer" else None,
            "eps": EPS,
            "epilogue": self.epilogue,
            "activation": self.activation,
            "scale": self.scale,
            "softcap": self.softcap,
            "residual": of(self.rows, self.outputs) if self.epilogue == "add" else None,
            "isa": self.isa,
        }

    def packed(self) -> torch.Tensor:
        return ops.pack_weights(self.weight, self.weights, halves=self.halves, isa=self.isa)

    def run(self, **changes) -> torch.Tensor:
        return ops.packed_linear(self.x, self.packed(), **{**self.arguments, **changes})

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's result, and how far the kernel's may be from it."""
        given = {k: x.numpy() for k, x in self.arguments.items() if isinstance(x, torch.Tensor)}
        x, w = self.x.double().numpy(), oracle.layers.stored(self.weight.numpy(), self.weights)
        if self.norm != "none":
            weight, bias = given["norm_weight"], given.get("norm_bias")
            x = np.array([oracle.layers.norm(row, self.norm, weight, bias, EPS) for row in x])
        if layers.rounds_inputs(self.weights, self.isa):
            x = oracle.layers.rounded(x, "bfloat16")
        elif self.weights == "int8":
            x = np.array([oracle.layers.int16_row(row) for row in x])
        y = np.array([[oracle.layers.dot(row, out) for out in w] for row in x])
        bound = layers.sum_bound(x, w, self.weights, self.isa, self.norm)
        if self.bias:
            y = y + given["bias"]
        return self.after(y, bound, given)

    def after(self, y: np.ndarray, bound: np.ndarray, given: dict) -> tuple:
        # No activation is steeper than 1.13; 8 roundings and the polynomials' 1e-7 of what comes.
        few = 1e-14 if self.weights == "float64" else 8e-7
        act = np.vectorize(lambda v: oracle.layers.activation(self.activation, v), otypes=[float])
        if self.epilogue == "add":
            out, bound = given["residual"] + self.scale * y, abs(self.scale) * bound
        elif self.epilogue == "activate":
            out, bound = act(y), 1.13 * bound
        elif self.epilogue == "gate":
            gates, ups = np.split(y, 2, axis=1)
            g, u = np.split(bound, 2, axis=1)
            out = act(gates) * ups
            bound = 1.13 * g * (np.abs(ups) + u) + np.abs(act(gates)) * u + few * np.abs(ups)
        elif self.epilogue == "logits":
            cap = np.vectorize(lambda v: oracle.layers.soft_cap(v, self.softcap), otypes=[float])
            out, bound = cap(self.scale * y), abs(self.scale) * bound
        else:
            out = y
        return out, bound + few * (1 + np.abs(out) + np.abs(y).max() * (self.bias or few > 1e-9))

    def check(self) -> None:
        got = self.run()
        exact, bound = self.exact()
        layers.assert_within(got, exact, bound)
        specified = reference.packed_linear(self.x, self.packed(), **self.arguments)
        assert specified.dtype == got.dtype == number(self.weights)
        layers.assert_within(got, specified.double().numpy(), bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", WEIGHTS)
class TestEveryKernel:
    """Every kind of weights with every instruction set that is here."""

    @pytest.mark.parametrize("outputs, inputs", SIZES)
    def test_odd_sizes(self, isa, weights, outputs, inputs):
        for rows in (1, 7):
            Call(weights, isa, rows, outputs, inputs, bias=rows > 1, seed=outputs).check()

    @pytest.mark.parametrize("norm", ["rms", "layer"])
    def test_norms(self, isa, weights, norm):
        Call(weights, isa, 3, 33, 301, norm=norm).check()

    @pytest.mark.parametrize("epilogue", ["add", "activate", "gate", "logits"])
    def test_epilogues(self, isa, weights, epilogue):
        options = {"scale": 1.7, "softcap": 3.0 if epilogue == "logits" else 0.0}
        for outputs in (34, 64, 102):
            Call(weights, isa, 4, outputs, 65, True, epilogue=epilogue, **options).check()

    @pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
    def test_activations(self, isa, weights, activation):
        Call(weights, isa, 6, 50, 33, True, "rms", "activate", activation).check()
        Call(weights, isa, 6, 50, 33, True, "rms", "gate", activation).check()

    def test_many_rows(self, isa, weights):
        Call(weights, isa, 70, 33, 520, norm="none").check()

    def test_rows_have_the_same_bits_alone_and_together(self, isa, weights):
        for epilogue in ("store", "gate"):
            call = Call(weights, isa, 70, 102, 600, True, "rms", epilogue)
            with one_thread():
                all_rows = call.run()
            for rows in (*range(1, 15), 24, 25, 37, 64):
                for first in (0, 70 - rows):
                    part = torch.arange(first, first + rows)
                    assert_equal(call.run(pick=part), all_rows[part])
                    few = ops.packed_linear(call.x[part], call.packed(), **call.arguments)
                    assert_equal(few, all_rows[part])

    def test_threads_change_no_bit(self, isa, weights):
        for rows in (1, 9):
            call = Call(weights, isa, rows, 301, 257, True, "layer", "activate")
            results = []
            for count in (1, 2, 3, 7):
                with threads(count):
                    results.append(call.run())
            for result in results[1:]:
                assert_equal(result, results[0])

    def test_what_is_no_number_stays_in_its_row(self, isa, weights):
        call = Call(weights, isa, 9, 40, 300)
        clean = call.run()
        for bad in (float("nan"), float("inf"), -float("inf")):
            call.x[4, 299] = bad
            got = call.run()
            assert not got[4].isfinite().any()
            assert_equal(got[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])
        assert call.run(norm="rms", norm_weight=torch.ones_like(call.x[0]))[4].isnan().all()
        bad_row = call.x.new_full((1, 300), float("nan"))
        for epilogue, activation in [("activate", "silu"), ("activate", "gelu"), ("logits", "")]:
            got = ops.packed_linear(
                bad_row,
                call.packed(),
                weights,
                40,
                epilogue=epilogue,
                activation=activation or "silu",
                softcap=2.0,
                isa=isa,
            )
            assert got.isnan().all(), (epilogue, activation)

    def test_rows_that_are_not_picked_are_not_read(self, isa, weights):
        call = Call(weights, isa, 9, 40, 65, norm="rms")
        pick = torch.tensor([7, 0, 7])
        expected = call.run(pick=pick)
        call.x[[1, 2, 3, 4, 5, 6, 8]] = float("nan")
        assert_equal(call.run(pick=pick), expected)

    @pytest.mark.parametrize("epilogue", ["store", "gate", "activate"])
    def test_nothing_is_written_beside_the_outputs(self, isa, weights, epilogue):
        call = Call(weights, isa, 7, 34, 65, epilogue=epilogue)
        expected = call.run()
        memory = call.x.new_full((expected.numel() + 32,), float("nan"))
        out = memory[16:-16].view(expected.shape)
        after = epilogue, "silu", 1.0, 0.0, None, isa, 2, out
        _C.packed_linear(call.x, call.packed(), weights, 34, None, "none", None, None, 0.0, *after)
        assert_equal(out, expected)
        assert memory[:16].isnan().all() and memory[-16:].isnan().all()

    def test_packing_pads_with_zeros_and_keeps_strided_weights(self, isa, weights):
        weight = normal(2 * 37, 3 * 45, seed=1, dtype=number(weights))[::2, ::3]
        packed = ops.pack_weights(weight, weights, isa=isa)
        assert_equal(packed, ops.pack_weights(weight.contiguous(), weights, isa=isa))
        unpacked = reference.unpack_weights(packed, weights, 37, 45, isa=isa)
        expected = oracle.layers.stored(weight.numpy(), weights)
        assert_equal(unpacked, torch.from_numpy(expected))
        assert (reference.unpack_weights(packed, weights, 48, 45, isa=isa)[37:] == 0).all()

    def test_embedding_rows(self, isa, weights):
        dtype = number(weights)
        tokens, positions = torch.tensor([36, 0, 5, 5]), torch.tensor([1, 0, 0, 2])
        at = normal(3, 45, seed=2, dtype=dtype)
        for table_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            table = normal(37, 45, seed=3, dtype=table_dtype)
            packed = ops.pack_weights(table, weights, isa=isa)
            for stored in (table, packed):
                options = {"scale": 6.7, "positions": positions, "position_table": at, "isa": isa}
                got = ops.embed_rows(tokens, stored, weights, 45, 37, **options)
                assert got.dtype == dtype
                assert_equal(got, reference.embed_rows(tokens, stored, weights, 45, 37, **options))
            plain = ops.embed_rows(tokens, table, weights, 45, 37, isa=isa)
            assert_equal(plain, table[tokens].to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", ["float64", "float32"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_add_norm(isa, weights, norm):
    dtype = number(weights)
    for rows, size in [(1, 1), (5, 31), (70, 300)]:
        h, x = (normal(rows, size, seed=seed, dtype=dtype) for seed in (1, 2))
        given = {"norm": norm, "norm_weight": normal(size, seed=3, dtype=dtype)}
        given["norm_bias"] = normal(size, seed=4, dtype=dtype) if norm == "layer" else None
        before = h.clone(), x.clone()
        got = ops.add_norm(h, x, **given, eps=EPS, scale=0.3, isa=isa)
        assert_equal((h, x), before)
        exact = reference.add_norm(h, x, **given, eps=EPS, scale=0.3)
        for row, xs, out in zip(h, x, got):
            parts = [None if v is None else v.numpy() for v in list(given.values())[1:]]
            second = row.numpy() + 0.3 * oracle.layers.norm(xs.numpy(), norm, *parts, EPS)
            # Where one number is normed, x - mean is an exact 0; else see sum_bound.
            unit = 2.0**-53 if weights == "float64" else 2.0**-24
            bound = (size + 20) * unit * (1 + np.abs(second) + np.abs(row.numpy()))
            layers.assert_within(out, second, 4 * bound)
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
        for r in range(rows):
            one = slice(r, r + 1)
            alone = ops.add_norm(h[one], x[one], **given, eps=EPS, scale=0.3, isa=isa)
            assert_equal(alone, got[one])
        for count in (2, 3):
            with threads(count):
                assert_equal(ops.add_norm(h, x, **given, eps=EPS, scale=0.3, isa=isa), got)


@st.composite
def calls(draw) -> Call:
    epilogue = draw(st.sampled_from(["store", "add", "activate", "gate", "logits"]))
    return Call(
        draw(st.sampled_from(WEIGHTS)),
        draw(st.sampled_from([isa for isa in ALL_ISAS if runs_here(isa)])),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)) * (2 if epilogue == "gate" else 1),
        draw(st.sampled_from([1, 2, 31, 32, 33, 63, 65, 257, 300])),
        draw(st.booleans()),
        draw(st.sampled_from(["none", "rms", "layer"])),
        epilogue,
        draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
        draw(st.sampled_from([1.0, 0.5, -2.0])),
        draw(st.sampled_from([0.0, 5.0])),
        draw(st.integers(0, 99)) * 10,
    )


@given(calls(), st.integers(1, 3))
def test_linear_layers_are_specified(call, count):
    """Any of them; and any of its rows alone, with any number of threads."""
    # One number alone has no spread: a layer norm divides by sqrt(eps), and so do its errors.
    if not (call.norm == "layer" and call.inputs <= 2):
        with one_thread():
            call.check()
    whole = call.run()
    row = torch.randint(call.rows, (1,), generator=seeded(call.seed))
    residual = call.arguments["residual"]
    with threads(count):
        alone = call.run(pick=row, residual=None if residual is None else residual[row])
    assert_equal(alone, whole[row])
