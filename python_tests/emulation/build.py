"""Builds msn_ext with the CUDA kernels of the checkout emulated on the CPU (see cuda_runtime.h)."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
]
# longjmp from one stack to another, which fortified sources take for a mistake.
FLAGS += ["-U_FORTIFY_SOURCE"]
# What would be an alignment fault on a GPU ends the process.
KERNEL_FLAGS = ["-x", "c++", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
# A call at every load and store, to races.cpp.
KERNEL_FLAGS += ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
KERNEL_FLAGS += [
    "-ffp-contract=off"
]  # as -fmad=false in CMakeLists.txt; some processors fuse unasked
KERNEL_FLAGS += ["-DMSN_SM90A"]  # as if for sm_90a, too
DEFINES = [
    f'-DMSN_{name}="emulated"' for name in ("VERSION", "COMPILER", "CUDA_VERSION", "CUDA_ARCHS")
]


def missing() -> str | None:
    """What a build lacks here, if anything."""
    if not sys.platform.startswith("linux"):
        return "the emulation needs Linux"
    if shutil.which(COMPILER[0]) is None:
        return f"no C++ compiler ({COMPILER[0]})"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no headers of Python"
    return None


def compile_one(folder: Path, source: Path) -> None:
    import pybind11

    includes = [HERE, folder / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    kernel = KERNEL_FLAGS if source.suffix == ".cu" else DEFINES
    run_compiler(
        *FLAGS,
        *(f"-I{path}" for path in includes),
        *kernel,
        "-c",
        source,
        "-o",
        folder / f"{source.stem}.o",
    )


def link(folder: Path) -> None:
    module = folder / "msn_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    run_compiler("-shared", "-o", module, *sorted(folder.glob("*.o")))


def run_compiler(*arguments) -> None:
    run = subprocess.run([*COMPILER, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def in_static_shared(declaration: re.Match) -> str:
    """Returns what declares the same variables in the emulated device's shared memory."""
    kind, names = declaration.groups()
    references = []
    for name, sizes in re.findall(r"(\w+)((?:\[[^\]]+\])*)(?:, |$)", names):
        references.append(f"{kind} (&{name}){sizes} = emulation::static_shared<{kind}{sizes}>();")
    return " ".join(references)


def build(folder: Path) -> None:
    """Puts a package msn_ext into `folder`: the installed one's Python, over emulated kernels."""
    # The layers of the native pass have no CUDA kernels.
    on_cpu = "cpu", "layer*.cpp", "bound_pass.cpp", "native_steps.cpp"
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns(*on_cpu))
    for header in "mma.cuh", "wgmma.cuh":
        shutil.copy(HERE / header, folder / "csrc" / "cuda" / "tree" / header)
    for path in folder.glob("csrc/cuda/**/*.cu*"):
        shared = r"\1* \2 = reinterpret_cast<\1*>(emulation::dynamic_shared);"
        text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", shared, path.read_text())
        path.write_text(re.sub(r"__shared__ (\w+) (\w.*);", in_static_shared, text))
    installed = Path(importlib.util.find_spec("msn_ext").origin).parent
    shutil.copytree(
        installed, folder / "msn_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    kernels = sorted(
        folder.glob("csrc/cuda/*/*.cu"), key=lambda path: -path.stat().st_size
    )  # the longest first
    with ThreadPoolExecutor(2) as jobs:
        sources = [
            *folder.glob("csrc/bindings/*.cpp"),
            *kernels,
            HERE / "on_cpu.cpp",
            HERE / "races.cpp",
        ]
        list(jobs.map(lambda source: compile_one(folder, source), sources))
    link(folder)


def mutate(folder: Path, kernel: str, old: str, new: str) -> None:
    """Replaces every `old` by `new` in a kernel of a build, or else in a header of the kernels, and
    builds that kernel again.
    """
    (path,) = folder.glob(f"csrc/cuda/*/{kernel}")
    places = [path, *sorted(folder.glob("csrc/cuda/*/*.cuh"))]
    place = next((place for place in places if old in place.read_text()), None)
    assert place, f"{kernel} has no {old!r}"
    place.write_text(place.read_text().replace(old, new))
    compile_one(folder, path)
    link(folder)


def fuzz(
    folder: Path, *options: str, timeout: float | None = None, **pipes
) -> subprocess.CompletedProcess:
    """Runs fuzz.py on the build in `folder`."""
    command = [sys.executable, str(HERE / "fuzz.py"), "--built", *options]
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environment, timeout=timeout, text=True, **pipes)
