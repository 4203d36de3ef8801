"""Where a run was made, and with what."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: Packages whose versions matter to the figures, as far as they are installed.
_PACKAGES = "sqla-fairpool SQLAlchemy psycopg2-binary psycopg psycopg-pool asyncpg"


def machine() -> dict[str, Any]:
    """Return what is known of the machine, and nothing that names it."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # those that this process may use
    else:
        cores = os.cpu_count() or 1
    # How busy it has been in the last minute; Windows does not have it.
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "cores": cores,
        "architecture": platform.machine(),
        "system": platform.system(),
        "load": load,
    }


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
