"""A member's part of a transaction: post, give back or take, see who is to be told.

Part of the book, see :mod:`.book`: pure, in one transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from .allocation import Allocation, Line
from .book import Book
from .local import State, TagDemand
from .rows import DUE, TURN, Gone, Member, Session, in_order, member_key, read, words

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
    #: The sessions that the row says are ours.
    sessions: frozenset[Session]
    #: Of the lost ones those that are in quarantine.
    buried: tuple[Session | None, ...]
    #: As many slots are owned as connections are open.
    covered: bool
    #: The members, while there may be others that are in no row; or else None.
    fresh: frozenset[str] | None
    #: Why we cannot ask the server, as the row says.
    unasked: str | None
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
    why = read(DUE, rows.get(DUE), words).get(member)
    # Being asked to yield is not to be answered before the turn is over.
    return why is not None and not (why == TURN == orders.due)


def settle(
    book: Book,
    key: str,
    state: State,
    demand: Mapping[str, TagDemand],
    allotted: int,
    *,
    ready: Collection[str] = (),
    keep: bool = False,
    sign: bool = False,
    unasked: str | None = None,
) -> Orders:
    """Post what a member wants, give back or take, and see who is to be told.

    :param state: what its pool has.
    :param demand: what is to be posted.
    :param allotted: what its pool may open until it is told anew. It does not give back
      below that now, nor below what is open.
    :param ready: tags under which it would yield if it is asked.
    :param keep: it does not need more than it has and what it claims.
    :param sign: write the row though nothing has changed: it answers.
    :param unasked: why it could not ask the server.
    """
    before = book.members[key]
    sessions = in_order(state.sessions)
    book.members[key] = replace(
        before, stalled=False, sessions=sessions, unasked=unasked
    )
    buried = _cover(book, key, state)
    member = _post(book, key, book.members[key], demand)
    # Of the lost ones, those are not open any more for which a slot is kept.
    open_ = state.open - len(buried)
    floor = max(allotted - len(buried), open_)
    plan = book.allocation()
    turns = {tag for tag in ready if (tag, key) in plan.asked}
    if turns:
        member = _yield(book, key, member, turns, plan)
        plan = book.allocation()
    target = plan.targets[key]
    if keep:
        target = max(min(target, floor), plan.claimed[key])
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
    orders = _orders(book, key, member, target, plan)
    return replace(orders, buried=tuple(buried), covered=member.owned >= open_)


def _cover(book: Book, key: str, state: State) -> list[Session | None]:
    """Have a slot for each connection, as far as there are slots.

    Those of lost connections go into quarantine; return these.
    """
    kept = len(book.in_quarantine.intersection(state.lost))
    member = book.members[key]
    if member.owned < state.open - kept:
        # Its slots were taken from it though it lives (it was taken for dead, or
        # the ledger was reset). What is open comes before what anybody wants.
        more = min(state.open - kept - member.owned, book.left)
        book.members[key] = replace(member, owned=member.owned + more)
    return book.quarantine(key, state.lost)


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
        sessions=frozenset(member.sessions),
        buried=(),
        covered=False,
        fresh=frozenset(book.members) if book.is_fresh else None,
        unasked=member.unasked,
        due=book.due.get(key),
        bells=tuple(bell for bell in bells if bell != key),
        text=book.texts[key],
    )
