"""The common part of the commands: errors, options and their values, what is read and shown."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from msn_ext.paths import writable_file

# Names of msn_ext.generate's drafts; listed here because importing them costs seconds.
DRAFTS = ("auto", "paper", "jacobi", "lookup", "suffix", "recycling", "lookahead", "none")
ENGINES = ("auto", "native", "torch")
DTYPES = ("float32", "bfloat16", "float16", "float64")

Number = TypeVar("Number", int, float)


# ---- errors


class CommandError(Exception):
    """An error that the user can put right: printed as one line, without a traceback."""

    exit_code = 1


class UsageError(CommandError):
    """A command line that makes no sense."""

    exit_code = 2


def one_line(error: Exception) -> str:
    """Return the first line of a message; errors of kinds that are not made for readers also say
    their kind, and a package that is missing how to get it.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        return f"this needs {error.name}, which is not installed; run: pip install {error.name}"
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if message and (
        isinstance(error, (CommandError, OSError, ValueError)) or type(error) is RuntimeError
    ):
        return message
    return f"{type(error).__name__}: {message} (MSN_DEBUG=1 shows the traceback)"


# ---- options


def add_draft_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft",
        choices=DRAFTS,
        default="auto",
        help=(
            "where guesses come from: everything that is known, as much of it as pays (auto), the"
            " paper's tree of 69 nodes, a Jacobi chain, look-up in the text so far, its longest"
            " repetition, Token Recycling, Lookahead decoding, or none, which is plain decoding"
            " (default: auto)"
        ),
    )


def add_engine_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help=(
            "what computes the model: our own forward pass (native), the model's (torch), or native"
            " on a CPU where it can be (default: auto)"
        ),
    )


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("int8",),
        help="round the linear weights to int8, for our own forward pass (default: as --dtype)",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 … (default: cuda if it can be used, else cpu)"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a folder or a hub id (default: the demo model)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as they are stored)"
    )
    add_device_option(parser)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from standard input"
    )
    parser.add_argument(
        "--raw", action="store_true", help="the prompt as it is, without the model's chat template"
    )


# ---- values of options


def positive_int(text: str) -> int:
    return number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def from_to(least: int, most: int) -> Callable[[str], int]:
    return functools.partial(
        number,
        kind=int,
        holds=lambda value: least <= value <= most,
        expected=f"a whole number from {least} to {most}",
    )


def positive_float(text: str) -> float:
    return number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def probability(text: str) -> float:
    return number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def number(
    text: str, kind: Callable[[str], Number], holds: Callable[[Number], bool], expected: str
) -> Number:
    """Return the number in ``text``, for argparse; refuse one that does not hold."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


def output_file(option: str, path: str, read: Iterable[str] = (), kind: str = "") -> str:
    """Return the path of a file to write, without ``~``; refuse it where that cannot be, or where
    it is one of those that are ``read``, which are of a ``kind``.
    """
    file = os.path.expanduser(path)
    try:
        writable_file(file)
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error
    for other in filter(os.path.exists, read):
        if os.path.exists(file) and os.path.samefile(file, other):
            raise UsageError(f"{option} {path}: one of the {kind}; it would be overwritten")
    return file


# ---- what is read and shown


def read_prompt(text: str) -> str:
    """Return the prompt that ``--prompt`` names, read from standard input if it is ``-``."""
    return checked_prompt(standard_input() if text == "-" else text, "--prompt")


def standard_input() -> str:
    if sys.stdin is None:
        raise CommandError("cannot read the prompt from standard input: it is closed")
    try:
        text = sys.stdin.buffer.read().decode()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise CommandError(f"cannot read the prompt from standard input: {error}") from error
    return text.removesuffix("\n")


def checked_prompt(text: str, source: str) -> str:
    """Return a prompt of the command line; refuse it, by its option, if it is no text."""
    if not text.strip():
        raise UsageError("the prompt is empty")
    try:  # Python makes surrogates of bytes that are not UTF-8
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError as error:
        raise UsageError(f"{source} is not UTF-8: {error}") from error


def wants_color() -> bool:
    """Return whether standard output is a terminal whose user wants colours."""
    return not os.environ.get("NO_COLOR") and sys.stdout.isatty()


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show ``text`` while something runs, on a terminal only."""
    show = sys.stderr.isatty()
    if show:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if show:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
