"""What diagnosis reads of a pool under its lock, and the facts that it makes of that.

Rule of this file: under the lock, values are copied and no more. Names, lines and ages
are found after it, and the classes of :mod:`.report` imported.

The pool is known by the protocols here alone; it imports this folder, not the reverse.
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from ..options import PoolOptions
from ..scheduling.scheduler import Scheduler
from ..scheduling.tags import ALL
from ..scheduling.ticket import WAITING, TagState, Ticket
from . import (
    Caller,
    Location,
    TaskHere,
    ThreadHere,
    describe_caller,
    describe_location,
    frames_of,
    has_ended,
    locations,
)

if TYPE_CHECKING:
    from .report import Diagnosis, Elsewhere, Holding

#: Holders whose present location in the code is looked up: that takes time, and a
#: message names no more.
_LOOKED_UP = 8


class Checkout(Protocol):
    """A checkout that waits, or that is out: a ticket of the scheduler, and its caller.

    Seconds are those of the pool's clock.
    """

    tag_state: TagState
    state: str
    #: Arrival number, while it waits.
    number: int
    #: Since when it waits, or is out.
    since: float
    #: The caller that asked for it, or has executed a statement on it since.
    holder: Caller | None
    #: When a statement was last executed.
    used: float
    #: Where it was checked out, innermost first; empty if that is not noted.
    stack: tuple[Location, ...]
    #: It was reported as out for too long.
    reported: bool
    #: It may be returned without the lock.
    may_keep: bool


class Out(NamedTuple):
    """A copy of a checkout that is out, and what the pool knows of its connection."""

    checkout: Checkout
    tag: str
    since: float
    used: float
    holder: Caller | None
    stack: tuple[Location, ...]
    #: It is being opened, the first one of the checkout or another one.
    opening: bool = False
    #: No caller has it, and none opens it: it is about to be handed out; or it was
    #: dropped, and is being reset before it comes back, as slowly as the database does.
    unclaimed: bool = False

    @classmethod
    def of(cls, checkout: Checkout, **state: bool) -> Out:
        """Copy a checkout. Caller is in a section."""
        tag, since, used = checkout.tag_state.tag, checkout.since, checkout.used
        return cls(checkout, tag, since, used, checkout.holder, checkout.stack, **state)

    def as_holding(
        self,
        now: float,
        asking: Caller | None = None,
        waiting: Collection[Caller | None] = (),
        *,
        look_up: bool = True,
    ) -> Holding:
        """Return the facts, without the lock; if `look_up`, where the holder is now.

        :param asking: the caller that has waited in vain.
        :param waiting: all callers that wait.
        """
        from .report import Holding

        own = self.holder is not None and self.holder is asking
        frames = frames_of(self.holder) if look_up and not own else []
        is_used = self.used >= self.since
        return Holding(
            tag=self.tag,
            age=max(now - self.since, 0.0),
            caller=describe_caller(self.holder),
            taken_at=describe_location(self.stack),
            now_at=describe_location(locations(frames)),
            statement_age=max(now - self.used, 0.0) if is_used else None,
            opening=self.opening,
            own=own,
            waits=self.holder is not None and self.holder in waiting,
            abandoned=has_ended(self.holder),
        )


class Others(NamedTuple):
    """What a ledger tells of other processes: the largest holders first."""

    holders: tuple[Elsewhere, ...] = ()
    active_tags: frozenset[str] = frozenset()

    @property
    def number(self) -> int:
        """Connections that none of this process can have now."""
        return sum(h.connections for h in self.holders if h.state != "unused")


class Pool(Protocol):
    """What is read of a pool. All is called in a section of its lock, but `run`."""

    @property
    def logger(self) -> Any: ...

    #: Calls a function in a section, with the time.
    @property
    def run(self) -> Callable[..., Any]: ...

    @property
    def options(self) -> PoolOptions: ...
    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def here(self) -> ThreadHere | TaskHere: ...

    #: Those that have a slot, and those that wait for one.
    def checkouts_out(self) -> Sequence[Out]: ...
    def checkouts_waiting(self) -> Sequence[Checkout]: ...

    #: The records in the pool, and how many of them are open.
    def count_idle(self) -> tuple[int, int]: ...

    #: What a ledger allots, and why it cannot be reached; None without. And what
    #: returns what it tells of others.
    def allotment(self) -> tuple[int | None, str | None, Callable[[], Others]]: ...


class Capture(NamedTuple):
    """The pool as it was when a checkout gave up waiting."""

    now: float
    caller: Caller | None
    #: Of the diagnosis, what is known under the lock.
    figures: dict[str, Any]
    out: Sequence[Out]
    waiting: Collection[Caller | None]
    active: frozenset[str]
    others: Callable[[], Others]

    def diagnose(self, frames: Iterable[FrameType]) -> Diagnosis:
        """Return the facts, without the lock; `frames` are the waiting caller's."""
        from .report import Diagnosis

        holdings = [
            out.as_holding(self.now, self.caller, self.waiting, look_up=n < _LOOKED_UP)
            for n, out in enumerate(sorted(self.out, key=lambda out: out.since))
        ]
        others = self.others()
        return Diagnosis(
            **self.figures,
            active_tags=len(self.active | others.active_tags),
            holdings=tuple(holdings),
            asked_at=describe_location(locations(frames), own=True),
            asked_by=describe_caller(self.caller),
            elsewhere=others.holders,
        )


def capture(pool: Pool, checkout: Checkout, now: float) -> Capture:
    """Copy what there is to know when a checkout gives up. Caller is in a section."""
    scheduler, tag_state = pool.scheduler, checkout.tag_state
    tag_states = scheduler.tags.tag_states.values()
    holders = [(other.tag, other.in_use) for other in tag_states if other.in_use]
    active = frozenset(other.tag for other in tag_states if other.active)
    allotted, trouble, others = pool.allotment()
    pause = scheduler.tags.paused(tag_state.tag)
    figures = dict[str, Any](
        tag=tag_state.tag,
        waited=now - checkout.since,
        in_use=tag_state.in_use,
        ceiling=scheduler.ceiling(tag_state),
        waiting=tag_state.waiting,
        position=scheduler.place(cast(Ticket, checkout)),
        pool_in_use=scheduler.in_use,
        capacity=pool.options.capacity,
        idle=pool.count_idle()[0],
        holders=tuple(sorted(holders, key=lambda holder: (-holder[1], holder[0]))),
        allotted=allotted,
        ledger_trouble=trouble,
        uncounted=tuple(tag for tag, _ in holders if tag not in active),
        weight=tag_state.weight,
        max=tag_state.limits.max,
        reserved=tag_state.limits.reserved,
        usage=scheduler.usage.seconds(tag_state, now),
        kept_free=scheduler.kept_free,
        paused_for=None if pause is None else now - pause.at,
        paused_by="" if pause is None else pause.by,
        paused_tag=ALL not in scheduler.tags.pauses,
    )
    waiting = {other.holder for other in pool.checkouts_waiting()}
    out = pool.checkouts_out()
    return Capture(now, checkout.holder, figures, out, waiting, active, others)


# -- does a caller wait for a connection that only itself could return? ----------------
#
# A checkout inside another checkout is served only if some other caller returns a
# connection. If every caller that could return one waits in the pool as well, none of
# them is ever served: that is a deadlock, and it lasts until the first time-out.
#
# The check is made as PostgreSQL makes its own: not when the wait begins, but when it
# has lasted for ``deadlock_timeout``, and again after each further one. Until then it
# costs nothing. It looks at the callers that hold connections (noted at each checkout
# and at each statement) and at those that wait, and at nothing else.
#
# A waiting caller *can go on* if a connection that would help it is held by a caller
# that does not wait, or that can go on. All others are stuck. Whatever is not certain
# counts as a caller that can go on: a slot that no caller has for a moment, a
# connection that is on its way back, a holder that is not known.


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
