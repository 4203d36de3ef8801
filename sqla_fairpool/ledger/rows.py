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

A row is one of the dataclasses here in JSON, a named tuple in it a list. The types of
the fields are checked when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from typing import (
    Any,
    NamedTuple,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from ..scheduling.ticket import LimitsByTag, TagLimits
from .store import LedgerError, RowBroken

#: Version of the rows' meaning. Members refuse a ledger with a higher one, and raise
#: a lower one when they join and no other member lives.
PROTOCOL = 3

META, TAGS, DUE, MEMBER, GONE = "meta", "tags", "due", "member/", "gone/"
#: Why slots of a living member are in quarantine.
LOST = "lost connections"
#: Fields that rows of earlier versions of the protocol do not have.
_LATER = frozenset(
    {
        *("sessions", "unasked", "server", "fresh", "tags", "set_by"),
        *("kept", "used", "pauses", "granted"),
    }
)

_T = TypeVar("_T")


def member_key(member: str) -> str:
    return MEMBER + member


def dump(value: object) -> str:
    """Return a value as the text of a row."""
    return json.dumps(
        value, separators=(",", ":"), ensure_ascii=False, default=_by_field
    )


def _by_field(value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value)}


def read(key: str, text: str | None, kind: type[_T]) -> _T:
    """Return what a row says; a missing row is an empty object.

    :param kind: what it is: a dataclass of this file, or a dict.
    :raises RowBroken: if it is not what a member has written.
    """
    try:
        row = {} if text is None else json.loads(text)
        if kind is Meta and row["protocol"] > PROTOCOL:
            raise LedgerError(
                f"the ledger is of protocol version {row['protocol']}, and this "
                f"process knows {PROTOCOL}: it runs an older sqla_fairpool than "
                "another member; use the same version everywhere"
            )
        found: _T = _reader(cast(Any, kind))(row)
        return found
    except (ValueError, LookupError, TypeError) as error:
        raise RowBroken(
            f"the ledger's row {key!r} cannot be read ({type(error).__name__}): stop "
            "all members, then run `sqla-fairpool ledger reset`"
        ) from None


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return what makes a value of a type of what JSON has for it."""
    origin, kinds = get_origin(kind), get_args(kind)
    if hasattr(kind, "__dataclass_fields__"):
        named = _field_readers(kind)
        return lambda row: kind(
            **{n: r(row[n]) for n, r in named.items() if n in row or n not in _LATER}
        )
    if origin in (dict, Mapping):
        of = _reader(kinds[1])
        return lambda row: {n: of(v) for n, v in _checked(row, (dict,)).items()}
    if origin is tuple:
        of = _reader(kinds[0])
        return lambda row: tuple(map(of, _checked(row, (list,))))
    if hasattr(kind, "_fields"):
        named = _field_readers(kind)
        later = [read_one for name, read_one in named.items() if name in _LATER]
        first = [*named.values()][: len(named) - len(later)]
        return lambda row: kind(
            *(
                r(v)
                for r, v in zip(
                    first, _checked(row, (list,))[: len(first)], strict=True
                )
            ),
            *(r(v) for r, v in zip(later, row[len(first) :], strict=False)),
        )
    allowed = (int, float) if kind is float else kinds or (kind,)
    return lambda value: value if kind is Any else _checked(value, allowed)


def _field_readers(kind: Any) -> dict[str, Callable[[Any], Any]]:
    return {name: _reader(hint) for name, hint in get_type_hints(kind).items()}


def _checked(value: Any, allowed: tuple[type, ...]) -> Any:
    # Not isinstance(): to Python, true is a number.
    if type(value) not in allowed:
        raise TypeError(f"{value!r} is of the wrong type")
    return value


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


class TagDemand(NamedTuple):
    """What a process wants under one tag, and in its row: where it stands."""

    #: The most at once since this was asked last.
    in_use: int = 0
    waiting: int = 0
    active: bool = False
    #: Its place among the tag's members, and the tag's ceiling as far as it knows.
    place: int = 0
    limit: int = 0
    #: Slots that its process owns and that only the tag may use: of its reserve.
    kept: int = 0
    #: What it has used lately: connection-seconds that decay.
    used: float = 0.0

    @property
    def wants(self) -> int:
        return self.in_use + self.waiting


@lru_cache(maxsize=16)
def limits_of_tags(text: str) -> LimitsByTag:
    """Return what :attr:`Terms.tags` says."""
    given = json.loads(text) if text else {}
    return LimitsByTag({tag: TagLimits(**own) for tag, own in given.items()})


class Limits(NamedTuple):
    """The numbers of the rules."""

    #: Slots to be divided: without those in quarantine.
    capacity: int
    soft_limit: int
    max_limit: int
    tags: LimitsByTag = LimitsByTag({})


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


class _Row:
    __slots__ = ()

    @property
    def text(self) -> str:
        return dump(self)


@dataclass(frozen=True, slots=True)
class Meta(_Row):
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
    #: For people: who has set the terms, and since when they are in force.
    set_by: Mapping[str, Any] = field(default_factory=dict)
    #: By tag, or under `ALL`: who has paused it, likewise.
    pauses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Member(_Row):
    """A process that takes part."""

    number: int
    #: For people: host, pid, program, since when.
    who: Mapping[str, Any] = field(default_factory=dict)
    owned: int = 0
    #: Of these what others have given it and it has not seen: they may take it back.
    granted: int = 0
    #: Rises with each row that the member writes: a sign that it answers.
    beat: int = 0
    #: It knows that others go short, and what it wants is written exactly.
    pressed: bool = False
    #: It was asked for something and did not answer; written by others.
    stalled: bool = False
    tags: Mapping[str, TagDemand] = field(default_factory=dict)
    #: Its sessions at the server, as far as it had posted them.
    sessions: tuple[Session, ...] = ()
    #: Why it cannot ask the server for sessions, if it has tried in vain.
    unasked: str | None = None

    def given(self, more: int) -> Member:
        """Return it with slots that others give it; less than 0: take them back."""
        owned, granted = self.owned + more, self.granted + more
        return replace(self, owned=owned, granted=granted)

    @property
    def kept(self) -> int:
        """Of its slots those that only one tag may use."""
        return sum(line.kept for line in self.tags.values())


# Of many members' rows few change between two looks.
@lru_cache(maxsize=2048)
def parse_member(key: str, text: str) -> Member:
    return read(member_key(key), text, Member)


@dataclass(frozen=True, slots=True)
class Gone(_Row):
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


class Left(NamedTuple):
    """What is left of a quarantine, after the server was asked."""

    #: As it was before that.
    gone: Gone
    sessions: tuple[Session, ...]
    slots: int

    @property
    def is_less(self) -> bool:
        return self.slots < self.gone.slots or self.sessions != self.gone.sessions
