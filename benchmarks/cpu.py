"""Decoding on a CPU, every engine that can be installed side by side: tokens/s, time to the first
token, memory, text equality.

    python benchmarks/cpu.py --output results.jsonl --plot results.svg          # everything (hours)
    python benchmarks/cpu.py --engines 'native-*,llama.cpp-BF16' --prompts 6    # some
    python benchmarks/cpu.py --peers-python ENVIRONMENT/bin/python              # peers live there
    python benchmarks/cpu.py --shapes 1b,3b --prompts 0                         # larger models
    python benchmarks/cpu.py --summary results.jsonl --plot results.svg         # nothing is run

Every engine has a process of its own, which is loaded once, warmed up with the longest prompt, and
idle while others run; how much of a core idle ones take is said. Prompts are the first turns of
Spec-Bench questions, one of each category in turn, greedy; everybody gets the same tokens and stops
at the same ones. For every prompt and repeat the engines come in another order. Figures are medians
of repeats, prompts' time included, in brackets the slowest and the fastest repeat. What takes no
part because it is not installed is said; the exit status is 1 if an engine failed.

Engines: native-DRAFT-DTYPE and torch-DRAFT-DTYPE, ours with either forward pass (drafts: none,
auto, …, b8 for BestFirst(8), habits and b8h for auto and b8 by what the model usually says, see msn
habits; the dtype int8: that of the weights, the rest in bfloat16);
transformers-eager|sdpa|compiled|lookup-DTYPE ("compiled": a static cache, too; "lookup": prompt
lookup); llama.cpp-FORMAT and llama.cpp-FORMAT-lookup (llama-cpp-python
and its prompt lookup); openvino-FORMAT (OpenVINO GenAI). The last two read the model's GGUF file,
requantised by llama.cpp: `pip install llama-cpp-python gguf openvino-genai`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path

import cpu_shapes
import torch
from common import BENCHMARKS, SPECBENCH, Results, conditions, load_model, load_questions
from cpu_engines import KINDS, PEERS
from cpu_report import FIRST_TOKEN, Report
from cpu_turns import Run
from machine import ReadBandwidth, cpu_name
from workers import Pool

from msn_ext.demo import HABITS, source_file
from msn_ext.paths import cache_root

DTYPES = ("float32", "bfloat16")
ENGINES = [
    *(
        f"native-{d}-{t}"
        for t in DTYPES
        for d in ("none", "auto", "b4", "b6", "b8", "b12", "b16", "habits", "b8h")
    ),
    *(f"native-{d}-int8" for d in ("none", "auto", "b8", "habits")),
    *(f"torch-auto-{t}" for t in DTYPES),
    *(f"transformers-{k}-{t}" for t in DTYPES for k in ("eager", "sdpa", "compiled", "lookup")),
    *(
        f"llama.cpp-{f}{lookup}"
        for f in ("F32", "BF16", "F16", "Q8_0", "Q4_1")
        for lookup in ("", "-lookup")
    ),
    *(f"openvino-{f}" for f in ("F16", "Q8_0", "Q4_1")),
]
FIRST_TOKEN_PROMPT = 512
GGUF_FOLDER = str(cache_root() / "benchmarks")


def chosen(patterns: str) -> list[str]:
    """Return the engines that comma-separated names or patterns name, each once; a name need not be
    among the usual ones.
    """
    found: dict[str, None] = {}
    for pattern in patterns.split(","):
        names = fnmatch.filter(ENGINES, pattern) or [pattern]
        if names == [pattern] and pattern.split("-")[0] not in KINDS:
            raise ValueError(f"{pattern!r} names none of {', '.join(ENGINES)}")
        found |= dict.fromkeys(names)
    return list(found)


def prompts_of(tokenizer, options) -> list[dict]:
    """Return category, question and token ids of the prompts, and the new tokens asked for; the
    last is one of :data:`FIRST_TOKEN_PROMPT` tokens, made of the others', for one new token.
    """
    prompts = []
    for question in load_questions(options.data)[: options.prompts]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question["turns"][0]}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        prompts.append(
            dict(category=question["category"], question=question["question"], ids=list(ids))
        )
    for prompt in prompts:
        prompt["new_tokens"] = options.new_tokens
    if prompts:
        every = [token for prompt in prompts for token in prompt["ids"]]
        every *= -(-FIRST_TOKEN_PROMPT // len(every))
        ids = every[:FIRST_TOKEN_PROMPT]
        prompts.append(dict(category=FIRST_TOKEN, question=None, ids=ids, new_tokens=1))
    return prompts


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="path or id; the demo model where none is named")
    add("--gguf", type=Path, help="its GGUF file, for peers (default: the demo model's)")
    add("--habits", type=Path, help="of the model, as msn habits wrote them (default: the demo's)")
    add("--data", type=Path, default=SPECBENCH, help="a Spec-Bench question file")
    add("--engines", default=",".join(ENGINES), help="names or patterns, by commas (default: all)")
    add("--prompts", type=int, default=24)
    add("--new-tokens", type=int, default=128)
    add("--repeats", type=int, default=3)
    add("--block", type=int, default=1, help="prompts that an engine is asked for in a turn")
    add("--alive", type=int, help="processes at once (default: as many as the memory holds)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--timeout", type=float, default=900, help="seconds that an answer may take")
    add("--peers-python", default=sys.executable, help="the Python that has the peers")
    add("--shapes", default="", help="larger models, by commas: " + ", ".join(cpu_shapes.SHAPES))
    add("--rows", default="1,2,4,8,16,32,64", help="of their steps")
    add("--output", type=Path, help="JSON lines: conditions, then a line per answer")
    add("--plot", type=Path, metavar="FILE.svg", help="draw tokens/s")
    add("--summary", type=Path, help="print the tables of such a file and stop")
    return parser


def load_once(options, arguments: list[str]) -> tuple[dict, dict, object]:
    """Return the conditions, the model's folder and end tokens, and its tokenizer."""
    named = argparse.Namespace(model=options.model, dtype="float32", device="cpu")
    model, tokenizer = load_model(named)
    header = conditions(model, "cpu.py", arguments) | dict(cpu=cpu_name(), dtype="by engine")
    header["device"] = f"cpu, {options.threads} threads"
    end = model.generation_config.eos_token_id
    end = [end] if isinstance(end, int) else end or []
    return header, dict(model=model.name_or_path, end=end), tokenizer


def decode(options, engines: list[str], about: dict, tokenizer, rows: list[dict], keep) -> None:
    """Have the engines decode; ``keep`` takes a row for every text that is not among the rows.
    ``about`` holds the model's folder and end tokens.
    """
    settings = about | dict(threads=options.threads, gguf_folder=GGUF_FOLDER)
    settings["habits"] = str(options.habits or HABITS)
    if options.model is None or options.gguf:
        settings["gguf"] = str(options.gguf or source_file())
    else:
        for engine in [name for name in engines if kind_of(name) in PEERS]:
            engines.remove(engine)
            keep(dict(engine=engine, missing="--gguf"))
    prompts = prompts_of(tokenizer, options)
    longest = max((prompt["ids"] for prompt in prompts), key=len)
    settings["context"] = len(longest) + options.new_tokens
    done = {(row["engine"], row["question"], row["repeat"]) for row in rows if "tokens" in row}

    def warm(worker) -> None:
        worker.ask(dict(ids=longest, new_tokens=options.new_tokens))

    command = commands(options, "cpu_engines.py", settings)
    with Pool(command, warm, options.alive, options.timeout) as pool:
        bandwidth = ReadBandwidth(options.threads)
        run = Run(pool, engines, keep)
        run.decode(prompts, options.repeats, options.block, done, bandwidth)
        keep(dict(idle=pool.idle_seconds / max(pool.busy_seconds, 1e-9)))


def time_steps(options, keep) -> None:
    """Time steps of larger shapes, one shape after the other."""
    for shape in options.shapes.split(","):
        settings = dict(shape=shape, threads=options.threads, gguf_folder=GGUF_FOLDER)
        command = commands(options, "cpu_shapes.py", settings)
        with Pool(command, alive=1, timeout=options.timeout) as pool:
            run = Run(pool, cpu_shapes.ENGINES, lambda row: keep(dict(shape=shape) | row))
            run.steps([int(count) for count in options.rows.split(",")], options.repeats)


def commands(options, script: str, settings: dict):
    """Return what gives the command of an engine's worker."""

    def command(engine: str) -> list[str]:
        python = options.peers_python if kind_of(engine) in PEERS else sys.executable
        return [python, str(BENCHMARKS / script), json.dumps(settings | dict(engine=engine))]

    return command


def kind_of(engine: str) -> str:
    return engine.split("-")[0]


def main(arguments: list[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    results = Results(options.summary or options.output)
    rows = list(results.rows)
    if options.summary is None:
        try:
            engines = chosen(options.engines)
        except ValueError as error:
            parser.error(f"--engines: {error}")
        if unknown := set(options.shapes.split(",")) - {"", *cpu_shapes.SHAPES}:
            parser.error(
                f"--shapes has {', '.join(unknown)}; expected {', '.join(cpu_shapes.SHAPES)}"
            )
        if options.prompts and not options.data.is_file():
            parser.error(
                f"--data {options.data}: no such file; expected Spec-Bench's question.jsonl"
            )
        header, about, tokenizer = load_once(options, arguments)

        def keep(row: dict) -> None:
            rows.append(row)
            results.save(header, row)

        if options.prompts:
            decode(options, engines, about, tokenizer, rows, keep)
        if options.shapes:
            time_steps(options, keep)
    report = Report(rows)
    print(report.text())
    if options.plot:
        options.plot.write_text(report.picture("Decoding on a CPU"), encoding="utf-8")
    return int(any(why.startswith("failed") for why in report.lost.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
