"""The ledger's rows, as text and as objects. Fields that are not known are ignored.

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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from types import NoneType
from typing import Any, ClassVar, NamedTuple, TypeVar

from typing_extensions import Self

from ..scheduling.limits import LimitsByTag, TagLimits
from .allocation import Limits, Line
from .errors import LedgerError, RowBroken

__all__ = [
    "DUE",
    "META",
    "PROTOCOL",
    "TAGS",
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

META, TAGS, DUE, MEMBER, GONE = "meta", "tags", "due", "member/", "gone/"

#: Fields that rows of the protocol's first version do not have.
_LATER = frozenset({"sessions", "unasked", "server", "fresh"})


def member_key(member: str) -> str:
    """Return the key of a member's row."""
    return MEMBER + member


def gone_key(number: int) -> str:
    """Return the key of a quarantine's row."""
    return f"{GONE}{number}"


def dump(value: object) -> str:
    """Return a value as the text of a row."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=asdict)


# -- reading ---------------------------------------------------------------------------

_T = TypeVar("_T")
_Check = Callable[[Any], Any]


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


def _of(*kinds: type) -> _Check:
    def check(value: Any) -> Any:
        # Not isinstance(): to Python, true is a number.
        if type(value) not in kinds:
            raise TypeError(f"{value!r} is of the wrong type")
        return value

    return check


def _each(check: _Check) -> _Check:
    return lambda row: {name: check(value) for name, value in _object(row).items()}


_int, _bool, _str, _object, _list = map(_of, (int, bool, str, dict, list))
_number, _int_or_none, _str_or_none = (
    _of(int, float),
    _of(int, NoneType),
    _of(str, NoneType),
)

#: Parse the places in the line of tags; the members that are due, and why.
counts: Callable[[Any], dict[str, int]] = _each(_int)
words: Callable[[Any], dict[str, str]] = _each(_str)


def _line(values: Any) -> Line:
    checks = (_int, _int, _bool, _int, _int)
    pairs = zip(checks, _list(values)[:5], strict=True)
    return Line(*(check(value) for check, value in pairs))


def _sessions(values: Any) -> tuple[Session, ...]:
    return tuple(Session(_int(pid), _int_or_none(began)) for pid, began in values)


def _terms(row: Any) -> Terms:
    numbers = {name: _number(row[name]) for name in Terms.__slots__ if name != "tags"}
    tags = _str(row.get("tags", ""))
    limits_of_tags(tags)
    return Terms(**numbers, tags=tags)


@lru_cache(maxsize=16)
def limits_of_tags(text: str) -> LimitsByTag:
    """Return what :attr:`Terms.tags` says."""
    given = json.loads(text) if text else {}
    return LimitsByTag({tag: TagLimits(**own) for tag, own in given.items()})


def _protocol(version: Any) -> int:
    if _int(version) > PROTOCOL:
        raise LedgerError(
            f"the ledger is of protocol version {version}, and this process knows "
            f"{PROTOCOL}: it runs an older sqla_fairpool than another member; use the "
            "same version everywhere"
        )
    return int(version)


class _Row:
    """An object in a row: its fields in the order of writing, and their checks."""

    __slots__ = ()
    FIELDS: ClassVar[Mapping[str, _Check]]

    @property
    def text(self) -> str:
        return dump({name: getattr(self, name) for name in self.FIELDS})

    @classmethod
    def parse(cls, row: Any) -> Self:
        return cls(
            **{
                name: check(row[name])
                for name, check in cls.FIELDS.items()
                if name in _object(row) or name not in _LATER
            }
        )


# -- what there is in the rows ---------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Terms:
    """What all members of a ledger have to agree on."""

    capacity: int
    soft_limit: int
    max_limit: int
    idle_timeout: float
    reallocation_interval: float
    #: The limits of tags that have their own, as JSON in one way of writing.
    tags: str = ""

    @staticmethod
    def text_of(tags: Mapping[str, TagLimits] | None) -> str:
        """Return what stands in `tags`."""
        return json.dumps(tags, default=asdict, sort_keys=True) if tags else ""

    def limits(self, quarantined: int) -> Limits:
        """Return the numbers for the allocation."""
        slots = max(self.capacity - quarantined, 0)
        tags = limits_of_tags(self.tags)
        return Limits(slots, self.soft_limit, self.max_limit, tags)

    def differences(self, other: Terms) -> str:
        """Return ``capacity=20 soft_limit=10``: our side of what differs."""
        ours, theirs = asdict(self), asdict(other)
        return " ".join(
            f"{k}={v or '{}'}" if isinstance(v, str) else f"{k}={v:g}"
            for k, v in ours.items()
            if v != theirs[k]
        )


@dataclass(frozen=True, slots=True)
class Meta(_Row):
    """The row of which there is one."""

    FIELDS = {  # noqa: RUF012  (the base says that it is of the class)
        "protocol": _protocol,
        "terms": _terms,
        "next_number": _int,
        "next_place": _int,
        "server": _str_or_none,
        "fresh": _bool,
    }

    terms: Terms
    #: Numbers of members and places in lines are never given twice.
    next_number: int = 1
    next_place: int = 1
    #: Identity of the server in which the members' sessions are, once it is known.
    server: str | None = None
    #: The rows were made anew, and there may be members that are in no row of theirs.
    fresh: bool = False
    protocol: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Member(_Row):
    """A process that takes part."""

    FIELDS = {  # noqa: RUF012
        "number": _int,
        "who": _object,
        "owned": _int,
        "beat": _int,
        "pressed": _bool,
        "stalled": _bool,
        "tags": _each(_line),
        "sessions": _sessions,
        "unasked": _str_or_none,
    }

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
    tags: Mapping[str, Line] = field(default_factory=dict)
    #: Its sessions at the server, as far as it had posted them.
    sessions: tuple[Session, ...] = ()
    #: Why it cannot ask the server for sessions, if it has tried in vain.
    unasked: str | None = None


# Of many members' rows few change between two looks.
@lru_cache(maxsize=2048)
def parse_member(key: str, text: str) -> Member:
    """Return a member's row."""
    return read(member_key(key), text, Member.parse)


@dataclass(frozen=True, slots=True)
class Gone(_Row):
    """Slots for which a connection may be open, though no member answers for it."""

    FIELDS = {  # noqa: RUF012
        "slots": _int,
        "why": _str,
        "who": _object,
        "member": _str,
        "stamp": _int,
        "sessions": _sessions,
    }

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
