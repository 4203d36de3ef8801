"""What the settings for diagnosis cost, each beside the pool as it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.pool import QueuePool

from sqla_fairpool.pool.fair_queue_pool import FairQueuePool

from .figures import Figure, pairwise
from .peers import fair_engine
from .report import Findings
from .stage import Stage
from .uncontended import CYCLES, by_engine, timed

__all__ = ["of_diagnosis", "of_figures", "of_server_tag"]

#: Beside FairQueuePool without options.
_SETTINGS: dict[str, dict[str, Any]] = {
    "deadlock_timeout=None": {"deadlock_timeout": None},
    "leak_threshold=60": {"leak_threshold": 60},
}

#: Connections changed hands in one round: enough to see a round trip, some 50 µs.
_CHANGES = 20


def of_diagnosis(stage: Stage) -> Findings:
    """A checkout with each setting, beside one without."""
    if stage.short:
        return Findings()
    engines = {name: fair_engine(**options) for name, options in _SETTINGS.items()}
    contenders = {name: timed(by_engine(engine)) for name, engine in engines.items()}
    plain = timed(by_engine(fair_engine()))
    times = stage.interleave("settings", {"as it is": plain, **contenders}, 300)
    base = times.pop("as it is")
    figures = []
    for name, values in times.items():
        more = statistics.median(
            (a - b) / CYCLES * 1e6 for a, b in zip(values, base, strict=True)
        )
        ratios = tuple(pairwise(values, base))
        what = f"checkout + checkin with {name}, time"
        figures.append(Figure(what, "without", ratios, remark=f"{more:+.2f} µs"))
    return Findings(tuple(figures))


def of_figures(stage: Stage) -> Findings:
    """One look at all figures of a pool with a hundred tags."""
    if stage.short:
        return Findings()
    engine = fair_engine()
    pool = engine.pool
    assert isinstance(pool, FairQueuePool)
    for n in range(100):
        engine.execution_options(scraper=f"tag{n}").connect().close()
    times = {"stats": timed(pool.stats, 10), "metrics": timed(pool.metrics, 10)}
    found = stage.interleave("figures", times, 30)
    return Findings(
        tuple(
            Figure(
                f"pool.{name}() with 100 tags, µs", "", tuple(v / 10 * 1e6 for v in s)
            )
            for name, s in found.items()
        )
    )


def _changing_hands(engine: Engine) -> Callable[[], float]:
    """Time checkouts under two tags in turn, of one connection."""
    first = engine.execution_options(scraper="a").connect
    second = engine.execution_options(scraper="b").connect

    def run() -> float:
        began = time.perf_counter()
        for _ in range(_CHANGES // 2):
            first().close()
            second().close()
        return time.perf_counter() - began

    return run


def of_server_tag(stage: Stage) -> Findings:
    """A connection that changes hands each time, which is the worst case."""
    if stage.short:
        return Findings()
    engines = [
        stage.place.engine(FairQueuePool, pool_size=1, server_tag=told)
        for told in (True, False)
    ]
    engines.append(stage.place.engine(QueuePool, pool_size=1))
    names = ("server_tag", "without", "QueuePool")
    contenders = dict(zip(names, map(_changing_hands, engines), strict=True))
    told, plain, _ = stage.interleave("server_tag", contenders, 100).values()
    for engine in engines:
        engine.dispose()
    more = statistics.median(
        (a - b) / _CHANGES * 1e6 for a, b in zip(told, plain, strict=True)
    )
    what = "checkout + checkin on PostgreSQL, each time for another tag, server_tag"
    ratios = tuple(pairwise(told, plain))
    return Findings((Figure(what, "without", ratios, remark=f"{more:+.0f} µs"),))
