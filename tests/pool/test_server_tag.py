"""``server_tag``: the server sees who is who."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool
from support.threads import eventually
from support.worlds import count_opened, world_of

from sqla_fairpool import FairQueuePool
from sqla_fairpool.pool import events

pytestmark = pytest.mark.postgres


def name_of(connection):
    return connection.scalar(text("select current_setting('application_name')"))


def pid_of(connection):
    pid = connection.scalar(text("select pg_backend_pid()"))
    connection.rollback()
    return pid


@pytest.fixture(params=["psycopg2", "psycopg", "psycopg tasks", "asyncpg"])
def world(request, postgres_url):
    """Threads or tasks, with the URL of a PostgreSQL."""
    return world_of(postgres_url, f"postgresql+{request.param}")


@pytest.fixture
def told(monkeypatch):
    """The names that the server was told."""
    names = []
    say = events._say

    def noted(dbapi_connection, name, *settings):
        names.append(name)
        say(dbapi_connection, name, *settings)

    monkeypatch.setattr(events, "_say", noted)
    return names


def terminate(engine, pid):
    """End a session at the server; return when it is gone."""
    gone = text("select not exists (select from pg_stat_activity where pid = :pid)")
    end = text("select pg_terminate_backend(:pid)")
    url = engine.url.set(drivername="postgresql+psycopg2")
    other = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with other.connect() as connection:
        connection.execute(end, {"pid": pid})
        eventually(lambda: connection.scalar(gone, {"pid": pid}), "its end")


@pytest.mark.parametrize(
    ("tag", "seen"),
    [
        ("layer3", "layer3"),
        ('it\'s 100% \\n "x" %s :x', 'it\'s 100% \\n "x" %s :x'),
        ("x" * 128, "x" * 63),  # as long as PostgreSQL's names are
        ("Ünï", "\\xc3\\x9cn\\xc3\\xaf"),  # no plain letters: as it writes them
        ("層" * 64, ("\\xe5\\xb1\\xa4" * 6)[:63]),
    ],
)
def test_server_sees_the_tag_and_is_told_it_once(world, told, tag, seen):
    engine = world.engine(server_tag=True, pool_size=1)
    tagged = engine.execution_options(scraper=tag)
    for _ in range(3):
        with tagged.connect() as connection:
            assert name_of(connection) == seen
    assert told == [seen]


@pytest.mark.parametrize("encoding", ["latin1", "sql_ascii"])
@pytest.mark.parametrize("world", ["psycopg2"], indirect=True)
def test_tag_that_the_clients_encoding_lacks(world, told, encoding):
    arguments = {"client_encoding": encoding}
    engine = world.engine(server_tag=True, pool_size=1, connect_args=arguments)
    tagged = engine.execution_options(scraper="層")
    for _ in range(2):
        with tagged.connect() as connection:
            assert name_of(connection) == "\\xe5\\xb1\\xa4"
    assert len(told) == 1


def test_it_is_said_only_when_a_connection_changes_hands(world, told):
    engine = world.engine(server_tag=True)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    for _ in range(3):
        with a.connect() as connection:
            assert name_of(connection) == "a"
    assert len(told) == 1
    with a.connect(), b.connect() as connection:
        assert name_of(connection) == "b"
    assert len(told) == 2
    # Each gets the connection that it had, whichever came back last.
    for _ in range(3):
        with b.connect() as one, a.connect() as two:
            assert (name_of(one), name_of(two)) == ("b", "a")
        engine.pool.stats()  # nothing is kept warm
        with a.connect() as two, b.connect() as one:
            assert (name_of(one), name_of(two)) == ("b", "a")
    assert len(told) == 2


def test_name_is_that_of_every_connection_whichever_way_it_comes(world):
    """Set late, before a rollback, in an old record, after a dispose."""
    engine = world.engine(server_tag=True)
    tagged = engine.execution_options(scraper="a")
    with engine.connect() as connection:
        assert name_of(connection) == "unknown"
        connection.rollback()
        assert name_of(connection.execution_options(scraper="late")) == "late"
        connection.rollback()
        assert name_of(connection) == "late"
    with tagged.connect() as connection:
        connection.invalidate()
        assert name_of(connection) == "a"
        connection.invalidate()
    for _ in range(2):
        with tagged.connect() as connection:
            assert name_of(connection) == "a"
        engine.dispose()


def test_dead_connection_is_replaced(world):
    """At a checkout under another tag, and where it gets a tag of its own."""
    engine = world.engine(server_tag=True, pool_size=1)
    with engine.execution_options(scraper="a").connect() as connection:
        pid = pid_of(connection)
    terminate(engine, pid)
    opened = count_opened(engine)
    with engine.execution_options(scraper="b").connect() as connection:
        assert name_of(connection) == "b"
        assert pid_of(connection) != pid
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        terminate(engine, pid_of(connection))
        connection.execution_options(scraper="late")
        assert name_of(connection) == "late"
        assert len(opened) == 2
        connection.execute(text("create table server_tag_left (x int)"))
    with engine.begin() as connection:
        connection.execute(text("drop table server_tag_left"))  # it was committed


def test_what_goes_wrong_in_telling_is_sqlalchemys_error(world, monkeypatch):
    """The caller has the tag that it had before, of a lost connection too."""
    engine = world.engine(server_tag=True, pool_size=1)
    dbapi = engine.dialect.loaded_dbapi

    def refuse(*_):
        raise dbapi.OperationalError("the server is away")

    def not_allowed(*_):
        raise dbapi.ProgrammingError("not allowed")

    with engine.connect().execution_options(scraper="old") as connection:
        with monkeypatch.context() as patch:
            patch.setattr(events, "_say", not_allowed)
            with pytest.raises(DBAPIError, match="not allowed"):
                connection.execution_options(scraper="new")
        assert connection.get_execution_options() == {"scraper": "old"}
        assert name_of(connection) == "old"
        connection.rollback()
        terminate(engine, pid_of(connection))
        event.listen(engine, "do_connect", refuse)
        with pytest.raises(DBAPIError, match="the server is away"):
            connection.execution_options(scraper="new")
        assert connection.invalidated
        assert connection.get_execution_options() == {"scraper": "old"}
        event.remove(engine, "do_connect", refuse)
        assert name_of(connection) == "old"


STATEMENTS = ["reset all", "discard all", "reset application_name"]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_name_that_is_reset_at_each_return_is_told_again(world, statement):
    # Nothing is left by DISCARD ALL of what asyncpg has prepared.
    is_asyncpg = world.url.drivername.endswith("asyncpg")
    arguments = {"prepared_statement_cache_size": 0} if is_asyncpg else {}
    options = {"pool_reset_on_return": None, "connect_args": arguments}
    engine = world.engine(server_tag=True, pool_size=1, **options)

    @event.listens_for(engine, "reset")
    def reset(dbapi_connection, record, state):
        dbapi_connection.rollback()
        if state.asyncio_safe and not state.terminate_only:
            autocommit = dbapi_connection.autocommit
            dbapi_connection.autocommit = True  # for DISCARD ALL
            cursor = dbapi_connection.cursor()
            cursor.execute(statement)
            cursor.close()
            dbapi_connection.autocommit = autocommit

    tagged = engine.execution_options(scraper="a")
    for _ in range(5):
        with tagged.connect() as connection:
            assert name_of(connection) == "a"


def test_name_that_the_application_sets_is_replaced_at_the_next_checkout(world):
    engine = world.engine(server_tag=True, pool_size=1)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect() as connection:
        connection.execute(text("set application_name = 'mine'"))
        connection.commit()
        assert name_of(connection) == "mine"
    with tagged.connect() as connection:
        assert name_of(connection) == "a"


def test_driver_that_does_not_say_the_name_is_told_each_time(world, told, monkeypatch):
    monkeypatch.setattr(events, "parameter", lambda connection, name: None)
    engine = world.engine(server_tag=True)
    tagged = engine.execution_options(scraper="a")
    for _ in range(2):
        with tagged.connect() as connection:
            assert name_of(connection) == "a"
    assert told == ["a", "a"]


def test_only_postgresql_has_it():
    with pytest.raises(ArgumentError, match=r"server_tag=True .*sqlite"):
        create_engine("sqlite://", poolclass=FairQueuePool, server_tag=True)


SETTINGS = "statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout"
TIMES = {
    "statement_timeout": 0.2,
    "idle_in_transaction_timeout": "30",
    "lock_timeout": 1.5,
}
NONE, SET = ["0", "0", "0"], ["200ms", "30s", "1500ms"]


def settings_of(connection):
    shown = ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    return list(connection.execute(text(f"select {shown}")).one())


@pytest.mark.parametrize("named", [False, True])
def test_time_limits_go_with_the_tag_and_are_told_once(world, told, named):
    tags = {"web*": TIMES, "other": {"weight": 2}}
    engine = world.engine(server_tag=named, pool_size=1, tags=tags)
    web, other = (engine.execution_options(scraper=tag) for tag in ("web1", "other"))
    for _ in range(2):
        for _ in range(2):
            with web.connect() as connection:
                assert settings_of(connection) == SET
        with other.connect() as connection:
            assert settings_of(connection) == NONE
    assert len(told) == 4
    with engine.connect() as connection:
        connection.execution_options(scraper="web2")
        assert settings_of(connection) == SET
        connection.rollback()
        connection.execution_options(scraper="other")
        assert settings_of(connection) == NONE
        connection.invalidate()
        connection.rollback()
        assert settings_of(connection) == NONE
    with web.connect() as connection:
        for _ in range(2):  # the session goes on after a rollback
            with pytest.raises(DBAPIError, match="due to statement timeout") as caught:
                connection.execute(text("select pg_sleep(9)"))
            assert not caught.value.connection_invalidated
            connection.rollback()


def test_session_that_is_idle_in_its_transaction_is_ended_by_the_server(world):
    times = {"idle_in_transaction_timeout": 0.1}
    engine = world.engine(pool_size=1, tags={"slow": times})
    with engine.execution_options(scraper="slow").connect() as connection:
        pid = connection.scalar(text("select pg_backend_pid()"))
        url = engine.url.set(drivername="postgresql+psycopg2")
        other = create_engine(url, poolclass=NullPool)
        query = text("select count(*) from pg_stat_activity where pid = :pid")
        with other.connect().execution_options(isolation_level="AUTOCOMMIT") as look:
            eventually(lambda: look.scalar(query, {"pid": pid}) == 0, "its end")
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text("select 1"))
        assert caught.value.connection_invalidated
        connection.rollback()
        assert pid_of(connection) != pid  # the unit of work can be done again


@pytest.mark.parametrize("world", ["psycopg2"], indirect=True)
def test_time_limits_can_be_changed_and_what_the_url_says_comes_back(world):
    arguments = {"options": "-c statement_timeout=7s"}
    engine = world.engine(pool_size=1, connect_args=arguments)
    tagged = engine.execution_options(scraper="a")
    for tags, seen in [
        (None, ["7s", "0", "0"]),
        ({"a": TIMES}, SET),
        ({"a": {"lock_timeout": 2}}, ["7s", "0", "2s"]),
        (None, ["7s", "0", "0"]),
    ]:
        engine.pool.reconfigure(tags=tags)
        with tagged.connect() as connection:
            assert settings_of(connection) == seen


@pytest.mark.parametrize("world", ["psycopg2"], indirect=True)
def test_time_limits_are_told_again_with_a_name_that_was_lost(world):
    engine = world.engine(server_tag=True, pool_size=1, tags={"a": TIMES})
    tagged = engine.execution_options(scraper="a")
    for _ in range(2):
        with tagged.connect() as connection:
            assert settings_of(connection) == SET
            connection.execute(text("reset all"))
            connection.commit()


def test_only_postgresql_has_time_limits():
    times = {"a": {"lock_timeout": 1}}
    with pytest.raises(ArgumentError, match=r"tags=.*no time limits, because sqlite"):
        create_engine("sqlite:///x.db", poolclass=FairQueuePool, tags=times)
    engine = create_engine("sqlite:///x.db", poolclass=FairQueuePool)
    with pytest.raises(ArgumentError, match=r"tags=.*no time limits, because sqlite"):
        engine.pool.reconfigure(tags=times)
    assert engine.pool.options.tags is None
