"""``msn tune``: a model measured on this machine."""

import argparse
import os

from .common import (
    CommandError,
    add_engine_option,
    add_model_options,
    add_weights_option,
    positive_int,
)
from .loading import load_for, tokens_of

HELP = "measure a model on this machine, so that drafts are sized to it"
DESCRIPTION = (
    "Measure how long a step takes by the nodes of its draft tree, and with --prompts also"
    " learn how far each source of guesses is right for this model. The result is kept for"
    " models of this shape, on this device, in this dtype; generate's default draft goes"
    " by it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_engine_option(parser)
    add_weights_option(parser)
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="N",
        help="tokens before a step, at most half of what the model takes (default: 256, or that)",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="FILE",
        help="typical prompts: JSON lines with a prompt each (.gz too), or a plain prompt a line",
    )
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=100,
        metavar="N",
        help="prompts to draw (default: 100)",
    )


def run(arguments: argparse.Namespace) -> int:
    from msn_ext.jsonl import draw
    from msn_ext.tuning import checked_context, read_prompts, tune

    try:
        prompts = draw(
            [read_prompts(os.path.expanduser(path)) for path in arguments.prompts or ()],
            arguments.samples,
        )
    except OSError as error:
        raise CommandError(f"--prompts {error.filename}: {error.strerror}") from error

    from msn_ext.terminal import quiet_transformers

    model, tokenizer, _ = load_for(arguments)
    try:
        context = checked_context(model, arguments.context)
    except ValueError as error:
        raise CommandError(f"--{error}") from error
    with quiet_transformers():
        encoded = [tokens_of(tokenizer, prompt, True) for prompt in prompts]
        profile, path = tune(model, encoded, context, True, arguments.engine)
    plain = profile.times[1]
    print(f"{'nodes':>5} {'ms a step':>10} {'over plain':>11}")
    for nodes, seconds in profile.times.items():
        print(f"{nodes:>5} {1000 * seconds:>10.2f} {seconds / plain:>10.2f}x")
    if prompts:
        learned = profile.about["factors"]
        print(
            f"factors from {learned['prompts']} prompts, {learned['nodes']} nodes: "
            f"log-likelihood {learned['before']:.3f} before, {learned['after']:.3f} after"
        )
    print(f"kept in {path}")
    return 0
