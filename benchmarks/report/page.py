"""The report as one HTML file, and where the run was made.

No script, nothing fetched, light and dark.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..harness.findings import Bars, Distributions, Figure, Lines, Report, Table
from .plots import draw, nice_number

#: Packages whose versions matter to the figures, as far as they are installed.
_PACKAGES = "sqla-fairpool SQLAlchemy psycopg2-binary psycopg psycopg-pool asyncpg"

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


# -- where it was made, and with what --------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what is known of the machine, and nothing that names it."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # those that this process may use
    else:
        cores = os.cpu_count() or 1
    # How busy it has been in the last minute; Windows does not have it.
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    kind = {"architecture": platform.machine(), "system": platform.system()}
    return {"cores": cores, **kind, "load": load}


def busy(about: Mapping[str, Any]) -> str:
    """Return what to say beside verdicts if the machine was not idle before the run."""
    try:
        load, cores = float(about["machine"]["load"]), about["machine"]["cores"]
    except (KeyError, ValueError):
        return ""
    if load <= cores / 4:
        return ""
    return f"measured on a busy machine, load {load:g} on {cores} cores: look again"


def versions() -> dict[str, str]:
    known = {platform.python_implementation(): platform.python_version()}
    for name in _PACKAGES.split():
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def summary(about: Mapping[str, Any]) -> str:
    where = about["machine"]
    known = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    return (
        f"{about['date']}, {about['form']} form. {where['cores']} cores, "
        f"{where['system']} {where['architecture']}, load before the run "
        f"{where['load']}. {known}."
    )
