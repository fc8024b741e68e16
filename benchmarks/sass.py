"""Instructions of the CUDA kernels' loops, counted in the machine code; needs nvcc and nvdisasm
(`pip install nvidia-cuda-nvdisasm`), no GPU.

    python benchmarks/sass.py tree_attention_mma verify_logits          # sm_90a, this checkout
    python benchmarks/sass.py draft_tree --architecture 100 --least 4   # loops of 4 and more
    python benchmarks/sass.py tree_attention_mma --match 'bfloat16, 128' --against HEAD~20

One line a loop, inner ones indented under the loops around them: its instructions, those of loops
within it included, then how many of each kind. An instruction is counted where it stands, not how
often it runs: code after a branch that is hardly ever taken counts, too. `--against` compiles the
same files of another commit and puts its loops under the checkout's.
"""

import argparse
import collections
import functools
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from registers import CSRC, compiled, kernel_name

KINDS = {
    "tensor": r"[HIDBQ]G?MMA|[QO]MMA|UTC.*MMA|WARPGROUP",
    "matrix": r"LDSM|STSM|MOVM",
    "copy": r"LDGSTS|UBLKCP|UTMALDG|LDGDEPBAR|DEPBAR",
    "global": r"LDG?|STG?|RED[GU]?|ATOMG?|LDC",
    "shared": r"LDS|STS|ATOMS|SYNCS",
    "special": r"MUFU",
    "float": r"F(ADD|MUL|FMA|MNMX|SETP|SEL|SET)[23]?|[HD](ADD|MUL|FMA|MNMX|SETP)[2]?.*|I2F.*|F2.*",
    "shuffle": r"SHFL|VOTEU?|REDUX|MATCH",
    "barrier": r"BAR|B2R|R2B|MEMBAR|ERRBAR|CCTL|NANOSLEEP",
    "converge": r"WARPSYNC|BSSY|BSYNC|YIELD",
    "branch": r"BRA|BRX|EXIT|CALL|RET|JMP|BREAK",
}
"""Of instructions, by the part of the name before its first dot; what none fits is "integer"."""


@functools.cache
def kind(name: str) -> str:
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, name):
            return kind
    return "integer"


def disassembler() -> str:
    """The nvdisasm of the toolkit, or of its Python package."""
    packages = pathlib.Path(sysconfig.get_path("purelib"))
    places = [shutil.which("nvdisasm"), *packages.glob("nvidia/cu*/bin/nvdisasm")]
    places += packages.glob("triton/backends/nvidia/bin/nvdisasm")
    found = [place for place in places if place]
    if not found:
        raise SystemExit("no nvdisasm; expected CUDA's, or `pip install nvidia-cuda-nvdisasm`")
    return str(found[0])


def disassemble(source: pathlib.Path, include: pathlib.Path, architecture: str) -> str:
    """The machine code of a source file as text."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "out.cubin")
        compiled(source, include, architecture, "-cubin", "-o", str(cubin))
        run = subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"nvdisasm: {run.stderr}")
    return run.stdout


def kernels(text: str) -> dict[str, list[str]]:
    """Per kernel the lines of its code."""
    found = {}
    for part in re.split(r"(?=^\.text\.\w+:$)", text, flags=re.MULTILINE)[1:]:
        first, *lines = part.splitlines()
        found[kernel_name(first[len(".text.") : -1])] = lines
    return found


def parse(lines: list[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """The names of a kernel's instructions, in order, and its loops: first and last instruction,
    the outer ones first.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in lines:
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif code := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", line)
            if target and code[1] in ("BRA", "JMP"):
                jumps.append((len(names), target[1]))
            names.append(code[1])
    last: dict[int, int] = {}
    for at, label in jumps:
        first = labels[label]
        if first < at:  # several jumps back to one place are one loop
            last[first] = max(last.get(first, 0), at)
    return names, sorted(last.items(), key=lambda loop: (loop[0], -loop[1]))


def describe(lines: list[str], least: int) -> list[str]:
    """One line for the kernel, and one for each of its loops of `least` instructions or more."""
    names, loops = parse(lines)
    out = [f"  all: {count([name for name in names if name != 'NOP'])}"]  # which pads the end
    around: list[int] = []
    for first, last in loops:
        while around and around[-1] < first:
            around.pop()
        if last - first + 1 >= least:
            out.append(f"  {'  ' * len(around)}loop: {count(names[first : last + 1])}")
            around.append(last)
    return out


def count(names: list[str]) -> str:
    kinds = collections.Counter(map(kind, names))
    ordered = [f"{kinds[k]} {k}" for k in (*KINDS, "integer") if kinds[k]]
    return f"{len(names)} = {', '.join(ordered)}"


def sources_of(commit: str, folder: pathlib.Path) -> pathlib.Path:
    """csrc/ of another commit, written into a folder."""
    archive = subprocess.run(
        ["git", "archive", commit, "csrc"], cwd=CSRC.parent, capture_output=True
    )
    if archive.returncode:
        raise SystemExit(f"--against is {commit!r}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder / "csrc"


def report(csrc: pathlib.Path, name: str, options) -> dict[str, list[str]]:
    """Per kernel of a source file its lines; none where the commit lacks the file."""
    files = sorted(csrc.glob(f"cuda/*/{name}.cu"))
    if not files:
        return {}
    code = kernels(disassemble(files[0], csrc, options.architecture))
    return {k: describe(v, options.least) for k, v in code.items() if re.search(options.match, k)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in CSRC.glob("cuda/*/*.cu"))
    parser.add_argument("files", nargs="*", default=names, metavar="FILE")
    parser.add_argument("--architecture", default="90a", help="default: %(default)s")
    parser.add_argument("--match", default="", metavar="REGEX", help="of kernels' names")
    parser.add_argument("--least", type=int, default=16, help="instructions of a loop that counts")
    parser.add_argument("--against", metavar="COMMIT", help="count its code, too")
    parser.add_argument("--output", type=pathlib.Path, help="also write the lines to a file")
    options = parser.parse_args()
    if unknown := sorted(set(options.files) - set(names)):
        parser.error(f"FILE is {unknown[0]!r}; expected some of {', '.join(names)}")
    lines = [" ".join(["python benchmarks/sass.py", *map(shlex.quote, sys.argv[1:])])]
    with tempfile.TemporaryDirectory() as folder:
        other = sources_of(options.against, pathlib.Path(folder)) if options.against else None
        for name in options.files:
            now = report(CSRC, name, options)
            before = report(other, name, options) if other else {}
            for kernel in dict.fromkeys([*before, *now]):
                lines.append(f"{kernel}, sm_{options.architecture}")
                if other:
                    lines += [f"  {options.against}:", *before.get(kernel, ["  none"]), "  now:"]
                lines += now.get(kernel, ["  none"])
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
