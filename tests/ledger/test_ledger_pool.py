"""A pool as the member of a ledger: what it may open, and what it tells."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import pickle
import shutil
import threading
from functools import partial

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.state import assert_consistent
from support.stub import StubServer, all_for_one
from support.threads import (
    PATIENCE,
    Caller,
    Gate,
    connect,
    ensure_waiting,
    eventually,
    give,
    take,
    wait_in_line,
)
from support.worlds import contract, world_of

from sqla_fairpool import AsyncAdaptedFairQueuePool, CheckoutTimeout, FairQueuePool
from sqla_fairpool.diagnosis.report import Elsewhere
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.keeper import Keeper, describe_process
from sqla_fairpool.ledger.rows import Terms
from sqla_fairpool.ledger.store import LedgerError, ServerDiffers, StoreAway
from sqla_fairpool.ledger.watch import Pace
from sqla_fairpool.pool import ledger_sessions


class FakeKeeper:
    """Counts the rings, and does nothing by itself."""

    def __init__(self):
        self.rings = []
        self.closed = False
        self.trouble = None

    def ring(self, tag=None):
        self.rings.append(tag)

    def set_terms(self, terms):
        self.terms = terms

    def close(self):
        self.closed = True


@pytest.fixture
def pool(server):
    """A pool that is a member."""
    pool = server.pool(pool_size=10, soft_limit=5, max_limit=8)
    state.join(pool, FakeKeeper())
    return pool


@pytest.fixture
def share(pool):
    """Its side of the ledger."""
    return state.share(pool)


@pytest.fixture
def keeper(share):
    return share.keeper


@pytest.fixture
def allot(share):
    """Let it open so many connections, all of which one tag may have."""
    return lambda slots: share.allot(slots, {}, slots)


def there(share):
    return share.demand()[0]


# -- what may be opened ----------------------------------------------------------------


def test_nothing_is_opened_before_it_is_allotted(pool, share, keeper, server):
    (caller,) = wait_in_line(pool)
    eventually(lambda: keeper.rings == ["a"])
    assert (server.opened, there(share)) == (0, 0)
    assert share.demand()[1]["a"][:3] == (0, 1, True)
    share.allot(1, {"a": 1}, 1)
    caller.result().close()
    assert there(share) == 1


def test_ceilings_are_those_that_are_told(pool, share):
    share.allot(10, {"a": 2}, 1)
    held = [*take(pool, 2), connect(pool, "b")]
    waiting = [*wait_in_line(pool), *wait_in_line(pool, "b")]
    share.allot(10, {"a": 3, "b": 2}, 1)
    held += [caller.result() for caller in waiting]
    assert pool.stats().tag("a").limit == 3
    assert_consistent(pool)
    give(held)
    # Any numbers from outside leave the scheduler's invariants true.
    for slots, ceilings, other in [(6, {"a": 3}, 2), (3, {}, 1), (0, {"a": 1}, 0)]:
        share.allot(slots, ceilings, other)
        assert_consistent(pool)
        held = take(pool, min(slots, ceilings.get("a", other)))
        assert_consistent(pool)
        give(held)
        assert_consistent(pool)


def test_fewer_slots_take_nothing_away_and_drain(pool, share, keeper, allot, server):
    allot(4)
    held = take(pool, 4)
    allot(2)
    share.close_surplus()
    assert server.open == there(share) == 4
    keeper.rings.clear()
    held.pop().close()
    assert server.open == there(share) == 3
    assert keeper.rings
    give(held)
    assert server.open == there(share) == pool.checkedin() == 2
    allot(0)
    share.close_surplus()
    assert server.open == there(share) == 0


def test_what_is_being_closed_still_counts(pool, allot, server):
    allot(3)
    give(take(pool, 3))
    gate = server.before["close"] = Gate()
    shrinking = Caller(allot, 1)
    gate.reached()
    assert server.open == 3
    growing = Caller(allot, 3)
    eventually(lambda: state.allotted(pool) == 3)
    callers = [Caller(connect, pool) for _ in range(3)]
    ensure_waiting(pool, 2)
    gate.open()
    for caller in (shrinking, growing):
        caller.result()
    give([caller.result() for caller in callers])
    assert server.most == 3


def test_detached_connection_keeps_its_slot_until_it_is_closed(
    pool, share, keeper, allot, server
):
    allot(2)
    detached, other = take(pool, 2)
    (waiter,) = wait_in_line(pool)
    detached.detach()
    assert (there(share), pool.checkedout()) == (2, 1)
    ensure_waiting(pool, 1)
    keeper.rings.clear()
    detached.close()
    state.look_around(pool)
    waiter.result().close()
    assert keeper.rings
    other.detach()
    del other  # or until it is dropped
    gc.collect()
    state.look_around(pool)
    assert there(share) == server.open == 1
    give(take(pool, 2))
    assert server.most == 2


def test_connections_that_are_replaced_or_not_opened_count_once(
    pool, share, allot, server
):
    allot(1)
    for soft in (False, True):
        connection = connect(pool)
        connection.invalidate(soft=soft)
        connection.close()
        connect(pool).close()
        assert there(share) == 1
    connect(pool).invalidate()

    def fail():
        server.before.clear()
        raise RuntimeError("no")

    server.before["connect"] = fail
    with pytest.raises(RuntimeError):
        connect(pool)
    assert there(share) == 0
    connect(pool).close()
    assert server.most == 1


def test_dispose_keeps_the_account(pool, share, allot, server):
    allot(2)
    out, idle = take(pool, 2)
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


def test_frozen_pool_uses_what_there_is_and_opens_nothing(pool, share, allot, server):
    allot(5)
    held = take(pool, 3)
    held.pop().close()
    share.freeze()
    held.append(connect(pool))
    (waiter,) = wait_in_line(pool)
    held.pop().invalidate()  # one less, for good
    assert server.open == there(share) == 2
    ensure_waiting(pool, 1)
    held.pop().close()
    waiter.result().close()
    assert server.opened == 3
    allot(5)
    held += take(pool, 4)
    assert server.open == 5
    give(held)


# -- what is told ----------------------------------------------------------------------


def test_keeper_is_rung_for_idle_connections_only_under_pressure(
    pool, share, keeper, allot
):
    allot(2)
    give(take(pool, 2))
    keeper.rings.clear()
    for tag in "ab" * 50:
        connect(pool, tag).close()
    assert keeper.rings == []
    held = connect(pool)
    share.press(True)
    held.close()
    assert keeper.rings == [None]
    connect(pool).close()
    assert len(keeper.rings) == 2
    share.press(False)
    connect(pool).close()
    connect(pool).close()
    assert len(keeper.rings) == 2


def test_demand_tells_the_most_that_were_in_use(pool, share, allot):
    def in_use():
        return share.demand()[1]["a"].in_use

    allot(5)
    give(take(pool, 3))
    assert [in_use(), in_use()] == [3, 0]
    held = connect(pool)
    assert [in_use(), in_use()] == [1, 1]
    held.close()
    assert [in_use(), in_use()] == [1, 0]


def test_paused_pool_asks_for_no_slots_and_stays_paused_with_more(pool, share, allot):
    allot(1)
    held = connect(pool)
    (caller,) = wait_in_line(pool)
    assert share.demand()[1]["a"].waiting == 1
    pool.pause()
    assert share.demand()[1]["a"].waiting == 0
    allot(5)
    assert_consistent(pool)
    assert state.waiting(pool) == 1
    pool.resume()
    give([held, caller.result()])


def test_of_the_lost_ones_the_first_are_forgotten_for_which_there_are_slots(
    pool, share, allot, monkeypatch
):
    allot(3)
    held = take(pool, 3)
    existing = state.core(pool).slots.existing
    first, second, _ = existing
    monkeypatch.setattr(existing, "lost_ones", lambda: [first, second])
    assert share.lost() == [first.session, second.session]
    share.buried(share.lost()[:1])
    assert first not in existing
    assert second in existing
    give(held)


def test_refusal_reaches_who_waits_and_is_over_with_a_share(pool, share, allot):
    (caller,) = wait_in_line(pool)
    share.refuse(ServerDiffers("other limits"))
    with pytest.raises(ServerDiffers, match="other limits"):
        caller.result()
    assert pool.stats().waiting == 0
    allot(1)
    connect(pool).close()


def test_time_out_says_what_the_ledger_has_to_do_with_it(pool, keeper, allot):
    pool.reconfigure(timeout=0.01)
    allot(0)
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool)
    assert caught.value.diagnosis.allotted == 0
    assert caught.value.args[0].endswith(
        "advice: the ledger lets this process have 0 of 10 connections now, other "
        "processes have the others: sqla-fairpool monitor shows whose"
    )
    keeper.trouble = "db:5432: no route to host"
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "b")
    assert caught.value.args[0].endswith(
        "advice: without the ledger, no more than 0 connections may be open here: "
        "db:5432: no route to host"
    )


def test_what_all_share_is_changed_by_way_of_the_ledger(pool, keeper):
    before = pool.options
    for change in ({"soft_limit": 2}, {"pool_size": 12}, {"idle_timeout": 5}):
        pool.reconfigure(**change, timeout=3)
        asked = before.changed(change)
        assert keeper.terms == Terms(**asked.terms)
        assert (pool.options.terms, pool.options.timeout) == (before.terms, 3)
    with pytest.raises(ArgumentError, match="soft_limit=99"):
        pool.reconfigure(soft_limit=99)
    state.share(pool).adopt(keeper.terms)
    assert pool.options.terms == asked.terms


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


@pytest.mark.parametrize("is_served", [True, False])
def test_thread_ends_with_its_pool_also_while_the_store_is_away(
    server, tmp_path, is_served
):
    """Away since it has served, or from the beginning."""
    ledger = tmp_path / "ledger" if is_served else f"postgresql:///x?host={tmp_path}"
    options = {**all_for_one(1), "pool_timeout": PATIENCE if is_served else 0}
    engine = server.engine(ledger=str(ledger), **options)
    keeper = state.keeper(engine)

    def fail(*args):
        raise StoreAway("no answer")

    with contextlib.suppress(CheckoutTimeout):
        engine.connect().close()
        keeper._store.open = keeper._store.in_place = fail
        keeper.ring()
    eventually(lambda: keeper.away_since is not None)
    thread = keeper._runner["runner"]
    del engine
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def keep():
    """Have engines disposed of, and their keepers closed, after the test."""
    engines = []

    def keep(engine):
        engines.append(engine)
        return engine

    yield keep
    for engine in engines:
        engine.dispose()
        state.keeper(engine).close()


@pytest.fixture
def member(keep, tmp_path):
    """Make engines on stubs, all members of one ledger."""
    ledger = str(tmp_path / "app.ledger")
    return lambda server, **options: keep(server.engine(ledger=ledger, **options))


def take_from(engine, number, tag="a"):
    return take(engine.execution_options(scraper=tag), number, "unknown")


def test_two_pools_share_the_rules(member):
    server = StubServer()
    one, two = member(server), member(server)
    alone = take_from(one, 15)
    callers = [Caller(take_from, two, 1, "b") for _ in range(10)]
    first = [caller.result() for caller in callers[:5]]
    assert server.open == 20
    give(alone)
    rest = [caller.result() for caller in callers[5:]]
    assert server.most == 20
    more = [Caller(take_from, one, 1) for _ in range(15)]
    eventually(lambda: one.pool.checkedout() == 10)
    eventually(lambda: one.pool.stats().waiting == 5)
    assert (two.pool.checkedout(), server.open) == (10, 20)
    for held in first + rest:
        give(held)
    for caller in more:
        give(caller.result())
    assert server.most == 20
    # One with other limits has those of the ledger, until it leads.
    other = member(server, pool_size=10, max_overflow=5)
    with other.connect():
        assert (other.pool.options.capacity, other.pool.size()) == (20, 15)
        other.pool.reconfigure(pool_size=3, timeout=7)
        assert other.pool.options.timeout == 7
        pools = [one.pool, two.pool, other.pool]
        eventually(lambda: {pool.options.capacity for pool in pools} == {8})
        assert (other.pool.options.soft_limit, other.pool.options.max_limit) == (4, 6)


def test_local_checkout_does_no_store_io(member, monkeypatch):
    # On a busy machine these checkouts take longer than a look of the keeper's own.
    pace = Pace(beat=1000.0, slow=1000.0, far=1000.0)
    monkeypatch.setattr(ledger_sessions, "Keeper", partial(Keeper, pace=pace))
    engine = member(StubServer())
    give(take_from(engine, 3))
    keeper = state.keeper(engine)
    answers, asleep, wait = [], threading.Event(), HostStore.wait

    def noted(store, seconds):
        if wait(store, 0):
            return True
        asleep.set()
        try:
            return wait(store, seconds)
        finally:
            asleep.clear()

    monkeypatch.setattr(HostStore, "wait", noted)
    keeper.post(answers.append)
    eventually(lambda: answers == [True])
    assert asleep.wait(PATIENCE)  # that round is over
    assert keeper.member.allotment.row.owned == 3
    calls = []
    for name in ("transaction", "ring", "living", "nudge"):
        original = getattr(HostStore, name)
        monkeypatch.setattr(
            HostStore,
            name,
            lambda *args, _o=original, _n=name: calls.append(_n) or _o(*args),
        )
    before = keeper.member.rows.transactions
    for _ in range(300):
        give(take_from(engine, 3))
    assert keeper.member.rows.transactions == before
    assert calls == []


def test_ledger_is_where_the_engine_the_plugin_or_the_environment_says(
    temp, tmp_path, monkeypatch, keep
):
    url = f"sqlite:///{tmp_path}/x.db"
    keep(create_engine(url, poolclass=FairQueuePool, ledger="host")).connect().close()
    assert list(temp.glob("sqla-fairpool-*/sqlite-*.ledger"))
    url += "?plugin=fairpool"
    keep(create_engine(f"{url}&fairpool_ledger={tmp_path}/l.ledger")).connect().close()
    assert (tmp_path / "l.ledger").exists()
    monkeypatch.setenv("FAIRPOOL_LEDGER", f"{tmp_path}/env.ledger")
    assert create_engine(url).pool.options.ledger == f"{tmp_path}/env.ledger"
    named = create_engine(f"{url}&fairpool_ledger=none")
    assert named.pool.options.ledger is None
    assert FairQueuePool(lambda: None).options.ledger is None
    pool = StubServer().pool(ledger="host")  # without an engine there is no URL
    with pytest.raises(LedgerError, match="name a path as the ledger"):
        pool.connect()


@pytest.fixture(params=["sqlite", "sqlite+aiosqlite"])
def world(request, tmp_path):
    """Make members of one ledger in a world of threads, or of tasks."""
    world = world_of(f"sqlite:///{tmp_path}/x.db", request.param)
    engines = []

    def make(ledger=f"{tmp_path}/app.ledger", **options):
        options = {"poolclass": world.pool_class, "ledger": ledger, **options}
        engines.append(world.make(world.url, **options))
        return engines[-1]

    def close():
        for engine in engines:
            engine.dispose()
            state.keeper(engine).close()

    world.member, world.close = make, close
    return world


@pytest.fixture
def lines(caplog):
    """Return the lines of pool and ledger since the last call."""
    for name in ("sqlalchemy.pool", "sqla_fairpool"):
        caplog.set_level(logging.INFO, name)

    def lines():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return lines


@contract
def test_path_without_its_directory_is_mistyped(world, tmp_path, lines):
    path = tmp_path / "mistyped" / "deeper" / "app.ledger"
    engine = world.member(str(path))
    words = f"directory {path.parent} does not exist: make it, or mend the path of"
    with pytest.raises(LedgerError, match=words):
        engine.connect()
    assert not path.parent.parent.exists()
    path.parent.mkdir(parents=True)
    while not answers(engine):  # it is tried again, once a second
        world.sleep(0.02)
    assert f"joined the ledger {path}, member #1" in lines()
    # One that was there may vanish, and is made again.
    shutil.rmtree(path.parent)
    world.eventually(path.exists)


@contract
def test_log_has_the_numbers_of_the_ledger(world, lines):
    """As without one, over all processes; none from before the ledger was read."""
    seen = []

    def is_seen(line):
        seen.extend(one for one in lines() if one.startswith("Tag"))
        return line in seen

    limits = {"pool_size": 4, "soft_limit": 3, "max_limit": 4}
    limits |= {"idle_timeout": 0.5, "reallocation_interval": 0.1}
    one, two = world.member(**limits), world.member(**limits)
    give(take_from(one, 1, "a"))
    active = "Tag 'a' is active: 1 active tag, which may have 4"
    world.eventually(lambda: is_seen(active))
    give(take_from(one, 1, "a"))
    give(take_from(two, 1, "b"))
    both = "Tag 'b' is active: 2 active tags, at most 3 each"
    world.eventually(lambda: is_seen(both))
    idle = "Tag 'a' is idle: 1 active tag, which may have 4"
    while not is_seen(idle):
        give(take_from(two, 1, "b"))
        world.sleep(0.02)
    last = "Tag 'b' is idle: no tag is active, the first may have 4"
    world.eventually(lambda: is_seen(last))
    assert seen == [active, both, idle, last]


def log_of_exhaustion(lines):
    found = [line for line in lines() if line.startswith("Pool exhausted: tag 'a'")]
    return [line.partition("connections are in use; ")[::2] for line in found]


@contract
def test_those_that_wait_are_told_who_holds_what_in_other_processes(
    world, ledger, lines
):
    """In the log, in the time-out and in its diagnosis: tag, program, host and pid."""
    options = {"ledger": ledger, "pool_timeout": 1.0, **all_for_one(4)}
    one, two, third = (world.member(**options) for _ in range(3))
    begin = "Pool exhausted: tag 'a' has to wait, all 4 "
    here = describe_process()
    who = f"in {here['program']} ({here['host']}:{here['pid']})"
    held = take_from(one, 4, "b")
    with pytest.raises(CheckoutTimeout, match=r"; held by (no tag here|b=4 in )"):
        third.execution_options(fairpool_timeout=0).connect()  # read, or not yet
    caller = world.start(take_from, two, 1, "a")
    with pytest.raises(CheckoutTimeout) as caught:
        caller.result()
    assert log_of_exhaustion(lines) == [(begin, f"held by b=4 {who}")]
    facts, message = caught.value.diagnosis, str(caught.value)
    assert f"active_tags=2; held by b=4 {who}" in message
    assert f"other processes have the others, most of them b=4 {who}: " in message
    parts = here["program"], here["host"], here["pid"]
    assert facts.elsewhere == (Elsewhere("b", 4, *parts),)
    lost = Elsewhere(None, 3, *parts, "in quarantine")
    assert str(lost) == f"3 in quarantine of {who.removeprefix('in ')}"
    assert pickle.loads(pickle.dumps(caught.value)).diagnosis == facts
    give(held)


@contract
def test_exhaustion_is_logged_with_a_ledger_too(world, lines):
    begin = "Pool exhausted: tag 'a' has to wait, all 4 "
    engine = world.member(**all_for_one(4))
    callers = [world.start(take_from, engine, 1, "a") for _ in range(10)]
    world.eventually(lambda: log_of_exhaustion(lines) == [(begin, "held by a=4")])
    for caller in callers:
        give(caller.result())


def answers(engine):
    with contextlib.suppress(LedgerError):
        engine.connect().close()
        return True
    return False


def test_tasks_share_with_threads(tmp_path, member):
    """The asyncio pool gives way too: its idle connections are closed in its loop."""
    limits = {"pool_size": 4, "soft_limit": 2, "max_limit": 4}
    threads = member(StubServer(), **limits)

    async def main():
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path}/x.db",
            poolclass=AsyncAdaptedFairQueuePool,
            ledger=threads.pool.options.ledger,
            **limits,
        )
        tasks = engine.execution_options(scraper="tasks")
        for connection in [await tasks.connect() for _ in range(4)]:
            await connection.close()
        taken = await asyncio.to_thread(take_from, threads, 2)
        assert len(taken) == 2
        give(taken)
        async with tasks.connect():
            pass
        state.look_around(engine)
        before = asyncio.all_tasks()
        state.share(engine).close_surplus()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before  # there is nothing to close
        await engine.dispose()
        await asyncio.to_thread(state.keeper(engine).close)

    asyncio.run(main())
