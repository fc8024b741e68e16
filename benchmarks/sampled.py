"""Time sampled decoding, by what people sample with (temperature, top-k, top-p): drafts and none,
draws from the candidates of top-k and from the whole vocabulary, and transformers.

    python benchmarks/sampled.py --output sampled.jsonl

All decode the first turns of Spec-Bench by turns, after one that is not counted. With the same seed
ours say the same, which is checked; transformers draws otherwise, and its text is as long as it is.
Seconds are those of whole calls, prompts included.
"""

import argparse
import pathlib
import sys
import time
from unittest import mock

import torch
from common import Results, conditions, load_model
from tails import turns
from tqdm import tqdm

from msn_ext import generate
from msn_ext.cli.common import positive_int
from msn_ext.decoding import candidates

WAYS = "none", "auto", "none, vocabulary", "auto, vocabulary", "transformers"


def answer(model, prompt: list[int], way: str, seed: int, settings: dict) -> list[int]:
    """Return the new tokens of one way."""
    ids = torch.tensor([prompt])
    settings = settings | dict(attention_mask=torch.ones_like(ids), do_sample=True)
    torch.manual_seed(seed)
    if way == "transformers":
        return model.generate(ids, **settings)[0, len(prompt) :].tolist()
    draft, _, whole = way.partition(", ")
    narrowing = (lambda _: None) if whole else candidates.narrowing
    with mock.patch.object(candidates, "narrowing", narrowing):
        return generate(model, ids, draft=draft, **settings)[0, len(prompt) :].tolist()


def race(model, prompt: list[int], ways: list[str], seed: int, settings: dict) -> list[dict]:
    """Return a row a way: its tokens and seconds.

    Raises:
        SystemExit: ours have not said the same.
    """
    rows, texts = [], {}
    for way in ways:
        start = time.perf_counter()
        text = answer(model, prompt, way, seed, settings)
        rows.append(dict(way=way, tokens=len(text), seconds=time.perf_counter() - start))
        if way != "transformers":
            texts[way] = text
    if any(text != texts["none"] for text in texts.values()):
        raise SystemExit("the texts differ")
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'':>18}  tokens/s"]
    for way in WAYS:
        its = [row for row in rows if row["way"] == way]
        rate = sum(row["tokens"] for row in its) / sum(row["seconds"] for row in its)
        lines.append(f"{way:>18}{rate:>10.1f}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--turns", type=positive_int, default=24, metavar="N")
    parser.add_argument("--new-tokens", type=positive_int, default=96, metavar="N")
    parser.add_argument("--output", type=pathlib.Path, help="append a line a turn and way to it")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    model, tokenizer = load_model(options)
    settings = dict(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.new_tokens,
        pad_token_id=0,
    )
    its = turns(tokenizer, options.turns)
    race(model, its[0]["prompt"], list(WAYS), 0, settings | dict(max_new_tokens=8))
    rows: list[dict] = []
    results, header = Results(options.output), conditions(model, "sampled.py", arguments)
    for number, turn in enumerate(tqdm(its, unit="turn")):
        ways = [*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]]
        for row in race(model, turn["prompt"], ways, number, settings):
            rows.append(dict(turn=number, prompt=len(turn["prompt"])) | row)
            results.save(header, rows[-1])
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
