"""Pictures of benchmarks, as SVG: curves, times on a common scale, and bars. They take matplotlib,
of the extra "bench".
"""

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter


def _axes(title: str, width: float, height: float, grid: str) -> Axes:
    axes = Figure(figsize=(width, height)).add_subplot()
    axes.set_title(title, loc="left")
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#ddd")
    axes.spines[:].set_visible(False)
    return axes


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params("y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _svg(axes: Axes) -> str:
    file = io.StringIO()
    # Text stays text, and the same picture is the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "msn_ext"}):
        axes.figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return file.getvalue()


def lines(title: str, unit: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """Return an SVG of lines, their names beside them in the order of their ends."""
    axes = _axes(title, 7.2, 4.2, "y")
    ordered = sorted(curves.items(), key=lambda item: -item[1][-1][1])
    for at, (name, curve) in enumerate(ordered):
        axes.plot(*zip(*curve), "-" if at < 10 else "--", label=name)
    axes.set_xlabel(unit)
    axes.set_ylim(0)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _svg(axes)


def times(title: str, rows: list[tuple[str, dict[str, float]]]) -> str:
    """Return an SVG with a line per row, its name before it, and on it a dot per time: seconds by
    what took them, on a logarithmic scale.
    """
    axes = _axes(title, 9.6, 1 + len(rows) / 6, "x")
    for kind in dict.fromkeys(kind for _, row in rows for kind in row):
        dots = [(row[kind], at) for at, (_, row) in enumerate(rows) if kind in row]
        axes.scatter(*zip(*dots), s=16, label=kind, gid=f"times: {kind}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    _name_rows(axes, [name for name, _ in rows])
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=9, frameon=False)
    return _svg(axes)


def bars(title: str, unit: str, rows: list[tuple[str, float, bool]]) -> str:
    """Return an SVG with a bar per row: its name, its value, whether it is one of ours."""
    axes = _axes(title, 7.2, 1 + len(rows) / 5, "x")
    names, values, ours = zip(*rows)
    drawn = axes.barh(range(len(rows)), values, color=["C0" if one else "C7" for one in ours])
    axes.bar_label(drawn, fmt="%.4g", padding=3)
    axes.set_xlabel(unit)
    _name_rows(axes, names)
    for bar, name, one in zip(drawn, axes.get_yticklabels(), ours):
        bar.set_gid("bar")
        name.set_fontweight("bold" if one else "normal")
    return _svg(axes)
