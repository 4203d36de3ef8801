"""Which tags are known, which of them are active, and so how high they may go.

A tag is *active* from its first activity until it had none for `idle_timeout`;
while a request waits under it, it stays active. What is known of a tag that is
idle and holds nothing is forgotten after a while, or earlier when there are very
many: tags may be made from user data.

Part of the scheduler: called under the same lock, with the time as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from . import policy
from .account import Account
from .counters import Meters
from .heap import Agenda

__all__ = ["Roster"]

#: For how many idle timeouts the figures of an idle tag are kept: long enough
#: for a monitor to show a scraper that has stopped, five minutes by default.
_RETENTION = 5.0

#: Most tags remembered that hold nothing and wait for nothing. 10,000 tags are
#: ordinary; of a million that pass by, no more than this stay.
_MAX_REMEMBERED = 16_384

#: How many accounts are looked at to find one that may be forgotten early.
_FORGET_TRIES = 4


class Roster:
    """The accounts by tag, and the ceiling in force.

    :param silent_tag: the tag for which asking, waiting and returning are no
      activity.
    """

    def __init__(
        self,
        *,
        soft_limit: int,
        max_limit: int,
        idle_timeout: float,
        silent_tag: str | None,
        weights: Mapping[str, float],
    ) -> None:
        self.soft_limit = soft_limit
        self.max_limit = max_limit
        self.idle_timeout = idle_timeout
        self.silent_tag = silent_tag
        self.weights = dict(weights)
        self.accounts: dict[str, Account] = {}
        self.meters = Meters()
        #: How many tags are active.
        self.active = 0
        #: The ceiling of every active tag: they all have the same. While ceilings are
        #: imposed, the lowest of these; who looks only at this one errs on the safe
        #: side.
        self.common_ceiling = max_limit
        #: Ceilings from outside, by tag, and for all others; None without.
        self.imposed: Mapping[str, int] | None = None
        self.imposed_other = 0
        #: Called after a tag has become active or idle: its name, which of the two, how
        #: many are active, and the ceiling that follows.
        self.on_change: Callable[[str, bool, int, int], None] | None = None
        # When to look at an account again: is it idle, may it be forgotten?
        self._review: Agenda[Account] = Agenda()

    def ceiling(self, account: Account) -> int:
        """Return the most slots `account` may hold now."""
        if self.imposed is not None:
            return self.imposed.get(account.tag, self.imposed_other)
        if account.active:
            return self.common_ceiling
        others = self.active - account.active
        return policy.ceiling(others, self.soft_limit, self.max_limit)

    def impose(self, ceilings: Mapping[str, int], other: int) -> None:
        """Replace the rules for ceilings by numbers from outside."""
        self.imposed, self.imposed_other = ceilings, other
        self.common_ceiling = self._lowest_ceiling(0)

    def _lowest_ceiling(self, others: int) -> int:
        if self.imposed is not None:
            return min([self.imposed_other, *self.imposed.values()])
        return policy.ceiling(others, self.soft_limit, self.max_limit)

    def get(self, tag: str, now: float) -> Account:
        """Return the account of `tag`, a new one if there is none. O(log tags)."""
        account = self.accounts.get(tag)
        if account is None:
            if len(self.accounts) >= _MAX_REMEMBERED:
                self._forget_one(now)
            weight = self.weights.get(tag, 1.0)
            silent = tag == self.silent_tag
            account = Account(tag, weight, silent, self.meters.of(tag))
            self.accounts[tag] = account
        return account

    def reconfigure(self, soft_limit: int, max_limit: int, idle_timeout: float) -> None:
        """Change the limits, and when a tag is idle. O(tags)."""
        self.soft_limit = soft_limit
        self.max_limit = max_limit
        self.idle_timeout = idle_timeout
        self.common_ceiling = self._lowest_ceiling(max(self.active - 1, 0))
        for account in self.accounts.values():
            if account.active:
                self._review.put(account, self._idle_at(account))

    def touch(self, account: Account, now: float) -> None:
        """Note activity: the tag counts from now on."""
        account.last_activity = now
        if not account.active:
            # In this order: an interrupt must not leave it active for ever.
            self._review.put(account, now + self.idle_timeout)
            self._set_active(account, True)

    def review(self, now: float) -> bool:
        """Look at the tags whose time has come; tell if any became idle."""
        active_before = self.active
        while (due := self._review.first()) is not None and due[0] <= now:
            account = due[1]
            when = self._reviewed(account, now)
            if when is None:
                self._review.remove(account)
            else:
                self._review.put(account, when)
        return self.active < active_before

    def _reviewed(self, account: Account, now: float) -> float | None:
        """Let the tag become idle or be forgotten; return when to look again."""
        if account.waiters and not account.silent:
            return math.nextafter(now, math.inf)  # that is, at the next review
        if account.active:
            idle_at = self._idle_at(account)
            if idle_at > now:
                return idle_at
            self._set_active(account, False)
            return now + _RETENTION * self.idle_timeout
        if not account.in_use and not account.waiters:
            self.accounts.pop(account.tag, None)
        return None  # what it still holds makes it active when it comes back

    def _idle_at(self, account: Account) -> float:
        assert account.last_activity is not None
        return account.last_activity + self.idle_timeout

    def _forget_one(self, now: float) -> None:
        """Make room: forget the tag that was quiet longest, if a few looks find it."""
        for _ in range(_FORGET_TRIES):
            due = self._review.first()
            if due is None:
                return
            when, account = due
            if account.in_use or account.waiters:
                self._review.put(account, now + self.idle_timeout)
            elif account.active and self._idle_at(account) > when:
                self._review.put(account, self._idle_at(account))
            else:
                if account.active:
                    self._set_active(account, False)
                self.accounts.pop(account.tag, None)
                self._review.remove(account)
                return

    def _set_active(self, account: Account, active: bool) -> None:
        prompt = active and not account.silent
        count = self.active + (1 if active else -1)
        ceiling = self._lowest_ceiling(max(count - 1, 0))
        # From here in one go, see the head of scheduler.py.
        account.active = active
        account.prompt = prompt
        self.active = count
        self.common_ceiling = ceiling
        if self.on_change is not None and not account.silent:
            self.on_change(account.tag, active, count, ceiling)

    def is_reviewed(self, account: Account) -> bool:
        """Tell if the tag is looked at again, to learn if it is idle."""
        return account in self._review
