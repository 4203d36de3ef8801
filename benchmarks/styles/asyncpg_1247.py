"""asyncpg's issue 1247: 100 tasks on 10 connections, 200 ms hold.

    python benchmarks/styles/asyncpg_1247.py postgresql://user@host/database

A fair pool serves each task every two seconds.
"""

from __future__ import annotations

import sys

from common import tell
from sqlalchemy import make_url

from sqla_fairpool.bench.stage import Place, Stage
from sqla_fairpool.bench.styles import asyncpg_1247

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    url = make_url(sys.argv[1]).set(drivername="postgresql+psycopg2")
    tell(asyncpg_1247(Stage(place=Place(url))))
