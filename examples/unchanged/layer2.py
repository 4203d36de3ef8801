"""Another one, which works for a while and then has nothing to do.

DATABASE_URL=postgresql+psycopg2://app@localhost/app python layer2.py [SECONDS]
"""

from __future__ import annotations

import os
import sys
import threading

from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

Session = sessionmaker(create_engine(os.environ["DATABASE_URL"]))
over = threading.Event()


def fetch_pages() -> None:
    while not over.is_set():
        with Session.begin() as session:
            session.execute(text("select pg_sleep(0.2)"))


threads = [threading.Thread(target=fetch_pages) for _ in range(25)]
for thread in threads:
    thread.start()
try:
    over.wait(float(sys.argv[1]) if len(sys.argv) > 1 else None)
finally:
    over.set()
for thread in threads:
    thread.join()
print("layer2: nothing to do; Enter ends it", flush=True)
sys.stdin.readline()
