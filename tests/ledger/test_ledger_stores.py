"""Both stores: rows, signs of life and bells, between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ArgumentError
from support.threads import PATIENCE, Caller, eventually

from sqla_fairpool.ledger import addresses, host_file, postgres, watch
from sqla_fairpool.ledger.addresses import default_path, make_store
from sqla_fairpool.ledger.errors import LedgerError
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.postgres import PostgresStore
from sqla_fairpool.ledger.store import StoreAway

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "app.ledger"


def store_at(place):
    """Return the store at a path, or at (URL, ledger)."""
    return PostgresStore(*place) if isinstance(place, tuple) else HostStore(place)


@pytest.fixture(
    params=[
        "host",
        pytest.param("psycopg2", marks=pytest.mark.postgres),
        pytest.param("psycopg", marks=pytest.mark.postgres),
    ]
)
def place(request, path):
    """Where a new ledger is, of each kind."""
    if request.param == "host":
        return path
    url = make_url(request.getfixturevalue("postgres_url"))
    return url.set(drivername=f"postgresql+{request.param}"), uuid.uuid4().hex


def maker(place):
    stores = []

    def make():
        store = store_at(place)
        store.open()
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def make(place):
    """Make open stores of each kind, closed after the test."""
    yield from maker(place)


@pytest.fixture
def make_host(path):
    """Make open host stores, closed after the test."""
    yield from maker(path)


def rows_of(store):
    with store.transaction() as rows:
        return dict(rows)


# -- rows -----------------------------------------------------------------------------


def test_rows_are_kept_and_seen_by_others(make):
    one, two = make(), make()
    with one.transaction() as rows:
        rows["a"] = "1"
        rows["b"] = "ü\n"
    assert rows_of(two) == {"a": "1", "b": "ü\n"}
    with two.transaction() as rows:
        del rows["a"]
        rows["b"] = "3"
    assert rows_of(one) == {"b": "3"}


def test_exception_undoes_everything(make):
    store = make()
    with pytest.raises(ZeroDivisionError), store.transaction() as rows:
        rows["a"] = str(1 / len([]))
    assert rows_of(store) == {}


def test_only_what_has_changed_is_written(make_host):
    store = make_host()
    with store.transaction() as rows:
        rows.update({str(n): "x" for n in range(100)})
    statements = []
    store._file.database.set_trace_callback(statements.append)
    with store.transaction() as rows:
        rows["7"] = "y"
        rows["8"] = "x"
    assert sum("insert" in s for s in statements) == 1
    statements.clear()
    rows_of(store)
    assert not any("insert" in s or "delete" in s for s in statements)


def add_many(place, times, ready):
    store = store_at(place)
    store.open()
    ready.wait(PATIENCE)
    for _ in range(times):
        with store.transaction() as rows:
            rows["n"] = str(int(rows.get("n", "0")) + 1)
    store.close()


def test_transactions_are_exclusive_over_processes(make, place):
    ready = SPAWN.Barrier(4)
    processes = [
        SPAWN.Process(target=add_many, args=(place, 100, ready)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    store = make()

    ready.wait(PATIENCE)
    for _ in range(100):
        with store.transaction() as rows:
            rows["n"] = str(int(rows.get("n", "0")) + 1)
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert rows_of(store) == {"n": "400"}


def test_a_lock_held_for_too_long_is_a_store_that_is_away(make_host, monkeypatch):
    monkeypatch.setattr(host_file, "_PATIENCE", 0.05)
    store, other = make_host(), make_host()
    with other.transaction() as rows:
        rows["a"] = "1"
        with pytest.raises(StoreAway, match="locked"), store.transaction():
            pass
    assert rows_of(store) == {"a": "1"}


def test_closed_store_is_away(place):
    store = store_at(place)
    for _ in range(2):
        with pytest.raises(StoreAway), store.transaction():
            pass
        store.nudge()
        store.close()
        store.open()
        store.open()
        assert rows_of(store) == {}
        store.close()


# -- signs of life --------------------------------------------------------------------


@contextmanager
def member_process(place):
    """A process with an open store; yields it, its id, and a pipe to it."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=live, args=(place, theirs), daemon=True)
    process.start()
    member = ours.recv()
    try:
        yield process, member, ours
    finally:
        process.kill()
        process.join()


def live(place, pipe):
    store = store_at(place)
    store.open()
    pipe.send(store.member)
    while True:
        order = pipe.recv()
        if order == "fork":
            child = os.fork()
            if not child:
                store.after_fork()
                signal.pause()
            pipe.send(child)
        elif order == "wait":
            pipe.send("waiting")
            pipe.send(store.wait(PATIENCE))
        elif order == "close":
            store.close()
            pipe.send("closed")


def test_sign_stands_until_the_process_is_gone(make, place):
    store = make()
    with member_process(place) as (process, member, _):
        assert store.living([member, store.member, "nobody"]) == {member, store.member}
        os.kill(process.pid, signal.SIGSTOP)
        assert store.living([member]) == {member}
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        eventually(lambda: store.living([member]) == set())


def test_closing_gives_the_sign_up(make, place):
    store = make()
    with member_process(place) as (_, member, pipe):
        pipe.send("close")
        assert pipe.recv() == "closed"
        eventually(lambda: store.living([member]) == set())


def test_forked_child_does_not_keep_its_parents_sign(make, place):
    store = make()
    with member_process(place) as (process, member, pipe):
        pipe.send("fork")
        child = pipe.recv()
        try:
            process.kill()
            process.join()
            eventually(lambda: store.living([member]) == set())
        finally:
            os.kill(child, signal.SIGKILL)


def test_after_fork_a_store_is_another_member(make):
    store = make()
    member = store.member
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        store.after_fork()
        os.write(writing, store.member.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100).decode() not in ("", member)
    os.close(reading)
    os.close(writing)
    assert store.living([member]) == {member}
    assert rows_of(store) == {}


def test_what_the_dead_left_without_a_row_is_removed(make_host, path):
    with member_process(path) as (process, member, _):
        process.kill()
        process.join()
    assert list(path.parent.glob(f"*/{member}*"))
    make_host()
    assert not list(path.parent.glob(f"*/{member}*"))


# -- bells ----------------------------------------------------------------------------


def test_bell_rings_in_another_process(make, place):
    store = make()
    with member_process(place) as (_, member, pipe):
        pipe.send("wait")
        assert pipe.recv() == "waiting"
        store.ring([member, "nobody"])
        assert pipe.recv() is True


def test_bell_that_rang_before_the_wait_is_heard_once(make):
    one, two = make(), make()
    for _ in range(5):
        one.ring([two.member])
    assert two.wait(PATIENCE)
    while two.wait(0.05):
        pass  # a server may send them one by one
    assert not two.wait(0)


def test_nudges_never_block_and_are_one(make):
    store = make()
    for _ in range(100_000):  # more than a FIFO holds
        store.nudge()
    assert store.wait(0)
    assert not store.wait(0)
    caller = Caller(store.wait, None)
    threading.Thread(target=store.nudge).start()
    assert caller.result() is True


# -- what may be wrong with it --------------------------------------------------------


def test_asking_is_heard_and_what_is_published_is_read(make):
    store, other = make(), make()
    assert not store.asked
    other.ring([store.member])
    assert store.wait(PATIENCE)
    assert not store.asked
    other.ask([store.member, "nobody"])
    assert store.wait(PATIENCE)
    assert store.asked
    both = [store.member, other.member]
    assert other.published(both) == {}
    store.publish("one")
    store.publish("two\u20ac")
    assert other.published(both) == {store.member: "two\u20ac"}
    assert store.published([other.member]) == {}


def test_what_the_dead_have_published_is_removed(make):
    store, other = make(), make()
    store.publish("figures")
    member = store.member
    store.close()
    other.living([member])
    other.published([other.member])
    assert other.published([member]) == {}


def test_figures_that_cannot_be_published_are_a_store_that_is_away(make_host):
    store = make_host()
    store._members = store._members / "nowhere"
    with pytest.raises(StoreAway):
        store.publish("x")


def test_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="cannot be used"):
        HostStore(tmp_path).open()


def test_nobody_else_may_read_it(make_host, path):
    make_host()
    files = [path, Path(f"{path}-journal"), *path.parent.glob("*/*")]
    assert len(files) == 4
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE((path.parent / "app.ledger.members").stat().st_mode) == 0o700


def test_an_operator_may_let_a_group_share_it(path):
    path.parent.mkdir()
    path.touch()
    path.chmod(0o660)
    store = HostStore(path)
    store.open()
    assert stat.S_IMODE((path.parent / "app.ledger.members").stat().st_mode) == 0o770
    for file in path.parent.glob("*/*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o660
    store.close()


# -- where it is ----------------------------------------------------------------------


def test_default_place_follows_from_the_database(temp):
    url = make_url(
        "postgresql+psycopg2://me:s3cret@db.example:5433/app?sslmode=require"
    )
    path = default_path(url)
    assert path.parent == temp / f"sqla-fairpool-{os.getuid()}"
    assert path.name.startswith("postgresql-db.example-5433-app-")
    other_user = make_url("postgresql+asyncpg://you:other@db.example:5433/app")
    assert default_path(other_user) == path
    for different in (
        "postgresql://db.example:5434/app",
        "postgresql://db.example:5433/app2",
        "postgresql://db_example:5433/app",
        "mysql://db.example:5433/app",
    ):
        assert default_path(make_url(different)) != path
    assert "s3cret" not in str(path)


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR", "HOME"])
def test_default_place_is_the_same_in_every_environment(
    temp, tmp_path, monkeypatch, variable
):
    """Shells have these variables, cron and system services have others, or none."""
    url = make_url("postgresql://host/app")
    monkeypatch.delenv(variable, raising=False)
    path = default_path(url)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert default_path(url) == path


def test_default_place_that_cannot_be_made_is_refused(temp, monkeypatch):
    monkeypatch.setattr(addresses, "_TEMP", temp / "nowhere")
    with pytest.raises(LedgerError, match=r"cannot be made \(No such file"):
        default_path(make_url("postgresql://host/app"))


def test_default_place_is_this_users_alone(temp):
    url = make_url("postgresql://host/app")
    place = default_path(url).parent
    place.chmod(0o755)
    with pytest.raises(LedgerError, match="this user alone"):
        default_path(url)
    place.rmdir()
    (temp / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(temp / "elsewhere")
    with pytest.raises(LedgerError, match="this user alone"):
        default_path(url)


def test_sqlite_files_are_told_apart_by_where_they_are(temp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = default_path(make_url("sqlite:///x.db"))
    assert named == default_path(make_url(f"sqlite:///{tmp_path}/x.db"))
    assert named != default_path(make_url("sqlite:///y/x.db"))


@pytest.mark.parametrize(
    "bad",
    [
        "hosts",
        "",
        "mysql://u:s3cret@h/db",
        "name",
        "x://s3cret",
        "postgresql://u:s3cret@h:port/db",
        "u:s3cret@h/db",
        "u:s3/cret@h",
    ],
)
def test_anything_else_is_refused_without_a_secret(bad):
    with pytest.raises(ArgumentError, match="ledger=") as caught:
        make_store(bad, make_url("postgresql://host/app"))
    assert "cret" not in str(caught.value)


# -- PostgreSQL -----------------------------------------------------------------------


@pytest.fixture
def database(postgres_url):
    """A connection of the operator's."""
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def in_database(postgres_url):
    """Make open PostgreSQL stores of one ledger, closed after the test."""
    yield from maker((make_url(postgres_url), uuid.uuid4().hex))


@pytest.mark.postgres
def test_lost_control_connection_is_a_lost_sign(in_database, database):
    store, other = in_database(), in_database()
    pid = store._driver.info.backend_pid
    assert (store.control_connections, store.signed) == (1, True)
    database.execute(text("select pg_terminate_backend(:pid)"), {"pid": pid})
    eventually(lambda: other.living([store.member]) == set())
    with pytest.raises(StoreAway), store.transaction():
        pass
    assert (store.control_connections, store.signed) == (0, False)
    store.nudge()
    store.open()
    assert store.signed
    assert other.living([store.member]) == {store.member}
    assert rows_of(store) == {}


@pytest.mark.postgres
def test_connection_that_is_lost_ends_the_wait(in_database, database):
    store = in_database()
    pid = store._driver.info.backend_pid
    caller = Caller(store.wait, PATIENCE)
    database.execute(text("select pg_terminate_backend(:pid)"), {"pid": pid})
    try:
        assert caller.result()  # woken by what the server said last
    except StoreAway:
        pass  # or by its end
    with pytest.raises(StoreAway), store.transaction():
        pass
    assert not store.signed


@pytest.mark.postgres
def test_transaction_of_a_stopped_process_is_ended(in_database, monkeypatch):
    monkeypatch.setattr(postgres, "_STATEMENT_TIMEOUT", "100ms")
    stopped, other = in_database(), in_database()
    transaction = stopped.transaction()
    transaction.__enter__()["a"] = "1"

    def goes_on():
        try:
            return rows_of(other) == {}
        except StoreAway:  # the lock is taken
            other.open()
            return False

    eventually(goes_on)
    with pytest.raises(StoreAway):
        transaction.__exit__(None, None, None)
    assert not stopped.signed


@pytest.mark.postgres
def test_ledgers_in_one_database_are_apart(postgres_url):
    url = make_url(postgres_url)
    one = make_store(f"{postgres_url}&ledger=one", None)
    two = make_store("database", url.update_query_dict({"ledger": "two"}))
    for store in (one, two):
        store.open()
        with store.transaction() as rows:
            rows["a"] = store.name
    assert rows_of(one) != rows_of(two)
    assert one.key != two.key
    for store in (one, two):
        with store.transaction() as rows:
            rows.clear()
        store.close()


@pytest.mark.postgres
def test_tables_from_the_future_are_refused(in_database, database):
    store = in_database()
    name = {"name": store._tables._ledger["ledger"]}
    store.close()
    database.execute(
        text("update fairpool_ledger set version = 99 where name = :name"), name
    )
    with pytest.raises(LedgerError, match=r"schema version 99.* knows 1"):
        store.open()
    assert store.control_connections == 0


def test_server_that_is_not_there_is_a_store_that_is_away(tmp_path):
    url = make_url("postgresql+psycopg2://u:s3cret@/db").set(host=None)
    store = PostgresStore(url.update_query_dict({"host": str(tmp_path)}))
    with pytest.raises(StoreAway) as caught:
        store.open()
    assert "s3cret" not in str(caught.value) + store.name


@pytest.mark.postgres
def test_pooler_in_between_is_refused(postgres_url, monkeypatch):
    """None is installed here: what its driver would say is put in its place."""
    check = watch.identify
    monkeypatch.setattr(watch, "identify", lambda c, pid: check(c, pid + 1))
    with pytest.raises(LedgerError, match="a pooler like PgBouncer is in between"):
        PostgresStore(make_url(postgres_url)).open()


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_sessions_are_seen_until_they_end_whatever_is_done_in_them(
    postgres_url, database, driver
):
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    engine = create_engine(url)
    asking = database.connection.cursor()
    before = watch.look(asking)
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        pid = connection.connection.driver_connection.info.backend_pid
        server, session = watch.identify(cursor, pid)
        connection.rollback()
        driver_connection = connection.connection.driver_connection
        driver_connection.rollback()
        driver_connection.autocommit = True
        cursor.execute("DISCARD ALL")
        present = watch.look(asking)
        assert present.server == server == before.server
        assert session.pid == pid
        assert session in present.sessions - before.sessions
        assert session in present.peers
        driver_connection.autocommit = False
    engine.dispose()
    eventually(lambda: session not in watch.look(asking).sessions)


@pytest.mark.postgres
def test_sessions_of_another_role_are_seen_without_their_beginning(
    postgres_url, database
):
    database.execute(text("create role looks_on login"))
    try:
        engine = create_engine(make_url(postgres_url).set(username="looks_on"))
        cursor = database.connection.cursor()
        _, session = watch.identify(cursor, None)
        with engine.connect() as connection:
            present = watch.look(connection.connection.cursor())
        assert session._replace(began=None) in present.sessions
        assert session.pid not in {peer.pid for peer in present.peers}
        engine.dispose()
    finally:
        database.execute(text("drop role looks_on"))


@pytest.mark.postgres
def test_pools_of_other_ledgers_are_seen(postgres_url, database):
    cursor = database.connection.cursor()
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        assert watch.other_ledgers(connection.connection.cursor(), 77) == set()
        assert watch.other_ledgers(cursor, 78) == {77}
        assert watch.other_ledgers(cursor, 77) == {78}
        connection.invalidate()
    engine.dispose()
    cursor.execute("select pg_advisory_unlock_all()")
