"""``msn train``: noisy fine-tuning, from a file to a model with better guesses."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msn_ext.paths import no_room, replacing
from msn_ext.recipe.settings import (
    NoiseSettings,
    SampleSettings,
    TrainSettings,
    check_gate,
    decided,
    options,
)

from .common import CommandError, UsageError, add_device_option, one_line
from .loading import load
from .settings import add_settings, settings_from

SETTINGS, ANSWERS, FIGURES = "settings.json", "answers.jsonl", "figures.json"
ADVICE = (
    "before you use it, try --gate, which cannot change what the model says, --self-distill, or a"
    " lower --learning-rate"
)
HELP = "fine-tune a model with noise, so that more of its guesses are right"
DESCRIPTION = (
    "Fine-tune a model so that it guesses well what it will say next (Make Some Noise):"
    " from conversations to an adapter, with losses, accuracy after noise and accept"
    " lengths before and after. Run again after an interruption, it goes on where it was."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a folder or a hub id (default: the demo model)"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE_OR_ID",
        help="JSON lines (.gz too) with messages, or prompt and response; or a dataset of the hub",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="for checkpoints, the adapter and the figures",
    )
    add_settings(parser, SampleSettings())
    add_settings(parser.add_argument_group("noise"), NoiseSettings())
    add_settings(parser.add_argument_group("training"), TrainSettings())
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from msn_ext.terminal import quiet_transformers

    _check_machine(arguments)
    try:
        check_gate(vars(arguments), _option)
    except ValueError as error:
        raise UsageError(str(error)) from error
    sampling = settings_from(arguments, SampleSettings())
    noise = settings_from(arguments, NoiseSettings())
    training = settings_from(arguments, TrainSettings())
    noise, training = decided(noise, training, sampling.self_distill)
    # As versions before have recorded them, whose defaults of a gate were others.
    arguments.teacher = "base" if noise.teacher == "base" else None
    vars(arguments).update(noise.chosen() | ({} if noise.gate else {"segments": noise.segments}))
    conversations = _read(arguments.data, sampling.samples)
    folder = _Folder(arguments.output, _recorded(arguments, conversations))
    folder.check_settings()
    model, tokenizer, _ = load(arguments.model, "float32", arguments.device)
    recipe = _Recipe(arguments, sampling, noise, training, folder, model, tokenizer)
    learned, held = recipe.split(conversations)
    started = time.time()
    with quiet_transformers(), _room_in(arguments.output):
        samples, evaluated = recipe.samples(learned, held)
        folder.keep_settings()
        labels = sum(label >= 0 for sample in samples for label in sample["labels"])
        print(
            f"{len(samples):,} samples, {labels:,} tokens to learn; {len(evaluated)} held out",
            flush=True,
        )
        figures = folder.figures()
        if "before" not in figures:
            figures["before"] = recipe.measure(recipe.model, evaluated, held)
            folder.keep_figures(figures)
        _report(figures)
        if "after" in figures:
            print(f"trained already, in {folder.path}")
            return 0
        trained = recipe.train(samples, figures)
        figures["after"] = recipe.measure(trained, evaluated, held)
        figures |= recipe.judged(figures)
        figures["seconds"] = round(time.time() - started)
        folder.keep_figures(figures)
    _report(figures)
    what = ""
    if noise.gate:
        print("text: the base model's, whose logits are what they were; after noise: the adapter's")
        what = ", a gated adapter, which stays beside the model"
    print(f"kept in {folder.path}{what}; use it with --model {arguments.output}")
    return 0


@contextlib.contextmanager
def _room_in(output: str) -> Iterator[None]:
    """Name the option where the disk is full; what was written whole is resumed from."""
    try:
        yield
    except Exception as error:
        if (why := no_room(error)) is None:
            raise
        raise CommandError(
            f"--output {output}: {why}; with room there, the same command goes on"
        ) from error


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _check_machine(arguments: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(
            "msn train is one process; in several, use msn_ext.add_noise in a trainer of your own"
        )
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise CommandError(f"training needs {error.name}: pip install {error.name}") from error
    if (arguments.device or "").startswith("cuda:") and arguments.device != "cuda:0":
        raise CommandError(
            f"--device {arguments.device}: a Trainer takes the first GPU that it sees; set"
            " CUDA_VISIBLE_DEVICES instead"
        )


def _read(sources: list[str], count: int | None) -> list:
    """Return so many conversations, or all, as many of each source."""
    from msn_ext.jsonl import draw
    from msn_ext.training.data import read_conversations

    try:
        files = [read_conversations(os.path.expanduser(source)) for source in sources]
    except OSError as error:
        where = (
            f"--data {error.filename}: {error.strerror}"
            if error.filename
            else f"--data: {one_line(error)}"
        )
        raise CommandError(where) from error
    except ValueError as error:
        raise CommandError(f"--data {error}") from error
    return draw(files, count or sum(map(len, files)))


@dataclass
class _Recipe:
    """The steps of one run, and what they share."""

    arguments: argparse.Namespace
    sampling: SampleSettings
    noise: NoiseSettings
    training: TrainSettings
    folder: _Folder
    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        from msn_ext.recipe.samples import context_of
        from msn_ext.training.layouts import check_branches

        if self.noise.layout == "branch":
            check_branches(self.model.config.get_text_config(decoder=True))
        self.context = context_of(self.model)
        longest = min(self.sampling.max_new_tokens, self.context // 2)
        self.sampling = replace(self.sampling, max_new_tokens=longest)

    def split(self, conversations: list) -> tuple[list, list]:
        """Return the conversations to learn and those held out, of those that can be asked."""
        from msn_ext.recipe.samples import askable, split

        room = min(self.training.max_length, self.context - self.sampling.max_new_tokens)
        usable = askable(self.tokenizer, conversations, room)
        if left_out := len(conversations) - len(usable):
            print(
                f"{left_out:,} conversations begin without a question, or with one that leaves no"
                " room",
                flush=True,
            )
        learned, held = split(usable, self.training.held_out, self.training.seed)
        if not held:
            raise CommandError(
                f"--data has {len(usable)} conversations; expected 5 or more, some of which are"
                " held out"
            )
        return learned, held

    def samples(self, learned: list, held: list) -> tuple[list[dict], list[dict]]:
        """Return the samples of both, with answers of the model itself if asked for."""
        from msn_ext.recipe.samples import samples_of

        if self.sampling.self_distill:
            answers = self._self_distill(held + learned)
            held, learned = answers[: len(held)], answers[len(held) :]
        samples, evaluated = (
            samples_of(self.tokenizer, answered, self.training.max_length)
            for answered in (learned, held)
        )
        if not samples or not evaluated:
            raise CommandError(
                "--data has no answers to learn; expected responses (or --self-distill)"
            )
        return samples, evaluated

    def _self_distill(self, conversations: list) -> list:
        import torch

        from msn_ext.recipe.self_distill import self_distill

        self.folder.keep_settings()
        if self.training.bf16:
            self.model.to(torch.bfloat16)
        answers = self_distill(
            self.model,
            self.tokenizer,
            conversations,
            self.folder.path / ANSWERS,
            max_new_tokens=self.sampling.max_new_tokens,
        )
        if self.training.bf16:  # what was rounded is read again
            name, device = self.arguments.model, self.arguments.device
            self.model, self.tokenizer, _ = load(name, "float32", device)
        return answers

    def measure(self, model, samples: list[dict], questions: list) -> dict:
        import torch

        from msn_ext.recipe.gated import gated_figures
        from msn_ext.recipe.metrics import figures

        dtype = torch.bfloat16 if self.training.bf16 else None
        if self.noise.gate:
            return gated_figures(model, self.tokenizer, samples, self.noise, dtype=dtype)
        return figures(
            model,
            self.tokenizer,
            samples,
            questions,
            self.noise.chosen()["length"],
            max_new_tokens=self.sampling.max_new_tokens,
            dtype=dtype,
        )

    def judged(self, figures: dict) -> dict:
        """Return what the figures before and after say in words, and with a gate those of the text,
        which is the base model's and was measured once.
        """
        from msn_ext.recipe.metrics import damage, verdict

        before, after = figures["before"], figures["after"]
        if self.noise.gate:
            text = {name: before[name] for name in ("loss", "accuracy", "tokens")}
            return {"after": after | text, "verdict": verdict(before, after)}
        return {"verdict": verdict(before, after), "damage": damage(before, after)}

    def train(self, samples: list[dict], figures: dict):
        """Return the trained model, without an adapter unless that is gated, and add to the figures
        how it went.
        """
        from msn_ext.recipe.gated import TextCheck
        from msn_ext.recipe.train import train

        text = TextCheck(self.model, samples[0]) if self.noise.gate else None
        begun = time.time()
        model, log = train(
            self.model,
            self.tokenizer,
            samples,
            self.folder.path,
            self.noise,
            self.training,
        )
        figures["training seconds"] = round(time.time() - begun)
        figures["log"] = log
        if text is not None:
            text.confirm(model)
        elif hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        return model.eval()


def _recorded(arguments: argparse.Namespace, conversations: list) -> dict:
    """Return what a run depends on, by names of options, as its folder keeps it."""
    free = {"run", "output", "device", "save_steps"}
    settings = {name: value for name, value in vars(arguments).items() if name not in free}
    content = json.dumps(conversations, ensure_ascii=False).encode()
    return settings | {"content of --data": hashlib.blake2b(content, digest_size=8).hexdigest()}


class _Folder:
    """The folder that keeps a run.

    Args:
        settings: of the run that is to begin or to be resumed.
    """

    def __init__(self, output: str, settings: dict):
        self.path = Path(os.path.expanduser(output))
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise CommandError(f"--output {output}: no folder; expected one, or a free path")
        self._settings, self._figures = settings, self.path / FIGURES

    def check_settings(self) -> None:
        """Raise CommandError where the folder holds a run with other settings: answers need the
        same model, a checkpoint needs all the same.
        """
        from msn_ext.recipe.train import last_checkpoint

        before = self._kept() or self._settings
        needed = set(before) | set(self._settings)
        if last_checkpoint(self.path) is None:
            answered = (self.path / ANSWERS).exists()
            needed = {"model", "max_new_tokens", "bf16"} if answered else set()
        for name in sorted(needed):
            if before.get(name) != self._settings.get(name):
                option = name if " " in name else _option(name)
                raise CommandError(
                    f"--output {self.path} holds a run with {option} {before.get(name)}, now it is"
                    f" {self._settings.get(name)}; expected the same settings, or another folder"
                )

    def keep_settings(self) -> None:
        """Write the settings, once there is something to resume; forget figures of others."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (kept := self._kept()) and kept != self._settings:
            self._figures.unlink(missing_ok=True)
        _write(self.path / SETTINGS, self._settings)

    def _kept(self) -> dict | None:
        """Return the settings of the run that the folder holds, if any; one that they lack, since
        they are of a version before it, has its default.
        """
        file = self.path / SETTINGS
        if not file.exists():
            return None
        kinds = (SampleSettings(), NoiseSettings(), TrainSettings())
        defaults = {f.name: f.default for kind in kinds for f, _ in options(kind)}
        known = {name: x for name, x in defaults.items() if name in self._settings}
        return known | json.loads(file.read_text())

    def figures(self) -> dict:
        """Return what was measured, without what has to be measured anew: tokens per pass of a
        version that let the model say its own texts.
        """
        found = json.loads(self._figures.read_text()) if self._figures.exists() else {}
        before = found.get("before", {})
        if "after" not in found and "MAT" in before and "passes" not in before:
            del found["before"]
        return found

    def keep_figures(self, figures: dict) -> None:
        _write(self._figures, figures)


def _write(file: Path, content: dict) -> None:
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _report(figures: dict) -> None:
    """Print the figures and what they say; damage on standard error."""
    print(_table(figures), flush=True)
    if "verdict" in figures:
        print(figures["verdict"], flush=True)
    for found in figures.get("damage", ()):
        print(f"msn: the training damaged the model: {found}", file=sys.stderr)
    if figures.get("damage"):
        print(f"msn: {ADVICE}", file=sys.stderr, flush=True)


def _table(figures: dict) -> str:
    """Return the figures before and after, a line each."""
    columns = [name for name in ("before", "after") if name in figures]
    lines = [f"{'':<34}" + "".join(f"{name:>10}" for name in columns)]
    first = figures[columns[0]]

    def line(name: str, values, form) -> None:
        lines.append(f"{name:<34}" + "".join(f"{form(value):>10}" for value in values))

    line("next-token loss", [figures[c]["loss"] for c in columns], "{:.4f}".format)
    line("next token right, %", [100 * figures[c]["accuracy"] for c in columns], "{:.1f}".format)
    for kind, title in (
        ("top1", "right after {} noise tokens, %"),
        ("top8", "among eight after {}, %"),
        ("top10", "among ten after {}, %"),
    ):
        if any(kind not in figures[c] for c in columns):  # of a version before
            continue
        for at in range(len(first[kind])):
            line(
                title.format(at + 1), [100 * figures[c][kind][at] for c in columns], "{:.1f}".format
            )
    for name in first["MAT"]:
        line(f"tokens a pass, {name}", [figures[c]["MAT"][name] for c in columns], "{:.2f}".format)
    if "new" in first:
        line(
            "trigrams new to its own answer, %",
            [100 * figures[c]["new"] for c in columns],
            "{:.0f}".format,
        )
    return "\n".join(lines)
