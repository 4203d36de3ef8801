"""Plots as SVG elements, by matplotlib.

Colours are CSS variables, so that the style sheet of the page says what they look like
in light and in dark: matplotlib draws with stand-ins, which are replaced at the end.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..harness.findings import PER_DECADE, Bars, Distributions, Lines, Plot

__all__ = ["draw", "nice_number", "seconds_text"]

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

#: Inches; at 72 to the inch these are the units of the SVG.
_WIDTH, _HEIGHT = 7.6, 4.0

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sqla-fairpool",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["soft"],
    "axes.labelcolor": _COLOURS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _COLOURS["soft"],
    "ytick.color": _COLOURS["soft"],
    "grid.color": _COLOURS["rule"],
    "legend.frameon": False,
    "text.parse_math": False,
}


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
    """Return the plot as an ``<svg>`` element."""
    with mpl.rc_context(_STYLE):
        if isinstance(plot, Lines):
            figure, axes = _canvas(_HEIGHT)
            _lines(plot, axes)
        elif isinstance(plot, Bars):
            figure, axes = _canvas(0.7 + 0.42 * len(plot.bars))
            _bars(plot, axes)
        else:
            figure, axes = _canvas(0.8 + 0.62 * len(plot.rows))
            _distributions(plot, axes)
        file = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    return _element(file.getvalue(), plot.title)


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _element(text: str, title: str) -> str:
    """Return what matplotlib wrote as an element of a page."""
    text = text[text.index("<svg") :].strip()
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r' id="[A-Za-z]+[\w.]*_\d+"', "", text)  # in every plot the same
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    label = escape(title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _numbers(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: nice_number(value)))


# -- lines ----------------------------------------------------------------------------


def _lines(plot: Lines, axes: Axes) -> None:
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
        axes.annotate(
            text,
            (1, value),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_COLOURS["soft"],
        )
    axes.set_ylim(0, max(plot.y_top, axes.get_ylim()[1]))
    if not plot.log_x:
        axes.margins(x=0)
        axes.set_xlim(0, max(plot.x_end, axes.get_xlim()[1]))
    for number, (at, text) in enumerate(plot.marks):
        axes.axvline(at, color=_COLOURS["soft"], linestyle=":", linewidth=1)
        axes.annotate(
            text,
            (at, 0.97 - 0.06 * (number % 2)),
            (3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=9,
            color=_COLOURS["soft"],
        )
    _numbers(axes.xaxis)
    _numbers(axes.yaxis)
    if plot.series:
        columns = len(plot.series)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _stack(plot: Lines, axes: Axes) -> None:
    xs = [x for x, _ in plot.series[0].points]
    below = [0.0] * len(xs)
    for series in plot.series:
        top = [base + y for base, (_, y) in zip(below, series.points, strict=True)]
        axes.fill_between(
            xs,
            below,
            top,
            step="post",
            color=_COLOURS[series.role],
            linewidth=0,
            label=series.name,
        )
        below = top


def _curves(plot: Lines, axes: Axes) -> None:
    for number, series in enumerate(plot.series):
        # Steps stand side by side where they are equal, or the last would hide the
        # others.
        shift = 0.12 * ((len(plot.series) - 1) / 2 - number) if plot.steps else 0.0
        few = not plot.steps and len(series.points) <= 12
        axes.plot(
            [x for x, _ in series.points],
            [y + shift for _, y in series.points],
            color=_COLOURS[series.role],
            drawstyle="steps-post" if plot.steps else "default",
            marker="o" if few else None,
            markersize=4,
            label=series.name,
        )


# -- bars and distributions -----------------------------------------------------------


def _names(axes: Axes, rows: Iterable[Any]) -> None:
    """Name the rows, from the top; ours in bold."""
    rows = list(rows)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(_COLOURS["ink"])
        label.set_fontweight("bold" if row.role == "ours" else "normal")


def _bars(plot: Bars, axes: Axes) -> None:
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(plot.unit, loc="left", fontsize=9)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_locator(NullLocator())
    for number, bar in enumerate(plot.bars):
        axes.barh(number, bar.value, 0.6, color=_COLOURS[bar.role], alpha=0.85)
        if bar.high > bar.low:
            axes.errorbar(
                bar.value,
                number,
                xerr=[[max(bar.value - bar.low, 0)], [max(bar.high - bar.value, 0)]],
                color=_COLOURS["ink"],
                capsize=3,
                linewidth=1.2,
            )
        text = nice_number(bar.value) + (f", {bar.remark}" if bar.remark else "")
        axes.annotate(
            text,
            (max(bar.value, bar.high), number),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold" if bar.role == "ours" else "normal",
        )
    _names(axes, plot.bars)
    axes.set_xlim(0)
    if plot.level is not None:
        value, text = plot.level
        axes.axvline(value, color=_COLOURS["soft"], linestyle="--", linewidth=1)
        axes.set_xticks([value], [text], fontsize=9)


def _distributions(plot: Distributions, axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_title(
        "| median    ◆ p99    ● longest", loc="left", fontsize=9, color=_COLOURS["soft"]
    )
    axes.grid(axis="x")
    for number, row in enumerate(plot.rows):
        colour, base = _COLOURS[row.role], number + 0.4
        tallest = max(count for _, count in row.histogram)
        axes.bar(
            [bound for bound, _ in row.histogram],
            [-max(0.7 * math.sqrt(n / tallest), 0.04) for _, n in row.histogram],
            [bound * (10 ** (1 / PER_DECADE) - 1) for bound, _ in row.histogram],
            base,
            align="edge",
            color=colour,
            alpha=0.55,
            linewidth=0,
        )
        axes.vlines(row.p50, base - 0.75, base, color=_COLOURS["ink"], linewidth=1.5)
        axes.plot(row.p99, base - 0.1, "D", color=colour, markersize=5)
        axes.plot(row.most, base - 0.1, "o", color=colour, markersize=6)
        texts = (
            (row.p50, base - 0.7, seconds_text(row.p50), "ink"),
            (row.most, base - 0.38, row.remark, "bad"),
            (row.most, base - 0.06, f" {seconds_text(row.most)}", "ink"),
        )
        for at, y, text, use in texts:
            axes.annotate(
                text,
                (at, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=_COLOURS[use],
            )
    _names(axes, plot.rows)
    axes.set_ylim(len(plot.rows) - 0.5, -0.5)
    low = min(row.histogram[0][0] for row in plot.rows)
    high = max(row.most for row in plot.rows)
    axes.set_xlim(10 ** math.floor(math.log10(low)), high * 4)
    axes.xaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: seconds_text(s)))
