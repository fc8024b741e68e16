"""``msn generate``: the answer to a prompt, as text or JSON."""

import argparse
import json
import os
import sys

from .common import (
    CommandError,
    UsageError,
    add_draft_option,
    add_engine_option,
    add_model_options,
    add_prompt_options,
    add_weights_option,
    from_to,
    positive_float,
    positive_int,
    probability,
    read_prompt,
)
from .loading import encode, load_for
from .runs import PassStreamer, timed

HELP = "generate with any causal language model"
DESCRIPTION = (
    "Generate with any causal language model of transformers, several tokens per forward pass."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_prompt_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=256, metavar="N", help="(default: 256)"
    )
    add_draft_option(parser)
    add_engine_option(parser)
    add_weights_option(parser)
    parser.add_argument(
        "--corpus",
        metavar="FILE",
        help="also draft from texts that msn corpus indexed for this model",
    )
    parser.add_argument(
        "--habits",
        metavar="FILE",
        help="draft by what msn habits wrote to this file (default: by what it keeps, if anything)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text"
    )
    add_sampling_options(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--do-sample", action="store_true", help="sample instead of taking the likeliest token"
    )
    sampling.add_argument(
        "--temperature", type=positive_float, metavar="T", help="above 1: more even"
    )
    sampling.add_argument(
        "--top-k", type=positive_int, metavar="K", help="only the K likeliest tokens"
    )
    sampling.add_argument(
        "--top-p",
        type=probability,
        metavar="P",
        help="only the likeliest tokens whose probabilities make up P",
    )
    sampling.add_argument(
        "--seed",
        type=from_to(0, 2**64 - 1),
        metavar="S",
        help="a seed gives the same text whatever the draft",
    )


def sampling_of(arguments: argparse.Namespace) -> dict:
    """Return the sampling options that were given."""
    sampling = {
        name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling and not arguments.do_sample:
        raise UsageError(f"--{next(iter(sampling)).replace('_', '-')} needs --do-sample")
    return sampling


def run(arguments: argparse.Namespace) -> int:
    sampling = sampling_of(arguments)
    for name in ("corpus", "habits"):
        if getattr(arguments, name) is not None and arguments.draft != "auto":
            raise UsageError(
                f"--{name} needs --draft auto, which looks into it; --draft is {arguments.draft}"
            )
    prompt = read_prompt(arguments.prompt)

    import torch

    from msn_ext.terminal import quiet_transformers

    corpus, habits = looked_into(arguments)
    model, tokenizer, device = load_for(arguments)
    with quiet_transformers():
        input_ids, limit = encode(
            model, tokenizer, prompt, not arguments.raw, arguments.max_new_tokens
        )
        if (seed := sampling.pop("seed", None)) is not None:
            torch.manual_seed(seed)
        streamer = None if arguments.json else PassStreamer(tokenizer, sys.stdout)
        options = {"max_new_tokens": limit, "do_sample": arguments.do_sample, **sampling}
        options["engine"] = arguments.engine
        draft = arguments.draft
        if corpus is not None or habits is not None:
            from msn_ext.decoding.engine import engine_of, native_plan_for
            from msn_ext.profile import auto

            engine = engine_of(native_plan_for(model, arguments.engine))
            draft = auto(model, corpus, engine, habits)
        answer = timed(model, input_ids, draft, streamer, **options)
    if not arguments.json:
        print()
        return 0
    result = {
        "text": tokenizer.decode(answer.tokens, skip_special_tokens=True),
        "new_tokens": len(answer.tokens),
        "forward_passes": answer.passes,
        "mat": answer.mat,
        "tokens_per_second": answer.tokens_per_second,
        "accept_lengths": answer.accept_lengths,
        "draft": arguments.draft,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    print(json.dumps(result))
    return 0


def looked_into(arguments: argparse.Namespace) -> list:
    """Return the corpus and the habits that ``--corpus`` and ``--habits`` name; None: neither."""
    from msn_ext import Corpus, Habits

    found: list = []
    for name, kind in (("corpus", Corpus), ("habits", Habits)):
        path = getattr(arguments, name)
        try:
            found.append(None if path is None else kind.load(os.path.expanduser(path)))
        except OSError as error:
            raise CommandError(f"--{name} {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise CommandError(f"--{name} {error}") from error
    return found
