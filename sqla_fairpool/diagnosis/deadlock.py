"""Does a caller wait for a connection that only itself could return?

A checkout inside another checkout is served only if some other caller returns a
connection. If every caller that could return one waits in the pool as well, none of
them is ever served: that is a deadlock, and it lasts until the first time-out.

The check is made as PostgreSQL makes its own: not when the wait begins, but when it
has lasted for ``deadlock_timeout``, and again after each further one. Until then it
costs nothing. It looks at the callers that hold connections (noted at each checkout and
at each statement) and at those that wait, and at nothing else.

A waiting caller *can go on* if a connection that would help it is held by a caller
that does not wait, or that can go on. All others are stuck. Whatever is not certain
counts as a caller that can go on: a slot that no caller has for a moment, a connection
that is on its way back, a holder that is not known.
"""

from __future__ import annotations

import gc
import math
import threading

from ..scheduling.scheduler import Scheduler
from ..scheduling.ticket import WAITING, TagState
from .callers import TaskHere
from .capture import Checkout, Pool


def holds_another(pool: Pool, checkout: Checkout) -> bool:
    """Tell if the caller of a waiting checkout holds a connection. O(connections).

    Nearly every caller that waits holds none, and needs no other check. Caller is in
    a section.
    """
    # Not where greenlets were made to stand for threads (gevent's and eventlet's
    # monkey-patching) after the import of this package: all have the same reference.
    tells_callers_apart = isinstance(pool.here, (TaskHere, threading.local))
    caller = checkout.holder
    return (
        caller is not None
        and tells_callers_apart
        and any(out.holder is caller for out in pool.checkouts_out())
    )


def is_stuck(pool: Pool, checkout: Checkout, deadline: float) -> bool:
    """Tell if only callers that wait likewise could serve a waiting checkout.

    Caller is in a section.

    :param deadline: until when it would wait.
    """
    scheduler = pool.scheduler
    if checkout.state is not WAITING or scheduler.capacity != pool.options.capacity:
        return False  # granted; or a slot is out of use for a moment
    out = pool.checkouts_out()
    if len(out) < scheduler.in_use or any(other.unclaimed for other in out):
        return False  # a slot is with no caller, or a connection on its way
    if not any(other.holder is checkout.holder for other in out):
        return False
    if _may_rise(scheduler, checkout.tag_state, deadline):
        return False
    # One for each caller, the newest: a signal handler may wait during a wait.
    waiting = sorted(pool.checkouts_waiting(), key=lambda other: other.number)
    stuck = {other.holder: other for other in waiting if other.holder is not None}

    def can_go_on(waiting: Checkout) -> bool:
        tag, state = waiting.tag_state.tag, waiting.tag_state
        own_only = state.in_use >= scheduler.ceiling(state)  # others' would not help
        helpful = [o for o in out if o.tag == tag] if own_only else out
        return any(other.holder not in stuck for other in helpful)

    while able := [caller for caller, own in stuck.items() if can_go_on(own)]:
        for caller in able:
            del stuck[caller]
    return checkout.holder in stuck


def collect() -> bool:
    """Run the collector; tell if it ran to its end. Not to be called in a section.

    Connections that were dropped in a reference cycle are out until then. While
    another thread runs a collection, and perhaps waits in it for the database's answer
    to the rollback of such a connection, ``gc.collect()`` returns at once and has
    found nothing. So it is given something to find.
    """
    cycle: list[object] = []
    cycle.append(cycle)
    del cycle
    return gc.collect() > 0


def _may_rise(scheduler: Scheduler, tag_state: TagState, deadline: float) -> bool:
    """Tell if the tag's ceiling may rise in time: others may become idle."""
    tags = scheduler.tags
    if tags.active < 2 or tag_state.in_use >= tags.max_limit:
        return False
    if scheduler.in_use >= scheduler.capacity:
        return False  # it would not help
    others = [a for a in tags.tag_states.values() if a.active and a is not tag_state]
    if any(other.waiters for other in others):
        return False  # stays active
    last = max((a.last_activity or -math.inf for a in others), default=-math.inf)
    return last + tags.idle_timeout <= deadline
