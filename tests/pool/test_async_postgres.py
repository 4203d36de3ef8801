"""Tasks on asyncpg and a real PostgreSQL: cancelled anywhere, served in turn."""

from __future__ import annotations

import asyncio
import os
import random

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from support.state import assert_quiet
from support.tasks import until

from sqla_fairpool import AsyncAdaptedFairQueuePool

pytestmark = pytest.mark.postgres

#: By a thousand tasks; a hundred thousand take less than half a minute.
CANCELLATIONS = int(os.environ.get("FAIRPOOL_TEST_CANCELLATIONS", "5000"))


@pytest.fixture
def url(postgres_url):
    return make_url(postgres_url).set(drivername="postgresql+asyncpg")


def fair_engine(url, **options):
    # So that the server's sessions of this test can be told from others.
    arguments = {"server_settings": {"application_name": "fairpool-async-test"}}
    return create_async_engine(
        url,
        poolclass=AsyncAdaptedFairQueuePool,
        connect_args=arguments,
        **options,
    )


async def sessions(url):
    """Count the test's sessions at the server."""
    engine = create_async_engine(url, poolclass=NullPool)
    query = "select count(*) from pg_stat_activity where application_name = :name"
    async with engine.connect() as connection:
        return await connection.scalar(text(query), {"name": "fairpool-async-test"})


class Visits:
    """Tasks that check out, work and return, and are cancelled at any moment."""

    def __init__(self, engine, seed):
        self.engine = engine
        self.chance = random.Random(seed)
        self.owners = {}
        self.cancelled = self.served = 0

    async def visit(self):
        tag = self.chance.choice(("a", "b", "c"))
        async with self.engine.execution_options(scraper=tag).connect() as connection:
            raw = await connection.get_raw_connection()
            key = id(raw.driver_connection)
            assert key not in self.owners, "handed out twice"
            self.owners[key] = raw.driver_connection
            try:
                if self.chance.random() < 0.3:
                    await connection.execute(text("select 1"))
                else:
                    await asyncio.sleep(0)
            finally:
                del self.owners[key]

    async def worker(self, cancellations):
        """Visit again and again until so many visits were cancelled."""
        loop = asyncio.get_running_loop()
        while cancellations:
            task = loop.create_task(self.visit())
            # Within a few passes of the loop, or within a few round trips.
            if self.chance.random() < 0.5:
                for _ in range(self.chance.randrange(12)):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(self.chance.random() * 0.05)
            was_done = task.done()
            task.cancel()
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(result, asyncio.CancelledError):
                self.cancelled += 1
                cancellations -= 1
            else:
                assert was_done, f"a cancel was swallowed: {result!r}"
                assert result is None, result
                self.served += 1


@pytest.mark.slow
# A thousand are cancelled in the line as a rule; twelve while they connect, work or
# return.
@pytest.mark.parametrize(
    ("workers", "each"), [(1000, CANCELLATIONS // 1000), (12, CANCELLATIONS // 60)]
)
def test_cancellations_at_random_points_lose_no_connection(url, workers, each):
    async def main():
        engine = fair_engine(url, pool_size=10, soft_limit=10, max_limit=10)
        visits = Visits(engine, seed=1)
        await asyncio.gather(*(visits.worker(each) for _ in range(workers)))
        assert visits.cancelled == workers * each
        assert visits.served > 0 or workers == 1000
        assert not visits.owners
        assert_quiet(engine.pool)
        assert await sessions(url) <= 10
        # All ten can be had, and no more.
        connections = [await engine.connect() for _ in range(10)]
        assert engine.pool.checkedout() == 10
        for connection in connections:
            await connection.close()
        await engine.dispose()
        assert_quiet(engine.pool)
        # A server process needs a moment to end.
        for _ in range(200):
            if await sessions(url) == 0:
                break
            await asyncio.sleep(0.02)
        assert await sessions(url) == 0

    asyncio.run(main())


def test_a_hundred_tasks_on_ten_connections_are_served_alike(url):
    async def main():
        engine = fair_engine(url, pool_size=10, soft_limit=10, max_limit=10)
        tagged = engine.execution_options(scraper="a")
        counts = [0] * 100
        stop = asyncio.Event()

        async def work(number):
            while not stop.is_set():
                async with tagged.connect():
                    await asyncio.sleep(0.01)
                    counts[number] += 1

        tasks = [asyncio.create_task(work(number)) for number in range(100)]
        await until(lambda: min(counts) >= 5)
        spread = max(counts) - min(counts)
        stop.set()
        await asyncio.gather(*tasks)
        await engine.dispose()
        return spread

    assert asyncio.run(main()) <= 2


def test_a_light_tag_is_served_beside_a_flood(url):
    """It is below its share, so nobody of the flood is served before it."""

    async def main():
        engine = fair_engine(url, pool_size=4, soft_limit=4, max_limit=4)
        flood, light = (engine.execution_options(scraper=t) for t in ("flood", "light"))
        stop = asyncio.Event()
        flooded = 0

        async def work():
            nonlocal flooded
            while not stop.is_set():
                async with flood.connect():
                    await asyncio.sleep(0.002)
                    flooded += 1

        tasks = [asyncio.create_task(work()) for _ in range(60)]
        await until(lambda: flooded >= 20)
        overtaken = []
        for _ in range(20):
            before = flooded
            async with light.connect():
                overtaken.append(flooded - before)
            await asyncio.sleep(0)
        stop.set()
        await asyncio.gather(*tasks)
        await engine.dispose()
        return overtaken

    # The first connection that comes back is the light one's; some more may be
    # counted in the same pass of the loop.
    assert max(asyncio.run(main())) <= 4
