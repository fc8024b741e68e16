"""Show a whole answer as a page to step through, one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from html import escape
from importlib import resources

from .outline import SOURCES, outcome, token_text
from .recording import Answer, Step

LONGEST = 4  # tokens of one character: bytes
JOINERS = "\u200c\u200d"  # not printable, but parts of words and of emoji


def as_html(
    answer: Answer,
    tokenizer,
    heading: str | None = None,
    number: int = 1,
    min_probability: float = 0.0,
) -> str:
    """Make a page that steps through every pass of an answer: the tree, the accepted path, the
    text so far. It asks no network for anything, and its policy forbids it to.

    Args:
        answer: from :func:`record_answer`, with at least one step.
        tokenizer: the model's.
        heading: what was asked; None: the decoded prompt.
        number: of the pass that is shown first; a fragment of the page's address (``#12``) names
            another.
        min_probability: fold nodes that are less probable, unless they were accepted, until the
            reader asks for them.

    Returns:
        An HTML document.

    Raises:
        ValueError: there is no step, or no pass of that number.
    """
    if not 1 <= number <= len(answer.steps):
        raise ValueError(f"number is {number}; expected a pass from 1 to {len(answer.steps)}")
    prompt = shown("".join(pieces(tokenizer, answer.prompt)))
    title = prompt if heading is None else shown(heading)
    data = page_data(answer, tokenizer) | {"first": number, "least": min_probability}
    style, script = _file("style.css"), _file("script.js")
    colours = {
        name: "".join(f"--{source.letter}: {getattr(source, name)}; " for source in SOURCES)
        for name in ("light", "dark")
    }
    style = style.replace("/* LIGHT */", colours["light"]).replace("/* DARK */", colours["dark"])
    parts = {
        "POLICY": f"default-src 'none'; img-src data:; style-src {_hash(style)};"
        f" script-src {_hash(script)}",
        "TITLE": escape(" ".join(title.split())[:80]),
        "HEADING": escape(title),
        "PROMPT": escape(prompt),
        "PROMPT-TOKENS": str(len(answer.prompt)),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _json(data),
    }
    # one walk over the template, so that nothing in a part is taken for a place
    first, *places = _file("page.html").split("{{")
    page = [first]
    for place in places:
        name, _, rest = place.partition("}}")
        page += [parts[name], rest]
    return "".join(page)


def page_data(answer: Answer, tokenizer) -> dict:
    """Return what the page knows of an answer, for JSON.

    ``tokens`` has the words for every token that occurs, by its number; ``text`` the answer's
    text, one piece a token; a pass is a list in the order of ``fields``.
    """
    steps = answer.steps
    occurring = {*answer.opening}.union(*({*step.tokens, step.bonus} for step in steps))
    return {
        "sources": [
            {"bit": source.bit, "letter": source.letter, "word": source.word, "is": source.meaning}
            for source in SOURCES
        ],
        "tokens": {token: token_text(tokenizer, token) for token in sorted(occurring)},
        "opening": len(answer.opening),
        "text": [shown(piece) for piece in pieces(tokenizer, answer.tokens, answer.prompt)],
        "fields": list(_pass(steps[0])) if steps else [],
        "passes": [list(_pass(step).values()) for step in steps],
    }


def _pass(step: Step) -> dict:
    return {
        "tokens": step.tokens,
        "parents": step.parents,
        "probability": [float(f"{probability:.3g}") for probability in step.probability],
        "sources": step.sources,
        "path": step.path,
        "bonus": step.bonus,
        "kept": step.kept,
        "expected": round(step.expected, 2),
        "outcome": " ".join(outcome(step)),
    }


# ---- text


def pieces(tokenizer, tokens: list[int], before: list[int] | None = None) -> list[str]:
    """Return the text of every token after the tokens ``before``; that of a character which is
    several tokens belongs to the last of them.
    """

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    # decoded with what stands before it, since tokenizers treat the first token of a text apart
    known = (before or [])[-8:]
    tokens = [*known, *tokens]
    start, done, found = 0, len(known), [""] * len(tokens)
    for end in range(len(known) + 1, len(tokens) + 1):
        old, new = decode(tokens[start:done]), decode(tokens[start:end])
        if new.endswith("\ufffd") and end < min(len(tokens), done + LONGEST):
            continue
        found[end - 1] = new[len(old) :]
        start, done = done, end
    return found[len(known) :]


def shown(text: str) -> str:
    """Return ``text`` without characters that command a page (controls, changes of direction,
    halves of characters): they are written out.
    """
    return "".join(
        c
        if c.isprintable() or c in "\n\t" or c in JOINERS or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text.replace("\r\n", "\n")
    )


# ---- the page's parts


def _file(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _json(data: dict) -> str:
    """Return ASCII in which nothing ends a script or begins a comment."""
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
