"""Decoding a real model, plain transformers and msn_ext side by side: MAT, tokens/s, speed-up,
exactness.

    python benchmarks/decode.py                              # 12 Spec-Bench prompts, the demo model
    python benchmarks/decode.py --prompts 40 --new-tokens 128 --drafts paper --output results.jsonl
    python benchmarks/decode.py --model PATH_OR_ID --device cuda --dtype bfloat16

Prompts are taken in turn from every category of a Spec-Bench file (`--data question.jsonl`), first
turns, greedy. Every prompt is decoded by `model.generate` and by every draft, one after the other
in one process, so the ratios compare like with like whatever else the machine does. On a GPU the
first call for a length of text captures a draft's steps, and the first one of all loads what the
device runs: every call is made twice, and the second one counts ("first_seconds" keeps the other).
With --output, a line is appended per prompt and draft; what stands there already is not run again.

Where an output differs from plain decoding, the text up to there is fed to the model and the gap
between its two likeliest tokens is reported: a near-tie may flip, since a tree changes the order in
which sums are taken. The exit status is 1 if any gap is 1e-3 or more (float32 and float64).
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import time

import torch
from common import CATEGORIES, SPECBENCH, Results, conditions, load_model, load_questions
from tqdm import tqdm

import msn_ext
from msn_ext.generation import DRAFTS, drafter_for

NEAR_TIE = 1e-3


def load_prompts(path: pathlib.Path, count: int) -> list[tuple[str, int, str]]:
    """Return category, question id and first turn of ``count`` prompts, the first of each category
    in turn, by category.
    """
    prompts = [
        (question["category"], question["question"], question["turns"][0])
        for question in load_questions(path)[:count]
    ]
    return sorted(prompts, key=lambda prompt: CATEGORIES.index(prompt[0]))


def top_two_gap(model, ids: torch.Tensor) -> float:
    """Return the distance between the two largest logits after ``ids`` [1, length]."""
    with torch.no_grad():
        best = model(ids, logits_to_keep=1).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


class ModelTime:
    """Seconds spent inside the model's forward (CPU; on a GPU, work goes on after the call)."""

    def __init__(self, model):
        self.seconds = 0.0
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave),
        ]

    def _enter(self, *_):
        self._since = time.perf_counter()

    def _leave(self, *_):
        self.seconds += time.perf_counter() - self._since

    def remove(self):
        for hook in self._hooks:
            hook.remove()


class DraftTime:
    """A drafter, and the seconds spent in it (CPU; on a GPU, work goes on after the calls)."""

    def __init__(self, drafter):
        self.seconds, self.max_depth = 0.0, drafter.max_depth
        for name in ("start", "first", "propose", "observe"):
            setattr(self, name, self._timed(getattr(drafter, name)))

    def _timed(self, call):
        def timed(*arguments):
            since = time.perf_counter()
            result = call(*arguments)
            self.seconds += time.perf_counter() - since
            return result

        return timed


def run(
    model, inputs, draft: str, new_tokens: int
) -> tuple[list[int], list[int], float, float, float]:
    """Return new tokens, accept lengths (one a forward pass), seconds, and those inside the model
    and the drafter (NaN on a GPU, where steps are recorded and nobody can tell).
    """
    settings = dict(do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True)
    gpu, ours = model.device.type == "cuda", draft != "transformers"
    if gpu:
        torch.cuda.synchronize()
    inside = None if gpu else ModelTime(model)
    drafter = draft if gpu or not ours else DraftTime(drafter_for(draft, model))
    start = time.perf_counter()
    if ours:
        out = msn_ext.generate(model, **inputs, draft=drafter, **settings)
    else:
        out = model.generate(**inputs, **settings)
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - start
    accepts = out.accept_lengths[0].tolist() if ours else [1] * len(new)
    if gpu:
        return new, accepts, seconds, float("nan"), float("nan")
    inside.remove()
    return new, accepts, seconds, inside.seconds, drafter.seconds if ours else 0.0


def difference(model, input_ids: torch.Tensor, new: list[int], plain: list[int]) -> dict:
    """Return where ``new`` leaves ``plain``, and how near a tie the model was there."""
    at = next(i for i, (a, b) in enumerate(zip([*new, -1], [*plain, -1])) if a != b)
    prefix = torch.tensor([plain[:at]], dtype=torch.int64, device=model.device)
    return dict(flip_at=at, gap=top_two_gap(model, torch.cat([input_ids, prefix], 1)))


def measure(model, tokenizer, prompts, drafts, new_tokens, done: dict, save) -> list[dict]:
    """Return a row per prompt and draft, plain decoding first; those in ``done`` are not run."""
    rows = []
    bar = tqdm(total=len(prompts) * (len(drafts) + 1), unit="run", disable=None)
    for category, question, text in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        plain: list[int] = []
        for draft in ("transformers", *drafts):
            bar.set_postfix_str(f"{category} {draft}")
            row = done.get((question, draft))
            if row is None:
                first = None
                if model.device.type == "cuda":
                    first = round(run(model, inputs, draft, new_tokens)[2], 4)
                new, accepts, seconds, inside, drafting = run(model, inputs, draft, new_tokens)
                row = dict(
                    category=category,
                    question=question,
                    draft=draft,
                    prompt=inputs["input_ids"].shape[1],
                    tokens=new,
                    accept_lengths=accepts,
                    seconds=round(seconds, 4),
                    first_seconds=first,
                    model_seconds=round(inside, 4),
                    drafting_seconds=round(drafting, 4),
                    flip_at=None,
                    gap=None,
                )
                if draft != "transformers" and new != plain:
                    row |= difference(model, inputs["input_ids"], new, plain)
                save(row)
            if draft == "transformers":
                plain = row["tokens"]
            rows.append(row)
            bar.update()
    bar.close()
    return rows


def summarise(rows: list[dict], drafts: list[str]) -> str:
    """Return a table, a line per draft and category: MAT, tokens/s and speed-up over plain
    transformers; "other" is the share of the time that is not spent in the model's forward,
    "drafting" that which is spent in the drafter.
    """
    seconds = {(r["question"], r["draft"]): r["seconds"] for r in rows}
    lines = [
        f"{'draft':<14}{'category':<16}{'prompts':>8}{'MAT':>7}"
        f"{'tok/s':>9}{'plain tok/s':>13}{'speed-up':>10}"
        f"{'other':>8}{'drafting':>10}{'flips':>7}"
    ]
    for draft in drafts:
        for category in (*CATEGORIES, "all"):
            part = [r for r in rows if r["draft"] == draft and category in (r["category"], "all")]
            if not part:
                continue
            tokens = sum(len(r["tokens"]) for r in part)
            passes = sum(len(r["accept_lengths"]) for r in part)
            spent = sum(r["seconds"] for r in part)
            plain_rows = {r["question"]: r for r in rows if r["draft"] == "transformers"}
            plain_tokens = sum(len(plain_rows[r["question"]]["tokens"]) for r in part)
            plain_rate = plain_tokens / sum(seconds[r["question"], "transformers"] for r in part)
            flips = sum(r["flip_at"] is not None for r in part)
            other = 1 - sum(r["model_seconds"] for r in part) / spent
            drafting = sum(r.get("drafting_seconds", float("nan")) for r in part) / spent
            lines.append(
                f"{draft:<14}{category:<16}{len(part):>8}{tokens / passes:>7.2f}"
                f"{tokens / spent:>9.1f}{plain_rate:>13.1f}{tokens / spent / plain_rate:>9.2f}x"
                f"{other:>8.1%}{drafting:>10.1%}{flips:>7}"
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="path or id; the demo model where none is named")
    parser.add_argument(
        "--data", type=pathlib.Path, default=SPECBENCH, help="a Spec-Bench question file"
    )
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--drafts", default="paper,lookup,none", help="comma-separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=["float64", "float32", "float16", "bfloat16"]
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="JSON lines: conditions, then one line per run"
    )
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file; expected Spec-Bench's question.jsonl")
    drafts = options.drafts.split(",")
    if unknown := set(drafts) - set(DRAFTS):
        parser.error(f"--drafts has {', '.join(sorted(unknown))}; expected {', '.join(DRAFTS)}")

    results = Results(options.output)
    done = {(row["question"], row["draft"]): row for row in results.rows}
    model, tokenizer = load_model(options)
    header = conditions(model, "decode.py", arguments)
    prompts = load_prompts(options.data, options.prompts)
    save = functools.partial(results.save, header)
    rows = measure(model, tokenizer, prompts, drafts, options.new_tokens, done, save)
    print(json.dumps(header, indent=1))
    print(summarise(rows, drafts))
    flips = [row for row in rows if row["flip_at"] is not None]
    for row in flips:
        print(
            f"differs: {row['draft']}, question {row['question']}, token {row['flip_at']}, top-2"
            f" logit gap {row['gap']:.2e}"
        )
    compared = sum(row["draft"] != "transformers" for row in rows)
    print(
        f"{compared - len(flips)} of {compared} outputs equal plain decoding, {len(flips)} differ"
    )
    exact = options.dtype in ("float32", "float64")
    return int(exact and any(row["gap"] >= NEAR_TIE for row in flips))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
