"""Registers, spills and static shared memory of every CUDA kernel, as ptxas reports them; needs
nvcc, no GPU.

    python benchmarks/registers.py                           # sm_80, sm_90a and sm_100
    python benchmarks/registers.py --architectures 90a --output registers.txt

One line a kernel and template: registers per architecture. The exit status is 1 if any spills; an
error if ptxas has to put products of warp groups in order.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

CSRC = pathlib.Path(__file__).resolve().parent.parent / "csrc"
NVCC = os.environ.get("CUDACXX", "nvcc")
UNFUSED = {"draft_tree"}  # as in CMakeLists.txt
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used"
    r" (\d+) registers(?:.*?(\d+) bytes smem)?"
)


def kernel_name(mangled: str) -> str:
    """What a person would call an instance: its name and template arguments."""
    demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    found = re.search(
        r"(\w+_kernel)(<.*?>)?\(",
        demangled.replace("msn::", "").replace("(anonymous namespace)::", ""),
    )
    return re.sub(r"\((?:int|bool)\)", "", found[1] + (found[2] or "")) if found else mangled


def compiled(source: pathlib.Path, csrc: pathlib.Path, architecture: str, *options: str) -> str:
    """Compile a CUDA source for sm_ARCHITECTURE, as CMakeLists.txt does; return what nvcc says."""
    flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", f"-I{csrc}"]
    flags += ["-fmad=false"] if source.stem in UNFUSED else []
    run = subprocess.run([NVCC, *flags, *options, source], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{source.name}: {run.stderr}")
    return run.stderr


def report(source: pathlib.Path, architecture: str) -> dict[str, tuple[int, int, int]]:
    """Per kernel: registers, bytes spilled, bytes of static shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        options = "-Xptxas=-v", "-c", "-o", str(pathlib.Path(folder, "out.o"))
        said = compiled(source, CSRC, architecture, *options)
    if "instructions are serialized" in said:  # C7510 and its kind
        raise SystemExit(f"{source.name}, sm_{architecture}: {said}")
    found = {}
    # ptxas says several lines a kernel; the next one begins where the name does.
    for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", said):
        if entry := ENTRY.search(part.replace("\n", " ")):
            name, stores, loads, registers, shared = entry.groups()
            found[kernel_name(name)] = int(registers), int(stores) + int(loads), int(shared or 0)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", default="80,90a,100", help="comma-separated")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to a file")
    options = parser.parse_args()
    architectures = options.architectures.split(",")
    sources = sorted(CSRC.glob("cuda/*/*.cu"), key=lambda path: path.name)
    with ThreadPoolExecutor(os.cpu_count()) as jobs:
        tasks = {(s, a): jobs.submit(report, s, a) for s in sources for a in architectures}
    lines = [
        f"{'kernel':<52}"
        + "".join(f"{'sm_' + a:>8}" for a in architectures)
        + f"{'shared':>9}{'spilled':>9}"
    ]
    spilled = 0
    for source in sources:
        reports = [tasks[source, a].result() for a in architectures]
        for name in reports[0]:
            registers, spills, shared = zip(*(found[name] for found in reports))
            spilled += sum(spills)
            lines.append(
                f"{name:<52}"
                + "".join(f"{r:>8}" for r in registers)
                + f"{max(shared):>9}{max(spills):>9}"
            )
    version = (
        subprocess.run([NVCC, "--version"], capture_output=True, text=True)
        .stdout.split("release ")[-1]
        .split(",")[0]
    )
    lines.append(
        f"registers by architecture; static shared memory and spills in bytes; CUDA {version}"
    )
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
