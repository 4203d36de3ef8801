"""Messages name the line of the user's own code, on each road to the pool."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.util import greenlet_spawn

from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    FairQueuePool,
)
from sqla_fairpool.diagnosis import describe_location

HERE = f"tests/diagnosis/{Path(__file__).name}:"
FULL = {"pool_size": 1, "pool_timeout": 0, "leak_threshold": 60}


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)


def by_connect(engine):
    engine.connect()


def by_begin(engine):
    with engine.begin():
        pass


def by_session(engine):
    with Session(engine) as session:
        session.execute(text("select 1"))


def by_connection_of_session(engine):
    Session(engine).connection()


def by_flush(engine):
    with Session(engine) as session:
        session.begin()
        session.scalar(text("select 1"))


def by_generator(engine):
    def rows():
        with Session(engine) as session:
            yield from session.execute(text("select 1"))

    list(rows())


def by_generated_code(engine):
    """As attrs, dataclasses and decorator libraries make functions."""
    space = {"engine": engine}
    for name in ("<string>", "<attrs generated init pkg.Job>"):
        exec(compile("def made(): engine.connect()", name, "exec"), space)
    space["made"]()


ROADS = [
    by_connect,
    by_begin,
    by_session,
    by_connection_of_session,
    by_flush,
    by_generator,
    by_generated_code,
]


def is_here(location, road):
    return location.startswith(HERE) and location.endswith(f" in {road}")


@pytest.mark.parametrize("road", ROADS)
def test_users_line_is_named(tmp_path, road):
    engine = create_engine(f"sqlite:///{tmp_path}/x", poolclass=FairQueuePool, **FULL)
    with engine.connect(), pytest.raises(CheckoutTimeout) as caught:
        road(engine)
    expected = "rows" if road is by_generator else road.__name__
    assert is_here(caught.value.diagnosis.asked_at, expected)
    # What is noted when a connection is taken, as leak reports have it.
    (held,) = caught.value.diagnosis.holdings
    assert is_here(held.taken_at, test_users_line_is_named.__name__)
    engine.dispose()


async def by_async_session(engine):
    async with AsyncSession(engine) as session:
        await session.execute(text("select 1"))


async def by_async_generator(engine):
    async def rows():
        async with AsyncSession(engine) as session:
            yield await session.scalar(text("select 1"))

    async for _ in rows():
        pass


async def by_greenlet(engine):
    await greenlet_spawn(by_session, engine.sync_engine)


async def by_run_sync(engine):
    async with AsyncSession(engine) as session:
        await session.run_sync(lambda session: session.execute(text("select 1")))


async def facts_of(road, tmp_path):
    url = f"sqlite+aiosqlite:///{tmp_path}/x"
    engine = create_async_engine(url, poolclass=AsyncAdaptedFairQueuePool, **FULL)
    async with engine.connect():
        with pytest.raises(CheckoutTimeout) as caught:
            await road(engine)
    await engine.dispose()
    return caught.value.diagnosis


@pytest.mark.parametrize(
    ("road", "function"),
    [
        (by_async_session, "by_async_session"),
        (by_async_generator, "rows"),
        (by_greenlet, "by_session"),
        (by_run_sync, "<lambda>"),
    ],
)
def test_tasks_line_is_named(tmp_path, road, function):
    facts = asyncio.run(facts_of(road, tmp_path))
    assert is_here(facts.asked_at, function)
    (held,) = facts.holdings
    assert is_here(held.taken_at, "facts_of")


async def by_wait_for(engine):
    # A task of the library's, in each Python: as wait_for() made one before 3.12.
    await asyncio.gather(engine.connect())


async def by_commit_of_a_block(engine):
    async with async_sessionmaker(engine).begin() as session:
        session.add(Page())  # __aexit__() commits in a task of its own


@pytest.mark.parametrize("road", [by_wait_for, by_commit_of_a_block])
def test_a_librarys_task_is_not_taken_for_the_line_that_runs_the_loop(tmp_path, road):
    facts = asyncio.run(facts_of(road, tmp_path))
    assert facts.asked_at is None
    assert f"asked for by {facts.asked_by}" in str(facts)
    assert facts.asked_by.startswith("task 'Task-")


def test_a_thread_that_a_library_runs_is_named(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/x", poolclass=FairQueuePool, **FULL)
    with engine.connect(), ThreadPoolExecutor(1, "fetch") as threads:
        error = threads.submit(engine.connect).exception()
    assert "asked for by thread 'fetch_0'" in str(error)
    engine.dispose()


INSTALLED = "/venv/lib/python3/site-packages/framework/view.py"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Innermost first. A program's own file comes before what is installed.
        ([INSTALLED, "/srv/app/jobs.py"], "srv/app/jobs.py"),
        (["<string>", INSTALLED, "/srv/app/jobs.py"], "srv/app/jobs.py"),
        # A prompt, a notebook, python -c have no file.
        ([INSTALLED, "<stdin>"], "<stdin>"),
        (["<string>", INSTALLED, "<ipython-input-3-a1>"], "<ipython-input-3-a1>"),
        ([INSTALLED, "<string>"], "<string>"),
        # All is installed: the console script is the last to tell anything.
        (
            [INSTALLED, f"{sys.prefix}/bin/serve"],
            "site-packages/framework/view.py",
        ),
        (["<string>"], "<string>"),
    ],
)
def test_own_code_comes_first(files, expected):
    stack = [(compile("pass", name, "exec"), 0) for name in files]
    assert describe_location(stack).startswith(f"{expected}:")
