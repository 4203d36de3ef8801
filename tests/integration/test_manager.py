"""The surface for scripts: sessions, start-up and shut-down, figures."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from operator import attrgetter
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import Column, Integer, String, make_url, select, text
from sqlalchemy.exc import ArgumentError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session, declarative_base
from sqlalchemy.util import await_only, greenlet_spawn
from support import state
from support.threads import Caller, eventually
from support.worlds import contract

import sqla_fairpool
from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool, manager
from sqla_fairpool.launch import RUN, VARIABLES, Run
from sqla_fairpool.ledger import host_file
from sqla_fairpool.ledger.addresses import default_path
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.manager import TASKS, THREADS, DynamicConnectionManager

Base = declarative_base()

SELECT_1 = text("select 1")


class Page(Base):
    __tablename__ = "page"
    id = Column(Integer, primary_key=True)
    url = Column(String, unique=True)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'app.db'}"


@pytest.fixture(autouse=True)
def environment(monkeypatch, url):
    """A database of the test's own is named, and no ledger."""
    for name in (*VARIABLES, RUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("FAIRPOOL_LEDGER", "none")


@pytest.fixture
def default_ledger(monkeypatch, environment):
    """The default one, which follows from the database."""
    monkeypatch.delenv("FAIRPOOL_LEDGER")


def pool_of(one, kind=THREADS):
    return one._running[kind].pool


@pytest.fixture
def make(monkeypatch):
    """Make managers; they and the members of ledgers end with the test."""
    made, started = [manager._manager], []

    class Noted(manager.Started):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    def make(*url, of=DynamicConnectionManager, **options):
        made.append(of(*url, **options))
        return made[-1]

    monkeypatch.setattr(manager, "Started", Noted)
    yield make
    for one in made:
        one.shutdown()
        asyncio.run(one.shutdown_async())
    for keeper in filter(None, (state.keeper(each.pool) for each in started)):
        keeper.close()


@pytest.fixture
def one(make, default_ledger):
    """A manager with a ledger and a table."""
    one = make()
    with one.get_session("setup") as session:
        Base.metadata.create_all(session.connection())
    return one


# -- for threads and for tasks ---------------------------------------------------------


class InThreads:
    """What scripts of threads use; see `support.worlds`."""

    kind, pool_class, suffix = THREADS, FairQueuePool, ""

    def __init__(self, one):
        self.one = one
        self.start = getattr(one, f"startup{self.suffix}")

    def run(self, test):
        test()

    def session(self, *name, **options):
        return self.one.get_session(*name, **options)

    def shutdown(self):
        self.one.shutdown()

    @property
    def pool(self):
        return pool_of(self.one, self.kind)


class InTasks(InThreads):
    """The same of scripts with asyncio."""

    kind, pool_class, suffix = TASKS, AsyncAdaptedFairQueuePool, "_async"

    def run(self, test):
        async def main():
            await greenlet_spawn(test)
            await self.one.shutdown_async()

        asyncio.run(main())

    @contextmanager
    def session(self, *name, **options):
        context = self.one.get_async_session(*name, **options)
        session = await_only(context.__aenter__())
        try:
            yield session.sync_session
        except BaseException:
            if not await_only(context.__aexit__(*sys.exc_info())):
                raise
        else:
            await_only(context.__aexit__(None, None, None))

    def shutdown(self):
        await_only(self.one.shutdown_async())


@pytest.fixture(params=[InThreads, InTasks])
def world(request, one):
    return request.param(one)


@contract
def test_session_commits_on_success(world):
    with world.session("a", expire_on_commit=False) as session:
        assert isinstance(session, Session)
        page = Page(url="x")
        session.add(page)
        session.flush()
        assert type(world.pool) is world.pool_class
        row = world.pool.stats().tag("a")
        assert (row.connections, row.active) == (1, True)
        session.commit()  # a script may, and go on
        session.add(Page(url="y"))
    assert page.url == "x"
    with world.session("not registered") as session:
        assert session.scalars(select(Page.url)).all() == ["x", "y"]
    assert world.pool.stats().tag("not registered").checkouts == 1
    assert world.pool.checkedout() == 0


@contract
def test_session_rolls_back_on_error_and_returns_the_connection(world):
    def fail(error):
        with world.session("a") as session:
            session.add(Page(url="x"))
            session.flush()
            raise error

    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert world.pool.checkedout() == 0
    with pytest.raises(IntegrityError), world.session("a") as session:
        session.add_all([Page(url="x"), Page(url="x")])  # the commit fails
    assert world.pool.checkedout() == 0
    with world.session("a") as session:
        assert session.scalars(select(Page)).all() == []


@contract
def test_start_up_twice_is_one_and_with_others_is_refused(world, url):
    world.start()
    pool = world.pool
    world.start()
    world.start(url, pool_size="20", soft_limit=10)
    assert world.pool is pool
    secret = {"password": "s3cret"}
    with pytest.raises(InvalidRequestError) as caught:
        world.start(f"{url}/s3cret.db", pool_size=21, connect_args=secret)
    assert caught.value.args[0] == (
        "the dynamic pool runs already and cannot be started with another URL, "
        "pool_size=21, which is 20, another connect_args: shut it down before"
    )


@contract
def test_use_after_shut_down_is_refused_and_start_up_begins_anew(world):
    with world.session("a") as session:
        session.execute(SELECT_1)
        pool = world.pool
        world.shutdown()
        world.shutdown()
        session.add(Page(url="late"))
    assert pool.checkedout() == 0  # it came back after that
    message = rf"has been shut down: startup{world.suffix}\(\) starts it again"
    with pytest.raises(InvalidRequestError, match=message):
        world.session("a").__enter__()
    world.start()
    with world.session("a") as session:
        assert session.scalars(select(Page.url)).all() == ["late"]


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
        assert pool_of(one, TASKS).checkedout() == 0
        async with one.get_async_session("a") as session:
            assert (await session.scalars(select(Page))).all() == []
        await one.shutdown_async()

    asyncio.run(main())


# -- names -----------------------------------------------------------------------------


def test_tagged_engines_are_made_once_and_are_bounded(one):
    started = one._running[THREADS]
    assert started.tagged("a") is started.tagged("a")
    for n in range(1000):
        started.tagged(f"t{n}")
    assert started.tagged.cache_info().currsize <= 256
    for use in (one.get_session, one.get_async_session, one.register_scraper):
        for bad in ("", 7, "a\n", "x" * 129):
            with pytest.raises(ArgumentError, match=r"^scraper="):
                use(bad)


def tag_of(one, *name):
    """Return the tag of a session's connection."""
    with one.get_session(*name) as session:
        session.execute(SELECT_1)
        (tag,) = (row.name for row in pool_of(one).stats().tags if row.connections)
    return tag


@pytest.mark.parametrize("get", ["get_session", "get_async_session"])
def test_missing_name_goes_under_unknown_with_one_warning(one, get):
    with pytest.warns(UserWarning, match="goes under 'unknown'") as caught:
        getattr(one, get)()
    assert caught[0].filename == __file__
    assert tag_of(one) == "unknown"  # without another one: warnings are errors


def test_missing_name_is_that_of_the_block_around_or_the_launchers(monkeypatch, make):
    monkeypatch.setenv(RUN, Run("layer3", options={"soft_limit": 4}).text)
    one = make(tag_option="tenant")
    assert (tag_of(one), tag_of(one, "given")) == ("layer3", "given")
    with sqla_fairpool.tag("block"):
        assert tag_of(one) == "block"
    assert pool_of(one).options.soft_limit == 4


# -- where options come from -----------------------------------------------------------


def test_use_starts_from_the_environment_and_arguments_win(
    monkeypatch, url, make, default_ledger
):
    monkeypatch.setenv("DYNAMIC_POOL_SIZE", "10")
    monkeypatch.setenv("IDLE_TIMEOUT", "7")
    one = make()
    one.shutdown()  # before the start-up, it is nothing
    asyncio.run(one.shutdown_async())
    with one.get_session("a"):
        pass
    options = pool_of(one).options
    assert (options.pool_size, options.idle_timeout) == (10, 7.0)
    assert (options.soft_limit, options.max_limit) == (5, 8)
    assert options.ledger == "host"
    assert one._running[THREADS].engine.url.render_as_string() == url
    other = make()
    other.startup(f"{url}.other", pool_size=12, ledger=None, pool_timeout=2.5)
    options = pool_of(other).options
    assert (options.pool_size, options.timeout, options.ledger) == (12, 2.5, None)
    assert other._running[THREADS].engine.url.render_as_string() == f"{url}.other"


def test_bad_value_in_the_environment_names_the_variable(monkeypatch, make):
    for name, value in (
        ("DYNAMIC_POOL_SIZE", "0"),
        ("SCRAPER_MAX_LIMIT", "21"),
        ("FAIRPOOL_LEDGER", "nonsense"),
        ("DATABASE_URL", "s3cret"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ArgumentError, match=f"^{name}=.* is not all") as caught:
                make().startup()
        assert "s3cret" not in str(caught.value)
    monkeypatch.delenv("DATABASE_URL")
    with pytest.raises(ArgumentError, match="set DATABASE_URL"):
        make().get_session("a")


def test_threads_that_come_first_start_it_once(make):
    one, barrier = make(), threading.Barrier(8)

    def use():
        barrier.wait()
        with one.get_session("a"):
            return pool_of(one)

    callers = [Caller(use) for _ in range(8)]
    assert len({caller.result() for caller in callers}) == 1


class Mine(DynamicConnectionManager):
    GLOBAL_POOL_SIZE = 40
    SCRAPER_MAX_LIMIT = 25
    IDLE_TIMEOUT = 5
    REALLOCATION_INTERVAL = 2


def test_class_attributes_are_the_limits(make):
    for of, expected in (
        (DynamicConnectionManager, (20, 15, 10, 60.0, 30.0)),
        (Mine, (40, 25, 20, 5.0, 2.0)),
    ):
        one = make(of=of)
        one.startup()
        limits = attrgetter(*manager._ATTRIBUTES)
        assert limits(pool_of(one).options) == expected
    attributes = {n for n in vars(DynamicConnectionManager) if n.isupper()}
    assert attributes == {*manager._ATTRIBUTES.values()}
    assert DynamicConnectionManager.SCRAPER_SOFT_LIMIT == 10


def test_bad_class_attribute_is_named(monkeypatch, make):
    bad = type("Bad", (DynamicConnectionManager,), {"SCRAPER_MAX_LIMIT": 99})
    with pytest.raises(ArgumentError, match=r"^SCRAPER_MAX_LIMIT=99 is not allowed"):
        make(of=bad).startup()
    monkeypatch.setenv("SCRAPER_MAX_LIMIT", "12")
    one = make(of=bad)
    one.startup()
    assert pool_of(one).options.max_limit == 12  # the environment wins over the class


# -- figures --------------------------------------------------------------------------


@pytest.mark.parametrize("ledger", [None, "host"])
def test_figures_are_plain_data(make, ledger):
    one = make(ledger=ledger)
    for name in ("a", "a", "later"):
        one.register_scraper(name)
    with one.get_session("a") as session:
        session.execute(SELECT_1)
        stats = json.loads(json.dumps(one.get_connection_stats()))
    sizes = {"size": 20, "checked_out": 1, "available": 19, "overflow": 0}
    assert stats["pool"].items() >= {**sizes, "utilization": 0.05}.items()
    assert stats["strategy"] == "1 active: at most 15"
    a, later = stats["scrapers"]
    assert (a["scraper"], a["active"], a["connections"]) == ("a", True, 1)
    assert (a["limit"], a["waiting"]) == (15, 0)
    assert a["idle_seconds"] >= 0
    assert (later["scraper"], later["active"], later["connections"]) == (
        "later",
        False,
        0,
    )
    assert later["idle_seconds"] is None
    assert stats["warnings"] == []


def test_figures_before_anything_else_start_the_pool(make, default_ledger):
    one = make()
    stats = one.get_connection_stats()
    assert stats["pool"]["checked_out"] == 0
    assert (stats["scrapers"], stats["warnings"]) == ([], [])
    one.shutdown()
    for use in (one.get_connection_stats, one.print_connection_stats):
        with pytest.raises(InvalidRequestError, match="has been shut down"):
            use()


def test_figures_are_of_threads_and_tasks(one):
    world = InTasks(one)

    @world.run
    def test():
        with world.session("tasks") as session:
            session.execute(SELECT_1)
            stats = await_only(asyncio.to_thread(one.get_connection_stats))
        rows = {row["scraper"]: row["connections"] for row in stats["scrapers"]}
        assert rows["tasks"] == stats["pool"]["checked_out"] == 1


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
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OTHER], **pipes) as process:
        assert process.stdout.readline() == "holding\n"
        with one.get_session("mine") as session:
            session.execute(SELECT_1)
            stats = one.get_connection_stats()
        process.communicate(timeout=30)
    assert process.returncode == 0
    rows = {row["scraper"]: row for row in stats["scrapers"]}
    assert rows["other"]["connections"] == rows["mine"]["connections"] == 1
    assert rows["other"]["processes"] == [str(process.pid)]
    assert stats["pool"]["checked_out"] == 2
    assert stats["strategy"].endswith("at most 10 each")


@pytest.mark.parametrize("kind", ["startup", "startup_async"])
def test_figures_before_the_first_session_are_not_of_a_former_run(
    make, default_ledger, kind
):
    former = make(pool_size=8)
    with former.get_session("a") as session:
        session.execute(SELECT_1)
        assert former.get_connection_stats()["pool"]["capacity"] == 8
        # While a member lives, its limits are in force for all.
        assert make(pool_size=9).get_connection_stats()["pool"]["capacity"] == 8
    state.keeper(pool_of(former)).close()
    one = make()
    getattr(one, kind)(pool_size=12, max_overflow=4)
    pool = one.get_connection_stats()["pool"]
    assert (pool["size"], pool["capacity"], pool["available"]) == (12, 16, 16)
    assert (pool["soft_limit"], pool["max_limit"]) == (8, 12)


REGISTERING = """
import sys
from sqla_fairpool import manager
for call in sys.argv[1].split(","):
    name, _, argument = call.partition(" ")
    getattr(manager, name)(*filter(None, [argument]))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    "calls",
    [
        "register_scraper later,startup_dynamic_pool",
        "startup_dynamic_pool,register_scraper later",
        "startup_dynamic_async_pool,register_scraper later",
    ],
)
def test_registered_scraper_is_in_the_figures_of_all_processes(one, calls):
    command = [sys.executable, "-c", REGISTERING, calls]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"

        def rows():
            rows = one.get_connection_stats()["scrapers"]
            return {row["scraper"]: row for row in rows}

        eventually(lambda: "later" in rows())
        later = rows()["later"]
        process.communicate(timeout=30)
    assert later["processes"] == [str(process.pid)]
    assert (later["active"], later["connections"]) == (False, 0)
    assert "later" not in rows()


@contextmanager
def rows_of(url):
    """The rows of the default ledger; no process gets at them in the block."""
    with closing(HostStore(default_path(make_url(url)))) as store:
        store.open()
        with store.transaction() as rows:
            yield rows


def test_figures_while_the_ledger_is_away_and_after_it_was_reset(one, url, monkeypatch):
    """They are our own then; and the ledger is joined anew."""
    with one.get_session("a") as session:
        session.execute(SELECT_1)
        with monkeypatch.context() as patch, rows_of(url) as rows:
            patch.setattr(host_file, "_PATIENCE", 0.05)
            stats = one.get_connection_stats()
            rows.clear()
        assert {row["scraper"] for row in stats["scrapers"]} == {"a", "setup"}
        assert stats["pool"]["checked_out"] == 1
        (warning,) = stats["warnings"]
        away = f"the ledger is away: {default_path(make_url(url))}: "
        assert warning.startswith(away)
        eventually(lambda: not one.get_connection_stats()["warnings"])
        assert one.get_connection_stats()["pool"]["checked_out"] == 1


def test_figures_are_printed(one, capsys):
    with one.get_session("layer3") as session:
        session.execute(SELECT_1)
        one.print_connection_stats()
    assert "layer3" in capsys.readouterr().out
    one.register_scraper("l\u00e4yer\u20ac")
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    one.print_connection_stats(out)
    out.flush()
    shown = out.buffer.getvalue()
    assert b"Allocation: " in shown
    assert b"l\xe4yer\\u20ac" in shown  # what the encoding has not is escaped


# -- the functions --------------------------------------------------------------------


def test_functions_are_the_methods_of_one_manager(make):
    methods = {
        "startup_dynamic_pool": "startup",
        "shutdown_dynamic_pool": "shutdown",
        "startup_dynamic_async_pool": "startup_async",
        "shutdown_dynamic_async_pool": "shutdown_async",
    }
    functions = set(manager.__all__) - {"DynamicConnectionManager"}
    assert functions > methods.keys()
    (one,) = {getattr(manager, name).__self__ for name in functions}
    for name in functions:
        assert getattr(manager, name) == getattr(one, methods.get(name, name))
    with manager.get_session("a") as session:
        session.execute(SELECT_1)
    assert manager.get_connection_stats()["pool"]["size"] == 20


#: What hosters write into a URL.
HOSTERS = (
    "sslmode=prefer&connect_timeout=10&options=-c%20statement_timeout%3D4321ms"
    "&application_name=hoster&keepalives=1&channel_binding=prefer"
)


ASK = text(
    "select current_setting('statement_timeout'), current_setting('application_name')"
)


def ask(world, statement=SELECT_1):
    """Return the row that a session gets."""
    found = []

    @world.run
    def test():
        with world.session("a") as session:
            found.append(tuple(session.execute(statement).one()))

    return found[0]


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["", "+asyncpg", "+psycopg"])
@pytest.mark.parametrize("of", [InThreads, InTasks])
def test_url_as_hosters_write_it_serves(make, postgres_url, driver, of):
    url = postgres_url.replace("+psycopg2", driver)
    one = make(url + ("&" if "?" in url else "?") + HOSTERS)
    assert ask(of(one), ASK) == ("4321ms", "hoster")


def test_certificate_that_is_not_there_is_missed(make, tmp_path):
    """Nothing that is said of safety is left out."""
    url = "postgresql+asyncpg://u@127.0.0.1:1/d?sslmode=verify-full"
    world = InTasks(make(f"{url}&sslrootcert={tmp_path}/ca.pem"))
    with pytest.raises(Exception, match=r"root certificate|No such file.*") as caught:
        ask(world)
    assert "ConnectionRefused" not in repr(caught.value)


def test_connect_arguments_win_over_the_urls_keys(make, monkeypatch):
    given = {}

    async def connect(**arguments):
        given.update(arguments)
        raise OSError("no server")

    monkeypatch.setattr(asyncpg, "connect", connect)
    url = "postgresql+asyncpg://h/d?sslmode=require&connect_timeout=9&timeout=5"
    with pytest.raises(Exception, match="no server"):
        ask(InTasks(make(url, connect_args={"timeout": 3})))
    assert given["timeout"] == 3
    assert given["dsn"] == "postgresql://?sslmode=require"
    assert not {"sslmode", "connect_timeout"} & given.keys()


def test_importing_it_needs_no_asyncio_driver_and_reads_no_environment(tmp_path):
    program = "import sqla_fairpool.manager, sys; sys.exit('sqlalchemy.ext.asyncio' in "
    program += "sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"DYNAMIC_POOL_SIZE": "bad"}, cwd=Path("/")
    )
    assert done.returncode == 0
