"""Every op of msn_ext.ops against its eager PyTorch equivalent, with cold caches.

    python benchmarks/ops.py                         # the CPU or GPU that is there, under 5 minutes
    python benchmarks/ops.py --quick --ops verify_tree commit_kv --output out.jsonl

One sequence (B = 1), one layer for tree_attention, all layers for commit_kv. Before every repeat a
buffer of twice the last-level cache is overwritten, as a model's forward pass would do between two
steps; times are medians with quartiles. The equivalents are vectorised PyTorch, get whatever they
can prepare once per tree or step (attention mask, ancestor matrix, sliced prefix) for free, and
must agree with the op before anything is timed. "sdpa" is F.scaled_dot_product_attention with that
mask, with enable_gqa or repeat_interleave, whichever is faster (the column says which).

Bytes are what an op must move at least, each tensor once (the ``bytes`` of each case in op_cases);
GB/s is bytes / median; "of copy" is its share of the bandwidth of a large Tensor.copy_ measured in
the same run, where "least_seconds" says what a call that adds 1 to one number takes. On CUDA a call
is captured as a CUDA graph, so that no launch is waited for, and timed with CUDA events around its
replay. An equivalent that waits for the device cannot be captured and is timed as it is called:
"eager_captured" says so, and a star in the table. FlexAttention, compiled, with a block mask is
timed there for the largest contexts.

Cases run in a process of their own, one after the other (isolated.py). With --output, a line is
appended per case; what stands there already is not run again, "error" says what has no figures.
"""

import argparse
import datetime
import importlib.util
import platform
import statistics
import sys
from pathlib import Path

import torch
from common import Results
from isolated import Report, isolated, said
from machine import copy_bandwidth, cpu_name, git_commit, last_level_cache
from op_cases import CASES, CONTEXTS, MODELS, NODES, Case
from timing import Timer

import msn_ext

# ---- measuring -----------------------------------------------------------------------------------


KEYS = "op", "model", "size"  # of a case
INPUTS = "inputs"  # size of the case that an op is whose inputs cannot be made
LIMIT = 90.0  # seconds that a case may take


def times_or_error(timer: Timer, call, captured: bool) -> tuple[float | None, str | None]:
    """Return the median, or why there is none; out of memory, or a compiler's."""
    try:
        return statistics.median(timer(call, captured)), None
    except Exception as error:
        return None, said(error)


def measure(case: Case, timer: Timer, bandwidth: float) -> dict:
    if case.eager:
        case.check(case.run(), case.eager())
    lower, median, upper = statistics.quantiles(timer(case.run), n=4)
    captured = timer.device == "cuda"
    eager, others, errors = None, {}, {}
    if case.eager:
        eager, errors["eager"] = times_or_error(timer, case.eager, not case.waits)
    for name, call in case.others.items():
        try:
            case.check(case.run(), call())
            others[name], errors[name] = times_or_error(timer, call, True)
        except Exception as error:
            errors[name] = said(error)
    others = {name: seconds for name, seconds in others.items() if seconds}
    best = min(others, key=others.get, default=None)
    return {
        "bytes": case.bytes,
        "seconds": median,
        "seconds_quartiles": [lower, upper],
        "bytes_per_second": case.bytes / median,
        "share_of_copy": case.bytes / median / bandwidth,
        "captured": captured,
        "eager_seconds": eager,
        "eager_ratio": eager / median if eager else None,
        "eager_captured": captured and not case.waits if eager else None,
        "other": best,
        "other_seconds": others.get(best),
        "other_ratio": others[best] / median if best else None,
        "errors": {name: why for name, why in errors.items() if why},
    }


@torch.inference_mode()
def measure_all(report: Report, options: argparse.Namespace) -> None:
    """Report every case that is not done."""
    device = options.device
    nodes, contexts = ([1, 16, 69], [256, 1024]) if options.quick else (NODES, CONTEXTS[device])
    timer = Timer(device, repeats=9 if options.quick else 101)
    bandwidth = copy_bandwidth(device)
    nothing = torch.zeros(1, device=device)
    least = statistics.median(timer(lambda: nothing.add_(1)))
    report.about(environment(device, bandwidth, least))

    def report_case(case: dict, made: Case) -> None:
        if tuple(case.values()) in report.done:
            return
        report.begin(**case)
        try:
            row = measure(made, timer, bandwidth)
        except Exception as error:
            report.error(error, timer.spoilt)
            return
        report.row(dtype=str(model.dtype).removeprefix("torch."), **row)
        if row["errors"]:
            report.go_on(timer.spoilt)

    for model in MODELS[device]:
        for op in options.ops:
            inputs = {"op": op, "model": model.name, "size": INPUTS}
            if tuple(inputs.values()) in report.done:
                continue
            report.begin(**inputs)
            try:
                for made in CASES[op](model, nodes, contexts, device):
                    report_case(inputs | {"size": made.size}, made)
                    report.begin(**inputs)
            except Exception as error:
                report.error(error)


# ---- reporting -----------------------------------------------------------------------------------


def environment(device: str, bandwidth: float, least: float) -> dict:
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
        "least_seconds": least,
        "last_level_cache_bytes": last_level_cache(device),
    }


HEADER = (
    "op, model, size, µs, quartiles, KB, GB/s, of copy, eager µs, ×, other µs, ×, other"
).split(", ")


def table_row(row: dict) -> list[str]:
    waits = "*" if row["eager_captured"] is False and row["captured"] else ""
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
        f"{row['eager_seconds'] * 1e6:.1f}{waits}" if row["eager_seconds"] else "",
        f"{row['eager_ratio']:.2f}" if row["eager_ratio"] else "",
        *other,
    ]


def print_table(rows: list[dict]) -> None:
    cells = [HEADER, *(table_row(row) for row in rows if "error" not in row)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    text_columns = {0, 1, 2, 12}
    for line in cells:
        aligned = (
            c.ljust(w) if i in text_columns else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths))
        )
        print("  ".join(aligned).rstrip())
    for row in rows:
        errors = {"": row["error"]} if "error" in row else row["errors"]
        for name, why in errors.items():
            print(f"failed: {row['op']} {row['model']} {row['size']} {name}: {why}")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where msn_ext has its kernels"
    )
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES), metavar="OP")
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes and repeats, under a minute"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON lines: conditions, then a line per case; a picture beside it",
    )
    options = parser.parse_args()
    have_cuda = torch.cuda.is_available() and msn_ext.build_info()["cuda"]
    options.device = options.device or ("cuda" if have_cuda else "cpu")
    if options.device == "cuda" and not have_cuda:
        parser.error("--device cuda: no GPU, or msn_ext was built without CUDA")

    results = Results(options.output)
    about, rows = next(iter(results.lines), None), list(results.rows)
    done = {tuple(row[key] for key in KEYS): row for row in rows}
    for kind, content in isolated(measure_all, options, options.device, LIMIT, done):
        if kind == "begin":
            if content["size"] != INPUTS:
                progress(" ".join(content.values()))
        elif kind == "row":
            results.save(about, content)
            rows.append(content)
        elif about is None:
            about = content
    progress("")
    versions = f"torch {about['torch']}, msn_ext {about['msn_ext']['version']}"
    print(f"{about['device']}, {about['threads']} threads, {versions}")
    print(f"copy: {about['copy_bytes_per_second'] / 1e9:.1f} GB/s; commit {about['commit']}")
    print_table(rows)
    timed = [row for row in rows if "error" not in row]
    if options.output and timed and not importlib.util.find_spec("matplotlib"):
        print("no picture: matplotlib is not installed")
    elif options.output and timed:
        options.output.with_suffix(".svg").write_text(picture(about, timed), encoding="utf-8")
    return int(len(timed) < len(rows) or any(row["errors"] for row in timed))


def progress(text: str) -> None:
    """Where it stands, on one line of a terminal; elsewhere a line a case."""
    end = "" if sys.stderr.isatty() else "\n"
    print(f"\r{text}".ljust(71) + "\r" * (not text), end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
