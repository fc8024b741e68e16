"""``msn corpus``: texts of one's own, to draft from."""

import argparse
import os
import time

from .common import CommandError, output_file
from .loading import load_tokenizer

HELP = "index texts of your own, so that generate --corpus drafts from them"
DESCRIPTION = (
    "Index texts that answers may repeat, such as templates, a code base or earlier"
    " answers, for models with one tokenizer. generate --corpus looks there for what"
    " followed the last words."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a text, or JSON lines (.jsonl, .gz too) with text, or with prompt and response",
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="whose tokenizer to use (default: the demo model)"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")


def run(arguments: argparse.Namespace) -> int:
    files = [os.path.expanduser(path) for path in arguments.files]
    output = output_file("--output", arguments.output, files, "texts")

    from msn_ext import Corpus
    from msn_ext.jsonl import batches, texts
    from msn_ext.terminal import quiet_transformers

    for path in files:
        if not os.path.isfile(path):
            raise CommandError(f"{path}: no such file")
    tokenizer, vocabulary = load_tokenizer(arguments.model)
    found = (text for path in files for text in texts(path))
    tokens = (
        row
        for batch in batches(found)
        for row in tokenizer(batch, add_special_tokens=False)["input_ids"]
    )
    start = time.perf_counter()
    with quiet_transformers():
        corpus = Corpus.build(tokens, vocabulary)
    try:
        corpus.save(output)
    except OSError as error:
        raise CommandError(f"--output {arguments.output}: {error.strerror or error}") from error
    seconds = time.perf_counter() - start
    print(
        f"{len(corpus.tokens):,} tokens, {corpus.nbytes:,} bytes, {seconds:.1f} seconds; kept in"
        f" {arguments.output}"
    )
    return 0
