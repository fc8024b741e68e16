"""The second turn's time to its first token: with the cache of the first, and reading all again.

    OMP_NUM_THREADS=2 python benchmarks/turns.py --output turns.jsonl

A text of ``--history`` tokens is read and answered, then a message of ``--message`` tokens follows.
Both ways take turns; medians of ``--repeats`` rounds. ``same`` says whether the second answers are
the same text.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
from common import Results, conditions, load_model
from transformers import DynamicCache

from msn_ext import generate

FIRST, SECOND = 32, 16  # tokens of the answers


class Clock:
    """A streamer that notes when the first token came."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def seconds(self) -> float:
        """From the call to the first tokens, which follow the prompt."""
        return self.times[2] - self.times[0]


def copied(cache: DynamicCache) -> DynamicCache:
    new = DynamicCache()
    for number, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, number)
    return new


def measure(model, ids, message, engine: str, repeats: int) -> dict:
    settings = dict(do_sample=False, eos_token_id=None, engine=engine)
    cache = DynamicCache()
    first = generate(model, ids, past_key_values=cache, max_new_tokens=FIRST, **settings)
    longer = torch.cat([first, message], 1)
    seconds: dict[str, list[float]] = {"again": [], "cached": []}
    texts = {}
    for _ in range(repeats):
        for way, its in seconds.items():
            past = copied(cache) if way == "cached" else DynamicCache()
            clock = Clock()
            texts[way] = generate(
                model,
                longer,
                attention_mask=torch.ones_like(longer),
                past_key_values=past,
                streamer=clock,
                max_new_tokens=SECOND,
                **settings,
            )
            its.append(clock.seconds)
    again, cached = (statistics.median(its) for its in seconds.values())
    return dict(
        engine=engine,
        tokens=longer.shape[1],
        cached_tokens=first.shape[1] - 1,
        again=again,
        cached=cached,
        ratio=cached / again,
        same=torch.equal(texts["again"], texts["cached"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--message", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    model, tokenizer = load_model(options)
    text = pathlib.Path(__file__).resolve().parents[1].joinpath("docs/drafters.md").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    history, message = ids[:, : options.history], ids[:, options.history :][:, : options.message]
    results = Results(options.output)
    header = conditions(model, "turns.py", sys.argv[1:])
    for engine in ("native", "torch"):
        row = measure(model, history, message, engine, options.repeats)
        results.save(header, row)
        print(
            f"{engine}: {row['cached']:.3f} s with the cache, {row['again']:.3f} s without"
            f" ({row['ratio']:.3f} ×); {'the same' if row['same'] else 'another'} text"
        )


if __name__ == "__main__":
    main()
