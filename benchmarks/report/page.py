"""The report as one HTML file: no script, nothing fetched, light and dark."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..harness.figures import Figure
from ..harness.findings import Bars, Distributions, Lines, Report, Table
from .machine import busy, summary
from .plots import draw, nice_number

_TEMPLATE = Path(__file__).with_name("page.html")


def page(report: Report) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "ratio": lambda value: f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}",
        "number": nice_number,
        "figures": lambda section: section.of(Figure),
        "plots": lambda section: section.of(Lines, Bars, Distributions),
        "tables": lambda section: section.of(Table),
        "notes": lambda section: section.of(str),
        "draw": lambda plot: Markup(draw(plot)),  # it is escaped there
    }
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    about = json.dumps(report.about, indent=2, ensure_ascii=False)
    known = {"summary": summary(report.about), "busy": busy(report.about)}
    text = template.render(report=report, about=about, **known)
    return text.lstrip() + "\n"
