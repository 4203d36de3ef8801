"""What the ledger raises: what an operator has to mend."""

from __future__ import annotations

from sqlalchemy import exc

__all__ = ["LedgerError", "TermsDiffer"]


class LedgerError(exc.InvalidRequestError):
    """The ledger cannot be used as it is configured; trying again does not help."""


class TermsDiffer(LedgerError):  # noqa: N818  (says what is so)
    """Another member of the ledger has other limits than this process."""
