"""One table at the end of the run: every figure, its target, met or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .harness.bench import Bench, Part
from .harness.database import Database, open_database
from .harness.findings import TARGETS, Figure, Report, Section
from .report.page import machine, versions
from .report.view import figures_lines

_FIGURES = pytest.StashKey[list[Figure]]()
#: The machine as it was before the run.
_MACHINE = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(scope="session")
def database() -> Iterator[Database]:
    """A real PostgreSQL, started for this session."""
    with open_database() as opened:
        yield opened


@pytest.fixture
def measure(benchmark: Any, pytestconfig: pytest.Config, request: Any) -> Any:
    """Run a measurement in its full form; ``--benchmark-json`` has its figures."""

    def run(part: Part, needs_database: bool) -> None:
        found_database = request.getfixturevalue("database") if needs_database else None
        benchmark.group = "whole measurements"
        found = benchmark.pedantic(
            lambda: list(part(Bench(database=found_database))), rounds=1, iterations=1
        )
        figures = Section("", "", "", found).of(Figure)
        pytestconfig.stash.setdefault(_FIGURES, []).extend(figures)
        benchmark.extra_info["figures"] = [figure.as_dict() for figure in figures]

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MACHINE] = machine()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(_FIGURES, [])
    if not found:
        return
    terminalreporter.section("FairQueuePool: figures and targets")
    section = Section("", "", "", found)
    missing = Report({}, [section], list(TARGETS.values())).figures
    rest = [figure for figure in missing if not figure.values]
    parts = [
        ", ".join(f"{name} {value}" for name, value in config.stash[_MACHINE].items()),
        ", ".join(f"{name} {value}" for name, value in versions().items()),
        "Ratios of what was measured in the same round, their median over the rounds.",
    ]
    for line in [*parts, *figures_lines([*found, *rest], 140)]:
        terminalreporter.write_line(line)
