"""What the ledger raises: what an operator has to mend."""

from __future__ import annotations

from sqlalchemy import exc

from ..documented import Documented


class LedgerError(Documented, exc.InvalidRequestError):
    """The ledger cannot be used as it is configured; trying again does not help."""

    page = "ledgererror"


class ServerDiffers(LedgerError):  # noqa: N818  (says what is so)
    """The connections of other members go to another database server."""

    page = "serverdiffers"


class RowBroken(LedgerError):  # noqa: N818  (says what is so)
    """The ledger holds something that no member has written."""

    page = "rowbroken"
