"""What diagnosis reads of a pool under its lock, and the facts that it makes of that.

Rule of this file: under the lock, values are copied and no more. Names, lines and ages
are found after it.

The pool is known by the protocols here alone; it imports this folder, not the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple, Protocol, cast

from ..options import PoolOptions
from ..scheduling.scheduler import Scheduler
from ..scheduling.tags import ALL
from ..scheduling.ticket import TagState, Ticket
from .callers import (
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
from .report import Diagnosis, Holding, Others

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
    #: The diagnosis without the holdings.
    figures: Diagnosis
    out: Sequence[Out]
    waiting: Collection[Caller | None]
    active: frozenset[str]
    others: Callable[[], Others]

    def diagnose(self, frames: Iterable[FrameType]) -> Diagnosis:
        """Return the facts, without the lock; `frames` are the waiting caller's."""
        holdings = [
            out.as_holding(self.now, self.caller, self.waiting, look_up=n < _LOOKED_UP)
            for n, out in enumerate(sorted(self.out, key=lambda out: out.since))
        ]
        others = self.others()
        return replace(
            self.figures,
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
    figures = Diagnosis(
        tag=tag_state.tag,
        waited=now - checkout.since,
        in_use=tag_state.in_use,
        ceiling=scheduler.ceiling(tag_state),
        waiting=tag_state.waiting,
        position=scheduler.place(cast(Ticket, checkout)),
        active_tags=len(active),
        pool_in_use=scheduler.in_use,
        capacity=pool.options.capacity,
        idle=pool.count_idle()[0],
        holders=tuple(sorted(holders, key=lambda holder: (-holder[1], holder[0]))),
        holdings=(),
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
