"""Tables and pictures of cpu.py's rows: rates with their spread, ratios, text equality."""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Iterable

from common import CATEGORIES

TRUTH = "transformers-sdpa-float32"  # whose text the others are compared with
FIRST_TOKEN = "first token"  # the category of the prompt of 512 tokens
FORMATS = dict(float32="F32", bfloat16="BF16", int8="Q8_0")  # llama.cpp's, by our dtype


def by_question(rows: Iterable[dict]) -> dict:
    """Return the rows of one engine by question."""
    found: dict = {}
    for row in rows:
        found.setdefault(row["question"], []).append(row)
    return found


def rate(rows: Iterable[dict], after_prompt: bool = False) -> float:
    """Return the tokens/s of one engine's rows: all tokens over all seconds, the seconds of a
    prompt being the median of its repeats.

    Args:
        after_prompt: without the time until the first tokens came, and without these.
    """
    tokens = seconds = 0.0
    for repeats in by_question(rows).values():
        cut = [(row["first_tokens"], row["first"]) if after_prompt else (0, 0) for row in repeats]
        tokens += statistics.median(
            len(row["tokens"]) - count for row, (count, _) in zip(repeats, cut)
        )
        seconds += statistics.median(
            row["seconds"] - first for row, (_, first) in zip(repeats, cut)
        )
    return tokens / seconds if seconds else float("nan")


def ratio(rows: list[dict], over: list[dict]) -> tuple[float, float, float]:
    """Return one engine's tokens/s over another's, on the prompts that both have: of medians, and
    the lowest and the highest of a repeat.
    """
    both = by_question(rows).keys() & by_question(over).keys()

    def of(repeats) -> float:
        ours, theirs = (
            [row for row in part if row["question"] in both and row["repeat"] in repeats]
            for part in (rows, over)
        )
        return rate(ours) / rate(theirs)

    repeats = {row["repeat"] for row in rows} & {row["repeat"] for row in over}
    each = [of({repeat}) for repeat in repeats]
    return of(repeats), min(each), max(each)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens two texts have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def equality(rows: list[dict], truth: list[dict]) -> str:
    """Return how many prompts' texts are those of the ``truth``, in every repeat, and the mean
    length of what texts have in common with it: "22/24, 119".
    """
    texts = {row["question"]: row["tokens"] for row in truth}
    mine = {key: group for key, group in by_question(rows).items() if key in texts}
    if not mine:
        return ""
    equal = sum(all(row["tokens"] == texts[key] for row in group) for key, group in mine.items())
    common = statistics.mean(
        common_prefix(row["tokens"], texts[key]) for key, group in mine.items() for row in group
    )
    return f"{equal}/{len(mine)}, {common:.0f}"


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


class Report:
    """What the rows of a run say, by engine, in the order in which engines first appear."""

    def __init__(self, rows: list[dict]):
        self.texts: dict[str, list[dict]] = {}
        self.first: dict[str, list[dict]] = {}
        self.lost: dict[str, str] = {}
        for row in rows:
            name = f"{row.get('shape', '')} {row.get('engine')}".strip()
            if "versions" in row:  # in a later run, it was there
                self.lost.pop(name, None)
            for why in {"missing", "failed"} & row.keys():
                self.lost[name] = f"{why} {row[why]}"
        for row in rows:
            if "tokens" in row:
                kind = self.first if row["category"] == FIRST_TOKEN else self.texts
                kind.setdefault(row["engine"], []).append(row)
        self.rates = {name: rate(part) for name, part in self.texts.items()}
        self.step_rows = [row for row in rows if "shape" in row and "rows" in row]
        self.bandwidths = [row["bandwidth"] for row in rows if "bandwidth" in row]
        self.idle = [row["idle"] for row in rows if "idle" in row]

    def fastest(self, *patterns: str) -> str | None:
        """Return the fastest engine of a name like one of the patterns; None: there is none."""
        names = [n for n in self.rates if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        return max(names, key=self.rates.__getitem__, default=None)

    def spread(self, name: str) -> str:
        """Return "105 (98–107)": tokens/s of medians, the slowest and fastest repeat."""
        repeats = {row["repeat"] for row in self.texts[name]}
        each = [rate(row for row in self.texts[name] if row["repeat"] == r) for r in repeats]
        return f"{self.rates[name]:.1f} ({min(each):.1f}–{max(each):.1f})"

    def engines(self) -> str:
        """Return a table, a line per engine, the fastest first."""
        lines = []
        for name in sorted(self.texts, key=self.rates.__getitem__, reverse=True):
            rows, first = self.texts[name], self.first.get(name, [])
            none = name.split("-")
            none[1] = "none"
            ours = none[0] in ("native", "torch")
            passes = sum(row["passes"] for row in rows)
            tokens = sum(len(row["tokens"]) for row in rows)
            seconds = [row["first"] for row in first]
            lines.append(
                [
                    f"**{name}**" if none[0] == "native" else name,
                    self.spread(name),
                    f"{rate(rows, after_prompt=True):.1f}",
                    f"{tokens / passes:.2f}",
                    f"{statistics.median(seconds) * 1e3:.0f}" if first else "",
                    f"{max(row['peak'] for row in rows + first)}",
                    f"{max(row['resident'] for row in rows + first)}",
                    equality(rows, self.texts.get(TRUTH, [])),
                    equality(rows, self.texts.get("-".join(none), [])) if ours else "",
                ]
            )
        head = ["engine", "tokens/s (repeats)", "without prompt", "tokens at once"]
        head += ["first token of 512, ms", "peak MiB", "then MiB", "text as float32, common"]
        return table([*head, "text as `none`"], lines)

    def ratios(self) -> str:
        """Return a table: our engines over others, of medians, in brackets the lowest and highest
        repeat. "transformers" is its faster attention, without prompt lookup.
        """
        lines = []
        for name in self.texts:
            kind, draft, *dtype = name.split("-")
            if kind not in ("native", "torch"):
                continue
            fixed = "b*h" if draft == "habits" or draft.endswith("h") else "b*[0-9]"
            plain = ("transformers-eager-", "transformers-sdpa-")
            others = {
                "transformers, faster dtype": [p + "*" for p in plain],
                "transformers, same dtype": [p + dtype[0] for p in plain],
                "fastest transformers": ["transformers-*"],
                "llama.cpp, same format": [f"llama.cpp-{FORMATS.get(dtype[0])}"],
                "fastest llama.cpp, OpenVINO": ["llama.cpp-*", "openvino-*"],
                "its `none`": [f"{kind}-none-{dtype[0]}"],
                "best fixed budget": [f"{kind}-{fixed}-{dtype[0]}"],
            }
            cells = []
            for patterns in others.values():
                other = self.fastest(*patterns)
                if other is None:
                    cells.append("")
                    continue
                middle, low, high = ratio(self.texts[name], self.texts[other])
                cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
            lines.append([name, *cells])
        return table(["over", *others], lines) if lines else ""

    def categories(self) -> str:
        """Return a table: our drafts over none in every category."""
        lines = []
        for name, rows in self.texts.items():
            kind, draft, *dtype = name.split("-")
            none = self.texts.get(f"{kind}-none-{dtype[0]}") if dtype else None
            if kind not in ("native", "torch") or draft == "none" or none is None:
                continue
            cells = []
            for category in CATEGORIES:
                part, other = (
                    [row for row in every if row["category"] == category] for every in (rows, none)
                )
                both = part and other
                cells.append("{:.2f} ({:.2f}–{:.2f})".format(*ratio(part, other)) if both else "")
            lines.append([name, *cells])
        return table(["over `none`", *CATEGORIES], lines) if lines else ""

    def steps(self) -> str:
        """Return a table: milliseconds of a step by its rows, in brackets over those of one row."""
        times: dict[str, dict[int, list[float]]] = {}
        for row in self.step_rows:
            line = times.setdefault(f"{row['shape']} {row['engine']}", {})
            line.setdefault(row["rows"], []).append(row["seconds"])
        counts = sorted({row["rows"] for row in self.step_rows})
        lines = []
        for name, line in times.items():
            medians = {count: statistics.median(seconds) for count, seconds in line.items()}
            one = medians.get(1, float("nan"))
            cells = (
                f"{medians[count] * 1e3:.1f} ({medians[count] / one:.2f})"
                if count in medians
                else ""
                for count in counts
            )
            lines.append([name, *cells])
        return table(["ms a step of rows", *map(str, counts)], lines) if lines else ""

    def text(self) -> str:
        """Return all tables and what else is to be said."""
        parts = [self.engines()] if self.texts else []
        parts += [part for part in (self.ratios(), self.categories(), self.steps()) if part]
        if self.bandwidths:
            low, high = min(self.bandwidths), max(self.bandwidths)
            middle = statistics.median(self.bandwidths)
            parts.append(f"read bandwidth {middle:.1f} GB/s ({low:.1f}–{high:.1f})")
        if self.idle:
            parts.append(f"idle workers used {max(self.idle):.2%} of a core")
        parts += [f"{name}: {why}" for name, why in self.lost.items()]
        return "\n\n".join(parts)

    def picture(self, title: str) -> str:
        """Return an SVG: a bar per engine, ours in colour."""
        import plot  # takes matplotlib, which the rest does without

        names = sorted(self.rates, key=self.rates.__getitem__, reverse=True)
        bars = [(name, self.rates[name], name.startswith("native")) for name in names]
        return plot.bars(title, "tokens/s", bars)
