"""How a checkout waits: for its slot, and for a server that is to come back.

After a disconnect one caller of the pool tries to connect at a time, and between two
failures there is a pause that grows: a server that starts, or a standby that is
promoted, must not be met by every caller of every process at once.

Rules of the reconnecting:

* While no disconnect is known, it does nothing: one comparison for each opening.
* A caller whose own attempt fails gets that error. One whose time ends before its turn
  gets the last error of the server, not a time-out of the pool.
* A caller is in the line for as long as its :class:`_Turn` lives, so that one that was
  interrupted keeps no other caller waiting.
"""

from __future__ import annotations

import copy
import math
import random
import weakref
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import exc

from ..diagnosis.capture import Capture, capture, collect, holds_another, is_stuck
from ..errors import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from ..tagging import context_timeout
from .checkout import Checkout
from .housekeeping import Housekeeping
from .transitions import Transitions
from .waiters import Waiter

_T = TypeVar("_T")

#: Seconds of the first pause, about; each further one is twice as long.
_FIRST_PAUSE = 0.1

#: Seconds after which a caller in the line looks if those before it have gone without
#: a word: a thread that was interrupted twice.
_LOOK_AGAIN = 1.0


class Waiting:
    """Waits on behalf of callers."""

    def __init__(
        self,
        state: Transitions,
        housekeeping: Housekeeping,
        waiter_class: type[Waiter],
    ) -> None:
        self._state = state
        self._housekeeping = housekeeping
        #: How callers sleep.
        self.waiter_class = waiter_class
        self.reconnects = Reconnects(state, waiter_class)

    def join_line(self, checkout: Checkout, tag: str, now: float) -> None:
        """Prepare a checkout that has to wait. Caller is in a section."""
        state, scheduler = self._state, self._state.scheduler
        checkout.spent = True  # its waiter may be woken late, and give it up
        checkout.waiter = self.waiter_class(checkout)
        if state.watcher is None:
            state.watcher = checkout
        state.slots.wanted(tag)
        if (
            state.slots.sees_all_callers
            and not state.event_log.exhausted
            and scheduler.in_use >= scheduler.capacity  # else it waits for its own tag
        ):
            tag_states = scheduler.tag_states.values()
            holders = [(a.tag, a.in_use) for a in tag_states if a.in_use]
            state.event_log.begin(tag, now, scheduler.capacity, holders)
            self._housekeeping.plan_visit()

    def too_many(self, tag: str) -> TooManyWaiting:
        """Return what is raised for a caller that may not even wait; count it."""
        scheduler, options = self._state.scheduler, self._state.options
        with self._state.lock.mutex:
            scheduler.tags.counters.of(tag).refusals += 1
        return TooManyWaiting(
            f"too many waiting: tag {tag!r} refused, waiting={scheduler.waiting} "
            f"max_waiting={options.max_waiting}; "
            f"pool in_use={scheduler.in_use}/{options.capacity}",
            tag,
        )

    def wait(
        self, checkout: Checkout, waiter: Waiter, since: float, timeout: float | None
    ) -> None:
        """Return when the checkout is granted; raise if it is not in time, or never.

        :param timeout: seconds, None for what the context or the options say.
        """
        state = self._state
        if timeout is None:
            timeout = context_timeout()
        if timeout is None:
            timeout = state.options.timeout
        deadline = math.inf if timeout is None else since + timeout
        interval = state.options.deadlock_timeout
        if interval is None or not state.slots.sees_all_callers:
            interval = math.inf
        check, now = since + interval, since
        while not _is_granted(checkout):
            until = min(deadline, check)
            if state.watcher is checkout:
                until = min(until, self._housekeeping.next_duty)
            waiter.wait(None if until == math.inf else until - now)
            if checkout.waiter is None:
                return
            # It may be granted at this moment: who is waking others has no lock. What
            # follows waits for that, and is seen before it sleeps again.
            if state.slots.refusal is not None:
                raise state.slots.refusal
            now, captured = state.lock.run(self._look, checkout, deadline)
            if captured is not None:
                self.reconnects.raise_if_down()
                raise self._error(CheckoutTimeout, "timed out after {:.2f}s", captured)
            if now < check:
                continue
            check = now + interval
            stuck = state.lock.run(self._is_stuck, checkout, deadline)
            if stuck is None:
                check = math.inf  # it holds nothing, and will not while it waits
            elif stuck and collect():  # else another thread collects at this moment
                captured = state.lock.run(self._refuse_stuck, checkout, deadline)
                if captured is not None:
                    raise self._error(SelfDeadlock, "would wait for itself", captured)

    def _look(
        self, checkout: Checkout, deadline: float, now: float
    ) -> tuple[float, Capture | None]:
        """Look around; return the time, and how things are if the time is over."""
        self._housekeeping.look_around(now)
        if now < deadline or checkout.waiter is None:
            return now, None
        captured = capture(self._state, checkout, now)
        self._state.scheduler.expire(checkout)
        self._state.leave_line(checkout)
        return now, captured

    def _is_stuck(self, checkout: Checkout, deadline: float, now: float) -> bool | None:
        """Tell if only callers that wait likewise could serve it; None: it never is."""
        if self._state.scheduler.tags.paused(checkout.tag_state.tag) is not None:
            return False  # it may be served when that is resumed
        if not holds_another(self._state, checkout):
            return None
        return is_stuck(self._state, checkout, deadline)

    def _refuse_stuck(
        self, checkout: Checkout, deadline: float, now: float
    ) -> Capture | None:
        """Have it leave its line if it is stuck, and return how things are.

        In the section that finds it stuck: of two that wait for each other, one is.
        """
        if not is_stuck(self._state, checkout, deadline):
            return None
        captured = capture(self._state, checkout, now)
        self._state.scheduler.cancel(checkout)
        self._state.leave_line(checkout)
        checkout.tag_state.counters.deadlocks += 1
        return captured

    def _error(
        self, error: type[CheckoutTimeout], what: str, captured: Capture
    ) -> CheckoutTimeout:
        diagnosis = captured.diagnose(self._state.here.frames())
        return error(
            f"checkout {what.format(diagnosis.waited)}: {diagnosis}; "
            f"advice: {diagnosis.advice}",
            diagnosis.tag,
            diagnosis.waited,
            diagnosis,
        )


def _is_granted(checkout: Checkout) -> bool:
    return checkout.waiter is None


class _Turn:
    """The place of a caller in the line; the first one may try."""

    __slots__ = ("__weakref__", "waiter")

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter


class Reconnects:
    """Paces the opening of a pool's connections from a disconnect to the next success.

    :param waiter_class: how callers sleep.
    """

    def __init__(self, state: Transitions, waiter_class: type[Waiter]) -> None:
        self._state = state
        self._waiter_class = waiter_class
        #: The last error of the server since the disconnect; None: nothing is paced.
        self.error: BaseException | None = None
        #: Failed attempts since then, and when the next one may be.
        self.failures = 0
        self.next_attempt = -math.inf
        self._line: list[weakref.ref[_Turn]] = []

    def lost(self, error: BaseException) -> None:
        """Note that a connection turned out to be of no use. From any thread."""
        with self._state.lock.mutex:
            if self.error is None:
                self.failures, self.next_attempt = 0, -math.inf
            self.error = _without_traceback(error)

    def raise_if_down(self) -> None:
        """Raise the server's error if connecting has failed since the disconnect.

        For a caller whose time has ended while it waited for a slot.
        """
        with self._state.lock.mutex:
            error = self.error if self.failures else None
        if error is not None:
            raise _without_traceback(error)

    def paced(self, attempt: Callable[[], _T], checkout: Checkout | None) -> _T:
        """Call what opens a connection, in its turn.

        :param checkout: the one for which it is, None without.
        """
        if self.error is None or not self._can_wait():
            return attempt()
        turn = _Turn(self._waiter_class(None))
        try:
            self._wait(turn, self._deadline(checkout))
            return self._try(attempt)
        finally:
            self._leave(turn)

    def _try(self, attempt: Callable[[], _T]) -> _T:
        try:
            opened = attempt()
        except exc.SQLAlchemyError:
            raise  # not the server's
        except Exception as error:
            self._failed(error)
            raise
        with self._state.lock.mutex:
            self.error = None
        return opened

    def _can_wait(self) -> bool:
        return self._waiter_class.can_wait() and not self._state.lock.in_section()

    def _deadline(self, checkout: Checkout | None) -> float:
        """Return when the time of a caller is over."""
        since, timeout = self._state.lock.clock(), None
        if checkout is not None and checkout.asked is not None and not checkout.again:
            since, timeout = checkout.asked
        if timeout is None:
            timeout = context_timeout()
        if timeout is None:
            timeout = self._state.options.timeout
        return math.inf if timeout is None else since + timeout

    def _wait(self, turn: _Turn, deadline: float) -> None:
        """Return when a caller may try; raise the server's error if it is too late."""
        lock = self._state.lock
        with lock.mutex:
            self._line.append(weakref.ref(turn))
        while (seconds := self._seconds_until(turn)) > 0:
            left = deadline - lock.clock()
            if left <= 0 and self.error is not None:
                raise _without_traceback(self.error)
            turn.waiter.wait(min(seconds, left))

    def _seconds_until(self, turn: _Turn) -> float:
        """Return how long a caller has to wait as things are, 0 to go on."""
        with self._state.lock.mutex:
            if self.error is None:
                return 0.0
            while (first := self._line[0]()) is None:
                del self._line[0]
            if first is not turn:
                return _LOOK_AGAIN
            return self.next_attempt - self._state.lock.clock()

    def in_line(self) -> list[_Turn]:
        """Return the places of callers that wait or try, the one that tries first."""
        return [turn for one in self._line if (turn := one()) is not None]

    def _leave(self, turn: _Turn) -> None:
        with self._state.lock.mutex:
            others = [one for one in self.in_line() if one is not turn]
            self._line = [weakref.ref(one) for one in others]
        for other in others:
            other.waiter.wake()

    def _failed(self, error: BaseException) -> None:
        most = self._state.options.reconnect_backoff
        with self._state.lock.mutex:
            if self.error is None:
                return
            self.error = _without_traceback(error)
            pause = min(most, _FIRST_PAUSE * 2.0 ** min(self.failures, 30))
            self.failures += 1
            pause *= random.uniform(0.5, 1.0)
            self.next_attempt = self._state.lock.clock() + pause


def _without_traceback(error: BaseException) -> BaseException:
    """Return a copy: in the frames of a traceback are connections."""
    try:
        return copy.copy(error)
    except Exception:  # its constructor wants something else than its `args`
        bare = type(error).__new__(type(error), *error.args)
        bare.__dict__.update(error.__dict__)
        return bare
