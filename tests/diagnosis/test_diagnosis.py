"""A checkout that gave up tells who has the connections, and what to do."""

from __future__ import annotations

import asyncio
import pickle
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.stub import all_for_one
from support.threads import Caller, Gate
from support.worlds import world_of

from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    Diagnosis,
    Holding,
)
from sqla_fairpool.diagnosis import ThreadHere, describe_caller, duration, frames_of


def case(*holdings, **changes):
    """Return a diagnosis: five wait under 'reports' for a full pool."""
    line = {"tag": "reports", "waited": 30.0, "waiting": 5, "position": 1}
    tag = {"in_use": 0, "ceiling": 10, "active_tags": 2, "holders": (("web", 4),)}
    pool = {"pool_in_use": 4, "capacity": 4, "idle": 0, "holdings": holdings}
    return Diagnosis(**{**line, **tag, **pool, **changes})


def holding(**changes):
    """Return a holding: web works, its last statement was a moment ago."""
    facts = {"tag": "web", "age": 0.5, "caller": "thread 'w'", "statement_age": 0.1}
    return Holding(**{**facts, **changes})


# -- the sentence ---------------------------------------------------------------------

LEAK = holding(age=725.0, statement_age=None, taken_at="jobs/x.py:3 in run")
QUIET = holding(tag="layer2", age=50.0, statement_age=41.0, now_at="a.py:7 in f")
OPENING = holding(opening=True, age=29.0, statement_age=None)
LEFT = holding(caller="thread 'w' (ended)", abandoned=True)
NESTED = holding(own=True, taken_at="x.py:3 in run")
AT_CEILING = {"in_use": 2, "ceiling": 2, "pool_in_use": 2}
NEVER = "it may never come back"
ASK = f"{NEVER}; leak_threshold would tell where it was taken"

#: What one holding or more say, beside others that work; and the advice.
ADVICE = [
    (
        [],
        "all 4 connections are at work and 5 wait under 'reports' alone: hold them for "
        "shorter, or give the pool more",
    ),
    (
        [QUIET, QUIET, QUIET],
        "'layer2' keeps 3 of 4 connections unused, the last statement was 41s ago "
        "(thread 'w' is at a.py:7 in f): end the transaction and close before waiting "
        "for something else",
    ),
    (
        [LEAK],
        "a connection of 'web' is out for 12m05s (thread 'w', taken at jobs/x.py:3 in "
        f"run): {NEVER}",
    ),
    (
        [holding(age=725.0)],
        f"a connection of 'web' is out for 12m05s (thread 'w'): {ASK}",
    ),
    ([LEFT], f"a connection of 'web' is out for 0.50s (thread 'w' (ended)): {ASK}"),
    (
        [NESTED],
        "the caller itself holds a connection of 'web', taken at x.py:3 in run 0.50s "
        "ago, and waits for one more: return the first before, or pass it on",
    ),
    (
        [OPENING, OPENING, OPENING],
        "3 of 4 connections are being opened, the first for 29s: the database does not "
        "answer",
    ),
]


def test_advice():
    for some, advice in ADVICE:
        assert case(*some, *[holding()] * (4 - len(some))).advice == advice
    # One slot without a caller is no reason beside three that work.
    assert case(*[holding()] * 3).advice == ADVICE[0][1]
    ceiling = "tag 'reports' is at its limit while the pool has 2 free: "
    for active, why in (
        (3, "of 3 active tags each may have 2 (soft_limit)"),
        (1, "alone it may have 2 (max_limit)"),
    ):
        at_ceiling = {**AT_CEILING, "active_tags": active}
        found = case(*[holding(tag="reports")] * 2, **at_ceiling)
        assert found.advice == ceiling + why


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
    found = case(OWN, *others, **{"capacity": 2, "pool_in_use": 2, **changes})
    assert found.advice.startswith(says)


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
    found = case(*holdings, **{"capacity": 2, "pool_in_use": 2, **changes})
    assert found.advice.startswith("the caller itself holds a connection of '")


def test_what_is_told_of_a_holding():
    first, second = case(holding(waits=True), holding(waits=True, own=True)).oldest
    assert str(first).endswith("last statement 0.10s ago, waits for one more")
    assert str(second).endswith("last statement 0.10s ago")
    # At its own ceiling, other tags' connections are not the reason.
    own, other = holding(tag="reports", age=1.0), holding(tag="web", age=900.0)
    found = case(other, own, in_use=1, ceiling=1, pool_in_use=2)
    assert found.oldest == (own,)
    assert "out for" not in found.advice
    words = {0: "0.00s", 9.994: "9.99s", 41.4: "41s", 725: "12m05s", 7500: "2h05m"}
    assert {seconds: duration(seconds) for seconds in words} == words


# -- from a living pool ---------------------------------------------------------------


def test_message_names_thread_age_statement_and_line(make_engine, clock):
    engine, gate = make_engine(pool_size=1, pool_timeout=0), Gate()

    def hold_and_sleep():
        with engine.execution_options(scraper="layer2").connect() as connection:
            connection.execute(text("select 1"))
            gate()  # the line that the message names

    caller = Caller(hold_and_sleep)
    gate.reached()
    clock.advance(41.0)
    with pytest.raises(CheckoutTimeout) as caught:
        engine.execution_options(scraper="web").connect()
    gate.open()
    caller.result()
    facts, message = caught.value.diagnosis, str(caught.value)
    (held,) = facts.holdings
    assert (held.tag, held.age, held.statement_age) == ("layer2", 41.0, 41.0)
    assert (facts.tag, facts.active_tags, facts.position) == ("web", 2, 1)
    assert "/support/threads.py:" in held.now_at
    assert "oldest: 'layer2' for 41s by thread 'Thread-" in message
    assert f"last statement 41s ago, now at {held.now_at}" in message
    name = test_message_names_thread_age_statement_and_line.__name__
    assert "tests/diagnosis/test_diagnosis.py:" in facts.asked_at
    assert facts.asked_at.endswith(f" in {name}")
    assert f"asked for at {facts.asked_at}; advice:" in message
    assert "advice: 'layer2' keeps 1 of 1 connections unused" in message
    assert "\n" not in message


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_connection_that_makes_no_tag_active_is_explained(tmp_path, driver):
    """One without a tag counts from its first statement; one that is idle does not."""
    world = world_of(f"sqlite:///{tmp_path / 'test.db'}", driver)

    def refused(engine):
        with pytest.raises(CheckoutTimeout) as caught:
            engine.connect()
        return caught.value.diagnosis, str(caught.value)

    def test():
        engine = world.engine(**all_for_one(1), pool_timeout=0)
        with engine.connect() as connection:
            facts, message = refused(engine)
            assert (facts.active_tags, facts.uncounted) == (0, ("unknown",))
            words = "(uncounted: 'unknown', without a statement lately); held by"
            assert f"active_tags=0 {words} unknown=1" in message
            connection.execute(text("select 1"))
            facts, message = refused(engine)
            assert (facts.active_tags, facts.uncounted) == (1, ())
            assert "active_tags=1; held by unknown=1" in message

    world.run(test)


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


@pytest.mark.parametrize(
    ("hangs", "says"),
    [
        ("connect", "1 of 2 connections are being opened"),
        ("connect again", "1 of 2 connections are being opened"),
        ("close", "1 of 2 connections are with no caller"),
        (None, "1 of 2 connections are with no caller"),
    ],
)
def test_what_hangs_is_named_to_a_nested_caller(make_engine, server, hangs, says):
    """A slow server, to which the pool's record may be known; or a lost slot."""
    two = make_engine(pool_size=2, soft_limit=2, max_limit=2, pool_timeout=0)
    gate = Gate()

    def work():
        if hangs == "connect again":
            with two.connect() as lost:
                lost.invalidate()
        two.connect().close()
        if hangs == "close":
            two.pool.dispose()

    def refused():
        with pytest.raises(CheckoutTimeout, match=says):
            two.connect()

    if hangs is None:
        with state.slot_without_caller(two, "a"), two.connect():
            refused()
        return
    with two.connect():
        if hangs == "connect again":
            two.connect().close()
        server.before[hangs.partition(" ")[0]] = gate
        caller = Caller(work)
        gate.reached()
        refused()
        gate.open()
        caller.result()


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
