"""What the pool raises, all of it below :class:`sqlalchemy.exc.TimeoutError`."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import exc

__all__ = ["CheckoutTimeout", "TooManyWaiting"]

#: Holders named in a message; the others are summed up. Six fit on a line.
_HOLDERS_NAMED = 6


class CheckoutTimeout(exc.TimeoutError):
    """A checkout waited for as long as the pool's ``timeout`` and got nothing.

    .. attribute:: tag

       the tag that waited.

    .. attribute:: waited

       seconds it waited.
    """

    __module__ = "sqla_fairpool"

    def __init__(self, message: str, tag: str, waited: float) -> None:
        super().__init__(message)
        self.tag = tag
        self.waited = waited

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.tag, self.waited)


class TooManyWaiting(exc.TimeoutError):
    """A checkout was refused at once: ``max_waiting`` callers wait already.

    .. attribute:: tag

       the tag that was refused.
    """

    __module__ = "sqla_fairpool"

    def __init__(self, message: str, tag: str) -> None:
        super().__init__(message)
        self.tag = tag

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.tag)


def describe_holders(holders: Sequence[tuple[str, int]]) -> str:
    """Return ``held by web=12 jobs=6``, the largest holders first."""
    ordered = sorted((h for h in holders if h[1]), key=lambda h: (-h[1], h[0]))
    if not ordered:
        return "held by nobody"
    named = [f"{tag}={in_use}" for tag, in_use in ordered[:_HOLDERS_NAMED]]
    rest = ordered[_HOLDERS_NAMED:]
    if rest:
        named.append(f"and {len(rest)} more tags={sum(n for _, n in rest)}")
    return "held by " + " ".join(named)
