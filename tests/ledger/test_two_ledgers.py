"""Engines that use one database with different ledgers: one warning says so."""

from __future__ import annotations

import logging
import uuid
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url, text
from support import state
from support.stores import end, start
from support.stub import all_for_one
from support.worlds import contract, make_world

pytestmark = pytest.mark.postgres

DRIVERS = {"threads": "psycopg2", "asyncio": "asyncpg"}


@pytest.fixture(params=DRIVERS)
def world(request):
    return make_world(request.param)


@pytest.fixture
def engine(request, world, postgres_url):
    """Make engines on one database, for threads or for tasks."""
    driver = DRIVERS[request.node.callspec.params["world"]]
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    engines = []

    def make(ledger):
        engines.append(
            world.make(url, poolclass=world.pool_class, ledger=ledger, **all_for_one(2))
        )
        return engines[-1]

    yield make
    for one in engines:
        state.keeper(one).close()


@pytest.fixture
def ledgers(tmp_path, postgres_url, operator):
    """What names two ledgers, by the kinds of both."""
    schema = f"other_{uuid.uuid4().hex[:12]}"
    operator(postgres_url, f"create schema {schema}")
    database = make_url(postgres_url)
    elsewhere = {"options": f"-csearch_path={schema}"}
    named = {
        "a": str(tmp_path / "a.ledger"),
        "b": str(tmp_path / "b.ledger"),
        "database": database.render_as_string(False),
        "schema": database.update_query_dict(elsewhere).render_as_string(False),
        "named": database.update_query_dict({"ledger": schema}).render_as_string(False),
    }
    yield lambda kinds: [named[kind] for kind in kinds.split()]
    operator(postgres_url, f"drop schema {schema} cascade")


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if "other ledger" in r.getMessage()]


def visit(engine):
    with engine.connect() as connection:
        connection.execute(text("select 1"))


@contextmanager
def engines(engine, ledgers):
    """An engine for each ledger; their connections are closed in the test's world."""
    made = [engine(ledger) for ledger in ledgers]
    try:
        yield made
    finally:
        for one in made:
            one.dispose()


@contract
@pytest.mark.parametrize("kinds", ["a b", "a database", "database named"])
def test_second_of_two_ledgers_is_warned_of_once(world, engine, ledgers, kinds, caplog):
    caplog.set_level(logging.WARNING, "sqla_fairpool")
    with engines(engine, ledgers(kinds)) as (one, other):
        for _ in range(2):
            visit(one)
            assert warnings_in(caplog) == []
        for _ in range(2):
            visit(other)
            (warning,) = warnings_in(caplog)
            assert "1 other ledger(s)" in warning


@contract
@pytest.mark.parametrize("kinds", ["a a", "database schema"])
def test_one_ledger_for_two_engines_is_not_warned_of(
    world, engine, ledgers, kinds, caplog
):
    caplog.set_level(logging.WARNING, "sqla_fairpool")
    with engines(engine, ledgers(kinds)) as (one, other):
        visit(one)
        visit(other)
        assert warnings_in(caplog) == []


@contract
def test_ledger_is_shown_by_another_connection_when_the_first_has_gone(
    world, engine, ledgers, caplog
):
    caplog.set_level(logging.WARNING, "sqla_fairpool")
    with engines(engine, ledgers("a b")) as (one, other):
        visit(one)
        one.dispose()
        visit(one)
        visit(other)
        assert len(warnings_in(caplog)) == 1


@contract
@pytest.mark.parametrize(("kinds", "warned"), [("a a", False), ("a b", True)])
def test_other_ledger_may_be_another_processes(
    world, engine, ledgers, kinds, warned, postgres_url, caplog
):
    caplog.set_level(logging.WARNING, "sqla_fairpool")
    url = make_url(postgres_url).render_as_string(False)
    theirs, ours = ledgers(kinds)
    process = start("scraper_program.py", url, theirs, "theirs", 1, 0.01)
    try:
        with engines(engine, [ours]) as (one,):
            visit(one)
        assert len(warnings_in(caplog)) == warned
        assert all("1 other ledger(s)" in text for text in warnings_in(caplog))
    finally:
        end(process)
