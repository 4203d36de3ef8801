"""A scraper as people have it: 25 threads, an engine with a static pool of its own.

    DATABASE_URL=postgresql+psycopg2://app@localhost/app python layer1_5.py [SECONDS]

It knows nothing of a shared budget: ``sqla-fairpool run layer1_5.py`` gives it one.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import create_engine, text

engine = create_engine(os.environ["DATABASE_URL"], pool_size=10, max_overflow=5)
over = threading.Event()


def fetch_pages() -> int:
    pages = 0
    while not over.is_set():
        with engine.begin() as connection:
            connection.execute(text("select pg_sleep(0.2)"))
        pages += 1
    return pages


with ThreadPoolExecutor(25) as threads:
    fetched = [threads.submit(fetch_pages) for _ in range(25)]
    try:
        over.wait(float(sys.argv[1]) if len(sys.argv) > 1 else None)
    finally:
        over.set()
print(f"layer1_5: {sum(pages.result() for pages in fetched)} pages")
