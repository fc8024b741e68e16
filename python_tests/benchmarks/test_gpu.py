"""benchmarks/gpu.sh under a driver that is none: whatever a part does, what was made comes back.

Stand-ins take the places of nvidia-smi, nvcc, compute-sanitizer and of the programs of the parts,
which append two lines each as the real ones do; what those do is tested on a CPU in test_ops.py,
test_steps.py and their like.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import BENCHMARKS

DRIVER = {
    "nvidia-smi": """case "$*" in
  *=name*) echo NVIDIA H100 80GB HBM3;; *compute_cap*) echo 9.0;; *) echo 580.1;; esac""",
    "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.48'",
    "compute-sanitizer": """[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 1
SANITIZER=$2; export SANITIZER; shift 4; exec "$@" """,
}
PROGRAM = """
import json, os, signal, subprocess, sys, time

arguments = sys.argv[1:]
if arguments[0] == "benchmarks/gpu.py":
    os.execv(sys.executable, [sys.executable, *arguments])
name = next(a for a in arguments if not a.startswith("-")).rpartition("/")[2]
name = os.environ.get("SANITIZER", name.removesuffix(".py"))
how = dict(pair.split(":") for pair in os.environ.get("HOW", "").split()).get(name)
files = [arguments[at + 1] for at, a in enumerate(arguments[:-1]) if a == "--output"]
if name == "pytest":
    files.append(os.environ["MSN_TEST_RESULTS"])
if name == "pip":
    print("architectures", os.environ["MSN_CUDA_ARCHITECTURES"])


def save(row):
    for file in files:
        with open(file, "a") as lines:
            lines.write(json.dumps({"by": name, "row": row}) + "\\n")


print(name, "begins")
save(1)
if how == "fails":
    sys.exit(3)
if how == "floods":
    for _ in range(300):
        print("x" * 99_999)
if how == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "100"])
    with open(os.environ["CHILDREN"], "a") as file:
        print(os.getpid(), child.pid, file=file)
    time.sleep(100)
save(2)
print(name, "ends")
"""


def load_gpu():
    spec = importlib.util.spec_from_file_location("msn_gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["msn_gpu"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


gpu = load_gpu()
ALL = list(gpu.parts(Path(), ""))
WRITTEN = {
    "test": "tests.jsonl",
    "ops": "ops.jsonl",
    "steps": "steps.jsonl",
    "transformers": "steps.jsonl",
    "batches": "steps.jsonl",
    "demo": "decode.jsonl",
}


class Machine:
    """A bare checkout, and a driver."""

    def __init__(self, folder: Path):
        self.checkout, self.out = folder / "checkout", folder / "out"
        self.children = folder / "children"
        for place in ("benchmarks", "csrc", "msn_ext"):
            (self.checkout / place).mkdir(parents=True)
        for name in ("gpu.sh", "gpu.py"):
            shutil.copy(BENCHMARKS / name, self.checkout / "benchmarks")
        for name in ("CMakeLists.txt", "pyproject.toml", "csrc/op.cu"):
            (self.checkout / name).write_text("")
        programs = folder / "bin"
        programs.mkdir()
        for name, text in DRIVER.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / "python").write_text(f"#!{sys.executable} -S\n{PROGRAM}")
        for program in programs.iterdir():
            program.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": str(programs / "python"),
            "CHILDREN": str(self.children),
            "OUT": str(self.out),
        }

    def start(self, command: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.checkout,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *parts: str, **environment: str) -> int:
        process = self.start(f"benchmarks/gpu.sh {' '.join(parts)}", **environment)
        self.output = process.communicate(timeout=50)[0].decode()
        return process.returncode

    def rows(self, file: str) -> list[dict]:
        return [json.loads(line) for line in (self.out / file).read_text().splitlines()]

    def statuses(self) -> dict[str, str]:
        return {row["part"]: row["status"] for row in self.rows("parts.jsonl") if "status" in row}

    def left(self) -> list[int]:
        """Return which of the processes that hang still run."""
        pids = self.children.read_text().split() if self.children.exists() else []
        return [int(pid) for pid in pids if runs(int(pid))]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for pid in machine.left():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_what_comes_back(out: Path) -> None:
    """Eight files of 16 MiB, two folders down, with plain names."""
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert 0 < len(files) <= 8, files
    for file in files:
        assert len(file.parts) <= 3 and re.fullmatch("[A-Za-z0-9._/-]+", str(file))
        assert (out / file).stat().st_size <= 16 << 20


def test_everything_that_all_parts_make_comes_back(machine):
    assert machine.run(*ALL) == 0, machine.output
    check_what_comes_back(machine.out)
    about = machine.rows("parts.jsonl")[0]
    assert about["gpu"] == "NVIDIA H100 80GB HBM3" and about["cuda"] == "13.0"
    assert list(machine.statuses().items()) == [(part, "ok") for part in ALL]
    log = (machine.out / "log.txt").read_text()
    assert "architectures 90a-real" in log and "initcheck ends" in log and "decode ends" in log
    for part, file in WRITTEN.items():
        count = sum(other == file for other in WRITTEN.values())
        assert [row["row"] for row in machine.rows(file)] == [1, 2] * count, part
    real = {"ops.svg"}  # of which the stand-in makes none
    assert {path.name for path in machine.out.iterdir()} | real == set(
        re.findall(r"[\w-]+\.(?:jsonl|txt|svg)", gpu.__doc__)
    )


def test_a_part_that_fails_and_one_that_hangs_cost_no_other(machine):
    how = {"HOW": "ops:fails pytest:floods synccheck:hangs", "SCALE": "0.05"}
    parts = ["synccheck", "test", "ops", "steps"]
    begun = time.monotonic()
    assert machine.run(*parts, **how) == 1
    assert time.monotonic() - begun < 0.05 * gpu.TOTAL + 5
    assert machine.statuses() == {
        "build": "ok",
        "test": "ok",
        "ops": "failed: exit status 3",
        "synccheck": "failed: took too long",
        "steps": "ok",
    }
    check_what_comes_back(machine.out)
    assert [row["row"] for row in machine.rows("ops.jsonl")] == [1]
    assert [row["row"] for row in machine.rows("steps.jsonl")] == [1, 2]
    log = (machine.out / "log.txt").read_text()
    for text in ("pytest begins", "left out here", "pytest ends", "synccheck begins", "steps ends"):
        assert text in log
    assert len(machine.children.read_text().split()) == 2 and not machine.left()
    assert "synccheck     failed: took too long" in machine.output


def test_a_command_that_is_killed_loses_nothing_of_what_was_done(machine):
    process = machine.start("benchmarks/gpu.sh test ops steps batches", HOW="steps:hangs")
    try:
        for _ in range(300):
            if machine.children.exists() and len(machine.children.read_text().split()) == 2:
                break
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()
    assert machine.statuses() == {"build": "ok", "test": "ok", "ops": "ok"}
    last = machine.rows("parts.jsonl")[-1]
    assert last["part"] == "steps" and "begun" in last
    rows = {
        file: [row["row"] for row in machine.rows(f"{file}.jsonl")] for file in ("ops", "tests")
    }
    assert rows == {"ops": [1, 2], "tests": [1, 2]}
    assert [row["row"] for row in machine.rows("steps.jsonl")] == [1]
    assert "steps begins" in (machine.out / "log.txt").read_text()
    check_what_comes_back(machine.out)


def test_what_is_built_is_used_again_until_the_sources_change(machine):
    built = []
    for change in (False, False, True):
        if change:
            (machine.checkout / "csrc" / "op.cu").write_text("// changed")
        shutil.rmtree(machine.out, ignore_errors=True)
        assert machine.run("memcheck") == 0
        built.append("build" in machine.statuses())
    assert built == [True, False, True]
    (machine.checkout / "csrc" / "op.cu").write_text("// wrong")
    assert machine.run("memcheck", "ops", HOW="pip:fails") == 1
    nothing = "not run: nothing is built"
    assert machine.statuses() == {
        "build": "failed: exit status 3",
        "ops": nothing,
        "memcheck": nothing,
    }


def test_the_limit_of_a_command_is_that_of_its_last_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TOTAL", 1.5)
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    sleeps = gpu.Part(60, [["sleep", "60"]])
    known = {"build": gpu.Part(60, [["true"]]), "ops": sleeps, "steps": sleeps}
    begun = time.monotonic()
    assert gpu.run_parts(["ops", "steps"], tmp_path, known) == {
        "build": "ok",
        "ops": "failed: took too long",
        "steps": "not run: no time left",
    }
    assert time.monotonic() - begun < 10


def test_a_part_whose_last_command_did_not_run_is_not_ok(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda *_: time.sleep(0.3) or "ok")
    part = gpu.Part(0.2, [["the first"], ["the last"]])
    assert gpu.run_part("demo", part, tmp_path, time.monotonic() + 60) == "failed: took too long"


def test_the_plan_can_be_pasted_and_fits(machine):
    """Every command on a machine of its own, as if the one before had been given back."""
    commands = [line for line in gpu.plan().splitlines() if not line.startswith("#")]
    assert len(commands) == len(gpu.CALLS)
    known, names = gpu.parts(Path(), ""), []
    for command in commands:
        assert len(command) < 2000
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
        _, parts = command.split(" bash benchmarks/gpu.sh ")
        names.append(shlex.split(parts))
        seconds = sum(known[name].seconds for name in {"build", *names[-1]})
        assert seconds <= gpu.TOTAL < 600
        assert sum(name.endswith("check") and name != "synccheck" for name in names[-1]) <= 1
    flat = [name for parts in names for name in parts]
    assert sorted(flat) == sorted(ALL), "every part, once"
    assert gpu.START + sum(known[name].seconds for name in flat) <= gpu.LENT
    for parts, command in zip(names, commands):
        shutil.rmtree(machine.checkout / "build", ignore_errors=True)
        shutil.rmtree(machine.out, ignore_errors=True)
        process = machine.start(f"env {command}")
        output, _ = process.communicate(timeout=50)
        assert process.returncode == 0, output.decode()
        assert list(machine.statuses()) == list(dict.fromkeys(["build", *parts])), "in their order"
        check_what_comes_back(machine.out)


def test_options_of_the_parts_are_those_of_their_programs():
    for part in gpu.parts(Path("out"), "90").values():
        for command in part.commands:
            program = next((word for word in command if word.startswith("benchmarks/")), None)
            if program is None:
                continue
            text = (BENCHMARKS.parent / program).read_text()
            options = command[command.index(program) :]
            for option in (word for word in options if word.startswith("--")):
                assert f'"{option}"' in text, f"{program} has no {option}"


@pytest.mark.parametrize("parts", [[], ["ops", "opps"]])
def test_other_parts_are_an_error_that_says_which_there_are(machine, parts):
    assert machine.run(*parts) == 2
    assert "memcheck, racecheck" in machine.output
    assert ("unknown part 'opps'" in machine.output) == bool(parts)
    assert not machine.out.exists()


def test_tests_of_a_gpu_run_alone_and_leave_a_line_each(tmp_path):
    """As the part `test` runs them; here, without a GPU, they fail, and are not left out."""
    tests = [f"python_tests/ops/test_{name}.py" for name in ("commit_kv", "constants")]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    lines = tmp_path / "tests.jsonl"
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    run = subprocess.run(
        [*command, "-k", "no_caches or constants"],
        cwd=BENCHMARKS.parent,
        env=alone
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        | {"MSN_TEST_DEVICES": "cuda", "MSN_TEST_RESULTS": str(lines)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    (row,) = map(json.loads, lines.read_text().splitlines())
    assert "test_commit_of_no_caches_or_no_nodes_does_nothing[cuda]" in row["test"]
    assert row["outcome"] == "failed" and "there is no GPU" in row["error"]
