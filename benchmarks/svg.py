"""Plots as SVG, written by hand: crisp, small, and without a library to install.

Colours are classes (``ours``, ``base``, ``a`` and so on); the style sheet of the
page says what they look like, by day and by night.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from html import escape

from .report import Bar, Bars, Distribution, Distributions, Lines, Plot, Series

__all__ = ["draw", "nice_number", "seconds_text"]

WIDTH, HEIGHT = 560, 300
#: Room for the axes' texts, and above for the names of the lines.
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 44


def nice_number(value: float) -> str:
    """Return `value` as people write it, with three digits that count."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def seconds_text(seconds: float) -> str:
    """Return a time with its unit: µs, ms or s."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"


class _Axis:
    """From values to pixels, and where the ticks are."""

    def __init__(
        self, low: float, high: float, start: float, end: float, log: bool = False
    ) -> None:
        if log:
            self._low, self._high = math.log10(low), math.log10(high)
        else:
            self._low, self._high = low, high
        if self._high <= self._low:
            self._high = self._low + 1
        self._start, self._end, self._log = start, end, log

    def __call__(self, value: float) -> float:
        if self._log:
            value = math.log10(value)
        part = (value - self._low) / (self._high - self._low)
        return round(self._start + part * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        """Return round values within the axis, some five of them."""
        if self._log:
            first, last = math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        step = 10 ** math.floor(math.log10((self._high - self._low) / 4))
        for factor in (1, 2, 5, 10):
            if (self._high - self._low) / (step * factor) <= 6:
                step *= factor
                break
        first, last = math.ceil(self._low / step), math.floor(self._high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def draw(plot: Plot) -> str:
    """Return the plot as an ``<svg>`` element."""
    if isinstance(plot, Lines):
        height: float = HEIGHT
        parts = _lines(plot)
    elif isinstance(plot, Bars):
        height = 34 + 30 * len(plot.bars) + (18 if plot.level else 0)
        parts = _bars(plot)
    else:
        height = 24 + 44 * len(plot.rows) + 34
        parts = _distributions(plot)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'role="img" aria-label="{escape(plot.title)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{height:g}" '
        f'class="{kind}"/>'
    )


# -- lines ----------------------------------------------------------------------------


def _extent(values: Iterable[float], log: bool) -> tuple[float, float]:
    known = [v for v in values if not log or v > 0]
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    if log:
        low, high = min(known), max(known)
        return low / 1.25, max(high, low * 1.01) * 1.25
    return min(0.0, *known), max(known) * 1.06


def _stacked(series: Sequence[Series]) -> list[Series]:
    """Return the series as they lie on top of each other, the highest first."""
    sums: list[Series] = []
    below = [0.0] * len(series[0].points)
    for one in series:
        points = tuple(
            (x, y + base) for (x, y), base in zip(one.points, below, strict=True)
        )
        below = [y for _, y in points]
        sums.insert(0, Series(one.name, points, one.role))
    return sums


def _lines(plot: Lines) -> Iterator[str]:
    legend = plot.series
    if plot.stacked and plot.series:
        plot = replace(plot, series=tuple(_stacked(plot.series)))
    every = [point for series in plot.series for point in series.points]
    x_low, x_high = _extent((x for x, _ in every), plot.log_x)
    if not plot.log_x:
        x_low, x_high = min((x for x, _ in every), default=0), x_high / 1.06
        x_high = max(x_high, plot.x_end)
    levels = [value for value, _ in plot.levels]
    y_low, y_high = _extent([*(y for _, y in every), *levels], plot.log_y)
    y_high = max(y_high, plot.y_top)
    x = _Axis(x_low, x_high, LEFT, WIDTH - RIGHT, plot.log_x)
    y = _Axis(y_low, y_high, HEIGHT - BOTTOM, TOP, plot.log_y)
    yield from _frame(plot, x, y)
    middle = (len(plot.series) - 1) / 2
    for number, series in enumerate(plot.series):
        path = _path(series, x, y, plot)
        if plot.steps and not plot.stacked:
            # Side by side where they are equal, or the last would hide the others.
            path = f'<g transform="translate(0 {(middle - number) * 2.6:g})">{path}</g>'
        yield path
    for value, text in plot.levels:
        yield _line(LEFT, y(value), WIDTH - RIGHT, y(value), "level")
        yield _text(WIDTH - RIGHT - 2, y(value) - 4, text, "small", "end")
    for number, (at, text) in enumerate(plot.marks):
        yield _line(x(at), TOP, x(at), HEIGHT - BOTTOM, "mark")
        yield _text(x(at) + 3, TOP + 10 + 12 * (number % 2), text, "small")
    yield from _legend(legend)


def _frame(plot: Lines, x: _Axis, y: _Axis) -> Iterator[str]:
    for tick in y.ticks():
        yield _line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        yield _text(LEFT - 6, y(tick) + 4, nice_number(tick), "tick", "end")
    bottom = HEIGHT - BOTTOM
    for tick in x.ticks():
        yield _line(x(tick), bottom, x(tick), bottom + 4, "axis")
        yield _text(x(tick), bottom + 17, nice_number(tick), "tick", "middle")
    yield _line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, plot.x, "label", "middle")
    yield (
        f'<text transform="translate(13 {(TOP + bottom) / 2:g}) rotate(-90)" '
        f'text-anchor="middle" class="label">{escape(plot.y)}</text>'
    )


def _path(series: Series, x: _Axis, y: _Axis, plot: Lines) -> str:
    points = [
        (x(px), y(py))
        for px, py in series.points
        if not (plot.log_y and py <= 0) and not (plot.log_x and px <= 0)
    ]
    if not points:
        return ""
    words = [f"M{points[0][0]:g} {points[0][1]:g}"]
    last = points[0]
    for px, py in points[1:]:
        if plot.steps:
            if py == last[1]:
                continue  # one segment for as long as nothing changes
            words.append(f"H{px:g}V{py:g}")
        else:
            words.append(f"L{px:g} {py:g}")
        last = px, py
    if plot.steps:
        words.append(f"H{points[-1][0]:g}")
    if plot.stacked:
        # Opaque: each area covers what is below the one before it.
        words.append(f"V{y(0.0):g}H{points[0][0]:g}Z")
        return f'<path d="{"".join(words)}" class="stack {series.role}"/>'
    dots = ""
    if not plot.steps and len(points) <= 12:
        dots = "".join(
            f'<circle cx="{px:g}" cy="{py:g}" r="3" class="dot {series.role}"/>'
            for px, py in points
        )
    return f'<path d="{"".join(words)}" class="line {series.role}"/>{dots}'


def _legend(every: Sequence[Series]) -> Iterator[str]:
    at = float(LEFT)
    for series in every:
        yield _line(at, 13, at + 16, 13, f"line {series.role}")
        yield _text(at + 20, 17, series.name, "legend")
        at += 20 + 6.4 * len(series.name) + 18


# -- bars -----------------------------------------------------------------------------


def _margin(texts: Iterable[str]) -> float:
    """Return the room that the longest of the texts takes, in pixels."""
    return 7.5 * max(map(len, texts), default=0) + 16


def _bar_text(bar: Bar) -> str:
    return nice_number(bar.value) + (f", {bar.remark}" if bar.remark else "")


def _bars(plot: Bars) -> Iterator[str]:
    highest = max([bar.high for bar in plot.bars] + [bar.value for bar in plot.bars])
    if plot.level is not None:
        highest = max(highest, plot.level[0])
    left = _margin(bar.name for bar in plot.bars)
    texts = [_bar_text(bar) for bar in plot.bars]
    x = _Axis(0.0, highest or 1.0, left, WIDTH - _margin(texts))
    top = 24
    bottom = top + 30 * len(plot.bars)
    yield _text(left, 14, plot.unit, "label")
    for number, bar in enumerate(plot.bars):
        y = top + 30 * number
        strong = " strong" if bar.role == "ours" else ""
        yield _text(left - 8, y + 16, bar.name, f"name{strong}", "end")
        yield _rect(left, y + 4, x(bar.value) - left, 17, f"bar {bar.role}")
        if bar.high > bar.low:
            yield _line(x(bar.low), y + 12.5, x(bar.high), y + 12.5, "whisker")
            for end in (bar.low, bar.high):
                yield _line(x(end), y + 8.5, x(end), y + 16.5, "whisker")
        end = max(x(bar.value), x(bar.high))
        yield _text(end + 7, y + 17, texts[number], f"value{strong}")
    yield _line(left, top, left, bottom, "axis")
    if plot.level is not None:
        value, text = plot.level
        yield _line(x(value), top, x(value), bottom, "level")
        yield _text(x(value), bottom + 13, text, "small", "middle")


# -- distributions --------------------------------------------------------------------


def _distributions(plot: Distributions) -> Iterator[str]:
    names = [text for row in plot.rows for text in (row.name, row.remark)]
    left = _margin(names)
    low = min(row.histogram[0][0] for row in plot.rows)
    high = max(row.most for row in plot.rows)
    x = _Axis(
        10 ** math.floor(math.log10(low)),
        10 ** math.ceil(math.log10(high) + 0.02),
        left,
        WIDTH - RIGHT - 24,
        log=True,
    )
    bottom = 24 + 44 * len(plot.rows)
    yield _text(left, 13, "| median    ◆ p99    ● longest", "label")
    for tick in x.ticks():
        yield _line(x(tick), 20, x(tick), bottom, "grid")
        yield _text(x(tick), bottom + 15, seconds_text(tick), "tick", "middle")
    yield _line(left, bottom, WIDTH - RIGHT - 24, bottom, "axis")
    for number, row in enumerate(plot.rows):
        yield from _distribution(row, x, 24 + 44 * number, left)


def _distribution(
    row: Distribution, x: _Axis, top: float, left: float
) -> Iterator[str]:
    strong = " strong" if row.role == "ours" else ""
    yield _text(left - 8, top + 20, row.name, f"name{strong}", "end")
    if row.remark:
        yield _text(left - 8, top + 34, row.remark, "small alarm", "end")
    base = top + 38
    tallest = max(count for _, count in row.histogram)
    words = []
    for bound, count in row.histogram:
        begin, end = x(bound), x(bound * 10 ** (1 / 12))
        height = max(26 * math.sqrt(count / tallest), 1.5)
        words.append(f"M{begin:g} {base:g}V{base - height:.1f}H{end:g}V{base:g}Z")
    yield f'<path d="{"".join(words)}" class="area {row.role}"/>'
    middle, p99, most = x(row.p50), x(row.p99), x(row.most)
    yield _line(middle, base - 30, middle, base, "median")
    yield _text(middle + 3, top + 9, seconds_text(row.p50), "small")
    yield f'<path d="M{p99:g} {base - 9:g}l5 5l-5 5l-5 -5Z" class="dot {row.role}"/>'
    yield f'<circle cx="{most:g}" cy="{base - 4:g}" r="4" class="dot {row.role}"/>'
    yield _text(most + 7, base - 1, seconds_text(row.most), "small")
