"""Decode with what a model usually says, as msn habits counted it, against decoding without: the
same text, fewer passes.

    OMP_NUM_THREADS=2 python benchmarks/habits.py --output habits.jsonl

Both decode the first turns of Spec-Bench by turns, after one that is not counted, which packs
weights. Tokens per second are those of whole calls, prompts included. Drafters begin empty at every
turn.
"""

import argparse
import pathlib
import sys

from common import Results, conditions, load_model
from races import race, sizes_of, table
from tails import turns
from tqdm import tqdm

from msn_ext import Habits
from msn_ext.cli.common import positive_int
from msn_ext.decoding import BestFirst
from msn_ext.demo import HABITS


def ways_of(model, habits: Habits) -> dict:
    """Return the two ways to decode."""
    return {
        "without": (model, BestFirst),
        "habits": (model, lambda nodes: BestFirst(nodes, habits=habits)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--habits", default=HABITS, help="of the model (default: the demo's)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--nodes", default="8,16,auto", help="of a tree (default: 8,16,auto)")
    parser.add_argument("--turns", type=positive_int, default=24, metavar="N")
    parser.add_argument("--new-tokens", type=positive_int, default=128, metavar="N")
    parser.add_argument("--output", type=pathlib.Path, help="append a line a turn and size to it")
    options = parser.parse_args(arguments)
    options.device = "cpu"

    model, tokenizer = load_model(options)
    ways = ways_of(model, Habits.load(options.habits))
    results, rows = Results(options.output), []
    its = turns(tokenizer, options.turns)
    race(ways, its[0]["prompt"], 8, 4)
    for turn in tqdm(its, unit="turn"):
        for nodes in sizes_of(options.nodes):
            row = race(ways, turn["prompt"], nodes, options.new_tokens)
            row["category"] = turn["category"]
            results.save(conditions(model, "habits.py", arguments), row)
            rows.append(row)
    print(table(rows, list(ways)))


if __name__ == "__main__":
    main(sys.argv[1:])
