"""What limits the native pass: bytes and multiply-adds a second by rows, against what the machine
reads from memory and multiplies in registers, measured in the same run.

    python benchmarks/native.py --output native.jsonl            # the demo model
    python benchmarks/native.py --shape 1b --weights bfloat16    # a larger one, random weights
    python benchmarks/native.py --contexts                       # a step's growth with the text
    python benchmarks/native.py --contexts --batch 8             # of eight texts at once
    python benchmarks/native.py --weights bfloat16,bfloat16-plain   # in 12 bits, and in 16
    python benchmarks/native.py --weights float32,float32-plain     # in 24 bits, and in 32

A pass is the whole of it, norms, attention to a short text and waiting for each other included, not
its linear layers alone. Rows take turns, and the fastest of several rounds counts, on both sides:
machines that are shared are slower at times, never faster.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Results, conditions, load_model
from cpu_shapes import SHAPES, random_llama
from machine import ReadBandwidth, cpu_name
from torch.nn.functional import scaled_dot_product_attention

from msn_ext.cli.common import positive_int
from msn_ext.decoding import DraftTree
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import PackedPlan

ROWS = 1, 2, 4, 6, 8, 12, 16, 24, 32, 64
WEIGHTS = "float32", "float32-plain", "bfloat16", "bfloat16-plain", "float16", "int8"
CONTEXTS = 32, 256, 1024, 4096, 8000
TEXT, ROUNDS = 16, 15


def peaks(threads: int) -> dict[str, float]:
    """Return the GMAC/s that the kernels of each kind of weights could reach."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        build = ["c++", "-O2", "-march=native", "-pthread", source, "-o", program]
        subprocess.run(build, check=True)
        out = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    floats, pairs, int16s = map(float, out.stdout.split())
    return dict(float32=floats, float16=floats, bfloat16=pairs or floats, int8=int16s or floats)


def a_pass(new: NativeForward, text: int, rows: int, batch: int = 1) -> float:
    """Return the seconds of a pass over a chain of so many tokens after each of some texts."""
    tree = DraftTree.chain(rows).tensors(torch.device("cpu"))
    positions = (text + torch.arange(rows)).repeat(batch, 1)
    tokens, at = torch.full_like(positions, 5), torch.full((batch,), text)
    none = torch.zeros_like(at)
    start = time.perf_counter()
    new.check(tokens, positions, at, none, tree.ancestors, text + rows)
    return time.perf_counter() - start


def by_rows(packed: PackedPlan, bandwidth: ReadBandwidth, peak: float) -> list[dict]:
    new = NativeForward(packed, 1)
    new.read(
        torch.zeros(1, TEXT, dtype=torch.int64), torch.arange(TEXT)[None], torch.tensor([0]), 1
    )
    seconds, read = {rows: float("inf") for rows in ROWS}, 0.0
    for _ in range(ROUNDS):
        read = max(read, bandwidth())
        a_pass(new, TEXT, 1)  # as a step's pass comes after another, not after all other memory
        for rows in ROWS:
            seconds[rows] = min(seconds[rows], a_pass(new, TEXT, rows))
    layers = packed.plan.layers
    macs = sum(
        linear.inputs * linear.outputs
        for linear in (
            packed.plan.head,
            *(part for layer in layers for part in (layer.qkv, layer.out, layer.up, layer.down)),
        )
    )
    return [
        dict(
            weights=packed.weights,
            isa=packed.isa,
            rows=rows,
            seconds=taken,
            over_one=taken / seconds[1],
            of_bandwidth=packed.nbytes / taken / read,
            of_peak=macs * rows / taken / 1e9 / peak,
            read=read,
            peak=peak,
        )
        for rows, taken in seconds.items()
    ]


def by_context(packed: PackedPlan, model, batch: int) -> list[dict]:
    """One node after texts of several lengths, and torch's attention alone at the same ones."""
    attention, layers = packed.plan.layers[0].attention, len(packed.plan.layers)
    new = NativeForward(packed, batch)
    new._reserve(CONTEXTS[-1] + 8)  # what is cached does not matter, only that numbers are there
    new._keys.normal_()
    new._values.normal_()
    found = []
    for text in CONTEXTS:
        shape = batch, attention.kv_heads, text + 1, attention.head_size
        caches = [torch.randn(2, *shape, dtype=model.dtype) for _ in range(layers)]
        query = torch.randn(batch, attention.heads, 1, attention.head_size, dtype=model.dtype)
        ours = torchs = float("inf")
        for _ in range(ROUNDS):
            ours = min(ours, a_pass(new, text, 1, batch))
            start = time.perf_counter()
            for keys, values in caches:
                scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            torchs = min(torchs, time.perf_counter() - start)
        of = dict(weights=packed.weights, batch=batch, context=text)
        found.append(of | dict(seconds=ours, sdpa=torchs))
    for row in found:
        row["growth"] = row["seconds"] - found[0]["seconds"]
        row["sdpa_growth"] = row["sdpa"] - found[0]["sdpa"]
    return found


def show(rows: list[dict], columns: dict[str, tuple[str, float]]) -> None:
    print("".join(f"{name:>14}" for name in columns))
    for row in rows:
        cells = (
            f"{row[key] * scale:14.2f}" if isinstance(row[key], float) else f"{row[key]:>14}"
            for key, scale in columns.values()
        )
        print("".join(cells), flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="of a model with random weights")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="several by commas")
    parser.add_argument("--contexts", action="store_true")
    parser.add_argument("--batch", type=positive_int, default=1, help="texts at once, by contexts")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.model, options.dtype, options.device = None, "float32", "cpu"
    model = random_llama(SHAPES[options.shape]) if options.shape else load_model(options)[0]
    threads = torch.get_num_threads()
    results, peak, bandwidth = Results(options.output), peaks(threads), ReadBandwidth(threads)
    header = conditions(model, "native.py", sys.argv[1:]) | dict(cpu=cpu_name())
    for name in options.weights.split(","):
        weights = name.removesuffix("-plain")
        packed = PackedPlan(plan_for(model), weights, codes=weights == name)
        if options.contexts:
            rows = by_context(packed, model.to(getattr(torch, weights)), options.batch)
            columns = dict(weights=("weights", 1), batch=("batch", 1), context=("context", 1))
            columns |= dict(ms=("seconds", 1e3))
            columns |= {"growth, ms": ("growth", 1e3), "SDPA's, ms": ("sdpa_growth", 1e3)}
        else:
            rows = by_rows(packed, bandwidth, peak[weights])
            columns = dict(weights=("weights", 1), rows=("rows", 1), ms=("seconds", 1e3))
            columns |= {"over one": ("over_one", 1), "% of read": ("of_bandwidth", 100)}
            columns |= {"% of peak": ("of_peak", 100)}
            print(f"\n{packed.isa}: reads {rows[0]['read'] / 1e9:.1f} GB/s, {peak[weights]} GMAC/s")
        rows = [row | dict(weights=name) for row in rows]
        for row in rows:
            results.save(header, row)
        show(rows, columns)


if __name__ == "__main__":
    main()
