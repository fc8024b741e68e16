"""Build, test, sanitize and time msn_ext on a machine with a GPU, from a bare checkout, offline.

    benchmarks/gpu.sh ops memcheck          these parts, which build first what is not built
    benchmarks/gpu.sh plan                  commands for a machine that is lent for half an hour
    benchmarks/gpu.sh pieces                cuts the demo model for it: build/gpu/pieces
    OUT=/tmp/results benchmarks/gpu.sh ops  results there; default: benchmarks/results/<GPU's name>
    PYTHON=python3.12 benchmarks/gpu.sh ops default: python3

The machine may be lent for a while, a command at a time: killed after ten minutes, with few files
given back. So every part has a limit (SCALE=0.5 halves them), and all of a command TOTAL seconds; a
part that fails or takes too long costs none of the others; and results are appended as they come,
to at most eight files:

    parts.jsonl    the machine, then every part: begun, ended, how
    log.txt        what the parts printed
    tests.jsonl    test: a line a test            ops.jsonl, ops.svg   ops: a line a case
    steps.jsonl    steps, transformers, batches   decode.jsonl, decode-float32.jsonl   demo

Results that are in OUT already stay, and are not measured again. The exit status is 1 if a part
failed.

Needs nvcc, compute-sanitizer, cmake, ninja, and in that Python: torch with CUDA, transformers,
pybind11, scikit-build-core, pytest, hypothesis, pytest-xdist; for `demo` accelerate and the pieces.
The package is installed into build/gpu/site, never into the environment.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu"
SITE, PIECES, DEMO = WORK / "site", WORK / "pieces", WORK / "demo"
TOTAL = 560.0  # seconds of a command
START = 120.0  # seconds until a machine that is lent answers
LENT = 1800.0  # seconds that it is lent
SCALE = float(os.environ.get("SCALE", "1"))
MOST_LOGGED = 1 << 20  # bytes of a part's output, and TAIL more of its end
TAIL = 1 << 16
PYTHON = os.environ.get("PYTHON", sys.executable)


@dataclasses.dataclass
class Part:
    """One thing to do: commands, the next one if the one before succeeded."""

    seconds: float
    commands: list[list[str]]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def parts(out: Path, architecture: str) -> dict[str, Part]:
    def benchmark(name: str, *options: object) -> list[str]:
        return [PYTHON, f"benchmarks/{name}.py", *map(str, options)]

    def sanitizer(tool: str, seconds: float) -> Part:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        # Without torch's caching allocator every tensor is an allocation of its own, whose bounds
        # are checked.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(seconds, [[*command, *benchmark("sanitize_ops")]], alone)

    def steps(seconds: float, *options: object) -> Part:
        """Of an 8-billion model, weights drawn at random."""
        shape = "--shape", "llama-3-8b", "--device", "cuda", "--dtype", "bfloat16"
        return Part(
            seconds, [benchmark("steps", *shape, *options, "--output", out / "steps.jsonl")]
        )

    def decode(dtype: str, prompts: int, file: str) -> list[str]:
        data = "--data", DEMO / "questions.jsonl", "--prompts", prompts
        drafts = "--drafts", "auto,paper,none", "--device", "cuda", "--dtype", dtype
        return benchmark("decode", *data, *drafts, "--output", out / file)

    # -P here and below: the checkout's own msn_ext, which has no compiled part, must not shadow the
    # built one.
    install = f"""pip install . --no-build-isolation --no-deps --no-index --upgrade
        --target {SITE} --config-settings build-dir={WORK / "cmake"}"""
    look = """import msn_ext; print(msn_ext.build_info())
assert msn_ext.build_info()["cuda"], "built without CUDA" """
    tests = "python_tests/ops python_tests/decoding --ignore=python_tests/ops/test_sanitizers.py"
    side_by_side = "-n 8 --dist worksteal" if importlib.util.find_spec("xdist") else ""
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that hangs ends one process
        side_by_side += " --timeout 100 --timeout-method thread"
    return {
        "build": Part(
            150,
            [[PYTHON, "-m", *install.split()], [PYTHON, "-P", "-c", look]],
            {"MSN_CUDA": "on", "MSN_CUDA_ARCHITECTURES": architecture},
        ),
        "test": Part(
            180,
            [[PYTHON, "-P", "-m", "pytest", "-q", *side_by_side.split(), *tests.split()]],
            {"MSN_TEST_DEVICES": "cuda", "MSN_TEST_RESULTS": str(out / "tests.jsonl")},
        ),
        "ops": Part(170, [benchmark("ops", "--device", "cuda", "--output", out / "ops.jsonl")]),
        "memcheck": sanitizer("memcheck", 220),
        "racecheck": sanitizer("racecheck", 220),
        "initcheck": sanitizer("initcheck", 120),
        "synccheck": sanitizer("synccheck", 80),
        "steps": steps(
            110, "--who", "ours", "--context", 2048, "--nodes", "1,64", "--engine", "torch,native"
        ),
        "transformers": steps(170, "--who", "transformers", "--context", 2048),
        "batches": steps(
            130, "--who", "ours", "--context", 512, "--nodes", "1,16", "--batch", "1,2,4,8,16,32"
        ),
        "demo": Part(
            130,
            [
                benchmark("pieces", "join", PIECES, DEMO),
                decode("bfloat16", 12, "decode.jsonl"),
                decode("float32", 6, "decode-float32.jsonl"),
            ],
            {"PYTHONPATH": python_path(SITE, DEMO), "MSN_CACHE": str(WORK / "cache")},
        ),
    }


def python_path(*first: Path) -> str:
    return os.pathsep.join(filter(None, [*map(str, first), os.environ.get("PYTHONPATH")]))


# ---- commands, ready to paste --------------------------------------------------------------------

# Parts, the most valuable first, and a piece of the demo model to bring along.
CALLS = [
    (["build", "test", "ops"], 1),
    (["demo", "steps", "transformers"], 2),
    (["memcheck"], None),
    (["racecheck"], None),
    (["initcheck", "synccheck", "batches"], None),
]


def plan() -> str:
    """Return the commands for a machine that is lent for half an hour, each after a comment."""
    known = parts(Path(), "")
    lines = [
        "# First `benchmarks/gpu.sh pieces` here. Then, on the machine, one command after the other"
        " without a pause: what",
        "# was built and the first piece stay only while the machine does. A part builds first"
        f" ({known['build'].seconds:.0f} s at most)",
        "# where nothing is built. If `demo` says that piece 1 is missing: bring it along with the"
        " command `true`, then",
        "# repeat the second command.",
    ]
    for number, (names, piece) in enumerate(CALLS, 1):
        seconds = sum(known[name].seconds for name in names)
        bring = f"; bring {(PIECES / str(piece)).relative_to(ROOT)} along" if piece else ""
        lines.append(f"# {number}. {seconds:.0f} s at most{bring}")
        lines.append(f'MSN_COMMIT={commit()} OUT="$OUT" bash benchmarks/gpu.sh {" ".join(names)}')
    return "\n".join(lines)


# ---- what there is -------------------------------------------------------------------------------


def said(*command: str) -> str | None:
    """Return what a command prints; None: it is not there, fails or hangs."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def gpu(field: str) -> str:
    return said("nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader") or ""


def commit() -> str:
    found = said("git", "describe", "--always", "--dirty", "--abbrev=12")
    return found or os.environ.get("MSN_COMMIT", "unknown")


def version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)


def facts(arguments: list[str]) -> dict:
    compiler = re.search(r"release ([\d.]+)", said("nvcc", "--version") or "")
    return {
        "command": " ".join(["benchmarks/gpu.sh", *arguments]),
        "date": now(),
        "commit": commit(),
        "gpu": gpu("name"),
        "driver": gpu("driver_version"),
        "cuda": compiler and compiler[1],
        "python": sys.version.split()[0],
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def sources() -> str:
    """Return a hash of all that the package is built from."""
    files = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    files += sorted(p for f in ("csrc", "msn_ext") for p in (ROOT / f).rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        if file.suffix not in (".pyc", ".so"):
            total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return total.hexdigest()


# ---- running parts -------------------------------------------------------------------------------


class Log:
    """A file that a part's output is appended to as it comes: the beginning and the end, where it
    is long.
    """

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._left, self._tail = MOST_LOGGED, b""

    def write(self, text: bytes) -> None:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        self._file.write(text[: self._left])
        self._tail = (self._tail + text[self._left :])[-TAIL:]
        self._left = max(0, self._left - len(text))

    def close(self) -> None:
        if self._tail:
            self._file.write(b"\n... what is left out here ...\n" + self._tail)
        self._file.close()


def run(command: list[str], environment: dict[str, str], log: Log, deadline: float) -> str:
    """Run a command until the deadline; return "ok" or what went wrong."""
    log.write(f"$ {shlex.join(command)}\n".encode())
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    except OSError as error:
        return f"failed: {error}"
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    try:
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(min(left, 1.0)):
                text = os.read(process.stdout.fileno(), 1 << 16)
                if not text:
                    break  # all that write to it have ended
                log.write(text)
            elif process.poll() is not None:
                break  # something that it started goes on
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        status = process.poll()
    finally:
        end(process)
    if status is None:
        return "failed: took too long"
    return "ok" if status == 0 else f"failed: exit status {status}"


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience * SCALE)


def run_part(name: str, part: Part, out: Path, deadline: float) -> str:
    """Run a part until its limit or the deadline, and write down how it went."""
    begun = time.monotonic()
    deadline = min(begun + part.seconds * SCALE, deadline)
    note(out, {"part": name, "begun": now()})
    log = Log(out / "log.txt")
    log.write(f"\n==== {name}\n".encode())
    status = "not run: no time left"
    for command in part.commands:
        if time.monotonic() >= deadline:
            status = "failed: took too long" if status == "ok" else status
            break
        status = run(command, part.environment, log, deadline)
        if status != "ok":
            break
    seconds = round(time.monotonic() - begun, 1)
    log.write(f"==== {name}: {status}, {seconds} s\n".encode())
    log.close()
    note(out, {"part": name, "status": status, "seconds": seconds})
    return status


def note(out: Path, line: dict) -> None:
    with (out / "parts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def run_parts(names: list[str], out: Path, known: dict[str, Part]) -> dict[str, str]:
    """Run the parts, and before them `build` if what is built is not of these sources."""
    deadline = time.monotonic() + TOTAL * SCALE
    built, wanted = WORK / "built", sources()
    if "build" in names or not built.is_file() or built.read_text() != wanted:
        names = ["build", *names]
    statuses: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if statuses.get("build", "ok") != "ok":
            statuses[name] = "not run: nothing is built"
            note(out, {"part": name, "status": statuses[name]})
            continue
        if name == "build":
            built.unlink(missing_ok=True)
            shutil.rmtree(SITE, ignore_errors=True)
        statuses[name] = run_part(name, known[name], out, deadline)
        if name == "build" and statuses[name] == "ok":
            built.write_text(wanted)
    return statuses


def main(arguments: list[str]) -> int:
    if arguments == ["plan"]:
        print(plan())
        return 0
    if arguments == ["pieces"]:
        return subprocess.call([PYTHON, "benchmarks/pieces.py", "cut", str(PIECES)], cwd=ROOT)
    known = parts(Path(), "")
    if not arguments or set(arguments) - set(known):
        print(f"{__doc__}\nParts: {', '.join(known)}; or alone: plan, pieces", file=sys.stderr)
        for name in set(arguments) - set(known):
            print(f"gpu.sh: unknown part {name!r}", file=sys.stderr)
        return 2
    if shutil.which("nvidia-smi") is None:
        print("gpu.sh: no nvidia-smi: this machine has no NVIDIA driver", file=sys.stderr)
        return 2
    name = re.sub("[^a-z0-9]+", "-", gpu("name").lower()).strip("-")
    out = Path(os.environ.get("OUT") or f"benchmarks/results/{name}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    note(out, facts(arguments))
    architecture = gpu("compute_cap").replace(".", "")  # 9.0 -> 90
    if architecture == "90":
        architecture = "90a-real"  # wgmma, which only that has
    known = parts(out, architecture)
    os.environ["PYTHONPATH"] = python_path(SITE)
    os.environ["PYTHONUNBUFFERED"] = "1"
    statuses = run_parts(arguments, out, known)
    print(f"\n{gpu('name')}; results in {out}")
    for part, status in statuses.items():
        print(f"{part:<13} {status}")
    return int(any(status != "ok" for status in statuses.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
