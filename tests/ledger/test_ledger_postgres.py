"""The PostgreSQL store: its tables and its session, whatever becomes of them."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from support import state
from support.ledger_world import Server as SimServer
from support.ledger_world import SimPool
from support.sessions import Sessions
from support.stores import rows_of, write
from support.threads import PATIENCE, Caller, Gate, eventually, give

from sqla_fairpool import FairQueuePool
from sqla_fairpool.cli import main
from sqla_fairpool.ledger import postgres, watch
from sqla_fairpool.ledger.addresses import make_store
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.keeper import Keeper
from sqla_fairpool.ledger.postgres import PostgresStore
from sqla_fairpool.ledger.rows import Terms
from sqla_fairpool.ledger.store import LedgerError, StoreAway

pytestmark = pytest.mark.postgres

TABLES = "fairpool_ledger, fairpool_ledger_row, fairpool_figures"
USE = f"grant select, insert, update, delete on {TABLES} to "
ANYBODY_MAY_CREATE = "grant create on schema public to public"
NOBODY_MAY_CREATE = "revoke create on schema public from public"
TERMS = Terms(4, 2, 3, 60.0, 30.0)


@pytest.fixture
def url(postgres_url, operator):
    """The URL of a database of the test's own."""
    name = f"d{uuid.uuid4().hex}"
    operator(postgres_url, f"create database {name}")
    yield make_url(postgres_url).set(database=name)
    operator(postgres_url, f"drop database {name} with (force)")


@pytest.fixture
def sql(url, operator):
    """Do something in that database as its operator does."""
    return lambda *statements, **values: operator(url, *statements, **values)


@pytest.fixture(params=["psycopg2", "psycopg"])
def driver_url(request, url):
    """The same, with each driver."""
    return url.set(drivername=f"postgresql+{request.param}")


@pytest.fixture
def given(url):
    """The same, as it is given to a command."""
    return url.render_as_string(hide_password=False)


@pytest.fixture
def make(opened):
    """Make open stores of a database."""

    def make(url, ledger="default", **options):
        return opened(PostgresStore(url, ledger, **options))

    return make


@pytest.fixture
def role(url, sql):
    """Make roles that may log in and nothing else, dropped after the test."""
    names = []

    def make(options="", driver="postgresql+psycopg2"):
        names.append(f"r{uuid.uuid4().hex}")
        sql(f"create role {names[-1]} login {options}")
        return url.set(username=names[-1], drivername=driver)

    yield make
    for name in names:
        sql(f"drop owned by {name}", f"drop role {name}")


def searching(url, path):
    return url.update_query_dict({"options": f"-csearch_path={path}"})


def for_each_table(statement):
    return [statement.format(table) for table in TABLES.split(", ")]


MOVED = ["create schema mine", *for_each_table("alter table {0} set schema mine")]
COPIED = [
    "create schema mine",
    *for_each_table("create table mine.{0} (like public.{0})"),
]


def schemas(sql):
    return sql(
        "select relnamespace::regnamespace::text from pg_class "
        "where relname = 'fairpool_ledger' order by oid"
    )


# -- tables that go away --------------------------------------------------------------


@pytest.mark.parametrize(
    "statements",
    [
        [f"drop table {TABLES}"],
        ["drop table fairpool_ledger_row"],
        ["delete from fairpool_ledger"],
        ["truncate fairpool_ledger"],
        ["drop schema public cascade", "create schema public"],
        ["update fairpool_ledger set number = number + 1"],
    ],
)
def test_without_its_tables_a_store_is_away_and_keeps_its_sign(
    driver_url, make, sql, statements
):
    store, other = make(driver_url), make(driver_url)
    write(store, a="1")
    sql(*statements)
    for _ in range(2):
        with pytest.raises(StoreAway):
            rows_of(store)
        assert (store.signed, store.control_connections) == (False, 1)
        assert other.living([store.member]) == {store.member}
    store.open()
    assert store.signed
    assert store.in_place()
    write(store, b="2")
    with pytest.raises(StoreAway):
        rows_of(other)
    other.open()
    assert rows_of(other)["b"] == "2"
    assert other.key == store.key


def test_tables_that_are_made_anew_by_another_are_not_taken_for_the_old_ones(
    url, make, sql
):
    store = make(url)
    sql(f"drop table {TABLES}")
    other = make(url)
    assert other.key != store.key
    with pytest.raises(StoreAway, match="made anew"):
        write(store, a="1")
    assert rows_of(other) == {}
    sql("drop table fairpool_figures")
    with pytest.raises(StoreAway, match="the tables were dropped"):
        other.publish("x")
    other.open()
    other.publish("x")
    assert other.published([other.member]) == {other.member: "x"}


def test_tables_that_cannot_be_used_any_more_do_not_cost_the_sign(url, make, sql, role):
    sql(ANYBODY_MAY_CREATE)
    poor, other = role(), make(url)
    sql(USE + poor.username)
    store = make(poor)
    sql(f"revoke all on {TABLES} from {poor.username}")
    with pytest.raises(LedgerError, match="permission denied"):
        rows_of(store)
    assert store.signed
    assert other.living([store.member]) == {store.member}
    sql(f"drop table {TABLES}", NOBODY_MAY_CREATE)
    with pytest.raises(StoreAway):
        rows_of(store)
    with pytest.raises(LedgerError, match="no tables yet, and the role may not create"):
        store.open()
    assert not store.signed
    assert other.living([store.member]) == {store.member}


def test_tables_that_are_dropped_under_load_do_not_raise_the_bound(url, sql):
    """A newcomer makes them anew while a member has three of four slots in use."""
    limits = {"pool_size": 4, "soft_limit": 4, "max_limit": 4}
    member, newcomer = (
        create_engine(
            url.update_query_dict({"application_name": name}),
            poolclass=FairQueuePool,
            ledger="database",
            **limits,
        )
        for name in ("p1", "p2")
    )

    def count():
        query = "select count(*) from pg_stat_activity where application_name like 'p_'"
        (found,) = sql(query)
        assert found <= 4
        return found

    held = [member.connect() for _ in range(3)]
    sql(f"drop table {TABLES}")
    callers = [Caller(newcomer.connect) for _ in range(4)]
    eventually(lambda: count() == 4)
    assert member.pool.stats().checked_out == 3
    eventually(lambda: sum(not caller.is_alive() for caller in callers) == 1)
    give(held)
    eventually(lambda: (count(), any(map(Caller.is_alive, callers))) == (4, False))
    give([caller.result() for caller in callers])
    for engine in (member, newcomer):
        engine.dispose()
        state.keeper(engine).close()


def test_two_databases_of_a_server_share_one_budget(url, postgres_url, ledger):
    """Their engines name one ledger, wherever that is."""
    name = f"budget {uuid.uuid4().hex[:12]}"
    one, two = engines = [
        create_engine(
            database,
            poolclass=FairQueuePool,
            pool_size=4,
            ledger=ledger,
            connect_args={"application_name": name},
        ).execution_options(scraper=tag)
        for database, tag in ((url, "one"), (postgres_url, "two"))
    ]
    with Sessions(postgres_url, name) as sessions:
        held = [one.connect() for _ in range(3)]  # alone, a tag has three of four
        callers = [Caller(two.connect) for _ in range(2)]

        def served():
            return sum(not caller.is_alive() for caller in callers)

        eventually(lambda: served() == 1)
        held.pop().close()
        eventually(lambda: served() == 2)
        assert sessions.now == 4
        give(held)
        give([caller.result() for caller in callers])
        for engine in engines:
            engine.dispose()
            state.keeper(engine).close()
    assert sessions.most == 4


# -- which tables ---------------------------------------------------------------------


def test_members_meet_in_one_ledger_whatever_their_search_path(url, make, sql):
    sql("create schema mine", "create schema theirs")
    stores = [
        make(searching(url, path)) for path in ("mine", "theirs", "nowhere", "public")
    ]
    write(stores[0], a="1")
    for store in stores:
        assert rows_of(store) == {"a": "1"}
    assert schemas(sql) == ["public"]
    # Tables that are there are used wherever they are.
    sql(*MOVED[1:])
    assert rows_of(make(url)) == {"a": "1"}
    with pytest.raises(StoreAway):
        rows_of(stores[0])
    stores[0].open()
    assert rows_of(stores[0]) == {"a": "1"}


def test_the_oldest_tables_are_used_if_there_are_several(url, make, sql):
    engine = create_engine(url)
    with engine.connect() as connection:  # temporary ones are nobody's
        connection.execute(text("create temporary table fairpool_ledger (x int)"))
        connection.commit()
        write(make(url), a="1")
    engine.dispose()
    sql(*COPIED)
    store = make(searching(url, "mine"))
    assert rows_of(store) == {"a": "1"}
    # Members of other tables are strangers.
    sql(f"drop table {', '.join(for_each_table('public.{0}'))}")
    assert make(url).strangers([store.member]) == 1


def test_role_without_create_joins_a_ledger_that_is_there(driver_url, make, sql, role):
    write(make(driver_url), a="1")
    poor = role(driver=driver_url.drivername)
    with pytest.raises(LedgerError, match="permission denied for table"):
        make(poor)
    sql(USE + poor.username)
    store = make(poor)
    write(store, b="2")
    store.publish("x")
    assert rows_of(store) == {"a": "1", "b": "2"}
    # It gets no ledger of its own where it may not use that one's schema.
    sql(*MOVED, ANYBODY_MAY_CREATE)
    with pytest.raises(LedgerError, match="in the schema 'mine', which the role"):
        make(role())


def test_tables_are_created_where_the_role_may_if_not_in_public(url, make, sql, role):
    sql(NOBODY_MAY_CREATE)
    poor = role()
    with pytest.raises(LedgerError, match="no tables yet, and the role may not create"):
        make(poor)
    name = poor.username
    sql(f"create schema {name} authorization {name}")
    write(make(poor), a="1")
    assert schemas(sql) == [name]
    assert rows_of(make(url)) == {"a": "1"}


def test_rows_are_those_after_the_lock_whatever_isolation_is_the_default(
    url, make, sql
):
    store = make(url)
    default = "default_transaction_isolation = 'serializable'"
    sql(f"alter database {url.database} set {default}")
    other = make(url)
    with store.transaction() as rows:
        caller = Caller(rows_of, other)
        query = "select count(*) from pg_locks where not granted"
        eventually(lambda: sql(query) == [1])
        rows["a"] = "1"
    assert caller.result() == {"a": "1"}


def test_ledgers_in_one_database_are_apart(url, opened):
    named = url.update_query_dict({"ledger": "one"})
    one = opened(make_store(named.render_as_string(hide_password=False), None))
    two = opened(make_store("database", url.update_query_dict({"ledger": "two"})))
    for store in (one, two):
        write(store, a=store.name)
    assert rows_of(one) != rows_of(two)
    assert one.key != two.key


def test_tables_from_the_future_are_refused(url, make, sql):
    store = make(url)
    store.close()
    sql("update fairpool_ledger set version = 99")
    with pytest.raises(LedgerError, match=r"cannot be used.*schema version 99.* 1:"):
        store.open()
    assert store.control_connections == 0


# -- who lives there, and hears a bell -------------------------------------------------


def test_members_of_a_place_are_known_and_rung_without_its_tables(
    driver_url, make, sql
):
    store, other = make(driver_url), make(driver_url)
    another, observer = make(driver_url, "another"), make(driver_url, observes=True)
    assert store.strangers([]) == 1
    sql(f"drop table {TABLES}")
    assert make(driver_url).strangers([]) == 2
    store.ring_all()
    assert other.wait(PATIENCE)
    for one in (store, another, observer):
        assert not one.wait(0)


def test_observer_is_no_member(url, make, capsys, given):
    store, observer = make(url), make_store("database", url, observes=True)
    observer.open()
    write(store, a="1")
    assert rows_of(observer) == {"a": "1"}
    assert store.living([observer.member]) == set()
    assert store.strangers([]) == 0
    assert observer.living([store.member]) == {store.member}
    store.publish("x")
    assert observer.published([store.member]) == {store.member: "x"}
    observer.ask([store.member])
    assert store.wait(PATIENCE)
    assert store.asked
    observer.close()
    with store.transaction() as rows:
        del rows["a"]
        book = Book(rows)
        book.join(store.member, {}, TERMS)
        book.tell(book.allocation())
    assert main(["ledger", "show", "--ledger", "database", "--url", given]) == 0
    assert "1 member" in capsys.readouterr().out


def test_reap_asks_the_server_of_the_ledger_if_it_is_told_no_other(
    url, make, capsys, monkeypatch, given
):
    monkeypatch.delenv("DATABASE_URL", raising=False)
    store = make(url)
    with store.transaction() as rows:
        book = Book(rows)
        book.join("nobody", {}, TERMS, server=store.server)
        book.write("nobody", replace(book.members["nobody"], owned=3))
    store.close()
    assert main(["ledger", "reap", "--ledger", given]) == 0
    assert "1 dead found, 3 slots freed" in capsys.readouterr().out


def test_reset_is_refused_while_a_member_lives_that_has_no_row(
    url, make, capsys, given
):
    store = make(url)
    args = ["ledger", "reset", "--ledger", "database", "--url", given, "--yes"]
    assert main(args) == 2
    assert "1 member alive: stop them before" in capsys.readouterr().err
    store.close()
    eventually(lambda: main(args) == 0)


# -- the session ----------------------------------------------------------------------


@pytest.fixture
def cursor(url):
    """A cursor of the operator's."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection.connection.cursor()
    engine.dispose()


END = "select pg_terminate_backend(:pid)"


def test_lost_control_connection_is_a_lost_sign(driver_url, make, sql):
    store, other = make(driver_url), make(driver_url)
    assert (store.control_connections, store.signed) == (1, True)
    sql(END, pid=store._driver.info.backend_pid)
    eventually(lambda: other.living([store.member]) == set())
    with pytest.raises(StoreAway):
        store.in_place()
    assert (store.control_connections, store.signed) == (0, False)
    assert not store.in_place()
    store.nudge()
    store.open()
    assert store.signed
    assert other.living([store.member]) == {store.member}
    assert rows_of(store) == {}


def test_server_that_became_read_only_is_left_by_the_next_reading(driver_url, make):
    """The pool connects to its successor already, and waits for the sign there."""
    store, observer = make(driver_url), make(driver_url, observes=True)
    for one in store, observer:
        one._run("SET default_transaction_read_only = on")
    assert observer.read() == {}
    with pytest.raises(StoreAway, match="read-only"):
        store.read()
    assert (store.control_connections, store.signed) == (0, False)
    store.open()
    assert rows_of(store) == {}


def test_connection_that_is_lost_ends_the_wait(url, make, sql):
    store = make(url)
    caller = Caller(store.wait, PATIENCE)
    sql(END, pid=store._driver.info.backend_pid)
    try:
        assert caller.result()  # woken by what the server said last
    except StoreAway:
        pass  # or by its end
    with pytest.raises(StoreAway):
        rows_of(store)
    assert not store.signed


def test_transaction_of_a_stopped_process_is_ended(url, make, monkeypatch):
    monkeypatch.setattr(postgres, "_STATEMENT_TIMEOUT", "100ms")
    stopped, other = make(url), make(url)
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


def test_server_that_is_not_there_is_a_store_that_is_away(tmp_path):
    url = make_url("postgresql+psycopg2://u:s3cret@/db").set(host=None)
    store = PostgresStore(url.update_query_dict({"host": str(tmp_path)}))
    with pytest.raises(StoreAway) as caught:
        store.open()
    assert "s3cret" not in str(caught.value) + store.name


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_url_that_the_driver_does_not_take_is_an_error_at_once(driver):
    url = f"postgresql+{driver}://app:s3cret@localhost/app?nonsense=1"
    store = PostgresStore(make_url(url))
    words = "app ledger 'default' cannot be used: .*invalid connection option"
    with pytest.raises(LedgerError, match=words) as caught:
        store.open()
    assert "s3cret" not in str(caught.value)


def test_pooler_in_between_is_refused(url, monkeypatch):
    """None is installed here: what its driver would say is put in its place."""
    check = watch.identify
    monkeypatch.setattr(watch, "identify", lambda c, pid: check(c, pid + 1))
    with pytest.raises(LedgerError, match="a pooler like PgBouncer is in between"):
        PostgresStore(url).open()


def test_sessions_are_seen_until_they_end_whatever_is_done_in_them(driver_url, cursor):
    before = watch.look(cursor)
    engine = create_engine(driver_url)
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        own = connection.connection.cursor()
        server, session, _ = watch.identify(own, driver.info.backend_pid)
        driver.rollback()
        driver.autocommit = True
        own.execute("DISCARD ALL")
        present = watch.look(cursor)
        assert present.server == server == before.server
        assert session.pid == driver.info.backend_pid
        assert session in present.sessions - before.sessions
        assert session in present.peers
        driver.autocommit = False
    engine.dispose()
    eventually(lambda: session not in watch.look(cursor).sessions)


def test_sessions_of_another_role_are_seen_without_their_beginning(url, cursor, role):
    _, session, _ = watch.identify(cursor, None)
    engine = create_engine(role())
    with engine.connect() as connection:
        present = watch.look(connection.connection.cursor())
    engine.dispose()
    assert session._replace(began=None) in present.sessions
    assert session.pid not in {peer.pid for peer in present.peers}


def test_pools_of_other_ledgers_are_seen(url, cursor):
    engine = create_engine(url)
    with engine.connect() as connection:
        assert watch.other_ledgers(connection.connection.cursor(), 77) == set()
        assert watch.other_ledgers(cursor, 78) == {77}
        assert watch.other_ledgers(cursor, 77) == {78}
        connection.invalidate()
    engine.dispose()


def test_sign_of_a_session_that_only_the_server_still_has_is_given_anew(
    driver_url, make, monkeypatch
):
    """A firewall has reset the client: the server may not notice for hours."""
    store = make(driver_url)
    before = store._connection
    with monkeypatch.context() as patch:
        for name in ("invalidate", "close"):
            patch.setattr(before, name, lambda: None)
        store._lost()
    assert not store.signed
    store.open()
    assert store.signed
    assert store.living([store.member]) == {store.member}
    with pytest.raises(DBAPIError):
        before.execute(text("select 1"))
    before.close()


def test_network_that_is_cut_is_noticed_by_the_kernel_within_ten_seconds(
    driver_url, make
):
    def settings(url):
        info = make(url)._driver.info
        return getattr(info, "dsn_parameters", None) or info.get_parameters()

    found = settings(driver_url)
    idle, interval, count = (
        int(found[f"keepalives_{what}"]) for what in ("idle", "interval", "count")
    )
    assert found.get("keepalives", "1") == "1"
    assert idle + interval * count <= 10
    assert 0 < int(found["tcp_user_timeout"]) <= 10_000
    own = driver_url.update_query_dict({"keepalives_idle": "60"})
    assert settings(own)["keepalives_idle"] == "60"


def test_server_that_has_no_session_for_the_role_is_a_store_that_is_away(
    driver_url, role, caplog
):
    poor = role("connection limit 1", driver_url.drivername)
    engine = create_engine(poor)
    with engine.connect():
        with pytest.raises(StoreAway, match="too many connections for role") as caught:
            PostgresStore(poor).open()
        assert "\n" not in str(caught.value)
        pool = SimPool(SimServer(), "m")
        pool.request("a")
        keeper = Keeper(PostgresStore(poor), TERMS, pool)
        with caplog.at_level(logging.DEBUG):
            keeper.step(0.0)
        assert "too many connections for role" in keeper.trouble
        (record,) = caplog.records
        assert record.exc_info is None
        assert "\n" not in record.getMessage()
        keeper.close()
    engine.dispose()


def test_session_that_ends_while_it_is_prepared_is_a_store_that_is_away(
    driver_url, sql, monkeypatch
):
    check = watch.identify

    def ended(cursor, pid):
        sql(END, pid=pid)
        return check(cursor, pid)

    store = PostgresStore(driver_url)
    with monkeypatch.context() as patch:
        patch.setattr(watch, "identify", ended)
        with pytest.raises(StoreAway):
            store.open()
    assert store.control_connections == 0
    store.open()
    store.close()


def test_store_that_is_forked_in_its_first_connect(driver_url):
    """SQLAlchemy holds a lock in it, which would be held for ever in the child."""
    store, gate = PostgresStore(driver_url), Gate()
    event.listen(store._engine, "connect", gate)
    opening = Caller(store.open)
    gate.reached()
    child = os.fork()
    if not child:
        signal.alarm(int(PATIENCE))
        try:
            store.after_fork()
            store.open()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    gate.open()
    opening.result()
    store.close()
