"""The common part of the benchmarks: a model, its questions, files of results."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Iterable, Sequence

import torch
import transformers
from machine import git_commit

import msn_ext
from msn_ext.jsonl import whole_rows

BENCHMARKS = pathlib.Path(__file__).resolve().parent
SPECBENCH = BENCHMARKS.parents[1] / "shared" / "data" / "bench" / "specbench_dev.jsonl"
CATEGORIES = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")


def load_model(options) -> tuple:
    """Return the model that the options ``model``, ``dtype`` and ``device`` name, and its
    tokenizer.
    """
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        from msn_ext.demo import load_model

        model, tokenizer = load_model()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    return model.to(options.device, dtype).eval(), tokenizer


def load_questions(path: pathlib.Path) -> list[dict]:
    """Return the questions of a Spec-Bench file, one of each category in turn: ``category``, the
    id ``question``, and their first two ``turns``.
    """
    groups: dict[str, list[dict]] = {category: [] for category in CATEGORIES}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        category = row["category"] if row["category"] in groups else "mt_bench"
        groups[category].append(
            dict(category=category, question=row["question_id"], turns=row["turns"][:2])
        )
    return [
        group[i]
        for i in range(max(map(len, groups.values())))
        for group in groups.values()
        if i < len(group)
    ]


def conditions(model, program: str, arguments: list[str]) -> dict:
    """Return what the figures depend on, for the record."""
    device = (
        torch.cuda.get_device_name()
        if model.device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return dict(
        command=f"python benchmarks/{program} " + " ".join(arguments),
        commit=git_commit(),
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
        torch=torch.__version__,
        transformers=transformers.__version__,
        msn_ext=msn_ext.build_info(),
    )


class Results:
    """JSON lines: the conditions, then rows, each written at once. Without a path nothing is
    kept.
    """

    def __init__(self, path: pathlib.Path | None):
        self._path = path
        self.lines: list[dict] = whole_rows(path) if path else []

    @property
    def rows(self) -> list[dict]:
        return self.lines[1:]

    def save(self, header: dict, row: dict) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = [row] if self.lines else [header, row]
        self.lines += fresh
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in fresh)


def fewer_passes(pairs: Iterable[Sequence[int]]) -> tuple[float, float, float]:
    """Return how many times as many passes one way takes as another, which is also the ratio of
    their MAT, the tokens being the same: 2.5 %, all questions, 97.5 % of 1000 resamples.

    Args:
        pairs: of every question, the passes of the better way and of the other.
    """
    pairs, rng = list(pairs), random.Random(0)

    def of(part: list) -> float:
        return sum(other for _, other in part) / sum(better for better, _ in part)

    resampled = sorted(of(rng.choices(pairs, k=len(pairs))) for _ in range(1000))
    return resampled[25], of(pairs), resampled[974]
