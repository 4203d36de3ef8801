"""The surface for scripts: sessions, start-up and shut-down, figures."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, String, make_url, select, text
from sqlalchemy.exc import ArgumentError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session, declarative_base
from support import state
from support.threads import eventually

import sqla_fairpool
from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool, manager
from sqla_fairpool.launch.environment import RUN, VARIABLES, Run
from sqla_fairpool.launch.started import TASKS, THREADS
from sqla_fairpool.ledger import host_file
from sqla_fairpool.ledger.addresses import default_path
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.manager import DynamicConnectionManager

Base = declarative_base()


class Page(Base):
    __tablename__ = "page"
    id = Column(Integer, primary_key=True)
    url = Column(String, unique=True)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'app.db'}"


@pytest.fixture(autouse=True)
def environment(monkeypatch, url):
    """A database of the test's is named, which has a ledger of its own; no more."""
    for name in (*VARIABLES, RUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", url)


def keeper_of(pool):
    return state.keeper(pool)


def end(one):
    """End its pools, and their part in the ledger."""
    pools = [started.pool for started in one._running.values()]
    one.shutdown()
    asyncio.run(one.shutdown_async())
    for pool in pools:
        if keeper_of(pool) is not None:
            keeper_of(pool).close()


@pytest.fixture
def one(url):
    """A manager with a table."""
    one = DynamicConnectionManager()
    with one.get_session("setup") as session:
        Base.metadata.create_all(session.connection())
    yield one
    end(one)


def options_of(one):
    return one._running[THREADS].pool.options


# -- sessions -------------------------------------------------------------------------


def test_session_commits_on_success(one):
    with one.get_session("a") as session:
        assert isinstance(session, Session)
        session.add(Page(url="x"))
    with one.get_session("b") as session:
        assert session.scalars(select(Page.url)).all() == ["x"]
    assert one._running[THREADS].pool.checkedout() == 0


def test_session_rolls_back_on_error_and_returns_the_connection(one):
    def fail(error):
        with one.get_session("a") as session:
            session.add(Page(url="x"))
            session.flush()
            raise error

    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert one._running[THREADS].pool.checkedout() == 0
    with one.get_session("a") as session:
        assert session.scalars(select(Page)).all() == []


def test_commit_that_fails_returns_the_connection(one):
    with pytest.raises(IntegrityError):
        with one.get_session("a") as session:
            session.add_all([Page(url="x"), Page(url="x")])
    assert one._running[THREADS].pool.checkedout() == 0


def test_script_may_commit_and_go_on(one):
    with one.get_session("a", expire_on_commit=False) as session:
        page = Page(url="x")
        session.add(page)
        session.commit()
        session.add(Page(url="y"))
    assert page.url == "x"
    with one.get_session("a") as session:
        assert len(session.scalars(select(Page)).all()) == 2


def test_session_checks_out_under_its_scrapers_name(one):
    with one.get_session("a") as session:
        session.execute(text("select 1"))
        stats = one._running[THREADS].pool.stats()
        assert stats.tag("a").connections == 1
        assert stats.tag("a").active
    with one.get_session("not registered") as session:
        session.execute(text("select 1"))
    assert one._running[THREADS].pool.stats().tag("not registered").checkouts == 1


def test_tag_option_may_be_another(url):
    one = DynamicConnectionManager(tag_option="tenant", ledger=None)
    with one.get_session("a") as session:
        session.execute(text("select 1"))
        assert one._running[THREADS].pool.stats().tag("a").connections == 1
    end(one)


def test_tagged_engines_are_made_once_and_are_bounded(one):
    started = one._running[THREADS]
    assert started.tagged("a") is started.tagged("a")
    for n in range(1000):
        with one.get_session(f"t{n}"):
            pass
    assert started.tagged.cache_info().currsize <= 256


@pytest.mark.parametrize("bad", ["", 7, "a\n", "x" * 129])
def test_bad_name_is_refused(one, bad):
    for use in (one.get_session, one.register_scraper):
        with pytest.raises(ArgumentError, match=r"^scraper="):
            use(bad)


def test_missing_name_goes_under_unknown_with_one_warning(one):
    with pytest.warns(UserWarning, match="goes under 'unknown'") as caught:
        context = one.get_session()
    assert caught[0].filename == __file__
    with context as session:
        session.execute(text("select 1"))
        assert one._running[THREADS].pool.stats().tag("unknown").connections == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with one.get_session():
            pass


def test_missing_name_is_that_of_the_block_around(one):
    with sqla_fairpool.tag("block"), one.get_session() as session:
        session.execute(text("select 1"))
        assert one._running[THREADS].pool.stats().tag("block").connections == 1


def test_missing_name_is_the_launchers(monkeypatch):
    monkeypatch.setenv(RUN, Run("layer3", options={"soft_limit": 4}).text)
    one = DynamicConnectionManager()
    with one.get_session() as session:
        session.execute(text("select 1"))
        assert one._running[THREADS].pool.stats().tag("layer3").connections == 1
    assert options_of(one).soft_limit == 4
    end(one)


# -- start-up and shut-down -----------------------------------------------------------


def test_use_starts_from_the_environment(monkeypatch, url):
    monkeypatch.setenv("DYNAMIC_POOL_SIZE", "10")
    monkeypatch.setenv("IDLE_TIMEOUT", "7")
    one = DynamicConnectionManager()
    with one.get_session("a"):
        pass
    options = options_of(one)
    assert (options.pool_size, options.idle_timeout) == (10, 7.0)
    assert options.ledger == "host"
    assert (options.soft_limit, options.max_limit) == (5, 8)
    assert one._running[THREADS].engine.url.render_as_string() == url
    end(one)


def test_arguments_win_over_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DYNAMIC_POOL_SIZE", "10")
    one = DynamicConnectionManager()
    other = f"sqlite:///{tmp_path / 'other.db'}"
    one.startup(other, pool_size=12, ledger=None, pool_timeout=2.5)
    assert (options_of(one).pool_size, options_of(one).timeout) == (12, 2.5)
    assert one._running[THREADS].engine.url.render_as_string() == other
    end(one)


def test_without_a_database_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(ArgumentError, match="set DATABASE_URL"):
        DynamicConnectionManager().get_session("a")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DYNAMIC_POOL_SIZE", "0"),
        ("SCRAPER_SOFT_LIMIT", "x"),
        ("SCRAPER_MAX_LIMIT", "21"),
        ("IDLE_TIMEOUT", "nan"),
        ("REALLOCATION_INTERVAL", "-1"),
        ("FAIRPOOL_LEDGER", "nonsense"),
        ("DATABASE_URL", "s3cret"),
    ],
)
def test_bad_value_in_the_environment_names_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=f"^{name}=.* is not allowed") as caught:
        DynamicConnectionManager().startup()
    assert "s3cret" not in str(caught.value)


def test_start_up_twice_is_one(one):
    pool = one._running[THREADS].pool
    one.startup()
    one.startup(one._running[THREADS].engine.url, pool_size="20", soft_limit=10)
    assert one._running[THREADS].pool is pool


def test_start_up_with_others_is_refused(one, tmp_path):
    other = f"sqlite:///{tmp_path}/s3cret.db"
    with pytest.raises(InvalidRequestError, match="runs already") as caught:
        one.startup(other, pool_size=21, connect_args={"password": "s3cret"})
    assert str(caught.value) == (
        "the dynamic pool runs already and cannot be started with another URL, "
        "pool_size=21, which is 20, another connect_args: shut it down before"
    )


def test_use_after_shut_down_is_refused_and_start_up_begins_anew(one):
    one.shutdown()
    one.shutdown()
    for use in (one.get_session, one.get_connection_stats, one.print_connection_stats):
        with pytest.raises(InvalidRequestError, match="has been shut down"):
            use()
    one.startup()
    with one.get_session("a"):
        pass


def test_shut_down_before_start_up_is_nothing():
    one = DynamicConnectionManager()
    one.shutdown()
    asyncio.run(one.shutdown_async())
    with one.get_session("a"):
        pass
    end(one)


def test_session_that_is_out_at_shut_down_comes_back(one):
    with one.get_session("a") as session:
        session.execute(text("select 1"))
        pool = one._running[THREADS].pool
        one.shutdown()
        session.add(Page(url="late"))
    assert pool.checkedout() == 0
    one.startup()
    with one.get_session("a") as session:
        assert session.scalars(select(Page.url)).all() == ["late"]


def test_threads_that_come_first_start_it_once():
    one = DynamicConnectionManager(ledger=None)
    barrier = threading.Barrier(8)
    pools = []

    def use():
        barrier.wait()
        with one.get_session("a"):
            pools.append(one._running[THREADS].pool)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pools) == 8
    assert len(set(pools)) == 1
    end(one)


def test_class_attributes_are_the_limits():
    class Mine(DynamicConnectionManager):
        GLOBAL_POOL_SIZE = 40
        SCRAPER_MAX_LIMIT = 25
        IDLE_TIMEOUT = 5
        REALLOCATION_INTERVAL = 2

    one = Mine(ledger=None)
    one.startup()
    options = options_of(one)
    assert (options.pool_size, options.soft_limit, options.max_limit) == (40, 20, 25)
    assert (options.idle_timeout, options.reallocation_interval) == (5.0, 2.0)
    end(one)


def test_class_attributes_are_those_of_the_rules():
    attributes = {
        name: getattr(DynamicConnectionManager, name)
        for name in vars(DynamicConnectionManager)
        if name.isupper() and not name.startswith("_")
    }
    assert attributes == {
        "GLOBAL_POOL_SIZE": 20,
        "SCRAPER_SOFT_LIMIT": 10,
        "SCRAPER_MAX_LIMIT": 15,
        "IDLE_TIMEOUT": 60,
        "REALLOCATION_INTERVAL": 30,
    }
    one = DynamicConnectionManager(ledger=None)
    one.startup()
    options = options_of(one)
    found = {name: getattr(options, n) for name, n in manager._ATTRIBUTES.items()}
    assert found == attributes
    end(one)


def test_bad_class_attribute_is_named(monkeypatch):
    class Mine(DynamicConnectionManager):
        SCRAPER_MAX_LIMIT = 99

    with pytest.raises(ArgumentError, match=r"^SCRAPER_MAX_LIMIT=99 is not allowed"):
        Mine(ledger=None).startup()
    monkeypatch.setenv("SCRAPER_MAX_LIMIT", "12")
    one = Mine(ledger=None)
    one.startup()
    assert options_of(one).max_limit == 12  # the environment wins over the class
    end(one)


# -- asyncio --------------------------------------------------------------------------


def test_asyncio_sessions_commit_roll_back_and_share_the_ledger(one):
    async def main():
        async with one.get_async_session("tasks") as session:
            session.add(Page(url="x"))
            await session.flush()
            stats = await asyncio.to_thread(one.get_connection_stats)
            rows = {row["scraper"]: row for row in stats["scrapers"]}
            assert rows["tasks"]["connections"] == 1
            assert stats["pool"]["checked_out"] == 1

        async def fail():
            async with one.get_async_session("tasks") as session:
                session.add(Page(url="y"))
                await session.flush()
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await fail()
        async with one.get_async_session("tasks") as session:
            assert (await session.scalars(select(Page.url))).all() == ["x"]
        assert type(one._running[TASKS].pool) is AsyncAdaptedFairQueuePool
        assert one._running[TASKS].pool.checkedout() == 0
        await one.shutdown_async()
        with pytest.raises(InvalidRequestError, match=r"startup_async\(\) starts it"):
            one.get_async_session("tasks")
        one.startup_async(pool_size=20)
        one.startup_async()
        with pytest.raises(InvalidRequestError, match="runs already"):
            one.startup_async(pool_size=21)
        async with one.get_async_session("tasks") as session:
            await session.execute(text("select 1"))
        await one.shutdown_async()

    asyncio.run(main())
    with one.get_session("threads"):
        pass
    assert type(one._running[THREADS].pool) is FairQueuePool


def test_cancelled_task_returns_its_connection(one):
    async def main():
        began = asyncio.Event()

        async def work():
            async with one.get_async_session("a") as session:
                session.add(Page(url="x"))
                await session.flush()
                began.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert one._running[TASKS].pool.checkedout() == 0
        async with one.get_async_session("a") as session:
            assert (await session.scalars(select(Page))).all() == []
        await one.shutdown_async()

    asyncio.run(main())


# -- figures --------------------------------------------------------------------------


@pytest.mark.parametrize("ledger", [None, "host"])
def test_figures_are_plain_data(ledger):
    one = DynamicConnectionManager(ledger=ledger)
    one.register_scraper("a")
    one.register_scraper("a")
    one.register_scraper("later")
    with one.get_session("a") as session:
        session.execute(text("select 1"))
        stats = json.loads(json.dumps(one.get_connection_stats()))
    pool = stats["pool"]
    assert (pool["size"], pool["checked_out"], pool["available"]) == (20, 1, 19)
    assert (pool["overflow"], pool["utilization"]) == (0, 0.05)
    assert stats["strategy"] == "1 active: at most 15"
    a, later = stats["scrapers"]
    assert (a["scraper"], a["active"], a["connections"]) == ("a", True, 1)
    assert (a["limit"], a["waiting"]) == (15, 0)
    assert a["idle_seconds"] >= 0
    assert (later["scraper"], later["connections"]) == ("later", 0)
    assert (later["active"], later["idle_seconds"]) == (False, None)
    assert stats["warnings"] == []
    end(one)


def test_figures_before_anything_else_start_the_pool():
    one = DynamicConnectionManager()
    stats = one.get_connection_stats()
    assert stats["pool"]["checked_out"] == 0
    assert (stats["scrapers"], stats["warnings"]) == ([], [])
    end(one)


OTHER = """
import sys
from sqlalchemy import text
from sqla_fairpool.manager import get_session
with get_session("other") as session:
    session.execute(text("select 1"))
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_figures_are_of_all_processes_that_share_the_budget(one):
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "holding\n"
        with one.get_session("mine") as session:
            session.execute(text("select 1"))
            stats = one.get_connection_stats()
        rows = {row["scraper"]: row for row in stats["scrapers"]}
        assert rows["other"]["connections"] == rows["mine"]["connections"] == 1
        assert rows["other"]["processes"] == [str(process.pid)]
        assert stats["pool"]["checked_out"] == 2
        assert stats["strategy"].endswith("at most 10 each")
    finally:
        process.stdin.close()
        process.stdout.close()
        assert process.wait(30) == 0


def test_while_the_ledger_is_away_the_figures_are_our_own(one, url, monkeypatch):
    path = default_path(make_url(url))
    monkeypatch.setattr(host_file, "_PATIENCE", 0.05)
    with one.get_session("a") as session:
        session.execute(text("select 1"))
        with closing(HostStore(path)) as holder:
            holder.open()
            with holder.transaction():
                stats = one.get_connection_stats()
    assert {row["scraper"] for row in stats["scrapers"]} == {"a", "setup"}
    assert stats["pool"]["checked_out"] == 1
    (warning,) = stats["warnings"]
    assert warning.startswith(f"the ledger is away: {path}: ")


def test_ledger_that_was_reset_is_joined_anew(one, url):
    path = default_path(make_url(url))
    with one.get_session("a") as session:
        session.execute(text("select 1"))
        with closing(HostStore(path)) as store:
            store.open()
            with store.transaction() as rows:
                rows.clear()
        eventually(lambda: not one.get_connection_stats()["warnings"])
        assert one.get_connection_stats()["pool"]["checked_out"] == 1


def test_figures_are_printed(one, capsys):
    with one.get_session("layer3") as session:
        session.execute(text("select 1"))
        one.print_connection_stats()
    assert "layer3" in capsys.readouterr().out
    file = io.StringIO()
    one.print_connection_stats(file)
    assert "Allocation: " in file.getvalue()


def test_name_that_the_output_cannot_show_is_escaped(one):
    one.register_scraper("l\u00e4yer\u20ac")
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    one.print_connection_stats(out)
    out.flush()
    assert b"l\xe4yer\\u20ac" in out.buffer.getvalue()


# -- the functions --------------------------------------------------------------------


FUNCTIONS = {
    "startup_dynamic_pool": "startup",
    "shutdown_dynamic_pool": "shutdown",
    "startup_dynamic_async_pool": "startup_async",
    "shutdown_dynamic_async_pool": "shutdown_async",
}


def test_functions_are_the_methods_of_one_manager():
    functions = set(manager.__all__) - {"DynamicConnectionManager"}
    assert functions > FUNCTIONS.keys()
    (one,) = {getattr(manager, name).__self__ for name in functions}
    for name in functions:
        assert getattr(manager, name) == getattr(one, FUNCTIONS.get(name, name))
    with manager.get_session("a") as session:
        session.execute(text("select 1"))
    assert manager.get_connection_stats()["pool"]["size"] == 20
    end(one)


def test_one_url_serves_threads_and_tasks(tmp_path):
    """Each gets a driver of its kind."""
    for given in ("sqlite", "sqlite+aiosqlite", "sqlite+pysqlite"):
        one = DynamicConnectionManager(f"{given}:///{tmp_path / 'app.db'}", ledger=None)
        one.startup()
        one.startup_async()
        assert not one._running[THREADS].engine.dialect.is_async
        assert one._running[TASKS].engine.dialect.is_async
        end(one)


HOSTERS = (
    "sslmode=prefer&connect_timeout=10&options=-c%20statement_timeout%3D4321ms"
    "&application_name=hoster&keepalives=1&channel_binding=prefer"
)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["", "+asyncpg", "+psycopg"])
def test_url_as_hosters_write_it_serves_threads_and_tasks(postgres_url, driver):
    url = postgres_url.replace("+psycopg2", driver)
    url += ("&" if "?" in url else "?") + HOSTERS
    one = DynamicConnectionManager(url, ledger=None)
    ask = text(
        "select current_setting('statement_timeout'), "
        "current_setting('application_name')"
    )

    async def main():
        async with one.get_async_session("a") as session:
            found = (await session.execute(ask)).one()
        await one.shutdown_async()
        return tuple(found)

    assert asyncio.run(main()) == ("4321ms", "hoster")
    with one.get_session("a") as session:
        assert tuple(session.execute(ask).one()) == ("4321ms", "hoster")
    end(one)


def test_certificate_that_is_not_there_is_missed(tmp_path):
    """Nothing that is said of safety is left out."""
    url = "postgresql+asyncpg://u@127.0.0.1:1/d?sslmode=verify-full"
    url += f"&sslrootcert={tmp_path}/ca.pem"
    one = DynamicConnectionManager(url, ledger=None)

    async def main():
        async with one.get_async_session("a") as session:
            await session.execute(text("select 1"))

    with pytest.raises(Exception, match=r"root certificate|No such file.*") as caught:
        asyncio.run(main())
    assert "ConnectionRefused" not in repr(caught.value)
    end(one)


def test_connect_arguments_win_over_the_urls_keys(monkeypatch):
    import asyncpg

    given = []

    async def connect(**arguments):
        given.append(arguments)
        raise OSError("no server")

    monkeypatch.setattr(asyncpg, "connect", connect)
    url = "postgresql+asyncpg://h/d?sslmode=require&connect_timeout=9&timeout=5"
    one = DynamicConnectionManager(url, ledger=None, connect_args={"timeout": 3})

    async def main():
        async with one.get_async_session("a") as session:
            await session.execute(text("select 1"))

    with pytest.raises(Exception, match="no server"):
        asyncio.run(main())
    end(one)
    (arguments,) = given
    assert arguments["timeout"] == 3
    assert arguments["dsn"] == "postgresql://?sslmode=require"
    assert not {"sslmode", "connect_timeout"} & set(arguments)


def test_importing_it_needs_no_asyncio_driver_and_reads_no_environment(tmp_path):
    program = "import sqla_fairpool.manager, sys; sys.exit('sqlalchemy.ext.asyncio' in "
    program += "sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"DYNAMIC_POOL_SIZE": "bad"}, cwd=Path("/")
    )
    assert done.returncode == 0
