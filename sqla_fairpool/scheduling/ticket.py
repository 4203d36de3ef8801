"""What is known of a tag, and of one request: the nouns of the scheduler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .counters import BOUNDS, Counters

FREE = "free"
WAITING = "waiting"
GRANTED = "granted"


@dataclass(frozen=True, slots=True, kw_only=True)
class TagLimits:
    """The limits of one tag, or of all tags whose names begin alike."""

    #: Relative entitlement: a tag of weight 3 gets three times the share of one of 1.
    weight: float = 1.0
    #: Its ceiling, in the place of ``soft_limit`` and ``max_limit``, whether it is
    #: alone or not. None for these.
    max: int | None = None
    #: Slots that only this tag may use, kept free while it does not.
    reserved: int = 0
    #: Seconds after which PostgreSQL cancels a statement, ends a session that does
    #: nothing in its transaction, and gives up waiting for a lock. None for what the
    #: session has without. These are each process's own: no ledger has them.
    statement_timeout: float | None = None
    idle_in_transaction_timeout: float | None = None
    lock_timeout: float | None = None

    @property
    def times(self) -> dict[str, Any]:
        """The time limits that it has, by name."""
        given = {name: getattr(self, name) for name in TIMES}
        return {name: value for name, value in given.items() if value is not None}


#: The names of the time limits.
TIMES = ("statement_timeout", "idle_in_transaction_timeout", "lock_timeout")

NO_LIMITS = TagLimits()


class LimitsByTag:
    """Finds the limits of a tag.

    :param limits: by the tag's name, or by the beginning of names with ``*`` after it.
    """

    def __init__(self, limits: Mapping[str, TagLimits]) -> None:
        self.given = dict(limits)
        beginnings = [key[:-1] for key in limits if key.endswith("*")]
        # The longest first: it is the one that counts.
        self._beginnings = sorted(beginnings, key=len, reverse=True)
        #: Slots reserved, by tag, and for all together. A beginning reserves nothing.
        self.reserves = {tag: one.reserved for tag, one in limits.items()}
        self.reserves = {tag: slots for tag, slots in self.reserves.items() if slots}
        self.reserved = sum(self.reserves.values())

    def of(self, tag: str) -> TagLimits:
        """Return the limits of `tag`. O(keys that end in ``*``)."""
        own = self.given.get(tag)
        if own is not None:
            return own
        for beginning in self._beginnings:
            if tag.startswith(beginning):
                return self.given[f"{beginning}*"]
        return NO_LIMITS


class LineFull(Exception):  # noqa: N818  (a refusal, not an error)
    """`max_waiting` requests wait already."""


class Ticket:
    """The handle of one request: waiting for a slot, holding one, or free.

    A free ticket may be used for another request. While no request waits, a granted
    one may serve several checkouts under its tag, one after the other: the pool counts
    these in the fields below, and the scheduler adds them to the tag's figures when the
    slot comes back.
    """

    __slots__ = (
        "again",
        "granted_at",
        "held",
        "held_max",
        "long_holds",
        "notable",
        "number",
        "since",
        "state",
        "tag_state",
    )

    tag_state: TagState
    #: Arrival number, while waiting.
    number: int
    #: When it was requested (waiting), or last checked out (granted).
    since: float
    #: When its slot was charged to its tag.
    granted_at: float

    def __init__(self) -> None:
        self.state = FREE
        #: Checkouts it served beyond the first.
        self.again = 0
        #: How long those took that are over: in all, and the longest. Seconds.
        self.held = 0.0
        self.held_max = 0.0
        #: A checkout that takes longer than this is to be told to `note`: the others
        #: neither are the longest nor leave the histogram's first bucket.
        self.notable = 0.0
        self.long_holds: list[float] = []

    def note(self, held: float) -> None:
        """Note a checkout that took long."""
        if held > self.held_max:
            self.held_max = held
            self.notable = min(held, BOUNDS[0])
        if held > BOUNDS[0]:
            self.long_holds.append(held)

    def book(self, tag_state: TagState) -> None:
        """Add the checkouts that are over to the figures of their tag."""
        again, held, longest = self.again, self.held, self.held_max
        tag_state.checkouts += again  # the first was counted when it was granted
        tag_state.hold_total += held
        if longest > tag_state.hold_max:
            tag_state.hold_max = longest
        counters = tag_state.counters
        counters.checkouts += again + tag_state.silent
        counters.at_once += again
        counters.hold.add_all(again + 1, held, longest, self.long_holds)
        if self.long_holds:
            self.long_holds = []
        self.again = 0
        self.held = self.held_max = self.notable = 0.0


class SafeCeiling:
    """A number that is not above the ceiling of any tag that has this object.

    Shared by all tags that follow the same rule, so that it changes for all at once.
    """

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class TagState:
    """What the scheduler knows of one tag."""

    __slots__ = (
        "active",
        "charged",
        "checkouts",
        "counters",
        "elsewhere",
        "hold_max",
        "hold_total",
        "in_use",
        "last_activity",
        "lift",
        "limits",
        "peak",
        "prompt",
        "reserved",
        "safe_ceiling",
        "silent",
        "tag",
        "timeouts",
        "wait_max",
        "wait_total",
        "waiters",
        "weight",
    )

    def __init__(
        self,
        tag: str,
        limits: TagLimits,
        reserved: int,
        silent: bool,
        counters: Counters,
        safe_ceiling: SafeCeiling,
    ) -> None:
        self.tag = tag
        #: What is counted for monitoring; other tags may share it.
        self.counters = counters
        #: What it may have of its own; the weight, which is asked for often, apart.
        self.limits = limits
        self.weight = limits.weight
        #: Slots that are kept for it here: of a ledger's, those of this process.
        self.reserved = reserved
        #: Not above its ceiling.
        self.safe_ceiling = safe_ceiling
        #: Its usage, less what its slots in use come to, at the landmark: see `usage`.
        self.charged = 0.0
        #: What is added to that when it is ranked.
        self.lift = 0.0
        #: Of that, what it has used in other processes.
        self.elsewhere = 0.0
        #: True for the default tag: asking, waiting and returning are no
        #: activity of it, because the caller may still say who it is.
        self.silent = silent
        self.active = False
        #: active and not silent: what its holders do is known to be activity.
        self.prompt = False
        self.in_use = 0
        #: The most that were in use at once since a ledger's member last asked.
        self.peak = 0
        self.waiters: OrderedDict[Ticket, None] | None = None
        self.last_activity: float | None = None
        self.checkouts = 0
        self.timeouts = 0
        self.wait_total = 0.0
        self.wait_max = 0.0
        self.hold_total = 0.0
        self.hold_max = 0.0

    def limit(
        self, limits: TagLimits, reserved: int, safe_ceiling: SafeCeiling
    ) -> None:
        """Set what it may have of its own."""
        self.limits = limits
        self.weight = limits.weight
        self.reserved = reserved
        self.safe_ceiling = safe_ceiling

    @property
    def waiting(self) -> int:
        """Requests that wait under this tag."""
        return len(self.waiters) if self.waiters else 0
