"""The warm cache alone, and what is kept warm without a tag."""

from __future__ import annotations

import threading
from unittest.mock import Mock

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from support import state
from support.threads import Caller, Gate, connect, give

from sqla_fairpool import CheckoutTimeout
from sqla_fairpool.pool import warm
from sqla_fairpool.pool.lock import PoolLock
from sqla_fairpool.pool.warm import WarmCache


@pytest.fixture
def given_up():
    """The records that are kept warm no more."""
    return []


@pytest.fixture
def cache(given_up):
    lock = PoolLock(lambda: 7.0, lambda: True)
    scheduler = None  # is asked when something is borrowed
    return WarmCache(lock, scheduler, lambda record, now: given_up.append(record), None)


def section(cache):
    """Do what is in the inbox, as the lock does."""
    while cache.inbox:
        cache.inbox[0](7.0)
        cache.inbox.popleft()


def test_record_is_kept_and_taken(cache, given_up):
    cache.of("empty")
    for record in "first", "second":
        cache.put("a", record)
    assert cache.of("a").pop(0) == "first"
    assert cache.pop_any() == "second"
    assert cache.pop_any() is None
    section(cache)
    assert given_up == []


def test_next_section_gives_up_all_tags_the_oldest_record_first(cache, given_up):
    for tag, record in ("a", 1), ("b", 2), ("a", 3):
        cache.put(tag, record)
    section(cache)
    assert given_up == [1, 3, 2]
    assert cache.pop_any() is None


def test_record_added_while_a_section_empties_the_list_is_found(cache, given_up):
    records = cache.of("a")

    def checkin_in_between(record, now):
        given_up.append(record)
        if record == "first":  # as a checkin does, which has the list from before
            records.append("second")
            if not records.listed:
                records.list()

    cache.give_up = checkin_in_between
    records.list()
    records.append("first")
    cache.inbox[0](7.0)
    cache.inbox.popleft()
    records.append("third")  # by a checkin that has seen it listed
    section(cache)
    assert given_up == ["first", "second", "third"]


def test_section_between_listing_and_adding_misses_nothing(cache, given_up):
    class Met(warm.WarmRecords):
        def append(self, record):
            section(cache)
            super().append(record)

    cache.by_tag["a"] = Met(cache, "a")
    cache.put("a", "record")
    section(cache)
    assert given_up == ["record"]


def test_interrupted_section_is_repeated(cache, given_up):
    def interrupted(record, now):
        cache.give_up = lambda record, now: given_up.append(record)
        raise KeyboardInterrupt

    cache.give_up = interrupted
    cache.of("a").extend(["first", "second"])
    cache.of("a").list()
    with pytest.raises(KeyboardInterrupt):
        section(cache)
    section(cache)
    assert given_up == ["second"]  # the first: see Checkout.__del__


def test_empty_lists_do_not_add_up(cache, monkeypatch):
    monkeypatch.setattr(warm, "_EMPTY_LISTS_KEPT", 3)
    for tag in range(50):
        cache.put(tag, "record")
        section(cache)
    assert len(cache.by_tag) == 3


# -- without a tag ---------------------------------------------------------------------


def test_checkouts_without_a_tag_are_counted_until_one_gets_another(make_engine):
    engine = make_engine()
    for _ in range(3):
        engine.connect().close()
    engine.connect().execution_options(scraper="a").close()
    for figures in engine.pool.stats(), engine.pool.metrics():
        assert {row.name: row.checkouts for row in figures.tags} == {
            "a": 1,
            "unknown": 3,
        }
        for row in figures.tags:
            assert row.hold_time.count == row.wait_time.count == row.checkouts
    assert not engine.pool.stats().tag("unknown").active


def test_warm_connection_without_a_tag_above_its_ceiling_is_not_taken(make_pool):
    """It is not active, so one active tag lowers its ceiling, and not its own."""
    pool = make_pool(pool_size=4, soft_limit=1, max_limit=3, timeout=0)
    held = [pool.connect(), pool.connect()]
    with connect(pool, "a"):
        give(held)
        with pool.connect(), pytest.raises(CheckoutTimeout, match="limit=1"):
            pool.connect()


# -- borrowed from a tag ---------------------------------------------------------------


@pytest.mark.parametrize("has_room", [True, False])
def test_section_charges_what_is_borrowed_meanwhile_or_has_it_put_back(has_room):
    lock, scheduler = PoolLock(lambda: 7.0, lambda: True), Mock()

    def section_of_a_signal_handler(tag):
        lock.run(lambda now: None)  # with nothing in the inbox
        return 1

    def charge(checkout):
        checkout.borrowed = not has_room

    scheduler.room_for_others = section_of_a_signal_handler
    cache, record = WarmCache(lock, scheduler, None, charge), Mock()
    record.fair.checkout.tag_state.tag = "a"
    assert cache.borrow(record, "unknown") is has_room
    assert not lock.borrowed
    assert lock.lendable < 0  # what was counted may be true no longer
    assert cache.of("a") == ([] if has_room else [record])


def test_loan_is_none_if_a_section_has_found_no_room_for_it():
    """As its caller counts the loans, and another one what is left to be lent."""

    class Borrowed(dict):
        def __len__(self):
            if lock.lendable == 1:
                lock.lendable = 0
                lock.visit()
                lock.lendable = 0
            return super().__len__()

    lock = PoolLock(lambda: 7.0, lambda: True)
    lock.borrowed, lock.lendable = Borrowed(), 1
    cache, record = WarmCache(lock, Mock(), None, lambda checkout: None), Mock()
    record.fair.checkout.tag_state.tag = "a"
    assert not cache.borrow(record, "unknown")
    assert cache.of("a") == [record]
    assert not record.fair.checkout.borrowed


def test_section_does_not_charge_what_is_claimed_meanwhile():
    lock, charged = PoolLock(lambda: 7.0, lambda: True), []
    first, second = Mock(), Mock(again=0)
    second.tag_state.tag = "a"

    def charge(checkout):
        charged.append(checkout)
        assert cache.claim(second, "a")  # as another thread does

    cache = WarmCache(lock, Mock(), None, charge)
    lock.borrowed.update({first: None, second: None})
    lock.visit()
    assert charged == [first]
    assert not second.borrowed


def in_use(engine):
    """Return what each tag has, without what settles it: a section."""
    tag_states = engine.pool._core.scheduler.tag_states.values()
    return {tag_state.tag: tag_state.in_use for tag_state in tag_states}


def checkouts(engine):
    return {row.name: row.checkouts for row in engine.pool.stats().tags}


@pytest.fixture
def engine(make_engine, clock):
    """One whose connection is kept warm for a."""
    engine = make_engine()
    engine.connect().execution_options(scraper="a").close()
    return engine


def test_option_for_which_the_connection_was_warm_takes_no_lock(engine):
    engine.connect().execution_options(scraper="a").close()  # counts what may be lent
    with state.lock_forbidden(engine):
        for _ in range(2):
            engine.connect().execution_options(scraper="a").close()
    assert checkouts(engine) == {"a": 4}
    hold = engine.pool.metrics().tag("a").hold_time
    assert hold.count == 4


def execute(connection):
    connection.execute(text("select 1"))
    return "unknown", True


def read_figures(connection):
    connection.engine.pool.stats()
    return "unknown", False


def check_out_another(connection):
    with connection.engine.execution_options(scraper="b").connect():
        return "unknown", False


def name_another(connection):
    connection.execution_options(scraper="b")
    return "b", True


def close(connection):
    connection.close()
    return "unknown", False


@pytest.mark.parametrize(
    "act", [execute, read_figures, check_out_another, name_another, close]
)
def test_borrower_that_does_not_name_the_tag_is_charged_to_its_own(engine, clock, act):
    connection = engine.connect()
    assert in_use(engine) == {"unknown": 0, "a": 1}
    clock.advance(2.0)
    tag, active = act(connection)
    if act is not close:
        assert in_use(engine)[tag] == 1
        assert in_use(engine)["a"] == 0
        assert engine.pool.stats().tag(tag).active == active
        clock.advance(3.0)
        connection.close()
    rows = {row.name: row for row in engine.pool.stats().tags}
    assert (rows["a"].checkouts, rows[tag].checkouts) == (1, 1)
    held = {close: 2.0, name_another: 3.0}.get(act, 5.0)
    assert (rows["a"].hold_time.total, rows[tag].hold_time.total) == (0.0, held)


def test_nothing_is_borrowed_above_the_own_ceiling(make_pool):
    pool = make_pool(pool_size=4, soft_limit=1, max_limit=3, timeout=0)
    pool.connect().close()
    give([connect(pool, "a"), connect(pool, "a")])
    untagged = pool.connect()
    with pytest.raises(CheckoutTimeout, match="limit=1"):
        pool.connect()
    untagged.close()
    pool.connect().close()


def test_section_charges_first_who_has_borrowed_first(make_pool):
    """For the second it was not looked yet if there is room."""
    pool = make_pool(pool_size=2, soft_limit=1, max_limit=1, timeout=0)
    pool.connect().close()
    held = connect(pool, "b")
    connect(pool, "a").close()
    first, sections = pool.connect(), []
    held.close()

    class Borrowed(dict):
        def __len__(self):
            if not sections:
                sections.append(dict(self))
                pool.stats()
                sections.append(state.tag_of(first))
                first.close()
                pool.stats()
            return super().__len__()

    core = state.core(pool)
    core.lock.borrowed = core.warm.borrowed = Borrowed(core.warm.borrowed)
    second = pool.connect()
    assert [*sections[1:], state.tag_of(second)] == ["unknown", "unknown"]


def test_nothing_is_borrowed_while_a_section_charges_what_others_have(make_pool):
    """It has taken that out of what is borrowed, and the tag has it not yet."""
    pool = make_pool(pool_size=2, soft_limit=1, max_limit=1, timeout=0)
    pool.connect().close()
    held = connect(pool, "b")
    connect(pool, "a").close()
    first, sections, gate = pool.connect(), [], Gate()
    held.close()
    core = state.core(pool)
    charge = core.warm._charge

    class Borrowed(dict):
        def __len__(self):
            if not sections:
                sections.append(None)  # the other thread comes here, too
                sections.append(Caller(pool.stats))
                gate.reached()
            return super().__len__()

        def pop(self, *arguments):
            if threading.current_thread() is threading.main_thread():
                gate.open()
            return super().pop(*arguments)

    core.warm._charge = lambda checkout: (gate(), charge(checkout))
    core.lock.borrowed = core.warm.borrowed = Borrowed(core.warm.borrowed)
    try:
        with pytest.raises(CheckoutTimeout):
            pool.connect()
    finally:
        gate.open()
        sections[1].result()
    assert state.tag_of(first) == "unknown"
    first.close()


def test_tag_is_not_altered_in_a_transaction_whosever_the_connection_was(engine):
    with engine.connect() as connection:
        connection.begin()
        with pytest.raises(InvalidRequestError, match="already initialized"):
            connection.execution_options(scraper="a")


def test_borrowed_connection_that_is_dropped_is_charged_and_comes_back(engine):
    engine.pool._core.checkout("unknown", engine.pool)  # lost before SQLAlchemy has it
    assert engine.pool.checkedout() == 0
    assert checkouts(engine) == {"a": 1, "unknown": 1}
