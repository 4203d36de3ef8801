"""Errors whose messages end with the address of their page in the documentation.

Rules of this file: the address stands here and nowhere else, and a message stays on one
line. What is raised is of a class below :class:`Documented`.
"""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy import exc

#: Where the pages of the errors are.
PAGES = "https://github.com/sqla-fairpool/sqla-fairpool/blob/main/docs/reference/errors"


class Documented(Exception):  # noqa: N818  (a part of errors, none by itself)
    """An error that has a page. Its ``args[0]`` is the message without the address."""

    #: Name of the page.
    page: ClassVar[str]

    def __str__(self) -> str:
        address = f"{PAGES}/{self.page}.md"
        return f"{super().__str__()} (Background on this error at: {address})"


class BadArgument(Documented, exc.ArgumentError):
    """What the user gave cannot be used."""

    page = "argumenterror"


class BadState(Documented, exc.InvalidRequestError):
    """What was asked for is not possible now."""

    page = "invalidrequesterror"
