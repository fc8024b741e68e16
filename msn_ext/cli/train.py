"""``msn train``: noisy fine-tuning, from a file to a model with better guesses."""

import argparse
import hashlib
import json
import os
import sys
import time

from .common import (
    CommandError,
    add_device_option,
    from_to,
    one_line,
    positive_float,
    positive_int,
)
from .loading import load

SETTINGS, ANSWERS, FIGURES = "settings.json", "answers.jsonl", "figures.json"
HELP = "fine-tune a model with noise, so that more of its guesses are right"
DESCRIPTION = (
    "Fine-tune a model so that it guesses well what it will say next (Make Some Noise):"
    " from conversations to an adapter, with losses, accuracy behind noise and accept"
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
    parser.add_argument(
        "--samples",
        type=positive_int,
        metavar="N",
        help="conversations, as many of each file (default: all)",
    )
    parser.add_argument(
        "--self-distill",
        action="store_true",
        help="learn the model's own answers to the first questions",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="of an answer of its own (default: 256)",
    )
    noise = parser.add_argument_group("noise")
    noise.add_argument(
        "--layout",
        choices=("branch", "replace", "none"),
        default="branch",
        help="(default: branch)",
    )
    noise.add_argument(
        "--length",
        type=from_to(1, 64),
        default=4,
        metavar="N",
        help="noise tokens of a segment (default: 4)",
    )
    noise.add_argument(
        "--segments",
        type=from_to(1, 256),
        metavar="N",
        help="of noise in a sample (default: 24 branches, 1 in place)",
    )
    noise.add_argument(
        "--content",
        choices=("ahead", "random", "mixed", "self"),
        default="ahead",
        help="(default: ahead)",
    )
    noise.add_argument(
        "--noise-weight",
        type=positive_float,
        metavar="X",
        help=(
            "of a label behind noise, where a clean one counts 1; a tenth of it in the last third"
            " of the steps (default: 0.3 for branches; in place 1 throughout, as in the paper)"
        ),
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--lora-rank",
        type=from_to(0, 1024),
        default=16,
        metavar="R",
        help="0: all weights (default: 16)",
    )
    training.add_argument(
        "--learning-rate",
        type=positive_float,
        metavar="X",
        help="(default: 1e-3 for an adapter, 2e-5 for all weights)",
    )
    training.add_argument(
        "--epochs", type=positive_float, default=1.0, metavar="N", help="(default: 1)"
    )
    training.add_argument(
        "--max-steps", type=positive_int, default=-1, metavar="N", help="stop after so many steps"
    )
    training.add_argument(
        "--batch-size",
        type=positive_int,
        default=4,
        metavar="N",
        help="samples of a step (default: 4)",
    )
    training.add_argument(
        "--max-length",
        type=positive_int,
        default=512,
        metavar="N",
        help="tokens of a sample (default: 512)",
    )
    training.add_argument(
        "--save-steps",
        type=positive_int,
        default=50,
        metavar="N",
        help="between checkpoints (default: 50)",
    )
    training.add_argument(
        "--held-out",
        type=positive_int,
        default=32,
        metavar="N",
        help="samples for the figures (default: 32)",
    )
    training.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 (the weights stay float32)"
    )
    training.add_argument(
        "--seed", type=from_to(0, 2**32 - 1), default=0, metavar="N", help="(default: 0)"
    )
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from msn_ext.terminal import quiet_transformers

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(
            "msn train is one process; in several, use msn_ext.add_noise in a trainer of your own"
        )
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise CommandError(f"training needs {error.name}: pip install accelerate peft") from error
    import torch

    from msn_ext import recipe
    from msn_ext.jsonl import draw
    from msn_ext.training.data import read_conversations
    from msn_ext.training.layouts import check_branches

    if (arguments.device or "").startswith("cuda:") and arguments.device != "cuda:0":
        raise CommandError(
            f"--device {arguments.device}: a Trainer takes the first GPU that it sees; set"
            " CUDA_VISIBLE_DEVICES instead"
        )
    output = Path(os.path.expanduser(arguments.output))
    try:
        files = [read_conversations(os.path.expanduser(path)) for path in arguments.data]
    except OSError as error:
        where = (
            f"--data {error.filename}: {error.strerror}"
            if error.filename
            else f"--data: {one_line(error)}"
        )
        raise CommandError(where) from error
    conversations = draw(files, arguments.samples or sum(map(len, files)))
    settings = _settings(arguments, conversations)
    _check_settings(settings, output, begun=recipe.last_checkpoint(output) is not None)
    progress = sys.stderr.isatty()
    model, tokenizer, _ = load(arguments.model, "float32", arguments.device)
    if arguments.layout == "branch":
        check_branches(model.config.get_text_config(decoder=True))
    context = recipe.context_of(model)
    max_new_tokens = min(arguments.max_new_tokens, context // 2)
    usable = recipe.askable(
        tokenizer, conversations, min(arguments.max_length, context - max_new_tokens)
    )
    if len(usable) < len(conversations):
        left_out = len(conversations) - len(usable)
        print(
            f"{left_out:,} conversations begin without a question, or with one that leaves no room",
            flush=True,
        )
    learned, held = recipe.split(usable, arguments.held_out, arguments.seed)
    if not held:
        raise CommandError(
            f"--data has {len(usable)} conversations; expected 5 or more, some of which are"
            " held out"
        )
    started = time.time()
    with quiet_transformers():
        questions = held
        if arguments.self_distill:
            _keep_settings(settings, output)
            options = dict(max_new_tokens=max_new_tokens, progress=progress)
            if arguments.bf16:
                model.to(torch.bfloat16)
            rows = recipe.self_distill(
                model, tokenizer, held + learned, output / ANSWERS, **options
            )
            held, learned = rows[: len(held)], rows[len(held) :]
            if arguments.bf16:  # what was rounded is read again
                model, tokenizer, _ = load(arguments.model, "float32", arguments.device)
        samples, evaluated = (
            recipe.samples_of(tokenizer, rows, arguments.max_length) for rows in (learned, held)
        )
        if not samples or not evaluated:
            raise CommandError(
                "--data has no answers to learn; expected responses (or --self-distill)"
            )
        _keep_settings(settings, output)
        print(
            f"{len(samples):,} samples, {sum(map(_labels, samples)):,} tokens to learn;"
            f" {len(evaluated)} held out",
            flush=True,
        )

        figures_file = output / FIGURES
        figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
        length = arguments.length
        if "before" not in figures:
            figures["before"] = recipe.figures(
                model, tokenizer, evaluated, questions, length, progress=progress
            )
            _write(figures_file, figures)
        print(_table(figures), flush=True)
        if "after" in figures:
            print(f"trained already, in {output}")
            return 0
        segments = arguments.segments or (24 if arguments.layout == "branch" else 1)
        begun = time.time()
        trained, log = recipe.train(
            model,
            tokenizer,
            samples,
            output,
            layout=None if arguments.layout == "none" else arguments.layout,
            length=length,
            segments=segments,
            content=arguments.content,
            noise_weight=arguments.noise_weight,
            lora_rank=arguments.lora_rank,
            bf16=arguments.bf16,
            learning_rate=arguments.learning_rate,
            epochs=arguments.epochs,
            max_steps=arguments.max_steps,
            batch_size=arguments.batch_size,
            save_steps=arguments.save_steps,
            seed=arguments.seed,
            progress=progress,
        )
        figures["training seconds"] = round(time.time() - begun)
        figures["log"] = log
        if hasattr(trained, "merge_and_unload"):
            trained = trained.merge_and_unload()
        figures["after"] = recipe.figures(
            trained.eval(), tokenizer, evaluated, questions, length, progress=progress
        )
        figures["seconds"] = round(time.time() - started)
        _write(figures_file, figures)
    print(_table(figures))
    print(f"kept in {output}; use it with --model {arguments.output}")
    return 0


def _labels(sample: dict) -> int:
    return sum(label >= 0 for label in sample["labels"])


def _settings(arguments: argparse.Namespace, conversations: list) -> dict:
    """What a run depends on."""
    free = {"run", "output", "device", "save_steps"}
    settings = {name: value for name, value in vars(arguments).items() if name not in free}
    content = json.dumps(conversations, ensure_ascii=False).encode()
    return settings | {"content of --data": hashlib.blake2b(content, digest_size=8).hexdigest()}


def _check_settings(settings: dict, output, begun: bool) -> None:
    """A run is gone on with only as it was begun: answers need the same model, a checkpoint needs
    all the same.
    """
    file = output / SETTINGS
    before = json.loads(file.read_text()) if file.exists() else settings
    needed = set(before) | set(settings)
    if not begun:
        needed = {"model", "max_new_tokens", "bf16"} if (output / ANSWERS).exists() else set()
    for name in sorted(needed):
        if before.get(name) != settings.get(name):
            option = name if " " in name else "--" + name.replace("_", "-")
            raise CommandError(
                f"--output {output} holds a run with {option} {before.get(name)}, now it is"
                f" {settings.get(name)}; expected the same settings, or another folder"
            )


def _keep_settings(settings: dict, output) -> None:
    """Once there is something to go on with; figures of other settings are forgotten."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / SETTINGS
    if file.exists() and json.loads(file.read_text()) != settings:
        (output / FIGURES).unlink(missing_ok=True)
    _write(file, settings)


def _write(file, content: dict) -> None:
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(file)


def _table(figures: dict) -> str:
    """Before and after, a line a figure."""
    columns = [name for name in ("before", "after") if name in figures]
    lines = [f"{'':<34}" + "".join(f"{name:>10}" for name in columns)]
    first = figures[columns[0]]

    def line(name: str, values, form) -> None:
        lines.append(f"{name:<34}" + "".join(f"{form(value):>10}" for value in values))

    line("next-token loss", [figures[c]["loss"] for c in columns], "{:.4f}".format)
    line("next token right, %", [100 * figures[c]["accuracy"] for c in columns], "{:.1f}".format)
    for kind, title in (
        ("top1", "right behind {} noise tokens, %"),
        ("top10", "among ten behind {}, %"),
    ):
        for at in range(len(first[kind])):
            line(
                title.format(at + 1), [100 * figures[c][kind][at] for c in columns], "{:.1f}".format
            )
    for name in first["MAT"]:
        line(f"tokens a pass, {name}", [figures[c]["MAT"][name] for c in columns], "{:.2f}".format)
    line(
        "trigrams new to their answer, %",
        [100 * figures[c]["new"] for c in columns],
        "{:.0f}".format,
    )
    return "\n".join(lines)
