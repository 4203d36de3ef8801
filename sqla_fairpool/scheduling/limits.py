"""What a tag may have of its own: weight, maximum and reserved slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
