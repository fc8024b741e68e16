"""Show a step as text, for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from .outline import (
    CHANCE,
    SOURCES,
    Line,
    columns,
    left_out,
    outcome,
    outline,
    percent,
    text_before,
    title,
    token_text,
)
from .recording import Step

GREEN, CYAN, DIM, BOLD, PLAIN = "\033[32m", "\033[36m", "\033[2m", "\033[1m", "\033[0m"


@dataclass
class _Paint:
    """Colour a text where colours are wanted."""

    color: bool

    def __call__(self, code: str, text: str) -> str:
        return f"{code}{text}{PLAIN}" if self.color and text else text


def as_text(step: Step, tokenizer, min_probability: float = 0.0, color: bool = False) -> str:
    """Draw the draft tree with its accepted path, probabilities and sources, for a terminal.

    Args:
        step: from :func:`record`.
        tokenizer: the model's.
        min_probability: leave out nodes that are less probable, unless they were accepted.
        color: with the terminal's colours.

    Returns:
        Several lines, without a line feed at the end.
    """
    paint = _Paint(color)
    root, hidden = outline(step, min_probability)
    lines = [paint(BOLD, title(step)), text_before(step, tokenizer, 76), ""]
    lines += _tree(step, root, tokenizer, paint)
    if hidden:
        lines += ["", left_out(step, hidden, min_probability)]
    lines += ["", *_gained(step, tokenizer, paint)]
    lines += [*(f"  {line}" for line in outcome(step)), ""]
    return "\n".join([*lines, *_sources(step), CHANCE])


def _tree(step: Step, root: Line, tokenizer, paint: _Paint) -> list[str]:
    """Draw a line per node, its branches on the left and its figures in one column."""
    rows: list[tuple[str, str, Line]] = []  # branches, token

    def walk(line: Line, branch: str, indent: str) -> None:
        token = step.bonus if line.node is None else step.tokens[line.node]
        rows.append((branch, token_text(tokenizer, token), line))
        for child in line.children:
            last = child is line.children[-1]
            walk(child, indent + ("└─" if last else "├─"), indent + ("  " if last else "│ "))

    walk(root, "", "")
    width = max(columns(branch + token) for branch, token, _ in rows)
    lines = []
    for branch, token, line in rows:
        space = " " * (width - columns(branch + token))
        if line.node is None:
            star, name = paint(CYAN, "★"), paint(CYAN, token)
            lines.append(f"{star} {paint(DIM, branch)}{name}{space}         bonus")
        else:
            accepted = line.node in step.path
            mark, name = (paint(GREEN, "✓"), paint(GREEN, token)) if accepted else (" ", token)
            figures = _figures(step, line.node, line.hidden, paint)
            lines.append(f"{mark} {paint(DIM, branch)}{name}{space}  {figures}".rstrip())
    return lines


def _figures(step: Step, node: int, hidden: int, paint: _Paint) -> str:
    """Return a node's probability, as number and bar, its sources, and the nodes hidden below."""
    probability = step.probability[node]
    sources = "".join(
        source.letter if step.sources[node] & source.bit else "·" for source in SOURCES
    )
    note = "root" if node == 0 else sources
    more = f"  +{hidden}" if hidden else ""
    return f"{percent(probability):>5}  {note}  {paint(DIM, _bar(probability, 8))}{more}"


def _bar(share: float, width: int) -> str:
    eighths = round(8 * width * min(share, 1.0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _gained(step: Step, tokenizer, paint: _Paint) -> list[str]:
    """Name the accepted guesses and the bonus."""
    guesses = [token_text(tokenizer, token) for token in step.gained[:-1]]
    accepted = paint(GREEN, " ".join(guesses) or "none of the guesses")
    bonus = paint(CYAN, token_text(tokenizer, step.bonus))
    return [
        f"{paint(GREEN, '✓')} accepted  {accepted}",
        f"{paint(CYAN, '★')} bonus     {bonus}   the model's own token after them",
    ]


def _sources(step: Step) -> list[str]:
    """Count the nodes of every source, and those of them that were accepted."""
    lines = [f"{'where the guesses come from':72}{'nodes':>6}{'accepted':>10}"]
    for source in SOURCES:
        made = [node for node in range(len(step.tokens)) if step.sources[node] & source.bit]
        accepted = sum(node in step.path for node in made)
        lines.append(
            f"{source.letter}  {source.word:12}{source.meaning:57}{len(made):6}{accepted:10}"
        )
    return lines
