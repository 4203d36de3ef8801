"""``sqla-fairpool ledger``: what an operator sees and does."""

from __future__ import annotations

import json
import os
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

from sqla_fairpool.cli import main
from sqla_fairpool.cli.budget import ask_room, connected
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.rows import Meta, Terms
from sqla_fairpool.ledger.watch import identify

TERMS = Terms(20, 10, 15, 60.0, 30.0)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The path of a ledger, and no database in the environment."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    return str(tmp_path / "app.ledger")


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


def run(capsys, *args):
    """Run a command; return its status and what it printed."""
    status = main(["ledger", *map(str, args)])
    return status, *capsys.readouterr()


def test_show(capsys, member, path):
    status, out, _ = run(capsys, "show", "--ledger", path)
    first, second, who, tag = out.splitlines()
    assert status == 0
    assert first == f"ledger {path}"
    assert second.startswith("20 slots: 3 owned by 1 members, 0 in quarantine, 17 free")
    assert f":{os.getpid()}, since 20" in who
    assert who.endswith(": 3 slots")
    assert tag.startswith("    'layer\u00e93' ")


def test_show_says_why_sessions_cannot_be_asked_for(capsys, path):
    with rows_of(path) as rows:
        book = Book(rows)
        book.join("x", {"pid": 4711}, TERMS)
        why = "OperationalError: no way to postgresql://u:s3cret@h/d"
        book.write("x", replace(book.members["x"], unasked=why))
    _, out, _ = run(capsys, "show", "--ledger", path)
    assert (
        "the server cannot be asked for sessions, so that each quarantine takes its "
        "stated time: OperationalError: no way to postgresql://u:***@h/d\n"
    ) in out
    _, out, _ = run(capsys, "show", "--ledger", path, "--json")
    assert json.loads(out)["unasked"].startswith("OperationalError: ")


def test_show_for_programs(capsys, member, path, monkeypatch):
    monkeypatch.setenv("FAIRPOOL_LEDGER", path)
    _, out, _ = run(capsys, "show", "--json")
    report = json.loads(out)
    assert (report["capacity"], report["owned"], report["free"]) == (20, 3, 17)
    assert report["members"][0]["alive"] is True
    assert report["members"][0]["tags"][0]["tag"] == "layer\u00e93"


@pytest.mark.parametrize(
    ("ledger", "says"),
    [
        ("nonsense", "ledger='nonsense' is not allowed"),
        ("/nowhere/x.ledger", "there is no ledger at /nowhere/x.ledger"),
        ("host", "a path, where no URL says which database"),
        ("mysql://u:s3cret@h/d", "a PostgreSQL database"),
    ],
)
def test_ledger_that_is_none(capsys, path, ledger, says):
    status, out, err = run(capsys, "show", "--ledger", ledger)
    assert (status, out) == (2, "")
    assert says in err and "s3cret" not in err


def test_reset_is_refused_while_a_member_lives(capsys, member, path):
    status, _, err = run(capsys, "reset", "--ledger", path, "--yes")
    assert status == 2
    assert "1 members live" in err


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


def test_reset_asks_first(capsys, left, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert run(capsys, "reset", "--ledger", left)[:2] == (1, "nothing done\n")
    assert "DEAD: 2 slots" in run(capsys, "show", "--ledger", left)[1]
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert run(capsys, "reset", "--ledger", left)[:2] == (0, "done\n")
    assert ": 0 owned by 0 members" in run(capsys, "show", "--ledger", left)[1]


def test_reap_keeps_what_the_server_cannot_be_asked_about(capsys, left):
    status, out, _ = run(capsys, "reap", "--ledger", left)
    assert status == 1
    assert out.splitlines() == [
        "1 dead found, 0 slots freed",
        "2 slots stay in quarantine: without --url of a PostgreSQL the server cannot "
        "be asked",
    ]
    assert "2 in quarantine, died" in run(capsys, "show", "--ledger", left)[1]


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
        sessions = tuple(sorted(session for _, session in found))
        book.write("x", replace(book.members["x"], owned=3, sessions=sessions))
        book.confirm(["x"])
        book.tell(book.allocation())
    yield url, held
    for one in held:
        one.close()
    engine.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("database", [None, "template1"])
def test_reap_frees_what_no_session_has_on_the_server_in_any_database(
    capsys, dead, path, database
):
    url, held = dead
    url = make_url(url)
    url = url.set(database=database or url.database)

    def reap():
        text = url.render_as_string(hide_password=False)
        return run(capsys, "reap", "--ledger", path, "--url", text)

    assert reap()[:2] == (
        1,
        "1 dead found, 1 slots freed\n"
        "2 slots stay in quarantine: their sessions live on the server\n",
    )
    shown = run(capsys, "show", "--ledger", path)[1]
    assert ": 2 in quarantine, died; 2 sessions are known" in shown
    held[0].close()
    eventually(lambda: "0 dead found, 1 slots freed" in reap()[1])
    held[1].close()
    eventually(lambda: reap()[0] == 0)
    assert "20 free" in run(capsys, "show", "--ledger", path)[1]


@pytest.mark.postgres
def test_reap_keeps_what_it_cannot_tell(capsys, dead, path):
    """The slot of a session that was not posted, and all by another server's URL."""
    url, held = dead
    args = ("reap", "--ledger", path, "--url", url)
    with rows_of(path) as rows:
        meta = rows["meta"]
        rows["meta"] = Meta(TERMS, 9, 9, "postgresql 42").text
    status, out, err = run(capsys, *args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "the members' sessions are on postgresql 42: give the URL of their" in err
    assert "DEAD: 3 slots" in run(capsys, "show", "--ledger", path)[1]
    with rows_of(path) as rows:
        rows["meta"] = meta
    with held[0].engine.connect() as more:
        more.execute(text("select 1"))
        _, out, _ = run(capsys, *args)
        assert out.startswith("1 dead found, 0 slots freed\n3 slots stay in")


@pytest.mark.postgres
def test_reap_that_the_server_does_not_help(capsys, left, postgres_url, monkeypatch):
    args = ("reap", "--ledger", left, "--url", postgres_url)
    status, out, _ = run(capsys, *args)
    assert status == 1
    none = "no member has said on which server its sessions are"
    slots = f"2 slots stay in quarantine: {none}"
    assert out.splitlines() == ["1 dead found, 0 slots freed", slots]
    look = "sqla_fairpool.cli.ledger.look"
    monkeypatch.setattr(look, lambda cursor: cursor.execute("select 1/0"))
    status, out, err = run(capsys, *args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "the server cannot be asked: division by zero" in err


# -- rows that cannot be read ---------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("meta", "nonsense"),
        ("meta", "[]"),
        ("meta", '{"protocol": 2}'),
        ("member/x", "{"),
        ("member/x", "{}"),
        ("gone/1", "null"),
        ("gone/x", "{}"),
        ("tags", "7"),
    ],
)
def test_broken_row_is_one_line_and_reset_mends_it(capsys, left, key, row):
    with rows_of(left) as rows:
        rows[key] = row
    for command in ("show", "reap"):
        status, out, err = run(capsys, command, "--ledger", left)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"sqla-fairpool ledger: {left}: the ledger's row {key!r}")
        assert "`sqla-fairpool ledger reset`" in err
    assert run(capsys, "reset", "--ledger", left, "--yes")[:2] == (0, "done\n")
    assert "cannot be read" not in run(capsys, "show", "--ledger", left)[2]
    engine = StubServer().engine(ledger=left)
    engine.connect().close()
    engine.dispose()
    state.keeper(engine).close()


# -- limit ----------------------------------------------------------------------------


@pytest.fixture
def operator(postgres_url):
    """The operator's connection."""
    engine = create_engine(
        postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    with engine.connect() as connection:
        yield connection


@pytest.fixture
def limit(capsys, postgres_role):
    """Check a budget of 20 connections, as an ordinary role."""
    url = postgres_role()

    def limit(*args):
        args = ("--url", url, "--connections", 20, *args)
        status, out, _ = run(capsys, "limit", *args)
        return status, out.splitlines()

    limit.url = url
    return limit


ASKING = "to ask for sessions of lost members, one for each process"


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("ledger", "control", "tools", "of_role"),
    [
        ("host", "", 2, 25),
        ("database", "3 control connections, one for each process, ", 4, 30),
    ],
)
def test_limit_that_fits_is_printed(limit, ledger, control, tools, of_role):
    """With room for what a ledger in the server needs."""
    needed = (
        f"20 of the pools, {control}3 {ASKING}, {tools} for a monitor and a command"
    )
    assert limit("--processes", 3, "--ledger", ledger) == (
        0,
        [
            f"{25 if ledger == 'host' else 30} connections are needed: {needed}",
            "they fit",
            "to have the server hold it: "
            f'ALTER ROLE "lim ited" CONNECTION LIMIT {of_role}',
        ],
    )


@pytest.mark.postgres
def test_limit_with_a_ledger_of_another_role_or_server(limit):
    other = limit.url.replace("lim%20ited", "another").replace("lim ited", "another")
    _, out = limit("--processes", 3, "--ledger", other)
    assert "3 control connections, one for each process and of another role, " in out[0]
    assert out[-1].endswith("CONNECTION LIMIT 25")
    _, out = limit("--processes", 3, "--ledger", "postgresql://other.example/d")
    assert out[-1].endswith("CONNECTION LIMIT 25")
    assert limit("--ledger", "postgresql://h:port/d")[0] == 2


@pytest.mark.postgres
def test_limit_that_does_not_fit(capsys, limit, operator, postgres_url):
    status, (assuming, _, problem, _) = limit("--connections", 9000)
    assert status == 1
    assert assuming.startswith("assuming 9000 processes, as many as connections: see")
    assert problem.startswith("18002 connections do not fit: max_connections is ")
    operator.execute(text('alter role "lim ited" connection limit 3'))
    status, (*_, problem, _) = limit()
    assert status == 1
    assert problem == (
        "the role 'lim ited' may have 3 connections only, and 42 are needed"
    )
    _, out, _ = run(capsys, "limit", "--url", postgres_url, "--connections", 5)
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
def test_limit_of_nothing_or_of_no_postgresql_is_refused(capsys, args, says):
    status, _, err = run(capsys, "limit", *args)
    assert status == 2
    assert says in err


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
def test_limit_of_the_ledgers_capacity_is_set(
    capsys, member, path, operator, postgres_url
):
    limit = "select rolconnlimit from pg_roles where rolname = current_user"
    args = ("limit", "--ledger", path, "--url", postgres_url, "--run")
    try:
        _, out, _ = run(capsys, *args)
        assert "done: ALTER ROLE " in out
        # One member lives, which asks by one more; and two for tools.
        assert operator.scalar(text(limit)) == 23
    finally:
        operator.execute(text("alter role current_user connection limit -1"))
