"""What the keeper asks of the pool in its process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from .errors import LedgerError
from .rows import Session

__all__ = ["Local", "State", "TagDemand", "condense"]

#: Tags of one process on the board. Tags may be made from user data; those beyond are
#: summed up under the name of none.
_MAX_TAGS = 256
_REST = ""


class TagDemand(NamedTuple):
    """What a process wants under one tag, now."""

    #: The most that were in use at once since this was asked last.
    in_use: int
    waiting: int
    active: bool

    @property
    def wants(self) -> int:
        """Its demand."""
        return self.in_use + self.waiting


class State(NamedTuple):
    """What the keeper has seen in the pool at one moment, see :class:`Local`."""

    open: int
    tags: Mapping[str, TagDemand]
    sessions: frozenset[Session]
    #: Of these the sessions are in `sessions` no more.
    lost: tuple[Session | None, ...]
    server: str | None

    @property
    def wants(self) -> bool:
        """Tell if there is a reason to be a member."""
        return bool(self.open) or any(want.wants for want in self.tags.values())

    @classmethod
    def of(cls, local: Local) -> State:
        """Look at a pool.

        The order matters: what is open is counted before, and what is lost in between
        has to be seen as lost, not to be missed.
        """
        open_, tags = local.demand()
        sessions = frozenset(local.sessions())
        lost = tuple(local.lost())
        return cls(open_, tags, sessions - frozenset(lost), lost, local.server())


class Local(Protocol):
    """The pool in this process. Called by the keeper's thread only."""

    def demand(self) -> tuple[int, Mapping[str, TagDemand]]:
        """Return the connections that are open, and what is wanted by tag.

        A connection counts as open from before it is opened until after it is closed,
        detached ones included. One that was in use since the last call counts as in
        use: else a moment between two checkouts would look like a fall of demand.
        """
        ...

    def sessions(self) -> Collection[Session]:
        """Return the server sessions that exist now, as far as they are known.

        One is known before it is used for anything but to learn that, and until it has
        ended.
        """
        ...

    def server(self) -> str | None:
        """Return the identity of the server where they are, None until it is known."""
        ...

    def lost(self) -> Sequence[Session | None]:
        """Return what cannot be told to have ended: the sessions, None where unknown.

        They are to be put into quarantine, and count as open until :meth:`buried`.
        """
        ...

    def buried(self, lost: Sequence[Session | None]) -> None:
        """Forget these, and lower the allotment by their number, in one step.

        Their slots are in quarantine now.
        """

    def allot(self, slots: int, ceilings: Mapping[str, int], other: int) -> None:
        """Open a connection only while there are less than `slots` from now on.

        Until the first call, that is none. Nothing that is checked out is taken away.
        The ceilings are by tag, `other` that of any tag not named.
        """

    def close_surplus(self) -> None:
        """Close idle connections above the allotment."""

    def freeze(self) -> None:
        """Open no connection any more, until the next :meth:`allot`.

        Those that are open may be used. One that is closed is not replaced.
        """

    def press(self, pressed: bool) -> None:
        """Ring from now on when a connection falls idle, or do not any more."""

    def refuse(self, error: LedgerError) -> None:
        """Raise this in those who wait now."""


def condense(demand: Mapping[str, TagDemand]) -> Mapping[str, TagDemand]:
    """Return the demand with a bounded number of tags."""
    if len(demand) <= _MAX_TAGS:
        return demand
    by_wants = sorted(demand, key=lambda tag: (-demand[tag].wants, tag))
    rest = [demand[tag] for tag in by_wants[_MAX_TAGS:]]
    named = {tag: demand[tag] for tag in by_wants[:_MAX_TAGS]}
    named[_REST] = TagDemand(
        sum(want.in_use for want in rest),
        sum(want.waiting for want in rest),
        any(want.active for want in rest),
    )
    return named
