from __future__ import annotations

import dataclasses
import enum
import inspect
import math
import pickle
import re
import sys

import pytest
from sqlalchemy import engine_from_config
from sqlalchemy.exc import ArgumentError
from sqlalchemy.util import get_cls_kwargs

from sqla_fairpool import FairQueuePool, TooManyWaiting, tag, tagging
from sqla_fairpool.checks import BadOption, validate_tag
from sqla_fairpool.options import OPTIONS, PoolOptions, describe_changes


def test_defaults_are_the_contract():
    options = PoolOptions.parse()
    assert options == PoolOptions(
        pool_size=20,
        max_overflow=0,
        timeout=30.0,
        soft_limit=10,
        max_limit=15,
        idle_timeout=60.0,
        reallocation_interval=30.0,
        tags=None,
        usage_half_life=10.0,
        enforce=True,
        max_waiting=None,
        tag_option="scraper",
        default_tag="unknown",
        min_idle=0,
        idle_connection_ttl=None,
        leak_threshold=None,
        deadlock_timeout=1.0,
        failover_guard=True,
        reconnect_backoff=2.0,
        recycle_jitter=0.1,
        server_tag=False,
        on_other_terms="adopt",
        ledger=None,
        defaulted=frozenset({"soft_limit", "max_limit"}),
    )
    assert options.capacity == 20


def test_create_engine_hands_each_option_on():
    """It knows those only that may be given by position."""
    assert OPTIONS.keys() <= set(get_cls_kwargs(FairQueuePool))


@pytest.mark.parametrize(
    ("size", "overflow", "soft", "most"),
    [(1, 0, 1, 1), (2, 0, 1, 2), (3, 0, 2, 3), (5, 10, 8, 12), (7, 0, 4, 6)],
)
def test_limits_follow_the_capacity_rounded_up(size, overflow, soft, most):
    options = PoolOptions.parse(pool_size=size, max_overflow=overflow)
    assert (options.soft_limit, options.max_limit) == (soft, most)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("pool_size", 0, "would leave nothing to share"),
        ("pool_size", True, "whole number"),
        ("pool_size", 2.5, "whole number"),
        ("pool_size", "many", "whole number"),
        ("pool_size", None, "whole number"),
        ("max_overflow", -1, "no limit in QueuePool"),
        ("max_overflow", False, "whole number"),
        ("pool_timeout", math.inf, "None to wait without limit"),
        ("soft_limit", 0, "from 1"),
        ("soft_limit", 16, "max_limit, 15"),
        ("soft_limit", True, "whole number"),
        ("max_limit", 21, "capacity, 20"),
        ("max_limit", 0, "capacity, 20"),
        ("max_limit", 8, "give soft_limit as well"),
        ("soft_limit", 16, "by default three quarters of the capacity, 20"),
        ("min_idle", 21, "from 0 to pool_size, 20"),
        ("failover_guard", None, "true or false"),
        ("reconnect_backoff", 5.1, "seconds, at least 0 and at most 5"),
        ("reconnect_backoff", -1, "seconds, at least 0 and at most 5"),
        ("reconnect_backoff", None, "seconds, at least 0 and at most 5"),
        ("recycle_jitter", 1.1, "a part of pool_recycle, at least 0 and at most 1"),
        ("recycle_jitter", -0.1, "a part of pool_recycle"),
        ("recycle_jitter", "some", "a part of pool_recycle"),
        ("server_tag", "maybe", "true or false"),
        ("server_tag", 1, "true or false"),
        ("ledger", 7, "'host', a path, or None for no ledger"),
        ("idle_timeout", None, "at least 0.001"),
        ("max_waiting", -1, "None for no limit"),
        ("max_waiting", 1.5, "None for no limit"),
        ("tag_option", "", "execution option"),
        ("tag_option", 3, "execution option"),
        ("default_tag", "", "non-empty"),
        ("default_tag", None, "non-empty"),
    ],
)
def test_bad_value_is_named_with_what_is_allowed(server, name, value, says):
    with pytest.raises(ArgumentError) as caught:
        server.engine(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is not allowed: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("timeout", 0),
        ("idle_timeout", 0.001),
        ("reallocation_interval", 0.001),
        ("idle_connection_ttl", 0.001),
        ("leak_threshold", 0.001),
        ("deadlock_timeout", 0.001),
    ],
)
def test_times_have_bounds(name, least):
    """With one of 1e-300 s a waiting caller did nothing but look at the clock."""
    below = math.nextafter(least, -1)
    for bad in (below, -1, 1.1e9, 1e300, 10**400, math.inf, math.nan, True, "soon"):
        with pytest.raises(ArgumentError) as caught:
            PoolOptions.parse(**{name: bad})
        allowed = f"seconds, at least {least} and at most 1000000000"
        assert str(caught.value).startswith(f"{name}={bad!r} is not allowed: {allowed}")
    for bound in (least, 1e9):
        assert getattr(PoolOptions.parse(**{name: bound}), name) == bound


def test_numbers_may_be_strings(server):
    numbers = {"pool_size": 8, "max_overflow": 2, "soft_limit": 4, "max_limit": 6}
    numbers |= {"timeout": 5.0, "idle_timeout": 1.5, "reallocation_interval": 0.5}
    numbers |= {"max_waiting": 100, "min_idle": 3, "idle_connection_ttl": 9.5}
    numbers |= {"leak_threshold": 60.0, "deadlock_timeout": 2.5}
    texts = {f"sqlalchemy.{name}": f"{number:g}" for name, number in numbers.items()}
    texts["sqlalchemy.pool_timeout"] = texts.pop("sqlalchemy.timeout")
    engine = engine_from_config(
        {"sqlalchemy.url": "sqlite://", **texts},
        poolclass=FairQueuePool,
        creator=server.connect,
    )
    expected = PoolOptions.parse(**numbers)
    assert engine.pool.options == expected
    for name, number in numbers.items():
        assert getattr(expected, name) == number
        assert type(getattr(expected, name)) is type(number)


def test_constructor_takes_what_is_in_the_table():
    """With the same defaults, and a word on each in its docstring."""
    parameters = inspect.signature(FairQueuePool).parameters
    others = {"creator", "use_lifo", "_core", "kw"}
    assert {name: parameters[name].default for name in parameters.keys() - others} == {
        name: option.default for name, option in OPTIONS.items()
    }
    documented = set(re.findall(r":param (\w+):", FairQueuePool.__doc__))
    assert documented == OPTIONS.keys() | {"creator", "use_lifo"}


def test_what_is_no_option_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'softlimit'"):
        PoolOptions.parse(softlimit=3)
    others = {"softlimit": 3, "echo": True, "pool_size": 8}
    assert PoolOptions.among(others) == PoolOptions.parse(pool_size=8)


BAD_TAGS = ["", "x" * 129, "x" * 10_000, None, 7, b"bytes"]
BAD_TAGS += ["a\nb", "\x1b[31mred", "a\tb", "\u202e"]


def test_tag_may_be_any_printable_string_and_nothing_else():
    for good in ("a", "layer1_5", "Ünï cødé", "x" * 128, "a=b; c"):
        assert validate_tag(good) == good
    for bad in BAD_TAGS:
        with pytest.raises(
            ArgumentError, match=r"scraper=.*non-empty string"
        ) as caught:
            validate_tag(bad, "scraper")
        assert len(caught.value.args[0]) < 200


class Old(str, enum.Enum):
    WEB = "web-old"
    EMPTY = ""


class Option(str, enum.Enum):
    TENANT = "tenant"


class Loud(str):
    def __str__(self):
        return "loud"

    __repr__ = __len__ = None


KINDS = [Old.WEB, Loud("web-old")]
if sys.version_info >= (3, 11):
    KINDS.append(enum.StrEnum("New", {"WEB": "web-old"}).WEB)


@pytest.mark.parametrize("value", KINDS, ids=[type(kind).__name__ for kind in KINDS])
def test_tag_of_a_kind_of_string_is_a_plain_string(make_engine, value):
    assert type(validate_tag(value)) is str
    assert validate_tag(value) == "web-old"
    engine = make_engine(default_tag=value, max_waiting=0, pool_size=1)
    roads = [
        lambda: engine.execution_options(scraper=value).connect(),
        lambda: engine.connect().execution_options(scraper=value),
        engine.connect,
    ]
    for road in roads:
        with road():
            (row,) = engine.pool.stats().tags
            assert type(row.name) is str
            assert row.name == "web-old"
            with pytest.raises(TooManyWaiting, match="tag 'web-old' refused"):
                road()
    with tag(value):
        assert type(tagging.context_tag()) is str


def test_enum_stands_for_its_text(make_engine):
    engine = make_engine(tag_option=Option.TENANT)
    with engine.execution_options(tenant="a").connect():
        assert [row.name for row in engine.pool.stats().tags] == ["a"]
    with pytest.raises(ArgumentError, match="tag='' is not allowed"):
        validate_tag(Old.EMPTY)


@pytest.mark.parametrize(
    "ledger",
    [
        "postgresql://me:s3cret@db/app?ledger=x",
        "postgresql://me:s3@cret@db/app",
        "postgresql+psycopg://me@db/app?password=s3cret",
        "postgresql://me:s3cret@db:port/app",
    ],
)
def test_passwords_of_a_ledger_are_shown_nowhere(ledger):
    options = PoolOptions.parse(ledger=ledger)
    other = dataclasses.replace(options, ledger=None)
    bad = BadOption("ledger", ledger, "something else")
    with pytest.raises(ArgumentError) as caught:
        options.changed({"ledger": ledger})
    shown = [repr(options), str(options), f"{options}", repr([options]), repr(bad)]
    shown += [describe_changes(options, other), describe_changes(other, options)]
    shown += [str(bad), str(caught.value), str(pickle.loads(pickle.dumps(bad)))]
    for text in shown:
        assert "postgresql" in text
        assert "cret" not in text
    assert options.ledger == ledger
    assert "pool_size=20" in repr(options)
