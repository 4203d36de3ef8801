"""The figures of a moment: `pool.stats()`, `repr(pool)`, `pool.status()`."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from support.threads import connect, give, take

from sqla_fairpool import Summary


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


def test_longest_wait_and_hold_of_this_moment(threads, clock):
    engine = threads.engine(pool_size=1)
    held, callers = connect(engine), []
    clock.advance(2.0)
    for _ in range(2):
        callers += threads.wait_in_line(engine)
        clock.advance(3.0)
    row = row_of(engine)
    assert (row.waiting, row.waiting_for, row.held_for) == (2, 6.0, 8.0)
    held.close()
    for caller in callers:
        caller.result().close()
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
    connection = tagged.connect()
    for connections, held in (1, Summary(3, 9.0, 5.0)), (0, Summary(4, 9.0, 5.0)):
        row = row_of(tagged)
        assert (row.checkouts, row.connections) == (4, connections)
        assert row.hold_time == held
        connection.close()


def test_fair_shares_are_shown_with_the_tags_that_hold_them(make_engine):
    engine = make_engine(pool_size=5, soft_limit=3, max_limit=5)
    held = take(engine, 3, "b") + take(engine, 2, "a")
    stats = engine.pool.stats()
    assert [(r.name, r.fair_share) for r in stats.tags] == [("a", 2), ("b", 3)]
    give(held)


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


def test_rows_are_not_made_by_the_frozen_class(tagged):
    """Which sets each field by a call: with a thousand tags, half of the time."""
    tagged.connect().close()
    called = set()
    sys.setprofile(lambda frame, event, arg: called.add(frame.f_code))
    try:
        row = tagged.pool.stats().tag("a")
    finally:
        sys.setprofile(None)
    for made in (row, row.wait_time):
        assert type(made).__init__.__code__ not in called
    assert row == dataclasses.replace(row)
