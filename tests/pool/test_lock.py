"""The pool's lock alone: what is done in a section, and what after it."""

from __future__ import annotations

import dis
import itertools
import math
import sys
from functools import partial

import pytest
from sqlalchemy.exc import InvalidRequestError

from sqla_fairpool.pool import lock as lock_module
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


class Interrupt:
    """Raises in the lock's code where CPython may: as a call begins or has returned.

    :attr:`left`: how many of these places come before the one where it raises.
    """

    def __init__(self):
        self.left = math.inf
        self._before = {}

    def __call__(self, frame, what, argument):
        if frame.f_code.co_filename != lock_module.__file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if what == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            before, self._before[frame] = self._before.get(frame, "CALL"), name
            if before.startswith(("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt
        return self


def test_interrupt_anywhere_loses_no_wake_up(lock, done):
    left, interrupt, former = [], Interrupt(), sys.gettrace()

    def transition(now):
        for caller in ("one", "other"):
            left.append(caller)
            lock.wake_ups.append(partial(done.append, caller))

    for number in itertools.count(1):
        sys._getframe().f_trace_opcodes = True  # from 3.12 on, else there are no events
        sys.settrace(interrupt)
        try:
            lock.visit()  # from 3.13 on a function that is entered has none yet
            left.clear()
            done.clear()
            interrupt.left = number
            lock.run(transition)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(former)
        assert set(left) == set(done), number
        assert not lock.in_section()
        if interrupt.left > 0:
            break
        interrupt.left = math.inf
    assert number > 10


def test_child_of_a_fork_begins_with_a_free_lock(lock, done):
    def transition(now):
        lock.wake_ups.append(lambda: done.append("the parent's"))
        lock.reset()
        lock.run(lambda now: done.append("the child's"))

    lock.run(transition)
    assert done == ["the child's"]
