"""Who waits for himself is refused at once; nobody else ever is."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
from contextlib import ExitStack, contextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from support.state import assert_quiet
from support.tasks import waiting
from support.threads import PATIENCE, Caller, ensure_waiting

from sqla_fairpool import AsyncAdaptedFairQueuePool, CheckoutTimeout, SelfDeadlock
from sqla_fairpool import deadlock as deadlock_module
from sqla_fairpool.reach import held_by_others

FOR_EVER = 1000.0


@pytest.fixture
def engine(make_engine):
    """An engine whose time-outs never come."""
    return make_engine(pool_size=2, soft_limit=2, max_limit=2, pool_timeout=FOR_EVER)


def taking(engine, number, taken, go_on):
    """Hold `number` connections until told to go on, then ask for one more."""
    with ExitStack() as held:
        for _ in range(number):
            held.enter_context(engine.connect())
        taken.set()
        assert go_on.wait(PATIENCE)
        with engine.connect():
            pass


def start(engine, number):
    """Start a caller that holds `number`; return it and what lets it go on."""
    taken, go_on = threading.Event(), threading.Event()
    caller = Caller(taking, engine, number, taken, go_on)
    assert taken.wait(PATIENCE)
    return caller, go_on


def test_nested_checkout_is_refused_at_once(engine):
    with engine.connect(), engine.connect():
        with pytest.raises(SelfDeadlock) as caught:
            engine.connect()
    assert isinstance(caught.value, CheckoutTimeout)
    message = str(caught.value)
    assert message.startswith("checkout would wait for itself: tag 'unknown' in_use=2 ")
    assert "the caller itself holds a connection of 'unknown'" in message
    assert [h.own for h in caught.value.diagnosis.holdings] == [True, True]
    engine.connect().close()


def test_tag_at_its_ceiling(make_engine):
    engine = make_engine(pool_size=4, soft_limit=1, max_limit=1, pool_timeout=FOR_EVER)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect(), pytest.raises(SelfDeadlock, match="tag 'a' in_use=1"):
        tagged.connect()


def test_orm_sessions(engine):
    with Session(engine) as one, Session(engine) as two, Session(engine) as three:
        one.execute(text("select 1"))
        two.execute(text("select 1"))
        with pytest.raises(SelfDeadlock):
            three.execute(text("select 1"))


@contextmanager
def in_a_generator(engine):
    with engine.connect() as connection:
        yield [connection]


class Owner:
    def __init__(self, engine):
        self.connections = {"one": engine.connect(), "two": engine.connect()}

    def close(self):
        for connection in self.connections.values():
            connection.close()


def test_whatever_the_caller_keeps_them_in(engine):
    with in_a_generator(engine), in_a_generator(engine):
        with pytest.raises(SelfDeadlock):
            engine.connect()
    owner = Owner(engine)
    with pytest.raises(SelfDeadlock):
        engine.connect()
    owner.close()


def test_two_that_wait_for_each_other(engine):
    """The second one to wait closes the circle; its refusal lets the first go on."""
    (one, go_on), (two, go_on_too) = start(engine, 1), start(engine, 1)
    go_on.set()
    ensure_waiting(engine.pool, 1)
    go_on_too.set()
    with pytest.raises(SelfDeadlock):
        two.result()
    one.result()


def test_circle_over_two_tags(make_engine):
    """Each has what the other's tag wants: no single tag shows it."""
    engine = make_engine(pool_size=2, soft_limit=1, max_limit=1, pool_timeout=FOR_EVER)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    taken, go_on = threading.Event(), threading.Event()

    def hold_a_want_b():
        with a.connect():
            taken.set()
            assert go_on.wait(PATIENCE)
            b.connect().close()

    caller = Caller(hold_a_want_b)
    assert taken.wait(PATIENCE)
    with b.connect():
        go_on.set()
        ensure_waiting(engine.pool, 1)
        with pytest.raises(SelfDeadlock):
            a.connect()
    caller.result()


# -- no false alarm -------------------------------------------------------------------


def test_not_while_somebody_runs_who_could_return_one(engine):
    connection, taken = [], threading.Event()

    def other():
        connection.append(engine.connect())
        taken.set()
        ensure_waiting(engine.pool, 1)
        connection.pop().close()

    caller = Caller(other)
    assert taken.wait(PATIENCE)
    with engine.connect():
        engine.connect().close()
    caller.result()


def served(engine, give):
    """Check out one more than there are, until `give` returns one."""
    caller = Caller(give)
    engine.connect().close()
    caller.result()


def test_not_if_another_thread_has_been_given_one(engine):
    """Handed over by a queue, and only looked at there: no statement tells of it."""
    box = queue.Queue()
    arrived = threading.Event()

    def other():
        connection = box.get()
        arrived.set()
        ensure_waiting(engine.pool, 1)
        connection.close()

    caller = Caller(other)
    box.put(engine.connect())
    assert arrived.wait(PATIENCE)
    with engine.connect():
        engine.connect().close()
    caller.result()


def test_not_if_it_lies_in_a_queue_that_another_thread_reads(engine):
    box = queue.Queue()

    def other():
        ensure_waiting(engine.pool, 1)
        box.get().close()

    with engine.connect():
        box.put(engine.connect())
        served(engine, other)


PUBLIC = {}


def test_not_if_a_module_has_it(engine):
    PUBLIC["connection"] = engine.connect()

    def other():
        ensure_waiting(engine.pool, 1)
        PUBLIC.pop("connection").close()

    with engine.connect():
        served(engine, other)


def test_not_if_a_thread_that_was_not_started_has_it(engine):
    ready = threading.Thread(target=lambda c: c.close(), args=(engine.connect(),))

    def other():
        ensure_waiting(engine.pool, 1)
        ready.start()

    with engine.connect():
        served(engine, other)
    ready.join()


def test_not_if_another_thread_has_used_it(engine):
    connection = engine.connect()

    def other():
        connection.execute(text("select 1"))
        used.set()
        ensure_waiting(engine.pool, 1)
        connection.close()

    used = threading.Event()
    caller = Caller(other)
    assert used.wait(PATIENCE)
    with engine.connect():
        engine.connect().close()
    caller.result()


def test_not_if_a_finished_threads_number_is_used_again(engine):
    """A thread may get the number of one that has ended with connections out."""
    kept = []
    Caller(lambda: kept.extend([engine.connect(), engine.connect()])).result()

    def ask():
        caller = Caller(let_go)
        engine.connect().close()
        caller.result()

    def let_go():
        ensure_waiting(engine.pool, 1)
        for connection in kept:
            connection.close()

    Caller(ask).result()


def test_not_if_a_ceiling_will_rise_in_time(make_engine, clock):
    """Another tag falls idle, and then it may have more."""
    engine = make_engine(pool_size=4, soft_limit=1, max_limit=2, pool_timeout=FOR_EVER)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    b.connect().close()
    taken = threading.Event()

    def nested():
        with a.connect():
            taken.set()
            a.connect().close()

    caller = Caller(nested)
    assert taken.wait(PATIENCE)
    ensure_waiting(engine.pool, 1)
    clock.advance(100.0)
    engine.pool.upkeep()
    caller.result()


def test_not_without_the_guard(make_engine):
    engine = make_engine(pool_size=1, pool_timeout=0.01, deadlock_guard=False)
    with engine.connect(), pytest.raises(CheckoutTimeout) as caught:
        engine.connect()
    assert not isinstance(caught.value, SelfDeadlock)
    engine.pool.reconfigure(deadlock_guard=True)
    with engine.connect(), pytest.raises(SelfDeadlock):
        engine.connect()


def test_who_holds_nothing_is_not_looked_at(make_engine, monkeypatch):
    """The common wait costs a look at one number."""
    engine = make_engine(pool_size=1)
    looks = []
    examine = deadlock_module.Guard.examine
    monkeypatch.setattr(
        deadlock_module.Guard,
        "examine",
        lambda guard, *args: looks.append(args) or examine(guard, *args),
    )
    tagged = engine.execution_options(scraper="a")
    for _ in range(3):  # they have had connections before
        Caller(lambda: tagged.connect().close()).result()
    for _ in range(3):
        holder = tagged.connect()
        callers = [Caller(lambda: tagged.connect().close()) for _ in range(3)]
        ensure_waiting(engine.pool, 3)
        holder.close()
        for caller in callers:
            caller.result()
    assert looks == []


def test_an_unsure_answer_is_not_asked_for_again_at_once(clock, engine, monkeypatch):
    """To look through all objects takes time, so it is done seldom."""
    asked = []

    def unsure(*args):
        asked.append(clock.now)
        clock.advance(1.0)
        return True

    monkeypatch.setattr(deadlock_module, "held_by_others", unsure)

    def nested():
        one, two = engine.connect(), engine.connect()
        caller = Caller(lambda: ensure_waiting(engine.pool, 1) or one.close())
        engine.connect().close()
        caller.result()
        two.close()

    nested()
    nested()
    clock.advance(48.0)
    nested()
    assert asked == [1000.0]
    clock.advance(2.0)
    nested()
    assert asked == [1000.0, 1051.0]


# -- tasks ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    def run(test, **options):
        async def main():
            engine = create_async_engine(
                f"sqlite+aiosqlite:///{tmp_path / 'test.db'}",
                poolclass=AsyncAdaptedFairQueuePool,
                **{"pool_timeout": FOR_EVER, "pool_size": 1, **options},
            )
            await test(engine)
            gc.collect()
            assert_quiet(engine.pool)
            await engine.dispose()

        asyncio.run(main())

    return run


def test_task_that_waits_for_itself(run):
    async def main(engine):
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            with pytest.raises(SelfDeadlock, match="by task"):
                await engine.connect()

    run(main)


def test_tasks_that_wait_for_each_other(run):
    async def take_two(engine, taken):
        async with engine.connect():
            taken.set()
            await asyncio.sleep(0)
            async with engine.connect():
                return "served"

    async def main(engine):
        events = [asyncio.Event(), asyncio.Event()]
        tasks = [asyncio.create_task(take_two(engine, e)) for e in events]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(type(o).__name__ for o in outcomes) == ["SelfDeadlock", "str"]

    run(main, pool_size=2, soft_limit=2, max_limit=2)


def test_not_if_another_task_has_it(run):
    async def main(engine):
        connection = await engine.connect()

        async def give_back(connection):
            await waiting(engine.pool, 1)
            await connection.close()

        task = asyncio.create_task(give_back(connection))
        del connection
        async with engine.connect():
            pass
        await task

    run(main)


def test_what_was_dropped_in_a_cycle_is_collected_instead(engine):
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            knot = [engine.connect()]
            knot.append(knot)
        del knot
        assert engine.pool.checkedout() == 2
        engine.connect().close()
    finally:
        gc.enable()


def test_looking_keeps_nothing_alive(engine):
    """What others drop afterwards comes back at once, without the collector."""
    taken, looked, dropped, done = (threading.Event() for _ in range(4))

    def other():
        connection = engine.connect()
        taken.set()
        assert looked.wait(PATIENCE)
        connection = None  # noqa: F841  (leaked, while this function goes on)
        dropped.set()
        assert done.wait(PATIENCE)

    gc.collect()
    gc.disable()
    try:
        caller = Caller(other)
        assert taken.wait(PATIENCE)
        exchange = engine.pool._exchange
        me = exchange.here.caller
        fairies = [record.fairy_ref() for record in exchange._records]
        assert held_by_others(fairies, [me], exchange.here.frames())
        del fairies
        assert engine.pool.checkedout() == 1
        looked.set()
        assert dropped.wait(PATIENCE)
        assert engine.pool.checkedout() == 0
        done.set()
        caller.result()
    finally:
        gc.enable()
