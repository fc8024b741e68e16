"""``msn habits``: what a model usually says, counted over its own answers."""

import argparse
import os

from .common import (
    CommandError,
    add_engine_option,
    add_model_options,
    add_weights_option,
    output_file,
    positive_int,
)
from .loading import load_for, tokens_of

HELP = "count what a model usually says, so that drafts know it from the first token on"
DESCRIPTION = (
    "Let a model answer typical prompts, and count what it says after every one, two and three"
    " tokens. The result is kept for models of this shape, and generate's default draft looks there"
    " for what the text at hand has not shown yet. The text stays what it is without."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        nargs="+",
        metavar="FILE",
        help="typical prompts: JSON lines with a prompt each (.gz too), or a plain prompt a line",
    )
    add_model_options(parser)
    add_engine_option(parser)
    add_weights_option(parser)
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=2000,
        metavar="N",
        help="prompts to draw (default: 2000)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="of an answer (default: 256)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="answers side by side (default: 16)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the file to write, for generate --habits (default: where generate looks by itself)",
    )


def run(arguments: argparse.Namespace) -> int:
    files = [os.path.expanduser(path) for path in arguments.prompts]
    output = None
    if arguments.output is not None:
        output = output_file("--output", arguments.output, files, "files of prompts")

    from msn_ext.jsonl import draw
    from msn_ext.tuning import learn_habits, read_prompts

    try:
        prompts = draw([read_prompts(path) for path in files], arguments.samples)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error

    from msn_ext.profile import habits_path
    from msn_ext.terminal import quiet_transformers

    model, tokenizer, _ = load_for(arguments)
    with quiet_transformers():
        habits, learned = learn_habits(
            model,
            [tokens_of(tokenizer, prompt, True) for prompt in prompts],
            arguments.max_new_tokens,
            arguments.batch_size,
            True,
            arguments.engine,
        )
    place = output or str(habits_path(model))
    try:
        if output is None:
            os.makedirs(os.path.dirname(place), exist_ok=True)
        habits.save(place)
    except OSError as error:
        raise CommandError(f"{place}: {error.strerror or error}") from error
    weighed = learned["factors"]
    print(
        f"{learned['tokens']:,} tokens of {learned['prompts']:,} answers, {len(habits):,} contexts;"
        f" weighed on {weighed['nodes']:,} tokens of {weighed['prompts']} others: log-likelihood"
        f" {weighed['before']:.3f} before, {weighed['after']:.3f} after"
    )
    print(f"kept in {arguments.output or place}")
    return 0
