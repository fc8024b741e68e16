"""Accept lengths of every drafter on Spec-Bench, by replay: drafters x categories x budgets, and an
ablation.

    python benchmarks/specbench.py --output results.jsonl   # all turns and drafters (hours on a
                                                            # CPU); goes on where a file of the
                                                            # same drafters ends
    python benchmarks/specbench.py --prompts 24 --drafts paper,auto@64
    python benchmarks/specbench.py --check 6                # also decode six turns for real, and
                                                            # compare
    python benchmarks/specbench.py --summary results.jsonl  # the table of files, nothing run

What a drafter gains is settled by the text that greedy decoding gives and by what the model says at
the nodes that the drafter asks for. So every turn is decoded once, greedily; then all drafters run
side by side on that text, as `msn_ext.generate` runs them, and what they ask for is computed in one
forward pass: a node is known by the place where its path leaves the text and by its tokens from
there, and is computed once for all. Of a node's logits the 16 largest are kept, which is more than
any drafter looks at; the rest counts as minus infinity. Drafters begin empty at every turn.
MT-bench's second turns are asked with the first answer.

MAT is tokens per forward pass, the prompt's pass included. It is high, too, where a model repeats
itself, so how much of the answers is new is said with it. "auto@N" is best-first drafting with N
nodes; "auto@64-NAME" leaves one source out ("foresight": no value for predictions of the next
step; "rejected": what the model says after rejected guesses is not remembered). Trees of a fixed
shape have their own size: paper 69, recycling 81, lookahead up to 56; chains: jacobi 6, lookup 8,
suffix up to 60.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import random
import sys
from collections import defaultdict

import torch
from common import (
    CATEGORIES,
    SPECBENCH,
    Results,
    conditions,
    fewer_passes,
    load_model,
    load_questions,
)
from replay import DRAFTS, make_drafter, replay_all
from tqdm import tqdm

import msn_ext
from msn_ext.decoding import BestFirst
from msn_ext.ops import MAX_NODES
from msn_ext.training.evaluation import new_trigrams


@torch.no_grad()
def measure(
    model, tokenizer, questions, drafts, new_tokens, check: int, done: dict, save
) -> list[dict]:
    rows = []
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    scratch = torch.full((MAX_NODES, vocabulary), -torch.inf)
    bar = tqdm(
        total=sum(len(question["turns"]) for question in questions), unit="turn", disable=None
    )
    checked = random.Random(0).sample(range(len(questions)), min(check, len(questions)))
    for at, question in enumerate(questions):
        messages = []
        for turn, text in enumerate(question["turns"]):
            messages.append({"role": "user", "content": text})
            row = done.get((question["question"], turn))
            if row is None:
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                ).to(model.device)
                prompt = inputs["input_ids"].shape[1]
                # Each token is the model's own; which drafter finds it matters for near-ties at
                # most.
                out = msn_ext.generate(
                    model, **inputs, draft=BestFirst(16), do_sample=False, max_new_tokens=new_tokens
                )
                accept_lengths = replay_all(
                    {name: make_drafter(name) for name in drafts},
                    model,
                    out[0].tolist(),
                    prompt,
                    scratch,
                )
                row = dict(
                    category=question["category"],
                    question=question["question"],
                    turn=turn,
                    prompt=prompt,
                )
                row |= dict(tokens=out[0, prompt:].tolist(), accept_lengths=accept_lengths)
                if at in checked and turn == 0:
                    row["decoded"] = {
                        name: decode(model, inputs, name, new_tokens) for name in drafts
                    }
                save(row)
            rows.append(row)
            messages.append(
                {
                    "role": "assistant",
                    "content": tokenizer.decode(row["tokens"], skip_special_tokens=True),
                }
            )
            bar.update()
    bar.close()
    return rows


def decode(model, inputs, name: str, new_tokens: int) -> list[int]:
    """Return the accept lengths of real decoding."""
    settings = dict(do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True)
    return (
        msn_ext.generate(model, **inputs, draft=make_drafter(name), **settings)
        .accept_lengths[0]
        .tolist()
    )


def summarise(rows: list[dict]) -> str:
    """Return a table: the MAT, in every category, of every drafter that all rows have, its
    intervals by resampling questions.
    """
    drafts = [
        name
        for name in rows[0]["accept_lengths"]
        if all(name in row["accept_lengths"] for row in rows)
    ]
    lines = [
        f"{'MAT':<20}"
        + "".join(f"{category:>16}" for category in CATEGORIES)
        + f"{'all':>8}{'over paper':>14}{'95 %':>14}"
    ]
    for name in drafts:
        totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for row in rows:
            accepts = row["accept_lengths"][name]
            for key in (row["category"], "all"):
                totals[key][0] += sum(accepts)
                totals[key][1] += len(accepts)
        cells = [
            f"{totals[c][0] / totals[c][1]:>16.2f}" if totals[c][1] else f"{'':>16}"
            for c in CATEGORIES
        ]
        line = f"{name:<20}" + "".join(cells) + f"{totals['all'][0] / totals['all'][1]:>8.2f}"
        if "paper" in drafts:
            low, middle, high = ratio(rows, name, "paper")
            line += f"{middle:>13.2f}x" + f"{low:.2f}-{high:.2f}".rjust(14)
        lines.append(line)
    fresh = new_trigrams([row["tokens"] for row in rows])
    lines.append(
        f"{len(rows)} turns, {sum(len(row['tokens']) for row in rows)} tokens, {fresh:.0%} of an"
        " answer's trigrams new to it"
    )
    decoded = [row for row in rows if "decoded" in row]
    for name in drafts if decoded else ():
        replayed, real = (
            sum(len(row[key][name]) for row in decoded) for key in ("accept_lengths", "decoded")
        )
        lines.append(
            f"check on {len(decoded)} turns: {name:<20} {replayed:>6} passes replayed, {real:>6}"
            " decoded"
        )
    return "\n".join(lines)


def ratio(rows: list[dict], name: str, base: str) -> tuple[float, float, float]:
    """Return the MAT of ``name`` over that of ``base``: 2.5 %, all turns, 97.5 % of 1000 resamples
    of questions.
    """
    questions: dict = defaultdict(lambda: [0, 0])
    for row in rows:
        for i, draft in enumerate((name, base)):
            questions[row["question"]][i] += len(row["accept_lengths"][draft])
    return fewer_passes(questions.values())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="path or id; the demo model where none is named")
    parser.add_argument(
        "--data", type=pathlib.Path, default=SPECBENCH, help="a Spec-Bench question file"
    )
    parser.add_argument(
        "--prompts", type=int, help="questions, in turn from every category (default: all)"
    )
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        help="questions to leave out first (24 served to design auto)",
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--drafts", default=",".join(DRAFTS), help="comma-separated (default: all)")
    parser.add_argument(
        "--check", type=int, default=0, metavar="N", help="questions that are also decoded for real"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float64", "float32", "float16", "bfloat16"]
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="JSON lines: conditions, then a line per turn"
    )
    parser.add_argument(
        "--summary",
        type=pathlib.Path,
        nargs="+",
        help="print the table of such files together and stop",
    )
    return parser


def main(arguments: list[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    drafts = options.drafts.split(",")
    if unknown := set(drafts) - set(DRAFTS):
        parser.error(
            f"--drafts has {', '.join(sorted(unknown))}; expected some of {', '.join(DRAFTS)}"
        )
    if options.summary:
        files = [Results(path) for path in options.summary]
        for path, results in zip(options.summary, files):
            if not results.rows:
                parser.error(f"--summary {path} holds no results")
        for results in files:
            print(json.dumps(results.lines[0]))
        print(summarise([row for results in files for row in results.rows]))
        return 0
    results = Results(options.output)
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file; expected Spec-Bench's question.jsonl")

    done = {(row["question"], row["turn"]): row for row in results.rows}
    if done and list(results.rows[0]["accept_lengths"]) != drafts:
        parser.error(
            f"--output {options.output} holds other drafters; expected the same, or another file"
        )
    model, tokenizer = load_model(options)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "sliding_window", None) or set(
        getattr(config, "layer_types", None) or ()
    ) - {"full_attention"}:
        parser.error(
            f"--model {options.model}: it has sliding windows; replay needs full attention in every"
            " layer"
        )
    header = conditions(model, "specbench.py", arguments)
    save = functools.partial(results.save, header)
    questions = load_questions(options.data)[options.skip :][: options.prompts]
    rows = measure(
        model, tokenizer, questions, drafts, options.new_tokens, options.check, done, save
    )
    print(json.dumps(header))
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
