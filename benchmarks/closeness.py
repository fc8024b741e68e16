"""How near each way of computing a model is to the model itself: the mean Kullback-Leibler
divergence of next-token distributions to those of the model in float64, and how often the most
likely token is another one.

    python benchmarks/closeness.py --output closeness.jsonl
    python benchmarks/closeness.py --peers-python ENVIRONMENT/bin/python   # with llama.cpp, there

Texts are prompts of Spec-Bench and what the model answers greedily in float32; the answers' tokens
are counted, each with the whole text before it. float64 is the native pass, in which every number
is one; transformers makes norms, rotary tables and soft-max in float32 in any dtype. Its divergence
to the native pass stands in the table, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from common import SPECBENCH, Results, conditions, load_model, load_questions
from cpu import GGUF_FOLDER
from torch import Tensor

from msn_ext import generate
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.forward.packed import PackedPlan
from msn_ext.demo import source_file

OURS = "float64", "float32", "bfloat16", "float16", "int8"
TRANSFORMERS = "float64", "float32", "bfloat16"
LLAMA = "F32", "BF16", "F16", "Q8_0", "Q4_1"
WORKER = Path(__file__).with_name("closeness_llama.py")

Logits = Callable[[Tensor], Tensor]
"""Logits [T, V] of a text [1, T]."""


def native(model, weights: str) -> Logits:
    packed = PackedPlan(plan_for(model), weights)

    def logits(text: Tensor) -> Tensor:
        length = text.shape[1]
        new, none = NativeForward(packed, 1), torch.tensor([0])
        return new.read(text, torch.arange(length)[None], none, length)[0]

    return logits


def plain(model) -> Logits:
    return lambda text: model(input_ids=text).logits[0]


def llama(python: str, kind: str, texts: list[Tensor], folder: Path) -> Logits:
    """All texts' logits are computed at once, in the environment that has llama.cpp."""
    tokens, results = folder / "texts.npz", folder / f"{kind}.npz"
    numpy.savez(tokens, *(text[0].numpy() for text in texts))
    command = [python, WORKER, str(source_file()), GGUF_FOLDER, kind, tokens, results]
    subprocess.run(command, check=True)
    known = {bytes(text.numpy()): row for text, row in zip(texts, numpy.load(results).values())}
    return lambda text: torch.from_numpy(known[bytes(text.numpy())])


def texts_of(model, tokenizer, questions: list[dict], new_tokens: int) -> list[tuple[int, Tensor]]:
    """Return texts [1, T] of prompt and answer, each with its prompt's length."""
    found = []
    for number, question in enumerate(questions):
        ids = tokenizer.apply_chat_template(
            [dict(role="user", content=question["turns"][0])],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        found.append((ids.shape[1], generate(model, ids, max_new_tokens=new_tokens)))
        print(f"\ranswers: {number + 1} of {len(questions)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def compare(engine: Logits, truth: Logits, texts: list[tuple[int, Tensor]]) -> dict:
    """Return the figures of one way of computing the model."""
    divergence, other = [], []
    for prompt, text in texts:
        exact = truth(text)[prompt - 1 : -1].double().log_softmax(-1)
        found = engine(text)[prompt - 1 : -1].double().log_softmax(-1)
        divergence.append((exact.exp() * (exact - found)).sum(-1))
        other.append((exact.argmax(-1) != found.argmax(-1)).double())
    all_of = torch.cat(divergence)
    return dict(
        mean=all_of.mean().item(),
        error=(all_of.std() / len(all_of) ** 0.5).item(),
        p99=all_of.quantile(0.99).item(),
        another_token=torch.cat(other).mean().item(),
        tokens=len(all_of),
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--data", type=Path, default=SPECBENCH)
    parser.add_argument("--peers-python", help="of an environment with llama-cpp-python")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.model, options.dtype, options.device = None, "float32", "cpu"
    model, tokenizer = load_model(options)
    texts = texts_of(
        model, tokenizer, load_questions(options.data)[: options.prompts], options.new_tokens
    )
    results = Results(options.output)
    header = conditions(model, "closeness.py", sys.argv[1:])
    print(f"{'':26}{'mean KL':>10} ±      {'99 %':>10}{'another token':>15}")

    def report(name: str, engine: Logits) -> None:
        row = dict(engine=name, **compare(engine, truth, texts))
        results.save(header, row)
        print(
            f"{name:26}{row['mean']:10.2e} {row['error']:.0e}{row['p99']:10.2e}"
            f"{row['another_token']:14.2%}",
            flush=True,
        )

    truth = native(model, "float64")
    for weights in OURS[1:]:
        report(f"native {weights}", native(model, weights))
    if options.peers_python:
        with tempfile.TemporaryDirectory() as folder:
            for kind in LLAMA:
                known = llama(options.peers_python, kind, [text for _, text in texts], Path(folder))
                report(f"llama.cpp {kind}", known)
    for dtype in TRANSFORMERS:  # from the widest on: what is rounded stays so
        report(f"transformers {dtype}", plain(model.to(getattr(torch, dtype))))


if __name__ == "__main__":
    main()
