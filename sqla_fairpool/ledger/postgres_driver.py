"""How the PostgreSQL store uses its drivers, psycopg2 and psycopg."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from .store import StoreAway

__all__ = [
    "Heard",
    "first_line",
    "listen",
    "make_engine",
    "notifications",
    "sqlstate",
]

#: For libpq, unless the URL has others: a network that is cut is noticed within 10
#: seconds, by probes or by what is sent and not acknowledged (milliseconds).
_KEEPALIVES = {
    "keepalives": 1,
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

#: Seconds.
_CONNECT_TIMEOUT = 5


def make_engine(url: URL) -> Engine:
    """Return what makes connections to the ledger's database."""
    keepalives = {k: v for k, v in _KEEPALIVES.items() if k not in url.query}
    return create_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={
            **keepalives,
            "connect_timeout": _CONNECT_TIMEOUT,
            "application_name": "sqla_fairpool ledger",
        },
    )


class Heard(NamedTuple):
    """A notification."""

    channel: str
    payload: str
    pid: int


def listen(connection: Any, inbox: list[Heard]) -> None:
    """Have the notifications kept that come in while a statement runs."""
    if hasattr(connection, "add_notify_handler"):
        # psycopg gives them to nobody else.
        connection.add_notify_handler(
            lambda n: inbox.append(Heard(n.channel, n.payload, n.pid))
        )


def notifications(connection: Any, inbox: list[Heard]) -> list[Heard]:
    """Return the notifications that have come.

    :raises Exception: what the driver raises if the connection is lost.
    """
    heard = list(inbox)
    inbox.clear()
    if hasattr(connection, "poll"):  # psycopg2
        connection.poll()
        if connection.closed:
            raise StoreAway("the server has closed the connection")
        heard += [Heard(n.channel, n.payload, n.pid) for n in connection.notifies]
        connection.notifies.clear()
        return heard
    connection.pgconn.consume_input()
    while (n := connection.pgconn.notifies()) is not None:
        heard.append(Heard(n.relname.decode(), n.extra.decode(), n.be_pid))
    return heard


def sqlstate(error: object) -> str | None:
    """Return the SQLSTATE of a driver's error."""
    # psycopg has the one, psycopg2 the other.
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def first_line(error: object) -> str:
    """Return what an error says first."""
    return str(error).strip().partition("\n")[0]
