from __future__ import annotations

import asyncio
import gc

import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from support.state import assert_quiet

from sqla_fairpool import AsyncAdaptedFairQueuePool


@pytest.fixture
def run(tmp_path):
    """Run a coroutine function with an asyncio engine that has one connection.

    Its pool must be quiet when the function ends.
    """

    def run(test, **options):
        async def main():
            engine = create_async_engine(
                f"sqlite+aiosqlite:///{tmp_path / 'test.db'}",
                poolclass=AsyncAdaptedFairQueuePool,
                **{"pool_size": 1, **options},
            )
            await test(engine)
            gc.collect()
            assert_quiet(engine.pool)
            await engine.dispose()

        asyncio.run(main())

    return run
