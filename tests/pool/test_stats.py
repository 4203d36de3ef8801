"""The figures of a moment: `pool.stats()`, `repr(pool)`, `pool.status()`."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.threads import Caller, ensure_waiting

from sqla_fairpool import FairQueuePool, Summary


@pytest.fixture
def engine(clock, make_engine):
    return make_engine(pool_size=4)


@pytest.fixture
def tagged(engine):
    """An engine with the tag 'a'; `engine` has none."""
    return engine.execution_options(scraper="a")


def row_of(engine, tag="a"):
    return engine.pool.stats().tag(tag)


def test_snapshot_of_a_pool_in_use(engine, tagged, clock):
    web = engine.execution_options(scraper="web")
    first, second = tagged.connect(), tagged.connect()
    clock.advance(3.0)
    second.close()
    other = web.connect()
    clock.advance(1.0)
    stats = engine.pool.stats()
    assert (stats.size, stats.capacity, stats.checked_out) == (4, 4, 2)
    assert (stats.available, stats.idle, stats.overflow, stats.waiting) == (2, 0, 0, 0)
    assert stats.utilization == 0.5
    assert stats.strategy == "2 active: equal shares, at most 2 each"
    assert (stats.name, stats.min_idle) == (engine.pool.metrics_name, 0)
    assert set(stats.closures.values()) == {0}
    row = stats.tag("a")
    assert (row.active, row.connections, row.limit, row.fair_share) == (True, 1, 2, 1)
    assert (row.checkouts, row.timeouts, row.waiting) == (2, 0, 0)
    assert row.idle_for == 1.0
    assert row.hold_time == Summary(count=1, total=3.0, max=3.0)
    assert row.wait_time == Summary(count=2, total=0.0, max=0.0)
    assert stats.tag("nobody") is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.size = 1
    first.close()
    other.close()


def test_longest_wait_and_hold_of_this_moment(make_engine, clock):
    engine = make_engine(pool_size=1).execution_options(scraper="a")
    held = engine.connect()
    clock.advance(2.0)
    callers = []
    for number in (1, 2):
        callers.append(Caller(lambda: engine.connect().close()))
        ensure_waiting(engine.pool, number)
        clock.advance(3.0)
    row = row_of(engine)
    assert (row.waiting, row.waiting_for, row.held_for) == (2, 6.0, 8.0)
    held.close()
    for caller in callers:
        caller.result()
    row = row_of(engine)
    assert (row.waiting, row.waiting_for, row.held_for) == (0, None, None)
    assert row.wait_time == Summary(3, 9.0, 6.0)


@pytest.mark.parametrize("figures", ["stats", "metrics"])
def test_it_is_ready_for_json(engine, tagged, figures):
    with tagged.connect():
        stats = getattr(engine.pool, figures)()
    plain = json.loads(json.dumps(stats.as_dict(), allow_nan=False))
    assert plain["checked_out"] == 1
    row = next(row for row in plain["tags"] if row["name"] == "a")
    assert row["wait_time"] == {"count": 1, "total": 0.0, "max": 0.0, "mean": 0.0}


def test_times_of_warm_checkouts_are_counted_while_one_is_out(tagged, clock):
    for seconds in (1.0, 5.0, 3.0):
        with tagged.connect():
            clock.advance(seconds)
    with tagged.connect():
        row = row_of(tagged)
        assert (row.checkouts, row.connections) == (4, 1)
        assert row.hold_time == Summary(count=3, total=9.0, max=5.0)
    row = row_of(tagged)
    assert (row.checkouts, row.connections) == (4, 0)
    assert row.hold_time == Summary(count=4, total=9.0, max=5.0)


def test_untagged_row_is_absent_when_all_said_later_who_they_are(engine):
    with engine.connect().execution_options(scraper="a"):
        assert [row.name for row in engine.pool.stats().tags] == ["a"]


def test_fair_shares_are_shown_with_those_who_hold_them(make_engine):
    engine = make_engine(pool_size=5, soft_limit=3, max_limit=5)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    held = [b.connect() for _ in range(3)] + [a.connect() for _ in range(2)]
    stats = engine.pool.stats()
    assert [(r.name, r.fair_share) for r in stats.tags] == [("a", 2), ("b", 3)]
    for connection in held:
        connection.close()


def test_repr_status_and_strategy_say_what_is_going_on(engine, tagged):
    pool = engine.pool
    assert repr(pool) == "<FairQueuePool in_use=0/4 idle=0 waiting=0 active_tags=0>"
    assert pool.stats().strategy == "nobody active: the first may have 3"
    with tagged.connect():
        assert repr(pool) == "<FairQueuePool in_use=1/4 idle=0 waiting=0 active_tags=1>"
        assert pool.status() == (
            "Pool size: 4  Connections in pool: 0 Current Overflow: -3 "
            "Current Checked out connections: 1 Waiting: 0"
        )
        assert pool.stats().strategy == "1 active: at most 3"


def test_subclass_has_its_own_name_in_repr(server):
    class ScraperPool(FairQueuePool):
        pass

    assert repr(server.pool(ScraperPool)).startswith("<ScraperPool in_use=0/20")
