"""Connections that are out for too long: who took them, and where.

With ``leak_threshold`` only. Each checkout notes its stack then, and a daemon thread
looks at what is out: the pool may be waiting for nobody when its last user has gone
astray. Nothing is ever taken away.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from .callers import describe_stack
from .capture import Copy, as_holding, copy_checkout
from .report import duration

if TYPE_CHECKING:
    from ..pool.checkout import Checkout
    from ..pool.core import PoolCore

__all__ = ["LeakWatch"]

#: Looks within one threshold, and the longest time between two. A look costs some
#: microseconds; a leak is reported that much late at most.
_LOOKS = 4
_LONGEST_PAUSE = 1.0


class LeakWatch:
    """Reports what is out for `threshold` seconds, once for each checkout."""

    def __init__(self, core: PoolCore, threshold: float) -> None:
        self._core = weakref.ref(core)
        self._threshold = threshold
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Have a thread look from now on, if there is none yet."""
        if self._thread is not None:
            return
        pause = min(self._threshold / _LOOKS, _LONGEST_PAUSE)
        thread = threading.Thread(
            target=_watch,
            args=(weakref.ref(self), pause),
            name="sqla_fairpool leak_threshold",
            daemon=True,
        )
        # Two of them, if two callers come at once, report no leak twice.
        self._thread = thread
        thread.start()

    def look(self) -> None:
        """Report what is out for too long and was not reported yet."""
        core = self._core()
        if core is None:
            return
        with core.lock.section() as now:
            late = [
                checkout
                for checkout in core.connections.out()
                if now - checkout.since >= self._threshold and not checkout.reported
            ]
            for checkout in late:
                checkout.reported = True
                checkout.may_keep = False  # its return is to be noticed
            copies = [copy_checkout(core.state, checkout) for checkout in late]
        for copy in copies:
            holding = as_holding(copy, now)
            core.logger.warning(
                "Connection out for %s, longer than leak_threshold %s: %s%s",
                duration(holding.age),
                duration(self._threshold),
                holding,
                describe_stack(copy.stack),
            )

    def returned(self, checkout: Checkout, now: float) -> Callable[[], None]:
        """Return what logs that a reported connection has come back."""
        core = self._core()
        assert core is not None
        copy = copy_checkout(core.state, checkout)
        checkout.reported = False
        return partial(_log_return, core.logger, copy, now)


def _log_return(logger: Any, copy: Copy, now: float) -> None:
    logger.warning(
        "Connection back that was out for too long: %s",
        as_holding(copy, now, look_up=False),
    )


def _watch(ref: weakref.ref[LeakWatch], pause: float) -> None:
    never = threading.Event()
    while True:
        never.wait(pause)
        watch = ref()
        if watch is None:
            return
        watch.look()
        del watch
