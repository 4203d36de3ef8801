"""pg_doorman's spread: 500 clients on 40 connections, p99 over p50 of the waits.

    python benchmarks/styles/pg_doorman_spread.py

Its documentation has 1.08 for itself, 1.23 for PgBouncer and 25.5 for Odyssey, by
pgbench against a proxy. Here the clients are threads and the pool is in the process.
"""

from __future__ import annotations

from common import tell

from sqla_fairpool.bench.stage import Stage
from sqla_fairpool.bench.styles import pg_doorman

if __name__ == "__main__":
    tell(pg_doorman(Stage()))
