from __future__ import annotations

import dataclasses
import json

import pytest
from support.threads import Caller, ensure_waiting

from sqla_fairpool import FairQueuePool, Summary


def test_snapshot_of_a_pool_in_use(make_engine, clock):
    engine = make_engine(pool_size=4)
    jobs = engine.execution_options(scraper="jobs")
    web = engine.execution_options(scraper="web")
    first, second = jobs.connect(), jobs.connect()
    clock.advance(3.0)
    second.close()
    other = web.connect()
    clock.advance(1.0)
    stats = engine.pool.stats()
    assert (stats.size, stats.capacity, stats.checked_out) == (4, 4, 2)
    assert (stats.available, stats.idle, stats.overflow, stats.waiting) == (2, 0, 0, 0)
    assert stats.utilization == 0.5
    assert stats.strategy == "2 active: equal shares, at most 2 each"
    row = stats.tag("jobs")
    assert (row.active, row.connections, row.limit, row.fair_share) == (True, 1, 2, 1)
    assert (row.checkouts, row.timeouts, row.waiting) == (2, 0, 0)
    assert row.idle_for == 1.0
    assert row.hold_time == Summary(count=1, total=3.0, max=3.0)
    assert row.wait_time == Summary(count=2, total=0.0, max=0.0)
    assert stats.tag("nobody") is None
    first.close()
    other.close()


def test_snapshot_tells_the_longest_wait_and_hold_of_this_moment(make_engine, clock):
    engine = make_engine(pool_size=1).execution_options(scraper="a")
    held = engine.connect()
    clock.advance(2.0)
    callers = []
    for number in (1, 2):
        callers.append(Caller(engine.connect))
        ensure_waiting(engine.pool, number)
        clock.advance(3.0)
    row = engine.pool.stats().tag("a")
    assert (row.waiting_for, row.held_for) == (6.0, 8.0)
    held.close()
    callers[0].result().close()
    callers[1].result().close()
    row = engine.pool.stats().tag("a")
    assert (row.waiting_for, row.held_for) == (None, None)


def test_snapshot_is_frozen_and_ready_for_json(make_engine):
    engine = make_engine()
    with engine.execution_options(scraper="a").connect():
        stats = engine.pool.stats()
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.size = 1
    plain = json.loads(json.dumps(stats.as_dict()))
    assert plain["checked_out"] == 1
    assert plain["tags"][0]["name"] == "a"
    assert plain["tags"][0]["wait_time"] == {
        "count": 1,
        "total": 0.0,
        "max": 0.0,
        "mean": 0.0,
    }


def test_times_of_warm_checkouts_are_counted_while_one_is_out(make_engine, clock):
    engine = make_engine()
    tagged = engine.execution_options(scraper="a")
    for seconds in (1.0, 5.0, 3.0):
        with tagged.connect():
            clock.advance(seconds)
    with tagged.connect():
        row = engine.pool.stats().tag("a")
        assert (row.checkouts, row.connections) == (4, 1)
        assert row.hold_time == Summary(count=3, total=9.0, max=5.0)
    row = engine.pool.stats().tag("a")
    assert (row.checkouts, row.connections) == (4, 0)
    assert row.hold_time == Summary(count=4, total=9.0, max=5.0)


def test_waits_are_counted(make_engine, clock):
    engine = make_engine(pool_size=1)
    tagged = engine.execution_options(scraper="a")
    holder = tagged.connect()
    caller = Caller(lambda: tagged.connect().close())
    ensure_waiting(engine.pool, 1)
    assert engine.pool.stats().tag("a").waiting == 1
    clock.advance(2.0)
    holder.close()
    caller.result()
    assert engine.pool.stats().tag("a").wait_time == Summary(2, 2.0, 2.0)


def test_untagged_row_is_absent_when_all_said_later_who_they_are(make_engine):
    engine = make_engine()
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


def test_repr_and_status_say_what_is_going_on(make_engine):
    engine = make_engine(pool_size=3)
    assert repr(engine.pool) == (
        "<FairQueuePool in_use=0/3 idle=0 waiting=0 active_tags=0>"
    )
    with engine.execution_options(scraper="a").connect():
        assert repr(engine.pool) == (
            "<FairQueuePool in_use=1/3 idle=0 waiting=0 active_tags=1>"
        )
        assert engine.pool.status() == (
            "Pool size: 3  Connections in pool: 0 Current Overflow: -2 "
            "Current Checked out connections: 1 Waiting: 0"
        )


def test_strategy_is_said_in_words(make_engine):
    engine = make_engine()
    assert engine.pool.stats().strategy == "nobody active: the first may have 15"
    engine.execution_options(scraper="a").connect().close()
    assert engine.pool.stats().strategy == "1 active: at most 15"


def test_subclass_has_its_own_name_in_repr(server):
    class ScraperPool(FairQueuePool):
        pass

    assert repr(server.pool(ScraperPool)).startswith("<ScraperPool in_use=0/20")
