"""What a checkout may cost, counted in calls, which no machine's noise moves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sqlalchemy import text
from support import state
from support.threads import connect, wait_in_line

import sqla_fairpool
from sqla_fairpool import CheckoutTimeout
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import Ticket

PACKAGE = str(Path(sqla_fairpool.__file__).parent)


def our_calls(function):
    """Return the names of the functions of our package that `function` calls.

    Not `note`, which is called when a checkout is the longest one yet.
    """
    names = []

    def profile(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            names.extend({code.co_name} - {"note"})

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@pytest.fixture
def engine(light_heap, make_engine):
    engine = make_engine()
    for _ in range(2):
        engine.execution_options(scraper="a").connect().close()
    return engine


def test_scheduler_while_no_request_waits():
    """Its usage costs no call; a power is taken once in a thousandth of a half-life."""
    limits = {"capacity": 2, "soft_limit": 1, "max_limit": 2, "idle_timeout": 60.0}
    scheduler = Scheduler(**limits, reallocation_interval=30.0, now=0.0)
    ticket = Ticket()

    def pair(begin, end):
        assert scheduler.request(ticket, "a", begin)
        scheduler.release(ticket, end)

    pair(0.0, 0.001)
    assert our_calls(lambda: pair(0.002, 0.003)) == [
        *("request", "_grant"),
        *("release", "vacate", "book", "add_all"),
    ]


def test_warm_checkout_and_checkin(engine):
    tagged = engine.execution_options(scraper="a")
    tagged.connect().close()
    names = our_calls(lambda: tagged.connect().close())
    assert names == ["raw_connection", "_do_get", "checkout", "checkin"]


def test_tag_that_is_set_on_a_connection_kept_warm_for_it(engine):
    def use():
        engine.connect().execution_options(scraper="a").close()

    for _ in range(2):  # the second counts what may be lent
        use()
    with state.lock_forbidden(engine):
        names = our_calls(use)
    assert names == [
        *("_do_get", "checkout", "borrow"),
        *("set_on_connection", "check_out_by", "_retag", "claim"),
        "checkin",
    ]


def test_warm_checkout_without_a_tag_takes_no_lock(engine):
    engine.connect().close()
    with state.lock_forbidden(engine):
        engine.connect().close()


def test_checkout_does_not_cost_more_with_many_tags(engine):
    def cost():
        tagged = engine.execution_options(scraper="other")
        return len(our_calls(lambda: tagged.connect().close()))

    cost()
    before = cost()
    for n in range(2_000):
        engine.execution_options(scraper=f"tag{n}").connect().close()
    cost()
    assert cost() <= before


def test_first_checkout_of_a_tag_makes_few_calls(engine):
    tagged, out = engine.execution_options(scraper="new"), []
    names = our_calls(lambda: out.append(tagged.connect()))
    out.pop().close()
    assert len(names) <= 42, names


def test_statement_makes_two_calls_and_takes_no_lock(engine):
    with engine.execution_options(scraper="a").connect() as connection:
        connection.execute(text("select 1"))
        names = our_calls(lambda: connection.execute(text("select 1")))
    assert names == ["do_execute", "_note"]


def test_waiting_checkout_is_handed_its_connection_in_few_calls(make_engine):
    engine = make_engine(1)
    for _ in range(2):  # at first, what counts by size is made
        holder = connect(engine)
        (caller,) = wait_in_line(engine)
        names = our_calls(holder.close)
        caller.result().close()
    assert len(names) <= 32, names


def test_time_out_leaves_its_line_once(make_engine):
    engine = make_engine(pool_size=1, pool_timeout=0)

    def time_out():
        with pytest.raises(CheckoutTimeout):
            engine.connect()

    with engine.connect():
        names = our_calls(time_out)
    assert names.count("expire") == 1
    assert "give_up" not in names
