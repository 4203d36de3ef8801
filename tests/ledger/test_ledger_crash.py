"""A crash of the server that loses what the ledger has committed last.

A pool whose sessions are at the ledger's server does not wait for the disk: the crash
ends all of them.
"""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import DBAPIError
from support import state
from support.cluster import ask, restart
from support.sessions import Sessions
from support.stores import rows_of, write
from support.stub import all_for_one
from support.threads import Caller, Gate, ensure_waiting, eventually

from sqla_fairpool import FairQueuePool
from sqla_fairpool.demo import EmbeddedServer
from sqla_fairpool.ledger.inspector import read
from sqla_fairpool.ledger.postgres import PostgresStore
from sqla_fairpool.ledger.store import StoreAway

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture
def server():
    """One that writes nothing to its disk but for who waits for that."""
    server = EmbeddedServer()
    server.start()
    ask(server.url, "alter system set wal_writer_delay = '10s'")
    ask(server.url, "select pg_reload_conf()")
    yield server
    server.stop()


def crash(server):
    restart(server, "immediate")


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_not_durable_is_lost_where_the_server_is_the_pools(
    server, opened, shared
):
    store = opened(PostgresStore(make_url(server.url)))
    write(store, a="1")
    store.serves_pool = shared
    with store.transaction(durable=False) as rows:
        rows["a"] = "2"
    assert store.swap("a", "2", "3")
    assert store.read() == {"a": "3"}
    crash(server)
    with pytest.raises(StoreAway):
        store.read()
    store.open()
    assert not store.serves_pool
    assert rows_of(store) == {"a": "1" if shared else "3"}


def test_what_is_durable_is_kept(server, opened):
    store = opened(PostgresStore(make_url(server.url)))
    store.serves_pool = True
    write(store, a="1")
    crash(server)
    with pytest.raises(StoreAway):
        store.read()
    store.open()
    assert rows_of(store) == {"a": "1"}


@pytest.fixture
def engines(server):
    """Two members with one slot between them, and what looks at their ledger."""
    name = uuid.uuid4().hex
    url = make_url(server.url).update_query_dict({"application_name": name})
    ledger = url.update_query_dict({"ledger": name})
    options = {"ledger": ledger.render_as_string(False), **all_for_one(1)}
    engines = [create_engine(url, poolclass=FairQueuePool, **options) for _ in range(2)]
    looker = PostgresStore(make_url(server.url), name, observes=True)
    yield (*engines, looker, name)
    looker.close()
    for engine in engines:
        engine.dispose()
        state.keeper(engine).close()


def works(engine):
    try:
        engine.connect().close()
    except DBAPIError:  # the session that has ended
        return False
    return True


def owned(store):
    store.close()
    store.open()
    return {key: row.owned for key, row in read(store).book.members.items()}


def pass_on(held, engine):
    """Return a connection, and the one that is had for it elsewhere."""
    waits = Caller(engine.connect)
    ensure_waiting(engine.pool, 1)
    held.close()
    return waits.result()


def test_slot_whose_hand_over_is_lost_is_used_by_one(server, engines, monkeypatch):
    one, other, looker, name = engines
    here, there = (state.keeper(engine)._store.member for engine in (one, other))
    # Who has no session yet does not know where they will be, and waits for the disk.
    held = pass_on(pass_on(one.connect(), other), one)
    assert owned(looker) == {here: 1, there: 0}
    gate, opens = Gate(), PostgresStore.open

    def open_later(store):
        if store is not looker:
            gate()
        opens(store)

    monkeypatch.setattr(PostgresStore, "open", open_later)
    crash(server)
    gate.reached()
    assert owned(looker) == {here: 0, there: 1}
    with Sessions(server.url, name) as sessions:
        gate.open()
        held.invalidate()
        held.close()
        for _ in range(3):
            for engine in (one, other):
                eventually(lambda engine=engine: works(engine))
    assert sessions.most == 1
    assert sum(owned(looker).values()) == 1


def test_pool_at_another_server_waits_for_the_disk(server, engines, postgres_url):
    one, *_ = engines
    store = state.keeper(one)._store
    assert works(one) and store.serves_pool
    ledger = make_url(one.pool.options.ledger).update_query_dict({"ledger": "new"})
    options = {"ledger": ledger.render_as_string(False), **all_for_one(1)}
    elsewhere = create_engine(postgres_url, poolclass=FairQueuePool, **options)
    assert works(elsewhere) and not state.keeper(elsewhere)._store.serves_pool
    elsewhere.dispose()
    state.keeper(elsewhere).close()


def capacity(store):
    store.close()
    store.open()
    return read(store).book.terms.capacity


def test_limits_that_were_changed_are_kept(server, engines):
    one, _, looker, _ = engines
    assert works(one)
    one.pool.reconfigure(pool_size=3, soft_limit=3, max_limit=3)
    eventually(lambda: capacity(looker) == 3)
    crash(server)
    assert capacity(looker) == 3
