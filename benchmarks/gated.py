"""Time decoding with a gated noise adapter against the same model without it: the same text, fewer
passes, each of which takes longer.

    OMP_NUM_THREADS=2 python benchmarks/gated.py --adapter DIR --output gated.jsonl

Both decode the first turns of Spec-Bench by turns, after one that is not counted, which packs
weights. Tokens per second are those of whole calls, prompts included.
"""

import argparse
import pathlib
import sys
import time

from common import Results, conditions, load_model
from tails import decode, turns
from tqdm import tqdm

from msn_ext.cli.common import positive_int
from msn_ext.decoding import BestFirst

WAYS = ("base", "gated")


def race(models: dict, prompt: list[int], nodes: int | None, new_tokens: int) -> dict:
    """Return tokens, and passes and seconds by model.

    Raises:
        SystemExit: they have not said the same.
    """
    row: dict = {"nodes": nodes or "auto"}
    texts = []
    for name, model in models.items():
        start = time.perf_counter()
        text, accepts = decode(model, prompt, BestFirst(nodes), new_tokens)
        row[name] = {"passes": len(accepts), "seconds": time.perf_counter() - start}
        texts.append(text)
    if texts[0] != texts[1]:
        raise SystemExit("the adapter changed the text; the engine has to be the native one")
    return row | {"tokens": len(texts[0]) - len(prompt)}


def table(rows: list[dict]) -> str:
    lines = [f"{'nodes':>6}" + "".join(f"{way + ': tokens/s':>18}{'MAT':>7}" for way in WAYS)]
    for nodes in dict.fromkeys(row["nodes"] for row in rows):
        its = [row for row in rows if row["nodes"] == nodes]
        tokens, line = sum(row["tokens"] for row in its), f"{nodes!s:>6}"
        for way in WAYS:
            seconds, passes = (sum(row[way][of] for row in its) for of in ("seconds", "passes"))
            line += f"{tokens / seconds:>18.1f}{tokens / passes:>7.2f}"
        lines.append(line)
    return "\n".join(lines)


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
    models, results, rows = dict(zip(WAYS, (base, gated))), Results(options.output), []
    its = turns(tokenizer, options.turns)
    sizes = [None if size == "auto" else int(size) for size in options.nodes.split(",")]
    race(models, its[0]["prompt"], 8, 4)
    for turn in tqdm(its, unit="turn"):
        for nodes in sizes:
            row = race(models, turn["prompt"], nodes, options.new_tokens)
            results.save(conditions(base, "gated.py", arguments), row)
            rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
