"""Show a step as a picture, SVG that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

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

MARGIN, HEAD, ROW, BOX, GAP = 20, 92, 48, 38, 34  # pixels; GAP lies between columns
CHARACTER, SMALL = 7.9, 6.3  # widths of the tokens' and the other characters
LEADING = 18  # from line to line of the text below the tree
CAPTION = ' text-anchor="middle" font-size="11"'

STYLE = {
    # class: what is the same on light and dark ground, light, dark
    "ground": ("", "fill:#ffffff", "fill:#0d1117"),
    "text": ("", "fill:#1f2328", "fill:#e6edf3"),
    "faint": ("", "fill:#59636e", "fill:#9198a1"),
    "token": (
        "font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace",
        "fill:#1f2328",
        "fill:#e6edf3",
    ),
    "title": ("font-weight:bold;font-size:14px", "fill:#1f2328", "fill:#e6edf3"),
    "box": (
        "stroke-width:1;stroke-dasharray:4 3",
        "fill:#f6f8fa;stroke:#afb8c1",
        "fill:#161b22;stroke:#484f58",
    ),
    "root": ("stroke-width:2", "fill:#cfd8ff;stroke:#3b5bdb", "fill:#26326b;stroke:#748ffc"),
    "accepted": ("stroke-width:2", "fill:#bfe8c8;stroke:#2b8a3e", "fill:#14442a;stroke:#51cf66"),
    "bonus": (
        "stroke-width:2;stroke-dasharray:none",
        "fill:#ffffff;stroke:#2b8a3e",
        "fill:#0d1117;stroke:#51cf66",
    ),
    "gains": ("", "fill:#2b8a3e", "fill:#69db7c"),
    "edge": ("fill:none", "stroke:#afb8c1", "stroke:#484f58"),
    "taken": ("fill:none;stroke-width:3.5", "stroke:#2b8a3e", "stroke:#51cf66"),
} | {source.letter: ("", f"fill:{source.light}", f"fill:{source.dark}") for source in SOURCES}


def as_svg(step: Step, tokenizer, min_probability: float = 0.0) -> str:
    """Draw the draft tree as a picture that needs nothing else, for light and dark ground.

    One column a depth, one row a leaf. Green: accepted; the strip at a box's left side has the
    colours of its sources; what is improbable is faint.

    Args:
        step, tokenizer, min_probability: as for :func:`as_text`.

    Returns:
        An XML document.
    """
    root, hidden = outline(step, min_probability)
    rows = _place(root, 0)
    boxes = [_box(step, line, tokenizer) for line in root.walk()]
    lefts, widths = _columns(boxes)

    heading, below = [title(step), text_before(step, tokenizer, 90)], outcome(step)
    if hidden:
        below.append(left_out(step, hidden, min_probability))
    legend = [f"{source.letter}  {source.word}: {source.meaning}" for source in SOURCES]
    legend.append(CHANCE)
    bottom = HEAD + ROW * rows + 14
    height = bottom + LEADING * (len(legend) + len(below)) + 24
    longest = max(len(text) for text in (*heading, *below, *legend)) * 7.2 + 2 * MARGIN + 24
    width = max(lefts[-1] + widths[-1] + MARGIN, longest)
    svg = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
            f' viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" font-size="13"'
            ' role="img">'
        ),
        f"<title>{escape(heading[0])}</title>",
        f"<style>{_css()}</style>",
        '<rect class="ground" width="100%" height="100%"/>',
        *_heading(heading, lefts, widths),
        *_edges(step, root, lefts, widths),
    ]
    for box in boxes:
        svg += _drawn(box, lefts[box.line.depth], widths[box.line.depth])
    return "\n".join([*svg, *_below(below, legend, bottom + LEADING), "</svg>\n"])


def _css() -> str:
    def rules(which: int) -> str:
        return "".join(f".{name}{{{rule[which]}}}" for name, rule in STYLE.items() if rule[which])

    return f"{rules(0)}{rules(1)}@media(prefers-color-scheme:dark){{{rules(2)}}}"


def _write(x: float, y: float, text: str, kind: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escape(text)}</text>'


# ---- where everything stands


def _place(line: Line, row: int) -> int:
    """Put a node on ``row``, its first child too, and every other child on rows of its own; return
    the first row that is free.
    """
    line.row = row
    free = row + 1
    for child in line.children:
        free = _place(child, row if child is line.children[0] else free)
    return free


@dataclass
class _Box:
    """A node, or the bonus, as a box.

    Attributes:
        token, rest: its two lines of words.
        hint: shown by a browser at the box.
        kind: its class in :data:`STYLE`.
        sources: letters of :data:`SOURCES`.
        opacity: less than 1 for guesses that were improbable.
    """

    line: Line
    token: str
    rest: str
    hint: str
    kind: str
    sources: list[str]
    opacity: float


def _box(step: Step, line: Line, tokenizer) -> _Box:
    more = f" +{line.hidden}" if line.hidden else ""
    node = line.node
    if node is None:
        token = token_text(tokenizer, step.bonus)
        hint = f"{token}: the model's own token after the accepted path"
        return _Box(line, token, "bonus", hint, "bonus", [], 1.0)
    token, probability = token_text(tokenizer, step.tokens[node]), step.probability[node]
    sources = [source for source in SOURCES if step.sources[node] & source.bit]
    letters = [source.letter for source in sources]
    if node == 0:
        hint = f"{token}: the last token of the text"
        return _Box(line, token, f"root{more}", hint, "root", letters, 1.0)
    accepted = node in step.path
    hint = (
        f"{token}: node {node}, probability {probability:.4f},"
        f" {', '.join(source.word for source in sources)}, {'accepted' if accepted else 'rejected'}"
    )
    opacity = 1.0 if accepted else 0.6 + 0.4 * min(probability, 1.0) ** 0.5
    rest = f"{percent(probability)} {''.join(letters)}{more}"
    return _Box(line, token, rest, hint, "accepted" if accepted else "box", letters, opacity)


def _columns(boxes: list[_Box]) -> tuple[list[float], list[float]]:
    """Return the left side and the width of the column of every depth."""
    widths = [0.0] * (1 + max(box.line.depth for box in boxes))
    for box in boxes:
        words = max(columns(box.token) * CHARACTER, len(box.rest) * SMALL)
        widths[box.line.depth] = max(widths[box.line.depth], 24 + words)
    lefts = [float(MARGIN)]
    for width in widths[:-1]:
        lefts.append(lefts[-1] + width + GAP)
    return lefts, widths


# ---- its parts


def _heading(heading: list[str], lefts: list[float], widths: list[float]) -> list[str]:
    """Write the title, the text before the pass, and how far every column lies after its end."""
    svg = [_write(MARGIN, 30, heading[0], "title"), _write(MARGIN, 52, heading[1], "text")]
    for depth, (left, width) in enumerate(zip(lefts, widths)):
        caption = f"+{depth}" if depth else "text's end"
        svg.append(_write(left + width / 2, 80, caption, "faint", CAPTION))
    return svg


def _edges(step: Step, root: Line, lefts: list[float], widths: list[float]) -> list[str]:
    """Draw a curve from every node to each child, those of the accepted path over the others."""
    others, taken = [], []
    for line in root.walk():
        y = HEAD + ROW * line.row + BOX / 2
        x = lefts[line.depth] + widths[line.depth]
        bend = x + GAP / 2
        for child in line.children:
            to = HEAD + ROW * child.row + BOX / 2
            turn = f"H{bend:.1f} V{to - 8:.1f} Q{bend:.1f} {to:.1f} {bend + 8:.1f} {to:.1f} "
            curve = f'd="M{x:.1f} {y:.1f} {turn if to > y else ""}H{x + GAP:.1f}"'
            if child.node is None or child.node in step.path:
                taken.append(f'<path class="taken" {curve}/>')
            else:
                width = 1 + 3 * step.probability[child.node]
                others.append(f'<path class="edge" stroke-width="{width:.2f}" {curve}/>')
    return others + taken


def _drawn(box: _Box, x: float, width: float) -> list[str]:
    """Draw a box: its frame, a strip in the colours of its sources, its words."""
    y = HEAD + ROW * box.line.row
    svg = [
        f'<g opacity="{box.opacity:.2f}"><title>{escape(box.hint)}</title>',
        (
            f'<rect class="node {box.kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}"'
            ' rx="7"/>'
        ),
    ]
    for i, letter in enumerate(box.sources):
        tall = (BOX - 10) / len(box.sources)
        at = f'x="{x + 4:.1f}" y="{y + 5 + i * tall:.1f}"'
        svg.append(f'<rect class="{letter}" {at} width="5" height="{tall:.1f}"/>')
    middle = x + width / 2 + (3 if box.sources else 0)
    svg.append(_write(middle, y + 16, box.token, "token", ' text-anchor="middle"'))
    kind = "gains" if box.kind == "bonus" else "text"
    return [*svg, _write(middle, y + 31, box.rest, kind, CAPTION), "</g>"]


def _below(outcome: list[str], legend: list[str], y: float) -> list[str]:
    """Write what came of the pass, and what letters and colours mean, from ``y`` downwards."""
    svg = []
    for i, text in enumerate(outcome):
        svg.append(_write(MARGIN, y, text, "faint" if i else "title"))
        y += LEADING
    for i, text in enumerate(legend):
        if i < len(SOURCES):
            letter = SOURCES[i].letter
            svg.append(f'<rect class="{letter}" x="{MARGIN}" y="{y - 10}" width="5" height="12"/>')
        svg.append(_write(MARGIN + 14, y, text, "faint"))
        y += LEADING
    return svg
