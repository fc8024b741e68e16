"""Time greedy decoding with a screened head against the same with all logits: the same text in as
many passes, each of which reads less (docs/native.md, "Without most of the head").

    python benchmarks/screen.py --output screen.jsonl

Both decode the first turns of Spec-Bench by turns, after one that is not counted, which packs
weights. Milliseconds a token are those of whole calls, prompts included.
"""

import argparse
import pathlib
import sys
import time
from unittest import mock

from common import Results, conditions, load_model
from tails import decode, turns
from tqdm import tqdm

from msn_ext.cli.common import positive_int
from msn_ext.decoding import BestFirst
from msn_ext.decoding.engine import native_plan_for
from msn_ext.decoding.forward import packed

WAYS = ("all", "screened")


def packed_both_ways(load) -> dict:
    """Return models whose weights are packed, without a screen and with one."""
    models = {way: load() for way in WAYS}
    with mock.patch.object(packed, "SCREENED", float("inf")):
        plan = native_plan_for(models["all"], "native")
    assert plan.screen is None
    if native_plan_for(models["screened"], "native").screen is None:
        raise SystemExit("the head is not screened: of this model, dtype or CPU")
    return models


def race(models: dict, prompt: list[int], nodes: int, new_tokens: int) -> dict:
    """Return tokens, and seconds by way.

    Raises:
        SystemExit: they have not said the same.
    """
    row: dict = {"nodes": nodes}
    texts = []
    for way, model in models.items():
        start = time.perf_counter()
        text, _ = decode(model, prompt, BestFirst(nodes) if nodes > 1 else "none", new_tokens)
        row[way] = time.perf_counter() - start
        texts.append(text)
    if texts[0] != texts[1]:
        raise SystemExit("the texts differ")
    return row | {"tokens": len(texts[0]) - len(prompt)}


def table(rows: list[dict]) -> str:
    lines = [f"{'nodes':>6}" + "".join(f"{way + ', ms/token':>20}" for way in WAYS) + "   ratio"]
    for nodes in dict.fromkeys(row["nodes"] for row in rows):
        its = [row for row in rows if row["nodes"] == nodes]
        tokens, seconds = sum(row["tokens"] for row in its), [sum(r[w] for r in its) for w in WAYS]
        cells = "".join(f"{1e3 * taken / tokens:>20.2f}" for taken in seconds)
        lines.append(f"{nodes:>6}{cells}{seconds[0] / seconds[1]:>8.3f}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--nodes", default="1,8", help="of a tree; 1: no drafts (default: 1,8)")
    parser.add_argument("--turns", type=positive_int, default=24, metavar="N")
    parser.add_argument("--new-tokens", type=positive_int, default=96, metavar="N")
    parser.add_argument("--output", type=pathlib.Path, help="append a line a turn and size to it")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    models = packed_both_ways(lambda: load_model(options)[0])
    its = turns(load_model(options)[1], options.turns)
    rows: list[dict] = []
    results = Results(options.output)
    race(models, its[0]["prompt"], 8, 8)
    header = conditions(models["all"], "screen.py", arguments)
    for turn in tqdm(its, unit="turn"):
        for nodes in map(int, options.nodes.split(",")):
            rows.append(race(models, turn["prompt"], nodes, options.new_tokens))
            results.save(header, rows[-1])
            models = dict(reversed(models.items()))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
