"""Counters and histograms, and what exporters make of them."""

from __future__ import annotations

import gc
import json
import math
import re
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.semconv._incubating.metrics import db_metrics
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine
from sqlalchemy.exc import ArgumentError
from support import state
from support.stub import StubError
from support.threads import Caller, ensure_waiting

from sqla_fairpool import SelfDeadlock, TooManyWaiting
from sqla_fairpool.opentelemetry import instrument
from sqla_fairpool.prometheus import register
from sqla_fairpool.scheduling.counters import (
    BOUNDS,
    MAX_METERS,
    OTHER,
    Histogram,
    Meters,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def tag_of(engine, name):
    """Return the metrics of a tag."""
    return next(row for row in engine.pool.metrics().tags if row.name == name)


def buckets(copy):
    """Return how many durations lie in each bucket that has any, by its bound."""
    before = 0
    found = {}
    for bound, count in copy.buckets:
        if count > before:
            found[bound] = count - before
        before = count
    return found


# -- what is counted ------------------------------------------------------------------


def test_histogram_counts_up_to_its_bounds_inclusive():
    histogram = Histogram()
    for bound in BOUNDS:
        histogram.add(bound)
    histogram.add(math.nextafter(BOUNDS[-1], math.inf))
    assert histogram.counts == [1] * (len(BOUNDS) + 1)
    histogram.add_all(5, 2.0002, 2.0, [2.0])
    assert histogram.counts[0] == 5
    assert histogram.count == len(BOUNDS) + 1 + 5


def test_holds_are_counted_by_size(make_engine, clock):
    engine = make_engine()
    tagged = engine.execution_options(scraper="a")
    for seconds in (0.0, 0.0005, 0.002, 0.04, 0.04, 7.0, 0.0001):
        with tagged.connect():
            clock.advance(seconds)
    with tagged.connect():
        row = tag_of(engine, "a")
        assert row.checkouts == 8
        assert row.connections == 1
    row = tag_of(engine, "a")
    assert row.hold_time.count == 8
    assert buckets(row.hold_time) == {0.001: 4, 0.0025: 1, 0.05: 2, 10.0: 1}
    assert row.hold_time.total == pytest.approx(7.0826)
    assert buckets(row.wait_time) == {0.001: 8}


def test_many_long_holds_do_not_pile_up(make_engine, clock):
    engine = make_engine()
    tagged = engine.execution_options(scraper="a")
    for _ in range(1000):
        connection = tagged.connect()
        checkout = state.checkout_of(connection)
        clock.advance(1.0)
        connection.close()
        assert len(checkout.long_holds) <= 256
    assert tag_of(engine, "a").hold_time.count == 1000
    assert tag_of(engine, "a").checkouts == 1000


def test_waits_creations_and_failures_are_counted(make_engine, server, clock):
    engine = make_engine(pool_size=1, max_waiting=1)
    tagged = engine.execution_options(scraper="a")

    def slow():
        clock.advance(0.3)

    server.before["connect"] = slow
    holder = tagged.connect()
    caller = Caller(lambda: tagged.connect().close())
    ensure_waiting(engine.pool, 1)
    with pytest.raises(TooManyWaiting):
        tagged.connect()
    clock.advance(20.0)
    holder.close()
    caller.result()
    row = tag_of(engine, "a")
    assert buckets(row.wait_time) == {0.001: 1, 30.0: 1}
    assert buckets(row.create_time) == {0.5: 1}
    assert (row.refusals, row.timeouts, row.checkouts) == (1, 0, 2)

    def fail():
        raise StubError("no")

    engine.dispose()
    server.before["connect"] = fail
    with pytest.raises(StubError):
        tagged.connect()
    assert tag_of(engine, "a").create_failures == 1


def test_reconnects_are_timed(make_engine, server, clock):
    engine = make_engine()
    tagged = engine.execution_options(scraper="a")
    connection = tagged.connect()
    connection.invalidate()
    connection.close()
    server.before["connect"] = lambda: clock.advance(2.0)
    tagged.connect().close()
    row = tag_of(engine, "a")
    assert buckets(row.create_time) == {0.001: 1, 2.5: 1}


def test_warm_up_counts_for_the_default_tag(make_engine):
    engine = make_engine(min_idle=3)
    engine.pool.warm_up()
    assert tag_of(engine, "unknown").create_time.count == 3


def test_self_deadlocks_are_counted(make_engine):
    engine = make_engine(pool_size=1, deadlock_timeout=0.001)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect(), pytest.raises(SelfDeadlock):
        tagged.connect()
    assert tag_of(engine, "a").deadlocks == 1


def test_retagged_checkout_counts_once_under_the_tag_it_got(make_engine):
    engine = make_engine()
    for _ in range(3):
        with engine.connect().execution_options(scraper="a"):
            pass
    with engine.connect():
        assert tag_of(engine, "unknown").checkouts == 0
    assert tag_of(engine, "a").checkouts == 3
    assert tag_of(engine, "unknown").checkouts == 1


def test_closures_are_counted_by_reason(make_engine, server, clock, monkeypatch):
    engine = make_engine(
        pool_size=2,
        max_overflow=2,
        max_limit=4,
        soft_limit=4,
        pool_recycle=100,
        idle_connection_ttl=1000,
    )
    tagged = engine.execution_options(scraper="a")

    def reasons():
        return dict(engine.pool.metrics().closures)

    held = [tagged.connect() for _ in range(4)]
    for connection in held:
        connection.close()
    assert reasons() == {"overflow": 2}
    connection = tagged.connect()
    connection.invalidate()
    connection.close()
    connection = tagged.connect()
    connection.detach()
    connection.close()
    with tagged.connect() as connection:
        monkeypatch.setattr("time.time", lambda: math.inf)
    tagged.connect().close()
    monkeypatch.undo()
    expected = {"overflow": 2, "invalidated": 1, "detached": 1, "recycled": 1}
    assert reasons() == expected


def test_closures_of_unused_surplus_and_disposed_connections(make_engine, clock):
    clock.now = 1000.0
    engine = make_engine(
        pool_size=4, max_limit=3, soft_limit=3, idle_connection_ttl=100, min_idle=1
    )
    tagged = engine.execution_options(scraper="a")

    def fill():
        for connection in [tagged.connect() for _ in range(3)]:
            connection.close()

    fill()
    engine.pool.reconfigure(pool_size=2, max_limit=2, soft_limit=2)
    assert engine.pool.metrics().closures == {"resized": 1}
    for _ in range(8):
        clock.advance(50.0)
        engine.pool.upkeep()
    assert engine.pool.metrics().closures == {"resized": 1, "unused": 1}
    engine.dispose()
    assert engine.pool.metrics().closures == {"resized": 1, "unused": 1, "disposed": 1}


def test_tags_beyond_the_cap_share_a_meter(make_engine, clock):
    engine = make_engine(idle_timeout=1.0, reallocation_interval=1.0)
    for n in range(MAX_METERS + 50):
        engine.execution_options(scraper=f"tag{n}").connect().close()
    rows = {row.name: row for row in engine.pool.metrics().tags}
    assert len(rows) == MAX_METERS + 1
    assert rows[OTHER].checkouts == 50
    assert rows["tag0"].checkouts == 1
    # What the pool has forgotten is still counted.
    for _ in range(30):
        clock.advance(1.0)
        engine.pool.upkeep()
    assert engine.pool.stats().tags == ()
    rows = {row.name: row for row in engine.pool.metrics().tags}
    assert (rows["tag0"].checkouts, rows[OTHER].checkouts) == (1, 50)
    assert not rows["tag0"].active


def test_a_tag_named_other_shares_the_meter():
    meters = Meters()
    own = meters.of(OTHER)
    for n in range(MAX_METERS):
        meters.of(f"t{n}")
    assert meters.of("one too many") is own


# -- Prometheus ------------------------------------------------------------------------


def families(registry):
    text = generate_latest(registry).decode()
    return {f.name: f for f in text_string_to_metric_families(text)}


def samples(family, **labels):
    return {
        s.name: s.value
        for s in family.samples
        if labels.items() <= s.labels.items() and "le" not in s.labels
    }


def test_prometheus_exports_several_pools(make_engine):
    registry = CollectorRegistry()
    one = make_engine(pool_logging_name="one", pool_size=5)
    two = make_engine()
    register(one, registry)
    register(two, registry)
    register(two, registry)
    with one.execution_options(scraper="a").connect():
        found = families(registry)
    connections = found["sqla_fairpool_connections"]
    assert samples(connections, pool="one", state="used") == {
        "sqla_fairpool_connections": 1
    }
    assert {s.labels["pool"] for s in connections.samples} == {
        "one",
        two.pool.metrics_name,
    }
    assert len(connections.samples) == 4
    maximum = found["sqla_fairpool_connections_max"]
    assert samples(maximum, pool="one") == {"sqla_fairpool_connections_max": 5}
    checkouts = found["sqla_fairpool_checkouts"]
    assert samples(checkouts, tag="a") == {"sqla_fairpool_checkouts_total": 1}
    holds = found["sqla_fairpool_hold_seconds"]
    assert holds.type == "histogram"
    assert samples(holds, tag="a")["sqla_fairpool_hold_seconds_count"] == 0


def test_prometheus_follows_dispose_and_forgets_what_is_gone(server):
    registry = CollectorRegistry()
    engine = server.engine()
    register(engine, registry)
    engine.execution_options(scraper="a").connect().close()
    engine.dispose()
    engine.execution_options(scraper="a").connect().close()
    found = families(registry)["sqla_fairpool_checkouts"]
    assert samples(found, tag="a") == {"sqla_fairpool_checkouts_total": 2}
    del engine
    gc.collect()
    assert families(registry)["sqla_fairpool_connections"].samples == []


def test_exporters_refuse_another_pool():
    engine = create_engine("sqlite://")
    with pytest.raises(ArgumentError, match="has no FairQueuePool"):
        register(engine, CollectorRegistry())
    with pytest.raises(ArgumentError, match="has no FairQueuePool"):
        instrument(engine)


def test_dashboard_shows_only_what_is_exported(make_engine):
    registry = CollectorRegistry()
    register(make_engine(), registry)
    exported = {name for family in registry.collect() for name in _series_of(family)}
    dashboard = json.loads((EXAMPLES / "grafana_dashboard.json").read_text())
    queries = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
    used = set(re.findall(r"sqla_fairpool_\w+", " ".join(queries)))
    assert len(queries) >= 8
    assert used <= exported
    # And of what there is, nothing was forgotten.
    families = {family.name for family in registry.collect()}
    shown = {name for name in families if any(u.startswith(name) for u in used)}
    assert shown == families


def _series_of(family):
    if family.type == "histogram":
        return [family.name + end for end in ("_bucket", "_count", "_sum")]
    return [family.name + ("_total" if family.type == "counter" else "")]


# -- OpenTelemetry ---------------------------------------------------------------------


def points(reader):
    """Return {metric: {attributes: point}} of one export."""
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        metric.name: {
            tuple(sorted(point.attributes.items())): point
            for point in metric.data.data_points
        }
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader):
    provider = MeterProvider([reader])
    yield provider
    provider.shutdown()


def test_opentelemetry_follows_the_conventions(make_engine, reader, provider, clock):
    engine = make_engine(pool_logging_name="main", pool_size=4, min_idle=1)
    tagged = engine.execution_options(scraper="a")
    tagged.connect().close()
    instrument(engine, provider)
    for seconds in (0.2, 0.0, 3.0):
        with tagged.connect():
            clock.advance(seconds)
    with tagged.connect():
        found = points(reader)
    names = {
        value
        for name, value in vars(db_metrics).items()
        if name.startswith("DB_CLIENT_CONNECTION_") and isinstance(value, str)
    }
    assert set(found) <= names
    assert {name.removeprefix("db.client.connection.") for name in found} >= {
        "count",
        "idle.max",
        "idle.min",
        "max",
        "pending_requests",
        "timeouts",
    }
    pool = ("db.client.connection.pool.name", "main")
    used = (("db.client.connection.state", "used"), ("sqla_fairpool.tag", "a"))
    count = found["db.client.connection.count"]
    assert count[(pool, *used)].value == 1
    found = points(reader)
    # The one before it was instrumented does not count.
    (use,) = found["db.client.connection.use_time"].values()
    assert (use.count, use.sum) == (4, pytest.approx(3.2))
    (wait,) = found["db.client.connection.wait_time"].values()
    assert (wait.count, wait.sum) == (4, 0)


def test_opentelemetry_counts_tags_that_come_later(make_engine, reader, provider):
    engine = make_engine()
    instrument(engine, provider)
    with engine.execution_options(scraper="late").connect():
        pass
    engine.pool.stats()  # gives up what is kept warm
    found = points(reader)
    (create,) = found["db.client.connection.create_time"].values()
    assert create.count == 1
    (use,) = found["db.client.connection.use_time"].values()
    assert use.count == 1
    assert dict(use.attributes)["sqla_fairpool.tag"] == "late"


def test_opentelemetry_forgets_a_pool_that_is_gone(server, reader, provider):
    engine = server.engine()
    instrument(engine, provider)
    assert points(reader)
    del engine
    gc.collect()
    assert points(reader) == {}
