"""Weights in bfloat16 in twelve bits a number (csrc/cpu/layers/coded.h): every number comes back,
and what is computed with them is what is computed with the packed ones, bit for bit.
"""

import pytest
import torch

from helpers.cases import assert_equal, seeded, threads
from helpers.families import tiny_model
from helpers.layers import needs_codes, normal, runs_here
from msn_ext import _C, ops
from msn_ext.decoding.forward import packed as packing
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import PackedLinear, PackedPlan, coded
from msn_ext.memory import HUGE, aligned
from msn_ext.ops import reference

CODED, ISA = packing.CODED["bfloat16"], "avx512_bf16"
SIZES = [(1, 8), (33, 16), (40, 264), (70, 576), (64, 1032)]  # outputs, inputs


def every_pattern(outputs, inputs):
    """Sixteen bits at random: NaN, infinities, subnormal numbers, any exponent."""
    bits = torch.randint(-(2**15), 2**15, (outputs, inputs), generator=seeded(1))
    return bits.to(torch.int16).view(torch.bfloat16)


def few_others(outputs, inputs):
    return normal(outputs, inputs, seed=2).bfloat16()


def zeros(outputs, inputs):
    return torch.zeros(outputs, inputs, dtype=torch.bfloat16)


def one_other(outputs, inputs):
    """Sixteen exponents, one of them once: at the very end."""
    weight = 2.0 ** (torch.arange(outputs * inputs) % 15).view(outputs, inputs)
    weight[-1, -1] = 2.0**40
    return weight.bfloat16()


MAKES = [every_pattern, few_others, zeros, one_other]


def packed(weight, weights=CODED, halves=1):
    return ops.pack_weights(weight, weights, halves=halves, isa=ISA)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def assert_same(back, weight):
    """All bits, but those of NaN: packing makes one NaN of all."""
    numbers = ~weight.isnan()
    assert torch.equal(back.view(torch.int16)[numbers], weight.view(torch.int16)[numbers])
    assert bool(back[~numbers].isnan().all())


@needs_codes
@pytest.mark.parametrize("make", MAKES)
class TestEveryNumberComesBack:
    @pytest.mark.parametrize("outputs, inputs", SIZES)
    @pytest.mark.parametrize("halves", [1, 2])
    def test_by_the_kernels(self, make, outputs, inputs, halves):
        outputs += outputs % halves
        weight = make(outputs, inputs)
        linear = PackedLinear(packed(weight, CODED, halves), outputs, inputs, halves, CODED, ISA)
        assert_same(linear.unpacked(torch.arange(outputs)).bfloat16(), weight)

    @pytest.mark.parametrize("outputs, inputs", SIZES)
    def test_as_specified(self, make, outputs, inputs):
        weight = make(outputs, inputs)
        back = reference.unpack_weights(packed(weight), CODED, outputs, inputs, 1, ISA)
        assert_same(back.bfloat16(), weight)

    def test_size(self, make):
        """Others are the pairs whose exponents are not among a block's fifteen most frequent."""
        outputs, inputs = 64, 576
        weight = make(outputs, inputs)
        others = 0
        for rows in weight.split(32):
            for block in rows.split(256, dim=1):
                exponents = block.contiguous().view(torch.int16).int() >> 7 & 255
                often = torch.bincount(exponents.flatten(), minlength=256)
                rank = (-often).argsort(stable=True)
                kept = torch.isin(exponents, rank[:15])
                others += int((~kept).view(32, -1, 2).any(2).sum())
        blocks = 2 * 3
        assert len(packed(weight)) == blocks * 64 + outputs * inputs * 3 // 2 + 4 * others + 64


@needs_codes
class TestProducts:
    @pytest.mark.parametrize("outputs, inputs", SIZES)
    @pytest.mark.parametrize("make", MAKES[1:])
    @pytest.mark.parametrize("team", [1, 3])
    def test_are_those_of_packed_weights(self, outputs, inputs, make, team):
        weight = make(outputs, inputs)
        x = normal(40, inputs, seed=3)
        with threads(team):
            for rows in (1, 2, 5, 8, 11, 12, 13, 24, 25, 40):
                plain, codes = (
                    ops.packed_linear(x[:rows], packed(weight, how), how, outputs, isa=ISA)
                    for how in ("bfloat16", CODED)
                )
                assert torch.equal(bits(plain), bits(codes)), rows

    def test_of_gates_and_ups(self):
        weight, x = few_others(96, 264), normal(14, 264, seed=3)
        plain, codes = (
            ops.packed_linear(x, packed(weight, how, 2), how, 96, epilogue="gate", isa=ISA)
            for how in ("bfloat16", CODED)
        )
        assert torch.equal(bits(plain), bits(codes))

    def test_as_specified(self):
        weight, x = few_others(40, 264), normal(3, 264, seed=3)
        got = ops.packed_linear(x, packed(weight), CODED, 40, isa=ISA)
        exact = reference.packed_linear(x, packed(weight), CODED, 40, isa=ISA)
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("where", ["exponents", "marks", "others", "numbers", "behind"])
    def test_a_wrong_byte_is_noticed(self, where):
        """The control: no byte of the format is without effect."""
        weight = one_other(32, 64)
        codes, x = packed(weight), torch.ones(2, 64)
        right = ops.packed_linear(x, codes, CODED, 32, isa=ISA)
        # None of them makes a block reach for what is not there.
        flips = dict(exponents=(1, 4), marks=(35, 0x80), others=(48, 0x40), numbers=(69, 0x84))
        at, flip = (flips | dict(behind=(-65, 0x84)))[where]
        codes[at] ^= flip
        assert not torch.equal(right, ops.packed_linear(x, codes, CODED, 32, isa=ISA))


@needs_codes
class TestWhereItPays:
    def linear(self, weight, weights="bfloat16"):
        data = ops.pack_weights(weight, weights, isa=ISA)
        return PackedLinear(data, *weight.shape, 1, weights, ISA)

    def test_most_matrices(self):
        several = [self.linear(few_others(64, 576)), self.linear(every_pattern(64, 576))]
        first, second = coded(several)
        assert first.weights == CODED and first.data.nbytes < 0.77 * several[0].data.nbytes
        assert second.weights == "bfloat16" and torch.equal(second.data, several[1].data)

    @pytest.mark.parametrize("weights", ["float16", "int8"])
    def test_not_of_other_kinds(self, weights):
        several = [self.linear(few_others(64, 576), weights)]
        assert coded(several) is several

    def test_not_of_odd_sizes(self):
        several = [self.linear(few_others(64, 570))]
        assert coded(several) is several

    def test_passes_are_the_same(self):
        model = tiny_model("llama", 1).bfloat16()
        logits = []
        for codes in (True, False):
            plan = PackedPlan(plan_for(model), "bfloat16", ISA, codes=codes)
            kinds = {layer[name][1] for layer in plan.layers for name in ("qkv", "out", "down")}
            assert kinds == {CODED if codes else "bfloat16"}
            ids, at = torch.arange(20)[None], torch.tensor([0])
            logits.append(NativeForward(plan, 1).read(ids, ids, at, 20))
        assert_equal(logits[:1], logits[1:])


class TestRefusals:
    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
    def test_without_the_instructions(self, isa):
        if not runs_here(isa):
            pytest.skip(f"no {isa} here")
        with pytest.raises(ValueError, match=f"coded_bfloat16', which {isa} has not"):
            ops.pack_weights(torch.ones(4, 8), CODED, isa=isa)
        plain = ops.pack_weights(torch.ones(4, 8), "bfloat16", isa=isa)
        assert _C.coded_bytes("bfloat16", isa, plain, 4, 8, 1) == 0

    @needs_codes
    def test_of_inputs(self):
        with pytest.raises(ValueError, match="inputs is 12; expected a multiple of 8"):
            ops.pack_weights(torch.ones(4, 12), CODED, isa=ISA)

    @needs_codes
    def test_of_less_than_the_panels(self):
        codes = packed(few_others(32, 64))
        with pytest.raises(ValueError, match=r"packed has shape .*; expected \d+ bytes or more"):
            ops.packed_linear(torch.ones(1, 64), codes[:512], CODED, 32, isa=ISA)


def test_large_memory_begins_at_a_large_page():
    size = HUGE + 5
    memory = aligned(size)
    assert memory.data_ptr() % HUGE == 0 and memory.shape == (size,)
    assert int(memory.count_nonzero()) == 0  # all of it is there
    memory[-1] = 1
