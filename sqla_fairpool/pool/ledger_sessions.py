"""How a pool becomes the member of a ledger."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import URL
from sqlalchemy.pool import Pool
from sqlalchemy.util import greenlet_spawn

from ..ledger.addresses import make_store, needs_database
from ..ledger.host import HostStore
from ..ledger.keeper import Keeper
from ..ledger.postgres import PostgresStore
from ..ledger.rows import Session, Terms
from ..ledger.watch import Present, identify, look, other_ledgers
from ..scheduling.tags import ALL
from ..scheduling.ticket import GRANTED
from ..stats import TagStats, encode
from .core import PoolCore
from .endings import SocketCopy
from .ledger_member import LedgerMember
from .physical import PhysicalConnection, driver_of
from .snapshot import snapshot

_log = logging.getLogger(__name__)

#: Most seconds that are waited for the end of a session in which the server was asked.
_GOODBYE = 0.5


def join_ledger(
    pool: Pool, core: PoolCore, member: LedgerMember, url: URL | None = None
) -> None:
    """Let a pool share the slots of its ledger.

    :param url: the pool's database; None before the engine has told it, and then
      nothing happens if the ledger's address follows from it.
    """
    ledger = core.options.ledger
    assert ledger is not None
    if member.keeper is not None or (url is None and needs_database(ledger)):
        return
    store = make_store(ledger, url)
    sessions = _Sessions(pool, store, member)
    terms = Terms(**core.options.terms)
    figures = partial(_figures, weakref.ref(core))
    leads = core.options.on_other_terms == "lead"
    member.keeper = Keeper(
        store, terms, member, sessions.look, figures=figures, leads=leads
    )
    member.can_lose_slots = store.can_lose_sign
    sessions.listen(core)


def _figures(ref: weakref.ref[PoolCore]) -> dict[str, Any]:
    """Return what a process says of itself to monitors."""
    core = ref()
    if core is None:
        return {}
    stats = snapshot(core)
    tags, everything = stats.tags, stats.paused_for is not None
    silent = set(core.announced).difference(row.name for row in tags)
    return {
        "size": core.options.pool_size,
        "open": core.lock.run(lambda now: core.slots.there()),
        "paused": [*[ALL][:everything], *stats.paused_tags],
        "detached": core.slots.existing.detached(),
        "tags": encode([*tags, *map(TagStats, sorted(silent))]),
    }


def announce(pool: Any, tags: Collection[str]) -> None:
    """Have tags in the figures of all processes before any caller has asked.

    :param pool: one of ours.
    """
    core: PoolCore = pool._core
    core.announced.update(dict.fromkeys(tags))
    member = core.member
    if tags and isinstance(member, LedgerMember) and member.keeper is not None:
        member.keeper.post(lambda joined: None)


class _Sessions:
    """Finds out what the server calls a pool's connections, and which others it has."""

    def __init__(
        self, pool: Pool, store: HostStore | PostgresStore, member: LedgerMember
    ) -> None:
        self._pool = weakref.ref(pool)
        self._store = store
        self._member = member
        # The connection that shows which ledger is used here; others need not.
        self._shown_by: Callable[[], PhysicalConnection | None] = lambda: None
        self._warned_of: set[int] = set()

    def listen(self, core: PoolCore) -> None:
        """Have each new connection known to the ledger before it is used."""
        pool: Any = self._pool()
        if self._on_postgresql() and pool._dialect.dbapi is not None:
            # An interruption, a time limit's exception say, may leave a session behind.
            driver = pool._dialect.loaded_dbapi.Error
            core.slots.existing.failures = (driver, OSError, exc.SQLAlchemyError)

        @event.listens_for(pool, "connect")
        def connected(dbapi_connection: Any, record: Any) -> None:
            if self._on_postgresql():
                self._identify(dbapi_connection, record.fair.physical)
            # A new record's is known when it is made: SQLAlchemy has the first ones of
            # an engine connect one after the other up to here.
            if record.fair.checkout.state is GRANTED:
                self._member.after_opening(record.fair.physical)

    def _on_postgresql(self) -> bool:
        pool: Any = self._pool()
        return getattr(pool and pool._dialect, "name", None) == "postgresql"

    def _identify(self, dbapi_connection: Any, physical: PhysicalConnection) -> None:
        """Ask the server which of its sessions this is, over the connection itself."""
        member, store = self._member, self._store
        pid = _backend_pid(dbapi_connection)
        if pid is not None:
            # As far as it is known: the connection may be lost before it is asked.
            physical.session = Session(pid, None)
        # If this fails the connection is closed, so nothing is tidied up then.
        cursor = dbapi_connection.cursor()
        sign, signed_at = 0, None
        if isinstance(store, PostgresStore):
            sign, signed_at = store.sign, store.server
        server, session, stands = identify(cursor, pid, sign)
        if member.server_name is None:
            member.server_name = server
        if signed_at == server and not stands:
            raise member.unconfirmed("its sign of life is gone at the server")
        if isinstance(store, PostgresStore):
            store.serves_pool = stands
        shown_by = self._shown_by()
        if store.key and (shown_by is None or shown_by.ending):
            self._shown_by = weakref.ref(physical)
            self._warn_of(other_ledgers(cursor, store.key))
        physical.session = session
        cursor.close()
        dbapi_connection.rollback()

    def _warn_of(self, others: Collection[int]) -> None:
        if not self._warned_of.issuperset(others):
            self._warned_of.update(others)
            _log.warning(
                "the database is used with the ledger %s here and with %d other "
                "ledger(s) elsewhere: each allows as many connections as it has slots",
                self._store.name,
                len(others),
            )

    def look(self, server: str | None) -> Present | None:
        """Return the sessions that a server has; None if it cannot be asked.

        Where the ledger is not on that server, this takes a connection beside the
        budget for a moment, while there are slots in quarantine.
        """
        pool: Any = self._pool()
        if pool is None or not self._on_postgresql():
            return None
        store = self._store
        if isinstance(store, PostgresStore) and store.server == server is not None:
            return store.look()
        if pool._dialect.is_async:
            return asyncio.run(greenlet_spawn(self._look_through, pool))
        return self._look_through(pool)

    @staticmethod
    def _look_through(pool: Any) -> Present:
        connection = pool.open_another()
        line = SocketCopy.of(driver_of(connection))
        try:
            cursor = connection.cursor()
            try:
                return look(cursor)
            finally:
                cursor.close()
        finally:
            connection.close()
            if line is not None:  # the next one is opened when this one is over
                line.hang_up()
                line.look(_GOODBYE)
                line.close()


def _backend_pid(dbapi_connection: Any) -> int | None:
    """Return the server process as the driver knows it, None if it tells nothing."""
    driver = driver_of(dbapi_connection)
    if hasattr(driver, "get_server_pid"):  # asyncpg
        return int(driver.get_server_pid())
    pid = getattr(getattr(driver, "info", None), "backend_pid", None)
    return None if pid is None else int(pid)
