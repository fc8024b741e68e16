"""Every op of msn_ext.ops against its eager PyTorch equivalent, with cold caches.

    python benchmarks/ops.py                         # the CPU or GPU that is there, under 5 minutes
    python benchmarks/ops.py --quick --ops verify_tree commit_kv --json out.json

One sequence (B = 1), one layer for tree_attention, all layers for commit_kv. Before every repeat a
buffer of twice the last-level cache is overwritten, as a model's forward pass would do between two
steps; times are medians with quartiles. The equivalents are vectorised PyTorch, get whatever they
can prepare once per tree or step (attention mask, ancestor matrix, sliced prefix) for free, and
must agree with the op before anything is timed. "sdpa" is F.scaled_dot_product_attention with that
mask, with enable_gqa or repeat_interleave, whichever is faster (the column says which).

Bytes are what an op must move at least, each tensor once (the ``bytes`` of each case in op_cases);
GB/s is bytes / median; "of copy" is its share of the bandwidth of a large Tensor.copy_ measured in
the same run. On CUDA a call is captured as a CUDA graph, so that no launch is waited for, and timed
with CUDA events around its replay (what cannot be captured is timed as it is called);
FlexAttention, compiled, with a block mask is timed there for the largest contexts.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
from pathlib import Path

import torch
from machine import copy_bandwidth, cpu_name, git_commit, last_level_cache
from op_cases import CASES, CONTEXTS, MODELS, NODES, Case, Model
from timing import Timer

import msn_ext

# ---- measuring -----------------------------------------------------------------------------------


def measure(op: str, model: Model, case: Case, timer: Timer, bandwidth: float) -> dict:
    for equivalent in filter(None, (case.eager, *case.others.values())):
        case.check(case.run(), equivalent())
    times = timer(case.run)
    lower, median, upper = statistics.quantiles(times, n=4)
    eager = statistics.median(timer(case.eager)) if case.eager else None
    others = {name: statistics.median(timer(call)) for name, call in case.others.items()}
    best = min(others, key=others.get, default=None)
    return {
        "op": op,
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "size": case.size,
        "seconds": median,
        "seconds_quartiles": [lower, upper],
        "bytes": case.bytes,
        "bytes_per_second": case.bytes / median,
        "share_of_copy": case.bytes / median / bandwidth,
        "eager_seconds": eager,
        "eager_ratio": eager / median if eager else None,
        "other": best,
        "other_seconds": others.get(best),
        "other_ratio": others[best] / median if best else None,
    }


# ---- reporting -----------------------------------------------------------------------------------


def environment(device: str, bandwidth: float) -> dict:
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "msn_ext": msn_ext.build_info(),
        "copy_bytes_per_second": bandwidth,
        "last_level_cache_bytes": last_level_cache(device),
    }


HEADER = (
    "op, model, size, µs, quartiles, KB, GB/s, of copy, eager µs, ×, other µs, ×, other"
).split(", ")


def table_row(row: dict) -> list[str]:
    lower, upper = row["seconds_quartiles"]
    other = [""] * 3
    if row["other"]:
        other = [f"{row['other_seconds'] * 1e6:.1f}", f"{row['other_ratio']:.2f}", row["other"]]
    return [
        row["op"],
        row["model"],
        row["size"],
        f"{row['seconds'] * 1e6:.1f}",
        f"{lower * 1e6:.1f}-{upper * 1e6:.1f}",
        f"{row['bytes'] / 1e3:.1f}",
        f"{row['bytes_per_second'] / 1e9:.2f}",
        f"{row['share_of_copy']:.0%}",
        f"{row['eager_seconds'] * 1e6:.1f}" if row["eager_seconds"] else "",
        f"{row['eager_ratio']:.2f}" if row["eager_ratio"] else "",
        *other,
    ]


def print_table(rows: list[dict]) -> None:
    cells = [HEADER, *map(table_row, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    text_columns = {0, 1, 2, 12}
    for line in cells:
        aligned = (
            c.ljust(w) if i in text_columns else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths))
        )
        print("  ".join(aligned).rstrip())


def picture(about: dict, rows: list[dict]) -> str:
    """Every case's time, next to what its bytes would take to be copied, and to its equivalents."""
    from plot import times  # takes matplotlib, which the rest does without

    lines = []
    for row in rows:
        copied = row["bytes"] / about["copy_bytes_per_second"]
        # Less is no time that a call could take.
        taken = {"a copy": copied} if copied > 1e-6 else {}
        taken |= {"msn_ext": row["seconds"]}
        taken |= {"eager PyTorch": row["eager_seconds"]} if row["eager_seconds"] else {}
        taken |= {row["other"].split()[0]: row["other_seconds"]} if row["other"] else {}
        lines.append((f"{row['op']} {row['size']}, {row['model']}", taken))
    return times(f"Seconds of a call, cold caches; {about['device']}", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where msn_ext has its kernels"
    )
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES), metavar="OP")
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and repeats, under a minute"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write everything to FILE, and a picture beside it",
    )
    options = parser.parse_args()
    have_cuda = torch.cuda.is_available() and msn_ext.build_info()["cuda"]
    device = options.device or ("cuda" if have_cuda else "cpu")
    if device == "cuda" and not have_cuda:
        parser.error("--device cuda: no GPU, or msn_ext was built without CUDA")

    nodes, contexts = ([1, 16, 69], [256, 1024]) if options.quick else (NODES, CONTEXTS[device])
    timer = Timer(device, repeats=9 if options.quick else 101)
    bandwidth = copy_bandwidth(timer.device)
    about = environment(device, bandwidth)
    versions = f"torch {about['torch']}, msn_ext {about['msn_ext']['version']}"
    print(f"{about['device']}, {about['threads']} threads, {versions}")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s; commit {about['commit']}")
    rows = []
    for model in MODELS[device]:
        for op in options.ops:
            for case in CASES[op](model, nodes, contexts, device):
                print(
                    f"\r{op} {model.name} {case.size}".ljust(70),
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
                with torch.inference_mode():
                    rows.append(measure(op, model, case, timer, bandwidth))
    print("\r".ljust(71), end="\r", file=sys.stderr, flush=True)
    print_table(rows)
    if options.json:
        options.json.write_text(
            json.dumps({"environment": about, "results": rows}, indent=1) + "\n"
        )
        options.json.with_suffix(".svg").write_text(picture(about, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
