"""Every road by which a tag reaches the pool, and what wins over what."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy
from sqlalchemy import create_engine, event, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import QueuePool
from support import state
from support.threads import PATIENCE, Caller, ensure_waiting

import sqla_fairpool
from sqla_fairpool import CheckoutTimeout, FairQueuePool
from sqla_fairpool.tagging import context_tag

SQLALCHEMY_21 = tuple(map(int, sqlalchemy.__version__.split(".")[:2])) >= (2, 1)


def holders(engine):
    """Return who holds how much, tags that hold nothing left out."""
    rows = engine.pool.stats().tags
    return {row.name: row.connections for row in rows if row.connections}


def by_engine(engine):
    return engine.execution_options(scraper="a").connect()


def by_engine_of_an_engine(engine):
    tagged = engine.execution_options(scraper="a")
    return tagged.execution_options(isolation_level="AUTOCOMMIT").connect()


def by_engines_later_update(engine):
    engine.update_execution_options(scraper="a")
    return engine.connect()


def by_connection(engine):
    return engine.connect().execution_options(scraper="a")


def by_context(engine):
    with sqla_fairpool.tag("a"):
        return engine.connect()


def by_session_of_tagged_engine(engine):
    session = Session(engine.execution_options(scraper="a"))
    session.connection()
    return session


def by_sessionmaker(engine):
    session = sessionmaker(engine.execution_options(scraper="a"))()
    session.connection()
    return session


def by_session_connection(engine):
    session = Session(engine)
    session.connection(execution_options={"scraper": "a"})
    return session


def by_session_option(engine):
    session = Session(engine, execution_options={"scraper": "a"})
    session.connection()
    return session


def by_raw_connection(engine):
    return engine.execution_options(scraper="a").raw_connection()


ROADS = [
    by_engine,
    by_engine_of_an_engine,
    by_engines_later_update,
    by_connection,
    by_context,
    by_session_of_tagged_engine,
    by_sessionmaker,
    by_session_connection,
    by_raw_connection,
]
if SQLALCHEMY_21:
    ROADS.append(by_session_option)  # Session has no such parameter in 2.0


@pytest.mark.parametrize("road", ROADS)
def test_tag_arrives_by(road, make_engine):
    engine = make_engine()
    connection = road(engine)
    assert holders(engine) == {"a": 1}
    connection.close()
    assert holders(engine) == {}
    assert engine.pool.stats().tag("a").checkouts == 1


def test_tag_arrives_by_create_engine(make_engine):
    engine = make_engine(execution_options={"scraper": "a"})
    with engine.connect():
        assert holders(engine) == {"a": 1}


def test_tag_arrives_through_a_pool_made_beforehand(server):
    pool = server.pool()
    engine = create_engine("sqlite://", pool=pool, execution_options={"scraper": "a"})
    with engine.connect():
        assert holders(engine) == {"a": 1}
    with engine.connect().execution_options(scraper="b"):
        assert holders(engine) == {"b": 1}


def test_untagged_checkout_is_the_default_tags(make_engine):
    engine = make_engine(default_tag="nobody")
    with engine.connect():
        assert holders(engine) == {"nobody": 1}


def test_option_may_have_another_name(make_engine):
    engine = make_engine(tag_option="tenant")
    with engine.execution_options(tenant="a", scraper="b").connect():
        assert holders(engine) == {"a": 1}
    with engine.connect().execution_options(tenant="c"):
        assert holders(engine) == {"c": 1}


# -- precedence ----------------------------------------------------------------


def test_connections_option_wins_over_engines(make_engine):
    engine = make_engine().execution_options(scraper="engine")
    with engine.connect().execution_options(scraper="connection"):
        assert holders(engine) == {"connection": 1}


def test_engines_option_wins_over_context(make_engine):
    engine = make_engine().execution_options(scraper="engine")
    with sqla_fairpool.tag("context"), engine.connect():
        assert holders(engine) == {"engine": 1}


def test_inner_context_wins_over_outer(make_engine):
    engine = make_engine()
    with sqla_fairpool.tag("outer"):
        with sqla_fairpool.tag("inner"), engine.connect():
            assert holders(engine) == {"inner": 1}
        with engine.connect():
            assert holders(engine) == {"outer": 1}
    with engine.connect():
        assert holders(engine) == {"unknown": 1}


def test_context_ends_with_an_exception(make_engine):
    engine = make_engine()
    with pytest.raises(ZeroDivisionError), sqla_fairpool.tag("a"):
        raise ZeroDivisionError
    with engine.connect():
        assert holders(engine) == {"unknown": 1}


def test_context_is_not_another_threads(make_engine):
    engine = make_engine()

    def other():
        with engine.connect():
            return holders(engine)

    with sqla_fairpool.tag("a"):
        assert Caller(other).result() == {"unknown": 1}


def test_engines_tag_does_not_stay_after_the_checkout(make_engine):
    engine = make_engine()
    with engine.execution_options(scraper="a").connect(), engine.connect():
        assert holders(engine) == {"a": 1, "unknown": 1}


def test_base_engine_is_untouched_by_a_derived_one(make_engine):
    engine = make_engine()
    engine.execution_options(scraper="a")
    with engine.connect():
        assert holders(engine) == {"unknown": 1}


def test_derived_engine_follows_dispose(make_engine):
    engine = make_engine()
    tagged = engine.execution_options(scraper="a")
    engine.dispose()
    with tagged.connect():
        assert holders(engine) == {"a": 1}
    with engine.connect().execution_options(scraper="b"):
        assert holders(engine) == {"b": 1}


# -- bad tags ------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", None, 3, "a\nb", "x" * 129])
def test_bad_tag_is_refused_where_it_is_set(make_engine, bad):
    engine = make_engine()
    if bad is not None:  # SQLAlchemy's way of saying "no option"
        with pytest.raises(ArgumentError, match="scraper="):
            engine.execution_options(scraper=bad)
    with pytest.raises(ArgumentError, match="tag="):
        sqla_fairpool.tag(bad).__enter__()
    with engine.connect() as connection:
        with pytest.raises(ArgumentError, match="scraper="):
            connection.execution_options(scraper=bad)
        assert connection.get_execution_options() == {}
        assert holders(engine) == {"unknown": 1}


@pytest.mark.parametrize(
    "bad", [{"scraper": "a\nb"}, {"fairpool_timeout": -1}], ids=["tag", "time-out"]
)
def test_refused_option_is_not_among_the_options(make_engine, bad):
    engine = make_engine(execution_options={"scraper": "a", "mine": 1})
    derived = engine.execution_options(mine=2)
    for each in (engine, derived):
        before = each.get_execution_options()
        with pytest.raises(ArgumentError):
            each.update_execution_options(mine=3, **bad)
        assert each.get_execution_options() == before
        with each.connect() as connection:
            with pytest.raises(ArgumentError):
                connection.execution_options(mine=3, **bad)
            assert connection.get_execution_options() == before
            connection.execution_options(fairpool_timeout=1.0)
            assert holders(engine) == {"a": 1}
    plain = make_engine()
    with pytest.raises(ArgumentError):
        plain.update_execution_options(mine=3, **bad)
    assert plain.get_execution_options() == {}


# -- setting the tag on a connection -------------------------------------------


def test_untagged_moment_leaves_no_trace(make_engine):
    engine = make_engine()
    with engine.connect().execution_options(scraper="a"):
        stats = engine.pool.stats()
        assert [row.name for row in stats.tags] == ["a"]
        assert stats.strategy == "1 active: at most 15"


def test_connection_that_has_room_keeps_its_dbapi_connection(make_engine, server):
    engine = make_engine()
    with engine.connect() as connection:
        before = connection.connection.dbapi_connection
        connection.execution_options(scraper="a")
        assert connection.connection.dbapi_connection is before
    assert server.opened == 1


def test_connection_without_room_waits_holding_nothing(make_engine):
    engine = make_engine(pool_size=2, soft_limit=1, max_limit=1)
    holder = engine.execution_options(scraper="a").connect()
    caller = Caller(lambda: engine.connect().execution_options(scraper="a"))
    ensure_waiting(engine.pool, 1)
    assert holders(engine) == {"a": 1}
    assert engine.pool.stats().tag("a").waiting == 1
    holder.close()
    connection = caller.result()
    assert holders(engine) == {"a": 1}
    connection.execute(text("select 1"))
    connection.close()


def test_options_set_before_the_swap_hold_after_it(make_engine):
    engine = make_engine(pool_size=2, soft_limit=1, max_limit=1)
    holder = engine.execution_options(scraper="a").connect()
    applied = []
    dialect = engine.dialect
    dialect.set_isolation_level = lambda connection, level: applied.append(
        (connection, level)
    )
    dialect.reset_isolation_level = lambda connection: None

    def work():
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return connection.execution_options(scraper="a")

    caller = Caller(work)
    ensure_waiting(engine.pool, 1)
    holder.close()
    connection = caller.result()
    dbapi_connection = connection.connection.dbapi_connection
    assert applied[-1] == (dbapi_connection, "AUTOCOMMIT")
    assert len(applied) == 2
    connection.close()


def test_time_out_in_the_new_tags_line_leaves_nothing_held(make_engine):
    engine = make_engine(pool_size=2, soft_limit=1, max_limit=1, pool_timeout=0)
    holder = engine.execution_options(scraper="a").connect()
    connection = engine.connect().execution_options(scraper="b")
    with pytest.raises(CheckoutTimeout, match="tag 'a' in_use=1 ceiling=1"):
        connection.execution_options(scraper="a")
    assert holders(engine) == {"a": 1}
    # Like an invalidated connection, it checks out when it is used: as before.
    connection.execute(text("select 1"))
    assert holders(engine) == {"a": 1, "b": 1}
    connection.rollback()
    holder.close()
    connection.execution_options(scraper="a")
    connection.execute(text("select 1"))
    assert holders(engine) == {"a": 1}
    connection.close()


def test_retagging_in_a_transaction_is_refused_as_isolation_level_is(make_engine):
    engine = make_engine()
    with engine.connect().execution_options(scraper="a") as connection:
        connection.execute(text("select 1"))
        with pytest.raises(InvalidRequestError, match="scraper may not be altered"):
            connection.execution_options(scraper="b")
        assert holders(engine) == {"a": 1}
        connection.rollback()
        connection.execution_options(scraper="b")
        assert holders(engine) == {"b": 1}


def test_refused_tag_is_not_remembered(make_engine):
    engine = make_engine()
    with engine.connect().execution_options(scraper="a") as connection:
        connection.execute(text("select 1"))
        with pytest.raises(InvalidRequestError):
            connection.execution_options(scraper="b")
        assert connection.get_execution_options()["scraper"] == "a"
        connection.rollback()
        connection.invalidate()
        connection.execute(text("select 1"))
        assert holders(engine) == {"a": 1}


def test_same_tag_again_is_no_change(make_engine):
    engine = make_engine()
    with engine.connect().execution_options(scraper="a") as connection:
        connection.execute(text("select 1"))
        connection.execution_options(scraper="a")
    assert engine.pool.stats().tag("a").checkouts == 1


def test_connection_asks_as_itself_after_an_invalidation(make_engine):
    engine = make_engine().execution_options(scraper="engine")
    with engine.connect().execution_options(scraper="connection") as connection:
        connection.invalidate()
        assert holders(engine) == {}
        connection.execute(text("select 1"))
        assert holders(engine) == {"connection": 1}


def test_tag_set_while_invalidated_is_used_at_the_next_checkout(make_engine):
    engine = make_engine()
    with engine.connect() as connection:
        connection.invalidate()
        connection.execution_options(scraper="a")
        connection.execute(text("select 1"))
        assert holders(engine) == {"a": 1}


def test_tag_on_a_closed_connection_checks_nothing_out(make_engine):
    engine = make_engine()
    connection = engine.connect()
    connection.close()
    connection.execution_options(scraper="a")
    assert holders(engine) == {}


def test_tagging_a_connection_makes_no_reference_cycle(make_engine):
    engine = make_engine()
    connection = engine.connect().execution_options(scraper="a")
    del connection
    assert holders(engine) == {}, "a leaked connection waits for the collector"


def test_checkout_listener_does_not_see_what_the_checkout_asked_for(make_engine):
    engine = make_engine(pool_size=2, soft_limit=1, max_limit=1)
    other = make_engine()
    seen = []

    @event.listens_for(engine, "checkout")
    def checkout(dbapi_connection, record, proxy):
        with other.connect():
            seen.append(holders(other))

    holder = engine.execution_options(scraper="a").connect()
    caller = Caller(lambda: engine.connect().execution_options(scraper="a"))
    ensure_waiting(engine.pool, 1)
    holder.close()
    caller.result().close()
    assert seen == [{"unknown": 1}] * 3


# -- what is in force for one checkout is nobody else's ---------------------------


def on_connect(engine, function):
    event.listen(engine, "connect", lambda dbapi_connection, record: function())


def on_do_connect(engine, function):
    def do_connect(dialect, record, arguments, keywords):
        function()

    event.listen(engine, "do_connect", do_connect)


def on_first_connect(engine, function):
    event.listen(
        engine.pool, "first_connect", lambda dbapi_connection, record: function()
    )


@pytest.mark.parametrize("on", [on_connect, on_first_connect, on_do_connect])
@pytest.mark.parametrize("road", [by_engine, by_connection, by_raw_connection])
def test_listener_that_runs_while_a_connection_opens_is_untagged(
    server, on, road, tmp_path
):
    engine, other = server.engine(), server.engine()
    if on is on_do_connect:  # it is not called where there is a creator
        url = f"sqlite:///{tmp_path / 'listened.db'}"
        engine = create_engine(url, poolclass=FairQueuePool)
    seen = []

    def listener():
        with other.connect():
            seen.append(holders(other))
        with sqla_fairpool.tag("own"), other.connect():
            seen.append(holders(other))

    on(engine, listener)
    connection = road(engine)
    connection.close()
    engine.dispose()
    assert seen == [{"unknown": 1}, {"own": 1}]


def test_connection_that_opens_again_shows_its_tag_to_nobody(server):
    engine, other = server.engine(), server.engine()
    seen = []
    with engine.connect().execution_options(scraper="a") as connection:
        connection.invalidate()

        def listener(dbapi_connection, record):
            with other.connect():
                seen.append(holders(other))

        event.listen(engine, "connect", listener)
        connection.execute(text("select 1"))
        assert holders(engine) == {"a": 1}
    assert seen == [{"unknown": 1}]


def test_engines_time_out_is_not_that_of_its_listeners(make_engine):
    engine = make_engine().execution_options(scraper="a", fairpool_timeout=0.0)
    other = make_engine(pool_size=1)
    holder = other.connect()

    def listener(dbapi_connection, record):
        caller = Caller(lambda: ensure_waiting(other.pool, 1) or holder.close())
        other.connect().close()  # waits until then, at most 30 seconds
        caller.result()

    event.listen(engine, "connect", listener)
    engine.connect().close()


def test_engine_with_another_kind_of_pool_leaves_no_tag_behind(server, make_engine):
    other = make_engine()
    engine = server.engine(execution_options={"scraper": "a"})
    engine.pool = QueuePool(server.connect, dialect=engine.dialect)
    seen = []

    def listener(dbapi_connection, record):
        with other.connect():
            seen.append(holders(other))

    event.listen(engine.pool, "connect", listener)
    with engine.connect(), other.connect():
        seen.append(holders(other))
    assert seen == [{"unknown": 1}] * 2


def test_checkout_in_the_middle_of_another_gives_the_request_back(make_engine):
    """As that of a signal handler, between the engine and the pool."""
    engine = make_engine()
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    connect = engine.pool.connect
    seen = []

    def interrupted():
        engine.pool.connect = connect
        with b.connect():
            seen.append(holders(engine))
        return connect()

    engine.pool.connect = interrupted
    with a.connect():
        assert holders(engine) == {"a": 1}
    assert seen == [{"b": 1}]


# -- activity ------------------------------------------------------------------


def test_statement_is_activity(make_engine, clock):
    engine = make_engine()
    with engine.execution_options(scraper="a").connect() as connection:
        clock.advance(50.0)
        assert engine.pool.stats().tag("a").idle_for == 50.0
        connection.execute(text("select 1"))
        assert engine.pool.stats().tag("a").idle_for == 0.0


@pytest.mark.parametrize(
    "statement",
    [
        lambda c: c.exec_driver_sql("select 1"),
        lambda c: c.execute(text("insert into t values (:x)"), [{"x": 1}, {"x": 2}]),
        lambda c: c.execution_options(no_parameters=True).exec_driver_sql("select 1"),
    ],
)
def test_every_kind_of_statement_is_activity(make_engine, clock, statement):
    engine = make_engine()
    with engine.execution_options(scraper="a").connect() as connection:
        clock.advance(50.0)
        statement(connection)
        assert engine.pool.stats().tag("a").idle_for == 0.0


def test_statement_hooks_take_what_the_dialects_methods_take(make_engine):
    engine = make_engine()
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        engine.dialect.do_execute(cursor, "select 1", (), context=None)
        engine.dialect.do_executemany(cursor, "select 1", [()])
        engine.dialect.do_execute_no_params(cursor, "select 1", context=None)
        assert (
            connection.connection.dbapi_connection.statements[-3:] == ["select 1"] * 3
        )


def test_statement_of_an_idle_tag_makes_it_active(make_engine, clock):
    engine = make_engine()
    with engine.execution_options(scraper="a").connect() as connection:
        clock.advance(100.0)
        engine.execution_options(scraper="b").connect().close()
        assert engine.pool.stats().tag("a").active is False
        connection.execute(text("select 1"))
        assert engine.pool.stats().tag("a").active is True
        assert engine.pool.stats().tag("b").limit == 10


def test_untagged_checkout_is_active_from_its_first_statement(make_engine):
    engine = make_engine()
    with engine.connect() as connection:
        assert engine.pool.stats().tag("unknown").active is False
        connection.execute(text("select 1"))
        assert engine.pool.stats().tag("unknown").active is True


def test_checkin_is_activity(make_engine, clock):
    engine = make_engine()
    connection = engine.execution_options(scraper="a").connect()
    clock.advance(100.0)
    engine.execution_options(scraper="b").connect().close()
    assert engine.pool.stats().tag("a").active is False
    connection.close()
    assert engine.pool.stats().tag("a").active is True


# -- nobody else pays ----------------------------------------------------------


def test_other_engines_are_not_listened_to(server, make_engine):
    make_engine().execution_options(scraper="a").connect().close()
    other = server.engine(poolclass=QueuePool)
    assert "raw_connection" not in vars(other)
    assert "set_connection_execution_options" not in vars(other.dialect)
    assert "do_execute" not in vars(other.dialect)
    assert not other.dialect._has_events
    assert not other._has_events
    # Not every release gives the class the attribute before somebody listens to it.
    assert not getattr(Connection, "_has_events", False)
    assert not Engine._has_events
    tagged = other.execution_options(scraper="a")
    assert "raw_connection" not in vars(tagged)
    with tagged.connect().execution_options(scraper="b") as connection:
        connection.execute(text("select 1"))


def test_dialect_is_hooked_once_however_often_the_pool_is_recreated(make_engine):
    engine = make_engine()
    hook = engine.dialect.set_connection_execution_options
    execute = engine.dialect.do_execute
    for _ in range(5):
        engine.dispose()
    assert engine.dialect.set_connection_execution_options is hook
    assert engine.dialect.do_execute is execute


def test_many_threads_with_tags_of_their_own_do_not_mix(make_engine):
    engine = make_engine()
    barrier = threading.Barrier(8)

    def work(name):
        tagged = engine.execution_options(scraper=name)
        barrier.wait()
        for _ in range(200):
            connection = tagged.connect()
            assert state.tag_of(connection) == name
            connection.close()

    for caller in [Caller(work, f"tag{n}") for n in range(8)]:
        caller.result()
    assert all(row.checkouts == 200 for row in engine.pool.stats().tags)


def test_wrong_pool_class_for_the_dialect_is_sqlalchemys_error(server):
    class AsyncDialect(SQLiteDialect_pysqlite):
        is_async = True
        supports_statement_cache = True

        @classmethod
        def load_provisioning(cls):
            pass

    registry.impls["sqlite.pretended"] = lambda: AsyncDialect
    with pytest.raises(ArgumentError, match="cannot be used with asyncio engine"):
        create_engine(
            "sqlite+pretended://", creator=server.connect, poolclass=FairQueuePool
        )


def test_tag_object_is_shared_by_threads_and_nested(make_pool):
    """What was in force outside belongs to the context, not to the object."""
    shared = sqla_fairpool.tag("shared")
    pool = make_pool()
    inside = threading.Barrier(2)

    def tags_now():
        fairy = pool.connect()
        rows = pool.stats().tags
        fairy.close()
        return [row.name for row in rows if row.connections]

    def visit(outer):
        with sqla_fairpool.tag(outer), shared:
            inside.wait(PATIENCE)
            with shared:
                pass
            inside.wait(PATIENCE)
        return context_tag()

    callers = [Caller(visit, "a"), Caller(visit, "b")]
    for caller in callers:
        assert caller.result() is None
    with shared, shared:
        assert tags_now() == ["shared"]
    assert context_tag() is None


def test_decorated_function_is_tagged_while_it_runs():
    @sqla_fairpool.tag("job")
    def job(number):
        return context_tag(), number

    assert job(3) == ("job", 3)
    assert job.__name__ == "job"
    assert context_tag() is None


def test_set_tag_refuses_what_is_no_tag():
    with pytest.raises(ArgumentError, match="tag='' is not allowed"):
        sqla_fairpool.set_tag("")
    assert context_tag() is None
