"""Counters and histograms, and what exporters make of them."""

from __future__ import annotations

import gc
import json
import math
import re
from importlib.metadata import version
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
from support.overviews import process
from support.stub import StubError
from support.threads import Caller, ensure_waiting, eventually, give, take

from sqla_fairpool import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from sqla_fairpool.ledger.overview import Limits, Part, compile_overview
from sqla_fairpool.opentelemetry import instrument
from sqla_fairpool.prometheus import OverviewCollector, register
from sqla_fairpool.scheduling.counters import (
    BOUNDS,
    MAX_COUNTED_TAGS,
    OTHER,
    CountersByTag,
    Histogram,
)
from sqla_fairpool.stats import TagStats

EXAMPLES = Path(__file__).parents[2] / "examples"

CLOSURES = {
    *("detached", "disposed", "invalidated"),
    *("overflow", "recycled", "resized", "unused"),
}


def metrics_of(engine, name="a"):
    """Return the row of a tag."""
    return engine.pool.metrics().tag(name)


def buckets(summary):
    """Return how many durations lie in each bucket that has any, by its bound."""
    counts = [0, *(count for _, count in summary.buckets)]
    found = zip(summary.buckets, counts, strict=False)
    return {bound: count - before for (bound, count), before in found if count > before}


# -- what is counted ------------------------------------------------------------------


def test_histogram_counts_up_to_its_bounds_inclusive():
    histogram = Histogram()
    for bound in (*BOUNDS, math.nextafter(BOUNDS[-1], math.inf)):
        histogram.add(bound)
    assert histogram.counts == [1] * (len(BOUNDS) + 1)
    assert histogram.max > BOUNDS[-1]
    histogram.add_all(5, 2.0002, 2.0, [2.0])
    assert (histogram.counts[0], histogram.count) == (5, len(BOUNDS) + 1 + 5)


def test_holds_are_counted_by_size(make_engine, clock):
    engine = make_engine().execution_options(scraper="a")
    for seconds in (0.0, 0.0005, 0.002, 0.04, 0.04, 7.0, 0.0001):
        with engine.connect():
            clock.advance(seconds)
    with engine.connect():
        row = metrics_of(engine)
        assert (row.checkouts, row.connections) == (8, 1)
    row = metrics_of(engine)
    assert (row.hold_time.count, row.hold_time.max) == (8, 7.0)
    assert buckets(row.hold_time) == {0.001: 4, 0.0025: 1, 0.05: 2, 10.0: 1}
    assert row.hold_time.total == pytest.approx(7.0826)
    assert buckets(row.wait_time) == {0.001: 8}
    for _ in range(1000):  # many long ones do not pile up
        with engine.connect() as connection:
            checkout = state.checkout_of(connection)
            clock.advance(1.0)
        assert len(checkout.long_holds) <= 256
    row = metrics_of(engine)
    assert row.hold_time.count == row.checkouts == 1008


def test_waits_creations_and_failures_are_counted(make_engine, server, clock):
    engine = make_engine(pool_size=1, max_waiting=1).execution_options(scraper="a")
    server.before["connect"] = lambda: clock.advance(0.3)
    holder = engine.connect()
    with pytest.raises(CheckoutTimeout):
        engine.execution_options(fairpool_timeout=0).connect()
    caller = Caller(lambda: engine.connect().close())
    ensure_waiting(engine.pool, 1)
    with pytest.raises(TooManyWaiting):
        engine.connect()
    clock.advance(20.0)
    holder.close()
    caller.result()
    with engine.connect() as connection:
        connection.invalidate()
    server.before["connect"] = lambda: clock.advance(2.0)
    engine.connect().close()  # connects again
    row = metrics_of(engine)
    assert buckets(row.wait_time) == {0.001: 3, 30.0: 1}
    assert buckets(row.create_time) == {0.5: 1, 2.5: 1}
    assert (row.refusals, row.timeouts, row.checkouts) == (1, 1, 4)

    def fail():
        raise StubError("no")

    engine.dispose()
    server.before["connect"] = fail
    with pytest.raises(StubError):
        engine.connect()
    assert metrics_of(engine).create_failures == 1


def test_tags_under_which_is_counted(make_engine):
    """Without a tag for the default one; retagged ones once, under the tag they got."""
    engine = make_engine(1, min_idle=1, deadlock_timeout=0.001)
    engine.pool.warm_up()
    with engine.connect(), pytest.raises(SelfDeadlock):
        engine.connect()
    row = metrics_of(engine, "unknown")
    assert (row.create_time.count, row.deadlocks, row.checkouts) == (1, 1, 1)
    for _ in range(3):
        with engine.connect().execution_options(scraper="b"):
            pass
    with engine.connect():
        assert metrics_of(engine, "unknown").checkouts == 1
    assert metrics_of(engine, "b").checkouts == 3
    assert metrics_of(engine, "unknown").checkouts == 2
    # A tag named as the sum of many shares its counters.
    counters_by_tag = CountersByTag()
    own = counters_by_tag.of(OTHER)
    for n in range(MAX_COUNTED_TAGS):
        counters_by_tag.of(f"t{n}")
    assert counters_by_tag.of("one too many") is own


def test_closures_are_counted_by_reason(make_engine, clock, monkeypatch):
    clock.now = 1000.0
    sizes = {"pool_size": 3, "max_overflow": 1, "max_limit": 4, "soft_limit": 4}
    sizes |= {"pool_recycle": 100, "recycle_jitter": 0}
    engine = make_engine(**sizes, idle_connection_ttl=100, min_idle=1)
    expected = dict.fromkeys(CLOSURES, 0)

    def counts(**more):
        expected.update(more)
        assert engine.pool.metrics().closures == expected

    give(take(engine, 4))
    counts(overflow=1)
    for lose in ("invalidate", "detach"):
        with engine.connect() as connection:
            getattr(connection, lose)()
    counts(invalidated=1, detached=1)
    give(take(engine, 3))
    engine.pool.reconfigure(pool_size=2, max_overflow=0, max_limit=2, soft_limit=2)
    counts(resized=1)
    for _ in range(8):
        clock.advance(50.0)
        engine.pool.upkeep()
    counts(unused=1)
    with engine.connect():
        monkeypatch.setattr("time.time", lambda: math.inf)
    engine.connect().close()
    monkeypatch.undo()
    counts(recycled=1)
    engine.dispose()
    counts(disposed=1)


def test_tags_beyond_the_cap_share_counters(make_engine, clock):
    engine = make_engine(idle_timeout=1.0, reallocation_interval=1.0)
    for n in range(MAX_COUNTED_TAGS + 50):
        engine.execution_options(scraper=f"tag{n}").connect().close()
    assert len(engine.pool.metrics().tags) == MAX_COUNTED_TAGS + 1
    assert metrics_of(engine, OTHER).checkouts == 50
    assert metrics_of(engine, "tag0").checkouts == 1
    # What the pool has forgotten is still counted.
    for _ in range(30):
        clock.advance(1.0)
        engine.pool.upkeep()
    assert engine.pool.stats().tags == ()
    assert metrics_of(engine, OTHER).checkouts == 50
    row = metrics_of(engine, "tag0")
    assert (row.checkouts, row.active, row.limit) == (1, False, 15)


# -- Prometheus ------------------------------------------------------------------------


@pytest.fixture
def registry():
    return CollectorRegistry()


def samples(registry, name, **labels):
    """Return a family's samples with these labels, without those of buckets."""
    text = generate_latest(registry).decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    return {
        s.name: s.value
        for s in families[f"sqla_fairpool_{name}"].samples
        if labels.items() <= s.labels.items() and "le" not in s.labels
    }


def test_prometheus_exports_several_pools(make_engine, registry):
    one = make_engine(pool_logging_name="one", pool_size=5)
    two = make_engine()
    for engine in (one, two, two):
        register(engine, registry)

    def value(name, **labels):
        (value,) = samples(registry, name, **labels).values()
        return value

    tagged = one.execution_options(scraper="a")
    with tagged.connect():
        assert value("connections", pool="one", state="used") == 1
        assert value("tag_active", tag="a") == 1
        holds = samples(registry, "hold_seconds", tag="a")
    assert holds["sqla_fairpool_hold_seconds_count"] == 0
    assert value("connections_max", pool="one") == 5
    assert value("checkouts", tag="a") == 1
    families = {family.name: family for family in registry.collect()}
    assert families["sqla_fairpool_hold_seconds"].type == "histogram"
    found = families["sqla_fairpool_connections"].samples
    assert len(found) == 4
    assert {s.labels["pool"] for s in found} == {"one", two.pool.metrics_name}
    one.dispose()  # the pool that follows is the same to the registry
    tagged.connect().close()
    assert value("checkouts", tag="a") == 2


def test_exporters_forget_a_pool_that_is_gone(server, registry, reader, provider):
    engine = server.engine()
    register(engine, registry)
    instrument(engine, provider)
    assert samples(registry, "connections")
    assert points(reader)
    del engine
    gc.collect()
    assert samples(registry, "connections") == {}
    assert points(reader) == {}


def test_exporters_refuse_another_pool(registry):
    engine = create_engine("sqlite://")
    for export in (lambda: register(engine, registry), lambda: instrument(engine)):
        with pytest.raises(ArgumentError, match="has no FairQueuePool"):
            export()


def test_dashboard_shows_all_that_is_exported_and_nothing_else(make_engine, registry):
    register(make_engine(), registry)
    registry.register(OverviewCollector("app", lambda: None))
    families = list(registry.collect())
    exported = {name for family in families for name in _series_of(family)}
    dashboard = json.loads((EXAMPLES / "grafana_dashboard.json").read_text())
    queries = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
    used = set(re.findall(r"sqla_fairpool_\w+", " ".join(queries)))
    assert len(queries) >= 8
    assert used <= exported
    assert all(any(u.startswith(family.name) for u in used) for family in families)


def test_counters_are_there_before_what_they_count(make_engine, registry, provider):
    engine = make_engine()
    register(engine, registry)
    instrument(engine, provider)
    families = {family.name: family for family in registry.collect()}
    for name, label, expected in (
        ("connections_closed", "reason", CLOSURES),
        ("checkout_failures", "reason", {"timeout", "refused", "deadlock"}),
        ("checkouts", "tag", {"unknown"}),
        ("connect_failures", "tag", {"unknown"}),
    ):
        found = families[f"sqla_fairpool_{name}"].samples
        assert {s.labels[label]: s.value for s in found} == dict.fromkeys(expected, 0)


def test_ledger_is_exported_by_its_members(server, tmp_path, registry, provider):
    ledger = str(tmp_path / "app.ledger")
    pools = [server.engine(ledger=ledger, pool_logging_name=n) for n in ("one", "two")]
    register(pools[0], registry)
    instrument(pools[0], provider)
    stats = pools[0].pool.metrics().ledger
    assert (stats.slots, stats.members, stats.transactions) == ({}, None, 0)
    assert samples(registry, "ledger_members") == {}
    held = [pool.connect() for pool in pools]
    eventually(lambda: pools[0].pool.metrics().ledger.members == 2)
    stats = pools[0].pool.metrics().ledger
    assert set(stats.slots) == {"owned", "others", "free", "quarantined"}
    assert sum(stats.slots.values()) == pools[0].pool.options.capacity
    assert (stats.away_time, stats.handover_time.count) == (0.0, 0)
    slots = samples(registry, "ledger_slots", state="owned")
    assert slots == {"sqla_fairpool_ledger_slots": stats.slots["owned"]}
    assert json.loads(json.dumps(pools[0].pool.metrics().as_dict()))["ledger"]
    give(held)
    for pool in pools:
        pool.dispose()
        state.keeper(pool).close()
    assert pools[0].pool.metrics().ledger.members is None


def test_one_exporter_for_all_processes(registry):
    """Figures are those of the moment, and no counter falls when a process ends."""
    scenes = []
    registry.register(OverviewCollector("app", lambda: scenes.pop(0)))

    def seen(*parts):
        limits = Limits(20, 20, 10, 11, quarantined=3)
        scenes.append(
            compile_overview(
                [
                    Part(process("a", number), [TagStats("a", True, **told)])
                    for number, told in parts
                ],
                limits,
            )
        )
        return generate_latest(registry).decode()

    def has(text, *rows):
        assert [row for row in rows if f"sqla_fairpool_{row}\n" not in text] == []

    text = seen((1, {"connections": 2, "checkouts": 5}), (2, {"checkouts": 7}))
    has(
        text,
        'ledger_up{pool="app"} 1.0',
        'ledger_members{pool="app"} 2.0',
        'ledger_slots{pool="app",state="owned"} 4.0',
        'ledger_slots{pool="app",state="free"} 13.0',
        'ledger_slots{pool="app",state="quarantined"} 3.0',
        'connections{pool="app",state="used"} 2.0',
        'connections{pool="app",state="idle"} 2.0',
        'tag_connections{pool="app",tag="a"} 2.0',
        'checkouts_total{pool="app",tag="a"} 12.0',
        'checkout_failures_total{pool="app",reason="timeout",tag="a"} 0.0',
    )
    # What only the processes themselves know is left out.
    assert 'reason="refused"' not in text and "hold_seconds_" not in text
    # One has ended, the other one is silent: its row does not tell of checkouts.
    has(seen((2, {"timeouts": 1})), 'checkouts_total{pool="app",tag="a"} 12.0')
    text = seen((2, {"checkouts": 9, "timeouts": 1}))
    has(text, 'checkouts_total{pool="app",tag="a"} 14.0')
    has(seen(), 'checkouts_total{pool="app",tag="a"} 14.0')
    scenes.append(None)
    text = generate_latest(registry).decode()
    has(text, 'ledger_up{pool="app"} 0.0')
    assert "checkouts_total{" not in text


def test_pause_is_exported(make_engine, registry, reader, provider):
    engine = make_engine(pool_logging_name="main")
    register(engine, registry)
    instrument(engine, provider)
    for change, value in ((engine.pool.pause, 1), (engine.pool.resume, 0)):
        change()
        label = {"pool": "main"}
        assert registry.get_sample_value("sqla_fairpool_paused", label) == value
        (point,) = points(reader)["sqla_fairpool.paused"].values()
        assert point.value == value
    for change, value in ((engine.pool.pause, 1), (engine.pool.resume, None)):
        change("nightly")  # of which nothing else is known
        label = {"pool": "main", "tag": "nightly"}
        assert registry.get_sample_value("sqla_fairpool_tag_paused", label) == value
        told = points(reader).get("sqla_fairpool.tag.paused", {}).items()
        told = [p.value for key, p in told if ("sqla_fairpool.tag", "nightly") in key]
        assert told == [value] * (value or 0)


def _series_of(family):
    if family.type == "histogram":
        return [family.name + end for end in ("_bucket", "_count", "_sum")]
    return [family.name + ("_total" if family.type == "counter" else "")]


# -- OpenTelemetry ---------------------------------------------------------------------


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader):
    provider = MeterProvider([reader])
    yield provider
    provider.shutdown()


def points(reader):
    """Return {metric: {attributes: point}} of one export."""
    data = reader.get_metrics_data()
    return {
        metric.name.removeprefix("db.client.connection."): {
            tuple(sorted(point.attributes.items())): point
            for point in metric.data.data_points
        }
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


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
    conventions = {
        value.removeprefix("db.client.connection.")
        for name, value in vars(db_metrics).items()
        if name.startswith("DB_CLIENT_CONNECTION_") and isinstance(value, str)
    }
    sizes = {"count", "max", "idle.max", "idle.min", "pending_requests", "timeouts"}
    own = {f"sqla_fairpool.tag.{name}" for name in ("weight", "reserved", "usage")}
    own |= {"sqla_fairpool.tag.paused", "sqla_fairpool.paused"}
    assert sizes | own <= set(found) <= conventions | own
    pool = ("db.client.connection.pool.name", "main")
    used = (("db.client.connection.state", "used"), ("sqla_fairpool.tag", "a"))
    assert found["count"][(pool, *used)].value == 1
    found = points(reader)
    # The one before it was instrumented does not count.
    (use,) = found["use_time"].values()
    assert (use.count, use.sum) == (4, pytest.approx(3.2))
    (wait,) = found["wait_time"].values()
    assert (wait.count, wait.sum) == (4, 0)


def test_opentelemetry_names_its_version_and_the_ledger(
    server, tmp_path, reader, provider
):
    engine = server.engine(ledger=str(tmp_path / "app.ledger"))
    instrument(engine, provider)
    with engine.connect():
        state.keeper(engine).member.handovers.add(0.5)
        (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    assert scope.scope.version == version("sqla-fairpool")
    found = {metric.name: metric for metric in scope.metrics}
    names = {"slots", "members", "transactions", "away_time", "handover_time"}
    prefix = "sqla_fairpool.ledger."
    assert {prefix + name for name in names} == {n for n in found if prefix in n}
    (handover,) = found[prefix + "handover_time"].data.data_points
    assert (handover.count, handover.sum) == (1, 0.5)
    state.keeper(engine).close()


def test_opentelemetry_counts_tags_that_come_later(make_engine, reader, provider):
    engine = make_engine()
    instrument(engine, provider)
    engine.execution_options(scraper="late").connect().close()
    engine.pool.stats()  # gives up what is kept warm
    found = points(reader)
    (create,) = found["create_time"].values()
    (use,) = found["use_time"].values()
    assert (create.count, use.count) == (1, 1)
    assert dict(use.attributes)["sqla_fairpool.tag"] == "late"


def test_dry_run_is_counted_by_both_exporters(make_engine, registry, reader, provider):
    engine = make_engine(4, enforce=False, tags={"a": {"max": 1}}, max_waiting=0)
    register(engine, registry)
    instrument(engine, provider)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect(), tagged.connect():
        pass
    assert samples(registry, "would_refuse", tag="a") == {
        "sqla_fairpool_would_refuse_total": 1
    }
    found = points(reader)["sqla_fairpool.tag.would_refuse"].values()
    assert sorted(point.value for point in found) == [0, 1]  # of all other tags, none
