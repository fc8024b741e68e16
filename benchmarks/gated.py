"""Time decoding with a gated noise adapter against the same model without it: the same text, fewer
passes, each of which takes longer.

    OMP_NUM_THREADS=2 python benchmarks/gated.py --adapter DIR --output gated.jsonl

Both decode the first turns of Spec-Bench by turns, after one that is not counted, which packs
weights. Tokens per second are those of whole calls, prompts included.
"""

import argparse
import pathlib
import sys

from common import Results, conditions, load_model
from races import race, sizes_of, table
from tails import turns
from tqdm import tqdm

from msn_ext.cli.common import positive_int
from msn_ext.decoding import BestFirst


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--adapter", required=True, help="a folder of msn train --gate")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--nodes", default="8,16,auto", help="of a tree (default: 8,16,auto)")
    parser.add_argument("--turns", type=positive_int, default=24, metavar="N")
    parser.add_argument("--new-tokens", type=positive_int, default=96, metavar="N")
    parser.add_argument("--output", type=pathlib.Path, help="append a line a turn and size to it")
    options = parser.parse_args(arguments)
    options.device = "cpu"

    from peft import PeftModel

    base, tokenizer = load_model(options)
    bare, _ = load_model(options)
    gated = PeftModel.from_pretrained(bare, options.adapter).to(base.dtype).eval()
    ways = {"base": (base, BestFirst), "gated": (gated, BestFirst)}
    results, rows = Results(options.output), []
    its = turns(tokenizer, options.turns)
    race(ways, its[0]["prompt"], 8, 4)
    for turn in tqdm(its, unit="turn"):
        for nodes in sizes_of(options.nodes):
            row = race(ways, turn["prompt"], nodes, options.new_tokens)
            results.save(conditions(base, "gated.py", arguments), row)
            rows.append(row)
    print(table(rows, list(ways)))


if __name__ == "__main__":
    main(sys.argv[1:])
