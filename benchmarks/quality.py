"""Measure whether training for decoding costs quality, one model a call: loss on held-out answers,
GSM8K, HumanEval.

    python benchmarks/quality.py --name base --data prompts.jsonl … --skip 400 \\
        --gsm8k gsm8k_dev.jsonl --humaneval humaneval_dev.jsonl --output DIR
        # the demo model as published
    python benchmarks/quality.py --name branch --model TRAINED … --output DIR
        # what msn train left, or any model
    python benchmarks/quality.py --summary DIR

--data and --skip are the files and the number of samples of msn train or training.py: --held-out
conversations after those are held out. The first model of DIR answers them, so let it be the one
before training; the loss of all is that of its answers. Tasks are asked in the chat template,
greedily, without examples. GSM8K: the last number of an answer is compared with the reference's.
HumanEval: the first block of code, or the whole answer, is run with the task's tests in a process
of its own, with limits on time, memory and the size of files, in an empty folder (the code is a
model's: run this where it can do no harm). DIR keeps all answers and a line of results.jsonl per
model; what is there is not asked again.
"""

import argparse
import copy
import math
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
from common import Results, conditions

from msn_ext.cli.loading import load
from msn_ext.cli.settings import add_settings
from msn_ext.jsonl import draw, rows
from msn_ext.recipe.samples import pad_of, samples_of, unasked
from msn_ext.recipe.self_distill import self_distill
from msn_ext.recipe.settings import SampleSettings, TrainSettings
from msn_ext.training.data import Collate, read_conversations
from msn_ext.training.evaluation import noise_accuracy

NUMBER = re.compile(r"(?:(?<![\d.\w)])-)?\d[\d,]*(?:\.\d+)?")  # no minus sign in "20-5" and "9-10"
SECONDS, MEMORY, FILE_SIZE = 10, 1 << 30, 1 << 20
PASSED = 42  # what a program exits with after its tests, and not where it stops on the way


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def gsm8k_question(row: dict) -> str:
    return row["question"] + "\n\nSolve it step by step and end with the number that is the answer."


def gsm8k_right(row: dict, answer: str) -> bool:
    said, reference = last_number(answer), last_number(row["answer"].split("####")[-1])
    return said is not None and math.isclose(said, reference, abs_tol=1e-6)


def humaneval_question(row: dict) -> str:
    return (
        "Complete this Python function. Answer with the whole function in a block of"
        f" code.\n\n```python\n{row['prompt'].strip()}\n```"
    )


def program_of(row: dict, answer: str) -> str:
    """Return the imports and helpers of the task, the answer's code, and the tests."""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.S)
    code = block[1] if block else answer
    whole = re.search(rf"^def {re.escape(row['entry_point'])}\b", code, re.M)
    before = row["prompt"].split(f"\ndef {row['entry_point']}(")[0] if whole else row["prompt"]
    return (
        f"{before}\n{code}\n{row['test']}\ncheck({row['entry_point']})\nraise"
        f" SystemExit({PASSED})\n"
    )


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def humaneval_right(row: dict, answer: str) -> bool:
    with tempfile.TemporaryDirectory() as empty:
        pathlib.Path(empty, "program.py").write_text(program_of(row, answer), encoding="utf-8")
        try:
            run = subprocess.run(
                [sys.executable, "-I", "program.py"],
                cwd=empty,
                env={"PATH": os.environ.get("PATH", "")},
                timeout=2 * SECONDS,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=_limits,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return run.returncode == PASSED


TASKS = {"gsm8k": (gsm8k_question, gsm8k_right), "humaneval": (humaneval_question, humaneval_right)}


def rows_of(path: pathlib.Path) -> list[dict]:
    return [row for _, row in rows(str(path))]


def summarise(models: list[dict]) -> str:
    """Return a line a model; after a share its binomial standard error."""
    lines = [f"{'':<14}{'loss':>8}{'next token':>12}" + "".join(f"{task:>18}" for task in TASKS)]
    for row in models:
        line = f"{row['name']:<14}" + (
            f"{row['loss']:>8.4f}{row['accuracy']:>12.1%}" if "loss" in row else " " * 20
        )
        for task in TASKS:
            if task in row:
                right, asked = row[task]
                share = right / asked
                line += f"{share:>10.1%} ± {math.sqrt(share * (1 - share) / asked):>5.1%}"
            else:
                line += " " * 18
        lines.append(line)
    return "\n".join(lines)


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="of the model, in the results")
    parser.add_argument(
        "--model", help="a folder or a hub id; the demo model as published where none is named"
    )
    parser.add_argument("--data", nargs="+", default=[], help="as of msn train")
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        help="conversations of --data that were trained on or looked at",
    )
    add_settings(parser, TrainSettings(held_out=300, max_length=400), "held_out", "max_length")
    for task in TASKS:
        parser.add_argument(f"--{task}", type=pathlib.Path, help="its JSON lines")
    parser.add_argument("--questions", type=int, help="of each task, the first ones (default: all)")
    add_settings(parser, SampleSettings(), "max_new_tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["float32", "float16", "bfloat16"],
        help="of answers; losses are float32's",
    )
    parser.add_argument("--device")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument(
        "--summary", type=pathlib.Path, help="print the table of such a folder and stop"
    )
    return parser


def held_out_loss(model, answerer, tokenizer, options) -> dict:
    """Return the loss of held-out answers, and what share of their tokens is the likeliest."""
    drawn = draw(
        [read_conversations(path) for path in options.data], options.skip + options.held_out
    )
    held = unasked(drawn[options.skip :], drawn[: options.skip])
    file = options.output / "held-out.jsonl"
    answers = self_distill(answerer, tokenizer, held, file, max_new_tokens=options.max_new_tokens)
    samples = samples_of(tokenizer, answers, options.max_length)
    found = noise_accuracy(model, samples, Collate(pad_of(tokenizer)))
    return {"loss": found.loss, "accuracy": found.accuracy, "held out": len(samples)}


def right_answers(task: str, answerer, tokenizer, options) -> tuple[int, int]:
    """Return how many questions of a task are answered right, and how many were asked."""
    question, right = TASKS[task]
    asked = rows_of(getattr(options, task))[: options.questions]
    answers = self_distill(
        answerer,
        tokenizer,
        [[{"role": "user", "content": question(item)}] for item in asked],
        options.output / f"{options.name}-{task}.jsonl",
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    with ThreadPoolExecutor(os.cpu_count()) as jobs:
        verdicts = list(jobs.map(right, asked, [answer["response"] for answer in answers]))
    return sum(verdicts), len(asked)


def main(arguments: list[str]) -> int:
    parser = arguments_parser()
    options = parser.parse_args(arguments)
    if options.summary:
        print(summarise(Results(options.summary / "results.jsonl").rows))
        return 0
    if not options.output or not options.name:
        parser.error("expected --name and --output, or --summary")
    results = Results(options.output / "results.jsonl")
    if any(row["name"] == options.name for row in results.rows):
        parser.error(f"--output {options.output} has results of {options.name} already")
    model, tokenizer, _ = load(options.model, "float32", options.device)
    answerer = copy.deepcopy(model).to(getattr(torch, options.dtype))
    row = {"name": options.name}
    if options.data:
        row |= held_out_loss(model, answerer, tokenizer, options)
    for task in TASKS:
        if getattr(options, task):
            row[task] = right_answers(task, answerer, tokenizer, options)
    results.save(conditions(answerer, "quality.py", arguments), row)
    print(summarise([row]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
