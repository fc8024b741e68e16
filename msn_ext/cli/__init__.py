"""The command ``msn``.

Each of its commands is a module with ``HELP``, ``DESCRIPTION``, ``add_arguments(parser)`` and
``run(arguments)``, which does the work and returns the exit code. torch and transformers are
imported only once a command needs them.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading

import msn_ext

from . import chat, corpus, demo, explain, export_generate, generate, habits, info, train, tune
from .common import UsageError, one_line

COMMANDS = {
    "demo": demo,
    "generate": generate,
    "chat": chat,
    "explain": explain,
    "tune": tune,
    "train": train,
    "corpus": corpus,
    "habits": habits,
    "export-generate": export_generate,
    "info": info,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """argparse's "version", but the version is looked up only when it is asked for."""

    def __call__(self, parser, *_):
        print("msn_ext", msn_ext.__version__)
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0, 1 for an error, 2 for a wrong command line, 130 for Ctrl-C, 141 where the
        reader of stdout has gone. Errors are one line on stderr; ``MSN_DEBUG=1`` adds the
        traceback.
    """
    with contextlib.ExitStack() as absent:
        for name, redirect in (
            ("stdout", contextlib.redirect_stdout),
            ("stderr", contextlib.redirect_stderr),
        ):
            if getattr(sys, name) is None:  # closed, as by `>&-`: nobody reads it
                absent.enter_context(redirect(absent.enter_context(open(os.devnull, "w"))))
        code = _exit_code(argv)
    if argv is None and threading.current_thread() is threading.main_thread():
        # What is left is the interpreter's end: Ctrl-C may cut it short, without a traceback of it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _exit_code(argv: list[str] | None) -> int:
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a character that cannot be shown is no error
        try:
            arguments = _parser().parse_args(argv)
            code = arguments.run(arguments)
        except SystemExit as stop:  # argparse, after --help
            code = int(stop.code or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if os.environ.get("MSN_DEBUG"):
            raise
        print(f"msn: {one_line(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    finally:
        _forget_unwritable()


def _forget_unwritable() -> None:
    """Throw away what stdout cannot take (its reader has gone, a full disk): Python would try again
    at its end, and complain.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="msn",
        description=(
            "Several tokens per forward pass from a causal language model, with unchanged output."
        ),
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="show the version and exit",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
