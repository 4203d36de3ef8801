"""What a PostgreSQL says of the members of a ledger."""

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine, make_url, text
from support.overviews import overview, process
from support.threads import eventually

from sqla_fairpool.cli.server import (
    Room,
    ServerView,
    Sessions,
    count,
)
from sqla_fairpool.ledger.overview import Limits, Part, compile_overview
from sqla_fairpool.ledger.rows import Session
from sqla_fairpool.ledger.watch import identify
from sqla_fairpool.stats import TagStats

ROOM = Room("app", 100, 3, 0, False, None)


def session(member, name="", state="idle", transaction_age=None, state_age=1.0):
    """Return a session as the server sees it, and the number of its member."""
    row = SimpleNamespace(
        began=1,
        is_here=True,
        application_name=name,
        state=state,
        transaction_age=transaction_age,
        state_age=state_age,
    )
    return row, member


def counted(sessions, view, room=ROOM):
    """Count sessions, of which each has a process of its own."""
    for pid, (row, _) in enumerate(sessions):
        row.pid = pid
    posted = {
        Session(row.pid, row.began): member
        for row, member in sessions
        if member is not None
    }
    return count([row for row, _ in sessions], posted, view, room)


def of_two_tags():
    """An overview of a member with two tags and one with one."""
    both = process("a", 1, tags=("a", "\u00e9t\u00e9"))
    parts = [
        Part(both, [TagStats("a", True, 1), TagStats("\u00e9t\u00e9", True, 1)]),
        Part(process("b", 2), [TagStats("b", True, 2)]),
    ]
    return compile_overview(parts, Limits(20, 20, 10, 15))


def numbers(sessions):
    """Return how many sessions each member or scraper has."""
    return {key: each.sessions for key, each in sessions.items()}


def test_sessions_are_counted_by_member_and_by_scraper():
    figures = counted(
        [
            session(1, "a", "active", 0.5),
            session(1, "\\xc3\\xa9t\\xc3\\xa9", "idle in transaction", 3.0),
            session(1, "??t??", "idle"),  # PostgreSQL before 16
            session(1, "program"),
            session(2, "program", "idle in transaction (aborted)", 2.0, 1.5),
            session(9, "a"),
            session(None, "psql"),
            session(None, None),
            session(None, "sqla_fairpool ledger"),
            session(None, "sqla_fairpool monitor"),
        ],
        of_two_tags(),
    )
    assert figures.total == Sessions(6, 1, 2, 0, 3.0, 1.5)
    assert numbers(figures.members) == {1: 4, 2: 1, 9: 1}
    assert numbers(figures.scrapers) == {"a": 1, "b": 1, "\u00e9t\u00e9": 2}
    assert (figures.control, figures.others) == (2, 2)
    assert figures.warnings == ()
    assert str(figures) == (
        "server: 6 sessions of members, 1 active, 2 idle in transaction; 2 others; "
        "max_connections 100"
    )
    document = json.loads(json.dumps(figures.as_dict()))
    assert document["members"]["9"]["sessions"] == 1
    assert document["scrapers"]["a"]["oldest_transaction"] == 0.5
    assert (document["sessions"], document["others"]) == (6, 2)
    assert "error" not in document


def test_a_long_tag_is_known_by_what_the_server_keeps_of_it():
    tags = ("x" * 128, "y")
    parts = [Part(process("x", 1, tags=tags))]
    view = compile_overview(parts, Limits(20, 20, 10, 15))
    figures = counted([session(1, "x" * 63)], view)
    assert list(figures.scrapers) == ["x" * 128]


def test_states_that_are_hidden_are_not_counted_as_none():
    figures = counted([session(2, "b", None)], of_two_tags())
    assert figures.scrapers["b"].hidden == 1
    assert "1 of another role, whose state is hidden" in str(figures)


def test_warnings():
    rows = [session(2, "b", "idle in transaction", 130.0, 125.0)]
    rows += [session(1, "program", "idle in transaction", 70.0, 61.0)] * 20
    room = Room("app", 20, 3, 5, False, None)
    assert counted(rows, of_two_tags(), room).warnings == (
        "20 connections do not fit: max_connections is 20, 3 are reserved, other "
        "roles have 5, which leaves 12",
        "members have 21 sessions on the server, and there are 20 slots: that is a "
        "bug, please report it",
        "b has been idle in a transaction for 2 m 05 s",
    )
    (warning,) = counted(rows[1:], of_two_tags()).warnings
    assert warning == (
        "a session of a member has been idle in a transaction for 1 m 01 s"
    )


def test_members_that_are_not_here():
    figures = counted([session(None, "psql")], of_two_tags())
    assert figures.is_elsewhere
    assert str(figures) == (
        "server: no sessions of the ledger's members here; 1 others; "
        "max_connections 100"
    )
    # No connection is in use, so none is missing.
    quiet = compile_overview([Part(process("a", 1))], Limits(20, 20, 10, 15))
    assert not counted([], quiet).is_elsewhere


def test_a_server_that_is_away_is_told_without_a_password():
    view = ServerView(make_url("postgresql://u:s3cret@localhost:1/d"))
    figures = view.look(overview(), {})
    assert figures.error.startswith("cannot be asked: ")
    assert "\n" not in figures.error and "s3cret" not in figures.error
    assert figures.as_dict() == {"error": figures.error}
    view.close()


@pytest.fixture
def view(postgres_url):
    with closing(ServerView(make_url(postgres_url))) as view:
        yield view


@pytest.fixture
def engine(postgres_url):
    engine = create_engine(postgres_url)
    yield engine
    engine.dispose()


@pytest.fixture
def posted():
    """The sessions that are in a row, and of which member: what `marked` notes."""
    return {}


def marked(engine, posted, number, name):
    """Return a connection that is a session of a member."""
    connection = engine.connect()
    _, session, _ = identify(connection.connection.cursor(), None)
    posted[session] = number
    literal = name.replace("'", "''")
    connection.exec_driver_sql(f"SET application_name = '{literal}'")
    connection.commit()
    return connection


@pytest.mark.postgres
def test_sessions_of_a_server(view, engine, posted):
    before = view.look(overview(), {})
    assert before.total.sessions == 0
    assert before.control >= 1  # its own
    elsewhere = create_engine(engine.url.set(database="template1"))
    with (
        marked(engine, posted, 1, "a"),
        marked(engine, posted, 1, "\u00e9t\u00e9") as busy,
        marked(elsewhere, posted, 2, "psql"),
        marked(engine, posted, 3, "gone"),
        engine.connect() as other,
        elsewhere.connect() as not_ours,
    ):
        for connection in (not_ours, busy, other):
            connection.execute(text("select 1"))
        figures = view.look(of_two_tags(), posted)
        assert numbers(figures.members) == {1: 2, 2: 1, 3: 1}
        assert numbers(figures.scrapers) == {"a": 1, "b": 1, "\u00e9t\u00e9": 1}
        assert figures.total.idle_in_transaction == 1
        assert 0 <= figures.scrapers["\u00e9t\u00e9"].longest_idle_in_transaction < 60
        assert figures.others == before.others + 1
        assert figures.max_connections > 1
        # The same numbers of processes, that began at another time.
        earlier = {one._replace(began=one.began - 1): n for one, n in posted.items()}
        assert view.look(of_two_tags(), earlier).is_elsewhere
    elsewhere.dispose()


_OURS = "from pg_stat_activity where application_name = 'sqla_fairpool monitor'"


@pytest.mark.postgres
def test_one_connection_is_kept_and_made_again_when_it_was_cut(view, engine):
    def pids():
        with engine.connect() as connection:
            return connection.scalars(text(f"select pid {_OURS}")).all()

    view.look(overview(), {})
    (before,) = pids()
    view.look(overview(), {})
    assert pids() == [before]
    with engine.connect() as connection:
        connection.execute(text(f"select pg_terminate_backend(pid, 10000) {_OURS}"))
    figures = view.look(overview(), {})
    assert figures.error.startswith("cannot be asked: ")
    assert view.look(overview(), {}).error is None
    view.close()
    # A server's process ends a moment after the client has gone.
    eventually(lambda: not pids(), "the session's end")


@pytest.mark.postgres
def test_a_role_that_may_not_see_the_others(postgres_role, engine, posted):
    url = make_url(postgres_role())
    with closing(ServerView(url)) as view, marked(engine, posted, 2, "b"):
        figures = view.look(of_two_tags(), posted)
    assert figures.scrapers["b"] == Sessions(1, 0, 0, hidden=1)
