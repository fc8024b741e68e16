"""The CPU ops under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds msn_ext with ``MSN_SANITIZE=ON`` and runs the op tests against that build, with fewer random
examples. Two negative controls make the very same build report a read past the end of an
allocation and a misaligned read.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

# Soon built, and reports with the lines of the source.
SETTINGS = [
    "cmake.build-type=RelWithDebInfo",
    "cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1",
    "install.strip=false",
]
REPORT = ("AddressSanitizer", "runtime error:")


def runtime(name: str) -> Path | None:
    """A shared library of the compiler's; None where there is no compiler or library."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    return Path(found) if os.path.isabs(found) and Path(found).exists() else None


LIBRARIES = [runtime(name) for name in ("libasan.so", "libstdc++.so.6")]
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD needs Linux"),
    pytest.mark.skipif(None in LIBRARIES, reason="no g++ with AddressSanitizer (libasan.so)"),
    # Not find_spec, at which setuptools takes this process for pip and torch.compile fails later
    # on.
    pytest.mark.skipif(
        not list(importlib.metadata.distributions(name="pip")), reason="the build needs pip"
    ),
]


def build(target: Path) -> None:
    """Put a sanitized build of the checkout into a folder."""
    build_tools = all(importlib.util.find_spec(name) for name in ("scikit_build_core", "pybind11"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    built = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        + [f"-C{setting}" for setting in SETTINGS]
        + ["--no-build-isolation"] * build_tools
        + [str(ROOT)],
        env={**os.environ, "PATH": path, "MSN_SANITIZE": "ON", "MSN_CUDA": "off"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture(scope="module")
def sanitized(once) -> Path:
    """Folder with a sanitized build of the checkout."""
    return once("sanitized", build)


def run_sanitized(build: Path, *command: str) -> subprocess.CompletedProcess:
    """Python with the sanitizers loaded and the build first on its path."""
    return subprocess.run(
        [sys.executable, *command],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "2",  # races show with several only
            "PYTHONPATH": str(build),
            "LD_PRELOAD": " ".join(map(str, LIBRARIES)),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=98",
            "CUDA_VISIBLE_DEVICES": "",
            "MSN_TEST_DEVICES": "cpu",
        },
        cwd=build,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("layers", [False, True], ids=["trees and drafts", "layers"])
def test_the_cpu_ops_are_clean(sanitized, layers):
    """The op tests but those of torch's own registration and compilation machinery; a layer's with
    every instruction set that is here, a tiny model's passes and steps among them.
    """
    others = ("test_draw_noise.py", "test_sanitizers.py")
    tests = sorted(
        path
        for path in Path(__file__).parent.glob("test_*.py")
        if path.name not in others and path.name.startswith("test_layer") == layers
    )
    if layers:
        tests.append(ROOT / "python_tests" / "decoding" / "test_native_steps.py")
    skipped = "not opcheck and not compiled"
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=sanitizers",
        "-k",
        skipped,
    ]
    run = run_sanitized(
        sanitized,
        "-m",
        "pytest",
        *options,
        *map(str, tests),
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0 and " passed" in output, output
    assert not any(mark in output for mark in REPORT), output


# A tensor over memory that ends, or starts, where its shape does not say.
LYING_TENSOR = """
import ctypes, torch
from msn_ext import _C, ops
assert _C.__file__.startswith({build!r}), _C.__file__
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
memory = (ctypes.c_int64 * 64).from_address(malloc({size}))
"""


@pytest.mark.parametrize(
    "size, use, report",
    [
        (
            8 * 63,
            (
                "ops.lookup_ngram(torch.frombuffer(memory, dtype=torch.int64)[None],"
                " torch.tensor([64]), 3, 3)"
            ),
            "AddressSanitizer: heap-buffer-overflow",
        ),
        (
            8 * 64,
            "ops.tree_ancestors(torch.frombuffer(memory, dtype=torch.int32, count=9, offset=1))",
            "runtime error: load of misaligned address",
        ),
        (
            8 * 63,
            (
                "ops.packed_linear(torch.frombuffer(memory, dtype=torch.float32)[None],"
                " ops.pack_weights(torch.ones(1, 128), 'float32'), 'float32', 1)"
            ),
            "AddressSanitizer: heap-buffer-overflow",
        ),
    ],
    ids=["out of bounds", "misaligned", "out of bounds in a layer"],
)
def test_the_build_would_report(sanitized, size, use, report):
    """Negative controls: a wrong read in a kernel ends the process with the report."""
    run = run_sanitized(sanitized, "-c", LYING_TENSOR.format(build=str(sanitized), size=size) + use)
    assert run.returncode != 0 and report in run.stderr, run.stdout + run.stderr
    assert "csrc/" in run.stderr
