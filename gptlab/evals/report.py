"""Reports: Markdown tables, the same tables for a terminal, and plots that need no display."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gptlab.evals.preference import Interval
from gptlab.run import files

Point = float | Interval
# x and y of the same length
Curve = tuple[Sequence[float] | np.ndarray, Sequence[Point] | np.ndarray]


def show(value: Any) -> str:
    """One figure as people read it: three decimals, intervals in brackets, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, Interval):
        return f"{show(value.mean)} [{show(value.low)}, {show(value.high)}]"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _cell(value: Any) -> str:
    """Text that cannot break a table: no newline, no bare bar."""
    return " ".join(show(value).split()).replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; cells go through `show`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same table for a terminal: first column left, the others right aligned."""
    lines = [[" ".join(show(cell).split()) for cell in line] for line in [header, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def document(title: str, sections: Mapping[str, str]) -> str:
    """A Markdown document of headed sections, in order."""
    parts = [f"# {title}", *(f"## {name}\n\n{body}" for name, body in sections.items())]
    return "\n\n".join(parts) + "\n"


def plot_curves(
    path: Any,
    curves: Mapping[str, Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    markers: Mapping[str, tuple[Point, Point]] | None = None,
) -> None:
    """Writes a PNG of named lines and, on top of them, named single points.

    Intervals are drawn as bars. What has the same name up to a comma has the same colour: a second
    line of it is dashed.
    """
    figure, axes = _figure(title, x_label, y_label)
    colours: dict[str, str] = {}
    dashed: set[str] = set()
    for name, (x, y) in curves.items():
        group = name.split(",")[0]
        style = "--" if group in dashed else "-"
        dashed.add(group)
        axes.errorbar(
            x, _means(y), _bars(y), label=name, color=_colour(colours, name), linewidth=1.4,
            elinewidth=0.8, capsize=2, linestyle=style, marker="." if len(x) < 20 else "",
        )  # fmt: skip
    for name, (x_point, y_point) in (markers or {}).items():
        axes.errorbar(
            _means([x_point]), _means([y_point]), _bars([y_point]), _bars([x_point]), label=name,
            color=_colour(colours, name), elinewidth=0.8, capsize=2, marker="o", linestyle="",
        )  # fmt: skip
    if curves or markers:
        axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _colour(colours: dict[str, str], name: str) -> str:
    """The colour of a name's part before the comma; a new one for a new part."""
    return colours.setdefault(name.split(",")[0], f"C{len(colours) % 10}")


def _means(points: Sequence[Point] | np.ndarray) -> list[float]:
    return [p.mean if isinstance(p, Interval) else float(p) for p in points]


def _bars(points: Sequence[Point] | np.ndarray) -> np.ndarray | None:
    """How far intervals reach below and above their means, [2, n]; None if there are none."""
    if not any(isinstance(p, Interval) for p in points):
        return None
    reach = [
        (p.mean - p.low, p.high - p.mean) if isinstance(p, Interval) else (0.0, 0.0) for p in points
    ]
    return np.maximum(np.array(reach).T, 0.0)


def plot_calibration(path: Any, tables: Mapping[str, list[dict[str, float]]]) -> None:
    """Writes a PNG of reliability tables (`preference.reliability`) beside the diagonal.

    Bars are standard errors of the observed frequencies, after one pair more on either side: a bin
    of one pair is not certain.
    """
    figure, axes = _figure(
        "Calibration", "predicted confidence", "observed frequency, with its standard error"
    )
    axes.plot([0.5, 1.0], [0.5, 1.0], color="0.7", linewidth=1.0, label="calibrated")
    for name, rows in tables.items():
        confidence, observed, count = (
            np.array([float(row[key]) for row in rows])
            for key in ("confidence", "accuracy", "count")
        )
        guess = (observed * count + 1.0) / (count + 2.0)
        error = np.sqrt(guess * (1.0 - guess) / count)
        axes.errorbar(
            confidence, observed, error, label=f"{name} ({int(count.sum()):,} pairs)",
            marker=".", linewidth=1.4, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    # Figure without pyplot: no global state, and no display is ever looked for.
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Any) -> None:
    image = io.BytesIO()
    # Without the version in its metadata, the same data gives the same file.
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    files.atomic_write(path, image.getvalue())
