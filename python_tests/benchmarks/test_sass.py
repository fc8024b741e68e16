"""benchmarks/sass.py: loops and kinds of instructions in nvdisasm's text."""

import subprocess
import sys

import pytest

from helpers import BENCHMARKS

# Two loops, the inner one left twice; a jump ahead; the machine's padding.
CODE = """\
	.section	.text._Z8a_kernelPi,"ax",@progbits
.text._Z8a_kernelPi:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_0:
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/             @!UP2 IADD3 R2, R2, 0x10, RZ ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   BSYNC B0 ;
        /*0090*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
.text._Z8b_kernelPi:
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sass

    return sass


def test_loops_are_found_and_counted(sass):
    names, loops = sass.parse(sass.kernels(CODE)["a_kernel"])
    assert loops == [(1, 9), (2, 5)] and names[5] == "BRA" and names[6] == "IADD3"
    whole, outer, inner = sass.describe(sass.kernels(CODE)["a_kernel"], 1)
    assert whole.startswith("  all: 12 = 1 tensor, 2 global, 1 special, 1 converge, 6 branch")
    assert outer.startswith("  loop: 9 = 1 tensor, 1 global, 1 special, 1 converge, 4 branch")
    assert inner == "    loop: 4 = 1 global, 1 special, 2 branch"
    assert sass.describe(sass.kernels(CODE)["a_kernel"], 5) == [whole, outer]
    assert sass.describe(sass.kernels(CODE)["b_kernel"], 1) == ["  all: 1 = 1 branch"]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("HGMMA", "tensor"),
        ("IMMA", "tensor"),
        ("LDSM", "matrix"),
        ("LDGSTS", "copy"),
        ("UTMALDG", "copy"),
        ("LDG", "global"),
        ("ATOMG", "global"),
        ("LDS", "shared"),
        ("MUFU", "special"),
        ("FFMA", "float"),
        ("HFMA2", "float"),
        ("DADD", "float"),
        ("SHFL", "shuffle"),
        ("BAR", "barrier"),
        ("IMAD", "integer"),
        ("FLO", "integer"),
    ],
)
def test_kinds_of_instructions(sass, name, kind):
    assert sass.kind(name) == kind


def test_a_file_that_is_none():
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "sass.py", "no_such"], capture_output=True, text=True
    )
    assert run.returncode == 2 and "FILE is 'no_such'; expected some of advance_text," in run.stderr
