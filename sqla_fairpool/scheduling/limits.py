"""What a tag may have of its own: weight, maximum, reserved slots, time limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["NO_LIMITS", "LimitsByTag", "TagLimits"]


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
