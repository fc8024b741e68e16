"""Times of a step: plain and with trees, recorded and not, next to transformers; weights
drawn at random.

    python benchmarks/steps.py --shape llama-3-8b --device cuda --dtype bfloat16 --context 2048
    python benchmarks/steps.py --shape llama-3-8b --device cuda --dtype bfloat16 \\
        --batch 1,2,4,8,16,32 --nodes 1,16,64 --who ours --output steps.jsonl
    python benchmarks/steps.py --shape smollm2-135m --nodes 1,16    # a CPU will do, too

Weights at random make no sense of a text, but their time is that of real ones. A step is everything
from the draft to the next tree: "recorded" replays a CUDA graph (`msn_ext.decoding.runner`; a GPU
only), "one by one" launches each kernel. transformers decodes greedily after the same prompt,
"eager" as it comes, and on a GPU "static" with its static cache and `torch.compile`; the first
tokens of a call, in which it may compile and capture, are not counted. The limit is
the time to read the weights that a step needs once, at the bandwidth of a large copy measured in
the same run. Each figure is the median of ROUNDS stretches of STEPS steps, which take turns with
the others'.

Ours are timed first, transformers' in another process (isolated.py), whose compiler and memory
touch nothing of ours. With --output, a line is appended per stretch; what stands there already is
not run again, "error" says why a way has no figures.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from common import Results, conditions
from isolated import Report, isolated
from machine import copy_bandwidth, wait
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import BaseStreamer

from msn_ext.decoding import BestFirst, Decoder, Request
from msn_ext.decoding.capture import BACKENDS
from msn_ext.decoding.engine import native_plan_for
from msn_ext.decoding.runner import EagerRunner, GraphRunner, room_for

SHAPES = {
    "tiny": dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    ),
    "smollm2-135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "llama-3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
ROUNDS, STEPS = 5, 20
FIRST = 6  # tokens of transformers' that are not counted
KEYS = "batch", "context", "way", "round"  # of a stretch
LIMIT = 150.0  # seconds that a stretch may take, recording and compiling included


def make_model(shape: str, device: str, dtype: torch.dtype):
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131072,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 8 billion float32 weights would take twice the memory
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


class Ours:
    """STEPS steps of a decoder at a time."""

    def __init__(self, model, prompt, nodes: int, recorded: bool, engine: str):
        self._device, self._recorded = prompt.device.type, recorded
        longest = (ROUNDS + 3) * STEPS * (1 + nodes)
        decoder = Decoder(
            Request.greedy_unpadded(model, prompt, BestFirst(nodes), longest, engine),
            room=room_for(prompt.shape[1] + longest),
        )
        decoder.prefill()
        decoder.advance(longest)  # a bound
        if self._device in BACKENDS:
            decoder.make_room()
        self._run = (
            GraphRunner(decoder, BACKENDS[self._device](prompt.device))
            if recorded
            else EagerRunner(decoder)
        )

    def __call__(self) -> float:
        wait(self._device)
        start = time.perf_counter()
        for _ in range(STEPS):
            self._run.step()
        wait(self._device)
        if self._recorded and not self._run.captures:
            raise RuntimeError("its step could not be recorded; the log says why")
        return (time.perf_counter() - start) / STEPS


class Clock(BaseStreamer):
    """Notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value) -> None:  # on the CPU, so that the device has come so far
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """STEPS tokens of model.generate, after the first ones."""

    def __init__(self, model, prompt, **options):
        self._generate = functools.partial(
            model.generate,
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=FIRST + STEPS,
            **options,
        )

    def __call__(self) -> float:
        clock = Clock()
        self._generate(streamer=clock)
        return (clock.times[-1] - clock.times[-1 - STEPS]) / STEPS


def read_bytes(model) -> int:
    """Return the bytes of the weights that a step needs: all but the table of embeddings, unless
    the head is the same.
    """
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    table = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - table


def ways(model, prompt, options) -> dict[str, Callable]:
    """What makes each way of decoding."""
    device, sizes = prompt.device.type, [int(nodes) for nodes in options.nodes.split(",")]
    if options.who == "transformers":
        static = {"cache_implementation": "static"}
        made = {"transformers eager": functools.partial(Transformers, model, prompt)}
        if device == "cuda":
            made["transformers static"] = functools.partial(Transformers, model, prompt, **static)
        return made
    made, engines = {}, options.engine.split(",")
    for engine in engines:  # before anything is recorded: weights may move
        with contextlib.suppress(ValueError):  # which its steps will say
            native_plan_for(model, engine)
    for engine, nodes in itertools.product(engines, sizes):
        its = f"{nodes}" if engine == "auto" else f"{nodes} {engine}"
        make = functools.partial(Ours, model, prompt, nodes, engine=engine)
        made[f"{its} one by one"] = functools.partial(make, recorded=False)
        if device in BACKENDS:
            made[f"{its} recorded"] = functools.partial(make, recorded=True)
    return made


@torch.no_grad()
def measure(report: Report, options) -> None:
    """Report every stretch that is not done."""
    model = make_model(options.shape, options.device, getattr(torch, options.dtype))
    report.about(conditions(model, "steps.py", sys.argv[1:]))
    limit = read_bytes(model) / copy_bandwidth(options.device)
    failed = {key[:-1] for key, row in report.done.items() if "error" in row}
    for batch in map(int, options.batch.split(",")):
        prompt = torch.randint(
            model.config.vocab_size,
            (batch, options.context),
            generator=torch.Generator().manual_seed(batch),
        ).to(options.device)
        runs: dict[str, Callable] = {}
        for turn, (way, make) in itertools.product(
            range(ROUNDS), ways(model, prompt, options).items()
        ):
            case = dict(batch=batch, context=options.context, way=way, round=turn)
            key = tuple(case.values())
            if key in report.done or key[:-1] in failed:
                continue
            report.begin(**case)
            try:
                if way not in runs:
                    runs[way] = make()
                    runs[way]()  # warms up, records, compiles
                report.row(seconds=runs[way](), limit=limit)
            except (RuntimeError, ValueError) as error:
                # out of memory, or what a peer cannot do: said, not hidden
                runs.pop(way, None)
                failed.add(key[:-1])
                report.error(error, spoilt="recorded" in way)


def summarise(rows: list[dict]) -> str:
    """Return a table, a line a way: milliseconds a step, the share of it that reading the weights
    takes, and over one node.
    """
    lines = [f"{'batch':>5} {'nodes, way':<28}{'ms':>9}{'limit / step':>14}{'over 1 node':>13}"]
    stretches: dict[tuple, list[float]] = {}
    for row in rows:
        if "seconds" in row:
            stretches.setdefault((row["batch"], row["way"]), []).append(row["seconds"])
    limit = statistics.median([row["limit"] for row in rows if "limit" in row] or [math.nan])
    for (batch, way), all_seconds in stretches.items():
        seconds = statistics.median(all_seconds)
        plain = stretches.get((batch, f"1 {way.split(' ', 1)[1]}"))
        over = f"{seconds / statistics.median(plain):>12.2f}x" if plain else ""
        lines.append(f"{batch:>5} {way:<28}{1e3 * seconds:>9.3f}{limit / seconds:>13.0%} {over}")
    for row in rows:
        if "error" in row:
            lines.append(f"{row['batch']:>5} {row['way']:<28} failed: {row['error']}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--batch", default="1", help="comma-separated")
    parser.add_argument("--nodes", default="1,16,64", help="comma-separated")
    parser.add_argument(
        "--engine",
        default="auto",
        help="comma-separated: of our steps, what generate(engine=) takes; default: auto",
    )
    parser.add_argument(
        "--who",
        default="ours,transformers",
        help="comma-separated: whose steps, each in a process of its own; default: %(default)s",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="JSON lines: conditions, then a line per stretch"
    )
    options = parser.parse_args(arguments)
    everyone = options.who.split(",")
    if unknown := set(everyone) - {"ours", "transformers"}:
        parser.error(f"--who has {', '.join(sorted(unknown))}; expected ours, transformers")

    results = Results(options.output)
    header, rows = next(iter(results.lines), None), list(results.rows)
    done = {tuple(row[key] for key in KEYS): row for row in rows}
    for who in everyone:
        options.who = who
        for kind, content in isolated(measure, options, options.device, LIMIT, done):
            if kind == "row":
                results.save(header, content)
                rows.append(content)
            elif kind == "about":
                header = header or content
            else:
                print(*content.values(), file=sys.stderr, flush=True)
    print(json.dumps(header, indent=1))
    print(summarise(rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
