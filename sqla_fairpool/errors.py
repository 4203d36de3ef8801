"""What the pool raises, all of it below :class:`sqlalchemy.exc.TimeoutError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import exc

from .checks import Documented

if TYPE_CHECKING:
    from .diagnosis.report import Diagnosis

__all__ = ["CheckoutTimeout", "SelfDeadlock", "TooManyWaiting"]


class CheckoutTimeout(Documented, exc.TimeoutError):
    """A checkout waited for as long as it may and got nothing."""

    __module__ = "sqla_fairpool"
    page = "checkouttimeout"

    #: The tag that waited, and for how many seconds.
    tag: str
    waited: float
    #: Who has the connections, since when, and what could be done: what the message
    #: says, as data.
    diagnosis: Diagnosis | None

    def __init__(
        self, message: str, tag: str, waited: float, diagnosis: Diagnosis | None = None
    ) -> None:
        super().__init__(message)
        self.tag = tag
        self.waited = waited
        self.diagnosis = diagnosis

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.tag, self.waited, self.diagnosis)


class SelfDeadlock(CheckoutTimeout):
    """A checkout that waited for its own caller, and was refused.

    Every caller that could have returned a connection waited in the same way, when this
    one had waited for the option ``deadlock_timeout``.
    """

    __module__ = "sqla_fairpool"
    page = "selfdeadlock"


class TooManyWaiting(Documented, exc.TimeoutError):
    """A checkout was refused at once: ``max_waiting`` callers wait already."""

    __module__ = "sqla_fairpool"
    page = "toomanywaiting"

    #: The tag that was refused.
    tag: str

    def __init__(self, message: str, tag: str) -> None:
        super().__init__(message)
        self.tag = tag

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.tag)
