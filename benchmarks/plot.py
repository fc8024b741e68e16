"""Pictures of benchmarks, as SVG: curves, and times on a common scale."""

import math
from itertools import cycle

COLORS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#8c564b",
    "#17becf",
    "#7f7f7f",
    "#bcbd22",
    "#e377c2",
    "#000",
    "#c5a400",
)


def _picture(width: int, height: int, parts: list[str]) -> str:
    body = "\n".join(parts)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"'
        f' font-size="12">\n{body}\n</svg>\n'
    )


def lines(title: str, unit: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """Return an SVG of lines with their names at their ends."""
    width, height, left, right, top, bottom = 720, 420, 60, 170, 40, 50
    points = [point for curve in curves.values() for point in curve]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y1 = 1.05 * max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - right) * (x - x0) / max(x1 - x0, 1e-9)
        return across, height - bottom - (height - top - bottom) * y / y1

    parts = [f'<text x="{left}" y="22" font-size="15">{title}</text>']
    for step in range(5):
        value = y1 * step / 4
        _, y = place(x0, value)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{value:.3g}</text>')
    ticks = sorted({x for x, _ in points})
    for x in ticks[:: math.ceil(len(ticks) / 14)]:
        parts.append(
            f'<text x="{place(x, 0)[0]:.0f}" y="{height - bottom + 18}"'
            f' text-anchor="middle">{x:g}</text>'
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 10}"'
        f' text-anchor="middle">{unit}</text>'
    )
    ordered = sorted(curves.items(), key=lambda item: -item[1][-1][1])
    names: list[float] = []  # where they stand: not on each other, and within the picture
    for _, curve in ordered:
        names.append(max(place(*curve[-1])[1], names[-1] + 14 if names else top))
    for at in reversed(range(len(names))):
        names[at] = min(names[at], names[at + 1] - 14 if at + 1 < len(names) else height - bottom)
    for (name, curve), y, color in zip(ordered, names, cycle(COLORS)):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        x, _ = place(*curve[-1])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 6:.0f}" y="{y + 4:.0f}" fill="{color}">{name}</text>')
    return _picture(width, height, parts)


def times(title: str, rows: list[tuple[str, dict[str, float]]]) -> str:
    """Return an SVG with a line per row, its name before it, and on it a dot per time: seconds
    (from nanoseconds on) by what took them, on a logarithmic scale.
    """
    kinds = {kind: None for _, row in rows for kind in row}
    colors = dict(zip(kinds, cycle(COLORS)))
    seconds = [value for _, row in rows for value in row.values()]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    width, left, top, line = 960, 400, 60, 16
    height = top + line * len(rows) + 30

    def across(value: float) -> float:
        return left + (width - left - 30) * (math.log10(value) - low) / max(high - low, 1)

    parts = [f'<text x="10" y="22" font-size="15">{title}</text>']
    for at, (kind, color) in enumerate(colors.items()):
        parts.append(f'<circle cx="{left + 140 * at}" cy="40" r="4" fill="{color}"/>')
        parts.append(f'<text x="{left + 140 * at + 9}" y="44" fill="{color}">{kind}</text>')
    for power in range(low, high + 1):
        x = across(10.0**power)
        parts.append(
            f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{top - 8}" y2="{height - 25}" stroke="#ddd"/>'
        )
        unit = {0: "s", 1: "ms", 2: "µs", 3: "ns"}[-(power // 3)]
        parts.append(
            f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle">{10 ** (power % 3)}'
            f" {unit}</text>"
        )
    for at, (name, row) in enumerate(rows):
        y = top + line * at + 4
        parts.append(f'<text x="10" y="{y + 4}">{name}</text>')
        for kind, value in row.items():
            parts.append(f'<circle cx="{across(value):.1f}" cy="{y}" r="4" fill="{colors[kind]}"/>')
    return _picture(width, height, parts)


def bars(title: str, unit: str, rows: list[tuple[str, float, bool]]) -> str:
    """Return an SVG with a bar per row: its name, its value, whether it is one of ours."""
    width, left, top, line = 720, 210, 50, 20
    height = top + line * len(rows) + 10
    scale = (width - left - 70) / max(value for _, value, _ in rows)
    parts = [f'<text x="10" y="22" font-size="15">{title}</text>']
    parts.append(f'<text x="{left}" y="42" fill="#555">{unit}</text>')
    for at, (name, value, ours) in enumerate(rows):
        y, color, weight = top + line * at, COLORS[7], "normal"
        if ours:
            color, weight = COLORS[0], "bold"
        parts.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end" font-weight="{weight}">{name}'
            f"</text>"
        )
        parts.append(
            f'<rect x="{left}" y="{y + 2}" width="{value * scale:.1f}" height="{line - 5}"'
            f' fill="{color}"/>'
        )
        parts.append(f'<text x="{left + value * scale + 6:.0f}" y="{y + 13}">{value:.4g}</text>')
    return _picture(width, height, parts)
