"""What a user of ``QueuePool`` expects: both pools are told the same and compared."""

from __future__ import annotations

import gc
import itertools
import logging
import sqlite3
import time
from contextlib import nullcontext
from unittest.mock import Mock, patch

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)
from sqlalchemy import create_engine, engine_from_config, event, exc, text
from sqlalchemy.events import PoolEvents
from sqlalchemy.pool import QueuePool
from support.state import assert_quiet
from support.stub import StubError, StubServer, all_for_one

from sqla_fairpool import FairQueuePool, tag

EVENTS = [name for name in vars(PoolEvents) if name[0] != "_" and name != "dispatch"]


def options_of(pool_class, options):
    """Options that mean the same to both pools: one tag, no ceiling below the rest.

    And no pause after an attempt to connect again has failed, in which ours refuses.
    """
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0, **options}
    if pool_class is FairQueuePool:
        options |= all_for_one(options["pool_size"], options["max_overflow"])
        options["reconnect_backoff"] = 0
    return options


def lose(dbapi_connection):
    """Have the server close a connection; the pool does not know yet."""

    def cursor():  # a new error each time, which keeps no traceback
        raise sqlite3.ProgrammingError("Cannot operate on a closed database.")

    dbapi_connection.cursor = cursor


class Log(logging.Handler):
    """The messages of warnings and errors, without what is filled in."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.msg)


class Side:
    """One of the pools that are compared, and all that can be seen of it."""

    def __init__(self, pool_class, options, tag_name=None):
        self.server, self.made = StubServer(), []
        options = {"poolclass": pool_class, **options_of(pool_class, options)}
        self.engine = create_engine("sqlite://", creator=self.create, **options)
        self.tag = tag(tag_name) if tag_name else nullcontext()
        self.held, self.seen, self.log, self.failing = [], [], Log(), {}
        for name in EVENTS:
            event.listen(self.engine.pool, name, lambda *_, name=name: self.see(name))
        for name in ("connect", "rollback", "close"):
            self.server.before[name] = lambda name=name: self.perhaps_fail(name)

    def create(self):
        connection = self.server.connect()
        connection.commit = Mock()
        self.made.append(connection)
        return connection

    def see(self, name):
        self.seen.append(name)
        self.perhaps_fail(f"{name} listener")

    def perhaps_fail(self, place):
        if self.failing.get(place):
            raise self.failing[place].pop()

    def do(self, action, *args):
        """Do something; return all that can be seen of what came of it."""
        logger = self.engine.pool.logger
        logger.addHandler(self.log)
        logger.propagate = False  # pytest keeps tracebacks, which have connections
        self.seen.clear()
        try:
            with self.tag:
                result = action(self, *args)
        except exc.TimeoutError as error:  # ours is derived from it
            result = exc.TimeoutError, error.__context__
        except BaseException as error:
            result = type(error), type(error.__context__)
        gc.collect()  # a traceback may have a connection
        pool = self.engine.pool
        logger.removeHandler(self.log)
        logger.propagate = True
        made = [(c.closed, c.rollbacks, c.commit.call_count) for c in self.made]
        figures = pool.checkedin(), pool.checkedout(), pool.overflow()
        status = pool.status().partition(" Waiting: ")[0]
        return result, self.seen, made, figures, status, self.log.messages

    # -- what is done --

    def check_out(self):
        connection = self.engine.raw_connection()
        self.held.append(connection)
        number = connection.dbapi_connection.number
        found = dict(connection.info), dict(connection.record_info)
        connection.info["number"] = connection.record_info["last"] = number
        return number, found

    def check_in(self, index):
        connection = self.held.pop(index % len(self.held))
        connection.close()
        connection.close()

    def invalidate(self, index, soft):
        connection = self.held[index % len(self.held)]
        connection.invalidate(soft=soft)
        return connection.is_valid

    def detach(self, index):
        self.held[index % len(self.held)].detach()

    def leak(self, index):
        del self.held[index % len(self.held)]

    def lose(self, index):
        lose(self.made[index % len(self.made)])

    def dispose(self):
        self.engine.pool.dispose()

    def replace(self):
        self.dispose()
        self.engine.pool = self.engine.pool.recreate()

    def fail(self, place, error, times):
        """Have something fail from now on, so many times."""
        self.failing[place] = [error() for _ in range(times)]


ERRORS = [
    StubError,
    KeyboardInterrupt,
    SystemExit,
    exc.DisconnectionError,
    exc.InvalidatePoolError,
]
PLACES = ["connect", "rollback", "close", "connect listener", "checkout listener"]
INDEX = st.integers(0, 5)

some_are_out = precondition(lambda self: self.sides[0].held)
none_is_out = precondition(lambda self: not self.sides[0].held)


class Comparison(RuleBasedStateMachine):
    """Whatever is done, the same is to be seen of both."""

    def __init__(self):
        super().__init__()
        self.clock = Mock(now=1_000_000.0)
        self.patch = patch("time.time", lambda: self.clock.now)
        self.patch.start()
        gc.disable()  # both are to collect at the same moment
        gc.freeze()

    def teardown(self):
        for side in self.sides:
            side.failing.clear()
            side.held.clear()
        gc.collect()
        gc.unfreeze()
        gc.enable()
        self.patch.stop()
        assert_quiet(self.sides[1].engine.pool)

    @initialize(
        tag_name=st.sampled_from([None, "reports"]),
        options=st.fixed_dictionaries(
            {
                "pool_size": st.integers(1, 3),
                "max_overflow": st.integers(0, 1),
                "pool_use_lifo": st.booleans(),
                "pool_pre_ping": st.booleans(),
                "pool_recycle": st.sampled_from([-1, 10]),
                "pool_reset_on_return": st.sampled_from(
                    [True, "rollback", "commit", None, False]
                ),
            }
        ),
    )
    def begin(self, tag_name, options):
        self.sides = Side(QueuePool, options), Side(FairQueuePool, options, tag_name)

    def both(self, *action):
        one, other = (side.do(*action) for side in self.sides)
        assert one == other

    @rule()
    def check_out(self):
        self.both(Side.check_out)

    @some_are_out
    @rule(index=INDEX)
    def check_in(self, index):
        self.both(Side.check_in, index)

    @some_are_out
    @rule(index=INDEX, soft=st.booleans())
    def invalidate(self, index, soft):
        self.both(Side.invalidate, index, soft)

    @some_are_out
    @rule(action=st.sampled_from([Side.detach, Side.leak]), index=INDEX)
    def lose_sight(self, action, index):
        for side in self.sides:
            side.failing.clear()  # it would be raised in a finaliser
        self.both(action, index)

    @some_are_out
    @rule(index=INDEX)
    def lose(self, index):
        self.both(Side.lose, index)

    @none_is_out
    @rule(action=st.sampled_from([Side.dispose, Side.replace]))
    def dispose(self, action):
        self.both(action)

    @rule(place=st.sampled_from(PLACES), error=st.sampled_from(ERRORS), times=INDEX)
    def fail(self, place, error, times):
        if place == "close" and not issubclass(error, Exception):
            error = StubError  # QueuePool loses a slot when its dispose is interrupted
        self.both(Side.fail, place, error, times)

    @rule(seconds=st.sampled_from([1, 5, 11]))
    def pass_time(self, seconds):
        self.clock.now += seconds


TestComparison = Comparison.TestCase
TestComparison.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    phases=set(Phase) - {Phase.explain},  # which takes minutes
)


# -- what is not done at random --------------------------------------------------------

pools = pytest.mark.parametrize("pool_class", [QueuePool, FairQueuePool])


@pytest.fixture
def new_engine(pool_class, server):
    return lambda **options: server.engine(
        poolclass=pool_class, **options_of(pool_class, options)
    )


@pytest.fixture
def logged(caplog):
    """What the pools log, the names of their loggers too."""
    caplog.set_level(logging.DEBUG, "sqlalchemy.pool")
    return caplog


def use(pool):
    """Check a connection out and in; return the DBAPI connection."""
    with pool.connect() as connection:
        return connection.dbapi_connection


@pools
def test_ways_to_make_a_pool(pool_class, server):
    def creator(record):
        record.record_info["creator"] = "called"
        return server.connect()

    pool = pool_class(creator, 3, 2, 0.5)
    assert (pool.size(), pool.overflow(), pool.timeout()) == (3, -3, 0.5)
    with pool.connect() as connection:
        assert connection.record_info == {"creator": "called"}
    pool = pool_class(server.connect, pre_ping=True)
    engine = create_engine("sqlite://", pool=pool)
    assert engine.pool is pool
    with engine.connect() as connection:
        lose(first := connection.connection.dbapi_connection)
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection is not first
    options = options_of(pool_class, {"pool_size": 3, "max_overflow": 1})
    configuration = {name: str(value) for name, value in options.items()}
    configuration |= {"url": "sqlite:///file.db", "pool_recycle": "60"}
    engine = engine_from_config(configuration, prefix="", poolclass=pool_class)
    assert (engine.pool.size(), engine.pool.timeout()) == (3, 0)


@pools
def test_listeners_of_class_constructor_and_engine_are_heard(new_engine, pool_class):
    seen = []

    def heard_by(name):
        def listener(dbapi_connection, record, proxy):
            seen.append(name)
            if dbapi_connection.number == 1 and name == "engine":  # may use the pool
                seen.append(use(engine.pool).number)

        return listener

    of_class = heard_by("class")
    engine = new_engine(pool_events=[(heard_by("constructor"), "checkout")])
    event.listen(engine, "checkout", heard_by("engine"))
    event.listen(pool_class, "checkout", of_class)
    try:
        assert use(engine.pool).number == 1
    finally:
        event.remove(pool_class, "checkout", of_class)
    assert seen.pop(seen.index(2)) == 2
    assert sorted(seen) == sorted(["class", "constructor", "engine"] * 2)
    seen.clear()
    assert use(engine.pool).number == 2
    assert sorted(seen) == ["constructor", "engine"]


@pools
def test_statement_that_finds_its_connection_lost_has_all_replaced(new_engine):
    engine = new_engine()
    old = [engine.connect(), engine.connect()]
    for connection in old:
        lose(connection.connection.dbapi_connection)
    with patch("time.time", lambda: time.monotonic() + 1e12):
        with pytest.raises(exc.DBAPIError) as caught:
            old[0].execute(text("select 1"))
    assert caught.value.connection_invalidated
    for connection in old:
        connection.close()
    with patch("time.time", lambda: time.monotonic() + 2e12):
        assert [use(engine.pool).number for _ in range(2)] == [3, 4]


@pools
@pytest.mark.parametrize("fails", [False, True])
def test_dispose_closes_what_is_in_the_pool_and_no_more(new_engine, logged, fails):
    engine = new_engine()
    with engine.connect() as held:
        idle, dbapi_connection = use(engine.pool), held.connection.dbapi_connection
        if fails:
            idle.close = Mock(side_effect=StubError)
        former = engine.pool
        engine.dispose()
        assert engine.pool is not former
        assert idle.closed != fails
        assert ("Exception closing connection" in logged.text) == fails
        held.execute(text("select 1"))
        assert held.connection.dbapi_connection is dbapi_connection
        assert former.checkedin() == 0
    assert [use(engine.pool).number for _ in range(2)] == [3, 3]
    engine.dispose(close=False)
    assert use(engine.pool).number == 4


@pools
def test_former_pool_and_successor_have_each_their_own(new_engine):
    seen, former = [], new_engine().pool
    for name in EVENTS:
        event.listen(former, name, lambda *_, name=name: seen.append(name))
    successor = former.recreate()
    returned = use(former)
    seen.clear()
    assert use(successor) is not returned
    if returned.closed:  # ours: both have one accounting, so it makes room
        seen.remove("close")
    assert seen == ["first_connect", "connect", "checkout", "reset", "checkin"]
    late = former.connect()
    returned = late.dbapi_connection
    with successor.connect():
        late.close()
        assert use(successor) is not returned


@pools
def test_dispose_leaves_the_connections_of_the_successor(new_engine):
    former = new_engine().pool
    successor = former.recreate()
    first, second = use(former), use(successor)
    former.dispose()
    assert (first.closed, second.closed) == (True, False)
    successor.dispose()
    assert second.closed


@pools
def test_recreate_keeps_class_and_options(new_engine, pool_class):
    options = {"pool_timeout": 0.25, "pool_use_lifo": True, "pool_recycle": 10}
    options |= {"max_overflow": 1, "pool_reset_on_return": None}
    pool, listener = new_engine(**options).pool, Mock()
    event.listen(pool, "checkin", lambda *args: listener())
    successor = pool.recreate().recreate()
    assert type(successor) is pool_class
    assert (successor.size(), successor.timeout()) == (2, 0.25)
    with successor.connect(), successor.connect() as connection:
        last = connection.dbapi_connection
        with successor.connect():
            assert successor.overflow() == 1
    assert listener.call_count == 3
    assert use(successor).rollbacks == 0
    with patch("time.time", lambda: time.monotonic() + 1e12):
        assert use(successor) is not last


@pools
@pytest.mark.parametrize("name", ["reports", None])
def test_pool_logs_below_sqlalchemy_pool_under_its_name_or_its_class(
    new_engine, pool_class, logged, name
):
    engine = new_engine(echo_pool=False, pool_logging_name=name)
    for _ in range(2):
        assert (engine.pool.echo, engine.pool.logging_name) == (False, name)
        use(engine.pool)
        engine.dispose()
    (logger,) = {r.name for r in logged.records if r.name.startswith("sqlalchemy.pool")}
    assert logger.rpartition(".")[2] == (name or pool_class.__name__)


_numbers = itertools.count()


@pools
@pytest.mark.parametrize(("echo", "debug"), [(True, False), ("debug", True)])
def test_echo_has_the_pool_log(pool_class, server, caplog, echo, debug):
    # A logger that has a handler is not given another, on standard output.
    name = f"echo_{next(_numbers)}"
    silent = pool_class(server.connect, logging_name=name)
    silent.logger.addHandler(logging.NullHandler())
    pool = pool_class(server.connect, logging_name=name, echo=echo)
    use(silent)
    assert not caplog.records
    use(pool)
    pool.dispose()
    levels = {record.levelno for record in caplog.records}
    assert logging.INFO in levels
    assert (logging.DEBUG in levels) == debug
