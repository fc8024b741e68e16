"""Drawn steps, read back."""

import re
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
LINE = re.compile(
    r"([✓★ ]) ((?:│ |  )*)(├─|└─|)(\S+) +"  # accepted or bonus, branches, token
    r"(?:([\d.<]+%)  (root|[DASN·]{4})|(bonus))(?: +[█▏▎▍▌▋▊▉]+)?(?: +\+(\d+))?"
)


def drawn(text: str) -> tuple[list[dict], str]:
    """The tree's lines, parsed, with the token of the line above each, and the rest of the text."""
    head, tree, rest = text.split("\n\n", 2)
    found, above = [], []
    for line in tree.splitlines():
        mark, indent, branch, token, percent, sources, bonus, more = LINE.fullmatch(line).groups()
        depth = len(indent) // 2 + bool(branch)
        above[depth:] = [token]
        found.append(
            dict(
                mark=mark,
                token=token,
                parent=above[depth - 1] if depth else None,
                percent=percent,
                sources=sources,
                bonus=bool(bonus),
                more=int(more or 0),
            )
        )
    return found, f"{head}\n\n{rest}"


def boxes(svg: str) -> list[tuple[float, ...]]:
    rects = [
        r
        for r in ElementTree.fromstring(svg).iter(f"{SVG}rect")
        if r.get("class", "").startswith("node ")
    ]
    return [tuple(float(r.get(name)) for name in ("x", "y", "width", "height")) for r in rects]
