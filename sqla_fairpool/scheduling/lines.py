"""The lines of waiting tickets, one for each tag, and which of them is served next.

Part of the scheduler. A line is in order of arrival; of the tags with a line, the one
that :func:`.policy.rank` puts first is next, if it is below its ceiling.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import policy
from .account import Account, Ticket
from .heap import Agenda
from .tags import Roster

__all__ = ["Lines"]


class Lines:
    """The tags under which tickets wait."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        # In the order in which they began to wait.
        self._waiting: dict[Account, None] = {}
        # While there are two or more, those of them that are below their ceiling, by
        # `policy.rank`. May hold some that are not any more, or do not wait; they are
        # dropped when they come first.
        self._ready: Agenda[Account] = Agenda()

    def __iter__(self) -> Iterator[Account]:
        return iter(self._waiting)

    def begun(self, account: Account) -> None:
        """Note that a tag has a line now."""
        self._waiting[account] = None
        if len(self._waiting) == 2:  # the first one was alone and not ranked
            self.changed(next(iter(self._waiting)))
        self.changed(account)

    def head_left(self, account: Account) -> None:
        """Note that a line has another head, or none."""
        if account.waiters:
            self.changed(account)
        else:
            del self._waiting[account]
            self._ready.remove(account)

    def changed(self, account: Account) -> None:
        """Rank a tag with a line anew: what it holds, or its ceiling, has changed."""
        if len(self._waiting) == 1:
            return  # no other tag to be ranked with
        if account.in_use < self._roster.ceiling(account):
            self._ready.put(account, self.rank(account))
        else:
            self._ready.remove(account)

    def all_changed(self) -> None:
        """Rank all anew: ceilings have changed. O(tags with a line)."""
        for account in self._waiting:
            self.changed(account)

    def rank(self, account: Account) -> tuple[float, int]:
        """Return the key by which a tag with a line is ranked."""
        assert account.waiters
        head = next(iter(account.waiters))
        return policy.rank(account.in_use, account.weight, head.number)

    def next(self) -> Account | None:
        """Return the tag whose head is to get the next free slot."""
        ceiling = self._roster.ceiling
        if len(self._waiting) == 1:
            account = next(iter(self._waiting))
            return account if account.in_use < ceiling(account) else None
        while (first := self._ready.first()) is not None:
            account = first[1]
            if account.in_use < ceiling(account):
                return account
            self._ready.remove(account)  # its ceiling has fallen
        return None

    def newest(self) -> Ticket | None:
        """Return a ticket that is likely to wait for long, None if none waits."""
        for account in reversed(self._waiting):
            assert account.waiters
            return next(reversed(account.waiters))
        return None
