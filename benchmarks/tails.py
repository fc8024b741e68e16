"""What rows of noise behind a draft tree are worth, whatever computing them costs.

    python benchmarks/tails.py --adapter 300=DIR/checkpoint-300 --fit DIR/answers.jsonl \\
        --output tails.jsonl
    python benchmarks/tails.py --summary tails.jsonl

A tail is a chain of L noise rows below a node of the tree, which a gated adapter computes. Where
the accepted path ends at that node, what it says are guesses for the next tree, in the place of the
denoised ones of a rejected node. What a tail below the text's t-th token says depends on the text
up to there alone. So it is computed once for every place of a text that was decoded greedily; all
drafters then run side by side on that text (``replay.py``) and look there what a tail would have
said. Their trees are of N nodes in all: N - K L of drafts and K tails of L rows, below the nodes
where the path most likely ends: p(node) - sum of p(children). "free" ones have N nodes beside the
tails; 256 tails are one wherever the path ends.

Adapters are PEFT folders that ``msn train --gate`` made, or simulated from one: NAME=PATH@TOP,EIGHT
raises, place by place, how often the right token is the first of the guesses, and among the eight.
The factors of tails' guesses are fitted for every adapter to answers of its training's held-out
part (--fit). Texts are turns of Spec-Bench, MT-bench's second ones, too. MAT is tokens per forward
pass, the prompt's pass included; intervals by resampling questions.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pathlib
import random
import sys
from dataclasses import dataclass

import torch
from common import SPECBENCH, Results, conditions, load_model, load_questions
from replay import replay_all
from specbench import ratio
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import msn_ext
from msn_ext import ops
from msn_ext.decoding import BestFirst
from msn_ext.decoding.drafters import calibration, factors
from msn_ext.gates import gated_noise
from msn_ext.training.data import prompt_ids

LONGEST = 2  # noise rows of a tail
ROWS = 256  # of noise computed at once
NEW_TOKENS = 64


# ---- what tails say ------------------------------------------------------------------------------


@torch.no_grad()
def said_by_tails(model, text: list[int], prompt: int, content) -> Tensor:
    """Return what a tail below every token from the prompt's last on says: int32 [T, LONGEST, 8],
    as :func:`msn_ext.ops.top_guesses` packs it; -1 before.

    Args:
        model: PEFT's, with the gated adapter.
        content: of the noise: a token id, or "ahead": tokens of the text before.
    """
    found = torch.full((len(text), LONGEST, ops.GUESSES), -1, dtype=torch.int32)
    ids, generator = torch.tensor([text]), torch.Generator().manual_seed(len(text))
    cache = DynamicCache()
    with model.disable_adapter():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    per = ROWS // LONGEST
    for at in range(prompt - 1, len(text), per):
        ends = torch.arange(at, min(at + per, len(text))).repeat_interleave(LONGEST)
        row = torch.arange(len(ends))
        depth = row % LONGEST
        if content == "ahead":
            drawn = (torch.rand(len(ends), generator=generator) * (ends + 1)).long()
            tokens = ids[0, drawn]
        else:
            tokens = torch.full_like(ends, content)
        mask = torch.zeros(len(ends), len(text) + len(ends), dtype=torch.bool)
        mask[:, : len(text)] = torch.arange(len(text)) <= ends[:, None]
        same = row[:, None] // LONGEST == row // LONGEST
        mask[:, len(text) :] = same & (row <= row[:, None])
        logits = model(
            input_ids=tokens[None],
            position_ids=(ends + 1 + depth)[None],
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
        ).logits
        cache.crop(-len(ends))
        guesses = ops.top_guesses(logits.float())[0].view(-1, LONGEST, ops.GUESSES)
        found[at : at + len(guesses)] = guesses
    return found


def accuracy(said: Tensor, text: list[int], prompt: int) -> Tensor:
    """Return places, right ones and right among eight, int64 [3, LONGEST], of an answer."""
    counts = torch.zeros(3, LONGEST, dtype=torch.int64)
    ids = torch.tensor(text)
    for depth in range(LONGEST):
        truth = ids[prompt + 1 + depth :]
        right = said[prompt - 1 :][: len(truth), depth] >> 4 == truth[:, None]
        counts[:, depth] += torch.tensor([len(truth), int(right[:, 0].sum()), int(right.sum())])
    return counts


def better(said: Tensor, text: list[int], prompt: int, top: float, eight: float, seed: int):
    """Return what a better adapter might say: the right token, where it is not the first of the
    guesses or not among them, becomes so at as many places as ``top`` and ``eight`` ask for. The
    same share of what is missing at every depth, so that later rows stay worse.
    """
    said, generator = said.clone(), random.Random(seed)
    places, first, among = accuracy(said, text, prompt).double()
    # Shares that are raised: of the places where it is missing, and of those where it is not first.
    lift = max(0.0, (eight - among[0] / places[0]) / (1 - among[0] / places[0]).clamp(min=1e-9))
    reached = max(eight, float(among[0] / places[0]))
    raise_top = max(0.0, (top - first[0] / places[0]) / (reached - first[0] / places[0]))
    for place in range(prompt - 1, len(text)):
        for depth in range(LONGEST):
            truth = text[place + 2 + depth : place + 3 + depth]
            row = said[place, depth]
            ranks = [
                i for i, guess in enumerate(row.tolist()) if guess >> 4 == (truth or [None])[0]
            ]
            if not truth or ranks == [0]:
                continue
            if not ranks:
                if generator.random() >= lift:
                    continue
                ranks = [generator.randrange(1, ops.GUESSES)]
                row[ranks[0]] = truth[0] << 4 | int(row[ranks[0]]) & 15
            if generator.random() < raise_top:
                level = int(row[0]) & 15
                row[1 : ranks[0] + 1] = row[: ranks[0]].clone()
                row[0] = truth[0] << 4 | level
    return said


# ---- drafting with them --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """N nodes in all, of which ``tails`` tails of ``length`` rows; ``free``: beside them."""

    nodes: int
    tails: int = 0
    length: int = 0
    free: bool = False

    @property
    def name(self) -> str:
        if not self.tails:
            return f"{self.nodes}"
        return f"{self.nodes}:{self.tails}x{self.length}" + (":free" if self.free else "")

    @classmethod
    def of(cls, name: str) -> Shape:
        nodes, *rest = name.split(":")
        tails, length = rest[0].split("x") if rest else (0, 0)
        return cls(int(nodes), int(tails), int(length), rest[1:] == ["free"])

    @property
    def drafted(self) -> int:
        return self.nodes if self.free else self.nodes - self.tails * self.length


class TailDrafter(BestFirst):
    """Best-first drafting with tails that are looked up.

    Args:
        said: of :func:`said_by_tails`; None: no tails.
        tail_factors: as ``factors``, where the guesses are a tail's.
    """

    def __init__(self, shape: Shape, said: Tensor | None, tail_factors: Tensor):
        super().__init__(shape.drafted, tails=False)
        self._shape, self._said, self._usual = shape, said, self._factors
        self._tail_factors = tail_factors
        self.hit = False  # whether the next draft has a tail's guesses

    def observe(self, verified) -> None:
        super().observe(verified)
        count = int(verified.accept_length[0])
        end = int(verified.path[0, count - 1])
        place = int(verified.lengths[0]) - 1 + count - 1
        self.hit = (
            self._said is not None
            and verified.draft is self.draft
            and place < len(self._said)
            and (self._shape.tails >= ops.MAX_NODES or end in self._ends(verified))
        )
        self._factors = self._tail_factors if self.hit else self._usual
        if self.hit:
            self.denoised.guesses[0].fill_(-1)
            length = self._shape.length
            self.denoised.guesses[0, :length] = self._said[place, :length]

    def _ends(self, verified) -> list[int]:
        draft, text = self.draft, (verified.history, verified.lengths)
        chances = self.probability[:, : len(draft)]
        found = ops.append_tails(
            draft.tokens, draft.parents, chances, *text, len(draft), self._shape.tails, 1, 0
        )
        return found[-1][0].tolist()


class TailRecorder(calibration.FactorRecorder):
    """Keeps records of nodes whose drafts have a tail's guesses."""

    def _record(self, verified, suffixes) -> None:
        if self._best_first.hit:
            super()._record(verified, suffixes)


def decode(model, prompt: list[int], drafter, new_tokens: int) -> tuple[list[int], list[int]]:
    """Return the text, prompt included, and the accept lengths."""
    ids = torch.tensor([prompt])
    out = msn_ext.generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        draft=drafter,
        do_sample=False,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
    )
    return out.sequences[0].tolist(), out.accept_lengths[0].tolist()


# ---- adapters ------------------------------------------------------------------------------------


class Adapter:
    """An adapter of ``--adapter``: what its tails say of a text, and their factors."""

    def __init__(self, given: str, base, dtype):
        from peft import PeftModel

        self.name, _, rest = given.partition("=")
        path, _, simulated = rest.partition("@")
        self._simulated = [float(x) for x in simulated.split(",")] if simulated else None
        self._model = PeftModel.from_pretrained(base, path).to(dtype).eval()
        noise = gated_noise(self._model.peft_config["default"])
        if noise is None:
            raise SystemExit(f"--adapter {path}: it is not gated; expected one of msn train --gate")
        self.content = noise["content"]
        self.counts = torch.zeros(3, LONGEST, dtype=torch.int64)
        self.factors = factors.load()

    def say(self, text: list[int], prompt: int) -> Tensor:
        said = said_by_tails(self._model, text, prompt, self.content)
        if self._simulated:
            said = better(said, text, prompt, *self._simulated, seed=len(text))
        self.counts += accuracy(said, text, prompt)
        return said

    def fit(self, model, texts: list[tuple[list[int], int]]) -> None:
        records: list = []
        always = Shape(64, 256, LONGEST, free=True)
        for text, prompt in tqdm(texts, desc=f"factors of {self.name}", unit="text", leave=False):
            drafter = TailDrafter(always, self.say(text, prompt), self.factors)
            decode(model, text[:prompt], TailRecorder(records, drafter), len(text) - prompt)
        self.factors, before, after = calibration.fit(records, self.factors)
        print(
            f"{self.name}: {len(records):,} nodes, log-likelihood {before:.3f} to {after:.3f};"
            f" {shown(self.counts)}",
            flush=True,
        )
        self.counts.zero_()


def shown(counts: Tensor) -> str:
    places, first, among = counts.double()
    top = " / ".join(f"{100 * x:.0f}" for x in (first / places).tolist())
    eight = " / ".join(f"{100 * x:.0f}" for x in (among / places).tolist())
    return f"right {top} %, among eight {eight} %"


# ---- the run -------------------------------------------------------------------------------------


def turns(tokenizer, count: int) -> list[dict]:
    """Return first turns of Spec-Bench, one of each category in turn."""
    return [
        dict(
            category=question["category"],
            question=question["question"],
            prompt=prompt_ids(tokenizer, [{"role": "user", "content": question["turns"][0]}]),
        )
        for question in load_questions(SPECBENCH)[:count]
    ]


def fitting_texts(tokenizer, path: pathlib.Path, count: int, new_tokens: int) -> list:
    """Return answers (text, tokens of its prompt) of a file of ``msn train --self-distill``: its
    first lines.
    """
    texts = []
    for line in itertools.islice(path.open(encoding="utf-8"), count):
        row = json.loads(line)
        prompt = prompt_ids(tokenizer, row["messages"])
        texts.append((prompt + row["tokens"][:new_tokens], len(prompt)))
    return texts


def measure(
    model,
    adapters: list[Adapter],
    shapes: list[Shape],
    text: list[int],
    prompt: int,
    scratch: Tensor,
) -> dict:
    """Return what tails say of a text, as counts, and accept lengths by adapter and shape."""
    usual, accuracies = factors.load(), {}
    drafters = {shape.name: TailDrafter(shape, None, usual) for shape in shapes if not shape.tails}
    for adapter in adapters:
        said = adapter.say(text, prompt)
        accuracies[adapter.name] = accuracy(said, text, prompt).tolist()
        drafters |= {
            f"{adapter.name} {shape.name}": TailDrafter(shape, said, adapter.factors)
            for shape in shapes
            if shape.tails
        }
    accept_lengths = replay_all(drafters, model, text, prompt, scratch)
    return {"accuracy": accuracies, "accept_lengths": accept_lengths}


@torch.no_grad()
def measure_all(model, tokenizer, adapters, shapes, questions, new_tokens, done, save):
    """Return a row for every turn of these questions; those that are not in ``done`` are saved."""
    rows = []
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    scratch = torch.full((ops.MAX_NODES, vocabulary), -torch.inf)
    count = sum(len(question["turns"]) for question in questions)
    with tqdm(total=count, unit="turn") as bar:
        for question in questions:
            messages: list[dict] = []
            for turn, asked in enumerate(question["turns"]):
                messages.append({"role": "user", "content": asked})
                row = done.get((question["question"], turn))
                if row is None:
                    ids = prompt_ids(tokenizer, messages)
                    text, _ = decode(model, ids, BestFirst(16), new_tokens)
                    row = {name: question[name] for name in ("category", "question")}
                    row |= {"turn": turn, "prompt": len(ids), "tokens": text[len(ids) :]}
                    row |= measure(model, adapters, shapes, text, len(ids), scratch)
                    save(row)
                rows.append(row)
                said = tokenizer.decode(row["tokens"], skip_special_tokens=True)
                messages.append({"role": "assistant", "content": said})
                bar.update()
    return rows


def summarise(rows: list[dict]) -> str:
    """Return a line a shape: MAT, and the ratio to no tails at the same N."""
    names = [n for n in rows[0]["accept_lengths"] if all(n in r["accept_lengths"] for r in rows)]
    tokens = sum(sum(row["accept_lengths"][names[0]]) for row in rows)
    lines = [f"{len(rows)} turns, {tokens:,} tokens"]
    for adapter in rows[0].get("accuracy", {}):
        counts = sum(torch.tensor(row["accuracy"][adapter]) for row in rows)
        lines.append(f"{adapter}: {shown(counts)}")
    for name in names:
        nodes = name.split()[-1].split(":")[0]
        mat = sum(sum(r["accept_lengths"][name]) for r in rows) / sum(
            len(r["accept_lengths"][name]) for r in rows
        )
        line = f"{name:<28}{mat:>8.3f}"
        if name != nodes and nodes in names:
            low, middle, high = ratio(rows, name, nodes)
            line += f"{middle:>9.3f} x  {low:.3f}-{high:.3f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH[@TOP,EIGHT]")
    parser.add_argument(
        "--shapes", default="8,16,64,64:256x2:free,64:4x2", metavar="N[:KxL[:free]],…"
    )
    parser.add_argument("--fit", type=pathlib.Path, help="answers.jsonl of msn train")
    parser.add_argument("--fit-texts", type=int, default=30, help="how many of them (default: 30)")
    parser.add_argument(
        "--keep-factors", type=pathlib.Path, help="write those of the first adapter there"
    )
    parser.add_argument("--questions", type=int, default=60, help="of Spec-Bench (default: 60)")
    parser.add_argument("--skip", type=int, default=0, help="questions to leave out first")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--summary", type=pathlib.Path)
    options = parser.parse_args()
    if options.summary:
        print(summarise(Results(options.summary).rows))
        return
    options.device = "cpu"
    model, tokenizer = load_model(options)
    adapters = []
    for given in options.adapter:
        base, _ = load_model(options)
        adapters.append(Adapter(given, base, model.dtype))
    if options.fit:
        texts = fitting_texts(tokenizer, options.fit, options.fit_texts, options.new_tokens)
        for adapter in adapters:
            adapter.fit(model, texts)
        if options.keep_factors:
            about = {"adapter": adapters[0].name, "texts": len(texts)}
            tables = about | factors.tables(adapters[0].factors)
            options.keep_factors.write_text(json.dumps(tables, indent=1) + "\n")
    shapes = [Shape.of(name) for name in options.shapes.split(",")]
    header = conditions(model, "tails.py", sys.argv[1:])
    results = Results(options.output)
    rows = measure_all(
        model,
        tokenizer,
        adapters,
        shapes,
        load_questions(SPECBENCH)[options.skip :][: options.questions],
        options.new_tokens,
        {(row["question"], row["turn"]): row for row in results.rows},
        functools.partial(results.save, header),
    )
    print(summarise(rows))


if __name__ == "__main__":
    main()
