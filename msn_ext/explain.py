"""One step of best-first decoding, drawn: the draft tree, what came of it, as text and as SVG."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from html import escape

import torch
from torch import Tensor

from .decoding import BestFirst, Verified
from .ops import ADJACENT, DENOISED, NOISE, SUFFIX

SOURCES = (
    # bit, letter, word, what it is, colour on light and on dark ground
    (
        DENOISED,
        "D",
        "denoised",
        "what the model guessed behind a rejected guess (Jacobi)",
        "#1c7ed6",
        "#4dabf7",
    ),
    (
        ADJACENT,
        "R",
        "remembered",
        "what the model guessed after the same last tokens before",
        "#e8590c",
        "#ffa94d",
    ),
    (
        SUFFIX,
        "S",
        "suffix",
        "what followed the same words earlier in the text",
        "#9c36b5",
        "#da77f2",
    ),
    (NOISE, "N", "noise", "stands in where nothing is known, to be denoised", "#868e96", "#868e96"),
)
TAIL = 48
"""Tokens of the text before a step that are kept to be shown."""
CHANCE = (
    "%  the chance, estimated beforehand, that a guess is accepted; all together: the expected gain"
)
GREEN, CYAN, DIM, BOLD, PLAIN = "\033[32m", "\033[36m", "\033[2m", "\033[1m", "\033[0m"


@dataclass
class Step:
    """What one forward pass checked and gained, on the host. Nodes are numbered from the root, 0.

    Attributes:
        number: of the pass, 1 for the first behind the prompt's.
        text: the end of the text before it; its last token is the root.
        tokens, parents: of every node, without padding; the root's parent is -1.
        probability: that the node is accepted, as :func:`msn_ext.ops.draft_tree` expects it.
        sources: of every node, the sum of :data:`SOURCES`' bits.
        path: the accepted nodes, root first.
        bonus: the token that the model puts behind them.
        kept: tokens gained; less than ``accept_length`` where the answer ends among them.
        passes: of the whole answer, the prompt's not counted.
    """

    number: int
    text: list[int]
    tokens: list[int]
    parents: list[int]
    probability: list[float]
    sources: list[int]
    path: list[int]
    bonus: int
    kept: int
    passes: int

    @property
    def accept_length(self) -> int:
        return len(self.path)

    @property
    def expected(self) -> float:
        """The accept length that was expected; the root stands for the bonus, which is certain."""
        return sum(self.probability)

    @property
    def gained(self) -> list[int]:
        """The tokens of the path and the bonus."""
        return [*(self.tokens[node] for node in self.path[1:]), self.bonus]


class Recorder(BestFirst):
    """Best-first drafting, for a batch of one, that keeps a :class:`Step` of every pass but the
    prompt's.

    Attributes:
        steps: of the last call of ``generate``, in order.
    """

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        if batch != 1:
            raise ValueError(f"batch is {batch}; expected 1: one row's steps are kept")
        super().start(batch, vocabulary, device)
        self.steps: list[Step] = []
        self._prompt = True

    def observe(self, verified: Verified) -> None:
        super().observe(verified)
        if not self._prompt:
            self.steps.append(self._step(verified))
        self._prompt = False

    def _step(self, verified: Verified) -> Step:
        draft, length, accepted = (
            verified.draft,
            int(verified.lengths[0]),
            int(verified.accept_length[0]),
        )
        tokens, parents = (
            draft.tokens[0].tolist(),
            draft.parents.reshape(-1, len(draft))[0].tolist(),
        )
        nodes = 1 + sum(parent >= 0 for parent in parents)  # padding comes last
        if draft is self.draft:
            probability, sources = (
                self.probability[0, :nodes].tolist(),
                self.sources[0, :nodes].tolist(),
            )
        else:  # the root alone was checked
            probability, sources = [1.0] * nodes, [0] * nodes
        path = verified.path[0, :accepted].tolist()
        return Step(
            number=len(self.steps) + 1,
            text=verified.history[0, max(0, length - TAIL) : length].tolist(),
            tokens=tokens[:nodes],
            parents=parents[:nodes],
            probability=probability,
            sources=sources,
            path=path,
            bonus=int(verified.targets[0, path[-1]]),
            kept=accepted,
            passes=0,
        )


def record(model, input_ids: Tensor, nodes: int, max_new_tokens: int) -> list[Step]:
    """Decode greedily with trees of ``nodes`` nodes, and show every pass behind the prompt's.

    Args:
        model: a causal language model.
        input_ids: int64 [1, P].
        nodes: per tree, root included, 1 to 256.
        max_new_tokens: to gain.

    Returns:
        One step a pass; none where the prompt's pass gained everything.
    """
    from .generation import generate

    drafter = Recorder(nodes)
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    lengths = generate(model, input_ids, draft=drafter, **options).accept_lengths[0].tolist()
    for step, kept in zip(drafter.steps, lengths[1:], strict=True):
        step.kept, step.passes = kept, len(drafter.steps)
    return drafter.steps


# ---- what both pictures say
# ------------------------------------------------------------------------


@dataclass
class _Line:
    """A node as it is drawn; ``node`` is None for the bonus."""

    node: int | None
    depth: int
    children: list[_Line] = field(default_factory=list)
    hidden: int = 0  # nodes below it that are left out
    row: int = 0


def _tree(step: Step, min_probability: float) -> tuple[_Line, list[int]]:
    """The nodes to draw, likeliest children first and the bonus before them, and those left out."""
    path = set(step.path)
    lines = {0: _Line(0, 0)}
    over = [0]  # the deepest drawn node at or above every node
    for node in range(1, len(step.tokens)):
        parent = step.parents[node]
        if parent in lines and (node in path or step.probability[node] >= min_probability):
            lines[node] = _Line(node, lines[parent].depth + 1)
            lines[parent].children.append(lines[node])
            over.append(node)
        else:
            lines[over[parent]].hidden += 1
            over.append(over[parent])
    for line in lines.values():
        line.children.sort(key=lambda child: -step.probability[child.node])
    last = lines[step.path[-1]]
    last.children.insert(0, _Line(None, last.depth + 1))
    return lines[0], [node for node in range(len(step.tokens)) if node not in lines]


def _token(tokenizer, token: int) -> str:
    """A token's text with spaces and line feeds that can be seen; its number where it is part of a
    character.
    """
    once = _decode(tokenizer, [token])
    # some tokenizers drop the first space of a text, but not that of a second token
    twice = _decode(tokenizer, [token, token])
    text = twice[len(once) :] if twice.startswith(once) else once
    return (
        f"#{token}"
        if not text or "\ufffd" in text
        else _shortened(_visible(text).replace(" ", "␣"), 24)
    )


def _decode(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _visible(text: str) -> str:
    """``text`` on one line, without anything that a terminal or XML takes for a command."""
    text = text.replace("\r\n", "⏎").translate({10: "⏎", 9: "⇥"})
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def _columns(text: str) -> int:
    """How many columns of a terminal ``text`` takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def _shortened(text: str, most: int, end: bool = False) -> str:
    """At most ``most`` columns of the beginning of ``text``, or of its end."""
    if _columns(text) <= most:
        return text
    while _columns(text) >= most:
        text = text[1:] if end else text[:-1]
    return "…" + text if end else text + "…"


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))


def _percent(probability: float) -> str:
    if 0 < probability < 0.0005:
        return "<0.1%"
    digits = 1 if 0 < probability < 0.0995 else 0
    return f"{100 * probability:.{digits}f}%"


def _letters(sources: int) -> str:
    return "".join(letter for bit, letter, *_ in SOURCES if sources & bit)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _title(step: Step) -> str:
    of = f" of {step.passes}" if step.passes else ""
    return (
        f"Forward pass {step.number}{of} behind the prompt's: {_count(step.accept_length, 'token')}"
        f" gained, {step.expected:.1f} expected, {_count(len(step.tokens), 'node')}"
    )


def _before(step: Step, tokenizer, most: int) -> str:
    text = _visible(_decode(tokenizer, step.text).lstrip("\ufffd"))
    return f"The text before it: {_shortened(text, most, end=True)}"


def _outcome(step: Step) -> list[str]:
    """What the pass was good for, and what became of its tokens if not all were kept."""
    gain = step.accept_length
    if gain == 1:
        why = "No guess was right" if len(step.tokens) > 1 else "Nothing was guessed"
        return [f"{why}: this pass gained 1 token, as one of plain decoding does."]
    lines = [f"This pass gained {gain} tokens. Plain decoding would have needed {gain} passes."]
    if step.kept < gain:
        first = "first" if step.kept == 1 else f"first {step.kept}"
        lines.append(f"Only the {first} of them counted: there the answer ended.")
    return lines


def _left_out(step: Step, hidden: list[int], min_probability: float) -> str:
    total = sum(step.probability[node] for node in hidden)
    return (
        f"{_count(len(hidden), 'node')} below {100 * min_probability:g}% left out (+n: how many"
        f" there), together {total:.2f} tokens expected"
    )


# ---- text
# ------------------------------------------------------------------------------------------


def as_text(step: Step, tokenizer, min_probability: float = 0.0, color: bool = False) -> str:
    """The draft tree with its accepted path, probabilities and sources, for a terminal.

    Args:
        step: from :func:`record`.
        tokenizer: the model's.
        min_probability: leave out nodes that are less probable, unless they were accepted.
        color: with the terminal's colours.

    Returns:
        Several lines, without a line feed at the end.
    """

    def paint(code: str, text: str) -> str:
        return f"{code}{text}{PLAIN}" if color and text else text

    root, hidden = _tree(step, min_probability)
    path = set(step.path)
    rows: list[tuple[str, str, _Line]] = []  # branches, token

    def walk(line: _Line, branch: str, indent: str) -> None:
        rows.append(
            (
                branch,
                _token(tokenizer, step.bonus if line.node is None else step.tokens[line.node]),
                line,
            )
        )
        for child in line.children:
            last = child is line.children[-1]
            walk(child, indent + ("└─" if last else "├─"), indent + ("  " if last else "│ "))

    walk(root, "", "")
    width = max(_columns(branch + token) for branch, token, _ in rows)
    lines = [paint(BOLD, _title(step)), _before(step, tokenizer, 76), ""]
    for branch, token, line in rows:
        space = " " * (width - _columns(branch + token))
        if line.node is None:
            lines.append(
                f"{paint(CYAN, '★')} {paint(DIM, branch)}{paint(CYAN, token)}{space}         bonus"
            )
            continue
        accepted, probability = line.node in path, step.probability[line.node]
        mark, name = (paint(GREEN, "✓"), paint(GREEN, token)) if accepted else (" ", token)
        sources = "".join(
            letter if step.sources[line.node] & bit else "·" for bit, letter, *_ in SOURCES
        )
        note = "root" if line.node == 0 else sources
        more = f"  +{line.hidden}" if line.hidden else ""
        rest = f"{_percent(probability):>5}  {note}  {paint(DIM, _bar(probability, 8))}{more}"
        lines.append(f"{mark} {paint(DIM, branch)}{name}{space}  {rest}".rstrip())
    if hidden:
        lines += ["", _left_out(step, hidden, min_probability)]

    accepted = (
        " ".join(_token(tokenizer, token) for token in step.gained[:-1]) or "none of the guesses"
    )
    lines += ["", f"{paint(GREEN, '✓')} accepted  {paint(GREEN, accepted)}"]
    bonus = paint(CYAN, _token(tokenizer, step.bonus))
    lines.append(f"{paint(CYAN, '★')} bonus     {bonus}   the model's own token behind them")
    lines += [*(f"  {line}" for line in _outcome(step)), ""]
    lines.append(f"{'where the guesses come from':72}{'nodes':>6}{'accepted':>10}")
    for bit, letter, word, meaning, *_ in SOURCES:
        made = [node for node in range(len(step.tokens)) if step.sources[node] & bit]
        lines.append(
            f"{letter}  {word:12}{meaning:57}{len(made):6}{sum(node in path for node in made):10}"
        )
    return "\n".join([*lines, CHANCE])


def _bar(share: float, width: int) -> str:
    eighths = round(8 * width * min(share, 1.0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


# ---- SVG
# -------------------------------------------------------------------------------------------

_MARGIN, _HEAD, _ROW, _BOX, _GAP = 20, 92, 48, 38, 34  # pixels; _GAP lies between columns
_CHARACTER, _SMALL = 7.9, 6.3  # widths of the tokens' and the other characters
_CAPTION = ' text-anchor="middle" font-size="11"'

_STYLE = {
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
} | {letter: ("", f"fill:{light}", f"fill:{dark}") for _, letter, _, _, light, dark in SOURCES}


def as_svg(step: Step, tokenizer, min_probability: float = 0.0) -> str:
    """The draft tree as a picture that needs nothing else, for light and dark ground.

    One column a depth, one row a leaf. Green: accepted; the strip at a box's left side has the
    colours of its sources; what is improbable is faint.

    Args:
        step, tokenizer, min_probability: as for :func:`as_text`.

    Returns:
        An XML document.
    """
    root, hidden = _tree(step, min_probability)
    path = set(step.path)
    lines: list[_Line] = []
    row = 0

    def place(line: _Line) -> None:
        """A node on the row of its first child; every other child opens rows of its own."""
        nonlocal row
        line.row = row
        lines.append(line)
        for child in line.children:
            row += child is not line.children[0]
            place(child)

    place(root)

    def words(line: _Line) -> tuple[str, str]:
        """What stands in a box: the token, and the rest."""
        if line.node is None:
            return _token(tokenizer, step.bonus), "bonus"
        rest = (
            f"{_percent(step.probability[line.node])} {_letters(step.sources[line.node])}"
            if line.node
            else "root"
        )
        return _token(tokenizer, step.tokens[line.node]), rest + (
            f" +{line.hidden}" if line.hidden else ""
        )

    widths = [0.0] * (1 + max(line.depth for line in lines))
    for line in lines:
        token, rest = words(line)
        widths[line.depth] = max(
            widths[line.depth], 24 + max(_columns(token) * _CHARACTER, len(rest) * _SMALL)
        )
    lefts = [float(_MARGIN)]
    for width in widths:
        lefts.append(lefts[-1] + width + _GAP)

    head, outcome = [_title(step), _before(step, tokenizer, 90)], _outcome(step)
    if hidden:
        outcome.append(_left_out(step, hidden, min_probability))
    bottom = _HEAD + _ROW * (row + 1) + 14
    legend = [*(f"{letter}  {word}: {meaning}" for _, letter, word, meaning, *_ in SOURCES), CHANCE]
    height = bottom + 18 * (len(legend) + len(outcome)) + 24
    longest = max(len(text) for text in (*head, *outcome, *legend)) * 7.2 + 2 * _MARGIN + 24
    width = max(lefts[-1] - _GAP + _MARGIN, longest)

    svg = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
            f' viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" font-size="13"'
            ' role="img">'
        ),
        f"<title>{escape(head[0])}</title>",
        f"<style>{_css()}</style>",
        '<rect class="ground" width="100%" height="100%"/>',
    ]

    def write(x: float, y: float, text: str, kind: str, more: str = "") -> None:
        svg.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{more}>{escape(text)}</text>')

    write(_MARGIN, 30, head[0], "title")
    write(_MARGIN, 52, head[1], "text")
    for depth, left in enumerate(lefts[:-1]):
        write(
            left + widths[depth] / 2, 80, f"+{depth}" if depth else "text's end", "faint", _CAPTION
        )

    taken = []
    for line in lines:
        y = _HEAD + _ROW * line.row + _BOX / 2
        for child in line.children:
            to = _HEAD + _ROW * child.row + _BOX / 2
            x = lefts[line.depth] + widths[line.depth]
            bend = x + _GAP / 2
            turn = (
                f"H{bend:.1f} V{to - 8:.1f} Q{bend:.1f} {to:.1f} {bend + 8:.1f} {to:.1f} "
                if to > y
                else ""
            )
            curve = f'd="M{x:.1f} {y:.1f} {turn}H{x + _GAP:.1f}"'
            if child.node is None or child.node in path:
                taken.append(f'<path class="taken" {curve}/>')
            else:
                probability = step.probability[child.node]
                svg.append(f'<path class="edge" stroke-width="{1 + 3 * probability:.2f}" {curve}/>')
    svg += taken  # over the others
    for line in lines:
        token, rest = words(line)
        x, y, wide = lefts[line.depth], _HEAD + _ROW * line.row, widths[line.depth]
        kind, opacity, bits = "bonus", 1.0, 0
        if line.node is not None:
            kind = "root" if line.node == 0 else "accepted" if line.node in path else "box"
            bits = step.sources[line.node]
            if kind == "box":
                opacity = 0.6 + 0.4 * min(step.probability[line.node], 1.0) ** 0.5
        svg.append(f'<g opacity="{opacity:.2f}"><title>{escape(_hint(step, line, token))}</title>')
        svg.append(
            f'<rect class="node {kind}" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{_BOX}"'
            ' rx="7"/>'
        )
        strips = [letter for bit, letter, *_ in SOURCES if bits & bit]
        for i, letter in enumerate(strips):
            tall = (_BOX - 10) / len(strips)
            at = f'x="{x + 4:.1f}" y="{y + 5 + i * tall:.1f}"'
            svg.append(f'<rect class="{letter}" {at} width="5" height="{tall:.1f}"/>')
        middle = x + wide / 2 + (3 if strips else 0)
        write(middle, y + 16, token, "token", ' text-anchor="middle"')
        write(middle, y + 31, rest, "gains" if kind == "bonus" else "text", _CAPTION)
        svg.append("</g>")

    y = bottom + 18
    for i, text in enumerate(outcome):
        write(_MARGIN, y, text, "faint" if i else "title")
        y += 18
    for i, text in enumerate(legend):
        if i < len(SOURCES):
            svg.append(
                f'<rect class="{SOURCES[i][1]}" x="{_MARGIN}" y="{y - 10}" width="5" height="12"/>'
            )
        write(_MARGIN + 14, y, text, "faint")
        y += 18
    return "\n".join([*svg, "</svg>\n"])


def _hint(step: Step, line: _Line, token: str) -> str:
    """What a browser shows at a box."""
    if line.node is None:
        return f"{token}: the model's own token behind the accepted path"
    if line.node == 0:
        return f"{token}: the last token of the text"
    words = ", ".join(word for bit, _, word, *_ in SOURCES if step.sources[line.node] & bit)
    verdict = "accepted" if line.node in step.path else "rejected"
    return (
        f"{token}: node {line.node}, probability {step.probability[line.node]:.4f}, {words},"
        f" {verdict}"
    )


def _css() -> str:
    def rules(which: int) -> str:
        return "".join(f".{name}{{{rule[which]}}}" for name, rule in _STYLE.items() if rule[which])

    return f"{rules(0)}{rules(1)}@media(prefers-color-scheme:dark){{{rules(2)}}}"
