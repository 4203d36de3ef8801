"""The ledger's rows, as text and as objects. Unknown fields are left out.

=================  ===========================================================
key                what
=================  ===========================================================
``meta``           protocol version, terms, counters
``tags``           the tags' places in the line of tags
``due``            members that are expected to look, and why
``member/<id>``    one member: its slots, its demand by tag
``gone/<number>``  slots in quarantine: those of a member that is gone
=================  ===========================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from .allocation import Limits, Line
from .errors import LedgerError

__all__ = [
    "DUE",
    "META",
    "PROTOCOL",
    "STALLED",
    "TAGS",
    "TURN",
    "Gone",
    "Member",
    "Meta",
    "Session",
    "Terms",
]

#: Version of the rows' meaning. Members refuse a ledger with a higher one.
PROTOCOL = 1

META, TAGS, DUE = "meta", "tags", "due"

#: Two of the reasons in ``due``: asked to yield a place in a line; and written down as
#: stalled, so that the member sees that when it goes on.
TURN, STALLED = "turn", "stalled"
_MEMBER, _GONE = "member/", "gone/"


class Session(NamedTuple):
    """A session of a server: its process, and when that began.

    Microseconds since the epoch by the server's clock; None where it may not be seen.
    """

    pid: int
    began: int | None


def dump(value: object) -> str:
    """Return a value as the text of a row."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Terms:
    """What all members of a ledger have to agree on."""

    capacity: int
    soft_limit: int
    max_limit: int
    idle_timeout: float
    reallocation_interval: float

    def limits(self, quarantined: int) -> Limits:
        """Return the numbers for the allocation."""
        slots = max(self.capacity - quarantined, 0)
        return Limits(slots, self.soft_limit, self.max_limit)

    def differences(self, other: Terms) -> str:
        """Return ``capacity=20 soft_limit=10``: our side of what differs."""
        ours, theirs = asdict(self), asdict(other)
        return " ".join(f"{k}={v:g}" for k, v in ours.items() if v != theirs[k])


@dataclass(frozen=True, slots=True)
class Meta:
    """The row of which there is one."""

    terms: Terms
    #: Numbers of members and places in lines are never given twice.
    next_number: int = 1
    next_place: int = 1

    @property
    def text(self) -> str:
        return dump({"protocol": PROTOCOL, **asdict(self)})

    @classmethod
    def parse(cls, text: str) -> Meta:
        """:raises LedgerError: if a later version has written it."""
        row = json.loads(text)
        if row["protocol"] > PROTOCOL:
            raise LedgerError(
                f"the ledger is of protocol version {row['protocol']}, and this "
                f"process knows {PROTOCOL}: it runs an older sqla_fairpool than "
                f"another member; use the same version everywhere"
            )
        terms = Terms(**{name: row["terms"][name] for name in Terms.__slots__})
        return cls(terms, row["next_number"], row["next_place"])


@dataclass(frozen=True, slots=True)
class Member:
    """A process that takes part."""

    number: int
    #: For people: host, pid, program, since when.
    who: Mapping[str, Any] = field(default_factory=dict)
    owned: int = 0
    #: Rises with each row that the member writes: a sign that it answers.
    beat: int = 0
    #: It knows that others go short, and what it wants is written exactly.
    pressed: bool = False
    #: It was asked for something and did not answer; written by others.
    stalled: bool = False
    lines: Mapping[str, Line] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return dump(
            {
                "number": self.number,
                "who": self.who,
                "owned": self.owned,
                "beat": self.beat,
                "pressed": self.pressed,
                "stalled": self.stalled,
                "tags": {tag: [*line] for tag, line in self.lines.items()},
            }
        )


# Of many members' rows few change between two looks.
@lru_cache(maxsize=4096)
def parse_member(text: str) -> Member:
    row = json.loads(text)
    return Member(
        row["number"],
        row["who"],
        row["owned"],
        row["beat"],
        row["pressed"],
        row["stalled"],
        {tag: Line(*line[:5]) for tag, line in row["tags"].items()},
    )


@dataclass(frozen=True, slots=True)
class Gone:
    """Slots of a member that is gone, while it may still have connections open."""

    slots: int
    why: str
    who: Mapping[str, Any] = field(default_factory=dict)
    #: Whose slots they were.
    member: str = ""
    #: Unlike any other's: a number may go and come back more than once.
    stamp: int = 0

    @property
    def text(self) -> str:
        return dump(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Gone:
        row = json.loads(text)
        return cls(**{name: row[name] for name in cls.__slots__})


def member_key(member: str) -> str:
    """Return the key of a member's row."""
    return _MEMBER + member


def gone_key(number: int) -> str:
    """Return the key of a member's quarantine."""
    return f"{_GONE}{number}"


def members_in(rows: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the members' ids and rows, sorted: nothing may depend on the store."""
    for key in sorted(rows):
        if key.startswith(_MEMBER):
            yield key.removeprefix(_MEMBER), rows[key]


def gone_in(rows: Mapping[str, str]) -> Iterator[tuple[int, Gone]]:
    """Yield the numbers of those in quarantine, and their rows."""
    for key in sorted(rows):
        if key.startswith(_GONE):
            yield int(key.removeprefix(_GONE)), Gone.parse(rows[key])
