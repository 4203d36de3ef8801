"""Spiders in threads, Scrapy's way: each has its own pool of threads, one engine.

    DATABASE_URL=postgresql+psycopg2://app@localhost/app python scraper_threads.py

A thread does not inherit the tag of the block that started it, as with every
context variable. So the tag is set where the work is done: by an engine of the
spider's own, or by a decorator on what the threads run.
"""

from __future__ import annotations

import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine, create_engine, text

from sqla_fairpool import FairQueuePool, tag

PAGES = 30


class Spider:
    """Fetches pages in threads and stores them."""

    def __init__(self, name: str, engine: Engine, threads: int) -> None:
        self.name = name
        self.engine = engine.execution_options(scraper=name)
        self.threads = ThreadPoolExecutor(threads, name)

    def crawl(self) -> None:
        list(self.threads.map(self.store, range(PAGES)))
        self.threads.shutdown()

    def store(self, page: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(
                text("insert into pages values (:spider, :page)"),
                {"spider": self.name, "page": page},
            )


@tag("housekeeping")
def count(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        query = (
            "select spider, count(*) as pages from pages group by spider "
            "order by spider"
        )
        return {row.spider: row.pages for row in connection.execute(text(query))}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"sqlite:///{folder}/scrapers.db"
        url = os.environ.get("DATABASE_URL", file)
        engine = create_engine(url, poolclass=FairQueuePool, pool_size=4)
        with engine.begin() as connection:
            connection.execute(text("create table pages (spider text, page int)"))
        spiders = [Spider("quick", engine, 4), Spider("greedy", engine, 12)]
        crawls = [threading.Thread(target=spider.crawl) for spider in spiders]
        for crawl in crawls:
            crawl.start()
        for crawl in crawls:
            crawl.join()
        print(count(engine))
        for row in engine.pool.stats().tags:
            print(row.name, "checked out", row.checkouts, "times")
        with engine.begin() as connection:
            connection.execute(text("drop table pages"))
        engine.dispose()


if __name__ == "__main__":
    main()
