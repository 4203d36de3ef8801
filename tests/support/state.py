"""The inside of a pool, for tests: no other file of the tests reaches it.

Every function takes a pool or an engine. A test asks here for what no public method
tells; where one does (`pool.stats()`, `pool.checkedout()`), it asks that.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

from greenlet import getcurrent, greenlet

from sqla_fairpool.pool.checkout import Checkout
from sqla_fairpool.pool.ledger_member import LedgerMember
from support.invariants import check_valid

#: The function that looks for a deadlock, where it is called; to be replaced.
DEADLOCK_CHECK = "sqla_fairpool.pool.waiting.is_stuck"
#: Seconds that are waited for the end of a session, to be replaced.
GOODBYE = "sqla_fairpool.pool.physical._GOODBYE"


def core(pool):
    """The object that owns the state. Pools that follow each other share one."""
    return getattr(pool, "pool", pool)._core


def scheduler(pool):
    """Its scheduler."""
    return core(pool).scheduler


# -- figures that pool.stats() does not have, or takes too long to have ----------------


def waiting(pool):
    """How many callers wait."""
    return scheduler(pool).waiting


def in_use(pool):
    """How many slots are taken, those of connections that are kept warm included."""
    return scheduler(pool).in_use


def capacity(pool):
    """How many slots may be taken now."""
    return scheduler(pool).capacity


def allotted(pool):
    """How many connections there may be: the capacity, or what the ledger allots."""
    return core(pool).slots.allotted


def connections(pool):
    """The connections that exist at the server, as the pool knows them."""
    return list(core(pool).slots.existing)


def existing(pool):
    """The set of them."""
    return core(pool).slots.existing


def connections_there(pool):
    """How many there are, those in the hands of a user who has detached them too."""
    return core(pool).slots.there()


def line(pool, tag):
    """The checkouts that wait under a tag, the first one first."""
    return list(scheduler(pool).tag_states[tag].waiters or ())


def newest_waiter(pool):
    """The checkout that came last of those that wait."""
    return scheduler(pool).lines.newest()


def watcher(pool):
    """The waiting checkout that wakes up for the next reallocation, if one does."""
    return core(pool).state.watcher


def warm(pool, tag):
    """The list of the records that are kept warm for a tag."""
    return core(pool).warm.of(tag)


def replace_warm(pool, tag, list_class):
    """Have the records of a tag be kept warm in another list, of a class of the test's.

    :param list_class: derived from ``WarmRecords``.
    """
    cache = core(pool).warm
    records = list_class(cache, tag)
    former = cache.by_tag.get(tag, [])
    while former:
        records.append(former.pop())
    cache.by_tag[tag] = records
    records.list()


def record_of(connection):
    """The pool's record of a connection, an engine's or one of the pool itself."""
    return getattr(connection, "_dbapi_connection", connection)._connection_record


def checkout_of(connection):
    """What is noted of the checkout of a connection that is out."""
    return record_of(connection).fair.checkout


def tag_of(connection):
    """The tag that a connection is charged to."""
    return checkout_of(connection).tag_state.tag


def stack_of(connection):
    """Where a connection was checked out, as far as that was noted."""
    return checkout_of(connection).stack


# -- the lock --------------------------------------------------------------------------


@contextmanager
def critical_section(pool):
    """Be in the middle of a transition of the pool's lock; gives the time.

    The transition is a greenlet of this thread, which is suspended for the block.
    """
    transition = greenlet(partial(core(pool).lock.run, getcurrent().switch))
    try:
        yield transition.switch()
    finally:
        transition.switch()


def is_busy(pool):
    """Tell if this thread is in a section of the lock."""
    return core(pool).lock.in_section()


def is_free(pool):
    """Tell if no other thread has the lock, nor is in a section of it."""
    lock = core(pool).lock
    if not lock.mutex.acquire(blocking=False):
        return False
    lock.mutex.release()
    return lock.busy_in is None


def came_back_meanwhile(pool):
    """How many connections came back in the middle of this critical section."""
    return sum(isinstance(work, partial) for work in core(pool).lock.inbox)


def do_later(pool, function):
    """Leave something to be done after the next critical section."""
    core(pool).lock.deferred.append(function)


def look_around(pool):
    """Do what there is to do in a critical section."""
    core(pool).lock.visit()


@contextmanager
def lock_forbidden(pool):
    """Let the test fail if anything takes the pool's lock."""
    the_lock = core(pool).lock
    mutex, the_lock.mutex = the_lock.mutex, None
    try:
        yield
    finally:
        the_lock.mutex = mutex


# -- what tests do to it ---------------------------------------------------------------


def wait_with(pool, waiter_class):
    """Have callers that come from now on wait with another class."""
    core(pool)._waiting.waiter_class = waiter_class


def after_fork(pool):
    """Do what is done in the child of a fork."""
    core(pool).after_fork()


def find_leaks(pool):
    """Look for connections that are out for too long, as the thread for it does."""
    core(pool).state.leaks.look()


def leak_thread(pool):
    """The thread that does it, None if it is switched off."""
    leaks = core(pool).state.leaks
    return None if leaks is None else leaks._runner.get("runner")


def lose(pool, error):
    """Have a pool know of a disconnect, by an error of its server."""
    core(pool).opening.reconnects.lost(error)


def reconnects(pool):
    """What paces the opening of connections after a disconnect."""
    return core(pool).opening.reconnects


def is_collected(pool):
    """Return a function that tells if the core of a pool has been collected."""
    alive = core(pool).alive
    return lambda: alive() is None


@contextmanager
def slot_without_caller(pool, tag):
    """Take a slot that no caller has, nor any connection."""
    lost = Checkout(core(pool))
    with critical_section(pool) as now:
        assert scheduler(pool).request(lost, tag, now)
    yield
    with critical_section(pool) as now:
        scheduler(pool).release(lost, now)


def interrupted_checkout(pool, tag):
    """Be granted a slot and give it up at once; return the checkout."""
    begun = []
    core(pool).lock.run(core(pool)._request, begun, tag)
    core(pool).give_up(*begun)
    return begun[0]


# -- the ledger ------------------------------------------------------------------------


def share(pool):
    """The pool's side of a ledger, None without one."""
    return core(pool).member


def keeper(pool):
    """What works for the pool in its ledger, None without one."""
    return None if share(pool) is None else share(pool).keeper


def join(pool, keeper):
    """Make a pool the member of a ledger with this keeper; return its share."""
    its_core = core(pool)
    member = LedgerMember(its_core._waiter_class, its_core.options.default_tag)
    its_core.member = member
    its_core._begin(its_core.options)
    member.serve(its_core)
    member.keeper = keeper
    return member


# -- what must be true -----------------------------------------------------------------


def assert_quiet(pool):
    """Nothing is out, no caller waits, and the accounting is consistent."""
    look_around(pool)  # what was left to the next caller, where none could wait
    with critical_section(pool):
        check_valid(scheduler(pool), [])
        assert in_use(pool) == 0
        assert waiting(pool) == 0
        assert not core(pool).lock.inbox
        assert not core(pool).lock.wake_ups
        assert not core(pool).lock.deferred
        assert capacity(pool) == core(pool).options.capacity
        assert watcher(pool) is None
        assert len(core(pool).connections.idle) <= core(pool).options.pool_size


def assert_consistent(pool):
    """The scheduler agrees with the checkouts that are out."""
    with critical_section(pool):
        check_valid(scheduler(pool))
