"""``msn demo``: an answer, its passes in colours, and plain decoding beside it."""

import argparse
import copy
import random
import sys
from collections import Counter

from .common import (
    CommandError,
    add_device_option,
    add_draft_option,
    add_engine_option,
    checked_prompt,
    positive_int,
    status,
    wants_color,
)
from .loading import encode, load
from .runs import PassStreamer, Run, timed, timed_plain

PROMPTS = (
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the first n prime numbers, then explain it step by step.",
    (
        "Give me a recipe for pancakes: first the ingredients as a list, then the steps as a"
        " numbered list."
    ),
)
HELP = "stream an answer of a small model, then compare with plain decoding"
DESCRIPTION = (
    "Stream an answer of SmolLM2-135M-Instruct, the tokens of one forward pass in one"
    " colour, then decode the same prompt without drafts, and by transformers alone, and compare."
)
TRIED = 8  # tokens by which transformers' faster dtype is found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", help="what to ask (default: one of a few built-in prompts)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=128, metavar="N", help="(default: 128)"
    )
    parser.add_argument(
        "--no-color", action="store_true", help="mark passes with ‹ › (as does NO_COLOR)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the weights (default: bfloat16); transformers gets the faster of the two",
    )
    parser.add_argument(
        "--no-habits",
        action="store_true",
        help="draft without what the model usually says, which comes with the package",
    )
    parser.add_argument(
        "--gated",
        action="store_true",
        help="with the gated noise adapter of the package, and without it (needs peft)",
    )
    add_draft_option(parser)
    add_engine_option(parser)
    add_device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.prompt is None:
        prompt = random.choice(PROMPTS)
    else:
        prompt = checked_prompt(arguments.prompt, "the prompt")
    color = not arguments.no_color and wants_color()

    from msn_ext import Habits
    from msn_ext.demo import HABITS
    from msn_ext.terminal import quiet_transformers

    model, tokenizer, device = load(None, arguments.dtype, arguments.device)
    options = dict(engine=arguments.engine)
    habits = None
    if arguments.draft == "auto" and not arguments.no_habits:
        habits = Habits.load(HABITS)
    ours = {f"msn ({arguments.draft})": model}
    if arguments.gated:
        ours = {f"msn ({arguments.draft}), gated": gated(model), **ours}
    with quiet_transformers():
        input_ids, limit = encode(model, tokenizer, prompt, True, arguments.max_new_tokens)
        for one in ours.values():  # the first passes allocate, compile and pack
            draft = draft_of(one, arguments, habits)
            timed(one, input_ids, draft, streamer=None, max_new_tokens=2, **options)

        by = "" if habits is None else ", by its habits (--no-habits: without)"
        print(f"SmolLM2-135M-Instruct, {arguments.dtype}, {device}{by}. Prompt: {prompt}\n")
        streamer = PassStreamer(tokenizer, sys.stdout, color=color, mark=not color)
        runs: dict[str, Run] = {}
        for name, one in ours.items():
            shown = None if runs else streamer
            draft = draft_of(one, arguments, habits)
            runs[name] = timed(one, input_ids, draft, shown, max_new_tokens=limit, **options)
        print("\n")
        if arguments.draft != "none":
            with status("the same without drafts …"):
                runs["msn (none)"] = timed(
                    model,
                    input_ids,
                    "none",
                    None,
                    max_new_tokens=limit,
                    **options,
                )
        with status("plain decoding, for comparison …"):
            plain, dtype = faster(model, input_ids)
            runs[f"transformers, {dtype}"] = timed_plain(plain, input_ids, limit)
        print(comparison(runs, arguments.draft, device, tokenizer, color))
    return 0


def draft_of(model, arguments: argparse.Namespace, habits):
    """Return what ``--draft`` asks for, by these habits if there are any, as
    :func:`msn_ext.generate` takes it.
    """
    if habits is None:
        return arguments.draft

    from msn_ext.decoding.engine import engine_of, native_plan_for
    from msn_ext.profile import auto

    return auto(model, None, engine_of(native_plan_for(model, arguments.engine)), habits)


def gated(model):
    """Return a copy of the demo model with its gated noise adapter."""
    from msn_ext.demo import with_noise_adapter

    try:
        return with_noise_adapter(copy.deepcopy(model))
    except ImportError as error:
        raise CommandError("--gated: to load its adapter: pip install peft") from error


def faster(model, input_ids):
    """Return the model, or a copy in the other dtype of the two, in which transformers decodes
    faster, and the dtype's name.
    """
    import torch

    other = {"bfloat16": "float32", "float32": "bfloat16"}
    own = str(model.dtype).removeprefix("torch.")
    models = {own: model, other[own]: copy.deepcopy(model).to(getattr(torch, other[own]))}
    for one in models.values():
        timed_plain(one, input_ids, 2)  # allocates and compiles
    dtype = min(models, key=lambda name: timed_plain(models[name], input_ids, TRIED).seconds)
    return models[dtype], dtype


def comparison(
    runs: dict[str, Run], draft: str, device: str, tokenizer, color: bool = False
) -> str:
    """Return the demo's closing table.

    Args:
        runs: of one prompt, by name: with drafts, without where there was one, by transformers
            alone.
        draft: the first one's draft.
        device: where all ran.
        tokenizer: shows the first different token, if there is one.
        color: say which colours the text above has.

    Returns:
        Several lines, without a line feed at the end.
    """
    drafted, *_, plain = runs.values()
    engine = "our own forward pass" if drafted.engine == "native" else "the model's forward pass"
    lines = [
        f"By {engine}:",
        "",
        f"{'':24}{'tokens/s':>10}{'forward passes':>16}{'tokens per pass (MAT)':>24}",
    ]
    for name, run in runs.items():
        lines.append(f"{name:24}{run.tokens_per_second:10.1f}{run.passes:16}{run.mat:24.2f}")
    lines.append("")
    for name, run in list(runs.items())[1:]:
        lines.append(f"Same text as {name}?  {_same_text(drafted.tokens, run.tokens, tokenizer)}")

    speedup = drafted.tokens_per_second / plain.tokens_per_second
    lines.append(f"Speed-up over transformers: {speedup:.2f}×")
    if speedup < 1 and draft != "none":
        cost = (drafted.seconds / drafted.passes) / (plain.seconds / plain.passes)
        gain = f"a pass gains {drafted.mat:.2f} tokens, but takes as long as {cost:.1f} plain steps"
        lines.append(f"            Slower here: {gain}.")
        if device == "cpu":
            nodes = "each of its 69 nodes" if draft == "paper" else "each guess"
            lines.append(
                f"            A CPU pays for {nodes}; a GPU, busy with reading the weights, should"
                " hardly notice."
            )

    shown = (
        "one colour a pass, plain for one token"
        if color
        else "‹ › around a pass that gained several"
    )
    lines += [
        "",
        f"Tokens gained by a pass (in the text above: {shown}):",
        histogram(drafted.accept_lengths),
    ]
    return "\n".join(lines)


def _same_text(drafted: list[int], plain: list[int], tokenizer) -> str:
    if drafted == plain:
        return f"yes, all {len(plain)} tokens"
    at = next(
        (i for i, pair in enumerate(zip(drafted, plain)) if pair[0] != pair[1]),
        min(len(drafted), len(plain)),
    )
    ours, theirs = (tokenizer.decode(tokens[at : at + 1]) for tokens in (drafted, plain))
    return (
        f"no, from token {at + 1} of {len(plain)} on: {ours!r} here, {theirs!r} there\n"
        "            (where two tokens are almost equally likely, rounding in 16 or 32 bit may"
        " decide)"
    )


def histogram(accept_lengths: list[int], width: int = 40) -> str:
    """Draw how many passes gained how many tokens, one bar a line.

    Args:
        accept_lengths: tokens gained, one entry a pass; not empty.
        width: characters of the longest bar.

    Returns:
        Lines of ``tokens  bar  passes``, from 1 to the largest gain, joined by line feeds.
    """
    passes = Counter(accept_lengths)
    most = max(passes.values())
    eighths = " ▏▎▍▌▋▊▉"
    lines = []
    for gain in range(1, max(passes) + 1):
        count = passes[gain]
        length = max(1, round(8 * width * count / most)) if count else 0
        bar = "█" * (length // 8) + eighths[length % 8].strip()
        lines.append(f"{gain:4}  {bar}{' ' if bar else ''}{count}")
    return "\n".join(lines)
