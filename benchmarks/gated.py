"""Time decoding with a gated noise adapter against the same model without it: the same text, fewer
passes, each of which takes longer.

    OMP_NUM_THREADS=2 python benchmarks/gated.py --adapter DIR --output gated.jsonl
    python benchmarks/gated.py --summary gated.jsonl --skip 24                      # nothing is run

Both decode the first turns of Spec-Bench by turns, after one that is not counted, which packs
weights. Tokens per second are those of whole calls, prompts included.
"""

import sys

from common import conditions, load_model
from races import make_parser, run, summary, table

from msn_ext.decoding import BestFirst

WAYS = ["base", "gated"]


def main(arguments: list[str]) -> None:
    parser = make_parser(__doc__, new_tokens=96)
    parser.add_argument("--adapter", help="a folder of msn train --gate")
    options = parser.parse_args(arguments)
    if options.summary:
        print(summary(options.summary, WAYS, options.skip))
        return
    if options.adapter is None:
        parser.error("--adapter is missing")

    from peft import PeftModel

    base, tokenizer = load_model(options)
    bare, _ = load_model(options)
    gated = PeftModel.from_pretrained(bare, options.adapter).to(base.dtype).eval()
    ways = dict(zip(WAYS, ((base, BestFirst), (gated, BestFirst))))
    rows = run(ways, tokenizer, options, conditions(base, "gated.py", arguments))
    print(table(rows, WAYS, options.skip))


if __name__ == "__main__":
    main(sys.argv[1:])
