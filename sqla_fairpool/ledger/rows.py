"""The ledger's rows, as text and as objects. Unknown fields are left out.

=================  ===========================================================
key                what
=================  ===========================================================
``meta``           protocol version, terms, counters
``tags``           the tags' places in the line of tags
``due``            members that are expected to look, and why
``member/<id>``    one member: its slots, its demand by tag
``gone/<number>``  slots in quarantine: a server session may have them still
=================  ===========================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

from .allocation import Limits, Line
from .errors import LedgerError, RowBroken

__all__ = [
    "DUE",
    "META",
    "PROTOCOL",
    "STALLED",
    "TAGS",
    "TURN",
    "Gone",
    "Left",
    "Member",
    "Meta",
    "Session",
    "Terms",
    "among",
]

#: Version of the rows' meaning. Members refuse a ledger with a higher one, and raise
#: a lower one when they join and no other member lives.
PROTOCOL = 2

META, TAGS, DUE = "meta", "tags", "due"

#: Two of the reasons in ``due``: asked to yield a place in a line; and written down as
#: stalled, so that the member sees that when it goes on.
TURN, STALLED = "turn", "stalled"
_MEMBER, _GONE = "member/", "gone/"


_T = TypeVar("_T")


def dump(value: object) -> str:
    """Return a value as the text of a row."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def read(key: str, text: str | None, parse: Callable[[Any], _T]) -> _T:
    """Return what a row says.

    :param parse: makes it from the decoded JSON; a missing row is an empty object.
    :raises RowBroken: if it is not what a member has written.
    """
    try:
        return parse({} if text is None else json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RowBroken(
            f"the ledger's row {key!r} cannot be read ({type(error).__name__}): stop "
            "all members, then run `sqla-fairpool ledger reset`"
        ) from None


def _is(value: Any, *kinds: type) -> Any:
    # Not isinstance(): to Python, true is a number.
    if type(value) not in kinds:
        raise TypeError(f"{value!r} is of the wrong type")
    return value


def _whole(row: Mapping[str, Any], name: str) -> int:
    number: int = _is(row[name], int)
    return number


def counts(row: Any) -> dict[str, int]:
    """Parse the places in the line of tags."""
    return {name: _whole(row, name) for name in _is(row, dict)}


def words(row: Any) -> dict[str, str]:
    """Parse who is due, and why."""
    return {name: _is(word, str) for name, word in _is(row, dict).items()}


class Session(NamedTuple):
    """A session at the database server: by its process, and when that began.

    The number of a process is given again after a while, with another beginning.
    """

    pid: int
    #: Microseconds since 1970 by the server's clock; None if it is not to be seen.
    began: int | None


def among(sessions: Iterable[Session], there: Iterable[Session]) -> list[Session]:
    """Return those of `sessions` that are, or may be, in `there`."""
    began: dict[int, set[int | None]] = {}
    for pid, when in there:
        began.setdefault(pid, set()).add(when)
    return [
        session
        for session in sessions
        if (known := began.get(session.pid)) is not None
        and (session.began is None or None in known or session.began in known)
    ]


def in_order(sessions: Iterable[Session]) -> tuple[Session, ...]:
    """Return sessions as they stand in a row."""
    return tuple(sorted(set(sessions), key=lambda s: (s.pid, s.began or 0)))


def _sessions(row: Mapping[str, Any]) -> tuple[Session, ...]:
    return tuple(
        Session(_is(pid, int), _is(began, int, type(None)))
        for pid, began in row.get("sessions", ())  # a lower version wrote none
    )


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
    #: Identity of the server in which the members' sessions are, once it is known.
    server: str | None = None
    #: The rows were made anew, and there may be members that are in no row of theirs.
    fresh: bool = False
    protocol: int = PROTOCOL

    @property
    def text(self) -> str:
        return dump(asdict(self))

    @classmethod
    def parse(cls, row: Any) -> Meta:
        """:raises LedgerError: if a later version has written it."""
        protocol = _whole(row, "protocol")
        if protocol > PROTOCOL:
            raise LedgerError(
                f"the ledger is of protocol version {protocol}, and this "
                f"process knows {PROTOCOL}: it runs an older sqla_fairpool than "
                f"another member; use the same version everywhere"
            )
        terms = {name: _is(row["terms"][name], int, float) for name in Terms.__slots__}
        return cls(
            Terms(**terms),
            _whole(row, "next_number"),
            _whole(row, "next_place"),
            _is(row.get("server"), str, type(None)),
            _is(row.get("fresh", False), bool),
            protocol,
        )


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
    #: Its sessions at the server, as far as it had posted them.
    sessions: tuple[Session, ...] = ()
    #: Why it cannot ask the server for sessions, if it has tried in vain.
    unasked: str | None = None

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
                "sessions": self.sessions,
                "unasked": self.unasked,
            }
        )

    @classmethod
    def parse(cls, row: Any) -> Member:
        return cls(
            _whole(row, "number"),
            _is(row["who"], dict),
            _whole(row, "owned"),
            _whole(row, "beat"),
            _is(row["pressed"], bool),
            _is(row["stalled"], bool),
            {tag: _line(line) for tag, line in row["tags"].items()},
            _sessions(row),
            _is(row.get("unasked"), str, type(None)),
        )


def _line(values: Any) -> Line:
    in_use, waiting, active, place, limit = _is(values, list)[:5]
    for number in (in_use, waiting, place, limit):
        _is(number, int)
    return Line(in_use, waiting, _is(active, bool), place, limit)


# Of many members' rows few change between two looks, so they are kept. What is kept
# takes some ten times as much memory as the texts.
_CACHED = 1_000_000  # characters
_cache: dict[str, Member] = {}
_cached = 0


def parse_member(key: str, text: str) -> Member:
    """Return a member's row."""
    global _cached
    member = _cache.get(text)
    if member is None:
        member = read(member_key(key), text, Member.parse)
        _cached += len(text)
        if _cached > _CACHED:
            _cache.clear()
            _cached = len(text)
        _cache[text] = member
    return member


@dataclass(frozen=True, slots=True)
class Gone:
    """Slots for which a connection may be open, though no member answers for it."""

    #: How many; in general not less than there are sessions in the row.
    slots: int
    why: str
    who: Mapping[str, Any] = field(default_factory=dict)
    #: Whose slots they were.
    member: str = ""
    #: Unlike any other's: a number may go and come back more than once.
    stamp: int = 0
    #: The server sessions among them that are known.
    sessions: tuple[Session, ...] = ()

    @property
    def unposted(self) -> int:
        """Slots of which no session is known."""
        return max(self.slots - len(self.sessions), 0)

    @property
    def text(self) -> str:
        return dump(asdict(self))

    @classmethod
    def parse(cls, row: Any) -> Gone:
        return cls(
            _whole(row, "slots"),
            _is(row["why"], str),
            _is(row["who"], dict),
            _is(row["member"], str),
            _whole(row, "stamp"),
            _sessions(row),
        )


class Left(NamedTuple):
    """What is left of a quarantine, after the server was asked."""

    #: As it was before that.
    gone: Gone
    sessions: tuple[Session, ...]
    slots: int

    @property
    def is_less(self) -> bool:
        """Tell if there is something to write down."""
        return self.slots < self.gone.slots or self.sessions != self.gone.sessions


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
            number = read(key, dump(key.removeprefix(_GONE)), int)
            yield number, read(key, rows[key], Gone.parse)
