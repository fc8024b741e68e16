"""Two ways to decode that say the same, by turns: tokens per forward pass and per second. For
gated.py and habits.py.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable

from common import CATEGORIES, Results, fewer_passes
from tails import decode, turns
from tqdm import tqdm

from msn_ext.cli.common import positive_int
from msn_ext.decoding import Drafter

Way = tuple[object, Callable[[int | None], Drafter]]
"""A model, and what drafts trees of so many nodes; None: of sizes of its own choice."""


def make_parser(description: str | None, new_tokens: int) -> argparse.ArgumentParser:
    """Return a parser of what every race takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a folder or a hub id (default: the demo model)")
    add("--dtype", default="bfloat16")
    add("--nodes", default="8,16,auto", help="of a tree (default: 8,16,auto)")
    add("--turns", type=positive_int, default=24, metavar="N")
    add("--new-tokens", type=positive_int, default=new_tokens, metavar="N")
    add("--output", type=pathlib.Path, help="append a line a turn and size to it")
    add("--summary", type=pathlib.Path, help="print the table of such a file and stop")
    add("--skip", type=int, default=0, metavar="N", help="turns that the table leaves out")
    parser.set_defaults(device="cpu")
    return parser


def run(ways: dict[str, Way], tokenizer, options, header: dict) -> list[dict]:
    """Race over the first turns of Spec-Bench, after one that is not counted, and return the rows.

    Args:
        ways: the two, in the order in which they decode.
        options: as :func:`make_parser` has them.
        header: the conditions.
    """
    results, rows = Results(options.output), []
    its = turns(tokenizer, options.turns)
    race(ways, its[0]["prompt"], 8, 4)
    for turn in tqdm(its, unit="turn"):
        for nodes in sizes_of(options.nodes):
            row = race(ways, turn["prompt"], nodes, options.new_tokens)
            rows.append(row | {"category": turn["category"]})
            results.save(header, rows[-1])
    return rows


def summary(path: pathlib.Path, ways: list[str], skip: int) -> str:
    """Return the table of a file's rows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "nodes" in row]
    return f"{table(rows, ways, skip)}\n\n{by_category(rows, ways)}"


def race(ways: dict[str, Way], prompt: list[int], nodes: int | None, new_tokens: int) -> dict:
    """Return the tokens of an answer, and by way its passes and the seconds of the whole call.

    Raises:
        SystemExit: they have not said the same.
    """
    row: dict = {"nodes": nodes or "auto"}
    texts = []
    for name, (model, drafter) in ways.items():
        start = time.perf_counter()
        text, accepts = decode(model, prompt, drafter(nodes), new_tokens)
        row[name] = {"passes": len(accepts), "seconds": time.perf_counter() - start}
        texts.append(text)
    if any(text != texts[0] for text in texts):
        raise SystemExit(f"{', '.join(ways)} differ; the engine has to be the native one")
    return row | {"tokens": len(texts[0]) - len(prompt)}


def table(rows: list[dict], ways: list[str], skip: int = 0) -> str:
    """Return a line a size: tokens per second and MAT of each way, and the MAT of the last over
    that of the first, with 95 % of resampled turns.

    Args:
        skip: turns that are left out.
    """
    lines = [f"{'nodes':>6}" + "".join(f"{way + ': tokens/s':>18}{'MAT':>7}" for way in ways)]
    for nodes in dict.fromkeys(row["nodes"] for row in rows):
        its = [row for row in rows if row["nodes"] == nodes][skip:]
        tokens, line = sum(row["tokens"] for row in its), f"{nodes!s:>6}"
        for way in ways:
            seconds, passes = (sum(row[way][of] for row in its) for of in ("seconds", "passes"))
            line += f"{tokens / seconds:>18.1f}{tokens / passes:>7.2f}"
        pairs = [(row[ways[-1]]["passes"], row[ways[0]]["passes"]) for row in its]
        low, middle, high = fewer_passes(pairs)
        line += f"   × {middle:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(line)
    return "\n".join(lines)


def by_category(rows: list[dict], ways: list[str]) -> str:
    """Return the MAT of each way in every category, a line a size and way; of all turns."""
    lines = [f"{'nodes':>6}{'':>9}" + "".join(f"{name[:13]:>15}" for name in (*CATEGORIES, "all"))]
    for nodes in dict.fromkeys(row["nodes"] for row in rows):
        for way in ways:
            line = f"{nodes!s:>6}{way:>9}"
            for category in (*CATEGORIES, None):
                its = [row for row in rows if row["nodes"] == nodes]
                its = [row for row in its if category in (None, row.get("category"))]
                passes = sum(row[way]["passes"] for row in its)
                mat = sum(row["tokens"] for row in its) / passes if passes else float("nan")
                line += f"{mat:>15.2f}"
            lines.append(line)
    return "\n".join(lines)


def sizes_of(text: str) -> list[int | None]:
    """Return the sizes that ``--nodes`` names, by commas; None: "auto"."""
    return [None if size == "auto" else int(size) for size in text.split(",")]
