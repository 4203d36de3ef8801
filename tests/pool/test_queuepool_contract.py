"""What a user of ``QueuePool`` expects, asked of both pools in the same words."""

from __future__ import annotations

import gc
import itertools
import logging
import sqlite3
import time
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
from sqlalchemy import create_engine, engine_from_config, event, exc, text
from sqlalchemy.pool import QueuePool
from support.state import assert_quiet
from support.stub import StubError, all_for_one

from sqla_fairpool import FairQueuePool, tag

pytestmark = [
    pytest.mark.parametrize(
        ("pool_class", "tag_name"),
        [
            pytest.param(QueuePool, None, id="queuepool"),
            pytest.param(FairQueuePool, None, id="untagged"),
            pytest.param(FairQueuePool, "reports", id="tagged"),
        ],
    ),
    pytest.mark.usefixtures("maybe_tagged"),
]


def options_of(pool_class, options):
    """Options that mean the same to both pools: one tag, no ceiling below the rest."""
    options = {"pool_size": 2, "max_overflow": 0, "timeout": 0, **options}
    if pool_class is FairQueuePool:
        options |= all_for_one(options["pool_size"], options["max_overflow"])
    return options


@pytest.fixture
def maybe_tagged(tag_name):
    """Check out under the tag, if there is one."""
    with tag(tag_name) if tag_name else nullcontext():
        yield


@pytest.fixture
def new_pool(pool_class, server):
    pools = []

    def new_pool(**options):
        pools.append(server.pool(pool_class, **options_of(pool_class, options)))
        return pools[-1]

    yield new_pool
    for pool in pools:
        if pool_class is FairQueuePool:
            assert_quiet(pool)


@pytest.fixture
def new_engine(pool_class, server):
    def new_engine(**options):
        options = options_of(pool_class, options)
        options["pool_timeout"] = options.pop("timeout")
        return server.engine(poolclass=pool_class, **options)

    return new_engine


@pytest.fixture
def wall_clock(monkeypatch):
    """The clock by which connections age: set `now`."""
    clock = Mock(now=1_000_000.0)
    monkeypatch.setattr(time, "time", lambda: clock.now)
    return clock


@pytest.fixture
def logged(caplog):
    """What the pool logs from now on."""
    caplog.set_level(logging.DEBUG, "sqlalchemy.pool")
    caplog.clear()
    return caplog


def figures(pool):
    return pool.checkedin(), pool.checkedout(), pool.overflow()


def use(pool):
    """Check a connection out and in; return the DBAPI connection."""
    with pool.connect() as connection:
        return connection.dbapi_connection


def use_engine(engine):
    """The same through an engine, with a statement."""
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        return connection.connection.dbapi_connection


def use_at_once(pool, number):
    """Check so many out, then in; return the DBAPI connections in that order."""
    connections = [pool.connect() for _ in range(number)]
    dbapi_connections = [connection.dbapi_connection for connection in connections]
    for connection in connections:
        connection.close()
    return dbapi_connections


def lose(dbapi_connection):
    """Have the server close a connection; the pool does not know yet."""
    error = sqlite3.ProgrammingError("Cannot operate on a closed database.")
    dbapi_connection.cursor = Mock(side_effect=error)


# -- order of reuse -----------------------------------------------------------


def test_connection_is_opened_when_needed_and_reused(new_pool, server):
    pool = new_pool()
    assert server.opened == 0
    assert use(pool) is use(pool)
    assert server.opened == 1


@pytest.mark.parametrize(
    ("use_lifo", "at_once", "in_turn"),
    [(False, [2, 1, 3], [2, 1, 3, 2]), (True, [3, 1, 2], [2, 2, 2, 2])],
)
def test_first_returned_is_reused_first_and_with_use_lifo_the_last(
    new_pool, use_lifo, at_once, in_turn
):
    pool = new_pool(pool_size=3, use_lifo=use_lifo)
    connections = [pool.connect() for _ in range(3)]
    for index in (1, 0, 2):
        connections[index].close()
    assert [c.number for c in use_at_once(pool, 3)] == at_once
    # All take turns; with use_lifo the others fall idle.
    assert [use(pool).number for _ in range(4)] == in_turn


# -- bounds -------------------------------------------------------------------


def test_size_overflow_and_timeout_may_be_given_by_position(pool_class, server):
    pool = pool_class(server.connect, 3, 2, 0.5)
    assert (pool.size(), pool.overflow(), pool.timeout()) == (3, -3, 0.5)


def test_overflow_is_closed_when_it_comes_back(new_pool, server):
    pool = new_pool(pool_size=1, max_overflow=1)
    one, other = pool.connect(), pool.connect()
    one.close()
    assert server.open == 2
    overflow = other.dbapi_connection
    other.close()
    assert overflow.closed
    assert server.open == 1


def test_checkout_beyond_the_capacity_times_out(new_pool, server):
    pool = new_pool(pool_size=1, max_overflow=1)
    with pool.connect(), pool.connect():
        before = figures(pool)
        with pytest.raises(exc.TimeoutError) as caught:
            pool.connect()
        assert figures(pool) == before
    assert caught.value.__context__ is None
    assert server.opened == 2
    assert use(pool)


# -- failures free their place ------------------------------------------------


def creator_fails(pool, server, fail):
    server.before["connect"] = fail


def reconnect_fails(pool, server, fail):
    invalidate(pool)
    server.before["connect"] = fail


def reconnect_after_pre_ping_fails(pool, server, fail):
    lose(use(pool))
    server.before["connect"] = fail


def connect_listener_fails(pool, server, fail):
    event.listen(pool, "connect", lambda *args: fail())


def checkout_listener_fails(pool, server, fail):
    event.listen(pool, "checkout", lambda *args: fail())


@pytest.mark.parametrize(
    ("what_fails", "error"),
    [
        (creator_fails, StubError),
        (creator_fails, KeyboardInterrupt),
        (creator_fails, SystemExit),
        (reconnect_fails, StubError),
        (reconnect_after_pre_ping_fails, sqlite3.OperationalError),
        (connect_listener_fails, StubError),
        (checkout_listener_fails, StubError),
        (checkout_listener_fails, exc.DisconnectionError),
    ],
)
def test_what_fails_in_a_checkout_frees_its_place(
    new_engine, server, what_fails, error
):
    pre_ping = what_fails is reconnect_after_pre_ping_fails
    engine = new_engine(pool_size=1, pool_pre_ping=pre_ping)
    pool = engine.pool
    fail = Mock(side_effect=error)
    what_fails(pool, server, fail)
    # A checkout gives up when every connection is refused.
    raised = exc.InvalidRequestError if error is exc.DisconnectionError else error
    for _ in range(3):
        with pytest.raises(raised) as caught:
            pool.connect()
        if what_fails is creator_fails:
            assert caught.value.__context__ is None
    assert pool.checkedout() == 0
    if error is exc.DisconnectionError:
        assert server.opened > 3
        assert server.open == 0
    fail.side_effect = None
    assert use_engine(engine)
    assert figures(pool) == (1, 0, 0)
    assert server.open == 1


@pytest.mark.parametrize("error", [StubError, KeyboardInterrupt])
def test_connection_that_fails_to_be_reset_is_replaced(new_pool, server, logged, error):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    first = connection.dbapi_connection
    server.before["rollback"] = Mock(side_effect=error)
    with pytest.raises(error) if error is KeyboardInterrupt else nullcontext():
        connection.close()
    del server.before["rollback"]
    assert first.closed
    assert server.open == 0
    assert "Exception during reset or similar" in logged.text
    assert use(pool) is not first


# -- reset, recycle, pre_ping -------------------------------------------------


@pytest.mark.parametrize(
    ("reset", "rollbacks", "commits"),
    [
        (True, 1, 0),
        ("rollback", 1, 0),
        ("commit", 0, 1),
        (None, 0, 0),
        (False, 0, 0),
    ],
)
def test_reset_on_return_says_how_a_transaction_ends(
    new_pool, reset, rollbacks, commits
):
    pool = new_pool(reset_on_return=reset)
    connection = pool.connect()
    dbapi_connection = connection.dbapi_connection
    dbapi_connection.commit = Mock()
    connection.close()
    assert dbapi_connection.rollbacks == rollbacks
    assert dbapi_connection.commit.call_count == commits


def test_connection_older_than_recycle_is_replaced(new_pool, wall_clock):
    pool = new_pool(recycle=10)
    first = use(pool)
    wall_clock.now += 5
    assert use(pool) is first
    wall_clock.now += 6
    assert use(pool) is not first
    assert first.closed


@pytest.mark.parametrize("disposed", [False, True])
def test_pre_ping_replaces_a_lost_connection(new_engine, server, disposed):
    engine = new_engine(pool_pre_ping=True)
    if disposed:
        engine.dispose()
    first = use_engine(engine)
    assert use_engine(engine) is first
    lose(first)
    assert use_engine(engine) is not first
    assert server.open == 1
    assert engine.pool.checkedout() == 0


# -- events -------------------------------------------------------------------


def invalidate(pool, soft=False):
    with pool.connect() as connection:
        connection.invalidate(soft=soft)


def invalidate_softly(pool):
    invalidate(pool, soft=True)


def detach(pool):
    connection = pool.connect()
    connection.detach()
    connection.close()


def record_events(pool):
    """Return a list of the names of all events that a pool has from now on."""
    seen = []
    for name in (
        "connect",
        "first_connect",
        "checkout",
        "checkin",
        "reset",
        "close",
        "invalidate",
        "soft_invalidate",
        "detach",
        "close_detached",
    ):
        event.listen(pool, name, lambda *args, name=name: seen.append(name))
    return seen


def test_events_come_in_order(new_pool, wall_clock):
    pool = new_pool()
    seen = record_events(pool)
    for action, expected in [
        (use, ["first_connect", "connect", "checkout", "reset", "checkin"]),
        (use, ["checkout", "reset", "checkin"]),
        (invalidate, ["checkout", "invalidate", "close", "checkin"]),
        (use, ["connect", "checkout", "reset", "checkin"]),
        (invalidate_softly, ["checkout", "soft_invalidate", "reset", "checkin"]),
        (use, ["close", "connect", "checkout", "reset", "checkin"]),
        (detach, ["checkout", "detach", "reset", "close_detached"]),
        (use, ["connect", "checkout", "reset", "checkin"]),
        (type(pool).dispose, ["close"]),
    ]:
        seen.clear()
        wall_clock.now += 1
        action(pool)
        assert seen == expected


def test_listeners_of_class_constructor_and_engine_are_heard(new_engine, pool_class):
    seen = []

    def heard_by(name):
        def listener(dbapi_connection, record, proxy):
            seen.append(name)
            record.info["seen"] = dbapi_connection

        return listener

    of_class = heard_by("class")
    engine = new_engine(pool_events=[(heard_by("constructor"), "checkout")])
    event.listen(engine, "checkout", heard_by("engine"))
    event.listen(pool_class, "checkout", of_class)
    try:
        with engine.connect() as connection:
            assert connection.info == {"seen": connection.connection.dbapi_connection}
    finally:
        event.remove(pool_class, "checkout", of_class)
    assert sorted(seen) == ["class", "constructor", "engine"]
    seen.clear()
    use_engine(engine)
    assert sorted(seen) == ["constructor", "engine"]


def test_listener_may_use_the_pool_itself(new_pool, server):
    pool, numbers = new_pool(pool_size=2), []

    @event.listens_for(pool, "checkout")
    def on_checkout(dbapi_connection, record, proxy):
        if dbapi_connection.number == 1:
            numbers.append(use(pool).number)

    numbers.append(use(pool).number)
    assert numbers == [2, 1]
    assert figures(pool) == (2, 0, 0)


def test_engine_may_be_given_a_pool(new_pool, server):
    pool = new_pool(pool_size=1, pre_ping=True)
    engine = create_engine("sqlite://", pool=pool)
    first = use_engine(engine)
    assert engine.pool is pool
    lose(first)
    assert use_engine(engine) is not first
    assert figures(pool) == (1, 0, 0)


def test_options_may_come_as_strings_from_a_configuration(pool_class):
    options = options_of(pool_class, {"pool_size": 3, "max_overflow": 1})
    options["pool_timeout"] = options.pop("timeout")
    configuration = {name: str(value) for name, value in options.items()}
    configuration |= {"url": "sqlite:///file.db", "pool_recycle": "60"}
    engine = engine_from_config(configuration, prefix="", poolclass=pool_class)
    assert (engine.pool.size(), engine.pool.timeout()) == (3, 0)


def test_creator_may_take_the_record(pool_class, server):
    def creator(connection_record):
        connection_record.record_info["creator"] = "called"
        return server.connect()

    with pool_class(creator).connect() as connection:
        assert connection.record_info == {"creator": "called"}


# -- invalidate, detach -------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_invalidated_connection_is_replaced_at_once_or_at_its_next_checkout(
    new_pool, server, wall_clock, soft
):
    pool = new_pool(pool_size=1)
    with pool.connect() as connection:
        first = connection.dbapi_connection
        connection.info["a"] = 1
        connection.record_info["b"] = 2
    with pool.connect() as connection:
        assert (connection.info, connection.record_info) == ({"a": 1}, {"b": 2})
        wall_clock.now += 1
        connection.invalidate(soft=soft)
        assert connection.is_valid == soft
    assert first.closed != soft
    assert figures(pool) == (1, 0, 0)
    wall_clock.now += 1
    with pool.connect() as connection:
        assert (connection.info, connection.record_info) == ({}, {"b": 2})
        assert connection.dbapi_connection is not first
    assert first.closed
    assert server.open == 1


def test_connection_may_be_closed_twice(new_pool):
    pool = new_pool()
    connection = pool.connect()
    connection.close()
    connection.close()
    assert figures(pool) == (1, 0, -1)


# -- disconnects --------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "replaced"),
    [(exc.DisconnectionError, 1), (exc.InvalidatePoolError, 2)],
)
def test_checkout_listener_has_one_connection_replaced_or_all(
    new_pool, wall_clock, error, replaced
):
    pool = new_pool()
    old = use_at_once(pool, 2)
    wall_clock.now += 1

    @event.listens_for(pool, "checkout")
    def on_checkout(dbapi_connection, record, proxy):
        if dbapi_connection is old[0]:
            raise error

    assert [use(pool).number for _ in range(2)] == ([3, 2] if replaced == 1 else [3, 4])
    assert [c.closed for c in old] == [True, replaced == 2]


def test_statement_that_finds_its_connection_lost_has_all_replaced(
    new_engine, wall_clock
):
    engine = new_engine()
    old = use_at_once(engine.pool, 2)
    wall_clock.now += 1
    lose(old[0])
    with engine.connect() as connection:
        with pytest.raises(exc.DBAPIError) as caught:
            connection.execute(text("select 1"))
        assert caught.value.connection_invalidated
    wall_clock.now += 1
    assert [c.number for c in use_at_once(engine.pool, 2)] == [3, 4]
    assert all(c.closed for c in old)


# -- dispose and recreate -----------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_dispose_closes_what_is_in_the_pool_and_no_more(new_pool, logged, fails):
    pool = new_pool()
    with pool.connect() as held:
        idle = use(pool)
        if fails:
            idle.close = Mock(side_effect=StubError)
        pool.dispose()
        assert idle.closed != fails
        assert ("Exception closing connection" in logged.text) == fails
        assert not held.dbapi_connection.closed
        assert pool.checkedin() == 0
        assert use(pool) is not idle


@pytest.mark.parametrize("close", [True, False])
def test_disposed_engine_opens_new_connections(new_engine, close):
    engine = new_engine()
    first, former = use_engine(engine), engine.pool
    engine.dispose(close=close)
    assert engine.pool is not former
    assert first.closed == close
    assert [use_engine(engine).number for _ in range(2)] == [2, 2]


def test_connection_held_over_a_dispose_can_be_used_and_closed(new_engine):
    engine = new_engine()
    with engine.connect() as connection:
        held = connection.connection.dbapi_connection
        engine.dispose()
        connection.execute(text("select 1"))
        assert connection.connection.dbapi_connection is held
    assert use_engine(engine) is not held


def test_successor_opens_its_own_connections_and_tells_its_listeners(new_pool):
    pool = new_pool()
    seen = record_events(pool)
    first = use(pool)
    successor = pool.recreate()
    seen.clear()
    assert use(successor) is not first
    if "close" in seen:  # what lies in the former pool, if both have one accounting
        seen.remove("close")
    assert seen == ["first_connect", "connect", "checkout", "reset", "checkin"]


def test_successor_does_not_get_what_comes_back_to_the_former_pool(new_pool):
    former = new_pool()
    successor = former.recreate()
    returned = use(former)
    assert use(successor) is not returned
    late = former.connect()
    returned = late.dbapi_connection
    with successor.connect():
        late.close()
        assert use(successor) is not returned


def test_dispose_leaves_the_connections_of_the_successor(new_pool):
    former = new_pool()
    successor = former.recreate()
    first, second = use(former), use(successor)
    former.dispose()
    assert (first.closed, second.closed) == (True, False)
    successor.dispose()
    assert second.closed


def test_recreate_keeps_class_and_options(new_pool, pool_class, logged, wall_clock):
    options = {"timeout": 0.25, "use_lifo": True, "reset_on_return": None}
    pool = new_pool(
        pool_size=2, max_overflow=1, recycle=10, logging_name="reports", **options
    )
    listener = Mock()
    event.listen(pool, "checkin", lambda *args: listener())
    successor = pool.recreate().recreate()
    assert type(successor) is pool_class
    assert (successor.size(), successor.timeout()) == (2, 0.25)
    last = use_at_once(successor, 2)[-1]
    assert use(successor) is last
    assert last.rollbacks == 0
    assert listener.call_count == 3
    with successor.connect(), successor.connect(), successor.connect():
        assert successor.overflow() == 1
    wall_clock.now += 11
    assert use(successor) is not last
    assert all(r.name.endswith(".reports") for r in logged.records)


# -- figures ------------------------------------------------------------------


def test_figures_follow_the_connections(new_pool):
    pool = new_pool(pool_size=2, max_overflow=1, timeout=0.5)
    assert (pool.size(), pool.timeout()) == (2, 0.5)
    assert figures(pool) == (0, 0, -2)
    connections, seen = [], []
    for _ in range(3):
        connections.append(pool.connect())
        seen.append(figures(pool))
    assert pool.status().startswith(
        "Pool size: 2  Connections in pool: 0 Current Overflow: 1 "
        "Current Checked out connections: 3"
    )
    while connections:
        connections.pop().close()
        seen.append(figures(pool))
    assert seen == [(0, 1, -1), (0, 2, 0), (0, 3, 1), (1, 2, 1), (2, 1, 1), (2, 0, 0)]
    pool.dispose()
    assert figures(pool) == (0, 0, -2)


# -- logging ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reports", None])
def test_pool_logs_below_sqlalchemy_pool_under_its_name_or_its_class(
    new_pool, pool_class, logged, name
):
    pool = new_pool(logging_name=name)
    use(pool)
    pool.dispose()
    pool.recreate()
    (logger,) = {record.name for record in logged.records}
    assert logger.startswith("sqlalchemy.pool.")
    assert logger.rpartition(".")[2] == (name or pool_class.__name__)


@pytest.mark.parametrize(("echo", "debug"), [(True, False), ("debug", True)])
def test_echo_has_the_pool_log(new_pool, caplog, echo, debug):
    # A logger that has a handler is not given another, on standard output.
    name = f"echo_{next(_numbers)}"
    silent = new_pool(logging_name=name)
    silent.logger.addHandler(logging.NullHandler())
    pool = new_pool(logging_name=name, echo=echo)
    use(silent)
    assert not caplog.records
    use(pool)
    pool.dispose()
    levels = {record.levelno for record in caplog.records}
    assert logging.INFO in levels
    assert (logging.DEBUG in levels) == debug


_numbers = itertools.count()


def test_echo_pool_of_an_engine_reaches_the_pool(new_engine):
    engine = new_engine(echo_pool=False, pool_logging_name="reports")
    for _ in range(2):
        assert engine.pool.echo is False
        assert engine.pool.logging_name == "reports"
        engine.dispose()


# -- the collector ------------------------------------------------------------


@pytest.mark.parametrize("invalid", [False, True])
def test_leaked_connection_is_returned_by_the_collector(new_pool, invalid):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    first = connection.dbapi_connection
    if invalid:
        connection.invalidate()
    del connection
    gc.collect()
    assert first.rollbacks == (not invalid)
    assert figures(pool) == (1, 0, 0)
    assert (use(pool) is first) != invalid
