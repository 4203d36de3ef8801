"""What an operator reads: one line per change of state, and what is out too long."""

from __future__ import annotations

import gc
import logging
import re
import threading
import weakref
from functools import partial

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from support import state
from support.threads import Caller, Gate, ensure_waiting, eventually
from support.worlds import contract, world_of

from sqla_fairpool import FairQueuePool


@pytest.fixture
def lines(caplog):
    """Return the lines logged since the last call."""
    caplog.set_level(logging.INFO, "sqlalchemy.pool")

    def lines(level=logging.INFO):
        found = [r.getMessage() for r in caplog.records if r.levelno == level]
        caplog.clear()
        return found

    return lines


# -- tags, and a pool without a free connection ----------------------------------------


def test_tags_come_and_go(make_engine, clock, lines):
    engine = make_engine(idle_timeout=60, reallocation_interval=30)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    for expected in (["Tag 'a' is active: 1 active tag, which may have 15"], []):
        a.connect().close()
        assert lines() == expected
    clock.advance(40.0)
    b.connect().close()
    assert lines() == ["Tag 'b' is active: 2 active tags, at most 10 each"]
    clock.advance(30.0)
    engine.pool.upkeep()
    assert lines() == ["Tag 'a' is idle: 1 active tag, which may have 15"]
    clock.advance(60.0)
    engine.pool.upkeep()
    assert lines() == ["Tag 'b' is idle: no tag is active, the first may have 15"]


def test_lines_about_a_tag(make_engine, lines):
    """None about a moment without one; and a tag cannot forge a line."""
    engine = make_engine()
    with engine.connect().execution_options(scraper="a"):
        assert lines() == ["Tag 'a' is active: 1 active tag, which may have 15"]
    engine.execution_options(scraper='it\'s "all" % fine').connect().close()
    (line,) = lines()
    assert line.startswith("Tag 'it\\'s \"all\" % fine' is active")


def wait_once(engine, clock):
    """Let a caller wait for a full pool."""
    tagged = engine.execution_options(scraper="a")
    with tagged.connect():
        caller = Caller(lambda: tagged.connect().close())
        ensure_waiting(engine.pool, 1)
        clock.advance(2.0)
    caller.result()


def test_exhaustion_begins_and_ends_once(make_engine, clock, lines):
    engine = make_engine(pool_size=1)
    for _ in range(3):  # full and empty in turn, without a pause: one exhaustion
        wait_once(engine, clock)
    begin = "Pool exhausted: tag 'a' has to wait, all 1 connections are in use; held by"
    assert lines()[1:] == [f"{begin} a=1"]
    clock.advance(4.0)
    engine.pool.upkeep()
    assert lines() == []
    for _ in range(2):
        clock.advance(5.0)
        engine.execution_options(scraper="a").connect().close()
    (end,) = lines()
    assert end.startswith("Pool no longer exhausted: no caller waits any more, after ")
    wait_once(engine, clock)
    assert lines() == [f"{begin} a=1"]
    # To wait at one's own ceiling is none.
    wait_once(make_engine(pool_size=4, soft_limit=1, max_limit=1), clock)
    assert [line[:3] for line in lines()] == ["Tag"]


def test_password_is_never_logged(postgres_url, lines, caplog):
    caplog.set_level(logging.DEBUG, "sqlalchemy")
    url = make_url(postgres_url).set(password="s3cret!", database="nothing-there")
    engine = create_engine(url, poolclass=FairQueuePool, leak_threshold=60, echo=True)
    with pytest.raises(OperationalError) as caught:
        engine.connect()
    assert "s3cret" not in caplog.text + str(caught.value) + repr(engine.pool)
    assert "s3cret" not in repr(engine.pool.stats()) + repr(engine.pool.metrics())


# -- what is out for too long ----------------------------------------------------------


@pytest.fixture
def late(monkeypatch, lines, clock):
    """Look after some seconds; return what is said of leaks. No thread looks."""
    watch = "sqla_fairpool.diagnosis.event_log.LeakWatch"
    monkeypatch.setattr(f"{watch}.start", lambda watch: None)

    def late(engine, seconds):
        clock.advance(seconds)
        state.find_leaks(engine)
        return lines(logging.WARNING)

    return late


@pytest.fixture(params=["sqlite", "sqlite+aiosqlite"])
def world(request, tmp_path):
    """Threads, and tasks."""
    return world_of(f"sqlite:///{tmp_path / 'test.db'}", request.param)


BACK = "Connection back that was out for too long: 'layer2' for 1m05s by thread "


def take_and_forget(engine):
    return engine.connect()  # the line that is reported


def test_leak_is_reported_once_with_its_stack(make_engine, clock, lines, late):
    engine = make_engine(leak_threshold=60)
    tagged = engine.execution_options(scraper="layer2")
    connection = take_and_forget(tagged)
    clock.advance(20.0)
    connection.execute(text("select 1"))
    assert late(engine, 39.0) == []
    (report,) = late(engine, 3.0)
    assert late(engine, 3.0) == []
    first, begin, *_, before, last = report.splitlines()
    assert first.startswith(
        "Connection out for 1m02s, longer than leak_threshold 1m00s: 'layer2' for "
        "1m02s by thread 'MainThread', taken at "
    )
    assert " in take_and_forget, last statement 42s ago, now at " in first
    assert begin == "checked out at (most recent call last):"
    assert last.strip().startswith('File "')
    assert last.endswith(", in take_and_forget")
    assert f", in {test_leak_is_reported_once_with_its_stack.__name__}" in before
    assert "sqlalchemy/" not in report
    # Nothing was taken away.
    connection.execute(text("select 1"))
    assert engine.pool.checkedout() == 1
    connection.close()
    (back,) = lines(logging.WARNING)
    assert back.startswith(BACK)
    # The next checkout of the same connection is another one.
    with tagged.connect():
        assert len(late(engine, 61.0)) == 1
    assert len(lines(logging.WARNING)) == 1


def test_what_is_another_checkout(make_engine, late, lines):
    """What comes back in time is none that leaks; a retagged one is new."""
    engine = make_engine(leak_threshold=60)
    for _ in range(3):
        with engine.connect():
            assert late(engine, 59.0) == []
        assert late(engine, 59.0) == []
    with engine.connect() as connection:
        assert len(late(engine, 61.0)) == 1
        connection.execution_options(scraper="late")
        assert late(engine, 0.0) == []
        (report,) = late(engine, 61.0)
    assert report.startswith("Connection out ")
    (back,) = lines(logging.WARNING)
    assert back.startswith("Connection back")


def test_connection_that_hangs_in_opening_is_reported(make_engine, server, late):
    engine, gate = make_engine(leak_threshold=10), Gate()
    server.before["connect"] = gate
    caller = Caller(lambda: engine.connect().close())
    gate.reached()
    (report,) = late(engine, 11.0)
    gate.open()
    caller.result()
    assert "still connecting" in report


@contract
def test_caller_that_has_ended_is_named(world, late, lines):
    engine = world.engine(leak_threshold=60)
    connection = world.start(take_and_forget, engine).result()
    (report,) = late(engine, 61.0)
    assert re.search(r"by (thread|task) '.+' \(ended\), taken at ", report)
    assert report.endswith(", in take_and_forget")
    connection.close()
    assert len(lines(logging.WARNING)) == 1


def test_thread_reports_and_ends_with_the_pool(server, lines, caplog):
    engine = server.engine(leak_threshold=0.02)
    connection = engine.connect()
    eventually(partial(state.leak_thread, engine))
    thread = state.leak_thread(engine)
    assert (thread.is_alive(), thread.daemon) == (True, True)
    eventually(lambda: "longer than leak_threshold" in caplog.text)
    connection.close()
    assert len(lines(logging.WARNING)) == 2
    engine.connect().close()
    assert state.leak_thread(engine) is thread
    is_collected = state.is_collected(engine)
    del engine, connection
    gc.collect()
    eventually(lambda: not thread.is_alive())
    assert is_collected()


def test_no_thread_without_and_no_variable_is_kept(make_engine):
    before = threading.enumerate()
    engine = make_engine()
    with engine.connect() as connection:
        assert state.stack_of(connection) == ()
    assert state.leak_thread(engine) is None
    assert set(threading.enumerate()) <= set(before)
    # A stack of frames would keep the caller's variables, and what leaks alive.
    engine = make_engine(leak_threshold=60)

    def take():
        something = Gate()
        return engine.connect(), weakref.ref(something)

    connection, something = take()
    assert something() is None
    connection.close()
