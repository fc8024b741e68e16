"""Decode with what a model usually says, as msn habits counted it, against decoding without: the
same text, fewer passes.

    OMP_NUM_THREADS=2 python benchmarks/habits.py --output habits.jsonl
    python benchmarks/habits.py --summary habits.jsonl --skip 24        # nothing is run

Both decode the first turns of Spec-Bench by turns, after one that is not counted, which packs
weights. Tokens per second are those of whole calls, prompts included. Drafters begin empty at every
turn.
"""

import sys

from common import conditions, load_model
from races import make_parser, run, summary, table

from msn_ext import Habits
from msn_ext.decoding import BestFirst
from msn_ext.demo import HABITS

WAYS = ["without", "habits"]


def ways_of(model, habits: Habits) -> dict:
    """Return the two ways to decode."""
    return dict(
        zip(WAYS, ((model, BestFirst), (model, lambda nodes: BestFirst(nodes, habits=habits))))
    )


def main(arguments: list[str]) -> None:
    parser = make_parser(__doc__, new_tokens=128)
    parser.add_argument("--habits", default=HABITS, help="of the model (default: the demo's)")
    options = parser.parse_args(arguments)
    if options.summary:
        print(summary(options.summary, WAYS, options.skip))
        return
    model, tokenizer = load_model(options)
    ways = ways_of(model, Habits.load(options.habits))
    rows = run(ways, tokenizer, options, conditions(model, "habits.py", arguments))
    print(table(rows, WAYS, options.skip))


if __name__ == "__main__":
    main(sys.argv[1:])
