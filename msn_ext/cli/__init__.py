"""The command ``msn``.

Each of its commands is a module with ``HELP``, ``DESCRIPTION``, ``add_arguments(parser)`` and
``run(arguments)``, which does the work and returns the exit code. torch and transformers are
imported only once a command needs them.
"""

import argparse
import contextlib
import os
import sys

from . import chat, corpus, demo, explain, export_generate, generate, info, train, tune
from .common import UsageError, one_line

COMMANDS = {
    "demo": demo,
    "generate": generate,
    "chat": chat,
    "explain": explain,
    "tune": tune,
    "train": train,
    "corpus": corpus,
    "export-generate": export_generate,
    "info": info,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0, 1 for an error, 2 for a wrong command line, 130 for Ctrl-C, 141 where the
        reader of stdout has gone. Errors are one line on stderr; ``MSN_DEBUG=1`` adds the
        traceback.
    """
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a character that cannot be shown is no error
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # what is still buffered would raise again when Python closes stdout
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("MSN_DEBUG"):
            raise
        print(f"msn: {one_line(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="msn",
        description=(
            "Several tokens per forward pass from a causal language model, with unchanged output."
        ),
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
