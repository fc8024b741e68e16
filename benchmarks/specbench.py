"""Accept lengths of every drafter on Spec-Bench, by replay: drafters x categories x budgets, and an
ablation.

    python benchmarks/specbench.py --output results.jsonl            # all turns and drafters (hours
                                                                     on a CPU); goes on # where a
                                                                     file of the same drafters ends
    python benchmarks/specbench.py --prompts 24 --drafts paper,auto@64
    python benchmarks/specbench.py --check 6                         # also decode six turns for
    real, and compare python benchmarks/specbench.py --summary results.jsonl           # the table
    of files, nothing run

What a drafter gains is settled by the text that greedy decoding gives and by what the model says at
the nodes that the drafter asks for. So every turn is decoded once, greedily; then all drafters run
side by side on that text, as `msn_ext.generate` runs them, and what they ask for is computed in one
forward pass: a node is known by the place where its path leaves the text and by its tokens from
there, and is computed once for all. Of a node's logits the 16 largest are kept, which is more than
any drafter looks at; the rest counts as minus infinity. Drafters begin empty at every turn.
MT-bench's second turns are asked with the first answer.

MAT is tokens per forward pass, the prompt's pass included. It is high, too, where a model repeats
itself, so how much of the answers is new is said with it. "auto@N" is best-first drafting with N
nodes; "auto@64-NAME" leaves one source out ("foresight": no value for predictions of the next
step). Trees of a fixed shape have their own size: paper 69, recycling 81, lookahead up to 56;
chains: jacobi 6, lookup 8, suffix up to 60.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import random
import sys
from collections import defaultdict
from collections.abc import Generator

import torch
from decode import CATEGORIES, SHARED, Results, conditions, load_model
from torch import Tensor
from tqdm import tqdm

import msn_ext
from msn_ext import ops
from msn_ext.decoding import BestFirst, Draft, DraftTree, Verified
from msn_ext.decoding.cache import TreeCache
from msn_ext.decoding.drafters.best_first import SOURCES
from msn_ext.generation import drafter_for
from msn_ext.ops import MAX_NODES
from msn_ext.training.evaluation import new_trigrams

KEPT = 16
BUDGETS = (8, 16, 32, 64)
ABLATIONS = (*SOURCES, "foresight")
DRAFTS = (
    "paper",
    "jacobi",
    "lookup",
    "suffix",
    "recycling",
    "lookahead",
    *(f"auto@{budget}" for budget in BUDGETS),
    *(f"auto@64-{name}" for name in ABLATIONS),
)


def make_drafter(name: str):
    """Of :data:`DRAFTS`, or "jacobi@N": a chain of N guesses."""
    if name.startswith("jacobi@"):
        return drafter_for(DraftTree.chain(1 + int(name.removeprefix("jacobi@"))), None)
    if not name.startswith("auto@"):
        return drafter_for(name, None)
    budget, _, without = name.removeprefix("auto@").partition("-")
    options = {"foresight": 0.0} if without == "foresight" else {}
    return BestFirst(
        int(budget), sources=tuple(source for source in SOURCES if source != without), **options
    )


class Teacher:
    """What the model says behind a text, and behind paths that leave it.

    Args:
        model: full attention in every layer, which takes a dense mask.
        text: prompt and greedy continuation.
    """

    def __init__(self, model, text: list[int]):
        self._model, self._text = model, text
        self._cache = TreeCache(model.config.get_text_config(decoder=True))
        self._known: dict[
            tuple[int, ...], tuple[Tensor, Tensor]
        ] = {}  # place, path -> tokens and logits [KEPT]
        ids = torch.tensor([text], device=model.device)
        self._cache._reserve(len(text) + MAX_NODES)
        self._cache.at_start(len(text))
        hidden = model.base_model(
            input_ids=ids,
            position_ids=torch.arange(len(text), device=model.device)[None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._hidden = hidden[0]

    def say(self, start: int, paths: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The keys of the nodes that follow ``text[: start + 1]`` by ``paths`` (the root's is
        empty).
        """
        keys = []
        for path in paths:
            on = 0
            while (
                on < len(path)
                and start + 1 + on < len(self._text)
                and path[on] == self._text[start + 1 + on]
            ):
                on += 1
            keys.append((start + on, *path[on:]))
        return keys

    def learn(self, keys: set[tuple[int, ...]]) -> None:
        """Computes what is not known yet: nodes on the text at once, then at most 256 others a
        forward pass.
        """
        new = [key for key in keys if key not in self._known]
        on = [key[0] for key in new if len(key) == 1]
        if on:
            self._keep([(place,) for place in on], self._model.lm_head(self._hidden[on]))
        needed: dict[tuple[int, ...], int] = {}  # with all their ancestors, parents first
        for key in sorted((key for key in new if len(key) > 1), key=len):
            for end in range(2, len(key) + 1):
                if key[:end] not in needed:
                    needed[key[:end]] = len(needed)
            if len(needed) > MAX_NODES - 40:
                self._compute(needed)
                needed = {}
        self._compute(needed)

    def _compute(self, needed: dict[tuple[int, ...], int]) -> None:
        if not needed:
            return
        length, count, device = len(self._text), len(needed), self._model.device
        mask = torch.zeros(count, length + count, dtype=torch.bool)
        for key, node in needed.items():
            mask[node, : key[0] + 1] = True
            if len(key) > 2:
                mask[node, length:] = mask[needed[key[:-1]], length:]
            mask[node, length + node] = True
        self._cache.at(torch.tensor([length], device=device), count, length + count)
        logits = self._model(
            input_ids=torch.tensor([[key[-1] for key in needed]], device=device),
            attention_mask=mask[None, None].to(device),
            position_ids=torch.tensor([[key[0] + len(key) - 1 for key in needed]], device=device),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._keep(list(needed), logits[0])

    def _keep(self, keys: list[tuple[int, ...]], logits: Tensor) -> None:
        values, tokens = logits.float().topk(KEPT, dim=-1)
        for key, *row in zip(keys, tokens.cpu(), values.cpu()):
            self._known[key] = tuple(row)

    def __getitem__(self, keys: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Tokens [N, KEPT] and logits [N, KEPT]."""
        tokens, values = zip(*(self._known[key] for key in keys))
        return torch.stack(tokens), torch.stack(values)


def replay(
    drafter, teacher: Teacher, text: list[int], prompt: int, vocabulary: int, scratch: Tensor
) -> Generator:
    """Runs a drafter over a known text; yields the keys of the nodes of each pass, returns the
    accept lengths.

    The loop is that of ``msn_ext.decoding.Decoder``, with the model's answers from ``teacher``.
    """
    history = torch.zeros(1, len(text) + MAX_NODES, dtype=torch.int64)
    history[0, :prompt] = torch.tensor(text[:prompt])
    length = prompt
    drafter.start(1, vocabulary, torch.device("cpu"))
    accept_lengths = []
    while length < len(text):
        lengths = torch.tensor([length])
        if accept_lengths:
            draft = drafter.propose(history, lengths)
        else:
            guesses = drafter.first(history, lengths)
            chain = DraftTree.chain(1 + guesses.shape[1]).tensors(torch.device("cpu"))
            draft = Draft.shaped(torch.cat([history[:, length - 1 : length], guesses], 1), chain)
        parents, tokens = (
            draft.parents.expand(draft.tokens.shape)[0].tolist(),
            draft.tokens[0].tolist(),
        )
        paths = [()]
        for node in range(1, len(tokens)):
            alive = parents[node] >= 0 and paths[parents[node]] is not None
            paths.append((*paths[parents[node]], tokens[node]) if alive else None)
        keys = teacher.say(length - 1, [path or () for path in paths])
        yield set(keys)
        best, values = teacher[keys]
        targets = best[:, 0].clone()
        for node, key in enumerate(
            keys
        ):  # the text is right, also where two logits are as good as equal
            if len(key) == 1 and key[0] + 1 < len(text):
                targets[node] = text[key[0] + 1]
        logits = scratch[: len(keys)]
        logits.scatter_(1, best, values)
        accepted, path, _, continuation = ops.verify_tree(
            draft.tokens, targets[None], draft.parents
        )
        drafter.observe(
            Verified(
                draft, logits[None], targets[None], path, accepted, continuation, history, lengths
            )
        )
        logits.scatter_(1, best, -torch.inf)
        gained = min(int(accepted), len(text) - length)
        history[0, length : length + gained] = torch.tensor(text[length : length + gained])
        length += gained
        accept_lengths.append(gained)
    return accept_lengths


def replay_all(
    drafts: list[str], model, text: list[int], prompt: int, scratch: Tensor
) -> dict[str, list[int]]:
    """Accept lengths of every drafter; what all of them ask for next is computed together."""
    teacher = Teacher(model, text)
    results: dict[str, list[int]] = {}
    running = {
        name: replay(make_drafter(name), teacher, text, prompt, scratch.shape[1], scratch)
        for name in drafts
    }
    while running:
        asked: set[tuple[int, ...]] = set()
        for name, run in list(running.items()):
            try:
                asked |= next(run)
            except StopIteration as stop:
                results[name] = stop.value
                del running[name]
        teacher.learn(asked)
    return {name: results[name] for name in drafts}


def load_questions(path: pathlib.Path, skip: int, count: int | None) -> list[dict]:
    """Questions, in turn from every category: ``count`` or all behind the first ``skip``."""
    groups: dict[str, list] = {category: [] for category in CATEGORIES}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        group = row["category"] if row["category"] in groups else "mt_bench"
        groups[group].append(
            dict(category=group, question=row["question_id"], turns=row["turns"][:2])
        )
    in_turn = [
        group[i]
        for i in range(max(map(len, groups.values())))
        for group in groups.values()
        if i < len(group)
    ]
    return in_turn[skip:][:count]


@torch.no_grad()
def measure(
    model, tokenizer, questions, drafts, new_tokens, check: int, done: dict, save
) -> list[dict]:
    rows = []
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    scratch = torch.full((MAX_NODES, vocabulary), -torch.inf)
    bar = tqdm(
        total=sum(len(question["turns"]) for question in questions), unit="turn", disable=None
    )
    checked = random.Random(0).sample(range(len(questions)), min(check, len(questions)))
    for at, question in enumerate(questions):
        messages = []
        for turn, text in enumerate(question["turns"]):
            messages.append({"role": "user", "content": text})
            row = done.get((question["question"], turn))
            if row is None:
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                ).to(model.device)
                prompt = inputs["input_ids"].shape[1]
                # Each token is the model's own; which drafter finds it matters for near-ties at
                # most.
                out = msn_ext.generate(
                    model, **inputs, draft=BestFirst(16), do_sample=False, max_new_tokens=new_tokens
                )
                accept_lengths = replay_all(drafts, model, out[0].tolist(), prompt, scratch)
                row = dict(
                    category=question["category"],
                    question=question["question"],
                    turn=turn,
                    prompt=prompt,
                )
                row |= dict(tokens=out[0, prompt:].tolist(), accept_lengths=accept_lengths)
                if at in checked and turn == 0:
                    row["decoded"] = {
                        name: decode(model, inputs, name, new_tokens) for name in drafts
                    }
                save(row)
            rows.append(row)
            messages.append(
                {
                    "role": "assistant",
                    "content": tokenizer.decode(row["tokens"], skip_special_tokens=True),
                }
            )
            bar.update()
    bar.close()
    return rows


def decode(model, inputs, name: str, new_tokens: int) -> list[int]:
    """Accept lengths of real decoding."""
    settings = dict(do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True)
    return (
        msn_ext.generate(model, **inputs, draft=make_drafter(name), **settings)
        .accept_lengths[0]
        .tolist()
    )


def summarise(rows: list[dict]) -> str:
    """MAT of every drafter that all rows have in every category, the intervals by resampling
    questions.
    """
    drafts = [
        name
        for name in rows[0]["accept_lengths"]
        if all(name in row["accept_lengths"] for row in rows)
    ]
    lines = [
        f"{'MAT':<20}"
        + "".join(f"{category:>16}" for category in CATEGORIES)
        + f"{'all':>8}{'over paper':>14}{'95 %':>14}"
    ]
    for name in drafts:
        totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for row in rows:
            accepts = row["accept_lengths"][name]
            for key in (row["category"], "all"):
                totals[key][0] += sum(accepts)
                totals[key][1] += len(accepts)
        cells = [
            f"{totals[c][0] / totals[c][1]:>16.2f}" if totals[c][1] else f"{'':>16}"
            for c in CATEGORIES
        ]
        line = f"{name:<20}" + "".join(cells) + f"{totals['all'][0] / totals['all'][1]:>8.2f}"
        if "paper" in drafts:
            low, middle, high = ratio(rows, name, "paper")
            line += f"{middle:>13.2f}x" + f"{low:.2f}-{high:.2f}".rjust(14)
        lines.append(line)
    fresh = new_trigrams([row["tokens"] for row in rows])
    lines.append(
        f"{len(rows)} turns, {sum(len(row['tokens']) for row in rows)} tokens, {fresh:.0%} of an"
        " answer's trigrams new to it"
    )
    decoded = [row for row in rows if "decoded" in row]
    for name in drafts if decoded else ():
        replayed, real = (
            sum(len(row[key][name]) for row in decoded) for key in ("accept_lengths", "decoded")
        )
        lines.append(
            f"check on {len(decoded)} turns: {name:<20} {replayed:>6} passes replayed, {real:>6}"
            " decoded"
        )
    return "\n".join(lines)


def ratio(rows: list[dict], name: str, base: str) -> tuple[float, float, float]:
    """MAT of ``name`` over that of ``base``: 2.5 %, all turns, 97.5 % of 1000 resamples of
    questions.
    """
    questions: dict = defaultdict(lambda: [0, 0])
    for row in rows:
        for i, draft in enumerate((name, base)):
            questions[row["question"]][i] += len(row["accept_lengths"][draft])
    passes = list(questions.values())
    rng = random.Random(0)

    def of(part: list) -> float:  # the tokens are the same, so passes decide
        return sum(b for _, b in part) / sum(a for a, _ in part)

    resampled = sorted(of(rng.choices(passes, k=len(passes))) for _ in range(1000))
    return resampled[25], of(passes), resampled[974]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="path or id; the demo model where none is named")
    parser.add_argument(
        "--data", type=pathlib.Path, default=SHARED, help="a Spec-Bench question file"
    )
    parser.add_argument(
        "--prompts", type=int, help="questions, in turn from every category (default: all)"
    )
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        help="questions to leave out first (24 served to design auto)",
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--drafts", default=",".join(DRAFTS), help="comma-separated (default: all)")
    parser.add_argument(
        "--check", type=int, default=0, metavar="N", help="questions that are also decoded for real"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["float64", "float32", "float16", "bfloat16"]
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="JSON lines: conditions, then a line per turn"
    )
    parser.add_argument(
        "--summary",
        type=pathlib.Path,
        nargs="+",
        help="print the table of such files together and stop",
    )
    options = parser.parse_args(arguments)
    drafts = options.drafts.split(",")
    if unknown := set(drafts) - set(DRAFTS):
        parser.error(
            f"--drafts has {', '.join(sorted(unknown))}; expected some of {', '.join(DRAFTS)}"
        )
    if options.summary:
        files = [Results(path) for path in options.summary]
        for path, results in zip(options.summary, files):
            if not results.rows:
                parser.error(f"--summary {path} holds no results")
        for results in files:
            print(json.dumps(results.lines[0]))
        print(summarise([row for results in files for row in results.rows]))
        return 0
    results = Results(options.output)
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file; expected Spec-Bench's question.jsonl")

    done = {(row["question"], row["turn"]): row for row in results.rows}
    if done and list(results.rows[0]["accept_lengths"]) != drafts:
        parser.error(
            f"--output {options.output} holds other drafters; expected the same, or another file"
        )
    model, tokenizer = load_model(options)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "sliding_window", None) or set(
        getattr(config, "layer_types", None) or ()
    ) - {"full_attention"}:
        parser.error(
            f"--model {options.model}: it has sliding windows; replay needs full attention in every"
            " layer"
        )
    header = conditions(model, "specbench.py", arguments)
    save = functools.partial(results.save, header)
    questions = load_questions(options.data, options.skip, options.prompts)
    rows = measure(
        model, tokenizer, questions, drafts, options.new_tokens, options.check, done, save
    )
    print(json.dumps(header))
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
