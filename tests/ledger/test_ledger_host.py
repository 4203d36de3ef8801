"""The host store: its lock, its file and what lies beside it, over real processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import sqlite3
import stat
import tempfile
import threading
from dataclasses import replace as changed
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from support.sampler import CAPACITY, Server
from support.stores import LONG, SUPPORT, join, rows_of, run, start, write
from support.threads import PATIENCE, eventually

from sqla_fairpool.ledger import host, host_file
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.host_file import LedgerFile
from sqla_fairpool.ledger.rows import Terms, member_key
from sqla_fairpool.ledger.store import LedgerError, StoreAway


@pytest.fixture
def make(make_host):
    return make_host


@pytest.fixture
def member(make):
    """Make open stores that have a row."""

    def member():
        store = make()
        join(store)
        return store

    return member


# -- transactions exclude each other ---------------------------------------------------


@pytest.mark.parametrize("how", ["stores", "used", "fresh", "threads"])
def test_no_slot_is_taken_twice(path, how):
    """Several stores in a process; workers forked before and after their parent's use
    of the store, and while threads are in transactions."""
    said = json.loads(run(SUPPORT / "slot_program.py", path, how))
    assert 1 < said["most"] <= 4
    assert said["turns"] > 800
    assert said["left"] == 0


def test_transaction_excludes_others_until_its_end(make, path, monkeypatch):
    monkeypatch.setattr(host_file, "_PATIENCE", 0.01)
    store, other, third = make(), make(), make()
    with store.transaction() as rows:
        rows["a"] = "1"
        path.read_bytes()  # that it is closed by any hand does not unlock it
        third.close()
        with pytest.raises(StoreAway, match="locked by another process"):
            rows_of(other)
        with pytest.raises(RuntimeError, match="in another one"):
            rows_of(store)
    assert rows_of(other) == {"a": "1"}


def hold(store, reached):
    with store.transaction():
        reached.touch()
        threading.Event().wait()


def test_nobody_waits_without_end_for_a_process_that_is_stopped(
    make, path, tmp_path, elsewhere, monkeypatch
):
    monkeypatch.setattr(host_file, "_PATIENCE", 0.1)
    store, other = make(), elsewhere(path)
    other.begin(hold, tmp_path / "locked")
    eventually((tmp_path / "locked").exists)
    os.kill(other.process.pid, signal.SIGSTOP)
    with pytest.raises(StoreAway, match="locked by another process"):
        rows_of(store)
    other.kill()
    assert rows_of(store) == {}


# -- forked children, and processes that are killed ------------------------------------

FORKS = {"python": os.fork, "library, which tells nobody": ctypes.PyDLL(None).fork}


def forked(child, how="python"):
    """Run a function in a child; return its pid."""
    pid = FORKS[how]()
    if not pid:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def opens_the_ledger_anew(store, how):
    mine = store.member

    def child():
        with contextlib.suppress(StoreAway):
            rows_of(store)
        store.open()
        write(store, **{store.member: "child"})

    assert os.waitpid(forked(child, how), 0)[1] == 0
    ((member, _),) = rows_of(store).items()
    assert member != mine == store.member
    assert store.in_place()
    assert store.living([mine, member]) == {mine}


def keeps_neither_the_lock_nor_the_sign(store, how):
    mine, other = store.member, HostStore(store.name)
    other.open()
    with store.transaction() as rows:
        rows["a"] = "1"
        child = forked(signal.pause, how)
    assert rows_of(other) == {"a": "1"}
    assert other.living([mine]) == {mine}
    store.close()
    assert other.living([mine]) == set()
    os.kill(child, signal.SIGKILL)


def neither_commits_nor_undoes_a_transaction(store, how):
    transaction = store.transaction()
    rows = transaction.__enter__()
    rows["a"] = "1"

    def child():
        with pytest.raises(StoreAway, match="closed in a transaction"):
            transaction.__exit__(None, None, None)

    assert os.waitpid(forked(child, how), 0)[1] == 0
    rows["b"] = "2"
    transaction.__exit__(None, None, None)
    assert rows_of(store) == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    ("child", "how"),
    [
        *product([opens_the_ledger_anew, keeps_neither_the_lock_nor_the_sign], FORKS),
        (neither_commits_nor_undoes_a_transaction, "python"),
    ],
)
def test_forked_child(path, elsewhere, child, how):
    elsewhere(path)(child, how)


def fork_in_a_transaction(store, child):
    with store.transaction() as rows:
        rows["a"] = "1"
        child.write_text(f"{forked(signal.pause)}\n")
        signal.pause()


def test_parent_killed_in_a_transaction_leaves_the_lock_to_others(
    make, path, tmp_path, elsewhere
):
    """Its child lives on, and has had the file of the lock open."""
    parent, child = elsewhere(path), tmp_path / "child"
    parent.begin(fork_in_a_transaction, child)
    eventually(lambda: child.exists() and child.read_text().endswith("\n"))
    parent.kill()
    assert rows_of(make()) == {}
    os.kill(int(child.read_text()), signal.SIGKILL)


def commit_and_be_killed(store):
    """Be killed when most of a commit is in the file."""
    database = store._file.database
    database.execute("pragma cache_size = 1")  # it is written before it is committed

    def kill(statement):
        if statement == "commit":
            os.kill(os.getpid(), signal.SIGKILL)

    database.set_trace_callback(kill)
    with store.transaction() as rows:
        rows.update({str(number): "new" * 1000 for number in range(100)})


def test_commit_that_was_cut_short_is_undone_by_the_next_process(make, path, elsewhere):
    store = make()
    rows = {str(number): "old" * 1000 for number in range(100)}
    with store.transaction() as there:
        there.update(rows)
    before = path.read_bytes()
    other = elsewhere(path)
    other.begin(commit_and_be_killed)
    other.process.join(PATIENCE)
    assert other.process.exitcode == -signal.SIGKILL
    assert path.read_bytes() != before
    assert Path(f"{path}-journal").stat().st_size
    assert rows_of(store) == rows
    assert path.read_bytes() == before
    assert rows_of(make()) == rows


# -- the file goes away ----------------------------------------------------------------


def replace(path):
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    copy.rename(path)


def remove_own(kind, path):
    for file in path.parent.glob(f"*/*{kind}"):
        file.unlink()


LOSSES = {
    "remove": Path.unlink,
    "replace": replace,
    "remove-directory": lambda path: shutil.rmtree(path.parent),
    "move-directory": lambda path: path.parent.rename(path.parent.with_name("moved")),
    "remove-signs": lambda path: shutil.rmtree(f"{path}.members"),
    "remove-own-sign": partial(remove_own, ".sign"),
    "remove-own-bell": partial(remove_own, ".bell"),
}

#: What may be called though there is no ledger any more.
ACTS = [
    *(lambda s, o: s.ring([o]), lambda s, o: s.ask([o]), lambda s, o: s.ring_all()),
    *(lambda s, o: s.nudge(), lambda s, o: s.wait(0), lambda s, o: s.living([o])),
    *(lambda s, o: s.published([o]), lambda s, o: s.publish("figures")),
    lambda s, o: s.strangers([]),
]


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_store_finds_out_that_its_ledger_was_replaced(member, path, lose):
    store, other, third = member(), member(), member()
    name = store.member
    assert store.in_place() and store.signed
    lose(path)
    for act in ACTS:
        with contextlib.suppress(StoreAway):
            act(third, other.member)
    third.close()
    while store.wait(0) or other.wait(0):
        pass
    assert not store.in_place()
    assert store.signed
    with pytest.raises(StoreAway, match=r"removed or replaced|sign of life"):
        rows_of(store)
    assert not store.signed
    for one in (store, other):
        if one is other:
            with pytest.raises(StoreAway):
                rows_of(one)
        one.open()
        assert one.in_place() and one.signed
        join(one)
    assert store.member == name
    both = {store.member, other.member}
    assert store.living(both) == other.living(both) == both
    assert rows_of(store).items() >= {member_key(m): "{}" for m in both}.items()
    assert rows_of(store) == rows_of(other)
    store.ring([other.member])
    assert other.wait(PATIENCE)


@pytest.mark.parametrize("name", ["remove", "remove-directory"])
def test_members_of_a_former_file_are_strangers_until_they_join(make, path, name):
    """So that whoever makes a new one sees that there are members of another."""
    store, other, looker = make(), make(), make()
    both = [store.member, other.member]
    assert looker.strangers([]) == 0  # they have no rows yet
    join(store)
    join(other)
    assert looker.strangers([]) == 2
    assert store.strangers(both) == 0
    assert store.strangers([]) == store.strangers([store.member]) == 1
    LOSSES[name](path)
    for one in (store, other):
        with pytest.raises(StoreAway):
            rows_of(one)
    other.open()
    if name == "remove":  # a sign stands while the file is replaced
        assert other.strangers([]) == 1
        assert other.living([store.member]) == {store.member}
    store.open()
    newcomer = make()
    assert newcomer.strangers([]) == 2
    assert newcomer.strangers([store.member]) == 1
    other.close()
    assert newcomer.strangers([store.member]) == 0


#: What is called between two steps of opening a ledger.
STEPS = [
    (host_file, "share"),
    (host, "share"),
    (Path, "rename"),
    (HostStore, "_use_directory"),
    (LedgerFile, "connect"),
    (LedgerFile, "_make_tables"),
    (HostStore, "_give_sign"),
]


@pytest.mark.parametrize(
    "lose", ["remove", "replace", "remove-directory", "remove-signs"]
)
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_newcomer_tries_again_when_the_ledger_vanishes_while_it_opens_it(
    path, monkeypatch, owner, name, lose
):
    store, do, times = HostStore(path), getattr(owner, name), []

    def first_lose(*args, **kwargs):
        times.append(1)
        if len(times) == 1:
            with contextlib.suppress(FileNotFoundError):  # it was not made yet
                LOSSES[lose](path)
        return do(*args, **kwargs)

    monkeypatch.setattr(owner, name, first_lose)
    store.open()
    monkeypatch.undo()
    assert times
    if not store.in_place():  # it was lost after the last look
        with pytest.raises(StoreAway):
            rows_of(store)
        store.open()
    join(store)
    assert store.in_place()
    store.close()


def test_ledger_that_vanishes_again_and_again_is_given_up(path, monkeypatch):
    do = HostStore._give_sign

    def lose(store, there):
        shutil.rmtree(path.parent)
        do(store, there)

    monkeypatch.setattr(HostStore, "_give_sign", lose)
    with pytest.raises(LedgerError, match="No such file"):
        HostStore(path).open()


def go_on(store, over):
    """Write a number that grows, then "last"; open what is there when it went away."""
    number, aways, value = 0, 0, "0"
    while value != "last":
        number += 1
        try:
            value = "last" if os.path.exists(over) else str(number)
            store.open()
            write(store, **{store.member: value})
        except StoreAway:
            aways += 1
            value = "0"
    return aways


def test_processes_meet_in_the_new_file_when_it_is_replaced_under_load(
    path, tmp_path, elsewhere, opened
):
    others = [elsewhere(path) for _ in range(2)]
    members = {other.member for other in others}
    for other in others:
        other.begin(go_on, tmp_path / "over")
    looker = opened(path)

    def both_write():
        try:
            looker.open()
            return len(rows_of(looker)) == 2
        except StoreAway:
            return False

    for name in ("remove", "remove-directory", "replace", "remove-signs") * 3:
        eventually(both_write, "two rows")
        if name == "replace":  # in one step: a copy in the middle of a commit is none
            with looker.transaction():
                replace(path)
        else:
            with contextlib.suppress(OSError):  # something was made there meanwhile
                LOSSES[name](path)
    eventually(both_write, "two rows")
    (tmp_path / "over").touch()
    assert all(other.result() for other in others)
    store = opened(path)
    assert rows_of(store).items() >= dict.fromkeys(members, "last").items()
    assert store.living(members) == members


@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_copy_that_is_put_back_keeps_only_what_is_still_so(make, path, how):
    """The terms and the dead, and not what the living had then."""
    store, other, terms = make(), make(), Terms(4, 2, 3, 60.0, 30.0)
    with store.transaction() as rows:
        for key in (store.member, other.member, "dead"):
            Book(rows).join(key, {}, terms)
        book = Book(rows)
        book.write("dead", changed(book.members["dead"], owned=2))
    book = Book(rows_of(other))
    assert (len(book.members), book.gone) == (3, {})
    copy, key = path.read_bytes(), store.key
    for commits in ("1", "2"):  # the second is as old as the last one when it is back
        write(store, a=commits)
        if how == "renamed":
            path.with_suffix(".copy").write_bytes(copy)
            path.with_suffix(".copy").rename(path)
        else:
            path.write_bytes(copy)
        for one in (store, other):
            with pytest.raises(StoreAway, match="replaced"):
                rows_of(one)
            assert not one.signed
            one.open()
        assert store.key == other.key != key
        book = Book(rows_of(store))
        assert book.terms == terms and book.is_fresh
        assert (book.members, book.quarantined) == ({}, 2)
        assert rows_of(store) == rows_of(other)


def test_newcomer_finds_that_a_copy_was_put_back(make, path):
    """Also if it is killed before it has told of it."""
    store = make()
    write(store, **{member_key("somebody"): "no row"})
    copy = path.read_bytes()
    write(store, a="1")
    path.write_bytes(copy)
    count = Path(f"{path}-count")
    noted = count.read_bytes()
    newcomer = make()
    assert rows_of(newcomer) == {}
    assert newcomer.key != store.key
    path.write_bytes(copy)
    count.write_bytes(noted)
    assert rows_of(make()) == {}


def test_file_that_was_emptied_in_place_is_a_new_ledger(make, path):
    store, other = make(), make()
    write(store, a="1")
    key = store.key
    os.truncate(path, 0)
    for one in (store, other):
        with pytest.raises(StoreAway, match="replaced"):
            rows_of(one)
        assert not one.signed
        one.open()
        assert rows_of(one) == {}
    assert store.key == other.key != key


# -- a file that is not as it should be ------------------------------------------------


def use(store):
    store.open()
    return rows_of(store)


def test_damage_under_members_is_an_error_until_it_is_mended(make, path):
    store, other = make(), make()
    copy = path.read_bytes()
    path.write_bytes(b"damage" * 2000)
    for one in (store, other) * 3:
        with pytest.raises((LedgerError, StoreAway)) as caught:
            use(one)
        assert "\n" not in str(caught.value)
    with pytest.raises(LedgerError, match="no ledger, or damaged"):
        store.open()
    path.write_bytes(copy)
    assert use(store) == use(other) == {}


@pytest.mark.parametrize("lives", [True, False])
def test_damaged_file_is_made_anew_only_when_no_member_lives(make, path, caplog, lives):
    store = make()
    with store.transaction() as rows:
        rows.update({str(number): "x" * 100 for number in range(200)})
    key = store.key
    if not lives:
        store.close()
    path.chmod(0o660)
    damaged = path.read_bytes()
    damaged = damaged[:4096] + b"\xff" * len(damaged[4096:])  # as a power cut may
    path.write_bytes(damaged)
    if lives:
        with pytest.raises(LedgerError, match="damaged") as caught:
            make()
        assert "\n" not in str(caught.value)
        assert not Path(f"{path}.damaged").exists()
        return
    store.open()
    assert rows_of(store) == {}
    assert store.key != key
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert Path(f"{path}.damaged").read_bytes() == damaged
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "no member lives: it is made anew" in warning
    assert "\n" not in warning


A_ROW = "create table row (key text primary key, value text) without rowid"
NEWER = f"pragma user_version = {host_file.SCHEMA + 1}"


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        (None, "is no ledger"),
        (["create table x (y)"], "a database of something else"),
        ([A_ROW], "a database of something else"),
        ([A_ROW, NEWER], "runs an older"),
        ([A_ROW, "pragma user_version = 1"], "is of an older"),
        (
            ["pragma journal_mode = wal", A_ROW, "pragma user_version = 1"],
            "is of an older",
        ),
    ],
)
def test_what_is_no_ledger_of_this_version_is_refused_and_left_alone(
    path, statements, words
):
    if statements is None:
        path.write_text("no database " * 1000)
    else:
        with contextlib.closing(sqlite3.connect(path)) as made:
            made.executescript(";".join(statements))
    before = path.read_bytes()
    for _ in range(3):  # as a keeper does
        with pytest.raises(LedgerError, match=words) as caught:
            HostStore(path).open()
        assert str(path) in str(caught.value)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("suffix", ["", "-journal", "-count"])
def test_fifo_in_the_place_of_a_file_is_refused(path, suffix):
    os.mkfifo(f"{path}{suffix}")
    with pytest.raises(LedgerError, match="is not a file"):
        HostStore(path).open()


@pytest.mark.parametrize("kind", [".sign", ".bell", ".figures", ".new", ".said"])
@pytest.mark.parametrize("what", ["fifo", "directory", "link", "file"])
def test_nobody_hangs_by_what_lies_among_the_signs(make, kind, what):
    store = make()
    strange = store._members / f"strange{kind}"
    if what == "link":
        os.mkfifo(store._members / "x")
        strange.symlink_to("x")
    else:
        {"fifo": os.mkfifo, "directory": Path.mkdir, "file": Path.touch}[what](strange)
    assert store.living(["strange"]) == set()
    assert store.strangers([]) == 0
    store.ring(["strange"])
    store.ask(["strange"])
    store.ring_all()
    store.published(["strange"])
    make()
    assert what == "directory" or not os.path.lexists(strange)


def test_who_cannot_be_looked_at_is_not_taken_for_dead(make, monkeypatch):
    store, other = make(), make()
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def fail(path):
        raise error

    monkeypatch.setattr(host, "_open_regular", fail)
    with pytest.raises(StoreAway, match="open files"):
        store.living([other.member])
    error = PermissionError()
    assert store.living([other.member]) == {other.member}


def test_what_dead_processes_left_without_a_row_is_removed(make, path, elsewhere):
    other = elsewhere(path)
    other.kill()
    assert list(path.parent.glob(f"*/{other.member}*"))
    make()
    assert not list(path.parent.glob(f"*/{other.member}*"))


def test_place_that_cannot_be_written_is_refused(make, tmp_path):
    with pytest.raises(LedgerError, match="cannot be used"):
        HostStore(tmp_path).open()
    store = make()
    store._members = store._members / "nowhere"
    with pytest.raises(StoreAway):
        store.publish("x")


# -- several users ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "file_mode", "mode"), [(None, 0o600, 0o700), (0o660, 0o660, 0o770)]
)
def test_nobody_else_may_read_it_unless_an_operator_lets_a_group(
    make, path, given, file_mode, mode
):
    if given is not None:
        path.touch()
        path.chmod(given)
    store = make()
    files = [path, Path(f"{path}-journal"), *store._members.iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {file_mode}
    assert len(files) == 4
    assert stat.S_IMODE(store._members.stat().st_mode) == mode


GROUP, USERS = 54321, (54001, 54002)

needs_root = pytest.mark.skipif(
    os.name == "nt" or os.getuid() != 0, reason="only root can be several users"
)


@pytest.fixture
def shared():
    """A ledger that was made for a group, as the deployment guide says."""
    # Not below pytest's own directory, which other sessions close to other users.
    top = Path(tempfile.mkdtemp(prefix="fairpool-test-"))
    top.chmod(0o711)
    path = top / "run" / "app.ledger"
    path.parent.mkdir()
    path.touch()
    for made, mode in ((path.parent, 0o2770), (path, 0o660)):
        os.chown(made, 0, GROUP)
        made.chmod(mode)
    yield path
    shutil.rmtree(top)


def become(user):
    os.umask(0o077)
    os.setgroups([GROUP])
    os.setgid(user)
    os.setuid(user)


def appear(store):
    join(store)
    store.publish(str(os.getuid()))


def look(store):
    others = [key.partition("/")[2] for key in rows_of(store)]
    store.ring_all()
    return store.living(others), set(store.published(others).values())


@needs_root
@pytest.mark.parametrize("mode", [0o2770, 0o770])
def test_several_users_share_a_ledger(shared, mode, opened, elsewhere):
    shared.parent.chmod(mode)
    others = [elsewhere(shared, partial(become, user)) for user in USERS]
    members = {other.member for other in others}
    for other in others:
        other(appear)
    root = opened(shared)
    root.publish("0")
    for other in others:
        assert other(look) == (members, set(map(str, USERS)))
    assert root.living(members) == root.published(members).keys() == members
    others[0].kill()
    assert root.living(members) == {others[1].member}
    root.close()
    assert others[1](look) == ({others[1].member}, {str(USERS[1])})


@needs_root
def test_what_root_leaves_is_the_owners(path):
    """An operator who looks at the ledger of a service."""
    store = HostStore(path)
    path.touch(0o600)
    os.chown(path, USERS[0], GROUP)
    store.open()
    store.publish("x")
    files = [path, store._members, Path(f"{path}-journal"), *store._members.iterdir()]
    assert len(files) == 6
    assert {(f.stat().st_uid, f.stat().st_gid) for f in files} == {(USERS[0], GROUP)}
    store.close()


# -- engines, at a real server ---------------------------------------------------------


@pytest.mark.postgres
@pytest.mark.slow
def test_members_that_come_and_go_in_every_way_keep_to_the_capacity(postgres_url, path):
    """Two engines in a process, observers, the command, forked workers; in turns."""
    server = Server(postgres_url)
    url = server.url.render_as_string(hide_password=False)
    program = "scraper_program.py", url, path
    steadies = [start(*program, name, 8, 0.02) for name in ("one", "two")]
    ways = {"fresh": 4, "observer": 1, "used": 4, "threads": 26, "engines": 1}
    try:
        for how, number in ways.items():
            said = run(SUPPORT / "member_program.py", url, path, how)
            assert said.split() == ["done"] * number
            said = run("-m", "sqla_fairpool", "ledger", "show", "--ledger", path)
            assert "20 slots: " in said
    finally:
        for process in steadies:
            _, errors = process.communicate(timeout=LONG)
            assert process.returncode == 0, errors
        server.close()
    assert server.looks > 10
    assert CAPACITY / 2 < server.most <= CAPACITY
