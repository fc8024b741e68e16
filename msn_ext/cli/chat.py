"""``msn chat``: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .common import (
    DRAFTS,
    CommandError,
    add_draft_option,
    add_engine_option,
    add_model_options,
    add_weights_option,
    one_line,
    positive_int,
    status,
)
from .generate import add_sampling_options, sampling_of
from .loading import load_for

if TYPE_CHECKING:
    from .session import Session, Turn

HELP = "talk with a chat model"
DESCRIPTION = (
    "Talk with a chat model, several tokens per forward pass. What was said stays in the cache, so"
    " that a turn reads what is new. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists"
    " the commands. Through a pipe, every line is a message."
)
COMMANDS = f"""\
/draft NAME   draft by another way: {", ".join(DRAFTS)}
/stats        figures of this conversation
/reset        begin anew
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C ends an answer, twice leaves it out. A message that begins with / takes a space before it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before all others")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=1024,
        metavar="N",
        help="of an answer (default: 1024)",
    )
    add_draft_option(parser)
    add_engine_option(parser)
    add_weights_option(parser)
    add_sampling_options(parser)


def run(arguments: argparse.Namespace) -> int:
    sampling = sampling_of(arguments)
    with status("loading the model …"):
        import torch

        from msn_ext.terminal import quiet_transformers

        from .session import Session

        model, tokenizer, _ = load_for(arguments)
        if (seed := sampling.pop("seed", None)) is not None:
            torch.manual_seed(seed)
        session = Session(
            model,
            tokenizer,
            draft=arguments.draft,
            engine=arguments.engine,
            system=arguments.system,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.do_sample,
            **sampling,
        )
    if not tokenizer.chat_template:
        _say("this model has no chat template: messages follow each other as plain text")
    with quiet_transformers():
        Chat(session, tokenizer).run()
    return 0


class Chat:
    """Reads lines, and does what they say."""

    def __init__(self, session: Session, tokenizer):
        self._session, self._tokenizer = session, tokenizer
        self._turns: list[Figures] = []

    def run(self) -> None:
        """Go on until the input ends or a line says so."""
        if sys.stdin is None:
            raise CommandError("cannot read messages from standard input: it is closed")
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() edits lines then
            _say("/help lists the commands, Ctrl-D leaves")
        for line in _lines():
            if line.startswith("/"):
                if line.split()[0] == "/exit":
                    break
                self._command(*line.split())
            elif line.strip():
                self._turn(line.strip())

    def _command(self, name: str, *rest: str) -> None:
        if name == "/draft" and len(rest) == 1 and rest[0] in DRAFTS:
            self._session.set_draft(rest[0])
        elif name == "/draft":
            print(f"/draft is {self._session.draft}; expected {', '.join(DRAFTS)}")
        elif name == "/stats":
            print("\n".join(self._stats()))
        elif name == "/reset":
            self._session.reset()
            self._turns = []
        elif name == "/help":
            print(COMMANDS)
        else:
            _say(f"there is no {name}; /help lists the commands")
        sys.stdout.flush()

    def _turn(self, text: str) -> None:
        """Answer; whatever goes wrong, the conversation is as it was before."""
        from .session import TurnStreamer, interruptible

        streamer = TurnStreamer(self._tokenizer, sys.stdout)
        try:
            with interruptible() as stop:
                turn = self._session.answer(text, streamer, stop)
        except KeyboardInterrupt:
            print()
            _say("interrupted; this message and its answer were left out")
        except BrokenPipeError:
            raise
        except Exception as error:
            if os.environ.get("MSN_DEBUG"):
                raise
            if streamer.first_at is not None:
                print()
            _say(one_line(error))
        else:
            print(flush=True)
            self._turns.append(Figures(turn))
            _say(self._turns[-1].line)
            if turn.ended in _ENDS:
                _say(_ENDS[turn.ended])

    def _stats(self) -> Iterator[str]:
        session, turns = self._session, self._turns
        room = "" if session.context is None else f" of {session.context}"
        yield f"{session.tokens} tokens{room}, {session.cache_bytes / 2**20:.1f} MiB of cache"
        yield f"engine {session.engine}, draft {session.draft}"
        if turns:
            tokens, passes = (sum(getattr(turn, name) for turn in turns) for name in _SUMS)
            rate = tokens / sum(turn.seconds for turn in turns)
            yield (
                f"{len(turns)} answers: {tokens} tokens, {rate:.1f} tokens/s,"
                f" {tokens / passes:.2f} tokens a pass"
            )
            yield f"the last one: {turns[-1].line}, {turns[-1].reading}"


class Figures:
    """What is kept of a turn."""

    def __init__(self, turn: Turn):
        run = turn.run
        self.tokens, self.passes, self.seconds = len(run.tokens), run.passes, run.seconds
        self.line = (
            f"{self.tokens} tokens, {run.tokens_per_second:.1f} tokens/s, {run.mat:.2f} tokens a"
            " pass"
        )
        self.reading = (
            f"the first after {turn.first_token or 0:.2f} s, {turn.reused} tokens not read again"
        )


_SUMS = "tokens", "passes"
_ENDS = {
    "interrupt": "interrupted",
    "limit": "cut: it has as many tokens as --max-new-tokens allows",
    "context": "the model's context is full, and the answer ends here; /reset begins anew",
}


def _say(text: str) -> None:
    """Print what is no part of the conversation."""
    dim, usual = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}[{text}]{usual}", file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Yield the lines that the user types, or that come through a pipe."""
    while True:
        if sys.stdin.isatty():
            try:
                yield input("> ")
            except KeyboardInterrupt:
                print()
                _say("Ctrl-D or /exit leaves")
            except EOFError:
                print()
                return
            continue
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            text = line.decode()
        except UnicodeDecodeError:
            _say("a line that is not UTF-8 was left out")
            continue
        yield text.rstrip("\r\n")
