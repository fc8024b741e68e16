"""Weights in float32 in twenty-four bits a number (csrc/cpu/layers/short_floats.h), where the last
eight are zeros: every number comes back, and what is computed with them is what is computed with
the packed ones, bit for bit.
"""

import copy

import pytest
import torch

import msn_ext
from helpers.cases import assert_equal, seeded, threads
from helpers.families import tiny_model
from helpers.layers import normal, runs_here
from msn_ext import _C, generate, ops
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import CODED, PackedLinear, PackedPlan, coded
from msn_ext.ops import reference

SHORT = CODED["float32"]
SIZES = [(1, 1), (33, 16), (40, 263), (70, 576), (64, 1033)]  # outputs, inputs
needs_shorts = pytest.mark.skipif(not runs_here("avx512"), reason="no short floats here")
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(not runs_here(isa), reason=f"no {isa} here"))
    for isa in ("avx512", "avx512_bf16")
]


def every_pattern(outputs, inputs):
    """Twenty-four bits at random: infinities, subnormal numbers, any exponent; no NaN, of which
    packing makes one.
    """
    bits = torch.randint(-(2**31), 2**31, (outputs, inputs), generator=seeded(1)).int() & ~255
    numbers = bits.view(torch.float32)
    return torch.where(numbers.isnan(), 1.5, numbers)


def of_float16(outputs, inputs):
    return (0.1 * normal(outputs, inputs, seed=2)).half().float()


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs, inputs", SIZES)
@pytest.mark.parametrize("halves", [1, 2])
def test_every_number_comes_back(isa, outputs, inputs, halves):
    outputs += outputs % halves
    weight = every_pattern(outputs, inputs)
    data = ops.pack_weights(weight, SHORT, halves=halves, isa=isa)
    panels = -(-outputs // halves // 32) * halves
    assert len(data) == panels * 32 * inputs * 3 + 64
    linear = PackedLinear(data, outputs, inputs, halves, SHORT, isa)
    assert torch.equal(bits(linear.unpacked(torch.arange(outputs))), bits(weight))
    back = reference.unpack_weights(data, SHORT, outputs, inputs, halves, isa).float()
    assert torch.equal(bits(back), bits(weight))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs, inputs", SIZES)
@pytest.mark.parametrize("epilogue, halves", [("store", 1), ("gate", 2)])
def test_products_are_those_of_packed_weights(isa, outputs, inputs, epilogue, halves):
    outputs += outputs % halves
    weight, x = of_float16(outputs, inputs), normal(40, inputs, seed=3)
    plain, short = (
        ops.pack_weights(weight, how, halves=halves, isa=isa) for how in ("float32", SHORT)
    )
    for team in (1, 3):
        with threads(team):
            for rows in (1, 2, 5, 11, 12, 13, 25, 40):
                how = dict(epilogue=epilogue, isa=isa)
                expected = ops.packed_linear(x[:rows], plain, "float32", outputs, **how)
                found = ops.packed_linear(x[:rows], short, SHORT, outputs, **how)
                assert torch.equal(bits(found), bits(expected)), rows
    exact = reference.packed_linear(x, short, SHORT, outputs, epilogue=epilogue, isa=isa)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


@needs_shorts
@pytest.mark.parametrize("at", [0, 63, 64, 95])
def test_a_wrong_byte_is_noticed(at):
    """The control: both parts of an input's bytes count, to the last one."""
    short, x = ops.pack_weights(of_float16(32, 16), SHORT), torch.ones(2, 16)
    right = ops.packed_linear(x, short, SHORT, 32)
    short[at] ^= 0x84
    assert not torch.equal(right, ops.packed_linear(x, short, SHORT, 32))


@needs_shorts
def test_one_bit_too_many():
    """A matrix is stored so only where all of its numbers can be."""
    weight = of_float16(70, 40)

    def linear():
        data = ops.pack_weights(weight, "float32")
        return PackedLinear(data, 70, 40, 1, "float32", _C.layer_isa("")["name"])

    (short,) = coded([linear()])
    assert short.weights == SHORT and short.data.nbytes < 0.8 * linear().data.nbytes
    assert torch.equal(short.unpacked(torch.arange(70)), weight)
    bits(weight)[69, 39] |= 1 << 7  # the last one of all
    several = [linear()]
    assert coded(several) is several
    with pytest.raises(ValueError, match="'coded_float32'; expected numbers whose last eight bits"):
        ops.pack_weights(weight, SHORT)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_without_the_instructions(isa):
    if not runs_here(isa):
        pytest.skip(f"no {isa} here")
    with pytest.raises(ValueError, match=f"coded_float32', which {isa} has not"):
        ops.pack_weights(torch.ones(4, 8), SHORT, isa=isa)
    plain = ops.pack_weights(torch.ones(4, 8), "float32", isa=isa)
    assert _C.coded_bytes("float32", isa, plain, 4, 8, 1) == 0


@pytest.fixture
def model():
    """Its matrices are of float16, as those of a model that was loaded as wide are."""
    made = tiny_model("llama", 1, torch.float32)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(weight.half())
    return made


@pytest.mark.parametrize("isa", ISAS)
def test_passes_are_the_same(model, isa):
    logits = []
    for codes in (True, False):
        plan = PackedPlan(plan_for(model), "float32", isa, codes=codes)
        kinds = {layer[name][1] for layer in plan.layers for name in ("qkv", "out", "up", "down")}
        assert kinds == {SHORT if codes else "float32"}
        ids, at = torch.arange(20)[None], torch.tensor([0])
        logits.append(NativeForward(plan, 1).read(ids, ids, at, 20))
    assert_equal(logits[:1], logits[1:])


@needs_shorts
def test_prepared_models(model):
    """Of the packed ones come the dense ones, for saving, for torch and for unpreparing."""
    dense = copy.deepcopy(model)
    ids = torch.arange(9)[None]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = generate(dense, ids, engine="torch", draft="none", **options)
    msn_ext.prepare(model)
    panels = (getattr(weight, "panels", None) for weight in model.parameters())
    assert SHORT in {its.weights for its in panels if its is not None}
    assert torch.equal(generate(model, ids, engine="native", **options), expected)
    for name, weight in model.state_dict().items():
        assert torch.equal(bits(weight), bits(dense.state_dict()[name])), name
    msn_ext.unprepare(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(bits(weight), bits(dense.state_dict()[name])), name
