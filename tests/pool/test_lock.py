"""The pool's lock alone: what is done in a section, and what after it."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import InvalidRequestError

from sqla_fairpool.pool.lock import PoolLock


@pytest.fixture
def done():
    """What was done, in order."""
    return []


@pytest.fixture
def waits():
    """If what takes time can be waited for: the last one says."""
    return [True]


@pytest.fixture
def lock(waits):
    return PoolLock(lambda: 7.0, lambda: waits[-1])


def test_section_gives_the_time_and_the_result(lock):
    assert lock.run(lambda now: (now, lock.in_section())) == (7.0, True)
    assert not lock.in_section()


def test_inner_call_is_refused_and_leaves_the_section_as_it_is(lock, done):
    def transition(now):
        lock.wake_ups.append(lambda: done.append(lock.in_section()))
        with pytest.raises(InvalidRequestError, match="signal handler"):
            lock.run(lambda now: done.append("inner"))
        assert lock.in_section()
        assert done == []

    lock.run(transition)
    assert done == [False]


def test_work_of_a_finaliser_is_done_before_the_section_ends(lock, done):
    def transition(now):
        lock.wake_ups.append(lambda: done.append("wake"))
        lock.do(lambda now: done.append(("work", now, lock.in_section())))
        done.append("transition")

    lock.run(transition)
    assert done == ["transition", ("work", 7.0, True), "wake"]


def test_work_outside_of_a_section_is_done_in_the_next_or_in_its_own(lock, done):
    lock.inbox.append(lambda now: done.append("left"))
    lock.do(lambda now: done.append(lock.in_section()))
    lock.inbox.append(lambda now: done.append("left"))
    lock.run(lambda now: done.append("transition"))
    assert done == ["left", True, "left", "transition"]


def test_interrupted_work_is_done_again(lock, done):
    def work(now):
        done.append("work")
        if len(done) == 1:
            raise KeyboardInterrupt

    lock.inbox.append(work)
    with pytest.raises(KeyboardInterrupt):
        lock.run(done.append)
    assert done == ["work", "work"]
    assert not lock.inbox


def test_callers_are_woken_before_what_takes_time(lock, done):
    def transition(now):
        lock.deferred.append(lambda: done.append("close"))
        lock.wake_ups.extend([lambda: done.append("wake")] * 2)

    lock.run(transition)
    assert done == ["wake", "wake", "close"]


def test_section_that_fails_wakes_callers_all_the_same(lock, done):
    def transition(now):
        lock.wake_ups.append(lambda: done.append("wake"))
        raise LookupError

    with pytest.raises(LookupError):
        lock.run(transition)
    assert done == ["wake"]


def test_what_takes_time_is_left_where_it_cannot_be_waited_for(lock, waits, done):
    waits.append(False)
    lock.wake_ups.append(lambda: done.append("wake"))
    lock.deferred.append(lambda: done.append("close"))
    lock.visit()
    assert done == ["wake"]
    waits.append(True)
    lock.visit()
    assert done == ["wake", "close"]


def test_interrupt_of_a_wake_up_loses_none(lock, done):
    def interrupted():
        done.append("interrupted")
        if done.count("interrupted") == 1:
            raise KeyboardInterrupt

    lock.wake_ups.extend([interrupted, lambda: done.append("other")])
    lock.deferred.append(lambda: done.append("close"))
    with pytest.raises(KeyboardInterrupt):
        lock.visit()
    assert done == ["interrupted", "other", "interrupted", "close"]


def test_child_of_a_fork_begins_with_a_free_lock(lock, done):
    def transition(now):
        lock.wake_ups.append(lambda: done.append("the parent's"))
        lock.reset()
        lock.run(lambda now: done.append("the child's"))

    lock.run(transition)
    assert done == ["the child's"]
