"""Check on real text that our own forward pass gives a token the same logits, bit for bit, whatever
it is computed with: drafts of any size, other rows, padding, threads.

    python benchmarks/same_bits.py --data question.jsonl --output same_bits.jsonl
    python benchmarks/same_bits.py --adapter DIR --budgets 8,64 …  # with a gated noise adapter

Every prompt is decoded alone, without drafts, in one thread; then with each of --budgets (nodes of
a tree) and of --threads alone, and with its neighbours in left-padded batches of each of --batches;
and with every budget once as anybody decodes who wants no logits, so that the pass computes only
those that count ("text" alone is compared then).
With --adapter the model that all this is done with has a gated adapter, and the one that it is
compared with has none. Prints a line a dtype and way with the texts that differ anywhere, and exits
with 1 if one does.
"""

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

import torch
from common import SPECBENCH, Results, conditions, load_model, load_questions
from tqdm import tqdm

from msn_ext import generate
from msn_ext.cli.loading import tokens_of
from msn_ext.decoding import BestFirst
from msn_ext.decoding.drafters import ObservedDrafter


class LogitKeeper(ObservedDrafter):
    """Drafts as another drafter does, and keeps the logits of every accepted node."""

    def start(self, batch, vocabulary, device):
        super().start(batch, vocabulary, device)
        self.rows = [[] for _ in range(batch)]

    def observe(self, verified):
        for row, logits, path, accepted in zip(
            self.rows, verified.logits, verified.path, verified.accept_length.tolist()
        ):
            row.append(logits[path[:accepted].long()].clone())
        super().observe(verified)


def digests(
    model, prompts: list[list[int]], budget: int, new_tokens: int, logits: bool = True
) -> list[tuple[str, str | None]]:
    """Decode prompts as one batch; return hashes of each row's new tokens and of their logits, None
    where these are not kept.
    """
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    keeper = LogitKeeper(BestFirst(budget)) if logits else None
    out = generate(
        model,
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        draft=keeper or BestFirst(budget),
        engine="native",
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    found = []
    kept = keeper.rows if keeper else [None] * len(prompts)
    for sequence, its, accepts in zip(out.sequences, kept, out.accept_lengths):
        count = int(accepts.sum())
        numbers = its and torch.cat(its)[:count].contiguous()
        found.append((hashed(sequence[longest : longest + count]), its and hashed(numbers)))
    return found


def hashed(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def differ(found: tuple[str, str | None], expected: tuple[str, str | None]) -> bool:
    return any(a != b for a, b in zip(found, expected) if a and b)


def ways(options) -> list[tuple[int, int, int, bool]]:
    """Return (nodes of a tree, rows, threads, logits kept) of what is compared."""
    budgets, largest, most = options.budgets, max(options.budgets), max(options.threads)
    alone = [(budget, 1, threads, True) for threads in options.threads for budget in budgets]
    batches = [(nodes, rows, most, True) for rows in options.batches for nodes in (1, largest)]
    return alone + batches + [(budget, 1, most, False) for budget in budgets]


def compare(model, bare, prompts: list[list[int]], options, keep) -> None:
    """Decode all prompts in all ways, and before by the model ``bare``; ``keep`` takes a row for
    every batch.
    """
    its = ways(options)
    dtype = str(model.dtype).removeprefix("torch.")
    total = len(prompts) * (1 + len(its))
    with tqdm(total=total, unit="text", desc=dtype) as bar:
        torch.set_num_threads(1)
        expected = []
        for prompt in prompts:
            expected += digests(bare, [prompt], 1, options.new_tokens)
            bar.update()
        for nodes, rows, threads, kept in its:
            torch.set_num_threads(threads)
            for begin in range(0, len(prompts), rows):
                batch = slice(begin, begin + rows)
                found = digests(model, prompts[batch], nodes, options.new_tokens, kept)
                wrong = sum(differ(*both) for both in zip(found, expected[batch], strict=True))
                way = dict(dtype=dtype, nodes=nodes, rows=rows, threads=threads)
                way["compared"] = "text, logits" if kept else "text"
                keep(way | dict(begin=begin, texts=len(found), different=wrong))
                bar.update(len(found))


KEYS = "dtype", "nodes", "rows", "threads"


def table(rows: list[dict]) -> str:
    texts: Counter[tuple] = Counter()
    different: Counter[tuple] = Counter()
    for row in rows:
        way = *(row[key] for key in KEYS), row.get("compared", "text, logits")
        texts[way] += row["texts"]
        different[way] += row["different"]
    names = f"{'dtype':10}{'nodes':>6}{'rows':>6}{'threads':>9}{'compared':>14}"
    lines = [f"{names}{'texts':>7}{'different':>11}"]
    for way, count in texts.items():
        dtype, nodes, batch, threads, what = way
        its = f"{dtype:10}{nodes:>6}{batch:>6}{threads:>9}{what:>14}"
        lines.append(f"{its}{count:>7}{different[way]:>11}")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError("expected numbers of at least 1")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a folder or a hub id (default: the demo model)")
    add("--adapter", help="a folder of msn train --gate, which its tails are computed with")
    add("--data", type=Path, default=SPECBENCH, help="a Spec-Bench question file")
    add("--prompts", type=int, help="how many of its questions (default: all)")
    add("--new-tokens", type=int, default=64, help="(default: 64)")
    add("--dtypes", default="float32,bfloat16", help="(default: float32,bfloat16)")
    add("--budgets", type=numbers, default=[1, 2, 4, 8, 16, 32, 64], help="nodes of a tree")
    add("--batches", type=numbers, default=[2, 4], help="(default: 2,4)")
    add("--threads", type=numbers, default=[1, 2], help="(default: 1,2)")
    add("--output", type=Path, help="a file for what was found, as JSON lines")
    return parser


def main(arguments: list[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file; expected Spec-Bench's question.jsonl")
    options.device = "cpu"
    if options.output is not None:
        options.output.unlink(missing_ok=True)
    results, found = Results(options.output), []
    for dtype in options.dtypes.split(","):
        options.dtype = dtype
        model, tokenizer = load_model(options)
        header = conditions(model, "same_bits.py", arguments)

        def keep(row: dict, header: dict = header) -> None:
            found.append(row)
            results.save(header, row)

        questions = load_questions(options.data)[: options.prompts]
        prompts = [tokens_of(tokenizer, q["turns"][0], True)[0].tolist() for q in questions]
        bare = model
        if options.adapter:
            from peft import PeftModel

            its, _ = load_model(options)
            model = PeftModel.from_pretrained(its, options.adapter).to(model.dtype).eval()
        compare(model, bare, prompts, options, keep)
    print(table(found))
    return int(any(row["different"] for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
