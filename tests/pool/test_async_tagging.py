"""Every road to a tag in its asyncio form."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from contextlib import asynccontextmanager

import pytest
import sqlalchemy
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from support.state import assert_quiet
from support.tasks import waiting

from sqla_fairpool import AsyncAdaptedFairQueuePool, set_tag, tag


@pytest.fixture
def run(tmp_path):
    """Run a test that takes an engine; its pool must be quiet in the end."""

    def run(test, **options):
        async def main():
            engine = create_async_engine(
                f"sqlite+aiosqlite:///{tmp_path / 'test.db'}",
                poolclass=AsyncAdaptedFairQueuePool,
                **options,
            )
            try:
                return await test(engine)
            finally:
                await engine.dispose()
                assert_quiet(engine.pool)

        return asyncio.run(main())

    return run


def holders(engine):
    """Return who has how many connections."""
    rows = engine.pool.stats().tags
    return {row.name: row.connections for row in rows if row.connections}


def test_engines_option(run):
    async def test(engine):
        async with engine.execution_options(scraper="a").connect():
            return holders(engine)

    assert run(test) == {"a": 1}


def test_option_in_create_async_engine(run):
    async def test(engine):
        async with engine.connect():
            return holders(engine)

    assert run(test, execution_options={"scraper": "a"}) == {"a": 1}


def test_connections_option_wins_over_the_engines(run):
    async def test(engine):
        async with engine.execution_options(scraper="a").connect() as connection:
            await connection.execution_options(scraper="b")
            return holders(engine)

    assert run(test) == {"b": 1}


def test_connection_is_not_retagged_in_a_transaction(run):
    async def test(engine):
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            with pytest.raises(InvalidRequestError, match="scraper may not be altered"):
                await connection.execution_options(scraper="b")

    run(test)


def test_retagged_connection_waits_in_its_new_line_holding_nothing(run):
    async def test(engine):
        async with engine.execution_options(scraper="b").connect():
            async with engine.connect() as connection:
                task = asyncio.create_task(connection.execution_options(scraper="b"))
                await waiting(engine.pool, 1)
                assert holders(engine) == {"b": 1}
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert holders(engine) == {}

    run(test, pool_size=4, soft_limit=1, max_limit=1)


def test_session_on_a_tagged_engine(run):
    async def test(engine):
        async with AsyncSession(engine.execution_options(scraper="a")) as session:
            await session.execute(text("select 1"))
            return holders(engine)

    assert run(test) == {"a": 1}


def test_sessionmaker_on_a_tagged_engine(run):
    async def test(engine):
        make_session = async_sessionmaker(engine.execution_options(scraper="a"))
        async with make_session() as session:
            await session.execute(text("select 1"))
            return holders(engine)

    assert run(test) == {"a": 1}


def test_sessions_connection_with_an_option(run):
    async def test(engine):
        async with AsyncSession(engine) as session:
            await session.connection(execution_options={"scraper": "a"})
            await session.execute(text("select 1"))
            return holders(engine)

    assert run(test) == {"a": 1}


@pytest.mark.skipif(
    sqlalchemy.__version__ < "2.1", reason="a session's own options came with 2.1"
)
def test_sessions_own_option(run):
    async def test(engine):
        async with AsyncSession(engine, execution_options={"scraper": "a"}) as session:
            await session.execute(text("select 1"))
            return holders(engine)

    assert run(test) == {"a": 1}


def test_block_reaches_across_awaits_tasks_and_threads(run):
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
        await visit()
        return seen

    assert run(test) == [{"a": 1}, {"a": 1}, {"a": 1}, {"unknown": 1}]


def test_tasks_do_not_see_each_others_tag(run):
    async def test(engine):
        inside = asyncio.Barrier(3) if hasattr(asyncio, "Barrier") else None
        seen = []

        async def visit(name):
            with tag(name):
                async with engine.connect():
                    if inside is not None:
                        await inside.wait()
                    seen.append(name in holders(engine))

        await asyncio.gather(*(visit(name) for name in "abc"))
        return seen

    assert run(test, pool_size=6) == [True, True, True]


def test_decorated_coroutine_function_is_tagged_while_it_runs(run):
    @tag("a")
    async def visit(engine, *, twice):
        """What it does."""
        await asyncio.sleep(0)
        async with engine.connect():
            return holders(engine), twice

    assert visit.__doc__ == "What it does."
    assert inspect.iscoroutinefunction(visit)

    async def test(engine):
        return await visit(engine, twice=2)

    assert run(test) == ({"a": 1}, 2)


def test_generator_functions_are_refused():
    with pytest.raises(ArgumentError, match=r"write `with tag\('a'\):` inside"):

        @tag("a")
        async def generator():
            yield

    with pytest.raises(ArgumentError, match="a generator function cannot be tagged"):

        @tag("a")
        def other():
            yield


def test_set_tag_lasts_for_the_task(run):
    async def test(engine):
        async def visit():
            set_tag("a")
            async with engine.connect():
                first = holders(engine)
            set_tag(None)
            async with engine.connect():
                return first, holders(engine)

        first, second = await asyncio.create_task(visit())
        async with engine.connect():
            return first, second, holders(engine)

    assert run(test) == ({"a": 1}, {"unknown": 1}, {"unknown": 1})


def test_block_may_be_left_in_another_context_than_it_was_entered_in():
    block = tag("a")
    contextvars.copy_context().run(block.__enter__)
    block.__exit__(None, None, None)  # as some frameworks do; nothing to undo here


# -- what is in force for one checkout is nobody else's ---------------------------


def by_engine(engine):
    return engine.execution_options(scraper="a").connect()


@asynccontextmanager
async def by_block(engine):
    with tag("a"):
        async with engine.connect() as connection:
            yield connection


@pytest.mark.parametrize("road", [by_engine, by_block])
def test_task_that_is_started_while_a_connection_opens_is_untagged(run, road):
    async def test(engine):
        tasks, closed = [], asyncio.Event()

        async def refresh():
            await closed.wait()
            async with engine.connect():
                first = holders(engine)
            with tag("own"):
                async with engine.connect():
                    return first, holders(engine)

        def start(*_):
            if not tasks:
                tasks.append(asyncio.create_task(refresh()))

        event.listen(engine.sync_engine, "do_connect", start)
        async with road(engine):
            assert holders(engine) == {"a": 1}
        closed.set()
        return await tasks[0]

    assert run(test) == ({"unknown": 1}, {"own": 1})


@pytest.mark.postgres
@pytest.mark.parametrize("road", [by_engine, by_block])
def test_task_that_a_notification_starts_is_untagged(postgres_url, road):
    async def main():
        engine = create_async_engine(
            make_url(postgres_url).set(drivername="postgresql+asyncpg"),
            poolclass=AsyncAdaptedFairQueuePool,
        )
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
        assert_quiet(engine.pool)
        await engine.dispose()
        return seen

    assert asyncio.run(main()) == {"a": 1, "unknown": 1}
