"""A member's part of a transaction: post, give back or take, say which others are due.

Part of the book, see :mod:`.book`: pure, in one transaction; but for :class:`Rows`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .allocation import TURN, Allocation
from .book import Book
from .demand import Allotment, State, TagBounds
from .rows import (
    DUE,
    Member,
    Session,
    TagDemand,
    in_order,
    limits_of_tags,
    member_key,
    parse_member,
    read,
)
from .store import Store, changes
from .watch import Findings

#: Places by which a tag of weight 1 goes back after a turn, and the most for any.
_TURN, _FAR = 1000, 1e9


class Rows:
    """The rows of a store as they were last read or written, and how often that was."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Nobody changes them any more.
        self.known: Mapping[str, str] = {}
        self.transactions = 0

    def read(self) -> Mapping[str, str]:
        self.transactions += 1
        self.known = self._store.read()
        return self.known

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[Book]:
        """Change the book, for this process alone; those that are to look are rung."""
        self.transactions += 1
        bells: list[str] = []
        with self._store.transaction(bells, durable=durable) as rows:
            yield (book := Book(rows))
            bells += (bell for bell in book.bells if bell != self._store.member)
        self.known = rows

    def swap(self, before: str, row: Member) -> bool:
        """Write our row if it stands there as it was; return if it did."""
        self.transactions += 1
        return self._store.swap(member_key(self._store.member), before, row.text)

    def swap_alone(self, rows: Mapping[str, str], row: Member) -> bool:
        """Have these rows if ours is the only new one, and the store has that as known.

        One message to the store, where others would wait for two. What the member owns
        is changed in transactions only, in which nobody else can own more.
        """
        key, known = member_key(self._store.member), self.known
        before = parse_member(self._store.member, known[key])
        is_alone = changes(known, rows) in (([], []), ([], [(key, rows[key])]))
        if not is_alone or row.owned != before.owned:
            return False
        if rows[key] != known[key] and not self.swap(known[key], row):
            return False
        self.known = rows
        return True


def has_news(rows: Mapping[str, str], member: str, allotment: Allotment) -> bool:
    if rows.get(member_key(member)) != allotment.row.text:
        return True
    why = read(DUE, rows.get(DUE), dict[str, str]).get(member)
    # Being asked to yield is not to be answered before the turn is over.
    return why is not None and not (why == TURN == allotment.due)


def renew(
    book: Book,
    key: str,
    state: State,
    demand: Mapping[str, TagDemand],
    allowed: int,
    confirmed: Collection[str] | None,
    findings: Findings | None,
    **options: Any,
) -> Allotment | None:
    """:func:`settle` for one that is a member; None if it is none any more.

    :param confirmed: the members of fresh rows, if no other process lives here.
    :param findings: what it has seen of others.
    """
    if findings is not None:
        findings.apply(book)
    if confirmed is not None:
        book.confirm(confirmed)
    if key in book.members and not book.note_server(key, state.server):
        # As a newcomer, it may be refused. What it had open at the other server is in
        # its row.
        there = book.members[key].sessions
        book.leave(key, len(there), there)
    if key in book.members:
        return settle(book, key, state, demand, allowed, keep=True, **options)
    book.tell()
    return None


def settle(
    book: Book,
    key: str,
    state: State,
    demand: Mapping[str, TagDemand],
    allowed: int,
    *,
    ready: Collection[str] = (),
    keep: bool = False,
    sign: bool = False,
    unasked: str | None = None,
) -> Allotment:
    """Post what a member wants, give back or take, and see which others are to be told.

    :param state: what its pool has; `demand` is what is to be posted.
    :param allowed: what its pool may open until it is told anew. It does not give back
      below that now, nor below what is open.
    :param ready: tags under which it would yield if it is asked.
    :param keep: it does not need more than it has and what it claims.
    :param sign: write the row though nothing has changed: it answers.
    """
    before = book.members[key]
    sessions = in_order(state.sessions)
    member = replace(
        before, granted=0, stalled=False, sessions=sessions, unasked=unasked
    )
    book.members[key] = _covering(book, member, state)
    # Of the lost ones, those are not open any more for which a slot is kept.
    open_ = state.open - len(state.lost)
    buried = book.quarantine(key, state.lost, open_=open_)
    open_ = state.open - len(buried)
    floor = max(allowed - len(buried), open_)
    _post(book, key, demand)
    plan = book.allocation()
    turns = {tag for tag in ready if (tag, key) in plan.asked}
    if turns:
        _yield(book, key, turns, plan)
        plan = book.allocation()
    if keep:
        least = min(plan.targets[key], floor)
        plan.targets[key] = max(least, plan.claimed[key])
    member, target = book.members[key], plan.targets[key]
    owned, more = member.owned, 0
    if owned > target:
        owned = min(owned, max(target, floor))
    else:
        more = plan.grants(book.members, book.free).get(key, 0)
    kept = plan.kept_at(key, member, more)
    owned += more
    member = replace(
        member,
        owned=owned,
        pressed=plan.presses(key, member.tags),
        tags={
            tag: line._replace(limit=plan.limits[tag, key], kept=kept.get(tag, 0))
            for tag, line in member.tags.items()
        },
    )
    if member != before or sign:
        member = replace(member, beat=member.beat + 1)
    book.write(key, member)
    return _allotment(book, key, plan, tuple(buried), owned >= open_)


def _covering(book: Book, member: Member, state: State) -> Member:
    """Return it with a slot for each connection, as far as there are slots.

    Its slots may have been taken from it though it lives (it was taken for dead, or the
    ledger was reset). What is open comes before what is wanted.
    """
    kept = len(book.in_quarantine.intersection(state.lost))
    more = min(state.open - kept - member.owned, book.left)
    return replace(member, owned=member.owned + max(more, 0))


def _post(book: Book, key: str, demand: Mapping[str, TagDemand]) -> None:
    """Write down what is wanted, with places for what was not wanted before."""
    member, tags = book.members[key], {}
    reserves = limits_of_tags(book.terms.tags).reserves
    for tag, want in demand.items():
        if want.wants or want.active:
            line = member.tags.get(tag, TagDemand())
            has_place = want.wants or tag in reserves
            place = (line.place or book.next_place()) if has_place else 0
            if tag not in book.places:
                book.places[tag] = book.next_place()
            tags[tag] = want._replace(place=place, limit=line.limit, kept=line.kept)
    book.members[key] = replace(member, tags=tags)


def _yield(book: Book, key: str, turns: Collection[str], plan: Allocation) -> None:
    """Go to the end of these tags' lines.

    In the line of tags a tag goes back by a turn over its weight: one of weight 3 has
    three turns for one of weight 1. One that was quiet is a turn ahead at most.
    """
    member = book.members[key]
    limits = limits_of_tags(book.terms.tags)
    tags = dict(member.tags)
    for tag in sorted(turns):
        end = book.next_place()
        tags[tag] = tags[tag]._replace(place=end)
        if tag in plan.asked_tags:
            here = max(book.places[tag], end - 2 * _TURN)
            book.next_place(here + _TURN)
            way = min(_TURN / limits.of(tag).weight, _FAR)
            book.places[tag] = here + math.ceil(way)
    book.members[key] = replace(member, tags=tags)


def _used_elsewhere(book: Book, key: str) -> Mapping[str, Mapping[str, float]]:
    """Return what other members have used of tags that wait here."""
    waiting = {tag for tag, line in book.members[key].tags.items() if line.waiting}
    used: dict[str, dict[str, float]] = {}
    for other, member in book.members.items():
        for tag, line in member.tags.items() if other != key else ():
            if line.used and tag in waiting:
                used.setdefault(tag, {})[other] = line.used
    return used


def _allotment(
    book: Book,
    key: str,
    plan: Allocation,
    buried: tuple[Session | None, ...],
    covered: bool,
) -> Allotment:
    book.tell(plan)
    member = book.members[key]
    ceilings = {
        tag: max(1, ceiling - plan.shares.get(tag, 0))
        for tag, ceiling in plan.ceilings.items()
    }
    ceilings |= {tag: line.limit for tag, line in member.tags.items()}
    return Allotment(
        terms=book.terms,
        pauses=book.pauses,
        row=member,
        target=plan.targets[key],
        claims={
            tag: min(plan.claims.get((tag, key), 0), line.wants)
            for tag, line in member.tags.items()
        },
        bounds=TagBounds(
            ceilings,
            plan.newcomer,
            {tag: line.kept for tag, line in member.tags.items() if line.kept},
            _used_elsewhere(book, key) if plan.unmet else {},
        ),
        unmet=plan.unmet,
        asked=frozenset(tag for tag, asked in plan.asked if asked == key),
        turns=len(plan.asked),
        starved=len(frozenset().union(*plan.starved.values())),
        members=len(book.members),
        gone=dict(book.gone),
        buried=buried,
        covered=covered,
        fresh=frozenset(book.members) if book.is_fresh else None,
        due=book.due.get(key),
    )
