"""Two ways to decode that say the same, by turns: tokens per forward pass and per second."""

from __future__ import annotations

import time
from collections.abc import Callable

from tails import decode

from msn_ext.decoding import Drafter

Way = tuple[object, Callable[[int | None], Drafter]]
"""A model, and what drafts trees of so many nodes; None: of sizes of its own choice."""


def race(ways: dict[str, Way], prompt: list[int], nodes: int | None, new_tokens: int) -> dict:
    """Return the tokens of an answer, and by way its passes and the seconds of the whole call.

    Raises:
        SystemExit: they have not said the same.
    """
    row: dict = {"nodes": nodes or "auto"}
    texts = []
    for name, (model, drafter) in ways.items():
        start = time.perf_counter()
        text, accepts = decode(model, prompt, drafter(nodes), new_tokens)
        row[name] = {"passes": len(accepts), "seconds": time.perf_counter() - start}
        texts.append(text)
    if any(text != texts[0] for text in texts):
        raise SystemExit(f"{', '.join(ways)} differ; the engine has to be the native one")
    return row | {"tokens": len(texts[0]) - len(prompt)}


def table(rows: list[dict], ways: list[str]) -> str:
    """Return tokens per second and MAT, a line a size and two columns a way."""
    lines = [f"{'nodes':>6}" + "".join(f"{way + ': tokens/s':>18}{'MAT':>7}" for way in ways)]
    for nodes in dict.fromkeys(row["nodes"] for row in rows):
        its = [row for row in rows if row["nodes"] == nodes]
        tokens, line = sum(row["tokens"] for row in its), f"{nodes!s:>6}"
        for way in ways:
            seconds, passes = (sum(row[way][of] for row in its) for of in ("seconds", "passes"))
            line += f"{tokens / seconds:>18.1f}{tokens / passes:>7.2f}"
        lines.append(line)
    return "\n".join(lines)


def sizes_of(text: str) -> list[int | None]:
    """Return the sizes that ``--nodes`` names, by commas; None: "auto"."""
    return [None if size == "auto" else int(size) for size in text.split(",")]
