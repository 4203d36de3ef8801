"""What type checkers see of the public names: mypy and pyright read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import assert_type

import sqla_fairpool
from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    Diagnosis,
    FairQueuePool,
    Holding,
    PoolStats,
    SelfDeadlock,
    Summary,
    TagStats,
    TooManyWaiting,
    set_tag,
    tag,
)
from sqla_fairpool.manager import (
    DynamicConnectionManager,
    get_async_session,
    get_connection_stats,
    get_session,
)


def pools(pool: FairQueuePool) -> None:
    create_engine("sqlite://", poolclass=FairQueuePool)
    assert_type(pool.recreate(), FairQueuePool)
    assert_type(pool.timeout(), float | None)
    assert_type(pool.warm_up(), int)
    pool.reconfigure(soft_limit=8)


async def pools_of_tasks(pool: AsyncAdaptedFairQueuePool) -> None:
    assert_type(await pool.warm_up(), int)
    await pool.upkeep()


def figures(pool: FairQueuePool) -> None:
    stats = pool.stats()
    assert_type(stats, PoolStats)
    assert_type(stats.as_dict(), dict[str, Any])
    assert_type(stats.tag("web"), TagStats | None)
    assert_type(stats.tags[0].wait_time, Summary)
    assert_type(stats.tags[0].wait_time.mean, float)
    assert_type(stats.closures, Mapping[str, int])


@tag("reports", timeout=2.5)
def decorated(pages: int) -> str:
    return str(pages)


@tag("reports")
async def decorated_for_tasks() -> bytes:
    return b""


async def tags() -> None:
    with tag("web"):
        set_tag(None)
    assert_type(decorated(3), str)
    assert_type(await decorated_for_tasks(), bytes)


def errors(error: CheckoutTimeout | SelfDeadlock, refused: TooManyWaiting) -> None:
    assert_type(error.waited, float)
    assert_type(error.diagnosis, Diagnosis | None)
    assert_type(refused.tag, str)
    if error.diagnosis:
        assert_type(error.diagnosis.oldest[0], Holding)


async def sessions(manager: DynamicConnectionManager) -> None:
    with get_session("layer3") as session:
        assert_type(session, Session)
    async with get_async_session("layer3") as other:
        assert_type(other, AsyncSession)
    assert_type(get_connection_stats(), dict[str, Any])
    assert_type(sqla_fairpool.__version__, str)
