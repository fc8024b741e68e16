"""The CPU kernels on machines that are not this one: no instruction that they lack, no wrong sum.

A small program of the kernels alone (``other_machines.cpp``) picks an instruction set at run time,
as the extension does; qemu runs it as older x86 machines and as aarch64 would.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT

SOURCES = ["csrc/cpu/layers/kernels_for.cpp", "csrc/cpu/tree/tree_attention.cpp"]
PROGRAM = "python_tests/emulation/other_machines.cpp"
KERNELS = ["csrc/cpu/layers/kernels.cpp", "csrc/cpu/tree/tree_attention_kernel.cpp"]
X86 = ["baseline", "avx2", "avx512", "avx512_bf16"]
COMPILERS = {"x86_64": ["x86_64-linux-gnu-g++", "g++"], "aarch64": ["aarch64-linux-gnu-g++"]}


def compiler(machine: str) -> str:
    for name in COMPILERS[machine]:
        if shutil.which(name) and machine in targeted(name):
            return name
    pytest.skip(f"no compiler for {machine}")


def targeted(name: str) -> str:
    return subprocess.run([name, "-dumpmachine"], capture_output=True, text=True).stdout


def flags(isa: str) -> list[str]:
    """An instruction set's compiler flags, as CMakeLists.txt has them."""
    lists = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (found,) = re.findall(rf"set\(flags_{isa}\s+([^)]*)\)", lists)
    inner = re.sub(r"\$\{flags_(\w+)\}", lambda of: " ".join(flags(of[1])), found)
    return inner.replace('"', "").split()


def kernels(isa: str) -> list[str]:
    return KERNELS[:1] if isa == "avx512_bf16" else KERNELS


def compile_kernels(machine: str):
    """What puts a machine's objects, and the program of them, into a folder."""

    def make(folder: Path) -> None:
        isas = X86 if machine == "x86_64" else ["baseline"]
        have = [f"-DMSN_HAVE_{isa.upper()}" for isa in isas]
        common = [compiler(machine), "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}"]
        objects = []
        for isa in isas:
            for source in kernels(isa):
                objects.append(str(folder / f"{isa}-{Path(source).stem}.o"))
                options = [f"-DMSN_ISA={isa}", *flags(isa), "-c", str(ROOT / source)]
                run([*common, *options, "-o", objects[-1]])
        sources = [str(ROOT / source) for source in (PROGRAM, *SOURCES)]
        run([*common, *have, "-static", *sources, *objects, "-o", str(folder / "program")])

    return make


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(params=["x86_64", "aarch64"])
def built(once, request) -> tuple[str, Path]:
    compiler(request.param)
    return request.param, once(f"kernels-{request.param}", compile_kernels(request.param))


@pytest.fixture
def x86(once) -> Path:
    compiler("x86_64")
    return once("kernels-x86_64", compile_kernels("x86_64"))


@pytest.mark.parametrize(
    "machine, picked",
    [
        ("Nehalem", "layers baseline, attention baseline"),
        ("Opteron_G1", "layers baseline, attention baseline"),
        ("Haswell", "layers avx2, attention avx2"),
    ],
)
def test_an_older_machine_gets_the_kernels_that_it_has(x86, machine, picked):
    if not shutil.which("qemu-x86_64"):
        pytest.skip("no qemu-x86_64")
    assert run(["qemu-x86_64", "-cpu", machine, str(x86 / "program")]) == picked


def test_aarch64_computes_the_same(once):
    compiler("aarch64")
    if not shutil.which("qemu-aarch64"):
        pytest.skip("no qemu-aarch64")
    folder = once("kernels-aarch64", compile_kernels("aarch64"))
    picked = run(["qemu-aarch64", str(folder / "program")])
    assert picked == "layers baseline, attention baseline"


def test_aarch64_multiplies_and_adds_in_one_instruction(once):
    """The product's loops are fmla on whole registers, with the row's number from a lane or not."""
    compiler("aarch64")
    if not shutil.which("aarch64-linux-gnu-objdump"):
        pytest.skip("no aarch64-linux-gnu-objdump")
    folder = once("kernels-aarch64", compile_kernels("aarch64"))
    code = run(["aarch64-linux-gnu-objdump", "-d", str(folder / "baseline-kernels.o")])
    assert len(re.findall(r"\tfmla\s+v\d+\.4s", code)) > 500
    assert len(re.findall(r"\tfmla\s+v\d+\.2d", code)) > 100


def test_no_function_is_shared_between_instruction_sets(built):
    """Else the linker keeps one of them, and machines run another's instructions: what an object
    offers to others, inline functions and templates included, is in its own namespace.
    """
    if not shutil.which("nm"):
        pytest.skip("no nm")
    machine, folder = built
    for name in sorted(path.name for path in folder.glob("*.o")):
        isa = name.split("-")[0]
        symbols = run(["nm", "-C", "--defined-only", "--extern-only", str(folder / name)])
        offered = [line.split(maxsplit=2)[2] for line in symbols.splitlines()]
        assert offered
        shared = [
            symbol
            for symbol in offered
            if f"msn::{isa}::" not in symbol and symbol != "DW.ref.__gxx_personality_v0"
        ]
        assert shared == [], f"{machine}: {name}"
