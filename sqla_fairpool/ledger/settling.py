"""A member's part of a transaction: post, give back or take, see who is to be told.

Part of the book, see :mod:`.book`: pure, in one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from .allocation import Allocation, Line
from .book import Book
from .local import TagDemand
from .rows import DUE, TURN, Gone, Member, member_key

__all__ = ["Orders", "has_news", "settle"]


@dataclass(frozen=True, slots=True)
class Orders:
    """What a member learns from a transaction."""

    number: int
    owned: int
    target: int
    #: By tag: what it posted, what it got of that, what is the most for its pool.
    lines: Mapping[str, Line]
    claims: Mapping[str, int]
    ceilings: Mapping[str, int]
    #: Ceiling of any other tag.
    other: int
    #: Slots wanted by anybody that there are not.
    unmet: int
    #: Others go short: what is not used is to be given up.
    pressed: bool
    #: Tags under which it is asked to yield.
    asked: frozenset[str]
    #: How many are asked to yield, of all members.
    turns: int
    #: Members that go short.
    hungry: int
    members: int
    free: int
    gone: Mapping[int, Gone]
    #: Why it is expected to look again, if it is.
    due: str | None
    #: Whom to ring.
    bells: tuple[str, ...]
    #: The row, to see if anybody has changed it.
    text: str


def has_news(rows: Mapping[str, str], member: str, orders: Orders) -> bool:
    """Tell if a member has to look, at the price of two rows.

    :param orders: what it knows.
    """
    if rows.get(member_key(member)) != orders.text:
        return True
    why = json.loads(rows.get(DUE, "{}")).get(member)
    # Being asked to yield is not to be answered before the turn is over.
    return why is not None and not (why == TURN == orders.due)


def settle(
    book: Book,
    key: str,
    demand: Mapping[str, TagDemand],
    open_: int,
    floor: int,
    *,
    ready: Collection[str] = (),
    keep: int | None = None,
    sign: bool = False,
) -> Orders:
    """Post what a member wants, give back or take, and see who is to be told.

    :param open_: connections that it has open.
    :param floor: what its pool may open, or has open, until it is told anew: not
      below that it gives back now.
    :param ready: tags under which it would yield if it is asked.
    :param keep: it does not need more than that and what it claims.
    :param sign: write the row though nothing has changed: it answers.
    """
    before = book.members[key]
    member = replace(before, stalled=False)
    if member.owned < open_:
        # Its slots were taken from it though it lives (it was taken for dead, or
        # the ledger was reset). What is open comes before what anybody wants.
        more = min(open_ - member.owned, book.free)
        member = replace(member, owned=member.owned + more)
    member = _post(book, key, member, demand)
    plan = book.allocation()
    turns = {tag for tag in ready if (tag, key) in plan.asked}
    if turns:
        member = _yield(book, key, member, turns, plan)
        plan = book.allocation()
    target = plan.targets[key]
    if keep is not None:
        target = max(min(target, keep), plan.claimed[key])
        plan.targets[key] = target
    if member.owned > target:
        given = min(member.owned, max(target, floor))
        book.members[key] = member = replace(member, owned=given)
    elif taken := book.grants(plan).get(key, 0):
        member = replace(member, owned=member.owned + taken)
    pressed = plan.presses(key, member.lines)
    lines = {
        tag: line._replace(limit=plan.limits[tag, key])
        for tag, line in member.lines.items()
    }
    member = replace(member, pressed=pressed, lines=lines)
    if member != before or sign:
        member = replace(member, beat=member.beat + 1)
    book.write(key, member)
    return _orders(book, key, member, target, plan)


def _post(
    book: Book, key: str, member: Member, demand: Mapping[str, TagDemand]
) -> Member:
    """Write down what is wanted, with places for what was not wanted before."""
    lines = {}
    for tag, (in_use, waiting, active) in demand.items():
        if not (in_use or waiting or active):
            continue
        line = member.lines.get(tag, Line())
        place = line.place
        if not in_use + waiting:
            place = 0
        elif not place:
            place = book.next_place()
        if tag not in book.places:
            book.places[tag] = book.next_place()
        lines[tag] = Line(in_use, waiting, active, place, line.limit)
    member = replace(member, lines=lines)
    book.members[key] = member
    return member


def _yield(
    book: Book, key: str, member: Member, turns: Collection[str], plan: Allocation
) -> Member:
    """Go to the end of these tags' lines."""
    lines = dict(member.lines)
    for tag in sorted(turns):
        lines[tag] = lines[tag]._replace(place=book.next_place())
        if tag in plan.asked_tags:
            book.places[tag] = book.next_place()
    member = replace(member, lines=lines)
    book.members[key] = member
    return member


def _orders(
    book: Book, key: str, member: Member, target: int, plan: Allocation
) -> Orders:
    bells = book.tell(plan)
    ceilings = {
        tag: max(1, ceiling - plan.shares[tag])
        for tag, ceiling in plan.ceilings.items()
    }
    ceilings |= {tag: line.limit for tag, line in member.lines.items()}
    return Orders(
        number=member.number,
        owned=member.owned,
        target=target,
        lines=member.lines,
        claims={tag: plan.claims.get((tag, key), 0) for tag in member.lines},
        ceilings=ceilings,
        other=plan.newcomer,
        unmet=plan.unmet,
        pressed=member.pressed,
        asked=frozenset(tag for tag, asked in plan.asked if asked == key),
        turns=len(plan.asked),
        hungry=len(set().union(*plan.hungry.values())) if plan.hungry else 0,
        members=len(book.members),
        free=book.free,
        gone=dict(book.gone),
        due=book.due.get(key),
        bells=tuple(bell for bell in bells if bell != key),
        text=book.texts[key],
    )
