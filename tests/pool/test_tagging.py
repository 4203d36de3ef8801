"""Every road by which a tag reaches the pool, and what wins over what."""

from __future__ import annotations

import asyncio
import inspect
import threading
from contextlib import asynccontextmanager

import pytest
import sqlalchemy
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import QueuePool
from support import state
from support.state import assert_quiet
from support.threads import Caller, ensure_waiting
from support.worlds import holders, world_of

from sqla_fairpool import AsyncAdaptedFairQueuePool, CheckoutTimeout, set_tag, tag
from sqla_fairpool.pool.waiters import ThreadWaiter
from sqla_fairpool.tagging import context_tag

SQLALCHEMY_21 = tuple(map(int, sqlalchemy.__version__.split(".")[:2])) >= (2, 1)


@pytest.fixture(params=["sqlite", "sqlite+aiosqlite"])
def world(request, tmp_path):
    """Threads, and tasks."""
    return world_of(f"sqlite:///{tmp_path / 'test.db'}", request.param)


def tagged(engine, name="a", **options):
    return engine.execution_options(scraper=name, **options)


# -- roads -----------------------------------------------------------------------------


def in_use(session, **options):
    session.connection(**options)
    return session


def by_engine(engine):
    return tagged(engine).connect()


def by_connection(engine):
    return tagged(engine.connect())


def by_raw_connection(engine):
    return tagged(engine).raw_connection()


def by_block(engine):
    with tag("a"):
        return engine.connect()


TAGGED = {"execution_options": {"scraper": "a"}}
ROADS = {
    "connection": by_connection,
    "engine": by_engine,
    "engine of an engine": lambda e: tagged(e).execution_options(other=1).connect(),
    "engine's update": lambda e: e.update_execution_options(scraper="a") or e.connect(),
    "raw connection": by_raw_connection,
    "block": by_block,
    "session of an engine": lambda e: in_use(Session(tagged(e))),
    "sessionmaker": lambda e: in_use(sessionmaker(tagged(e))()),
    "session's connection": lambda e: in_use(Session(e), **TAGGED),
}
if SQLALCHEMY_21:  # Session has no such parameter in 2.0
    ROADS["session"] = lambda e: in_use(Session(e, **TAGGED))


@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
def test_tag_arrives_by(world, road):
    engine = world.engine()
    connection = road(engine)
    assert holders(engine) == {"a": 1}
    connection.close()
    assert holders(engine) == {}
    assert engine.pool.stats().tag("a").checkouts == 1


def test_tag_arrives_through_a_pool_made_beforehand(server):
    engine = create_engine("sqlite://", pool=server.pool(), **TAGGED)
    with engine.connect():
        assert holders(engine) == {"a": 1}
    with tagged(engine.connect(), "b"):
        assert holders(engine) == {"b": 1}


def run_async(url, test, **options):
    """Run a test that takes an asyncio engine; its pool must be quiet in the end."""

    async def main():
        pool = AsyncAdaptedFairQueuePool
        engine = create_async_engine(url, poolclass=pool, **options)
        try:
            return await test(engine)
        finally:
            await engine.dispose()
            assert_quiet(engine.pool)

    return asyncio.run(main())


@pytest.fixture
def in_asyncio(tmp_path):
    """Run a test as a user of SQLAlchemy's asyncio classes would write it."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    return lambda test, **options: run_async(url, test, **options)


@asynccontextmanager
async def async_by_connection(engine):
    async with engine.execution_options(scraper="before").connect() as connection:
        yield await connection.execution_options(scraper="a")


@asynccontextmanager
async def async_by_session_connection(engine):
    async with AsyncSession(engine) as session:
        await session.connection(**TAGGED)
        yield session


ASYNC_ROADS = {
    "connection": async_by_connection,
    "engine": by_engine,
    "session of an engine": lambda e: AsyncSession(tagged(e)),
    "sessionmaker": lambda e: async_sessionmaker(tagged(e))(),
    "session's connection": async_by_session_connection,
}
if SQLALCHEMY_21:
    ASYNC_ROADS["session"] = lambda e: AsyncSession(e, **TAGGED)


@pytest.mark.parametrize("road", ASYNC_ROADS.values(), ids=ASYNC_ROADS)
def test_tag_arrives_in_asyncio_by(in_asyncio, road):
    async def test(engine):
        async with road(engine) as connection:
            await connection.execute(text("select 1"))
            return holders(engine)

    assert in_asyncio(test) == {"a": 1}


# -- what wins -------------------------------------------------------------------------


def test_connection_wins_over_engine_over_inner_block_over_outer(world):
    plain = world.engine()
    engine = tagged(plain, "engine")
    with tag("outer"):
        with tag("inner"):
            with tagged(engine.connect(), "connection"):
                assert holders(plain) == {"connection": 1}
            # An engine's tag is that of its own checkouts alone.
            with engine.connect(), plain.connect():
                assert holders(plain) == {"engine": 1, "inner": 1}
        with pytest.raises(ZeroDivisionError), tag("inner"):
            raise ZeroDivisionError
        with plain.connect():
            assert holders(plain) == {"outer": 1}
    plain.dispose()
    with plain.connect(), engine.connect():
        assert holders(plain) == {"unknown": 1, "engine": 1}


def test_option_and_default_tag_may_have_other_names(world):
    engine = world.engine(tag_option="tenant", default_tag="nobody")
    with tagged(engine, tenant="a", name="b").connect():
        assert holders(engine) == {"a": 1}
    with engine.connect() as connection:
        assert holders(engine) == {"nobody": 1}
        connection.execution_options(tenant="c")
        assert holders(engine) == {"c": 1}


# -- blocks over threads and tasks -----------------------------------------------------


def test_block_reaches_across_awaits_tasks_and_threads(in_asyncio):
    async def test(engine):
        seen = []

        async def visit():
            async with engine.connect():
                seen.append(holders(engine))

        with tag("a"):
            await asyncio.sleep(0)
            await visit()
            await asyncio.create_task(visit())
            # A thread with a loop of its own, as libraries make them.
            await asyncio.to_thread(asyncio.run, visit())
            # Not one that is started in it.
            Caller(asyncio.run, visit()).result()
        await visit()
        return seen

    assert in_asyncio(test) == [{"a": 1}] * 3 + [{"unknown": 1}] * 2


def test_tasks_do_not_see_each_others_tag(in_asyncio):
    async def test(engine):
        inside, all_in, seen = [], asyncio.Event(), []

        async def visit(name):
            with tag(name):
                async with engine.connect():
                    inside.append(name)
                    if len(inside) == 3:
                        all_in.set()
                    await all_in.wait()
                    seen.append(holders(engine))

        await asyncio.gather(*(visit(name) for name in "abc"))
        return seen

    seen = in_asyncio(test, pool_size=6)
    assert seen[0] == {"a": 1, "b": 1, "c": 1}
    assert len(seen) == 3


def test_decorated_function_is_tagged_while_it_runs():
    @tag("job")
    def job(number):
        """What it does."""
        return context_tag(), number

    @tag("job")
    async def later(number, *, twice):
        await asyncio.sleep(0)
        return context_tag(), number, twice

    async def one():
        yield

    def two():
        yield

    assert job(3) == ("job", 3)
    assert asyncio.run(later(3, twice=6)) == ("job", 3, 6)
    assert inspect.iscoroutinefunction(later)
    assert (job.__name__, job.__doc__) == ("job", "What it does.")
    assert context_tag() is None
    for function in (one, two):
        with pytest.raises(ArgumentError, match=r"write `with tag\('a'\):` inside"):
            tag("a")(function)


def test_set_tag_lasts_for_the_task(in_asyncio):
    async def test(engine):
        seen = []

        async def look(*names):
            for name in names:
                set_tag(name)
                async with engine.connect():
                    seen.append(holders(engine))
            set_tag("a")

        await asyncio.create_task(look("a", None))
        async with engine.connect():
            return [*seen, holders(engine)]

    assert in_asyncio(test) == [{"a": 1}, {"unknown": 1}, {"unknown": 1}]


# -- how long one checkout may wait ----------------------------------------------------


def test_engine_wins_over_block_in_how_long_to_wait(threads, clock):
    class PassTime(ThreadWaiter):
        def wait(self, seconds):
            clock.advance(seconds)

    def waited(engine):
        state.wait_with(engine, PassTime)
        with pytest.raises(CheckoutTimeout) as caught:
            engine.connect()
        return caught.value.waited

    engine = threads.engine(pool_size=1, deadlock_timeout=None)  # it says 30 seconds
    own = tagged(engine, fairpool_timeout=3)
    with engine.connect():
        assert waited(engine) == 30
        assert tag("a", timeout=4)(waited)(engine) == 4
        with tag("a", timeout=7):
            assert waited(engine) == 7
            with tag("b"):  # inherits it
                assert waited(engine) == 7
            with tag("b", timeout=0):
                assert waited(engine) == 0
            assert waited(own) == waited(own.execution_options(other=1)) == 3


def test_time_out_of_a_checkout_is_no_other_callers(world):
    engine = world.engine(pool_size=1, deadlock_timeout=None)
    world.connect(engine)
    world.wait_in_line(engine)
    with tag("a", timeout=0.01), pytest.raises(CheckoutTimeout):
        engine.connect()
    with pytest.raises(CheckoutTimeout):
        engine.execution_options(fairpool_timeout=0.01).connect()
    assert state.waiting(engine) == 1
    # A tag that is set on a connection waits in its own line, for its own time.
    engine = world.engine(**ONE_EACH, deadlock_timeout=None)
    world.connect(engine)
    with engine.connect() as connection, pytest.raises(CheckoutTimeout):
        tagged(connection, fairpool_timeout=0)


# -- bad tags and time-outs ------------------------------------------------------------

BAD_TAGS = ["", 3, "a\nb", "x" * 129]
BAD_TIMEOUTS = [-1, "soon", float("nan"), True, 1.1e9, 10**400]


def test_bad_block_is_refused():
    bad = [(tag, one) for one in (None, *BAD_TAGS)] + [
        (set_tag, one) for one in BAD_TAGS
    ]
    for function, one in bad:
        with pytest.raises(ArgumentError, match="tag="):
            function(one)
    for one in BAD_TIMEOUTS:
        with pytest.raises(ArgumentError, match="timeout="):
            tag("a", timeout=one)
    assert context_tag() is None


@pytest.mark.parametrize("options", [{}, {"scraper": "a", "mine": 1}])
@pytest.mark.parametrize(
    ("name", "bad"),
    [("scraper", bad) for bad in BAD_TAGS]
    + [("fairpool_timeout", bad) for bad in BAD_TIMEOUTS],
)
def test_refused_option_is_not_among_the_options(threads, options, name, bad):
    engine = threads.engine(execution_options=options)
    for each in (engine, engine.execution_options(mine=2)):
        before = each.get_execution_options()
        with each.connect() as connection:
            refusals = [each.execution_options, each.update_execution_options]
            for refuse in [*refusals, connection.execution_options]:
                with pytest.raises(ArgumentError, match=f"{name}="):
                    refuse(mine=3, **{name: bad})
            for one in each, connection:
                assert one.get_execution_options() == before
            connection.execution_options(fairpool_timeout=1.0)
            assert holders(engine) == {options.get("scraper", "unknown"): 1}


def test_no_tag_is_none_for_an_engine_and_refused_by_a_connection(threads):
    """None is SQLAlchemy's way of saying "no option"."""
    engine = threads.engine()
    with tagged(engine, None).connect() as connection:
        with pytest.raises(ArgumentError, match="scraper="):
            tagged(connection, None)
        assert holders(engine) == {"unknown": 1}


# -- setting the tag on a connection ---------------------------------------------------

#: For a tag that has one connection no second one is granted.
ONE_EACH = {"pool_size": 2, "soft_limit": 1, "max_limit": 1}


def test_connection_that_has_room_keeps_its_dbapi_connection(world):
    engine = world.engine()
    with engine.connect() as connection:
        before = connection.connection.dbapi_connection
        tagged(connection)
        assert connection.connection.dbapi_connection is before
        stats = engine.pool.stats()
        assert [row.name for row in stats.tags] == ["a"]  # no trace of the time before
        assert stats.strategy == "1 active: at most 15"
        tagged(connection)
    assert engine.pool.stats().tag("a").checkouts == 1


def test_connection_without_room_waits_holding_nothing(world):
    """And gets another DBAPI connection, to which the options before are applied."""
    engine = world.engine(**ONE_EACH)
    applied = []
    engine.dialect.set_isolation_level = lambda *which: applied.append(which)
    engine.dialect.reset_isolation_level = lambda connection: None
    holder = by_engine(engine)
    level = {"isolation_level": "AUTOCOMMIT"}
    caller = world.start(lambda: tagged(engine.connect().execution_options(**level)))
    world.ensure_waiting(engine, 1)
    assert holders(engine) == {"a": 1}
    assert engine.pool.stats().tag("a").waiting == 1
    holder.close()
    with caller.result() as connection:
        assert holders(engine) == {"a": 1}
        connection.execute(text("select 1"))
        dbapi_connection = connection.connection.dbapi_connection
        assert applied[1:] == [(dbapi_connection, "AUTOCOMMIT")]


def test_retagging_in_a_transaction_is_refused_as_isolation_level_is(world):
    engine = world.engine()
    with by_connection(engine) as connection:
        connection.execute(text("select 1"))
        with pytest.raises(InvalidRequestError, match="scraper may not be altered"):
            tagged(connection, "b")
        assert holders(engine) == {"a": 1}
        assert connection.get_execution_options()["scraper"] == "a"
        connection.rollback()
        connection.invalidate()
        connection.execute(text("select 1"))
        assert holders(engine) == {"a": 1}  # the refused tag is not remembered
        connection.rollback()
        tagged(connection, "b")
        assert holders(engine) == {"b": 1}


def test_connection_asks_as_itself_after_an_invalidation(world):
    engine = tagged(world.engine(), "engine")
    with by_connection(engine) as connection:
        for name in ("a", "set while it was invalidated"):
            connection.invalidate()
            assert holders(engine) == {}
            tagged(connection, name)
            connection.execute(text("select 1"))
            assert holders(engine) == {name: 1}
            connection.rollback()


def test_tagged_connection_that_is_closed_or_dropped_holds_nothing(threads):
    engine = threads.engine()
    connection = engine.connect()
    connection.close()
    tagged(connection)
    assert holders(engine) == {}
    connection = by_connection(engine)
    del connection
    assert holders(engine) == {}, "a leaked connection waits for the collector"


# -- what is in force for one checkout is no other's -----------------------------------


def looks_at(other, seen):
    """Return a listener that checks out of another pool."""

    def look(*_):
        with other.connect():
            seen.append(holders(other))
        with tag("own"), other.connect():
            seen.append(holders(other))

    return look


#: What such a listener sees, if nothing of the checkout around it is in force.
NOTHING = [{"unknown": 1}, {"own": 1}]


@pytest.mark.parametrize("moment", ["connect", "first_connect", "do_connect"])
@pytest.mark.parametrize("road", [by_engine, by_connection, by_raw_connection])
def test_listener_that_runs_while_a_connection_opens_is_untagged(world, moment, road):
    engine, other, seen = world.engine(), world.engine(), []
    target = engine if moment == "do_connect" else engine.pool
    event.listen(target, moment, looks_at(other, seen))
    connection = road(engine)
    assert seen == NOTHING
    if road is by_connection:  # which opens again
        connection.invalidate()
        connection.execute(text("select 1"))
        assert holders(engine) == {"a": 1}
        assert seen == NOTHING * (1 if moment == "first_connect" else 2)
    connection.close()


def test_checkout_listener_does_not_see_what_the_checkout_asked_for(world):
    engine, other, seen = world.engine(**ONE_EACH), world.engine(), []
    event.listen(engine, "checkout", looks_at(other, seen))
    holder = by_engine(engine)
    caller = world.start(by_connection, engine)
    world.ensure_waiting(engine, 1)
    holder.close()
    caller.result().close()
    assert seen == NOTHING * 3


def test_engines_time_out_is_not_that_of_its_listeners(threads):
    engine = tagged(threads.engine(), fairpool_timeout=0.0)
    other = threads.engine(pool_size=1)
    holder = other.connect()

    def listener(dbapi_connection, record):
        caller = Caller(lambda: ensure_waiting(other.pool, 1) or holder.close())
        other.connect().close()  # waits until then, at most 30 seconds
        caller.result()

    event.listen(engine, "connect", listener)
    engine.connect().close()


def test_engine_with_another_kind_of_pool_leaves_no_tag_behind(server, make_engine):
    other, seen = make_engine(), []
    engine = server.engine(execution_options={"scraper": "a"})
    engine.pool = QueuePool(server.connect, dialect=engine.dialect)
    look = looks_at(other, seen)
    event.listen(engine.pool, "connect", look)
    with engine.connect():
        look()
    assert seen == NOTHING * 2


def test_checkout_in_the_middle_of_another_gives_the_request_back(make_engine):
    """As that of a signal handler, between the engine and the pool."""
    engine, seen = make_engine(), []
    connect = engine.pool.connect

    def interrupted():
        engine.pool.connect = connect
        with tagged(engine, "b").connect():
            seen.append(holders(engine))
        return connect()

    engine.pool.connect = interrupted
    with by_engine(engine):
        assert holders(engine) == {"a": 1}
    assert seen == [{"b": 1}]


@asynccontextmanager
async def async_by_block(engine):
    with tag("a"):
        async with engine.connect() as connection:
            yield connection


@pytest.mark.parametrize("road", [by_engine, async_by_block])
def test_task_that_is_started_while_a_connection_opens_is_untagged(in_asyncio, road):
    async def test(engine):
        tasks, closed = [], asyncio.Event()

        async def refresh():
            await closed.wait()
            async with engine.connect():
                first = holders(engine)
            with tag("own"):
                async with engine.connect():
                    return [first, holders(engine)]

        def start(*_):
            if not tasks:
                tasks.append(asyncio.create_task(refresh()))

        event.listen(engine.sync_engine, "do_connect", start)
        async with road(engine):
            assert holders(engine) == {"a": 1}
        closed.set()
        return await tasks[0]

    assert in_asyncio(test) == NOTHING


@pytest.mark.postgres
@pytest.mark.parametrize("road", [by_engine, async_by_block])
def test_task_that_a_notification_starts_is_untagged(postgres_url, road):
    async def test(engine):
        tasks = asyncio.Queue()

        async def visit():
            async with engine.connect():
                return holders(engine)

        def notified(*_):
            tasks.put_nowait(asyncio.create_task(visit()))

        async with road(engine) as connection:
            raw = await connection.get_raw_connection()
            await raw.driver_connection.add_listener("news", notified)
            await connection.execute(text("notify news"))
            await connection.commit()
            seen = await (await tasks.get())
            await raw.driver_connection.remove_listener("news", notified)
        return seen

    url = make_url(postgres_url).set(drivername="postgresql+asyncpg")
    assert run_async(url, test) == {"a": 1, "unknown": 1}


# -- activity --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        lambda c: c.execute(text("select 1")),
        lambda c: c.exec_driver_sql("select 1"),
        lambda c: c.execute(text("insert into t values (:x)"), [{"x": 1}, {"x": 2}]),
        lambda c: c.execution_options(no_parameters=True).exec_driver_sql("select 1"),
        lambda c: c.close(),
    ],
)
def test_every_statement_and_the_checkin_is_activity(make_engine, clock, act):
    engine = make_engine()
    with by_engine(engine) as connection:
        clock.advance(50.0)
        assert engine.pool.stats().tag("a").idle_for == 50.0
        clock.advance(50.0)
        tagged(engine, "b").connect().close()
        assert engine.pool.stats().tag("a").active is False
        act(connection)
        row = engine.pool.stats().tag("a")
        assert (row.active, row.idle_for) == (True, 0.0)
        assert engine.pool.stats().tag("b").limit == 10


def test_untagged_checkout_is_active_from_its_first_statement(make_engine):
    engine = make_engine()
    with engine.connect() as connection:
        assert engine.pool.stats().tag("unknown").active is False
        connection.execute(text("select 1"))
        assert engine.pool.stats().tag("unknown").active is True
        # The hooks take what the dialect's methods take.
        proxied = connection.connection
        cursor = proxied.cursor()
        engine.dialect.do_execute(cursor, "select 1", (), context=None)
        engine.dialect.do_executemany(cursor, "select 1", [()])
        engine.dialect.do_execute_no_params(cursor, "select 1", context=None)
        assert proxied.dbapi_connection.statements[-3:] == ["select 1"] * 3


# -- other engines pay nothing ---------------------------------------------------------


def test_other_engines_are_not_listened_to_and_a_dialect_once(server, make_engine):
    engine = make_engine()
    dialect = engine.dialect
    hooks = dialect.set_connection_execution_options, dialect.do_execute
    for _ in range(5):
        by_engine(engine).close()
        engine.dispose()
    assert hooks == (dialect.set_connection_execution_options, dialect.do_execute)
    other = server.engine(poolclass=QueuePool)
    assert "raw_connection" not in vars(other)
    assert "set_connection_execution_options" not in vars(other.dialect)
    assert "do_execute" not in vars(other.dialect)
    assert not other.dialect._has_events
    assert not other._has_events
    # Not every release gives the class the attribute before it is listened to.
    assert not getattr(Connection, "_has_events", False)
    assert not Engine._has_events
    assert "raw_connection" not in vars(tagged(other))
    with tagged(tagged(other).connect(), "b") as connection:
        connection.execute(text("select 1"))


def test_many_threads_with_tags_of_their_own_do_not_mix(make_engine):
    engine, barrier = make_engine(), threading.Barrier(8)

    def work(name):
        barrier.wait()
        for _ in range(200):
            with tagged(engine, name).connect() as connection:
                assert state.tag_of(connection) == name

    for caller in [Caller(work, f"tag{n}") for n in range(8)]:
        caller.result()
    assert all(row.checkouts == 200 for row in engine.pool.stats().tags)
