"""``sqla-fairpool ledger``: what an operator sees and does."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool
from support import state
from support.stub import StubServer
from support.threads import eventually

from sqla_fairpool import CheckoutTimeout
from sqla_fairpool.cli import main
from sqla_fairpool.cli.server import ask_room, connected
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.rows import Meta, Terms
from sqla_fairpool.ledger.watch import identify

TERMS = Terms(20, 10, 15, 60.0, 30.0)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The path of a ledger, which the environment names; it names no database."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    path = str(tmp_path / "app.ledger")
    monkeypatch.setenv("FAIRPOOL_LEDGER", path)
    return path


@pytest.fixture
def run(capsys, path):
    """Run a command on the ledger; return its status and what it printed."""

    def run(*args):
        status = main(["ledger", *map(str, args)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def fails(run):
    """Run a command that cannot do its work; return the one line that it says."""

    def fails(*args, status=2):
        found, out, err = run(*args)
        assert (found, out, err.count("\n")) == (status, "", 1)
        assert "s3cret" not in err
        return err

    return fails


@pytest.fixture
def member(path):
    """A pool of this process that has three connections out."""
    engine = StubServer().engine(ledger=path).execution_options(scraper="layer\u00e93")
    held = [engine.connect() for _ in range(3)]
    keeper = state.keeper(engine)
    eventually(lambda: (has := keeper.member.allotment) and has.row.owned == 3)
    yield engine
    for connection in held:
        connection.close()
    engine.dispose()
    keeper.close()


@contextmanager
def rows_of(path):
    """Change a ledger's rows."""
    with closing(HostStore(path)) as store:
        store.open()
        with store.transaction() as rows:
            yield rows


def test_limits_are_set_for_all_members(run, fails, member, path, tmp_path):
    before = "capacity=20 soft_limit=10 max_limit=15 idle_timeout=60 tags={}"
    (tmp_path / "tags.json").write_text('{"api": {"weight": 3}}')
    status, out, _ = run(
        "set",
        *("--ledger", path, "pool_size=30", "idle_timeout=5"),
        f"tags=@{tmp_path}/tags.json",
    )
    found, _, now = out.strip().partition(" -> ")
    assert (status, found) == (0, before)
    assert now.startswith("capacity=30 soft_limit=15 max_limit=23 idle_timeout=5 tags=")
    assert "limits set by " in run("show", "--ledger", path)[1]
    status, out, _ = run("set", "--ledger", path, "pool_size=30")
    assert (status, out) == (0, "the limits are as they were\n")
    said = fails("set", "--ledger", path, "timeout=3")
    assert "timeout is none of a ledger's limits: pool_size, soft_limit, " in said
    assert "max_limit='99' is not allowed" in fails(
        "set", "--ledger", path, "max_limit=99"
    )
    assert run("show", "--ledger", path)[1].splitlines()[1].startswith("30 slots: ")


def test_pause_waits_until_nothing_is_out_and_all_is_served_after_resume(
    run, fails, path
):
    assert "there is no ledger at" in fails("pause")
    engine = StubServer().engine(ledger=path)
    held = engine.execution_options(scraper="api").connect()
    assert run("pause") == (0, "paused\n", "")
    eventually(lambda: engine.pool.stats().paused_for is not None)
    status, out, _ = run("pause", "--wait", 0.05)
    assert status == 1
    assert re.fullmatch(
        r"it is paused already\n.* \(.*:\d+\) uses 1 under 'api'\n", out
    )
    assert run("pause", "--tag", "x")[1] == "paused; paused beside it: all\n"
    with pytest.raises(CheckoutTimeout) as caught:
        engine.execution_options(fairpool_timeout=0.05).connect()
    assert re.search(
        r"pool paused in_use=1/.*; advice: the ledger is paused since 20\S+ by \S+ "
        r"\(\S+:\d+\), and serves again after `sqla-fairpool ledger resume`",
        str(caught.value),
    )
    eventually(lambda: engine.pool.stats().paused_tags == ("x",))
    assert engine.pool.stats().paused_by.startswith("20")
    shown = run("show")[1]
    assert "\nPAUSED, since 20" in shown and "\nPAUSED, tag 'x', since 20" in shown
    assert json.loads(run("show", "--json")[1])["paused"].keys() == {"", "x"}
    held.detach()
    assert "uses 1 outside of its pool\n" in run("pause", "--wait", 0.05)[1]
    held.close()
    assert run("pause", "--wait", 30)[:2] == (
        0,
        "it is paused already; paused beside it: tag 'x'\nnothing is out\n",
    )
    assert run("resume")[1] == "resumed; paused beside it: tag 'x'\n"
    engine.connect().close()
    assert run("resume")[1] == "it is resumed already; paused beside it: tag 'x'\n"
    assert run("resume", "--tag", "x")[1] == "resumed\n"
    for wrong in (("--wait", "-1"), ("--wait", "nan"), ("--tag", "")):
        assert f"{wrong[0]}=" in fails("pause", *wrong)
    engine.dispose()
    state.keeper(engine).close()


def test_pause_waits_for_what_a_dead_member_has_left(run, left):
    engine = StubServer().engine(ledger=left)
    engine.connect().close()  # a member that cannot ask the server either
    status, out, _ = run("pause", "--wait", 0.05)
    assert (status, out[:7]) == (1, "paused\n")
    assert "2 slots in quarantine: -c (" in out and " died\n" in out
    assert run("resume")[0] == 0
    engine.connect().close()
    engine.dispose()
    state.keeper(engine).close()


def test_show_and_that_a_reset_is_refused_while_a_member_lives(
    run, fails, member, path
):
    status, out, _ = run("show", "--ledger", path)
    first, second, set_by, who, tag = out.splitlines()
    assert status == 0
    assert set_by.startswith("limits set by ")
    assert first == f"ledger {path}"
    assert second.startswith("20 slots: 3 owned by 1 member, 0 in quarantine, 17 free")
    assert f":{os.getpid()}, since 20" in who
    assert who.endswith(": 3 slots")
    assert tag.startswith("    'layer\u00e93' ")
    report = json.loads(run("show", "--json")[1])
    assert (report["capacity"], report["owned"], report["free"]) == (20, 3, 17)
    assert report["members"][0]["alive"] is True
    assert report["members"][0]["tags"][0]["tag"] == "layer\u00e93"
    assert "1 member alive" in fails("reset", "--yes")


def test_show_says_why_sessions_cannot_be_asked_for(run, path):
    with rows_of(path) as rows:
        book = Book(rows)
        book.join("x", {"pid": 4711, "program": "\x1b[2J"}, TERMS)
        why = "OperationalError: no way to postgresql://u:s3cret@h/d"
        book.write("x", replace(book.members["x"], unasked=why))
    out = run("show")[1]
    assert (
        "the server cannot be asked for sessions, so that each quarantine takes its "
        "stated time: OperationalError: no way to postgresql://u:***@h/d\n"
    ) in out
    assert "\\x1b[2J (" in out and "\x1b" not in out
    report = json.loads(run("show", "--json")[1])
    assert report["unasked"].startswith("OperationalError: ")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--ledger=nonsense"], "ledger='nonsense' is not allowed"),
        (["--ledger=/nowhere/x.ledger"], "there is no ledger at /nowhere/x.ledger"),
        (["--ledger=mysql://u:s3cret@h/d"], "a PostgreSQL database"),
        (["--ledger=none"], "there is no ledger to look at"),
        (["--ledger=postgresql://h:port/d"], "is not allowed: 'host' (a file"),
        (["--url=no url"], "--url='...' is not allowed"),
    ],
)
def test_a_ledger_that_is_none(fails, args, says):
    assert says in fails("show", *args)


def test_the_only_ledger_is_meant_or_the_only_one_in_use(
    run, fails, capsys, temp, monkeypatch, path
):
    """Also by ``stats``."""
    monkeypatch.delenv("FAIRPOOL_LEDGER")
    assert "no process has used a ledger here yet" in fails("show")
    folder = temp / f"sqla-fairpool-{os.getuid()}"
    old, older, used = (folder / f"{name}.ledger" for name in ("old", "older", "used"))
    for file in (old, older):
        file.touch()
    said = f"there are 2 ledgers, give --url or --ledger PATH:\n  {old}\n  {older}\n"
    for command in (["ledger", "show"], ["stats"]):
        assert main(command) == 2
        assert capsys.readouterr().err == f"sqla-fairpool {command[0]}: {said}"
    older.unlink()
    assert f"the ledger {old} is empty" in fails("show")
    engine = StubServer().engine(ledger=str(used))
    with engine.execution_options(scraper="a").connect():
        assert run("show")[1].startswith(f"ledger {used}\n")
        assert main(["stats"]) == 0
        out, err = capsys.readouterr()
        assert f"ledger {used}\n" in out and "\na " in out and not err
    engine.dispose()
    state.keeper(engine).close()


# -- reset and reap --------------------------------------------------------------------


@pytest.fixture
def left(path):
    """A ledger with a member that was killed: two connections."""
    program = (
        "import os, sys\n"
        f"sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})\n"
        "from support.stub import StubServer\n"
        f"engine = StubServer().engine(ledger={path!r})\n"
        "held = [engine.connect(), engine.connect()]\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program])
    assert killed.returncode == -signal.SIGKILL
    return path


def test_reset_asks_first(run, left, monkeypatch):
    def answer(said):
        if said is None:
            raise EOFError  # as with </dev/null
        return said

    for said in (None, "n"):
        monkeypatch.setattr("builtins.input", lambda question, said=said: answer(said))
        status, out, err = run("reset")
        assert (status, out.strip(), err) == (1, "nothing done", "")
        assert "has ended: 2 slots free for whoever comes next" in run("show")[1]
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert run("reset")[:2] == (0, "done\n")
    assert ": 0 owned by 0 members" in run("show")[1]


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("meta", "nonsense"),
        ("meta", "[]"),
        ("meta", '{"protocol": 3}'),
        ("member/x", "{"),
        ("member/x", "{}"),
        ("gone/1", "null"),
        ("gone/x", "{}"),
        ("tags", "7"),
    ],
)
def test_a_broken_row_is_one_line_and_reset_mends_it(run, fails, path, key, row):
    with rows_of(path) as rows:
        book = Book(rows)
        book.join("y", {"pid": 4711}, TERMS)
        rows[key] = row
    for command in ("show", "reap"):
        err = fails(command, status=1)
        assert err.startswith(f"sqla-fairpool ledger: {path}: the ledger's row {key!r}")
        assert "`sqla-fairpool ledger reset`" in err
    assert run("reset", "--yes")[:2] == (0, "done\n")
    engine = StubServer().engine(ledger=path)
    engine.connect().close()
    engine.dispose()
    state.keeper(engine).close()


def test_reap_keeps_what_the_server_cannot_be_asked_about(run, left):
    assert run("reap")[:2] == (
        1,
        "1 dead found, 0 slots freed\n2 slots left in quarantine: without --url of a "
        "PostgreSQL the server cannot be asked\n",
    )
    assert "has ended: 2 slots free for whoever comes next" in run("show")[1]


@pytest.fixture
def dead(postgres_role, path):
    """A dead member with three slots; the URL and two sessions posted by it."""
    url = postgres_role()
    engine = create_engine(url, poolclass=NullPool)
    held = [engine.connect() for _ in range(2)]
    found = [identify(one.connection.cursor(), None) for one in held]
    with rows_of(path) as rows:
        book = Book(rows)
        book.join("x", {"pid": 4711}, TERMS, server=found[0][0])
        sessions = tuple(sorted(session for _, session, _ in found))
        book.write("x", replace(book.members["x"], owned=3, sessions=sessions))
        book.confirm(["x"])
        book.tell(book.allocation())
    yield make_url(url), held
    for one in held:
        one.close()
    engine.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("database", [None, "template1"])
def test_reap_frees_what_no_session_has_on_the_server_in_any_database(
    run, dead, database
):
    url, held = dead
    url = url.set(database=database or url.database)

    def reap():
        return run("reap", "--url", url.render_as_string(hide_password=False))

    assert reap()[:2] == (
        1,
        "1 dead found, 1 slot freed\n"
        "2 slots left in quarantine: their sessions live on the server\n",
    )
    assert "2 slots in quarantine: ? (?:4711) died" in run("show")[1]
    held[0].close()
    eventually(lambda: "0 dead found, 1 slot freed" in reap()[1])
    held[1].close()
    eventually(lambda: reap()[0] == 0)
    assert "20 free" in run("show")[1]


@pytest.mark.postgres
def test_reap_keeps_what_it_cannot_tell(run, fails, dead, path):
    """The slot of a session that was not posted, and all by another server's URL."""
    url, held = dead
    args = ("reap", "--url", url.render_as_string(hide_password=False))
    with rows_of(path) as rows:
        meta = rows["meta"]
        rows["meta"] = Meta(TERMS, 9, 9, "postgresql 42").text
    said = "the members' sessions are on postgresql 42: give the URL of their"
    assert said in fails(*args)
    assert "has ended without leaving: 3 slots free" in run("show")[1]
    with rows_of(path) as rows:
        rows["meta"] = meta
    with held[0].engine.connect() as more:
        more.execute(text("select 1"))
        out = run(*args)[1]
        assert out.startswith("1 dead found, 0 slots freed\n3 slots left in")


@pytest.mark.postgres
def test_reap_that_the_server_does_not_help(
    run, fails, left, postgres_url, monkeypatch
):
    args = ("reap", "--url", postgres_url)
    assert run(*args)[:2] == (
        1,
        "1 dead found, 0 slots freed\n2 slots left in quarantine: no member has said "
        "on which server its sessions are\n",
    )
    look = "sqla_fairpool.cli.ledger_pause.look"
    monkeypatch.setattr(look, lambda cursor: cursor.execute("select 1/0"))
    assert "the server cannot be asked: division by zero" in fails(*args)


# -- limit ----------------------------------------------------------------------------


@pytest.fixture
def operator(postgres_url):
    """The operator's connection."""
    engine = create_engine(
        postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    with engine.connect() as connection:
        yield connection


ASKING = "to ask for sessions of lost members, one for each process"
OTHER = "3 control connections, one for each process and of another role, "


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("ledger", "control", "tools", "total", "of_role"),
    [
        ("host", "", 2, 25, 25),
        ("none", "", 2, 25, 25),
        ("database", "3 control connections, one for each process, ", 4, 30, 30),
        ("another", OTHER, 4, 30, 25),
        ("postgresql://other.example/d", "", 2, 25, 25),
    ],
)
def test_limit_that_fits_is_printed(
    run, postgres_role, ledger, control, tools, total, of_role
):
    """With room for what a ledger in the server needs."""
    url = postgres_role()
    if ledger == "another":
        ledger = re.sub("lim(%20| )ited", "another", url)
    args = ("--url", url, "--connections", 20, "--processes", 3, "--ledger", ledger)
    needed = (
        f"20 of the pools, {control}3 {ASKING}, {tools} for a monitor and a command"
    )
    assert run("limit", *args)[:2] == (
        0,
        f"{total} connections are needed: {needed}\nthey fit\nto have the server hold "
        f'it: ALTER ROLE "lim ited" CONNECTION LIMIT {of_role}\n',
    )


@pytest.mark.postgres
def test_limit_that_does_not_fit(run, postgres_role, operator, postgres_url):
    args = ("limit", "--url", postgres_role(), "--ledger", "host", "--connections")
    status, out, _ = run(*args, 9000)
    assuming, _, problem, _ = out.splitlines()
    assert status == 1
    assert assuming.startswith("assuming 9000 processes, as many as connections: see")
    assert problem.startswith("18002 connections do not fit: max_connections is ")
    operator.execute(text('alter role "lim ited" connection limit 3'))
    status, out, _ = run(*args, 20)
    said = "the role 'lim ited' may have 3 connections only, and 42 are needed"
    assert (status, out.splitlines()[-2]) == (1, said)
    out = run("limit", "--url", postgres_url, "--connections", 5)[1]
    assert "is a superuser: no limit binds it" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--url=postgresql://h/d", "--connections=0"], "--connections: 0 is not a nu"),
        (["--url=postgresql://h/d", "--processes=0"], "--processes: 0 is not a numbe"),
        (["--url", "sqlite://"], "--url of a PostgreSQL database is needed"),
        (["--url", "no url"], "--url='...' is not allowed"),
    ],
)
def test_limit_of_nothing_or_of_no_postgresql_is_refused(fails, args, says):
    assert says in fails("limit", *args)


@pytest.mark.postgres
def test_sessions_of_others_count_though_a_role_may_not_see_what_they_are(
    postgres_role, operator
):
    url = make_url(postgres_role())

    def others():
        with connected(url) as connection:
            return ask_room(connection).others

    before = others()
    with operator.engine.connect():
        assert others() == before + 1


@pytest.mark.postgres
def test_limit_of_the_ledgers_capacity_is_set(run, member, operator, postgres_url):
    limit = "select rolconnlimit from pg_roles where rolname = current_user"
    try:
        out = run("limit", "--url", postgres_url, "--run")[1]
        assert "done: ALTER ROLE " in out
        # One member lives, which asks by one more; and two for tools.
        assert operator.scalar(text(limit)) == 23
    finally:
        operator.execute(text("alter role current_user connection limit -1"))
