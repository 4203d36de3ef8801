"""An interrupt at any moment of a call leaves the pool's lock free.

Its traceback is kept, as a debugger or a log handler does: what is only put right when
that goes does not count.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path

import pytest
from support import state
from support.threads import Caller

import sqla_fairpool
import sqla_fairpool.pool.snapshot  # else stats() is interrupted as it imports this
from sqla_fairpool import threads

#: Whose functions are interrupted.
OURS = (str(Path(sqla_fairpool.__file__).parent), contextlib.__file__)


class Thrown(BaseException):
    """Thrown into a thread, or by a signal handler."""


def throw_at(number, function, *args):
    """Call a function; raise at the so many-th moment where CPython may interrupt it.

    Those are when a function begins, and when a call has ended. Only in the package: an
    interrupt in `logging`, say, leaves a lock of that one locked. Not as a function of
    Python returns to the start of a `with` block: no version does it that has `Lock`.

    :return: the interrupt with its traceback, None if the function came to its end.
    """
    left = number

    def count(frame, event, argument):
        nonlocal left
        if event == "return" and frame.f_code is threads.Lock.__enter__.__code__:
            return
        if event != "c_call" and frame.f_code.co_filename.startswith(OURS):
            left -= 1
            if left == 0:
                raise Thrown  # which ends the profiling

    gc.disable()  # in a finaliser it would be lost
    sys.setprofile(count)
    try:
        function(*args)
    except Thrown as error:
        return error
    finally:
        sys.setprofile(None)
        gc.enable()
    return None


def go_through(pool):
    with pool.connect():
        pass


def refused(pool):
    """A caller that may not wait."""
    with pool.connect():
        try:
            pool.connect()
        except sqla_fairpool.TooManyWaiting:
            pass


def cold(pool):
    """Without what is kept warm, which needs no lock."""
    pool.upkeep()
    go_through(pool)


def replace(pool):
    successor = pool.recreate()
    pool.dispose()
    go_through(successor)
    successor.dispose()


CALLS = {
    "connect": go_through,
    "cold": cold,
    "refused": refused,
    "stats": lambda pool: pool.stats(),
    "metrics": lambda pool: pool.metrics(),
    "upkeep": lambda pool: pool.upkeep(),
    "reconfigure": lambda pool: pool.reconfigure(max_waiting=0),
    "warm_up": lambda pool: pool.warm_up(),
    "dispose": lambda pool: pool.dispose(),
    "replace": replace,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_lock_is_free_after_an_interrupt(server, monkeypatch, call):
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    number = 0
    while True:
        number += 1
        pool = server.pool(pool_size=1, max_waiting=0, min_idle=1)
        go_through(pool)
        kept = throw_at(number, call, pool)
        assert Caller(state.is_free, pool).result(), number
        if kept is None:
            break
    assert number > 3
