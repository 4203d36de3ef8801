"""From the pool's live state to the facts of :mod:`.diagnosis`.

What is read under the lock is copied and no more; names, lines and ages are found
after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING

from .callers import (
    Caller,
    Place,
    describe_caller,
    describe_place,
    frames_of,
    has_ended,
    places,
    users_place,
)
from .report import Diagnosis, Holding

if TYPE_CHECKING:
    from ..pool.checkout import Checkout
    from ..pool.transitions import Transitions

__all__ = ["Copy", "Scene", "as_holding", "copy_checkout", "copy_scene"]

#: Holders whose present place in the code is looked up: it is not free, and a
#: message names no more.
_LOOKED_UP = 8


@dataclass(frozen=True, slots=True)
class Copy:
    """What a seat that is out said under the lock."""

    tag: str
    since: float
    used: float
    holder: Caller | None
    stack: tuple[Place, ...]
    opening: bool
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """The pool, as it was when a waiting seat gave up."""

    now: float
    waited: float
    caller: Caller | None
    account: tuple[str, int, int, int, int]
    pool: tuple[int, int, int, int]
    holders: list[tuple[str, int]]
    copies: list[Copy]
    ledger: tuple[int | None, str | None]

    def diagnose(self, frames: Iterable[FrameType]) -> Diagnosis:
        """Return it as facts, for whoever reads the error. Without the lock.

        :param frames: those of the caller who waited.
        """
        tag, in_use, ceiling, waiting, place = self.account
        active, pool_in_use, capacity, idle = self.pool
        copies = sorted(self.copies, key=lambda copy: copy.since)
        return Diagnosis(
            tag=tag,
            waited=self.waited,
            in_use=in_use,
            ceiling=ceiling,
            waiting=waiting,
            place=place,
            active_tags=active,
            pool_in_use=pool_in_use,
            capacity=capacity,
            idle=idle,
            holders=tuple(sorted(self.holders, key=lambda h: (-h[1], h[0]))),
            holdings=tuple(
                as_holding(copy, self.now, self.caller, look_up=n < _LOOKED_UP)
                for n, copy in enumerate(copies)
            ),
            asked_at=describe_place(users_place(places(frames))),
            allotted=self.ledger[0],
            ledger_trouble=self.ledger[1],
        )


def copy_scene(state: Transitions, checkout: Checkout, now: float) -> Scene:
    """Copy what there is to know when a waiting seat gives up.

    Caller is in a section.
    """
    scheduler, account = state.scheduler, checkout.account
    return Scene(
        now=now,
        waited=now - checkout.since,
        caller=checkout.holder,
        account=(
            account.tag,
            account.in_use,
            scheduler.ceiling(account),
            account.waiting,
            scheduler.place(checkout),
        ),
        pool=(
            scheduler.roster.active,
            scheduler.in_use,
            state.options.capacity,
            len(state.connections.idle),
        ),
        holders=[
            (a.tag, a.in_use) for a in scheduler.roster.accounts.values() if a.in_use
        ],
        copies=_copies(state),
        ledger=state.slots.describe(),
    )


def _copies(state: Transitions) -> list[Copy]:
    out = state.connections.out()
    # A record without a connection is out while another one is opened for it.
    hollow = {
        id(r.fair.checkout)
        for r in state.connections.records_of(out)
        if r.dbapi_connection is None
    }
    waiting = {checkout.holder for checkout in state.waiting()} - {None}
    return [
        replace(
            copy,
            opening=copy.opening or id(checkout) in hollow,
            waits=checkout.holder in waiting,
        )
        for checkout, copy in [
            (checkout, copy_checkout(state, checkout)) for checkout in out
        ]
    ]


def copy_checkout(state: Transitions, checkout: Checkout) -> Copy:
    """Copy what a seat that is out says. Caller is in a section."""
    return Copy(
        tag=checkout.account.tag,
        since=checkout.since,
        used=checkout.used,
        holder=checkout.holder,
        stack=checkout.stack,
        opening=checkout in state.connections.opening,
    )


def as_holding(
    copy: Copy, now: float, asking: Caller | None = None, *, look_up: bool = True
) -> Holding:
    """Return the facts of a checkout.

    :param asking: the caller who waits.
    :param look_up: find out where its holder is now.
    """
    own = copy.holder is not None and copy.holder is asking
    current: Sequence[Place] = ()
    if look_up and not own:
        current = places(frames_of(copy.holder))
    return Holding(
        tag=copy.tag,
        age=max(now - copy.since, 0.0),
        caller=describe_caller(copy.holder),
        taken_at=describe_place(users_place(copy.stack)),
        now_at=describe_place(users_place(current)),
        statement_age=max(now - copy.used, 0.0) if copy.used >= copy.since else None,
        opening=copy.opening,
        own=own,
        waits=copy.waits,
        abandoned=has_ended(copy.holder),
    )
