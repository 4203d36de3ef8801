"""The ledger's book: who owns which slots, and who may change that, how.

Pure: rows in, rows out, in one transaction of a store, which is exclusive over all
members. No clock, no I/O, no thread. A transaction either happens or does not. What a
member does for itself in one is :func:`.settling.settle`; the rest is here.

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

A sign of life can be *lost* while its process lives, where it depends on a connection.
Then the slots of a living member go into quarantine, and are free once the server knows
no session of it. So there a pool marks each new connection with the member's number
first, looks for the sign of life second, and gives the connection up if that is gone:
either the mark is seen by who asks for sessions, or the missing sign by who opened it.
And a keeper lets its pool open nothing from before it makes a new sign until it has
seen its row: it takes its quarantine back, or takes free slots for what is open, before
anything else.

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
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from .. import policy
from .allocation import Allocation, allocate
from .errors import LedgerError, TermsDiffer
from .rows import (
    DUE,
    META,
    STALLED,
    TAGS,
    TURN,
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

__all__ = ["Book"]


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

    def accepts(self, key: str, terms: Terms) -> bool:
        """Tell if `key` may join with these terms as things stand."""
        others = self.members.keys() - {key}
        return self.meta is None or self.meta.terms == terms or not others

    def join(
        self, key: str, who: Mapping[str, Any], terms: Terms, number: int | None = None
    ) -> int:
        """Add a member, unless it is one; return its number.

        :param number: the one it had, if it was a member before. Its connections may
          be marked with that; and it takes back what is in quarantine for it.
        :raises TermsDiffer: if a member has other terms.
        """
        if not self.accepts(key, terms):
            raise TermsDiffer(self._difference(terms))
        self.meta = replace(self.meta or Meta(terms), terms=terms)
        if key not in self.members:
            owned = 0
            if number is None or self._is_anothers(number, key):
                number = self.meta.next_number
            elif number in self.gone:
                owned = self.gone.pop(number).slots
                del self._rows[gone_key(number)]
            next_number = max(number + 1, self.meta.next_number)
            self.meta = replace(self.meta, next_number=next_number)
            # A row unlike any that this member may have had before, see `reap`.
            self.write(key, Member(number, who, owned, beat=self.next_place()))
        self._rows[META] = self._known_meta.text
        return self.members[key].number

    def _is_anothers(self, number: int, key: str) -> bool:
        """Tell if a ledger that was made anew has given the number to another."""
        gone = self.gone.get(number)
        return any(member.number == number for member in self.members.values()) or (
            gone is not None and gone.member != key
        )

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
            gone = Gone(slots, why, member.who, key, self.next_place())
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
                self.write(key, replace(self.members[key], stalled=True))

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

    # -- what settling is made of --------------------------------------------------

    def next_place(self) -> int:
        """Return a number that nobody has had."""
        meta = self._known_meta
        self.meta = replace(meta, next_place=meta.next_place + 1)
        return meta.next_place

    def grants(self, plan: Allocation) -> dict[str, int]:
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

    def write(self, key: str, member: Member) -> None:
        """Write a member's row, if it is another one now."""
        self.members[key] = member
        text = member.text
        if text != self.texts.get(key):
            self.texts[key] = text
            self._rows[member_key(key)] = text

    # -- who is told ------------------------------------------------------------------

    def tell(self, plan: Allocation) -> list[str]:
        """Write down who is expected to look; return those who are to be rung.

        The last thing in every transaction that changes the board.
        """
        due = self._due(plan)
        bells = [
            key
            for key, why in due.items()
            if why != self.due.get(key) and why != STALLED
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
        grants = self.grants(plan)
        asked = {key for _, key in plan.asked}
        due = {}
        for key, member in self.members.items():
            target = plan.targets[key]
            if member.stalled:
                due[key] = STALLED
            elif member.owned > target:
                due[key] = f"give {target}"
            elif key in grants:
                due[key] = f"take {grants[key]}"
            elif not member.owned:
                continue
            elif self._is_bound_anew(key, member, plan):
                due[key] = "limit"
            elif key in asked:
                due[key] = TURN
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
