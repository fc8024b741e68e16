"""Count the tokens a second of "auto" by step times that are given, in the place of a clock, so
that every run gives the same: with and without what later steps learn from a larger tree
(``msn_ext.decoding.sizing.LESSON``), beside trees of one size.

    python benchmarks/sizes.py --output sizes.jsonl

The curves are steps of SmolLM2-135M in bfloat16 on two cores, where memory is slow and where it is
fast, and of a device where rows cost next to nothing.
"""

import argparse
import pathlib
import sys
from unittest import mock

from common import Results, conditions, load_model
from tails import decode, turns
from tqdm import tqdm

from msn_ext.cli.common import positive_int
from msn_ext.decoding import BestFirst, sizing

CURVES = {  # milliseconds by nodes
    "slow memory": {1: 4.35, 2: 4.6, 4: 4.75, 6: 4.95, 8: 5.15, 12: 5.85, 16: 6.8, 64: 21.8},
    "fast memory": {1: 3.05, 2: 3.4, 4: 3.75, 6: 4.4, 8: 5.0, 12: 6.5, 16: 7.9, 64: 24.0},
    "rows nearly free": {1: 1.0, 8: 1.02, 16: 1.04, 32: 1.08, 64: 1.16, 128: 1.35},
}
FIXED = 4, 8, 64
AUTO, WITHOUT = "auto", "without lessons"


class Sized(BestFirst):
    """Keeps the nodes of every tree."""

    def __init__(self, budget: int | None, times: sizing.StepTimes):
        super().__init__(budget, times=times)
        self.nodes: list[int] = []

    def propose(self, history, lengths):
        draft = super().propose(history, lengths)
        self.nodes.append(len(draft))
        return draft


def measured(model, prompt: list[int], curve: str, way: str, new_tokens: int) -> dict:
    """Return the tokens of an answer, and the passes, nodes and milliseconds they took."""
    times = sizing.StepTimes(CURVES[curve], "cpu")
    drafter = Sized(None if way in (AUTO, WITHOUT) else int(way), times)
    with mock.patch.object(sizing, "LESSON", sizing.LESSON if way == AUTO else 0.0):
        text, _ = decode(model, prompt, drafter, new_tokens)
    return dict(
        curve=curve,
        way=way,
        tokens=len(text) - len(prompt),
        passes=len(drafter.nodes),
        nodes=sum(drafter.nodes),
        ms=sum(map(times, drafter.nodes)),
    )


def table(rows: list[dict]) -> str:
    lines = [f"{'steps':>18}{'sizes':>18}{'tokens/s':>10}{'tokens/pass':>13}{'nodes':>7}"]
    for curve, way in dict.fromkeys((row["curve"], row["way"]) for row in rows):
        its = [row for row in rows if (row["curve"], row["way"]) == (curve, way)]
        tokens, passes, nodes, ms = (
            sum(row[key] for row in its) for key in ("tokens", "passes", "nodes", "ms")
        )
        lines.append(
            f"{curve:>18}{way:>18}{1e3 * tokens / ms:>10.0f}{tokens / passes:>13.2f}"
            f"{nodes / passes:>7.1f}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=positive_int, default=48, metavar="N")
    parser.add_argument("--new-tokens", type=positive_int, default=128, metavar="N")
    parser.add_argument("--output", type=pathlib.Path, help="append a line a turn and way to it")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    model, tokenizer = load_model(options)
    results, rows = Results(options.output), []
    header = conditions(model, "sizes.py", arguments)
    ways = AUTO, WITHOUT, *map(str, FIXED)
    cases = [
        (turn["prompt"], curve, way)
        for curve in CURVES
        for turn in turns(tokenizer, options.turns)
        for way in ways
    ]
    for prompt, curve, way in tqdm(cases, unit="answer"):
        rows.append(measured(model, prompt, curve, way, options.new_tokens))
        results.save(header, rows[-1])
    print(table(sorted(rows, key=lambda row: ways.index(row["way"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
