"""One table at the end of the run: every figure, its target, met or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.database import Database, open_database
from benchmarks.figures import Figure, render
from benchmarks.machine import load, machine, versions
from benchmarks.report import Findings
from benchmarks.stage import Stage
from benchmarks.targets import TARGETS

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

    def run(self, part: Callable[..., Findings], *args: Any, place: Any = None) -> None:
        """Run a measurement of the package, in its full form; enter what it finds."""
        stage = Stage(place=place)
        self._benchmark.group = "whole measurements"
        found = self._benchmark.pedantic(
            part, (stage, *args), rounds=1, iterations=1, warmup_rounds=0
        )
        self._figures += found.figures
        entries = [figure.as_dict() for figure in found.figures]
        self._benchmark.extra_info["figures"] = entries


@pytest.fixture
def sheet(benchmark: Any, pytestconfig: pytest.Config) -> Sheet:
    """Where to write figures."""
    return Sheet(benchmark, pytestconfig.stash.setdefault(_FIGURES, []))


@pytest.fixture(scope="session")
def place() -> Iterator[Database]:
    """A real PostgreSQL, started for this session."""
    with open_database() as database:
        yield database


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LOAD] = load()


def pytest_terminal_summary(
    terminalreporter: Any, exitstatus: int, config: pytest.Config
) -> None:
    figures = config.stash.get(_FIGURES, [])
    if not figures:
        return
    terminalreporter.section("FairQueuePool: figures and targets")
    about = machine() | {"load": config.stash[_LOAD]}
    parts = [
        ", ".join(f"{name} {value}" for name, value in about.items()),
        ", ".join(f"{name} {value}" for name, value in versions().items()),
        "Ratios of what was measured in the same round, their median over the rounds.",
        "",
    ]
    for line in [*parts, *render(figures, TARGETS.values())]:
        terminalreporter.write_line(line)
