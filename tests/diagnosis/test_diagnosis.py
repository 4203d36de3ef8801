"""A checkout that gave up tells who has the connections, and what to do."""

from __future__ import annotations

import asyncio
import pickle
import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError
from support import state
from support.tasks import waiting
from support.threads import PATIENCE, Caller, ensure_waiting

from sqla_fairpool import (
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

OLD = holding(age=725.0)
LEAK = holding(age=725.0, statement_age=None, taken_at="jobs/x.py:3 in run")
QUIET = holding(tag="layer2", age=50.0, statement_age=41.0, now_at="a.py:7 in f")
OPENING = holding(opening=True, age=29.0, statement_age=None)
LEFT = holding(caller="thread 'w' (ended)", abandoned=True)
NESTED = holding(own=True, taken_at="x.py:3 in run")
OWN_TAGS = holding(tag="reports")
AT_CEILING = {"in_use": 2, "ceiling": 2, "pool_in_use": 2}


@pytest.mark.parametrize(
    ("holdings", "changes", "advice"),
    [
        (
            [holding()] * 4,
            {},
            "all 4 connections are at work and 5 wait under 'reports' alone: hold them "
            "for shorter, or give the pool more",
        ),
        (
            [OWN_TAGS] * 2,
            {**AT_CEILING, "active_tags": 3},
            "tag 'reports' is at its ceiling while the pool has 2 free: of 3 active "
            "tags each may have 2 (soft_limit)",
        ),
        (
            [OWN_TAGS] * 2,
            {**AT_CEILING, "active_tags": 1},
            "tag 'reports' is at its ceiling while the pool has 2 free: alone it may "
            "have 2 (max_limit)",
        ),
        (
            [QUIET, QUIET, QUIET, holding()],
            {},
            "'layer2' keeps 3 of 4 connections unused, the last statement was 41s ago "
            "(thread 'w' is at a.py:7 in f): end the transaction and close before "
            "waiting for something else",
        ),
        (
            [LEAK, *[holding()] * 3],
            {},
            "a connection of 'web' is out for 12m05s (thread 'w', taken at jobs/x.py:3 "
            "in run): it may never come back",
        ),
        (
            [OLD, *[holding()] * 3],
            {},
            "a connection of 'web' is out for 12m05s (thread 'w'): it may never come "
            "back; leak_threshold would tell where it was taken",
        ),
        (
            [LEFT, *[holding()] * 3],
            {},
            "a connection of 'web' is out for 0.50s (thread 'w' (ended)): it may never "
            "come back; leak_threshold would tell where it was taken",
        ),
        (
            [NESTED, *[holding()] * 3],
            {},
            "the caller itself holds a connection of 'web', taken at x.py:3 in run "
            "0.50s ago, and waits for one more: return the first before, or pass it on",
        ),
        (
            [OPENING, OPENING, OPENING, holding()],
            {},
            "3 of 4 connections are being opened, the first for 29s: the database does "
            "not answer",
        ),
    ],
)
def test_advice(holdings, changes, advice):
    assert case(holdings=tuple(holdings), **changes).advice == advice


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


@contextmanager
def idle_holder(engine):
    """Have a thread hold a connection of 'layer2', and do something else."""
    taken, go_on = threading.Event(), threading.Event()

    def hold_and_sleep():
        with engine.execution_options(scraper="layer2").connect() as connection:
            connection.execute(text("select 1"))
            taken.set()
            assert go_on.wait(PATIENCE)  # the line that the message names

    caller = Caller(hold_and_sleep)
    assert taken.wait(PATIENCE)
    try:
        yield
    finally:
        go_on.set()
        caller.result()


def test_message_names_thread_age_statement_and_line(make_engine, clock):
    engine = make_engine(pool_size=1, pool_timeout=0)
    with idle_holder(engine):
        clock.advance(41.0)
        with pytest.raises(CheckoutTimeout) as caught:
            engine.execution_options(scraper="web").connect()
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


def advice_to_nested(engine):
    """Hold a connection in vain, and return the advice."""
    with engine.connect(), pytest.raises(CheckoutTimeout) as caught:
        engine.connect()
    return caught.value.diagnosis.advice


@pytest.fixture
def two(make_engine):
    return make_engine(pool_size=2, soft_limit=2, max_limit=2, pool_timeout=0)


@contextmanager
def slow(server, kind, run):
    """Have `run` in a thread that hangs in the server's `kind` until the block ends."""
    began, go_on = threading.Event(), threading.Event()

    def hang():
        began.set()
        assert go_on.wait(PATIENCE)

    server.before[kind] = hang
    caller = Caller(run)
    try:
        assert began.wait(PATIENCE)
        yield
    finally:
        go_on.set()
        caller.result()


def test_slow_connect_of_another_thread_is_named_to_a_nested_caller(two, server):
    with two.connect(), slow(server, "connect", lambda: two.connect().close()):
        with pytest.raises(CheckoutTimeout, match="1 of 2 connections are being open"):
            two.connect()


def test_slow_reconnect_of_another_thread_is_named_as_well(two, server):
    """The pool has its record for long; only the connection is new."""
    with two.connect():
        with two.connect() as lost:
            lost.invalidate()
        with slow(server, "connect", lambda: two.connect().close()):
            with pytest.raises(CheckoutTimeout, match="1 of 2 connections are being o"):
                two.connect()


def test_connection_that_is_being_closed_is_named_to_a_nested_caller(two, server):
    with two.connect():
        two.connect().close()
        with slow(server, "close", two.pool.dispose):
            with pytest.raises(CheckoutTimeout, match="1 of 2 connections are with no"):
                two.connect()


def test_connecting_is_told(make_engine, server, clock):
    engine = make_engine(pool_size=1, pool_timeout=0)
    with slow(server, "connect", lambda: engine.connect().close()):
        clock.advance(29.0)
        with pytest.raises(CheckoutTimeout, match="the database does not answer"):
            engine.connect()


def test_lost_slot_is_named_to_a_nested_caller(two):
    with state.slot_without_caller(two, "a"):
        assert "1 of 2 connections are with no caller" in advice_to_nested(two)


def test_idle_holder_is_named_to_a_nested_caller(clock, two):
    with idle_holder(two), two.connect():
        clock.advance(41.0)
        with pytest.raises(CheckoutTimeout) as caught:
            two.connect()
    advice = caught.value.diagnosis.advice
    assert advice.startswith("'layer2' keeps 1 of 2 connections unused")


def test_two_that_wait_for_each_other_are_told_so(make_engine):
    options = {"pool_timeout": 1000, "deadlock_timeout": 0.001}
    engine = make_engine(pool_size=2, soft_limit=1, max_limit=1, **options)
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


def test_tasks_are_told_by_name_and_line(run):
    async def hold(engine, taken, go_on):
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            taken.set()
            await go_on.wait()

    async def main(engine):
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

    run(main, pool_timeout=0, leak_threshold=60)


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


def test_tasks_have_their_own(run):
    async def main(engine):
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

    run(main, deadlock_timeout=None)
