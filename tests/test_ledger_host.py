"""The host store: rows, signs of life and bells between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import stat
import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError
from support.threads import PATIENCE, Caller, eventually

from sqla_fairpool.ledger import host
from sqla_fairpool.ledger.errors import LedgerError
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.places import default_path, make_store
from sqla_fairpool.ledger.store import StoreAway

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "app.ledger"


@pytest.fixture
def make(path):
    """Make open stores, closed after the test."""
    stores = []

    def make():
        store = HostStore(path)
        store.open()
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


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


def test_only_what_has_changed_is_written(make):
    store = make()
    with store.transaction() as rows:
        rows.update({str(n): "x" for n in range(100)})
    statements = []
    store._database.set_trace_callback(statements.append)
    with store.transaction() as rows:
        rows["7"] = "y"
        rows["8"] = "x"
    assert sum("insert" in s for s in statements) == 1
    statements.clear()
    rows_of(store)
    assert not any("insert" in s or "delete" in s for s in statements)


def add_many(path, times, ready):
    store = HostStore(path)
    store.open()
    ready.wait(PATIENCE)
    for _ in range(times):
        with store.transaction() as rows:
            rows["n"] = str(int(rows.get("n", "0")) + 1)
    store.close()


def test_transactions_are_exclusive_over_processes_and_threads(make, path):
    ready = SPAWN.Barrier(4)
    processes = [
        SPAWN.Process(target=add_many, args=(path, 200, ready)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    store = make()

    def add():
        for _ in range(100):
            with store.transaction() as rows:
                rows["n"] = str(int(rows.get("n", "0")) + 1)

    ready.wait(PATIENCE)
    for caller in [Caller(add) for _ in range(3)]:
        caller.result()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert rows_of(store) == {"n": "900"}


def test_a_lock_held_for_too_long_is_a_store_that_is_away(make, path, monkeypatch):
    monkeypatch.setattr(host, "_PATIENCE", 0.05)
    store, other = make(), sqlite3.connect(path, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(StoreAway, match="locked"), store.transaction():
        pass
    other.execute("rollback")
    other.close()
    assert rows_of(store) == {}


def test_closed_store_is_away(path):
    store = HostStore(path)
    with pytest.raises(StoreAway), store.transaction():
        pass
    with pytest.raises(StoreAway):
        store.wait(0)
    store.nudge()
    store.close()


# -- signs of life --------------------------------------------------------------------


@contextmanager
def member_process(path):
    """A process with an open store; yields it, its id, and a pipe to it."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=live, args=(path, theirs), daemon=True)
    process.start()
    member = ours.recv()
    try:
        yield process, member, ours
    finally:
        process.kill()
        process.join()


def live(path, pipe):
    store = HostStore(path)
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


def test_sign_stands_until_the_process_is_gone(make, path):
    store = make()
    with member_process(path) as (process, member, _):
        assert store.living([member, store.member, "nobody"]) == {member, store.member}
        os.kill(process.pid, signal.SIGSTOP)
        assert store.living([member]) == {member}
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert store.living([member]) == set()
        assert not list(path.parent.glob(f"*/{member}*"))


def test_closing_gives_the_sign_up(make, path):
    store = make()
    with member_process(path) as (_, member, pipe):
        pipe.send("close")
        assert pipe.recv() == "closed"
        assert store.living([member]) == set()


def test_forked_child_does_not_keep_its_parents_sign(make, path):
    store = make()
    with member_process(path) as (process, member, pipe):
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


def test_what_the_dead_left_without_a_row_is_removed(make, path):
    with member_process(path) as (process, member, _):
        process.kill()
        process.join()
    assert list(path.parent.glob(f"*/{member}*"))
    make()
    assert not list(path.parent.glob(f"*/{member}*"))


# -- bells ----------------------------------------------------------------------------


def test_bell_rings_in_another_process(make, path):
    store = make()
    with member_process(path) as (_, member, pipe):
        pipe.send("wait")
        assert pipe.recv() == "waiting"
        store.ring([member, "nobody"])
        assert pipe.recv() is True


def test_bell_that_rang_before_the_wait_is_heard_once(make):
    one, two = make(), make()
    for _ in range(5):
        one.ring([two.member])
    assert two.wait(0)
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


def test_schema_from_the_future_is_refused(make, path):
    make()
    with sqlite3.connect(path) as database:
        database.execute("pragma user_version = 99")
    database.close()
    with pytest.raises(LedgerError, match=r"schema version 99.* knows 1"):
        HostStore(path).open()


def test_file_that_is_no_ledger_is_refused(path):
    path.parent.mkdir()
    path.write_text("something else " * 100)
    with pytest.raises(LedgerError, match="is no ledger, or damaged"):
        HostStore(path).open()


def test_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="cannot be used"):
        HostStore(tmp_path).open()


def test_nobody_else_may_read_it(make, path):
    make()
    for file in (path, *path.parent.glob("*-wal"), *path.parent.glob("*/*")):
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


def test_default_place_follows_from_the_database(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    url = make_url(
        "postgresql+psycopg2://me:s3cret@db.example:5433/app?sslmode=require"
    )
    path = default_path(url)
    assert path.parent == tmp_path / "sqla-fairpool"
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


def test_default_place_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    url = make_url("postgresql://host/app")
    place = default_path(url).parent
    assert place == tmp_path / f"sqla-fairpool-{os.getuid()}"
    place.chmod(0o755)
    with pytest.raises(LedgerError, match="this user alone"):
        default_path(url)
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="this user alone"):
        default_path(url)


def test_sqlite_files_are_told_apart_by_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    named = default_path(make_url("sqlite:///x.db"))
    assert named == default_path(make_url(f"sqlite:///{tmp_path}/x.db"))
    assert named != default_path(make_url("sqlite:///y/x.db"))


@pytest.mark.parametrize("bad", ["hosts", "", "postgresql://u:s3cret@h/db", "name"])
def test_anything_else_is_refused_without_a_secret(bad):
    with pytest.raises(ArgumentError, match="ledger=") as caught:
        make_store(bad, make_url("postgresql://host/app"))
    assert "s3cret" not in str(caught.value)
