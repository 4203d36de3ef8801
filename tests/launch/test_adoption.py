"""Which engines of an unchanged script get the pool, and with what."""

from __future__ import annotations

import os

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, QueuePool

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool, launch
from sqla_fairpool.launch import Run, adopt, engine_arguments, show_place
from sqla_fairpool.ledger.addresses import database_place, default_path

URL = "postgresql+psycopg2://app:s3cret@db/app?sslpassword=s3cret"
SAID = "sqla-fairpool run: engine for postgresql://db:5432/app"


@pytest.fixture(autouse=True)
def no_memory():
    """Settings are read once per process; a test is a process here."""
    launch._settings.cache_clear()
    yield
    launch._settings.cache_clear()


@pytest.fixture
def arguments(capsys):
    """Return what an engine gets, and what is said of it."""

    def arguments(url, database=None, options=None, verbose=True, **given):
        run = Run("layer3", database, verbose=verbose)
        got = engine_arguments(run, {"ledger": None, **(options or {})}, url, given)
        out, err = capsys.readouterr()
        assert (out, "s3cret" in err) == ("", False)
        return got, err

    return arguments


def test_engine_gets_the_pool_its_options_and_the_tag(arguments):
    options = {"pool_size": "30", "soft_limit": "8", "ledger": "/run/app.ledger"}
    pool = {"poolclass": FairQueuePool, "default_tag": "layer3", **options}
    got, said = arguments(URL, options=options, pool_timeout=3, echo=True)
    assert got == {"pool_timeout": 3, "echo": True, **pool}
    assert said == f"{SAID}: fair pool, tag 'layer3', ledger /run/app.ledger\n"
    # The script's own size gives way to the budget.
    got, said = arguments(URL, pool_size=5, max_overflow=10)
    assert not {"pool_size", "max_overflow"} & set(got)
    replaced = "; pool_size=20 in place of the script's pool_size=5, max_overflow=10\n"
    assert said.endswith(replaced)
    for rest in ("h/d?ledger=x", "h:port/d"):
        _, said = arguments(URL, options={"ledger": f"postgresql://u:s3cret@{rest}"})
        assert said.endswith(f", ledger postgresql://u:***@{rest}\n")


def test_rest_of_the_pools_arguments_stays_the_scripts(tmp_path, arguments):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    given = {"pool_timeout": 3, "pool_recycle": 60, "pool_pre_ping": True}
    given |= {"pool_use_lifo": True, "pool_reset_on_return": None, "pool_size": 5}
    got, _ = arguments(url, pool_logging_name="mine", **given)
    engine = create_engine(url, **got)
    pool = engine.pool
    assert (pool.timeout(), pool._recycle, pool._pre_ping) == (3, 60, True)
    assert (pool.metrics_name, pool.size()) == ("mine", 20)
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        assert pool.stats().tag("layer3").connections == 1
    with engine.execution_options(scraper="own").connect():
        assert pool.stats().tag("own").connections == 1
    engine.dispose()


@pytest.mark.parametrize(
    ("driver", "given", "pool"),
    [
        ("asyncpg", {"_is_async": True}, AsyncAdaptedFairQueuePool),
        ("psycopg", {"_is_async": True}, AsyncAdaptedFairQueuePool),
        ("psycopg", {}, FairQueuePool),
        ("psycopg2", {"poolclass": None, "pool": None}, FairQueuePool),
    ],
)
def test_pool_class_is_the_dialects(arguments, driver, given, pool):
    got, _ = arguments(f"postgresql+{driver}://db/app", **given)
    assert got == {**given, "poolclass": pool, "default_tag": "layer3", "ledger": None}


PLUGIN = "its plugin fairpool sees to it"
MEMORY = "other connections would have other databases in memory"


@pytest.mark.parametrize(
    ("url", "given", "why"),
    [
        (URL, {"poolclass": NullPool}, "it has a pool class of its own, NullPool"),
        (URL, {"pool": QueuePool(lambda: None)}, "it has a pool of its own"),
        (URL + "&plugin=fairpool", {}, PLUGIN),
        (URL + "&plugin=x&plugin=fairpool", {}, PLUGIN),
        (URL, {"plugins": ["fairpool"]}, PLUGIN),
        ("sqlite://", {}, MEMORY),
        ("sqlite:///:memory:", {}, MEMORY),
        ("sqlite:///file:a?mode=memory&uri=true", {}, MEMORY),
        ("sqlite:///file::memory:?uri=true", {}, MEMORY),
        ("sqlite+aiosqlite://", {"_is_async": True}, MEMORY),
    ],
)
def test_left_alone(arguments, url, given, why):
    """Warnings, of the spelling of a URL say, are given by create_engine alone."""
    given = {"pool_size": 3, **given}
    got, said = arguments(url, **given)
    assert (got, said.partition(" left alone: ")[2]) == (given, f"{why}\n")


def test_nothing_is_said_of_what_is_no_scripts_engine(arguments, monkeypatch):
    ours = {"connect_args": {"application_name": "sqla_fairpool x"}}
    ours["poolclass"] = NullPool
    given = {"echo": True}
    assert arguments(URL, **ours) == (ours, "")
    for url in ("bad", "nosuch://h/d", 5):
        assert arguments(url, **given) == (given, "")
    # Nor of any, unless it is asked for and heard.
    for url in ("sqlite://", URL):
        assert arguments(url, verbose=False)[1] == ""
    monkeypatch.setattr("sys.stderr", None)
    for url in ("sqlite://", URL):
        engine_arguments(Run("a", verbose=True), {"ledger": None}, url, {})


@pytest.mark.parametrize(
    ("url", "is_adopted"),
    [
        ("postgresql+asyncpg://db/other", False),
        ("postgresql+psycopg2://db:5433/app", False),
        ("mysql+pymysql://db/app", False),
        ("postgresql+asyncpg://db/app", True),
        ("postgresql+psycopg2://somebody@/app?host=db&port=5432", True),
        (make_url("postgresql+psycopg://db:5432/app"), True),
    ],
)
def test_other_database_is_left_alone(arguments, url, is_adopted):
    got, said = arguments(url, database=database_place(make_url(URL)))
    why = "its database is not postgresql://db:5432/app\n"
    assert ("poolclass" in got) == is_adopted
    assert is_adopted or (got, said.partition(" left alone: ")[2]) == ({}, why)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no host store")
def test_engine_that_is_not_initialized_is_told_its_ledger(arguments):
    """As ``create_pool_from_url`` makes one: the pool is told no database."""
    for ledger, how, told in (
        ("host", {"_initialize": False}, str(default_path(make_url(URL)))),
        ("database", {"_initialize": False}, URL.partition("?")[0]),
        ("host", {}, "host"),
    ):
        got, _ = arguments(URL, options={"ledger": ledger}, **how)
        assert got["ledger"].startswith(told)


def test_settings_are_read_once(monkeypatch):
    run = Run("a", options={"idle_timeout": "7", "ledger": None}).text
    monkeypatch.setenv("DYNAMIC_POOL_SIZE", "12")
    monkeypatch.setenv("IDLE_TIMEOUT", "99")
    first = adopt(run, (URL,), {})
    assert (first["pool_size"], first["idle_timeout"]) == ("12", "7")
    monkeypatch.setenv("DYNAMIC_POOL_SIZE", "13")
    assert adopt(run, (), {"url": URL})["pool_size"] == "12"
    # What is not understood is left alone: of another version, or without a URL.
    for other in ("{}", "nonsense", '{"scraper": "a", "new": 1}'):
        assert adopt(other, (URL,), {"echo": True}) == {"echo": True}
    assert adopt(run, (), {"echo": True}) == {"echo": True}
    monkeypatch.setenv("SCRAPER_SOFT_LIMIT", "many")
    with pytest.raises(ArgumentError, match=r"^SCRAPER_SOFT_LIMIT='many' is not"):
        adopt(Run("a").text, (URL,), {})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "postgresql://db:5432/app"),
        ("mysql://u@h/d", "mysql://h:3306/d"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("sqlite://", "sqlite:///"),
        ("oracle+x://h:1/d", "oracle://h:1/d"),
        ("postgresql://u:s3cret@/d?host=/run", "postgresql:///d?host=/run&port=5432"),
    ],
)
def test_place_is_shown_as_a_url(url, shown):
    assert show_place(database_place(make_url(url))) == shown
