"""A pool as the member of a ledger: what it may open, and what it tells."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.state import assert_consistent
from support.stub import StubServer
from support.threads import PATIENCE, Caller, ensure_waiting, eventually

from sqla_fairpool import AsyncAdaptedFairQueuePool, CheckoutTimeout, FairQueuePool
from sqla_fairpool.ledger.errors import LedgerError, TermsDiffer
from sqla_fairpool.ledger.host import HostStore


class FakeKeeper:
    """Counts the rings, and does nothing by itself."""

    def __init__(self):
        self.rings = []
        self.closed = False
        self.trouble = None

    def ring(self, tag=None):
        self.rings.append(tag)

    def close(self):
        self.closed = True

    def after_fork(self):
        self.rings = []


@pytest.fixture
def joined(server):
    """A pool that is a member, its share, and its keeper."""
    pool = server.pool(pool_size=10, soft_limit=5, max_limit=8)
    share = state.join(pool, FakeKeeper())
    return pool, share, share.keeper


def connect(pool, tag="a"):
    import sqla_fairpool

    with sqla_fairpool.tag(tag):
        return pool.connect()


def there(share):
    return share.demand()[0]


# -- what may be opened ----------------------------------------------------------------


def test_nothing_is_opened_before_it_is_allotted(joined, server):
    pool, share, keeper = joined
    caller = Caller(connect, pool)
    ensure_waiting(pool, 1)
    eventually(lambda: keeper.rings == ["a"])
    assert (server.opened, there(share)) == (0, 0)
    assert share.demand()[1]["a"][:3] == (0, 1, True)
    share.allot(1, {"a": 1}, 1)
    caller.result().close()
    assert there(share) == 1


def test_ceilings_are_those_that_are_told(joined):
    pool, share, _ = joined
    share.allot(10, {"a": 2}, 1)
    held = [connect(pool), connect(pool), connect(pool, "b")]
    waiting = [Caller(connect, pool), Caller(connect, pool, "b")]
    ensure_waiting(pool, 2)
    share.allot(10, {"a": 3, "b": 2}, 1)
    held += [caller.result() for caller in waiting]
    assert pool.stats().tag("a").limit == 3
    assert_consistent(pool)
    while held:
        held.pop().close()


def test_fewer_slots_take_nothing_away_and_drain(joined, server):
    pool, share, keeper = joined
    share.allot(4, {"a": 4}, 4)
    held = [connect(pool) for _ in range(4)]
    share.allot(2, {"a": 4}, 4)
    share.close_surplus()
    assert (server.open, there(share)) == (4, 4)
    keeper.rings.clear()
    held.pop().close()
    assert (server.open, there(share)) == (3, 3)
    assert keeper.rings
    held.pop().close()
    held.pop().close()
    held.pop().close()
    assert (server.open, there(share), pool.checkedin()) == (2, 2, 2)
    share.allot(0, {"a": 4}, 4)
    share.close_surplus()
    assert (server.open, there(share)) == (0, 0)


def test_what_is_being_closed_still_counts(joined, server):
    pool, share, _ = joined
    share.allot(3, {"a": 3}, 3)
    for connection in [connect(pool) for _ in range(3)]:
        connection.close()
    closing, go_on = threading.Event(), threading.Event()

    def slowly():
        closing.set()
        assert go_on.wait(PATIENCE)

    server.before["close"] = slowly
    shrinking = Caller(share.allot, 1, {"a": 3}, 3)
    assert closing.wait(PATIENCE)
    assert server.open == 3
    growing = Caller(share.allot, 3, {"a": 3}, 3)
    eventually(lambda: state.allotted(pool) == 3)
    callers = [Caller(connect, pool) for _ in range(3)]
    ensure_waiting(pool, 2)
    go_on.set()
    for caller in (shrinking, growing):
        caller.result()
    for caller in callers:
        caller.result().close()
    assert server.most == 3


def test_detached_connection_keeps_its_slot_until_it_is_closed(joined, server):
    pool, share, keeper = joined
    share.allot(2, {"a": 2}, 2)
    detached, other = connect(pool), connect(pool)
    waiter = Caller(connect, pool)
    ensure_waiting(pool, 1)
    detached.detach()
    assert there(share) == 2
    assert pool.checkedout() == 1
    ensure_waiting(pool, 1)
    keeper.rings.clear()
    detached.close()
    state.look_around(pool)
    waiter.result().close()
    assert keeper.rings
    other.close()
    assert there(share) == server.open == 2
    assert server.most == 2


def test_detached_connection_that_is_dropped_gives_its_slot_back(joined, server):
    pool, share, _ = joined
    share.allot(1, {"a": 1}, 1)
    connection = connect(pool)
    connection.detach()
    assert there(share) == 1
    del connection
    gc.collect()
    state.look_around(pool)
    assert (there(share), server.open) == (0, 0)
    connect(pool).close()


def test_invalidated_and_recycled_connections_count_once(joined, server):
    pool, share, _ = joined
    share.allot(1, {"a": 1}, 1)
    for soft in (False, True):
        connection = connect(pool)
        connection.invalidate(soft=soft)
        connection.close()
        connect(pool).close()
        assert there(share) == 1
    assert server.most == 1


def test_failed_connect_gives_its_slot_to_the_next(joined, server):
    pool, share, _ = joined
    share.allot(1, {"a": 1}, 1)

    def fail():
        server.before.clear()
        raise RuntimeError("no")

    server.before["connect"] = fail
    with pytest.raises(RuntimeError):
        connect(pool)
    assert there(share) == 0
    connect(pool).close()


def test_dispose_keeps_the_account(joined, server):
    pool, share, _ = joined
    share.allot(2, {"a": 2}, 2)
    out, idle = connect(pool), connect(pool)
    idle.close()
    pool.dispose()
    successor = pool.recreate()
    assert there(share) == 1
    waiter = connect(successor)
    assert there(share) == 2
    out.close()
    assert there(share) == 1
    waiter.close()
    assert server.most == 2


# -- what is told ----------------------------------------------------------------------


def test_local_checkout_rings_nobody(joined):
    pool, share, keeper = joined
    share.allot(2, {"a": 2}, 2)
    connect(pool).close()
    keeper.rings.clear()
    for _ in range(100):
        connect(pool).close()
        connect(pool, "b").close()
    assert keeper.rings == []


def test_pressed_pool_rings_when_a_connection_falls_idle(joined):
    pool, share, keeper = joined
    share.allot(2, {"a": 2}, 2)
    held = connect(pool)
    share.press(True)
    keeper.rings.clear()
    held.close()
    assert keeper.rings == [None]
    connect(pool).close()
    assert len(keeper.rings) == 2
    share.press(False)
    connect(pool).close()
    connect(pool).close()
    assert len(keeper.rings) == 2


def test_refusal_reaches_who_waits_and_is_over_with_a_share(joined):
    pool, share, _ = joined
    caller = Caller(connect, pool)
    ensure_waiting(pool, 1)
    share.refuse(TermsDiffer("other limits"))
    with pytest.raises(TermsDiffer, match="other limits"):
        caller.result()
    assert pool.stats().waiting == 0
    share.allot(1, {}, 1)
    connect(pool).close()


def test_waiting_for_a_slot_times_out_as_ever(server):
    pool = server.pool(pool_size=2, timeout=0.01)
    state.join(pool, FakeKeeper())
    with pytest.raises(CheckoutTimeout):
        connect(pool)


def test_time_out_says_what_the_ledger_has_to_do_with_it(joined):
    pool, share, keeper = joined
    pool.reconfigure(timeout=0.01)
    share.allot(0, {"a": 5}, 5)
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool)
    assert caught.value.diagnosis.allotted == 0
    assert str(caught.value).endswith(
        "advice: the ledger lets this process have 0 of 10 connections now, the others "
        "are other processes': sqla-fairpool monitor shows whose"
    )
    keeper.trouble = "db:5432: no route to host"
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "b")
    assert str(caught.value).endswith(
        "advice: without the ledger, no more than 0 connections may be open here: "
        "db:5432: no route to host"
    )


def test_what_all_have_agreed_on_is_not_reconfigured(joined):
    pool, _, _ = joined
    for change in ({"soft_limit": 2}, {"pool_size": 12}, {"idle_timeout": 5}):
        with pytest.raises(ArgumentError, match="as agreed with the ledger"):
            pool.reconfigure(**change)
    pool.reconfigure(timeout=3)


def test_pool_that_nobody_has_any_more_is_told_to_its_keeper():
    pool = StubServer().pool()
    keeper = FakeKeeper()
    share = state.join(pool, keeper)
    del pool
    gc.collect()
    assert keeper.rings == [None]
    assert share.demand() == (0, {})
    assert keeper.closed


# -- with a real ledger ----------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path):
    return str(tmp_path / "app.ledger")


@pytest.fixture
def member(ledger):
    """Make engines on stubs, all members of one ledger."""
    engines = []

    def member(server, **options):
        engine = server.engine(ledger=ledger, **options)
        engines.append(engine)
        return engine

    yield member
    for engine in engines:
        engine.dispose()
        state.keeper(engine).close()


def take(engine, number, tag="a"):
    tagged = engine.execution_options(scraper=tag)
    return [tagged.connect() for _ in range(number)]


def give(connections):
    while connections:
        connections.pop().close()


def test_two_pools_share_the_rules(member):
    server = StubServer()
    one, two = member(server), member(server)
    alone = take(one, 15)
    callers = [Caller(take, two, 1, "b") for _ in range(10)]
    first = [caller.result() for caller in callers[:5]]
    assert server.open == 20
    give(alone)
    rest = [caller.result() for caller in callers[5:]]
    assert server.most == 20
    more = [Caller(take, one, 1) for _ in range(15)]
    eventually(lambda: one.pool.checkedout() == 10)
    eventually(lambda: one.pool.stats().waiting == 5)
    assert (two.pool.checkedout(), server.open) == (10, 20)
    for held in first + rest:
        give(held)
    for caller in more:
        give(caller.result())
    assert server.most == 20


def test_local_checkout_does_no_store_io(member, monkeypatch):
    engine = member(StubServer())
    give(take(engine, 3))
    keeper = state.keeper(engine)
    eventually(lambda: (has := keeper.member.allotment) and has.row.owned == 3)
    calls = []
    for name in ("transaction", "ring", "living", "nudge"):
        original = getattr(HostStore, name)
        monkeypatch.setattr(
            HostStore,
            name,
            lambda *args, _o=original, _n=name: calls.append(_n) or _o(*args),
        )
    before = keeper.member.transactions
    for _ in range(300):
        give(take(engine, 3))
    assert keeper.member.transactions == before
    assert calls == []


def test_members_that_disagree_are_told_both_sides(member):
    server = StubServer()
    give(take(member(server, pool_size=20), 1))
    other = member(server, pool_size=10)
    with pytest.raises(TermsDiffer) as caught:
        other.connect()
    assert "capacity=10" in str(caught.value)
    assert "capacity=20" in str(caught.value)


def test_default_place_needs_a_database():
    server = StubServer()
    pool = server.pool(ledger="host")  # without an engine there is no URL
    with pytest.raises(LedgerError, match="name a path as the ledger"):
        pool.connect()


def test_default_place_follows_from_the_engines_url(temp, tmp_path):
    engine = create_engine(
        f"sqlite:///{tmp_path}/x.db", poolclass=FairQueuePool, ledger="host"
    )
    with engine.connect():
        assert list(temp.glob("sqla-fairpool-*/sqlite-*.ledger"))
    engine.dispose()
    state.keeper(engine).close()


def test_plugin_takes_a_ledger(tmp_path):
    engine = create_engine(
        f"sqlite:///{tmp_path}/x.db?plugin=fairpool&fairpool_ledger={tmp_path}/l.ledger"
    )
    with engine.connect():
        assert (tmp_path / "l.ledger").exists()
    engine.dispose()
    state.keeper(engine).close()


def test_environment_names_the_ledger_where_the_url_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRPOOL_LEDGER", f"{tmp_path}/env.ledger")
    url = f"sqlite:///{tmp_path}/x.db?plugin=fairpool"
    assert create_engine(url).pool.options.ledger == f"{tmp_path}/env.ledger"
    named = create_engine(f"{url}&fairpool_ledger=none")
    assert named.pool.options.ledger is None
    assert FairQueuePool(lambda: None).options.ledger is None


def test_tasks_share_with_threads(tmp_path, ledger):
    """The asyncio pool gives way too: its idle connections are closed in its loop."""
    server = StubServer()
    threads = server.engine(ledger=ledger, pool_size=4, soft_limit=2, max_limit=4)

    async def main():
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path}/x.db",
            poolclass=AsyncAdaptedFairQueuePool,
            ledger=ledger,
            pool_size=4,
            soft_limit=2,
            max_limit=4,
        )
        tasks = engine.execution_options(scraper="tasks")
        held = [await tasks.connect() for _ in range(4)]
        for connection in held:
            await connection.close()
        taken = await asyncio.to_thread(take, threads, 2)
        assert len(taken) == 2
        give(taken)
        async with tasks.connect():
            pass
        await engine.dispose()
        await asyncio.to_thread(state.keeper(engine).close)

    asyncio.run(main())
    threads.dispose()
    state.keeper(threads).close()


def test_imposed_ceilings_keep_the_promises(server):
    """Any numbers from outside leave the scheduler's invariants true."""
    pool = server.pool(pool_size=6, soft_limit=3, max_limit=5)
    share = state.join(pool, FakeKeeper())
    for slots, ceilings, other in [(6, {"a": 3}, 2), (3, {}, 1), (0, {"a": 1}, 0)]:
        share.allot(slots, ceilings, other)
        assert_consistent(pool)
        held = [connect(pool) for _ in range(min(slots, ceilings.get("a", other)))]
        assert_consistent(pool)
        give(held)
        assert_consistent(pool)


def test_frozen_pool_uses_what_there_is_and_opens_nothing(joined, server):
    pool, share, _ = joined
    share.allot(5, {"a": 5}, 5)
    held = [connect(pool) for _ in range(3)]
    held.pop().close()
    share.freeze()
    held.append(connect(pool))
    waiter = Caller(connect, pool)
    ensure_waiting(pool, 1)
    held.pop().invalidate()  # one less, for good
    assert (server.open, there(share)) == (2, 2)
    ensure_waiting(pool, 1)
    held.pop().close()
    waiter.result().close()
    assert server.opened == 3
    share.allot(5, {"a": 5}, 5)
    held += [connect(pool) for _ in range(4)]
    assert server.open == 5
    give(held)


def test_demand_tells_the_most_that_were_in_use(joined):
    pool, share, _ = joined
    share.allot(5, {"a": 5}, 5)
    give([connect(pool) for _ in range(3)])
    assert share.demand()[1]["a"].in_use == 3
    assert share.demand()[1]["a"].in_use == 0
    held = connect(pool)
    assert share.demand()[1]["a"].in_use == 1
    assert share.demand()[1]["a"].in_use == 1
    held.close()
    assert share.demand()[1]["a"].in_use == 1
    assert share.demand()[1]["a"].in_use == 0
