"""What is out for too long is reported, once, and again when it comes back."""

from __future__ import annotations

import gc
import logging
import re
import threading
import weakref
from functools import partial

import pytest
from sqlalchemy import text
from support import state
from support.threads import Caller, eventually
from support.worlds import contract, world_of


@pytest.fixture(params=["sqlite", "sqlite+aiosqlite"])
def world(request, tmp_path):
    """Threads, and tasks."""
    return world_of(f"sqlite:///{tmp_path / 'test.db'}", request.param)


@pytest.fixture
def log(caplog):
    """What was logged."""
    caplog.set_level(logging.INFO, "sqlalchemy.pool")
    return caplog


@pytest.fixture(autouse=True)
def _no_thread(monkeypatch, request):
    """The tests look themselves, but for those that are about the thread."""
    if "with_thread" not in request.fixturenames:
        monkeypatch.setattr(
            "sqla_fairpool.diagnosis.event_log.LeakWatch.start", lambda watch: None
        )


@pytest.fixture
def with_thread():
    """The thread looks."""


def reports(log):
    """Return what was said of leaks."""
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING]


def take_and_forget(engine):
    return engine.connect()  # the line that is reported


def test_leak_is_reported_once_with_its_stack(make_engine, clock, log):
    engine = make_engine(leak_threshold=60)
    tagged = engine.execution_options(scraper="layer2")
    connection = take_and_forget(tagged)
    clock.advance(20.0)
    connection.execute(text("select 1"))
    clock.advance(39.0)
    state.find_leaks(engine)
    assert reports(log) == []
    clock.advance(3.0)
    state.find_leaks(engine)
    clock.advance(3.0)
    state.find_leaks(engine)
    (report,) = reports(log)
    assert report.startswith(
        "Connection out for 1m02s, longer than leak_threshold 1m00s: 'layer2' for "
        "1m02s by thread 'MainThread', taken at "
    )
    assert "last statement 42s ago, now at " in report
    first, *stack = report.splitlines()
    assert " in take_and_forget" in first
    assert stack[0] == "checked out at (most recent call last):"
    assert stack[-1].strip().startswith('File "')
    assert stack[-1].endswith(", in take_and_forget")
    assert f", in {test_leak_is_reported_once_with_its_stack.__name__}" in stack[-2]
    assert not any("sqlalchemy/" in line for line in stack)
    connection.close()
    _, back = reports(log)
    assert back.startswith(
        "Connection back that was out for too long: 'layer2' for 1m05s by thread "
    )
    # The next checkout of the same connection is another one.
    with tagged.connect():
        clock.advance(61.0)
        state.find_leaks(engine)
    assert len(reports(log)) == 4


def test_what_comes_back_in_time_is_not_reported(make_engine, clock, log):
    engine = make_engine(leak_threshold=60)
    for _ in range(3):
        with engine.connect():
            clock.advance(59.0)
            state.find_leaks(engine)
        clock.advance(59.0)
        state.find_leaks(engine)
    assert reports(log) == []


def test_nothing_is_taken_away(make_engine, clock, log):
    engine = make_engine(leak_threshold=1)
    connection = engine.connect()
    clock.advance(1000.0)
    state.find_leaks(engine)
    connection.execute(text("select 1"))
    assert engine.pool.checkedout() == 1
    connection.close()


def test_retagged_checkout_is_a_new_one(make_engine, clock, log):
    engine = make_engine(leak_threshold=60)
    with engine.connect() as connection:
        clock.advance(61.0)
        state.find_leaks(engine)
        connection.execution_options(scraper="late")
        state.find_leaks(engine)
        assert len(reports(log)) == 1
        clock.advance(61.0)
        state.find_leaks(engine)
    assert [r[:15] for r in reports(log)] == [
        "Connection out ",
        "Connection out ",
        "Connection back",
    ]


def test_connection_that_hangs_in_opening_is_reported(make_engine, server, clock, log):
    engine = make_engine(leak_threshold=10)
    go_on = threading.Event()
    server.before["connect"] = lambda: go_on.wait(30)
    caller = Caller(lambda: engine.connect().close())
    eventually(lambda: engine.pool.checkedout() == 1)
    clock.advance(11.0)
    state.find_leaks(engine)
    go_on.set()
    caller.result()
    report, _ = reports(log)
    assert "still connecting" in report


def test_thread_reports_and_ends_with_the_pool(server, log, with_thread):
    engine = server.engine(leak_threshold=0.02)
    connection = engine.connect()
    eventually(partial(state.leak_thread, engine))
    thread = state.leak_thread(engine)
    assert thread.is_alive()
    assert thread.daemon
    eventually(lambda: reports(log))
    connection.close()
    assert len(reports(log)) == 2
    engine.connect().close()
    assert state.leak_thread(engine) is thread
    is_collected = state.is_collected(engine)
    del engine, connection
    gc.collect()
    eventually(lambda: not thread.is_alive())
    assert is_collected()


def test_off_means_no_thread_and_no_stack(make_engine, with_thread):
    before = threading.enumerate()
    engine = make_engine()
    with engine.connect() as connection:
        assert state.stack_of(connection) == ()
    assert state.leak_thread(engine) is None
    assert set(threading.enumerate()) <= set(before)


def test_no_variable_is_kept(make_engine):
    """A stack of frames would keep the caller's variables, and what leaks alive."""

    class Something:
        pass

    engine = make_engine(leak_threshold=60)

    def take():
        something = Something()
        return engine.connect(), weakref.ref(something)

    connection, something = take()
    assert something() is None
    connection.close()


@contract
def test_caller_that_has_ended_is_named(world, clock, log):
    engine = world.engine(leak_threshold=60)
    connection = world.start(take_and_forget, engine).result()
    clock.advance(61.0)
    state.find_leaks(engine)
    (report,) = reports(log)
    assert re.search(r"by (thread|task) '.+' \(ended\), taken at ", report)
    assert report.endswith(", in take_and_forget")
    connection.close()
    assert len(reports(log)) == 2
