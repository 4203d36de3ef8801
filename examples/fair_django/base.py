"""Django's backend for PostgreSQL, with its connections from a FairQueuePool.

Copy this folder into a project, and name it in the settings:

    DATABASES = {"default": {"ENGINE": "fair_django", "NAME": "app", ...,
                             "OPTIONS": {"fairpool": {"pool_size": 20}}}}

Django asks for a connection at the first query of a request, and closes it when the
request has ended: here it is returned to the pool. So leave CONN_MAX_AGE at 0.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from django.db.backends.postgresql import base
from sqlalchemy.pool import PoolProxiedConnection

from sqla_fairpool import FairQueuePool

#: By the alias of the database.
pools: dict[str, FairQueuePool] = {}
_lock = threading.Lock()


class DatabaseWrapper(base.DatabaseWrapper):
    """What a thread of Django uses as its connection."""

    _checked_out: PoolProxiedConnection

    def get_connection_params(self) -> dict[str, Any]:
        parameters: dict[str, Any] = super().get_connection_params()
        parameters.pop("fairpool", None)  # the driver does not know it
        return parameters

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        with _lock:
            if self.alias not in pools:
                connect = functools.partial(super().get_new_connection, conn_params)
                options = self.settings_dict["OPTIONS"].get("fairpool", {})
                pools[self.alias] = FairQueuePool(connect, **options)
        self._checked_out = pools[self.alias].connect()
        return self._checked_out.dbapi_connection

    def _close(self) -> None:
        if self.connection is not None:
            if self.errors_occurred and not self.is_usable():
                self._checked_out.invalidate()
            self._checked_out.close()
