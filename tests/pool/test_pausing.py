"""``pool.pause()``, ``resume()`` and ``drain()``."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.util import await_only
from support import state
from support.cluster import ask
from support.threads import connect, give, take
from support.worlds import world_of

from sqla_fairpool import AsyncAdaptedFairQueuePool, CheckoutTimeout
from sqla_fairpool.pool import pausing


def drain(pool, timeout=None):
    """Drain a pool of threads or of tasks."""
    is_asyncio = isinstance(pool, AsyncAdaptedFairQueuePool)
    return await_only(pool.drain(timeout)) if is_asyncio else pool.drain(timeout)


@pytest.mark.parametrize("tag", ["a", "unknown"])
@pytest.mark.parametrize("is_warm", [False, True])
def test_no_checkout_is_served_until_it_is_resumed(world, tag, is_warm):
    pool = world.pool(2, max_overflow=0 if is_warm else 1)
    give(take(pool, 2, tag))
    held = connect(pool, tag)
    for _ in range(2):
        pool.pause()
    callers = world.wait_in_line(pool, tag, count=2)
    held.close()  # it comes back, and serves none of them
    state.assert_consistent(pool)
    pool.reconfigure(soft_limit=1)
    pool.upkeep() if world.pool_class is not AsyncAdaptedFairQueuePool else None
    assert state.waiting(pool) == 2
    pool.reconfigure(soft_limit=None)
    for _ in range(2):
        pool.resume()
    give([caller.result() for caller in callers])
    assert world.server.opened == 2


def test_tag_that_is_paused_alone(world, clock):
    pool = world.pool(2, timeout=0)
    give(take(pool, 2, "b"))
    held = connect(pool, "a")
    pool.pause("a")
    clock.advance(5)
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "a")
    assert "tag 'a' paused in_use=1 limit=0" in str(caught.value)
    assert (
        "advice: tag 'a' was paused 5.00s ago, and serves again after pool.resume('a')"
    ) in str(caught.value)
    assert "limit 0: no checkout is served while it is paused" in str(pool.explain("a"))
    held.close()
    connect(pool, "b").close()
    stats = pool.stats()
    assert (stats.paused_for, stats.paused_tags) == (None, ("a",))
    assert (stats.tag("a").limit, stats.tag("b").limit > 0) == (0, True)
    assert pool.metrics().tag("a").limit == 0
    pool.resume()  # all, which was not paused
    with pytest.raises(CheckoutTimeout):
        connect(pool, "a")
    pool.pause()
    pool.resume("a")
    with pytest.raises(CheckoutTimeout, match=r"after pool.resume\(\)"):
        connect(pool, "a")
    pool.resume()
    connect(pool, "a").close()
    for change in (pool.pause, pool.resume):
        with pytest.raises(ArgumentError, match="tag='' is not allowed"):
            change("")


def test_other_tag_of_a_connection_is_a_new_checkout(make_engine):
    engine = make_engine(2, pool_timeout=0)
    with engine.connect() as connection:
        engine.pool.pause()
        with pytest.raises(CheckoutTimeout):
            connection.execution_options(scraper="a")
    engine.pool.resume()


def test_time_out_goes_on_and_says_that_the_pool_is_paused(world, clock):
    pool = world.pool(2, timeout=0, deadlock_timeout=0.001)
    held = connect(pool)  # the caller's own; no deadlock, for resume() may serve it
    pool.pause()
    clock.advance(75)
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool)
    assert "limit=0" in str(caught.value)
    assert "pool paused in_use=1/2" in str(caught.value)
    assert (
        "advice: the pool was paused 1m15s ago, and serves again after pool.resume()"
    ) in str(caught.value)
    assert caught.value.diagnosis.paused_for == 75
    assert pool.stats().paused_for == pool.metrics().paused_for == 75
    pool.resume()
    assert pool.stats().paused_for is None
    give([held, connect(pool)])


def test_caller_that_holds_one_is_no_deadlock_while_it_is_paused(world):
    pool = world.pool(1, deadlock_timeout=0.001, timeout=0.05)
    held = connect(pool)
    pool.pause()
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool)
    assert type(caught.value) is CheckoutTimeout
    pool.resume()
    held.close()


def test_drain_closes_connections_as_they_come_back(world, monkeypatch):
    monkeypatch.setattr(pausing, "_LOOK_AGAIN", 1e6)  # it is woken
    pool = world.pool(4, min_idle=2)
    held = take(pool, 3)
    connect(pool).close()
    draining = world.start(drain, pool)
    world.eventually(lambda: world.server.open == 3)
    for left in (2, 1, 0):
        assert draining.is_alive()
        held.pop().close()
        world.eventually(lambda left=left: world.server.open == left)
    assert draining.result() is True
    assert pool.checkedin() == 0
    assert drain(pool) is True
    pool.resume()
    connect(pool).close()
    assert world.server.open >= 1


def test_drain_gives_up_in_time_and_the_rest_is_closed_later(world):
    pool = world.pool(2)
    held = connect(pool)
    connect(pool).close()
    assert drain(pool, timeout=0.01) is False
    assert world.server.open == 1
    held.close()
    state.look_around(pool)
    assert world.server.open == 0
    pool.resume()
    connect(pool).close()
    assert world.server.open == 1


def test_drain_ends_when_another_caller_resumes(world):
    pool = world.pool(2)
    held = connect(pool)
    draining = world.start(drain, pool)
    world.eventually(lambda: pool.stats().paused_for is not None)
    pool.resume()
    assert draining.result() is False
    held.close()


def test_signal_handler_may_pause_in_the_middle_of_a_section(make_pool):
    pool = make_pool(2)
    give(take(pool, 2))
    with state.critical_section(pool):
        pool.pause()
    assert pool.stats().paused_for is not None
    pool.resume()
    with state.critical_section(pool):
        assert pool.drain() is False
    assert pool.stats().paused_for is not None
    with (
        state.critical_section(pool),
        pytest.raises(InvalidRequestError, match="the pool is paused"),
    ):
        connect(pool)
    pool.resume()


def test_nothing_is_opened_ahead_while_it_is_paused(make_pool, server):
    pool = make_pool(4, min_idle=3)
    pool.pause()
    assert pool.warm_up() == 0
    assert server.opened == 0
    pool.resume()
    assert pool.warm_up() == 3


@pytest.mark.parametrize("timeout", [-1, "soon", float("nan"), True])
def test_bad_time_out_of_drain_changes_nothing(make_pool, timeout):
    pool = make_pool(1)
    with pytest.raises(ArgumentError, match=r"timeout=.* is not allowed: seconds"):
        pool.drain(timeout)
    assert pool.stats().paused_for is None


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "psycopg tasks", "asyncpg"])
@pytest.mark.parametrize("has_ledger", [False, True])
def test_after_drain_the_server_has_no_session(
    postgres_url, driver, has_ledger, tmp_path
):
    sessions = "select count(*) from pg_stat_activity where application_name = 'drains'"
    options = {"ledger": str(tmp_path / "ledger")} if has_ledger else {}
    named = {"server_settings": {"application_name": "drains"}}
    if driver != "asyncpg":
        named = {"application_name": "drains"}
    world = world_of(postgres_url, f"postgresql+{driver}")

    def test():
        engine = world.make(
            world.url,
            poolclass=world.pool_class,
            pool_size=4,
            connect_args=named,
            **options,
        )
        out = [engine.connect() for _ in range(3)]
        for connection in out:
            connection.execute(text("select 1"))
        assert ask(postgres_url, sessions) == 3
        draining = world.start(drain, engine.pool)
        give(out)
        assert draining.result() is True
        assert ask(postgres_url, sessions) == 0
        engine.pool.resume()
        engine.connect().close()
        engine.dispose()

    world.run(test)
