"""HikariCP's connection cycle: 32 threads take and return one of 16 connections.

    python benchmarks/styles/hikaricp_cycle.py

Nothing is held: it is all pool. HikariCP tells cycles per millisecond; its issue
1232 adds what users met, the slowest of a thousand.
"""

from __future__ import annotations

from common import tell

from sqla_fairpool.bench.stage import Stage
from sqla_fairpool.bench.styles import hikaricp

if __name__ == "__main__":
    tell(hikaricp(Stage()))
