"""One with asyncio: 25 tasks.

DATABASE_URL=postgresql+psycopg2://app@localhost/app python layer3.py [SECONDS]
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg")
end = time.monotonic() + float(sys.argv[1] if len(sys.argv) > 1 else "inf")


async def main() -> None:
    engine = create_async_engine(url)

    async def fetch_pages() -> int:
        pages = 0
        while time.monotonic() < end:
            async with engine.begin() as connection:
                await connection.execute(text("select pg_sleep(0.2)"))
            pages += 1
        return pages

    pages = sum(await asyncio.gather(*(fetch_pages() for _ in range(25))))
    print(f"layer3: {pages} pages")
    await engine.dispose()


asyncio.run(main())
