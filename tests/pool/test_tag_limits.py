"""Limits of a tag's own, from every place where they may be given."""

from __future__ import annotations

import json
import math

import pytest
from sqlalchemy import create_engine, exc
from support.threads import Caller, connect, wait_in_line

from sqla_fairpool import FairQueuePool, TagLimits
from sqla_fairpool.options import PoolOptions

LIMITS = {
    "api": TagLimits(weight=3.0),
    "reports": TagLimits(max=2),
    "health": TagLimits(reserved=1),
    "tenant:*": TagLimits(weight=0.5, max=4),
}
AS_JSON = json.dumps(
    {
        "api": {"weight": 3},
        "reports": {"max": 2},
        "health": {"reserved": 1},
        "tenant:*": {"weight": 0.5, "max": 4},
    }
)


@pytest.mark.parametrize("given", [LIMITS, json.loads(AS_JSON), AS_JSON])
def test_limits_come_as_objects_as_dicts_or_as_json(given):
    assert PoolOptions.parse(tags=given).tags == LIMITS


def test_limits_stand_in_the_url():
    engine = create_engine(
        "sqlite:///limits.db",
        poolclass=FairQueuePool,
        creator=lambda: None,
        plugins=["fairpool"],
    )
    assert engine.pool.options.tags is None
    url = engine.url.update_query_dict({"plugin": "fairpool", "fairpool_tags": AS_JSON})
    assert create_engine(url).pool.options.tags == LIMITS


@pytest.mark.parametrize(
    ("tags", "named", "allowed"),
    [
        ("{", "'{'", "JSON, like"),
        ("[1]", "[1]", "by tag"),
        ({"api": 3}, "{'api': 3}", "weight, max, reserved"),
        ({"api": {"wieght": 3}}, "wieght", "weight, max, reserved"),
        ({"api": {"weight": 0}}, "'weight': 0", "above 0"),
        ({"api": {"weight": math.nan}}, "nan", "above 0"),
        ({"api": {"weight": "heavy"}}, "heavy", "above 0"),
        ({"api": {"weight": True}}, "True", "above 0"),
        ({"api": {"max": 0}}, "'max': 0", "from 1"),
        ({"api": {"max": 21}}, "'max': 21", "to the capacity, 20"),
        ({"api": {"max": 2, "reserved": 3}}, "'reserved': 3", "reserved"),
        ({"api": {"reserved": -1}}, "'reserved': -1", "from 0"),
        ({"api": {"reserved": 20}}, "'reserved': 20", "less one, 19"),
        ({"a": {"reserved": 10}, "b": {"reserved": 10}}, "'b': 10", "less one, 19"),
        ({"t:*": {"reserved": 1}}, "t:*", "for one tag"),
        ({"": {"max": 1}}, "''", "a tag is"),
        ({"api": {"lock_timeout": 0}}, "'lock_timeout': 0", "seconds, at least 0.001"),
        ({"api": {"statement_timeout": True}}, "True", "statement_timeout is seconds"),
        ({"api": {"statement_timeout": "5s"}}, "5s", "statement_timeout is seconds"),
        ({"api": {"idle_in_transaction_timeout": 1e7}}, "10000000.0", "most 2147483"),
        (TagLimits(max=1), "TagLimits", "by tag"),
    ],
)
def test_bad_limits_are_one_line_that_names_them(tags, named, allowed):
    with pytest.raises(exc.ArgumentError) as caught:
        PoolOptions.parse(tags=tags)
    message = str(caught.value)
    assert message.startswith("tags=")
    assert named in message
    assert allowed in message
    assert "\n" not in message


def test_limits_can_change_while_callers_wait(make_engine):
    engine = make_engine(4, tags={"a": {"max": 1}}, soft_limit=4, max_limit=4)
    held = connect(engine, "a")
    (waiting,) = wait_in_line(engine, "a")
    engine.pool.reconfigure(tags={"a": {"max": 2, "weight": 2}})
    waiting.result().close()
    held.close()
    row = engine.pool.stats().tag("a")
    assert (row.weight, row.max, row.reserved) == (2.0, 2, 0)
    engine.pool.reconfigure(tags=None)
    assert engine.pool.stats().tag("a").max is None


def test_reserved_connection_is_there_while_all_others_are_out(make_engine):
    engine = make_engine(
        3, tags={"health": {"reserved": 1}}, soft_limit=3, max_limit=3, pool_timeout=0
    )
    held = [connect(engine, "web") for _ in range(2)]
    stats = engine.pool.stats()
    assert (stats.checked_out, stats.available) == (2, 0)
    with pytest.raises(exc.TimeoutError, match="limit=2"):
        connect(engine, "web")
    for _ in range(3):
        connect(engine, "health").close()
    for connection in held:
        connection.close()


def test_time_limits_are_no_terms_of_a_ledger():
    """A process of an earlier version would not know them."""
    tags = {"a": {"max": 2, "lock_timeout": 1}, "b": {"statement_timeout": "5"}}
    options = PoolOptions.parse(tags=tags, ledger="host")
    assert "timeout" not in options.terms["tags"]
    other = PoolOptions.parse(tags={"*": {"weight": 2}}, ledger="host")
    assert options.with_terms(other.terms).tags == {
        "*": TagLimits(weight=2),
        "a": TagLimits(weight=2, lock_timeout=1),
        "b": TagLimits(weight=2, statement_timeout=5),
    }


def test_usage_is_in_the_figures(make_engine):
    engine = make_engine(3)
    connect(engine, "a").close()
    assert engine.pool.stats().tag("a").usage >= 0.0


def test_time_out_says_what_the_tag_has_of_its_own(make_engine):
    engine = make_engine(
        4, tags={"a": {"max": 1, "weight": 2.5}, "b": {"reserved": 1}}, pool_timeout=0
    )
    with connect(engine, "a"), pytest.raises(exc.TimeoutError) as caught:
        Caller(connect, engine, "a").result()
    message = str(caught.value)
    assert "limit=1 waiting=1 position=1 weight=2.5 max=1 usage=0.0s; pool" in message
    assert "it may have 1 (max, its own)" in message


def test_pool_explains_a_tag(make_engine):
    engine = make_engine(4, tags={"a": {"max": 1}})
    with connect(engine, "a"):
        explanation = engine.pool.explain("a")
    assert (explanation.connections, explanation.ceiling_rule) == (1, "max")
    assert "its own maximum" in str(explanation)


def test_dry_run_serves_all_and_counts_what_the_rules_would_have_done(make_engine):
    engine = make_engine(4, enforce=False, tags={"a": {"max": 1}}, max_waiting=0)
    held = [connect(engine, "a") for _ in range(3)]
    stats = engine.pool.stats()
    assert stats.enforce is False
    for connection in held:
        connection.close()
    row = engine.pool.stats().tag("a")
    assert (row.limit, row.max, row.would_refuse) == (1, 1, 2)
    assert row.would_wait.count == 0
    assert engine.pool.metrics().tag("a").would_refuse == 2
    assert engine.pool.explain("a").ceiling == 1
    with pytest.raises(exc.ArgumentError, match="tag='' is not allowed"):
        engine.pool.explain("")


def test_pool_whose_rules_are_in_force_has_no_figures_of_a_dry_run(make_engine):
    engine = make_engine(4)
    connect(engine, "a").close()
    row = engine.pool.stats().tag("a")
    assert row.would_wait is row.would_refuse is None


def test_ledger_has_no_dry_run():
    with pytest.raises(exc.ArgumentError, match=r"^enforce=False is not allowed: with"):
        PoolOptions.parse(enforce="no", ledger="host")
