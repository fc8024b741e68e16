"""The common part of text and picture: the nodes that are drawn, and the words about them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..ops import ADJACENCY, DENOISED, NOISE, SUFFIX
from .recording import Step


class Source(NamedTuple):
    """A source of guesses, and how it is shown."""

    bit: int
    letter: str
    word: str
    meaning: str
    light: str  # colour on light ground
    dark: str  # colour on dark ground


SOURCES = (
    Source(
        DENOISED,
        "D",
        "denoised",
        "what the model guessed after a rejected guess (Jacobi)",
        "#1c7ed6",
        "#4dabf7",
    ),
    Source(
        ADJACENCY,
        "A",
        "adjacency",
        "what the model guessed after the same last tokens before",
        "#e8590c",
        "#ffa94d",
    ),
    Source(
        SUFFIX,
        "S",
        "suffix",
        "what followed the same words earlier in the text",
        "#9c36b5",
        "#da77f2",
    ),
    Source(
        NOISE,
        "N",
        "noise",
        "stands in where nothing is known, to be denoised",
        "#868e96",
        "#868e96",
    ),
)
CHANCE = (
    "%  the chance, estimated beforehand, that a guess is accepted; all together: the expected gain"
)


@dataclass
class Line:
    """A node as it is drawn; ``node`` is None for the bonus."""

    node: int | None
    depth: int
    children: list[Line] = field(default_factory=list)
    hidden: int = 0  # nodes below it that are left out
    row: int = 0

    def walk(self) -> Iterator[Line]:
        """Yield this line and all below it, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


def outline(step: Step, min_probability: float) -> tuple[Line, list[int]]:
    """Return the root of the nodes to draw, likeliest children first and the bonus before them,
    and the nodes that are left out.
    """
    path = set(step.path)
    lines = {0: Line(0, 0)}
    drawn = [0]  # of every node: itself or its deepest ancestor that is drawn
    for node in range(1, len(step.tokens)):
        parent = step.parents[node]
        if parent in lines and (node in path or step.probability[node] >= min_probability):
            lines[node] = Line(node, lines[parent].depth + 1)
            lines[parent].children.append(lines[node])
            drawn.append(node)
        else:
            lines[drawn[parent]].hidden += 1
            drawn.append(drawn[parent])
    for line in lines.values():  # the bonus is no child yet, so all have numbers
        line.children.sort(key=lambda child: -step.probability[child.node or 0])
    last = lines[step.path[-1]]
    last.children.insert(0, Line(None, last.depth + 1))
    return lines[0], [node for node in range(len(step.tokens)) if node not in lines]


# ---- tokens and numbers


def token_text(tokenizer, token: int) -> str:
    """Return a token's text with spaces and line feeds that can be seen, or its number where it is
    part of a character.
    """
    once = _decode(tokenizer, [token])
    # some tokenizers drop the first space of a text, but not that of a second token
    twice = _decode(tokenizer, [token, token])
    text = twice[len(once) :] if twice.startswith(once) else once
    if not text or "\ufffd" in text:
        return f"#{token}"
    return _shortened(_visible(text).replace(" ", "␣"), 24)


def _decode(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _visible(text: str) -> str:
    """Return ``text`` on one line, without anything that a terminal or XML takes for a command."""
    text = text.replace("\r\n", "⏎").translate({10: "⏎", 9: "⇥"})
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def columns(text: str) -> int:
    """Count the columns of a terminal that ``text`` takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def _shortened(text: str, most: int, end: bool = False) -> str:
    """Return at most ``most`` columns of the beginning of ``text``, or of its end."""
    if columns(text) <= most:
        return text
    while columns(text) >= most:
        text = text[1:] if end else text[:-1]
    return "…" + text if end else text + "…"


def percent(probability: float) -> str:
    if 0 < probability < 0.0005:
        return "<0.1%"
    digits = 1 if 0 < probability < 0.0995 else 0
    return f"{100 * probability:.{digits}f}%"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---- sentences


def title(step: Step) -> str:
    of = f" of {step.passes}" if step.passes else ""
    return (
        f"Forward pass {step.number}{of} after the prompt's: {_count(step.accept_length, 'token')}"
        f" gained, {step.expected:.1f} expected, {_count(len(step.tokens), 'node')}"
    )


def text_before(step: Step, tokenizer, most: int) -> str:
    """Say what the text was before the pass, in at most ``most`` columns of its end."""
    text = _visible(_decode(tokenizer, step.text).lstrip("\ufffd"))
    return f"The text before it: {_shortened(text, most, end=True)}"


def outcome(step: Step) -> list[str]:
    """Say what the pass was good for, and what became of its tokens if not all were kept."""
    gain = step.accept_length
    if gain == 1:
        why = "No guess was right" if len(step.tokens) > 1 else "Nothing was guessed"
        return [f"{why}: this pass gained 1 token, as one of plain decoding does."]
    lines = [f"This pass gained {gain} tokens. Plain decoding would have needed {gain} passes."]
    if step.kept < gain:
        first = "first" if step.kept == 1 else f"first {step.kept}"
        lines.append(f"Only the {first} of them counted: there the answer ended.")
    return lines


def left_out(step: Step, hidden: list[int], min_probability: float) -> str:
    """Say how many nodes are not drawn, and how much was expected of them."""
    total = sum(step.probability[node] for node in hidden)
    return (
        f"{_count(len(hidden), 'node')} below {100 * min_probability:g}% left out (+n: how many"
        f" there), together {total:.2f} tokens expected"
    )
