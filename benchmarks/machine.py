"""Where a run was made, and with what."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["load", "machine", "versions"]

#: Packages whose versions matter to the figures, as far as they are installed.
_PACKAGES = (
    "sqla-fairpool",
    "SQLAlchemy",
    "psycopg2-binary",
    "psycopg2",
    "psycopg",
    "psycopg-pool",
    "asyncpg",
    "greenlet",
)


def load() -> str:
    """Return how busy the machine has been in the last minute."""
    # Windows does not have it.
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _cores() -> int:
    # Of those that there are, the ones that this process may use.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return what is known of the machine, and nothing that names it."""
    return {
        "cores": _cores(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "load": load(),
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    known = {platform.python_implementation(): platform.python_version()}
    for name in packages:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known
