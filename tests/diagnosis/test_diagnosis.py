"""A checkout that gave up tells who has the connections, and what to do."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.threads import PATIENCE, Caller, Gate

from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    Diagnosis,
    Holding,
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
def test_caller_is_named_if_no_other_could_have_helped(holdings, changes):
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


def test_message_names_thread_age_statement_and_line(make_engine, clock):
    engine = make_engine(pool_size=1, pool_timeout=0)
    taken, go_on = threading.Event(), threading.Event()

    def hold_and_sleep():
        with engine.execution_options(scraper="layer2").connect() as connection:
            connection.execute(text("select 1"))
            taken.set()
            assert go_on.wait(PATIENCE)  # the line that the message names

    caller = Caller(hold_and_sleep)
    assert taken.wait(PATIENCE)
    clock.advance(41.0)
    try:
        with pytest.raises(CheckoutTimeout) as caught:
            engine.execution_options(scraper="web").connect()
    finally:
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
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.diagnosis == caught.value.diagnosis


@pytest.fixture
def two(make_engine):
    return make_engine(pool_size=2, soft_limit=2, max_limit=2, pool_timeout=0)


def connect(engine):
    engine.connect().close()


def connect_again(engine):
    """The pool has the record for long; only its connection is new."""
    with engine.connect() as lost:
        lost.invalidate()
    engine.connect().close()


def close(engine):
    engine.connect().close()
    engine.pool.dispose()


@pytest.mark.parametrize(
    ("hangs", "work", "says"),
    [
        ("connect", connect, "1 of 2 connections are being opened"),
        ("connect", connect_again, "1 of 2 connections are being opened"),
        ("close", close, "1 of 2 connections are with no caller"),
    ],
)
def test_slow_server_is_named_to_a_nested_caller(two, server, hangs, work, says):
    gate = Gate()
    with two.connect():
        if work is connect_again:
            two.connect().close()
        server.before[hangs] = gate
        caller = Caller(work, two)
        gate.reached()
        try:
            with pytest.raises(CheckoutTimeout, match=says):
                two.connect()
        finally:
            gate.open()
        caller.result()


def test_lost_slot_is_named_to_a_nested_caller(two):
    with state.slot_without_caller(two, "a"), two.connect():
        with pytest.raises(CheckoutTimeout, match="1 of 2 connections are with no"):
            two.connect()


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
        state.assert_quiet(engine.pool)
        await engine.dispose()

    asyncio.run(main())
