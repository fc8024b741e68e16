"""Times of a step: plain and with trees, recorded and not, next to transformers; weights
drawn at random.

    python benchmarks/steps.py --shape llama-3-8b --device cuda --dtype bfloat16 --context 2048
    python benchmarks/steps.py --shape llama-3-8b --device cuda --dtype bfloat16 \\
        --batch 1,2,4,8,16,32 --nodes 1,16,64
    python benchmarks/steps.py --shape smollm2-135m --nodes 1,16    # a CPU will do, too
    python benchmarks/steps.py --shape llama-3-8b --device cuda --dtype bfloat16 \\
        --engine torch,native

Weights at random make no sense of a text, but their time is that of real ones. A step is everything
from the draft to the next tree: "recorded" replays a CUDA graph (`msn_ext.decoding.runner`; a GPU
only), "one by one" launches each kernel. transformers decodes greedily after the same prompt,
"eager" as it comes, and on a GPU "static" with its static cache and `torch.compile`. The limit is
the time to read the weights that a step needs once, at the bandwidth of a large copy measured in
the same run. Each figure is the median of ROUNDS stretches of STEPS steps, which take turns with
the others'.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import sys
import time

import torch
from common import Results, conditions
from machine import copy_bandwidth, wait
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from msn_ext.decoding import BestFirst, Decoder, Request
from msn_ext.decoding.capture import BACKENDS
from msn_ext.decoding.engine import packed_for
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

    def __init__(self, model, prompt, nodes: int, recorded: bool, longest: int, engine: str):
        self._device = prompt.device.type
        decoder = Decoder(
            Request.greedy_unpadded(model, prompt, BestFirst(nodes), longest, engine),
            room=room_for(prompt.shape[1] + longest),
        )
        decoder.prefill()
        decoder.advance(longest)  # a bound; the cache has its room
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
        return (time.perf_counter() - start) / STEPS


class Transformers:
    """Tokens of model.generate, the prompt's pass taken off by a second, shorter call."""

    def __init__(self, model, prompt, **options):
        self._device = prompt.device.type
        self._generate = functools.partial(
            model.generate,
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            **options,
        )

    def _time(self, tokens: int) -> float:
        wait(self._device)
        start = time.perf_counter()
        self._generate(max_new_tokens=tokens)
        wait(self._device)
        return time.perf_counter() - start

    def __call__(self) -> float:
        return (self._time(STEPS + 1) - self._time(1)) / STEPS


def read_bytes(model) -> int:
    """Return the bytes of the weights that a step needs: all but the table of embeddings, unless
    the head is the same.
    """
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    table = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - table


def ways(model, prompt, sizes: list[int], options) -> dict[str, object]:
    longest = (ROUNDS + 3) * STEPS * (1 + max(sizes))
    made = {}
    engines = options.engine.split(",")
    for engine in engines:
        packed_for(model, engine)  # before anything is recorded: it may move weights
    for engine, nodes in itertools.product(engines, sizes):
        its = f"{nodes}" if engine == "auto" else f"{nodes} {engine}"
        make = functools.partial(Ours, model, prompt, nodes, longest=longest, engine=engine)
        made[f"{its} one by one"] = functools.partial(make, recorded=False)
        if options.device in BACKENDS:
            made[f"{its} recorded"] = functools.partial(make, recorded=True)
    if not options.no_transformers:
        made["transformers eager"] = lambda: Transformers(model, prompt)
        if options.device == "cuda":
            made["transformers static"] = lambda: Transformers(
                model, prompt, cache_implementation="static"
            )
    return made


@torch.no_grad()
def measure(model, batch: int, options, limit: float) -> list[dict]:
    sizes = [int(nodes) for nodes in options.nodes.split(",")]
    prompt = torch.randint(
        model.config.vocab_size,
        (batch, options.context),
        generator=torch.Generator().manual_seed(batch),
    )
    runs, failed = {}, {}
    for name, make in ways(model, prompt.to(options.device), sizes, options).items():
        try:
            runs[name] = make()
            runs[name]()  # warms up, records, compiles
        except (RuntimeError, ValueError) as error:
            # out of memory, or what a peer cannot do: said, not hidden
            runs.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    seconds = {name: [] for name in runs}
    for _ in tqdm(range(ROUNDS), desc=f"batch {batch}", disable=None):
        for name, run in runs.items():
            seconds[name].append(run())
    rows = [
        dict(
            batch=batch,
            context=options.context,
            way=name,
            seconds=statistics.median(s),
            all=s,
            limit=limit,
        )
        for name, s in seconds.items()
    ]
    return rows + [
        dict(batch=batch, context=options.context, way=name, failed=why)
        for name, why in failed.items()
    ]


def summarise(rows: list[dict]) -> str:
    """Return a table, a line a way: milliseconds a step, the share of it that reading the weights
    takes, and over one node.
    """
    lines = [f"{'batch':>5} {'nodes, way':<24}{'ms':>9}{'limit / step':>14}{'over 1 node':>13}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['batch']:>5} {row['way']:<24} failed: {row['failed']}")
            continue
        kind = row["way"].split(" ", 1)[-1]
        plain = next(
            (
                r["seconds"]
                for r in rows
                if r["batch"] == row["batch"] and r["way"] == f"1 {kind}" and "seconds" in r
            ),
            None,
        )
        over = f"{row['seconds'] / plain:>12.2f}x" if plain else ""
        lines.append(
            f"{row['batch']:>5}"
            f" {row['way']:<24}{1e3 * row['seconds']:>9.3f}{row['limit'] / row['seconds']:>13.0%}"
            f" {over}"
        )
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
    parser.add_argument("--engine", default="auto", help="comma-separated: auto, torch, native")
    parser.add_argument(
        "--no-transformers", action="store_true", help="leave transformers' own decoding out"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="JSON lines: conditions, then a line per batch and way"
    )
    options = parser.parse_args(arguments)
    model = make_model(options.shape, options.device, getattr(torch, options.dtype))
    header = conditions(model, "steps.py", arguments)
    limit = read_bytes(model) / copy_bandwidth(options.device)
    results, rows = Results(options.output), []
    for batch in options.batch.split(","):
        for row in measure(model, int(batch), options, limit):
            results.save(header, row)
            rows.append(row)
    print(json.dumps(header, indent=1))
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
