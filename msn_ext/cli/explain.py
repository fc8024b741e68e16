"""``msn explain``: one step's draft tree as text and as a picture, a whole answer as a page."""

import argparse

from msn_ext.paths import replacing

from .common import (
    CommandError,
    add_engine_option,
    add_model_options,
    add_prompt_options,
    add_weights_option,
    number,
    output_file,
    positive_int,
    read_prompt,
    wants_color,
)
from .loading import encode, load_for

HELP = "draw one step's draft tree and what the model accepted of it"
DESCRIPTION = (
    "Decode greedily with best-first draft trees and draw one forward pass: the tree of"
    " guesses, where they come from, how probable they were, and the path that the model"
    " accepted. --html writes a page that steps through all of them."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_engine_option(parser)
    add_weights_option(parser)
    add_prompt_options(parser)
    parser.add_argument(
        "--pass",
        dest="number",
        type=positive_int,
        metavar="K",
        help="the K-th forward pass after the prompt's (default: the one that gained most)",
    )
    parser.add_argument("--svg", metavar="FILE", help="also write the picture to this file")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="also write a page to this file, to look through every pass of the answer",
    )
    parser.add_argument(
        "--min-probability",
        type=_zero_to_one,
        default=0.0,
        metavar="P",
        help="leave out less probable nodes, unless they were accepted (default: 0, show all)",
    )
    parser.add_argument(
        "--nodes",
        type=_tree_size,
        default=32,
        metavar="N",
        help="per tree, root included (default: 32)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=48, metavar="N", help="(default: 48)"
    )


def _zero_to_one(text: str) -> float:
    return number(text, float, lambda value: 0 <= value <= 1, "a number of 0 to 1")


def _tree_size(text: str) -> int:
    return number(text, int, lambda value: 1 <= value <= 256, "a whole number of 1 to 256")


def run(arguments: argparse.Namespace) -> int:
    prompt = read_prompt(arguments.prompt)
    files = {
        option: output_file(option, path)
        for option, path in (("--svg", arguments.svg), ("--html", arguments.html))
        if path is not None
    }

    from msn_ext.explain import as_html, as_svg, as_text, record_answer
    from msn_ext.terminal import quiet_transformers

    model, tokenizer, _ = load_for(arguments)
    with quiet_transformers():
        input_ids, limit = encode(
            model, tokenizer, prompt, not arguments.raw, arguments.max_new_tokens
        )
        answer = record_answer(model, input_ids, arguments.nodes, limit, arguments.engine)
    steps, least = answer.steps, arguments.min_probability
    if not steps:
        raise CommandError(
            "the prompt's own pass gained the whole answer: there is no tree; try more"
            " --max-new-tokens"
        )
    if arguments.number is None:
        step = max(steps, key=lambda step: step.kept)
    elif arguments.number <= len(steps):
        step = steps[arguments.number - 1]
    else:
        raise CommandError(
            f"--pass {arguments.number}: after the prompt's pass there were only {len(steps)}"
        )
    if "--svg" in files:
        _write("--svg", files["--svg"], as_svg(step, tokenizer, least))
    if "--html" in files:
        page = as_html(answer, tokenizer, prompt, arguments.number or 1, least)
        _write("--html", files["--html"], page)
    print(as_text(step, tokenizer, least, color=wants_color()))
    return 0


def _write(option: str, path: str, text: str) -> None:
    try:
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{option} {path}: {error.strerror or error}") from error
