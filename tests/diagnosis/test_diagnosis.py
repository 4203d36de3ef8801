"""A checkout that gave up tells who has the connections, and what to do."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.state import assert_quiet
from support.tasks import waiting
from support.threads import PATIENCE, Caller, ensure_waiting, eventually

from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    Diagnosis,
    Holding,
    tag,
)
from sqla_fairpool.diagnosis.callers import ThreadHere, describe_caller, frames_of
from sqla_fairpool.diagnosis.report import duration


def case(**changes):
    """Return a diagnosis: five wait under 'reports' for a full pool."""
    facts = {
        "tag": "reports",
        "waited": 30.0,
        "in_use": 0,
        "ceiling": 10,
        "waiting": 5,
        "position": 1,
        "active_tags": 2,
        "pool_in_use": 4,
        "capacity": 4,
        "idle": 0,
        "holders": (("web", 4),),
        "holdings": (),
    }
    return Diagnosis(**{**facts, **changes})


def holding(**changes):
    """Return a holding: web works, its last statement was a moment ago."""
    facts = {"tag": "web", "age": 0.5, "caller": "thread 'w'", "statement_age": 0.1}
    return Holding(**{**facts, **changes})


# -- the sentence ---------------------------------------------------------------------


def test_flood():
    advice = case(holdings=(holding(),) * 4).advice
    assert advice == (
        "all 4 connections are at work and 5 wait under 'reports' alone: hold them for "
        "shorter, or give the pool more"
    )


@pytest.mark.parametrize(
    ("active", "why"),
    [
        (3, "of 3 active tags each may have 2 (soft_limit)"),
        (1, "alone it may have 2 (max_limit)"),
    ],
)
def test_own_ceiling_while_the_pool_has_room(active, why):
    found = case(
        in_use=2,
        ceiling=2,
        pool_in_use=2,
        active_tags=active,
        holdings=(holding(tag="reports"),) * 2,
    )
    assert found.advice == (
        f"tag 'reports' is at its ceiling while the pool has 2 free: {why}"
    )


def test_idle_but_holding():
    quiet = holding(tag="layer2", age=50.0, statement_age=41.0, now_at="a.py:7 in f")
    found = case(holdings=(quiet, quiet, quiet, holding()))
    assert found.advice == (
        "'layer2' keeps 3 of 4 connections unused, the last statement was 41s "
        "ago (thread 'w' is at a.py:7 in f): end the transaction and close before "
        "waiting for something else"
    )


def test_leak():
    leak = holding(age=725.0, statement_age=None, taken_at="jobs/x.py:3 in run")
    found = case(holdings=(leak, holding(), holding(), holding()))
    assert found.advice == (
        "a connection of 'web' is out for 12m05s (thread 'w', taken at jobs/x.py:3 in "
        "run): it may never come back"
    )
    unknown = case(holdings=(holding(age=725.0), holding(), holding(), holding()))
    assert unknown.advice.endswith("; leak_threshold would tell where it was taken")


def test_holder_that_has_ended():
    left = holding(caller="thread 'w' (ended)", abandoned=True)
    advice = case(holdings=(left, *[holding()] * 3)).advice
    assert advice.startswith("a connection of 'web' is out for 0.50s (thread 'w' (end")


def test_nested_checkout():
    own = holding(own=True, taken_at="x.py:3 in run")
    found = case(holdings=(own, *[holding()] * 3))
    assert found.advice == (
        "the caller itself holds a connection of 'web', taken at x.py:3 in run 0.50s "
        "ago, and waits for one more: return the first before, or pass it on"
    )


OWN = holding(own=True, tag="reports", age=30.0, statement_age=30.0)


@pytest.mark.parametrize(
    ("others", "changes", "says"),
    [
        ([holding(opening=True, age=29.0)], {}, "1 of 2 connections are being opened"),
        ([], {}, "1 of 2 connections are with no caller: they are being closed"),
        ([holding(statement_age=9.0, age=10.0)], {}, "'web' keeps 1 of 2 connections"),
        ([holding(abandoned=True)], {}, "a connection of 'web' is out for 0.50s"),
        ([holding(age=725.0)], {}, "a connection of 'web' is out for 12m05s"),
        ([], {"allotted": 1}, "the ledger lets this process have 1 of 2 connections"),
        (
            [],
            {"allotted": 1, "ledger_trouble": "away"},
            "without the ledger, no more than 1 connections may be open here",
        ),
    ],
)
def test_others_are_named_although_the_caller_holds_one_itself(others, changes, says):
    facts = {"holdings": (OWN, *others), "capacity": 2, "pool_in_use": 2, **changes}
    assert case(**facts).advice.startswith(says)


@pytest.mark.parametrize(
    ("holdings", "changes"),
    [
        ([OWN, OWN], {}),
        ([OWN, holding(waits=True, age=30.0, statement_age=30.0)], {}),
        # At its ceiling, its tag's connection is all that would help.
        ([OWN, holding(opening=True, age=29.0)], {"in_use": 1, "ceiling": 1}),
        ([OWN], {"in_use": 1, "ceiling": 1, "allotted": 1}),
        # A circle over two tags: the other one waits for what the caller holds.
        (
            [holding(own=True), holding(tag="reports", waits=True)],
            {"in_use": 1, "ceiling": 1},
        ),
    ],
)
def test_caller_is_named_if_nobody_else_could_have_helped(holdings, changes):
    facts = {"holdings": tuple(holdings), "capacity": 2, "pool_in_use": 2, **changes}
    assert case(**facts).advice.startswith("the caller itself holds a connection of '")


def test_callers_that_wait_themselves_are_told():
    both = case(holdings=(holding(waits=True), holding(waits=True, own=True)))
    first, second = both.oldest
    assert str(first).endswith("last statement 0.10s ago, waits for one more")
    assert str(second).endswith("last statement 0.10s ago")


def test_database_that_does_not_answer():
    opening = holding(opening=True, age=29.0, statement_age=None)
    found = case(holdings=(opening, opening, opening, holding()))
    assert found.advice == (
        "3 of 4 connections are being opened, the first for 29s: the database does not "
        "answer"
    )


def test_only_what_would_have_helped_is_told():
    """At its own ceiling, other tags' connections are not the reason."""
    own, other = holding(tag="reports", age=1.0), holding(tag="web", age=900.0)
    found = case(in_use=1, ceiling=1, pool_in_use=2, holdings=(other, own))
    assert found.oldest == (own,)
    assert "out for" not in found.advice


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.00s"), (9.994, "9.99s"), (41.4, "41s"), (725, "12m05s"), (7500, "2h05m")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


# -- from a living pool ---------------------------------------------------------------


def hold_and_sleep(engine, taken, go_on):
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        taken.set()
        assert go_on.wait(PATIENCE)  # the line that the message names


def test_message_names_thread_age_statement_and_line(make_engine, clock):
    engine = make_engine(pool_size=1, pool_timeout=0)
    taken, go_on = threading.Event(), threading.Event()
    tagged = engine.execution_options(scraper="layer2")
    caller = Caller(hold_and_sleep, tagged, taken, go_on)
    caller.name = "worker-3"
    assert taken.wait(PATIENCE)
    clock.advance(41.0)
    with pytest.raises(CheckoutTimeout) as caught:
        engine.execution_options(scraper="web").connect()
    go_on.set()
    caller.result()
    facts = caught.value.diagnosis
    (held,) = facts.holdings
    assert (held.tag, held.age, held.statement_age) == ("layer2", 41.0, 41.0)
    assert (facts.tag, facts.active_tags, facts.position) == ("web", 2, 1)
    assert held.now_at.endswith(" in hold_and_sleep")
    message = str(caught.value)
    assert "oldest: 'layer2' for 41s by thread 'Thread-" in message
    assert "last statement 41s ago, now at " in message
    assert "tests/diagnosis/test_diagnosis.py:" in message
    name = test_message_names_thread_age_statement_and_line.__name__
    assert facts.asked_at.endswith(f" in {name}")
    assert f"asked for at {facts.asked_at}; advice:" in message
    assert "advice: 'layer2' keeps 1 of 1 connections unused" in message
    assert "\n" not in message


def test_where_it_was_taken_is_told_with_leak_threshold(make_engine):
    engine = make_engine(pool_size=1, pool_timeout=0, leak_threshold=60)
    with engine.connect(), pytest.raises(CheckoutTimeout) as caught:
        engine.connect()
    (held,) = caught.value.diagnosis.holdings
    name = test_where_it_was_taken_is_told_with_leak_threshold.__name__
    assert held.taken_at.endswith(f" in {name}")
    assert held.own
    assert f"taken at {held.taken_at}" in str(caught.value)


def test_connecting_is_told(make_engine, server, clock):
    engine = make_engine(pool_size=1, pool_timeout=0)
    go_on = threading.Event()
    server.before["connect"] = lambda: go_on.wait(PATIENCE)
    caller = Caller(lambda: engine.connect().close())
    eventually(lambda: engine.pool.checkedout() == 1)
    clock.advance(29.0)
    with pytest.raises(CheckoutTimeout, match="the database does not answer"):
        engine.connect()
    go_on.set()
    caller.result()


def advice_to_nested(engine):
    """Hold a connection in vain, and return the advice."""
    with engine.connect(), pytest.raises(CheckoutTimeout) as caught:
        engine.connect()
    return caught.value.diagnosis.advice


@pytest.fixture
def two(make_engine):
    return make_engine(pool_size=2, soft_limit=2, max_limit=2, pool_timeout=0)


@pytest.fixture
def go_on(server):
    """What the stub server waits for: tests put its ``wait`` where they like."""
    go_on = threading.Event()
    yield go_on
    go_on.set()


def blocked(event, go_on):
    """Return a hook that blocks, once it has set an event."""

    def hook():
        event.set()
        assert go_on.wait(PATIENCE)

    return hook


def test_slow_connect_of_another_thread_is_named_to_a_nested_caller(two, server, go_on):
    with two.connect():
        began = threading.Event()
        server.before["connect"] = blocked(began, go_on)
        caller = Caller(lambda: two.connect().close())
        assert began.wait(PATIENCE)
        with pytest.raises(CheckoutTimeout, match="1 of 2 connections are being open"):
            two.connect()
    go_on.set()
    caller.result()


def test_slow_reconnect_of_another_thread_is_named_as_well(two, server, go_on):
    """The pool has its record for long; only the connection is new."""
    with two.connect():
        lost = two.connect()
        lost.invalidate()
        lost.close()
        began = threading.Event()
        server.before["connect"] = blocked(began, go_on)
        caller = Caller(lambda: two.connect().close())
        assert began.wait(PATIENCE)
        with pytest.raises(CheckoutTimeout, match="1 of 2 connections are being open"):
            two.connect()
    go_on.set()
    caller.result()


def test_connection_that_is_being_closed_is_named_to_a_nested_caller(
    two, server, go_on
):
    with two.connect():
        two.connect().close()
        began = threading.Event()
        server.before["close"] = blocked(began, go_on)
        caller = Caller(two.pool.dispose)
        assert began.wait(PATIENCE)
        with pytest.raises(CheckoutTimeout, match="1 of 2 connections are with no cal"):
            two.connect()
    go_on.set()
    caller.result()


def test_lost_slot_is_named_to_a_nested_caller(two):
    with state.slot_without_caller(two, "a"):
        assert "1 of 2 connections are with no caller" in advice_to_nested(two)


def test_idle_holder_is_named_to_a_nested_caller(make_engine, clock):
    two = make_engine(pool_size=2, soft_limit=2, max_limit=2, pool_timeout=0)
    taken, go_on = threading.Event(), threading.Event()
    tagged = two.execution_options(scraper="layer2")
    caller = Caller(hold_and_sleep, tagged, taken, go_on)
    assert taken.wait(PATIENCE)
    with two.connect():
        clock.advance(41.0)
        with pytest.raises(CheckoutTimeout) as caught:
            two.connect()
    go_on.set()
    caller.result()
    advice = caught.value.diagnosis.advice
    assert advice.startswith("'layer2' keeps 1 of 2 connections unused")


def test_two_that_wait_for_each_other_are_told_so(make_engine):
    engine = make_engine(
        pool_size=2,
        soft_limit=1,
        max_limit=1,
        pool_timeout=1000,
        deadlock_timeout=0.001,
    )
    tagged = [engine.execution_options(scraper=tag) for tag in "ab"]
    both_hold = threading.Barrier(2)

    def hold_and_want(held, wanted):
        with held.connect():
            both_hold.wait(PATIENCE)
            wanted.connect().close()

    callers = [Caller(hold_and_want, *tagged), Caller(hold_and_want, *tagged[::-1])]
    for caller in callers:
        caller.join(PATIENCE)
    (error,) = [c.error for c in callers if c.error is not None]
    other = next(h for h in error.diagnosis.holdings if not h.own)
    assert other.waits
    assert error.diagnosis.advice.startswith("the caller itself holds a connection of")
    assert "waits for one more" in str(error)


def test_error_survives_pickling(make_engine):
    engine = make_engine(pool_size=1, pool_timeout=0)
    with engine.connect(), pytest.raises(CheckoutTimeout) as caught:
        engine.connect()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.diagnosis == caught.value.diagnosis


def test_callers_in_words():
    names = []
    thread = threading.Thread(
        target=lambda: names.append(ThreadHere().caller), name="spider"
    )
    thread.start()
    thread.join()
    assert describe_caller(names[0]) == "thread 'spider' (ended)"
    assert frames_of(names[0]) == []
    del thread
    assert describe_caller(names[0]) == "thread 'spider' (ended)"
    assert describe_caller(None) == "a caller outside of any task"


def test_tasks_are_told_by_name_and_line(tmp_path):
    async def hold(engine, taken, go_on):
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            taken.set()
            await go_on.wait()

    async def main():
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path / 'test.db'}",
            poolclass=AsyncAdaptedFairQueuePool,
            pool_size=1,
            pool_timeout=0,
            leak_threshold=60,
        )
        taken, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(hold(engine, taken, go_on), name="spider")
        await taken.wait()
        with pytest.raises(CheckoutTimeout) as caught:
            await engine.connect()
        go_on.set()
        await task
        (held,) = caught.value.diagnosis.holdings
        assert held.caller == "task 'spider'"
        assert held.now_at.endswith(" in hold")
        assert held.taken_at.endswith(" in hold")
        assert_quiet(engine.pool)
        await engine.dispose()

    asyncio.run(main())


# -- how long one checkout may wait ---------------------------------------------------


def waited(engine):
    """Return how long a checkout waits in vain."""
    with pytest.raises(CheckoutTimeout) as caught:
        engine.connect()
    return caught.value.waited


@pytest.fixture
def full(make_engine):
    """A pool with its only connection out, whose callers give up after 30 s."""
    engine = make_engine(pool_size=1, deadlock_timeout=None)
    holder = engine.connect()
    yield engine
    holder.close()


def test_block_and_engine_say_how_long(full):
    with tag("a", timeout=0.01):
        assert waited(full) < 5
        with tag("b"):  # inherits it
            assert waited(full) < 5
        with tag("b", timeout=0):
            assert waited(full) < 0.01
        # An engine's option wins.
        assert waited(full.execution_options(fairpool_timeout=0)) < 0.01
    tagged = full.execution_options(fairpool_timeout=0, scraper="a")
    with tag("x", timeout=1000):
        assert waited(tagged) < 0.01
        assert waited(tagged.execution_options(other=1)) < 0.01


def test_function_says_how_long(full):
    @tag("a", timeout=0)
    def job():
        return waited(full)

    assert job() < 0.01


def test_connection_says_how_long(make_engine):
    """A tag that is set on a connection waits in its own line, for its own time."""
    engine = make_engine(pool_size=4, soft_limit=1, max_limit=1, deadlock_timeout=None)
    holder = engine.execution_options(scraper="a").connect()
    with engine.connect() as connection, pytest.raises(CheckoutTimeout) as caught:
        connection.execution_options(scraper="a", fairpool_timeout=0)
    assert caught.value.waited < 0.01
    holder.close()


def test_other_callers_wait_as_before(full):
    with tag("a", timeout=0):
        caller = Caller(lambda: full.connect().close())
        ensure_waiting(full.pool, 1)
        assert waited(full) < 0.01
    assert state.waiting(full) == 1
    full.pool.reconfigure(pool_size=2, max_limit=2, soft_limit=2)
    caller.result()


@pytest.mark.parametrize("bad", [-1, "soon", float("nan"), True])
def test_bad_timeouts_are_refused(make_engine, bad):
    engine = make_engine()
    with pytest.raises(ArgumentError, match="timeout="):
        tag("a", timeout=bad)
    with pytest.raises(ArgumentError, match="fairpool_timeout="):
        engine.execution_options(fairpool_timeout=bad)
    with engine.connect() as connection:
        with pytest.raises(ArgumentError, match="fairpool_timeout="):
            connection.execution_options(fairpool_timeout=bad)


def test_tasks_have_their_own(tmp_path):
    async def main():
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path / 'test.db'}",
            poolclass=AsyncAdaptedFairQueuePool,
            pool_size=1,
            deadlock_timeout=None,
        )
        async with engine.connect():
            with tag("b"):
                patient = asyncio.create_task(engine.connect().start())
                await waiting(engine.pool, 1)
            with tag("a", timeout=0.01), pytest.raises(CheckoutTimeout):
                await engine.connect()
            hurried = engine.execution_options(fairpool_timeout=0.01)
            with pytest.raises(CheckoutTimeout):
                await hurried.connect()
        await (await patient).close()
        await engine.dispose()
        assert_quiet(engine.pool)

    asyncio.run(main())
