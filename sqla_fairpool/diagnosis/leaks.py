"""Connections that are out for too long: which caller took them, and where.

With ``leak_threshold`` only. Each checkout notes its stack then, and a daemon thread
looks at what is out, because a pool may never be called again once all its connections
have leaked. Nothing is ever taken away.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from ..background import start_thread
from .callers import describe_stack
from .capture import Checkout, Out, Pool
from .report import duration

__all__ = ["LeakWatch"]

#: Looks within one threshold, and the longest time between two. A look costs some
#: microseconds; a leak is reported that much late at most.
_LOOKS = 4
_LONGEST_PAUSE = 1.0


class LeakWatch:
    """Reports what is out for `threshold` seconds, once for each checkout."""

    def __init__(self, pool: Pool, threshold: float) -> None:
        self._pool = weakref.ref(pool)
        self._threshold = threshold
        # The thread: the first that is entered is it. An interrupt in the middle of
        # starting one leaves no entry.
        self._runner: dict[str, threading.Thread] = {}

    def start(self) -> None:
        """Have a thread look from now on, if there is none yet."""
        if not self._runner:
            pause = min(self._threshold / _LOOKS, _LONGEST_PAUSE)
            watch = partial(_watch, weakref.ref(self), pause)
            start_thread(watch, "sqla_fairpool leak_threshold")

    def is_runner(self) -> bool:
        """Tell if this thread is the one that looks; no other does."""
        this = threading.current_thread()
        return self._runner.setdefault("runner", this) is this

    def look(self) -> None:
        """Report what is out for too long and was not reported yet."""
        pool = self._pool()
        if pool is None:
            return
        for out, now in pool.run(self._late, pool):
            holding = out.as_holding(now)
            pool.logger.warning(
                "Connection out for %s, longer than leak_threshold %s: %s%s",
                duration(holding.age),
                duration(self._threshold),
                holding,
                describe_stack(out.stack),
            )

    def _late(self, pool: Pool, now: float) -> list[tuple[Out, float]]:
        late = []
        for out in pool.checkouts_out():
            if now - out.since >= self._threshold and not out.checkout.reported:
                out.checkout.reported = True
                out.checkout.may_keep = False  # its return is to be noticed
                late.append((out, now))
        return late

    def returned(self, checkout: Checkout, now: float) -> Callable[[], None]:
        """Return what logs that a reported connection has come back."""
        pool = self._pool()
        assert pool is not None
        checkout.reported = False
        return partial(_log_return, pool.logger, Out.of(checkout), now)


def _log_return(logger: Any, out: Out, now: float) -> None:
    holding = out.as_holding(now, look_up=False)
    logger.warning("Connection back that was out for too long: %s", holding)


def _watch(ref: weakref.ref[LeakWatch], pause: float) -> None:
    never = threading.Event()
    while (watch := ref()) is not None and watch.is_runner():
        watch.look()
        del watch
        never.wait(pause)
