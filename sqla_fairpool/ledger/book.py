"""The ledger's book: who owns which slots, and who may change that, how.

Pure: rows in, rows out, in one transaction of a store, which is exclusive over all
members. No clock, no I/O, no thread. A transaction either happens or does not.

**A slot** is the right to have one connection open. Of the N slots each is

=============  =======================================================================
free           counted in no row: N less all the others
owned          counted in the row of one member, `owned`
quarantined    counted in a row ``gone/<number>``: its member is gone, but a server
               session of it may still be open
=============  =======================================================================

============================  ==========================================================
transition                    who may do it, and when
============================  ==========================================================
free -> owned                 `settle`: a member, for itself, up to its target, before
                              it opens a connection
owned -> free                 `settle`, `leave`: the owner, for itself, after the
                              connection is closed and its pool told not to open another
owned -> quarantined          `reap`: anybody, when the kernel or the server says that
                              the owner's sign of life is gone and its row has not
                              changed since before that was asked;
                              `leave`: the owner, for connections that stay open
quarantined -> free           `release`: anybody, when the server says that the sessions
                              of that number are gone (or, where it cannot be asked,
                              after a stated time)
quarantined -> owned          `join`: the owner itself, that was taken for dead
anything -> free              `reset`: an operator, while no member lives
============================  ==========================================================

So a member never has more connections open than slots are kept for it, whenever it
stops: the number that its pool may open is raised *after* the row, and lowered
*before* it. What happens if a member is gone for good

* before its transaction is committed: nothing of it has happened;
* after it took slots, before its pool knows: they are reaped with the others;
* after its pool was told to shrink, before it gave back: the same;
* after it gave back, before it rang who waits for that: the waiting one looks on its
  beat, finds itself in the row ``due``, and takes;
* in the transaction: the store undoes it;
* between `reap` and `release`: the quarantine is in the rows, anybody goes on;
* in `leave`: before it, as killed; after it, it was no member any more.

A member that only *stops* (SIGSTOP, a debugger, a suspended machine) keeps its sign of
life, so its slots; it goes on from where it stood. Others may write into its row that
it is `stalled`, which takes its demand off the board and nothing else. A forked child
is another process with an id of its own, and owns nothing. Commits of which the answer
was lost do no harm either: what counts is the row, which is read at the next look.

**Who is told.** Each transaction computes the allocation for the whole board
(:mod:`.allocation`) and writes down, in the row ``due``, who is expected to look and
why: ``give``, its target is below what it owns; ``take``, there are free slots for it;
``limit``, a ceiling that binds it has changed; ``turn``, it is asked to yield its place
in a line; ``press``, somebody goes short, so what it does not use has to be given up
at once. Those whose entry is new are rung. A bell may be lost: the row is not.

**Terms.** All members have the same numbers. A newcomer with other terms is refused
unless nobody else lives; then its own are in force.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .. import policy
from .allocation import Allocation, Line, allocate
from .errors import LedgerError, TermsDiffer
from .rows import (
    DUE,
    META,
    TAGS,
    Gone,
    Member,
    Meta,
    Terms,
    dump,
    gone_in,
    gone_key,
    member_key,
    members_in,
    parse_member,
)

__all__ = ["Book", "Orders", "TagDemand", "has_news"]


class TagDemand(NamedTuple):
    """What a process wants under one tag, now."""

    in_use: int
    waiting: int
    active: bool

    @property
    def wants(self) -> int:
        return self.in_use + self.waiting


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
    #: Members that go short.
    hungry: int
    members: int
    free: int
    gone: Mapping[int, Gone]
    #: Whom to ring.
    bells: tuple[str, ...]
    #: The row, to see if anybody has changed it.
    text: str


def has_news(rows: Mapping[str, str], member: str, text: str) -> bool:
    """Tell if a member has to look, at the price of two rows.

    :param text: its row as it knows it.
    """
    return rows.get(member_key(member)) != text or member in _parse(rows.get(DUE))


def _parse(text: str | None) -> dict[str, Any]:
    return json.loads(text) if text else {}


class Book:
    """The rows of one transaction, understood. Changes are written at once.

    :param rows: what the store gave.
    :raises LedgerError: if a later version has written them.
    """

    def __init__(self, rows: MutableMapping[str, str]) -> None:
        self._rows = rows
        text = rows.get(META)
        self.meta = Meta.parse(text) if text else None
        self.texts = dict(members_in(rows))
        self.members = {key: parse_member(text) for key, text in self.texts.items()}
        self.gone = dict(gone_in(rows))
        self.places: dict[str, int] = _parse(rows.get(TAGS))
        #: Who is expected to look, and why.
        self.due: dict[str, str] = _parse(rows.get(DUE))

    # -- figures ----------------------------------------------------------------

    @property
    def terms(self) -> Terms:
        """The terms in force."""
        return self._known_meta.terms

    @property
    def _known_meta(self) -> Meta:
        if self.meta is None:
            raise LedgerError("the ledger is empty: nobody has joined it yet")
        return self.meta

    @property
    def owned(self) -> int:
        return sum(member.owned for member in self.members.values())

    @property
    def quarantined(self) -> int:
        return sum(gone.slots for gone in self.gone.values())

    @property
    def free(self) -> int:
        """Slots that may be taken.

        Not negative, even where the terms were lowered over a quarantine.
        """
        return max(self.terms.capacity - self.owned - self.quarantined, 0)

    def allocation(self) -> Allocation:
        """Return who is to have what."""
        limits = self.terms.limits(self.quarantined)
        return allocate(self.members, self.places, limits)

    # -- coming and going -------------------------------------------------------

    def accepts(self, terms: Terms) -> bool:
        """Tell if somebody with these terms may join as things stand."""
        return self.meta is None or self.meta.terms == terms or not self.members

    def join(
        self, key: str, who: Mapping[str, Any], terms: Terms, number: int | None = None
    ) -> int:
        """Add a member; return its number.

        :param number: the one it had, if it was a member before: it takes what is
          in quarantine for that number back.
        :raises TermsDiffer: if a member has other terms.
        """
        if self.meta is None:
            self.meta = Meta(terms)
        elif self.meta.terms != terms:
            if self.members:
                raise TermsDiffer(self._difference(terms))
            self.meta = replace(self.meta, terms=terms)
        owned = 0
        if number is not None and number in self.gone:
            owned = self.gone.pop(number).slots
            del self._rows[gone_key(number)]
        else:
            number = self.meta.next_number
            self.meta = replace(self.meta, next_number=number + 1)
        # A row unlike any that this member may have had before, see `reap`.
        self._write(key, Member(number, who, owned, beat=self._next_place()))
        self._rows[META] = self._known_meta.text
        return number

    def _difference(self, terms: Terms) -> str:
        there = self.terms
        members = [
            f"{m.who.get('host', '?')}:{m.who.get('pid', '?')}"
            for m in self.members.values()
        ]
        shown = ", ".join(members[:4])
        if len(members) > 4:
            shown += f" and {len(members) - 4} more"
        return (
            f"the members of a ledger have to agree on its limits: here "
            f"{terms.differences(there)}, there {there.differences(terms)} "
            f"(members: {shown})"
        )

    def leave(self, key: str, open_: int) -> None:
        """Take a member off the board, and give back what it has closed.

        As after `reap` and `release`, :meth:`tell` comes next.

        :param open_: connections it leaves open; their slots go into quarantine.
        """
        member = self.members.get(key)
        if member is not None:
            self._bury(key, "left connections open", min(open_, member.owned))

    def reap(self, texts: Mapping[str, str]) -> list[int]:
        """Put the slots of dead members into quarantine; return the numbers.

        :param texts: their rows as they were before the signs of life were looked
          at. Whose row has changed since is not dead.
        """
        reaped = []
        for key, text in texts.items():
            if self.texts.get(key) == text:
                member = self.members[key]
                self._bury(key, "died", member.owned)
                reaped.append(member.number)
        return reaped

    def _bury(self, key: str, why: str, slots: int) -> None:
        member = self.members.pop(key)
        del self._rows[member_key(key)], self.texts[key]
        if slots:
            gone = Gone(slots, why, member.who, stamp=self._next_place())
            self.gone[member.number] = gone
            self._rows[gone_key(member.number)] = gone.text

    def release(self, gone: Mapping[int, Gone]) -> None:
        """Set slots free: the server sessions of their numbers are gone.

        :param gone: the quarantines as they were before the server was asked.
        """
        for number, row in gone.items():
            if self.gone.get(number) == row:
                del self.gone[number], self._rows[gone_key(number)]

    def stall(self, texts: Mapping[str, str]) -> None:
        """Note that members do not answer, if their rows are still as they were."""
        for key, text in texts.items():
            if self.texts.get(key) == text:
                self._write(key, replace(self.members[key], stalled=True))

    def reset(self) -> None:
        """Forget all members and quarantines. Numbers are not given again."""
        for key in [*self._rows]:
            if key != META:
                del self._rows[key]
        self.members.clear()
        self.texts.clear()
        self.gone.clear()
        self.places.clear()
        self.due.clear()

    # -- a member's look ----------------------------------------------------------

    def settle(
        self,
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
        before = self.members[key]
        member = replace(before, stalled=False)
        if member.owned < open_:
            # Its slots were taken from it though it lives (it was taken for dead, or
            # the ledger was reset). What is open comes before what anybody wants.
            more = min(open_ - member.owned, self.free)
            member = replace(member, owned=member.owned + more)
        member = self._post(key, member, demand)
        plan = self.allocation()
        turns = {tag for tag in ready if (tag, key) in plan.asked}
        if turns:
            member = self._yield(key, member, turns, plan)
            plan = self.allocation()
        target = plan.targets[key]
        if keep is not None:
            target = max(min(target, keep), plan.claimed[key])
            plan.targets[key] = target
        if member.owned > target:
            given = min(member.owned, max(target, floor))
            self.members[key] = member = replace(member, owned=given)
        elif taken := self._grants(plan).get(key, 0):
            member = replace(member, owned=member.owned + taken)
        pressed = plan.presses(key, member.lines)
        lines = {
            tag: line._replace(limit=plan.limits[tag, key])
            for tag, line in member.lines.items()
        }
        member = replace(member, pressed=pressed, lines=lines)
        if member != before or sign:
            member = replace(member, beat=member.beat + 1)
        self._write(key, member)
        return self._orders(key, member, target, plan)

    def _post(
        self, key: str, member: Member, demand: Mapping[str, TagDemand]
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
                place = self._next_place()
            if tag not in self.places:
                self.places[tag] = self._next_place()
            lines[tag] = Line(in_use, waiting, active, place, line.limit)
        member = replace(member, lines=lines)
        self.members[key] = member
        return member

    def _yield(
        self, key: str, member: Member, turns: Collection[str], plan: Allocation
    ) -> Member:
        """Go to the end of these tags' lines."""
        lines = dict(member.lines)
        for tag in sorted(turns):
            lines[tag] = lines[tag]._replace(place=self._next_place())
            if tag in plan.asked_tags:
                self.places[tag] = self._next_place()
        member = replace(member, lines=lines)
        self.members[key] = member
        return member

    def _next_place(self) -> int:
        meta = self._known_meta
        self.meta = replace(meta, next_place=meta.next_place + 1)
        return meta.next_place

    def _grants(self, plan: Allocation) -> dict[str, int]:
        """Divide the free slots among those who are below their targets."""
        free = self.free
        if not free:
            return {}
        short = [
            key
            for key, member in self.members.items()
            if member.owned < plan.targets[key]
        ]
        owned = [self.members[key].owned for key in short]
        wanted = [plan.targets[key] for key in short]
        shares = policy.fair_shares(wanted, free + sum(owned), floors=owned)
        return {
            key: share - had
            for key, share, had in zip(short, shares, owned, strict=True)
            if share > had
        }

    def _orders(
        self, key: str, member: Member, target: int, plan: Allocation
    ) -> Orders:
        bells = self.tell(plan)
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
            hungry=len(set().union(*plan.hungry.values())) if plan.hungry else 0,
            members=len(self.members),
            free=self.free,
            gone=dict(self.gone),
            bells=tuple(bell for bell in bells if bell != key),
            text=self.texts[key],
        )

    # -- who is told ------------------------------------------------------------------

    def tell(self, plan: Allocation) -> list[str]:
        """Write down who is expected to look; return those who are to be rung.

        The last thing in every transaction that changes the board.
        """
        due = self._due(plan)
        bells = [
            key
            for key, why in due.items()
            if why != self.due.get(key) and why != _STALLED
        ]
        if due != self.due:
            self._rows[DUE] = dump(due)
            self.due = due
        places = {tag: self.places[tag] for tag in plan.shares if tag in self.places}
        if dump(places) != self._rows.get(TAGS):
            self._rows[TAGS] = dump(places)
        meta = self._known_meta
        if meta.text != self._rows.get(META):
            self._rows[META] = meta.text
        return bells

    def _due(self, plan: Allocation) -> dict[str, str]:
        grants = self._grants(plan)
        asked = {key for _, key in plan.asked}
        due = {}
        for key, member in self.members.items():
            target = plan.targets[key]
            if member.stalled:
                due[key] = _STALLED
            elif member.owned > target:
                due[key] = f"give {target}"
            elif key in grants:
                due[key] = f"take {grants[key]}"
            elif not member.owned:
                continue
            elif self._is_bound_anew(key, member, plan):
                due[key] = "limit"
            elif key in asked:
                due[key] = "turn"
            elif not member.pressed and plan.presses(key, member.lines):
                due[key] = "press"
        return due

    @staticmethod
    def _is_bound_anew(key: str, member: Member, plan: Allocation) -> bool:
        """Tell if a ceiling that it does not know yet makes a difference."""
        return any(
            min(line.wants, line.limit) != min(line.wants, plan.limits[tag, key])
            for tag, line in member.lines.items()
        )

    def _write(self, key: str, member: Member) -> None:
        self.members[key] = member
        text = member.text
        if text != self.texts.get(key):
            self.texts[key] = text
            self._rows[member_key(key)] = text


#: Why a member stands in ``due`` that is written down as stalled: so that it sees
#: that when it goes on.
_STALLED = "stalled"
