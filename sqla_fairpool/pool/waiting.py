"""How a checkout waits for its slot: until it is granted, timed out or refused."""

from __future__ import annotations

import math

from ..diagnosis.capture import Capture, capture
from ..diagnosis.deadlock import collect, holds_another, is_stuck
from ..errors import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from ..tagging import context_timeout
from .checkout import Checkout
from .housekeeping import Housekeeping
from .reconnects import Reconnects
from .transitions import Transitions
from .waiters import Waiter

__all__ = ["Waiting"]


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
