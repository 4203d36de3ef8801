"""Plots as SVG elements, by matplotlib.

Colours are CSS variables, so that the style sheet of the page says what they look like
in light and in dark: matplotlib draws with stand-ins, which are replaced at the end.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..harness import findings
from ..harness.findings import Bars, Distribution, Distributions, Lines, Plot

#: By role or use, the stand-in for the CSS variable of that name.
_COLOURS = {
    "ours": "#0b7285",
    "base": "#e8590c",
    "other": "#98a2b0",
    "a": "#0b7286",
    "b": "#e8590d",
    "c": "#7048e8",
    "ink": "#1b1f24",
    "soft": "#5b6470",
    "rule": "#d9dee5",
    "bad": "#c92a2a",
}

_STYLE = Path(__file__).with_name("plots.mplstyle")


def role_of(name: str) -> str:
    """Return the role of the pool of this name, which decides its colour."""
    if "Fair" in name:
        return "ours"
    return "base" if "QueuePool" in name and "LIFO" not in name else "other"


def nice_number(value: float) -> str:
    """Return `value` as people write it, with three digits that count."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds_text(seconds: float) -> str:
    """Return a time with its unit: µs, ms or s."""
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def draw(plot: Plot) -> str:
    with style.context(_STYLE):
        figure = Figure(layout="constrained")
        axes, file = figure.add_subplot(), io.StringIO()
        if isinstance(plot, Lines):
            height = _lines(plot, axes)
        elif isinstance(plot, Bars):
            height = _bars(plot, axes)
        else:
            height = _distributions(plot, axes)
        figure.set_size_inches(7.6, height)
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    return _element(file.getvalue(), plot.title)


def _element(text: str, title: str) -> str:
    """Return what matplotlib wrote as an element of a page."""
    text = text[text.index("<svg") :].strip()
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", text)  # in every plot the same
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    label = escape(title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _note(axes: Axes, text: str, at: tuple[float, float], **more: Any) -> None:
    """Write a text beside a point; by default small, soft, and to its right."""
    options = {"fontsize": 9, "color": _COLOURS["soft"], "va": "center"}
    more.setdefault("xytext", (4, 0))
    axes.annotate(text, at, textcoords="offset points", **options | more)


def _numbers(axis: Any, text: Callable[[float], str]) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


# -- lines ----------------------------------------------------------------------------


def _lines(plot: Lines, axes: Axes) -> float:
    """Draw, and return the height; likewise for the other kinds."""
    axes.set(xlabel=plot.x, ylabel=plot.y)
    axes.grid(axis="y")
    if plot.log_x:
        axes.set_xscale("log")
    if plot.stacked:
        _stack(plot, axes)
    else:
        _curves(plot, axes)
    for value, text in plot.levels:
        axes.axhline(value, color=_COLOURS["soft"], linestyle="--", linewidth=1)
        at = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 7)}
        _note(axes, text, (1, value), ha="right", **at)
    axes.set_ylim(0, max(plot.y_top, axes.get_ylim()[1]))
    if not plot.log_x:
        axes.margins(x=0)
        axes.set_xlim(0, max(plot.x_end, axes.get_xlim()[1]))
    for number, (at_x, text) in enumerate(plot.marks):
        axes.axvline(at_x, color=_COLOURS["soft"], linestyle=":", linewidth=1)
        place = (at_x, 0.98 - 0.06 * (number % 2))
        _note(axes, text, place, xycoords=("data", "axes fraction"))
    _numbers(axes.xaxis, nice_number)
    _numbers(axes.yaxis, nice_number)
    if plot.series:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(plot.series))
    return 4.0


def _stack(plot: Lines, axes: Axes) -> None:
    xs = [x for x, _ in plot.series[0].points]
    below = [0.0] * len(xs)
    for series in plot.series:
        top = [base + y for base, (_, y) in zip(below, series.points, strict=True)]
        look = {"color": _COLOURS[series.role], "linewidth": 0}
        axes.fill_between(xs, below, top, step="post", label=series.name, **look)
        below = top


def _curves(plot: Lines, axes: Axes) -> None:
    for number, series in enumerate(plot.series):
        # Steps stand side by side where they are equal, or the last would hide the
        # others.
        shift = 0.12 * ((len(plot.series) - 1) / 2 - number) if plot.steps else 0.0
        axes.plot(
            [x for x, _ in series.points],
            [y + shift for _, y in series.points],
            color=_COLOURS[series.role or role_of(series.name)],
            drawstyle="steps-post" if plot.steps else "default",
            marker="o" if not plot.steps and len(series.points) <= 12 else None,
            markersize=4,
            label=series.name,
        )


# -- bars and distributions -----------------------------------------------------------


def _names(axes: Axes, names: list[str]) -> None:
    """Name the rows, from the top; ours in bold."""
    axes.set_yticks(range(len(names)), names, color=_COLOURS["ink"])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if role_of(name) == "ours" else "normal")


def _bars(plot: Bars, axes: Axes) -> float:
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(plot.unit, loc="left", fontsize=9)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(NullLocator())
    look = {"color": _COLOURS["ink"], "fontsize": 11, "xytext": (6, 0)}
    for number, bar in enumerate(plot.bars):
        colour = _COLOURS[role_of(bar.name)]
        axes.barh(number, bar.value, 0.6, color=colour, alpha=0.85)
        if bar.high > bar.low:
            ends, ink = [bar.low, bar.high], _COLOURS["ink"]
            axes.plot(ends, [number] * 2, "|-", color=ink, linewidth=1.2)
        text = nice_number(bar.value) + (f", {bar.remark}" if bar.remark else "")
        at = (max(bar.value, bar.high), number)
        _note(axes, text, at, **look)
    _names(axes, [bar.name for bar in plot.bars])
    axes.set_xlim(0)
    if plot.level is not None:
        value, text = plot.level
        axes.axvline(value, color=_COLOURS["soft"], linestyle="--", linewidth=1)
        axes.set_xticks([value], [text], fontsize=9)
    return 0.7 + 0.42 * len(plot.bars)


def _distributions(plot: Distributions, axes: Axes) -> float:
    axes.set_xscale("log")
    legend = "| median    ◆ p99    ● longest"
    axes.set_title(legend, loc="left", fontsize=9, color=_COLOURS["soft"])
    axes.grid(axis="x")
    for number, row in enumerate(plot.rows):
        _distribution(row, number + 0.4, axes)
    _names(axes, [row.name for row in plot.rows])
    low = min(row.histogram[0][0] for row in plot.rows)
    high = max(row.most for row in plot.rows)
    axes.set_xlim(10 ** math.floor(math.log10(low)), high * 4)
    axes.xaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    _numbers(axes.xaxis, seconds_text)
    return 0.8 + 0.62 * len(plot.rows)


def _distribution(row: Distribution, base: float, axes: Axes) -> None:
    colour, ink = _COLOURS[role_of(row.name)], _COLOURS["ink"]
    bounds, counts = zip(*row.histogram, strict=True)
    heights = [-max(0.7 * math.sqrt(n / max(counts)), 0.04) for n in counts]
    widths = [bound * (10 ** (1 / findings.PER_DECADE) - 1) for bound in bounds]
    look = {"color": colour, "alpha": 0.55, "linewidth": 0}
    axes.bar(bounds, heights, widths, base, align="edge", **look)
    axes.vlines(row.p50, base - 0.75, base, color=ink, linewidth=1.5)
    axes.plot(row.p99, base - 0.1, "D", color=colour, markersize=5)
    axes.plot(row.most, base - 0.1, "o", color=colour, markersize=6)
    _note(axes, seconds_text(row.p50), (row.p50, base - 0.7), color=ink)
    _note(axes, row.remark, (row.most, base - 0.38), color=_COLOURS["bad"])
    _note(axes, f" {seconds_text(row.most)}", (row.most, base - 0.06), color=ink)
