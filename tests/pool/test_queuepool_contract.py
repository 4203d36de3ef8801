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
from support.stub import StubError
from support.threads import Caller

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

EVENTS = [
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
]


def options_of(pool_class, options):
    """Options that mean the same to both pools: one tag, no ceiling below the rest."""
    options = {"pool_size": 2, "max_overflow": 0, "timeout": 0, **options}
    if pool_class is FairQueuePool:
        capacity = options["pool_size"] + options["max_overflow"]
        options["soft_limit"] = options["max_limit"] = capacity
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
        pool = server.pool(pool_class, **options_of(pool_class, options))
        pools.append(pool)
        return pool

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


def record_events(pool, into):
    """Append the name of each event of `pool` to the list `into`."""
    for name in EVENTS:
        event.listen(pool, name, lambda *args, name=name: into.append(name))


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


def test_checkouts_at_the_same_time_get_connections_of_their_own(new_pool):
    pool = new_pool()
    with pool.connect() as one, pool.connect() as other:
        assert one.dbapi_connection is not other.dbapi_connection


@pytest.mark.parametrize(
    ("use_lifo", "expected"), [(False, [2, 1, 3]), (True, [3, 1, 2])]
)
def test_first_returned_is_reused_first_and_with_use_lifo_the_last(
    new_pool, use_lifo, expected
):
    pool = new_pool(pool_size=3, use_lifo=use_lifo)
    connections = [pool.connect() for _ in range(3)]
    for index in (1, 0, 2):
        connections[index].close()
    again = [pool.connect() for _ in range(3)]
    assert [c.dbapi_connection.number for c in again] == expected
    for connection in again:
        connection.close()


def test_use_lifo_lets_the_others_fall_idle(new_pool):
    pool = new_pool(pool_size=3, use_lifo=True)
    for connection in [pool.connect() for _ in range(3)]:
        connection.close()
    assert len({use(pool).number for _ in range(5)}) == 1


def test_without_lifo_all_take_turns(new_pool):
    pool = new_pool(pool_size=3)
    for connection in [pool.connect() for _ in range(3)]:
        connection.close()
    assert [use(pool).number for _ in range(6)] == [1, 2, 3, 1, 2, 3]


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
        with pytest.raises(exc.TimeoutError) as caught:
            pool.connect()
    assert caught.value.__context__ is None
    assert server.opened == 2
    assert use(pool)


def test_waiter_gets_the_connection_that_comes_back(new_pool):
    pool = new_pool(pool_size=1, timeout=30)
    connection = pool.connect()
    caller = Caller(use, pool)
    first = connection.dbapi_connection
    connection.close()
    assert caller.result() is first


def test_threads_never_open_more_than_the_capacity(new_pool, server):
    pool = new_pool(pool_size=2, max_overflow=1, timeout=30)

    def work():
        for _ in range(50):
            use(pool)

    for caller in [Caller(work) for _ in range(8)]:
        caller.result()
    assert server.most <= 3
    assert pool.checkedout() == 0
    assert pool.checkedin() <= 2


# -- failures free their place ------------------------------------------------


@pytest.mark.parametrize("error", [StubError, KeyboardInterrupt])
def test_creator_that_fails_frees_its_place(new_pool, server, error):
    pool = new_pool(pool_size=1)
    server.before["connect"] = Mock(side_effect=error)
    for _ in range(3):
        with pytest.raises(error) as caught:
            pool.connect()
        assert caught.value.__context__ is None
    del server.before["connect"]
    assert pool.checkedout() == 0
    assert use(pool)


def test_reconnect_that_fails_frees_its_place(new_pool, server):
    pool = new_pool(pool_size=1)
    with pool.connect() as connection:
        connection.invalidate()
    server.before["connect"] = Mock(side_effect=StubError)
    for _ in range(3):
        with pytest.raises(StubError):
            pool.connect()
    del server.before["connect"]
    assert figures(pool) == (1, 0, 0)
    assert use(pool)


@pytest.mark.parametrize("name", ["connect", "checkout"])
def test_listener_that_fails_frees_its_place(new_pool, name):
    pool = new_pool(pool_size=1)
    listener = Mock(side_effect=[StubError, StubError, None])
    event.listen(pool, name, lambda *args: listener())
    for _ in range(2):
        with pytest.raises(StubError):
            pool.connect()
    assert use(pool)
    assert pool.checkedout() == 0


def test_connection_that_fails_to_be_reset_is_replaced(new_pool, server, logged):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    first = connection.dbapi_connection
    server.before["rollback"] = Mock(side_effect=StubError)
    connection.close()
    del server.before["rollback"]
    assert first.closed
    assert "Exception during reset or similar" in logged.text
    assert use(pool) is not first


def test_connection_that_fails_to_close_is_forgotten(new_pool, logged):
    pool = new_pool()
    use(pool).close = Mock(side_effect=StubError)
    pool.dispose()
    assert "Exception closing connection" in logged.text
    assert pool.checkedin() == 0
    assert use(pool)


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


def test_pre_ping_replaces_a_lost_connection(new_engine, server):
    engine = new_engine(pool_pre_ping=True)
    first = use_engine(engine)
    assert use_engine(engine) is first
    lose(first)
    assert use_engine(engine) is not first
    assert server.open == 1
    assert engine.pool.checkedout() == 0


def test_pre_ping_that_finds_no_server_frees_its_place(new_engine, server):
    engine = new_engine(pool_size=1, pool_pre_ping=True)
    lose(use_engine(engine))
    server.before["connect"] = Mock(side_effect=sqlite3.OperationalError)
    for _ in range(3):
        with pytest.raises(exc.OperationalError):
            engine.connect()
    del server.before["connect"]
    assert engine.pool.checkedout() == 0
    assert use_engine(engine)


# -- events -------------------------------------------------------------------


def test_events_of_a_connection_come_in_order(new_pool):
    pool, seen = new_pool(), []
    record_events(pool, seen)
    use(pool)
    assert seen == ["first_connect", "connect", "checkout", "reset", "checkin"]
    seen.clear()
    use(pool)
    assert seen == ["checkout", "reset", "checkin"]
    seen.clear()
    pool.dispose()
    assert seen == ["close"]


def test_first_connect_comes_once(new_pool):
    pool, seen = new_pool(), []
    record_events(pool, seen)
    with pool.connect(), pool.connect():
        pass
    assert seen.count("first_connect") == 1
    assert seen.count("connect") == 2


def test_events_of_an_invalidation_come_in_order(new_pool):
    pool, seen = new_pool(), []
    record_events(pool, seen)
    with pool.connect() as connection:
        seen.clear()
        connection.invalidate()
    assert seen == ["invalidate", "close", "checkin"]
    seen.clear()
    use(pool)
    assert seen == ["connect", "checkout", "reset", "checkin"]


def test_events_of_a_soft_invalidation_come_in_order(new_pool, wall_clock):
    pool, seen = new_pool(), []
    record_events(pool, seen)
    with pool.connect() as connection:
        seen.clear()
        wall_clock.now += 1
        connection.invalidate(soft=True)
    assert seen == ["soft_invalidate", "reset", "checkin"]
    seen.clear()
    wall_clock.now += 1
    use(pool)
    assert seen == ["close", "connect", "checkout", "reset", "checkin"]


def test_events_of_a_detached_connection_come_in_order(new_pool):
    pool, seen = new_pool(), []
    record_events(pool, seen)
    connection = pool.connect()
    seen.clear()
    connection.detach()
    assert seen == ["detach"]
    connection.close()
    assert seen == ["detach", "reset", "close_detached"]


def test_listeners_can_be_given_to_the_constructor(new_pool):
    listener = Mock()
    pool = new_pool(events=[(lambda *args: listener(), "checkout")])
    use(pool)
    listener.assert_called_once_with()


def test_listeners_of_the_class_and_of_the_engine_are_heard(new_engine, pool_class):
    engine = new_engine()
    seen = []

    def of_class(dbapi_connection, record, proxy):
        seen.append("class")

    event.listen(engine, "checkout", lambda *args: seen.append("engine"))
    event.listen(pool_class, "checkout", of_class)
    try:
        use_engine(engine)
    finally:
        event.remove(pool_class, "checkout", of_class)
    assert sorted(seen) == ["class", "engine"]
    use_engine(engine)
    assert sorted(seen) == ["class", "engine", "engine"]


def test_listener_may_use_the_pool_itself(new_pool, server):
    pool = new_pool(pool_size=2)
    numbers = []

    @event.listens_for(pool, "checkout")
    def on_checkout(dbapi_connection, record, proxy):
        if dbapi_connection.number == 1:
            numbers.append(use(pool).number)

    with pool.connect() as connection:
        numbers.append(connection.dbapi_connection.number)
    assert numbers == [2, 1]
    assert figures(pool) == (2, 0, 0)


def test_listener_and_user_see_the_same_info(new_pool):
    pool = new_pool()

    @event.listens_for(pool, "checkout")
    def on_checkout(dbapi_connection, record, proxy):
        record.info["seen"] = dbapi_connection

    with pool.connect() as connection:
        assert connection.info == {"seen": connection.dbapi_connection}


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
    engine = engine_from_config(
        {"url": "sqlite:///file.db", "pool_recycle": "60", **configuration},
        prefix="",
        poolclass=pool_class,
    )
    assert (engine.pool.size(), engine.pool.timeout()) == (3, 0)


def test_creator_may_take_the_record(pool_class, server):
    def creator(connection_record):
        connection_record.record_info["creator"] = "called"
        return server.connect()

    pool = pool_class(creator)
    with pool.connect() as connection:
        assert connection.record_info == {"creator": "called"}


# -- invalidate, detach -------------------------------------------------------


def test_invalidated_connection_is_closed_at_once_and_replaced(new_pool, server):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    first = connection.dbapi_connection
    connection.invalidate()
    assert first.closed
    assert not connection.is_valid
    connection.close()
    assert figures(pool) == (1, 0, 0)
    assert use(pool) is not first
    assert server.open == 1


def test_soft_invalidated_connection_is_replaced_at_its_next_checkout(
    new_pool, wall_clock
):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    first = connection.dbapi_connection
    wall_clock.now += 1
    connection.invalidate(soft=True)
    assert connection.is_valid
    connection.close()
    assert not first.closed
    wall_clock.now += 1
    assert use(pool) is not first
    assert first.closed


@pytest.mark.parametrize("soft", [False, True])
def test_info_goes_and_record_info_stays_when_a_connection_is_replaced(
    new_pool, wall_clock, soft
):
    pool = new_pool(pool_size=1)
    with pool.connect() as connection:
        connection.info["a"] = 1
        connection.record_info["b"] = 2
    with pool.connect() as connection:
        assert (connection.info, connection.record_info) == ({"a": 1}, {"b": 2})
        wall_clock.now += 1
        connection.invalidate(soft=soft)
    wall_clock.now += 1
    with pool.connect() as connection:
        assert (connection.info, connection.record_info) == ({}, {"b": 2})


def test_detached_connection_frees_its_place_and_stays_open(new_pool, server):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    connection.info["a"] = 1
    detached = connection.dbapi_connection
    connection.detach()
    assert connection.is_detached
    assert connection.info == {"a": 1}
    assert pool.checkedout() == 0
    assert use(pool) is not detached
    assert server.open == 2
    connection.close()
    assert detached.closed
    assert server.open == 1


def test_connection_may_be_closed_twice(new_pool):
    pool = new_pool()
    connection = pool.connect()
    connection.close()
    connection.close()
    assert figures(pool) == (1, 0, -1)


# -- disconnects --------------------------------------------------------------


def test_checkout_listener_has_one_connection_replaced(new_pool, wall_clock):
    pool = new_pool()
    connections = [pool.connect(), pool.connect()]
    first, second = (c.dbapi_connection for c in connections)
    for connection in connections:
        connection.close()
    wall_clock.now += 1

    @event.listens_for(pool, "checkout")
    def on_checkout(dbapi_connection, record, proxy):
        if dbapi_connection is first:
            raise exc.DisconnectionError

    third = use(pool)
    assert first.closed
    assert third.number == 3
    assert use(pool) is second


def test_checkout_listener_has_all_connections_replaced(new_pool, wall_clock):
    pool = new_pool()
    connections = [pool.connect(), pool.connect()]
    old = [c.dbapi_connection for c in connections]
    for connection in connections:
        connection.close()
    wall_clock.now += 1

    @event.listens_for(pool, "checkout")
    def on_checkout(dbapi_connection, record, proxy):
        if dbapi_connection is old[0]:
            raise exc.InvalidatePoolError

    new = [use(pool), use(pool)]
    assert all(c.closed for c in old)
    assert [c.number for c in new] == [3, 4]


def test_checkout_gives_up_when_every_connection_is_refused(new_pool, server):
    pool = new_pool(pool_size=1)
    refuse = Mock(side_effect=exc.DisconnectionError)
    event.listen(pool, "checkout", lambda *args: refuse())
    with pytest.raises(exc.InvalidRequestError):
        pool.connect()
    assert server.opened > 1
    assert server.open == 0
    assert pool.checkedout() == 0
    refuse.side_effect = None
    assert use(pool)


def test_statement_that_finds_its_connection_lost_has_all_replaced(
    new_engine, wall_clock
):
    engine = new_engine()
    connections = [engine.connect(), engine.connect()]
    old = [c.connection.dbapi_connection for c in connections]
    for connection in connections:
        connection.close()
    wall_clock.now += 1
    lose(old[0])
    with engine.connect() as connection:
        with pytest.raises(exc.DBAPIError) as caught:
            connection.execute(text("select 1"))
        assert caught.value.connection_invalidated
    wall_clock.now += 1
    new = [use_engine(engine), use_engine(engine)]
    assert not set(old) & set(new)
    assert all(c.closed for c in old)


def test_connection_of_an_engine_reconnects_after_an_invalidation(new_engine, server):
    engine = new_engine(pool_size=1)
    with engine.connect() as connection:
        first = connection.connection.dbapi_connection
        connection.invalidate()
        assert connection.invalidated
        connection.execute(text("select 1"))
        assert connection.connection.dbapi_connection is not first
        assert server.open == 1
    assert engine.pool.checkedout() == 0


# -- dispose and recreate -----------------------------------------------------


def test_dispose_closes_what_is_in_the_pool_and_no_more(new_pool, server):
    pool = new_pool()
    held, other = pool.connect(), pool.connect()
    idle = other.dbapi_connection
    other.close()
    pool.dispose()
    assert idle.closed
    assert not held.dbapi_connection.closed
    assert pool.checkedin() == 0
    held.close()


def test_disposed_pool_can_be_used_again(new_pool):
    pool = new_pool()
    first = use(pool)
    pool.dispose()
    assert use(pool) is not first
    assert figures(pool) == (1, 0, -1)


def test_disposed_engine_opens_new_connections(new_engine, server):
    engine = new_engine()
    first = use_engine(engine)
    engine.dispose()
    assert first.closed
    assert use_engine(engine) is not first
    assert use_engine(engine).number == 2
    assert server.open == 1


def test_connection_held_over_a_dispose_can_be_used_and_closed(new_engine):
    engine = new_engine()
    with engine.connect() as connection:
        held = connection.connection.dbapi_connection
        engine.dispose()
        connection.execute(text("select 1"))
        assert connection.connection.dbapi_connection is held
    assert use_engine(engine) is not held


def test_dispose_without_close_leaves_the_connections_alone(new_engine):
    engine = new_engine()
    first = use_engine(engine)
    former = engine.pool
    engine.dispose(close=False)
    assert use_engine(engine) is not first
    assert not first.closed
    assert former is not engine.pool


def test_successor_opens_its_own_connections_and_tells_its_listeners(new_pool):
    pool, seen = new_pool(), []
    record_events(pool, seen)
    first = use(pool)
    successor = pool.recreate()
    seen.clear()
    assert use(successor) is not first
    assert seen == ["first_connect", "connect", "checkout", "reset", "checkin"]


def test_successor_does_not_get_what_was_returned_before_its_first_use(new_pool):
    former = new_pool()
    successor = former.recreate()
    returned = use(former)
    assert use(successor) is not returned


def test_successor_does_not_get_what_is_returned_to_the_former_pool(new_pool):
    former = new_pool()
    successor = former.recreate()
    late = former.connect()
    returned = late.dbapi_connection
    with successor.connect():
        late.close()
        assert use(successor) is not returned


def test_dispose_leaves_the_connections_of_the_successor(new_pool):
    pool = new_pool()
    successor = pool.recreate()
    connection = use(successor)
    pool.dispose()
    assert use(successor) is connection


def test_recreate_keeps_class_and_options(new_pool, pool_class, logged):
    pool = new_pool(pool_size=3, max_overflow=2, timeout=0.25, logging_name="reports")
    successor = pool.recreate().recreate()
    assert type(successor) is pool_class
    assert successor.size() == 3
    assert successor.timeout() == 0.25
    connections = [successor.connect() for _ in range(5)]
    assert successor.overflow() == 2
    for connection in connections:
        connection.close()
    assert all(r.name.endswith(".reports") for r in logged.records)


def test_recreate_keeps_order_of_reuse_reset_and_listeners(new_pool):
    pool = new_pool(pool_size=3, use_lifo=True, reset_on_return=None)
    listener = Mock()
    event.listen(pool, "checkin", lambda *args: listener())
    successor = pool.recreate()
    connections = [successor.connect() for _ in range(3)]
    last = connections[-1].dbapi_connection
    for connection in connections:
        connection.close()
    assert use(successor) is last
    assert last.rollbacks == 0
    assert listener.call_count == 4


def test_recreate_keeps_recycle(new_pool, wall_clock):
    successor = new_pool(recycle=10).recreate()
    first = use(successor)
    wall_clock.now += 11
    assert use(successor) is not first


def test_disposed_engine_keeps_pre_ping(new_engine):
    engine = new_engine(pool_pre_ping=True)
    engine.dispose()
    first = use_engine(engine)
    lose(first)
    assert use_engine(engine) is not first


# -- figures ------------------------------------------------------------------


def test_figures_follow_the_connections(new_pool):
    pool = new_pool(pool_size=2, max_overflow=1, timeout=0.5)
    assert (pool.size(), pool.timeout()) == (2, 0.5)
    assert figures(pool) == (0, 0, -2)
    connections, seen = [], []
    for _ in range(3):
        connections.append(pool.connect())
        seen.append(figures(pool))
    while connections:
        connections.pop().close()
        seen.append(figures(pool))
    assert seen == [(0, 1, -1), (0, 2, 0), (0, 3, 1), (1, 2, 1), (2, 1, 1), (2, 0, 0)]
    pool.dispose()
    assert figures(pool) == (0, 0, -2)


def test_figures_of_a_failed_checkout_are_those_before_it(new_pool):
    pool = new_pool(pool_size=1)
    with pool.connect():
        with pytest.raises(exc.TimeoutError):
            pool.connect()
        assert figures(pool) == (0, 1, 0)
    assert figures(pool) == (1, 0, 0)


def test_status_says_the_figures(new_pool):
    pool = new_pool(pool_size=1, max_overflow=1)
    connections = [pool.connect(), pool.connect()]
    assert pool.status().startswith(
        "Pool size: 1  Connections in pool: 0 Current Overflow: 1 "
        "Current Checked out connections: 2"
    )
    for connection in connections:
        connection.close()


# -- logging ------------------------------------------------------------------


def test_pool_logs_below_sqlalchemy_pool_under_its_name(new_pool, logged):
    pool = new_pool(logging_name="reports")
    use(pool)
    pool.dispose()
    pool.recreate()
    assert logged.records
    for record in logged.records:
        assert record.name.startswith("sqlalchemy.pool.")
        assert record.name.endswith(".reports")


def test_pool_without_a_name_logs_under_its_class(new_pool, pool_class, logged):
    use(new_pool())
    names = {record.name for record in logged.records}
    assert len(names) == 1
    assert names.pop().rpartition(".")[2] == pool_class.__name__


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
    assert engine.pool.echo is False
    assert engine.pool.logging_name == "reports"
    engine.dispose()
    assert engine.pool.echo is False
    assert engine.pool.logging_name == "reports"


# -- the collector ------------------------------------------------------------


def test_leaked_connection_is_returned_by_the_collector(new_pool):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    first = connection.dbapi_connection
    del connection
    gc.collect()
    assert first.rollbacks == 1
    assert figures(pool) == (1, 0, 0)
    assert use(pool) is first


def test_leaked_invalid_connection_frees_its_place(new_pool):
    pool = new_pool(pool_size=1)
    connection = pool.connect()
    connection.invalidate()
    del connection
    gc.collect()
    assert figures(pool) == (1, 0, 0)
    assert use(pool)
