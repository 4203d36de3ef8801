"""How connections change hands between threads, each race frozen and asserted."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError
from support import state
from support.state import assert_consistent, assert_quiet
from support.stub import StubError
from support.threads import Caller, ensure_waiting, eventually

import sqla_fairpool
from sqla_fairpool import CheckoutTimeout, FairQueuePool, TooManyWaiting
from sqla_fairpool.pool.waiters import ThreadWaiter


def connect(pool, tag):
    with sqla_fairpool.tag(tag):
        return pool.connect()


def wait_in_line(pool, tag, count=1):
    """Start `count` callers under `tag`, one after the other; return them in order."""
    callers = []
    for _ in range(count):
        before = state.waiting(pool)
        callers.append(Caller(connect, pool, tag))
        ensure_waiting(pool, before + 1)
    return callers


@pytest.fixture
def narrow(make_pool):
    """A pool of one connection."""
    return make_pool(pool_size=1)


# -- hand-off ------------------------------------------------------------------


def test_waiter_gets_the_very_connection_that_came_back(narrow):
    holder = connect(narrow, "a")
    dbapi_connection = holder.dbapi_connection
    (caller,) = wait_in_line(narrow, "a")
    holder.close()
    connection = caller.result()
    assert connection.dbapi_connection is dbapi_connection
    connection.close()


def test_line_is_served_in_order(narrow):
    holder = connect(narrow, "a")
    callers = wait_in_line(narrow, "a", 5)
    for n, caller in enumerate(callers):
        holder.close()
        holder = caller.result()
        assert all(other.is_alive() for other in callers[n + 1 :])
    holder.close()


def test_returning_thread_does_not_overtake_the_waiter(narrow):
    holder = connect(narrow, "a")
    (caller,) = wait_in_line(narrow, "a")
    holder.close()
    again = Caller(connect, narrow, "a")
    first = caller.result()
    ensure_waiting(narrow, 1)
    first.close()
    again.result().close()


def test_freed_connection_goes_to_the_tag_that_holds_less(make_pool):
    pool = make_pool(pool_size=4, soft_limit=3, max_limit=4)
    a = [connect(pool, "a") for _ in range(3)]
    b = connect(pool, "b")
    (heavy,) = wait_in_line(pool, "a")
    (light,) = wait_in_line(pool, "b")
    a.pop().close()
    second = light.result()
    assert heavy.is_alive()
    for connection in [*a, b, second]:
        connection.close()
    heavy.result().close()


def test_tag_at_its_ceiling_waits_although_connections_are_free(make_pool):
    pool = make_pool(pool_size=4, soft_limit=1, max_limit=2)
    held = [connect(pool, "a") for _ in range(2)]
    (caller,) = wait_in_line(pool, "a")
    with connect(pool, "b"):
        assert pool.stats().tag("b").connections == 1
    held.pop().close()
    assert caller.is_alive(), "with two active tags the ceiling is 1"
    held.pop().close()
    caller.result().close()


def test_idle_connection_is_used_before_another_is_opened(make_pool, server):
    pool = make_pool(pool_size=5)
    for tag in "abcabc":
        connect(pool, tag).close()
    assert server.opened == 1


# -- keeping warm --------------------------------------------------------------


def test_connection_kept_warm_is_there_for_everybody(make_pool, server):
    pool = make_pool(pool_size=1)
    connect(pool, "a").close()
    assert state.in_use(pool) == 1, "kept warm for a"
    connect(pool, "b").close()
    assert server.opened == 1


def test_figures_count_a_warm_connection_as_checked_in(make_pool):
    pool = make_pool()
    connect(pool, "a").close()
    assert (pool.checkedout(), pool.checkedin()) == (0, 1)
    connect(pool, "a").close()
    assert pool.stats().idle == 1
    assert pool.stats().tag("a").connections == 0


def test_checkin_that_meets_a_new_waiter_serves_him(narrow):
    """The checkin has seen nobody wait; before it is kept warm, somebody does."""
    holder = connect(narrow, "a")
    callers = []

    class Late(list):
        def append(self, record):
            callers.extend(wait_in_line(narrow, "b"))
            super().append(record)

    state.replace_warm(narrow, "a", Late())
    holder.close()
    callers[0].result().close()


def test_checkout_that_meets_a_new_waiter_lets_him_go_first(narrow):
    """The checkout has taken the warm record when somebody else waits."""
    connect(narrow, "a").close()
    callers = []

    class Early(list):
        def pop(self, index):
            record = super().pop(index)
            if not callers:
                callers.extend(wait_in_line(narrow, "b"))
            return record

    state.replace_warm(narrow, "a", Early(state.warm(narrow, "a")))
    again = Caller(connect, narrow, "a")
    eventually(lambda: callers, "the waiter")
    callers[0].result().close()
    again.result().close()


def test_warm_connection_above_a_fallen_ceiling_is_not_taken(make_pool):
    pool = make_pool(pool_size=4, soft_limit=1, max_limit=3)
    a = [connect(pool, "a") for _ in range(3)]
    with connect(pool, "b"):
        a.pop().close()  # a holds two still, above its ceiling of 1
        caller = Caller(connect, pool, "a")
        ensure_waiting(pool, 1)
        a.pop().close()
        a.pop().close()
    caller.result().close()


def test_warm_connection_of_an_idle_tag_counts_for_nobody(make_pool, clock):
    pool = make_pool(pool_size=2, soft_limit=1, max_limit=2)
    connect(pool, "a").close()
    clock.advance(100.0)
    held = [connect(pool, "b") for _ in range(2)]
    assert pool.stats().tag("b").connections == 2
    for connection in held:
        connection.close()


# -- opening -------------------------------------------------------------------


def test_nobody_waits_while_a_connection_is_being_opened(make_pool, server):
    pool = make_pool(pool_size=2)
    connect(pool, "a").close()
    opening, go_on = threading.Event(), threading.Event()

    def slowly():
        opening.set()
        assert go_on.wait(30)

    held = connect(pool, "a")
    server.before["connect"] = slowly
    caller = Caller(connect, pool, "b")
    assert opening.wait(30)
    held.close()
    connect(pool, "a").close()  # would hang if the lock were held
    assert pool.checkedout() == 1, "the slot is reserved"
    go_on.set()
    caller.result().close()


def test_failed_connect_passes_the_slot_on(narrow, server):
    first_fails = threading.Event()

    def fail():
        assert first_fails.wait(30)
        server.before.clear()
        raise StubError("refused")

    server.before["connect"] = fail
    caller = Caller(connect, narrow, "a")
    eventually(lambda: state.in_use(narrow) == 1)
    (next_one,) = wait_in_line(narrow, "b")
    first_fails.set()
    with pytest.raises(StubError):
        caller.result()
    next_one.result().close()


@pytest.mark.parametrize("error", [StubError, KeyboardInterrupt, SystemExit])
def test_exception_while_connecting_frees_the_slot(narrow, server, error):
    def fail():
        raise error

    server.before["connect"] = fail
    for _ in range(3):
        with pytest.raises(error):
            connect(narrow, "a")
    server.before.clear()
    connect(narrow, "a").close()


@pytest.mark.parametrize("error", [StubError, KeyboardInterrupt])
def test_failing_reset_frees_the_slot(narrow, server, error):
    connection = connect(narrow, "a")

    def fail():
        raise error

    server.before["rollback"] = fail
    if error is StubError:
        connection.close()
    else:
        with pytest.raises(error):
            connection.close()
    server.before.clear()
    assert server.open == 0, "a connection in an unknown state is closed"
    connect(narrow, "b").close()


@pytest.mark.parametrize("cleanup", ["close", "invalidate", "detach"])
@pytest.mark.filterwarnings("ignore:Can't invalidate an already-closed connection")
def test_what_follows_an_interrupted_return_leaves_the_next_caller_alone(
    narrow, server, cleanup
):
    """With SQLAlchemy before 2.0.56 and 2.1.6 it meets the next caller's connection."""
    first = connect(narrow, "a")

    def interrupt():
        raise KeyboardInterrupt

    server.before["rollback"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        first.close()
    server.before.clear()
    second = connect(narrow, "b")
    getattr(first, cleanup)()
    assert narrow.checkedout() == 1
    assert not second.dbapi_connection.closed
    second.close()


def test_there_are_never_more_connections_than_the_capacity(make_pool, server):
    """Overflow is closed before its slot is free, also while others wait."""
    pool = make_pool(pool_size=1, max_overflow=2, soft_limit=3, max_limit=3)
    barrier = threading.Barrier(12)

    def work(tag):
        barrier.wait()
        for _ in range(100):
            connect(pool, tag).close()

    for caller in [Caller(work, f"tag{n % 3}") for n in range(12)]:
        caller.result()
    assert server.most <= 3
    assert server.open <= 1


def test_overflow_slot_is_free_when_its_connection_is_closed(make_pool, server):
    pool = make_pool(pool_size=1, max_overflow=1, soft_limit=2, max_limit=2)
    one, two = connect(pool, "a"), connect(pool, "a")
    closing, go_on = threading.Event(), threading.Event()
    close = two.dbapi_connection.close

    def slowly():
        closing.set()
        assert go_on.wait(30)
        close()

    two.dbapi_connection.close = slowly
    one.close()
    caller = Caller(two.close)
    assert closing.wait(30)
    assert pool.checkedout() == 1
    late = connect(pool, "b")
    (waiter,) = wait_in_line(pool, "b")
    go_on.set()
    caller.result()
    waiter.result().close()
    late.close()
    assert server.most == 2


# -- waiting -------------------------------------------------------------------


def test_time_out_names_tag_ceiling_line_and_holders(make_pool, clock):
    pool = make_pool(pool_size=3, soft_limit=2, max_limit=3, timeout=0)
    held = [connect(pool, "web"), connect(pool, "web"), connect(pool, "jobs")]
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "web")
    assert str(caught.value).startswith(
        "checkout timed out after 0.00s: tag 'web' in_use=2 ceiling=2 waiting=1 "
        "position=1; pool in_use=3/3 idle=0 active_tags=2; held by web=2 jobs=1; "
        "oldest: "
    )
    assert isinstance(caught.value, SQLAlchemyTimeoutError)
    assert (caught.value.tag, caught.value.waited) == ("web", 0.0)
    assert pool.stats().tag("web").timeouts == 1
    for connection in held:
        connection.close()


def test_time_out_does_happen(make_pool):
    pool = make_pool(pool_size=1, timeout=0.01, deadlock_timeout=None)
    with connect(pool, "a"), pytest.raises(CheckoutTimeout, match=r"after 0\.0\ds"):
        connect(pool, "a")


def test_many_holders_are_summed_up(make_pool):
    pool = make_pool(pool_size=10, soft_limit=10, max_limit=10, timeout=0)
    held = [connect(pool, f"t{n}") for n in range(10)]
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "late")
    assert "held by t0=1 t1=1 t2=1 t3=1 t4=1 t5=1 and 4 more tags=4; " in str(
        caught.value
    )
    for connection in held:
        connection.close()


def test_one_more_than_max_waiting_is_refused_at_once(make_pool):
    pool = make_pool(pool_size=1, max_waiting=1)
    holder = connect(pool, "a")
    (caller,) = wait_in_line(pool, "a")
    with pytest.raises(TooManyWaiting) as caught:
        connect(pool, "b")
    assert str(caught.value) == (
        "too many waiting: tag 'b' refused, waiting=1 max_waiting=1; pool in_use=1/1"
    )
    assert caught.value.tag == "b"
    holder.close()
    caller.result().close()


def test_refused_caller_takes_no_idle_connection_with_him(make_pool, server):
    pool = make_pool(pool_size=3, soft_limit=1, max_limit=2, max_waiting=0)
    held = [connect(pool, "a") for _ in range(2)]
    for connection in held:
        connection.close()
    held = [connect(pool, "a")]
    with connect(pool, "b"):
        for _ in range(3):
            with pytest.raises(TooManyWaiting):
                connect(pool, "a")
    assert server.open == 2
    assert pool.checkedin() == 1
    held.pop().close()


def test_max_waiting_0_means_that_nobody_waits(make_pool):
    pool = make_pool(pool_size=1, max_waiting=0)
    with connect(pool, "a"), pytest.raises(TooManyWaiting):
        connect(pool, "a")


class Interrupted(BaseException):
    pass


def interrupting(when):
    """A waiter class whose sleep ends with an exception after `when(self)`."""

    class InterruptedWaiter(ThreadWaiter):
        def wait(self, seconds):
            when(self, seconds)
            raise Interrupted

    return InterruptedWaiter


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_exception_while_waiting_leaves_the_line(narrow, error):
    class Waiter(ThreadWaiter):
        def wait(self, seconds):
            raise error

    narrow.reconfigure(deadlock_timeout=None)
    with connect(narrow, "a"):
        state.wait_with(narrow, Waiter)
        with pytest.raises(error):
            connect(narrow, "a")
        assert narrow.stats().waiting == 0


def test_exception_that_meets_the_grant_passes_it_on(narrow):
    """Granted and interrupted in the same instant: the next one gets it."""
    holder = connect(narrow, "a")

    def granted_meanwhile(waiter, seconds):
        others.extend(wait_in_line_plainly())
        holder.close()

    def wait_in_line_plainly():
        state.wait_with(narrow, ThreadWaiter)
        return wait_in_line(narrow, "a")

    others = []
    state.wait_with(narrow, interrupting(granted_meanwhile))
    with pytest.raises(Interrupted):
        connect(narrow, "a")
    others[0].result().close()


def test_time_out_that_meets_the_grant_takes_it(make_pool, clock):
    """Granted in the same instant as the deadline passes: no error, no loss."""
    pool = make_pool(pool_size=1, timeout=5.0)
    holder = connect(pool, "a")

    class Waiter(ThreadWaiter):
        def wait(self, seconds):
            clock.advance(5.0)
            holder.close()

    state.wait_with(pool, Waiter)
    connect(pool, "a").close()


def test_wake_up_for_nothing_is_slept_over(make_pool, clock):
    pool = make_pool(pool_size=1, deadlock_timeout=None)
    holder = connect(pool, "a")
    wakes = []

    class Waiter(ThreadWaiter):
        def wait(self, seconds):
            wakes.append(seconds)
            if len(wakes) == 3:
                holder.close()

    state.wait_with(pool, Waiter)
    connect(pool, "a").close()
    assert wakes == [30.0, 30.0, 30.0]


# -- the reallocation, noticed by those who wait -------------------------------


def test_waiters_notice_that_a_tag_became_idle_when_nobody_else_comes(make_pool):
    pool = make_pool(
        pool_size=4,
        soft_limit=1,
        max_limit=2,
        idle_timeout=0.05,
        reallocation_interval=0.01,
    )
    connect(pool, "b").close()
    holder = connect(pool, "a")
    # Its ceiling is 1 for as long as b is active. Nobody touches the pool.
    connect(pool, "a").close()
    holder.close()


def test_watch_is_passed_on_when_its_owner_leaves(make_pool):
    pool = make_pool(pool_size=1)
    holder = connect(pool, "a")
    callers = wait_in_line(pool, "a", 3)
    for n, caller in enumerate(callers):
        assert state.watcher(pool).waiter is not None, "the watcher waits itself"
        holder.close()
        holder = caller.result()
        assert_consistent(pool)
        assert (state.watcher(pool) is None) == (n == 2)
    holder.close()


def test_newest_waiter_takes_the_watch(make_pool):
    """So it changes hands seldom: he will wait longest."""
    pool = make_pool(pool_size=1)
    holder = connect(pool, "a")
    first, second, third = wait_in_line(pool, "a", 3)
    holder.close()
    holder = first.result()
    assert state.watcher(pool) is state.newest_waiter(pool)
    for caller in (second, third):
        holder.close()
        holder = caller.result()
    holder.close()


# -- dispose and recreate ------------------------------------------------------


def test_dispose_keeps_the_bound(make_engine, server):
    engine = make_engine(pool_size=4, soft_limit=4, max_limit=4)
    tagged = engine.execution_options(scraper="a")
    out = [tagged.connect() for _ in range(2)]
    for connection in [tagged.connect() for _ in range(2)]:
        connection.close()
    engine.dispose()
    assert server.open == 2
    more = [tagged.connect() for _ in range(2)]
    caller = Caller(tagged.connect)
    ensure_waiting(engine.pool, 1)
    assert server.most == 4
    out.pop().close()  # closed, not kept in the pool that is gone
    caller.result().close()
    assert server.most == 4
    for connection in [*out, *more]:
        connection.close()
    engine.dispose()
    assert server.open == 0


@pytest.mark.parametrize("tag", ["a", "unknown"])
def test_connection_held_over_a_dispose_is_closed_when_it_comes_back(
    make_engine, server, tag
):
    engine = make_engine()
    tagged = engine.execution_options(scraper=tag)
    connection = tagged.connect()
    engine.dispose()
    connection.close()
    assert server.open == 0
    with tagged.connect():
        assert (server.opened, server.open) == (2, 1)


def test_connection_held_over_a_dispose_is_not_handed_to_a_waiter(make_engine, server):
    engine = make_engine(pool_size=1)
    tagged = engine.execution_options(scraper="a")
    connection = tagged.connect()
    engine.dispose()
    caller = Caller(tagged.connect)
    ensure_waiting(engine.pool, 1)
    connection.close()
    caller.result().close()
    assert (server.opened, server.most) == (2, 1)


def test_connections_being_closed_by_dispose_keep_their_slots(make_engine, server):
    engine = make_engine(pool_size=2, soft_limit=2, max_limit=2)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect() as one, tagged.connect():
        dbapi_connection = one.connection.dbapi_connection
    closing, go_on = threading.Event(), threading.Event()
    close = dbapi_connection.close

    def slowly():
        closing.set()
        assert go_on.wait(30)
        close()

    dbapi_connection.close = slowly
    disposal = Caller(engine.dispose)
    assert closing.wait(30)
    callers = [Caller(tagged.connect) for _ in range(2)]
    eventually(lambda: state.waiting(engine) >= 1)
    go_on.set()
    disposal.result()
    for connection in [caller.result() for caller in callers]:
        connection.close()
    assert server.most <= 2


def test_interrupt_while_disposing_leaves_the_rest_to_the_next(make_pool, server):
    pool = make_pool(pool_size=3, soft_limit=3, max_limit=3)
    connections = [connect(pool, "a") for _ in range(3)]
    dbapi_connections = [c.dbapi_connection for c in connections]
    for connection in connections:
        connection.close()
    interrupted = dbapi_connections[-1]

    def interrupt():
        raise KeyboardInterrupt

    interrupted.close = interrupt
    with pytest.raises(KeyboardInterrupt):
        pool.dispose()
    connect(pool, "b").close()
    assert [c.closed for c in dbapi_connections[:2]] == [True, True]
    assert state.capacity(pool) == 3


def test_recreate_keeps_every_option(server):
    pool = server.pool(
        FairQueuePool,
        pool_size=7,
        max_overflow=2,
        timeout=3.0,
        soft_limit=4,
        max_limit=6,
        idle_timeout=5.0,
        reallocation_interval=2.0,
        max_waiting=9,
        tag_option="tenant",
        default_tag="nobody",
        use_lifo=True,
        recycle=99,
        pre_ping=True,
        reset_on_return="commit",
        logging_name="mine",
    )
    again = pool.recreate()
    assert type(again) is FairQueuePool
    assert again.options == pool.options
    assert state.core(again) is state.core(pool)
    for name in ("_recycle", "_pre_ping", "_reset_on_return", "_orig_logging_name"):
        assert getattr(again, name) == getattr(pool, name)


def test_recreate_of_a_subclass_with_options_of_its_own(server):
    class ScraperPool(FairQueuePool):
        def __init__(self, creator, colour="red", **kw):
            self.colour = colour
            super().__init__(creator, **kw)

    pool = server.pool(ScraperPool, pool_size=3)
    assert type(pool.recreate()) is ScraperPool
    assert pool.recreate().size() == 3


def test_successor_opens_connections_of_its_own(make_pool, server):
    pool = make_pool(pool_size=2)
    connect(pool, "a").close()
    successor = pool.recreate()
    connect(successor, "a").close()
    assert server.opened == 2
    successor.dispose()
    assert server.open == 1, "what the first has left is not touched"
    pool.dispose()
    assert server.open == 0


def test_what_a_former_pool_has_left_gives_way_when_it_is_in_the_way(make_pool, server):
    pool = make_pool(pool_size=2, soft_limit=2, max_limit=2)
    for connection in [connect(pool, "a"), connect(pool, "a")]:
        connection.close()
    successor = pool.recreate()
    held = [connect(successor, "a") for _ in range(2)]
    assert server.most == 2
    assert server.open == 2
    for connection in held:
        connection.close()


def test_pool_goes_on_while_its_successor_is_not_used(make_pool, server):
    pool = make_pool(pool_size=2)
    pool.recreate()
    for _ in range(2):
        connect(pool, "a").close()
    assert server.opened == 1


def test_time_out_has_no_other_error_as_its_context(make_pool):
    pool = make_pool(pool_size=1, timeout=0)
    with connect(pool, "a"), pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "a")
    assert caught.value.__context__ is None


def test_successor_that_was_not_used_yet_is_empty(make_engine, server):
    """As after ``engine.dispose(close=False)``, which leaves the old one as it is."""
    engine = make_engine()
    engine.connect().close()
    former = engine.pool
    engine.dispose(close=False)
    assert (former.checkedin(), engine.pool.checkedin()) == (1, 0)
    engine.connect().close()
    assert (former.checkedin(), engine.pool.checkedin()) == (1, 1)
    former.dispose()
    assert (former.checkedin(), engine.pool.checkedin()) == (0, 1)
    assert server.open == 1


def test_lost_connection_is_refused_where_its_replacement_may_not_wait(make_pool):
    """Opened again, it would be one too many: its caller asks as at a checkout."""
    pool = make_pool(pool_size=2, max_waiting=0)
    first, second = connect(pool, "a"), connect(pool, "b")
    pool.reconfigure(pool_size=1)
    first._connection_record.invalidate()
    with pytest.raises(TooManyWaiting):
        first._connection_record.get_connection()
    first.close()
    second.close()
    connect(pool, "a").close()
    assert_quiet(pool)
