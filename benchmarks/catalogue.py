"""All scenarios, in the order of the report, and the run of some of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from . import (
    contention,
    light,
    memory,
    scale,
    settings,
    statements,
    styles,
    uncontended,
)
from .generator import GENERATOR
from .report import Findings, Section
from .rivalry import PEERS
from .shift import SHIFT
from .stage import Scenario, Stage
from .static import ALONE, BURSTS, SATURATED

__all__ = ["SCENARIOS", "play"]

POOL = Scenario(
    "pool",
    "The pool alone",
    "What a checkout and a checkin cost, and what happens when there are more threads "
    "than connections, on a DBAPI that does nothing: all that is left is SQLAlchemy "
    "and the pool. Beside QueuePool, the floor (a deque without limit or lock: nothing "
    "can cost less) and a bare hand-off (a lock and one line: the price of order).",
    (
        uncontended.tag_by_engine_option,
        uncontended.other_roads,
        contention.with_hold,
        contention.without_hold,
        contention.without_hold_on_all_cores,
        light.all_cases,
        statements.statement_on_postgresql,
        statements.statement_on_sqlite,
        settings.of_diagnosis,
        settings.of_figures,
        settings.of_server_tag,
    ),
    ("uncontended", "floor", "hold", "fair 200", "no hold", "light", "statement"),
    sessions=2,
)

STYLES = Scenario(
    "styles",
    "In the style of the peers' own benchmarks",
    "SQLAlchemy's issue 7679 (100 threads share 10 connections), pg_doorman's spread "
    "(500 clients share 40), HikariCP's connection cycle (32 threads share 16 and hold "
    "them not at all), on a DBAPI that does nothing; and asyncpg's issue 1247 (100 "
    "tasks share 10) in the full form, on PostgreSQL. None of them knows tags: there "
    "is one, and it may have every connection.",
    (
        contention.starvation,
        styles.pg_doorman,
        styles.hikaricp,
        styles.asyncpg_1247,
    ),
    ("fair 7679", "spread"),
    sessions=12,
)

SCALE = Scenario(
    "scale",
    "Many tags, many waiters, large pools",
    "What a step costs as there are more of everything, and how much memory a tag and "
    "a waiter take. On a DBAPI that does nothing; the waiters' curves drive the "
    "scheduler as the pool drives it, without ten thousand threads.",
    (
        scale.random_tags,
        scale.one_tag_of_many,
        scale.many_waiters,
        scale.pools_of_many_sizes,
        memory.of_a_tag,
        memory.of_a_waiter,
        memory.million_tags,
    ),
    ("tags", "waiters"),
)

SCENARIOS: tuple[Scenario, ...] = (
    SHIFT,
    ALONE,
    BURSTS,
    SATURATED,
    PEERS,
    STYLES,
    POOL,
    SCALE,
    GENERATOR,
)


def play(stage: Stage, scenarios: Sequence[Scenario]) -> Iterator[Section]:
    """Run the scenarios, yield what each has found as soon as it is over."""
    for scenario in scenarios:
        stage.audience.section(scenario.title)
        began = time.monotonic()
        found = Findings()
        for number, part in enumerate(scenario.parts):
            stage.part(number, len(scenario.parts))
            found += part(stage)
        took = time.monotonic() - began
        section = Section(scenario.name, scenario.title, scenario.text, found, took)
        stage.audience.found(section)
        yield section
