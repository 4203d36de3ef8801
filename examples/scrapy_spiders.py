"""Spiders in one process, each under its own name, and pipelines that do not know.

    DATABASE_URL=postgresql+psycopg2://app@localhost/app python scrapy_spiders.py

`TaggedPipelines` is all of it. It works in a project of yours as well, with its
settings unchanged, for Scrapy 2.14 or later:

    sqla-fairpool run scrapy crawl news -s ITEM_PROCESSOR=scrapy_spiders.TaggedPipelines

A callback of a spider that uses the database is not in its pipelines: write ``with
tag(self.name):`` around that. And threads, of ``deferToThread`` say, do not inherit a
tag: use ``engine.execution_options(scraper=spider.name)`` in them.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import scrapy
from scrapy.crawler import CrawlerProcess
from scrapy.pipelines import ItemPipelineManager
from sqlalchemy import Engine, create_engine, text

from sqla_fairpool import FairQueuePool, tag


class TaggedPipelines(ItemPipelineManager):
    """Runs a spider's pipelines under the spider's name."""

    async def open_spider_async(self) -> None:
        with tag(self.crawler.spider.name):
            await super().open_spider_async()

    async def process_item_async(self, item: Any) -> Any:
        with tag(self.crawler.spider.name):
            return await super().process_item_async(item)

    async def close_spider_async(self) -> None:
        with tag(self.crawler.spider.name):
            await super().close_spider_async()


@functools.cache
def engine() -> Engine:
    """Return the project's engine."""
    return create_engine(os.environ["DATABASE_URL"], poolclass=FairQueuePool)


class StorePages:
    """A pipeline as it stands in many projects."""

    def process_item(self, item: dict[str, str]) -> dict[str, str]:
        with engine().begin() as connection:
            connection.execute(text("insert into pages values (:spider, :body)"), item)
        return item


class PageSpider(scrapy.Spider):
    """Three pages without a network."""

    start_urls = ("data:,page1", "data:,page2", "data:,page3")

    def parse(self, response: Any) -> Iterator[dict[str, str]]:
        yield {"spider": self.name, "body": response.text}


class News(PageSpider):
    name = "news"


class Shops(PageSpider):
    name = "shops"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("DATABASE_URL", f"sqlite:///{folder}/pages.db")
        with engine().begin() as connection:
            connection.execute(text("create table pages (spider text, body text)"))
        process = CrawlerProcess(
            {
                "ITEM_PIPELINES": {StorePages: 100},
                "ITEM_PROCESSOR": TaggedPipelines,
                "LOG_ENABLED": False,
            }
        )
        for spider in (News, Shops):
            process.crawl(spider)
        process.start()
        for row in engine().pool.stats().tags:
            print(row.name, "checked out", row.checkouts, "times")
        with engine().begin() as connection:
            connection.execute(text("drop table pages"))
        engine().dispose()


if __name__ == "__main__":
    main()
