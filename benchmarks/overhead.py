"""What a step costs besides its forward pass: drafting, verification, commit, the loop.

    OMP_NUM_THREADS=2 python benchmarks/overhead.py --json out.jsonl
    python benchmarks/overhead.py --draft auto
    python benchmarks/overhead.py --engine native --logits bfloat16

With ``--engine native`` the demo model decodes, and its passes' own seconds are left out. Else the
real loop, decoder and drafter run on the demo model's vocabulary. The forward pass is a record:
the model's logits after every token of one greedy text, given for the nodes that lie on that text,
and for the others those of some other place; so drafts are accepted about as often as with the
model. Its time is left out. Microseconds a step, median and 90 % quantile over the steps of ROUNDS
calls; each part without the parts inside it.
"""

import argparse
import contextlib
import pathlib
import statistics
import sys
import time
from collections import defaultdict
from unittest import mock

import torch
from common import Results, conditions, load_model

from msn_ext import ops
from msn_ext.decoding import (
    BestFirst,
    DraftTree,
    Request,
    TreeDrafter,
    decode,
    decoder,
    loop,
    native_steps,
)
from msn_ext.decoding.forward.protocol import Answers

PROMPT = "Explain in a few sentences why the sky is blue, and why sunsets are red."
PARTS = ("propose", "verify", "observe", "commit", "advance", "wait", "rest")
ROUNDS = 3
WEIGHTS = 64 << 20
"""Bytes that the record reads in a pass, as a model its weights: the rest finds cold caches."""


class Record:
    """A forward pass that was computed before.

    Args:
        text: int64 [T].
        logits: [T, V], after every token of it.
    """

    nbytes = 0

    def __init__(self, text: torch.Tensor, logits: torch.Tensor):
        self._text, self._logits = text.tolist(), logits
        self._weights = torch.zeros(WEIGHTS, dtype=torch.uint8)

    def clear(self) -> None:
        pass

    def read(self, ids, positions, offsets, keep, start=0):
        return self._say(ids[0, -keep:].tolist(), positions[0, -keep:].tolist())

    def check(self, tokens, positions, *_):
        return Answers(self._say(tokens[0].tolist(), positions[0].tolist()))

    def commit(self, prefix, path, accepted) -> None:
        pass

    def _say(self, tokens, positions):
        """A token where the text has it counts as its continuation: what precedes it is not looked
        at.
        """
        last = len(self._text) - 1
        places = [
            at if at <= last and self._text[at] == token else (31 * at + token) % last
            for token, at in zip(tokens, positions)
        ]
        self._weights.view(torch.int64).sum()
        return self._logits[torch.tensor(places)][None]


class Stopwatch:
    """Times calls by name, each without the timed calls inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def __call__(self, name, function):
        def timed(*args, **kwargs):
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.spent[name] += took - self._inside.pop()
                self._inside[-1] += took

        return timed


def record(model, tokenizer, tokens: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Return the slots of the prompt, and a text [T] that is greedy after it with its logits
    [T, V].
    """
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        text = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        logits = model(text).logits[0]
    start = prompt.shape[1]
    # Where the two passes round differently, the record has the last word.
    text[0, start:] = logits[start - 1 : -1].argmax(-1)
    return start, text[0], logits


def measure(model, start, text, logits, draft: str) -> tuple[list[dict], float]:
    """Return the seconds of the steps by part, and the mean accept length."""
    steps: list[dict] = []
    drafter = drafter_of(draft)
    watch = Stopwatch()
    forward = Record(text, logits)
    forward.check, forward.commit = watch("forward", forward.check), watch("commit", forward.commit)
    drafter.propose = watch("propose", drafter.propose)
    drafter.observe = watch("observe", drafter.observe)
    request = Request.greedy_unpadded(
        model, text[None, :start].clone(), drafter, len(text) - start - 1, engine="torch"
    )
    with contextlib.ExitStack() as patches:
        put = lambda where, name, new: patches.enter_context(mock.patch.object(where, name, new))  # noqa: E731
        put(decoder, "TransformersForward", lambda *_: forward)
        put(ops, "verify_logits", watch("verify", ops.verify_logits))
        put(ops, "advance_text", watch("advance", ops.advance_text))
        put(decoder.PassResult, "to_host", watch("wait", decoder.PassResult.to_host))
        add, began = loop.Progress.add, [time.perf_counter()]

        def end_of_step(progress, counts):
            add(progress, counts)
            now = time.perf_counter()
            whole = now - began[0] - watch.spent.pop("forward", 0.0)
            steps.append({**watch.spent, "total": whole, "rest": whole - sum(watch.spent.values())})
            watch.spent.clear()
            began[0] = time.perf_counter()

        put(loop.Progress, "add", end_of_step)
        decoded = decode(request)
    expected = text[: decoded.sequences.shape[1]]
    assert torch.equal(decoded.sequences[0], expected), "drafts have changed the text"
    accepts = decoded.accept_lengths()[0]
    return steps[2:], accepts[1:].double().mean().item()


def measure_native(model, start, text, draft: str) -> tuple[list[dict], float]:
    """Return the seconds of the native engine's steps without and with their passes, and the mean
    accept length.
    """
    steps, made = [], []

    class Steps(native_steps.NativeSteps):
        def __init__(self, *args, **texts):
            super().__init__(*args, **texts)
            made.append(self)

    drafter = TreeDrafter(DraftTree.chain(1)) if draft == "none" else drafter_of(draft)
    request = Request.greedy_unpadded(
        model, text[None, :start].clone(), drafter, len(text) - start - 1, engine="native"
    )
    add, before = loop.Progress.add, [0.0, 0.0]

    def end_of_step(progress, counts):
        add(progress, counts)
        passes, now = made[0].pass_seconds, time.perf_counter()
        of_pass = passes - before[1]
        whole = now - before[0]
        steps.append({"total": whole - of_pass, "pass": of_pass})
        before[:] = time.perf_counter(), passes

    with (
        mock.patch.object(decoder, "NativeSteps", Steps),
        mock.patch.object(loop.Progress, "add", end_of_step),
    ):
        decoded = decode(request)
    return steps[2:], decoded.accept_lengths()[0][1:].double().mean().item()


def drafter_of(draft: str) -> BestFirst:
    return BestFirst(None if draft == "auto" else int(draft))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or a name on the hub; the demo model without")
    parser.add_argument("--draft", default="8,auto", help="nodes, or auto; several by commas")
    parser.add_argument("--engine", choices=("torch", "native"), default="torch")
    parser.add_argument("--tokens", type=int, default=384, help="of the recorded text")
    parser.add_argument("--logits", default="float32", help="dtype that they come in")
    parser.add_argument("--json", type=pathlib.Path, help="append the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    options.dtype, options.device = "float32", "cpu"
    model, tokenizer = load_model(options)
    start, text, logits = record(model, tokenizer, options.tokens)
    logits = logits.to(getattr(torch, options.logits))
    text[start:] = logits[start - 1 : -1].float().argmax(-1)  # rounded, others may be first
    native, results = options.engine == "native", Results(options.json)
    parts = ("total", "pass") if native else ("total", *PARTS)
    if native:
        model = model.to(logits.dtype)
    print(f"{'us a step':>22}" + "".join(f"{part:>12}" for part in parts))
    for draft in options.draft.split(","):
        steps, accepts = [], 0.0
        for _ in range(ROUNDS):
            if native:
                some, accepts = measure_native(model, start, text, draft)
            else:
                some, accepts = measure(model, start, text, logits, draft)
            steps += some
        row = dict(engine=options.engine, draft=draft, logits=options.logits, steps=len(steps))
        row |= dict(accept_length=accepts)
        for part in parts:
            times = sorted(1e6 * step.get(part, 0.0) for step in steps)
            row[part] = dict(median=statistics.median(times), p90=times[int(0.9 * len(times))])
        cells = (f"{row[part]['median']:5.0f} {row[part]['p90']:5.0f}" for part in parts)
        print(
            f"{draft:>8} {options.logits:>8} {accepts:4.2f}" + "".join(map("{:>12}".format, cells))
        )
        results.save(conditions(model, "overhead.py", arguments), row)


if __name__ == "__main__":
    main(sys.argv[1:])
