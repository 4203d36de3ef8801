"""What an operator reads: one line per change of state, nothing that lies."""

from __future__ import annotations

import logging

import pytest
from support.threads import Caller, ensure_waiting


@pytest.fixture
def lines(caplog):
    """Return the lines logged since the last call."""
    caplog.set_level(logging.INFO, "sqlalchemy.pool")

    def lines():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return lines


def test_tags_come_and_go(make_engine, clock, lines):
    engine = make_engine(idle_timeout=60, reallocation_interval=30)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    a.connect().close()
    assert lines() == ["Tag 'a' is active: 1 active tag, which may have 15"]
    a.connect().close()
    assert lines() == []
    clock.advance(40.0)
    b.connect().close()
    assert lines() == ["Tag 'b' is active: 2 active tags, at most 10 each"]
    clock.advance(30.0)
    engine.pool.upkeep()
    assert lines() == ["Tag 'a' is idle: 1 active tag, which may have 15"]
    clock.advance(60.0)
    engine.pool.upkeep()
    assert lines() == ["Tag 'b' is idle: no tag is active, the first may have 15"]


def test_untagged_moments_are_no_news(make_engine, lines):
    engine = make_engine()
    with engine.connect().execution_options(scraper="a"):
        pass
    assert lines() == ["Tag 'a' is active: 1 active tag, which may have 15"]


def test_tag_cannot_forge_a_line(make_engine, lines):
    engine = make_engine()
    engine.execution_options(scraper='it\'s "all" % fine').connect().close()
    (line,) = lines()
    assert line.startswith("Tag 'it\\'s \"all\" % fine' is active")


def wait_once(engine):
    """Let a caller wait for a full pool."""
    tagged = engine.execution_options(scraper="a")
    holder = tagged.connect()
    caller = Caller(lambda: tagged.connect().close())
    ensure_waiting(engine.pool, 1)
    return holder, caller


def test_exhaustion_begins_and_ends_once(make_engine, clock, lines):
    engine = make_engine(pool_size=1)
    for _ in range(3):  # full and empty in turn, without a pause: one exhaustion
        holder, caller = wait_once(engine)
        clock.advance(2.0)
        holder.close()
        caller.result()
    _, begin = lines()
    assert begin == (
        "Pool exhausted: tag 'a' has to wait, all 1 connections are in use; held by a=1"
    )
    clock.advance(4.0)
    engine.pool.upkeep()
    assert lines() == []
    for _ in range(2):
        clock.advance(5.0)
        engine.execution_options(scraper="a").connect().close()
    (end,) = lines()
    assert end.startswith("Pool no longer exhausted: no caller waits any more, after ")
    holder, caller = wait_once(engine)
    holder.close()
    caller.result()
    assert lines() == [begin]


def test_waiting_at_ones_own_ceiling_is_no_exhaustion(make_engine, lines):
    engine = make_engine(pool_size=4, soft_limit=1, max_limit=1)
    holder, caller = wait_once(engine)
    holder.close()
    caller.result()
    assert [line[:3] for line in lines()] == ["Tag"]


def test_password_is_never_logged(postgres_url, lines, caplog):
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import OperationalError

    from sqla_fairpool import FairQueuePool

    caplog.set_level(logging.DEBUG, "sqlalchemy")
    url = make_url(postgres_url).set(password="s3cret!", database="nothing-there")
    engine = create_engine(url, poolclass=FairQueuePool, leak_threshold=60, echo=True)
    with pytest.raises(OperationalError) as caught:
        engine.connect()
    assert "s3cret" not in " ".join(lines()) + str(caught.value) + repr(engine.pool)
    assert "s3cret" not in repr(engine.pool.stats()) + repr(engine.pool.metrics())
