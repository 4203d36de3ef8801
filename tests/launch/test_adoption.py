"""Which engines of an unchanged script get the pool, and with what."""

from __future__ import annotations

import os

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, QueuePool

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool
from sqla_fairpool.launch import adoption
from sqla_fairpool.launch.adoption import adopt, engine_arguments, show_place
from sqla_fairpool.launch.environment import Run
from sqla_fairpool.ledger.addresses import database_place, default_path

URL = "postgresql+psycopg2://app:s3cret@db/app?sslpassword=s3cret"
PLACE = database_place(make_url(URL))


@pytest.fixture(autouse=True)
def no_memory():
    """Settings are read once per process; a test is a process here."""
    adoption._settings.cache_clear()
    yield
    adoption._settings.cache_clear()


@pytest.fixture
def arguments(capsys):
    """Return what an engine gets, and what is said of it."""

    def arguments(url, database=None, options=None, **given):
        options = {"ledger": None, **(options or {})}
        run = Run("layer3", database, verbose=True)
        got = engine_arguments(run, options, url, given)
        out, err = capsys.readouterr()
        assert out == ""
        assert "s3cret" not in err
        return got, err

    return arguments


def test_engine_gets_the_pool_its_options_and_the_tag(arguments):
    options = {"pool_size": "30", "soft_limit": "8", "ledger": "/run/app.ledger"}
    got, said = arguments(URL, options=options, pool_timeout=3, echo=True)
    assert got == {
        "poolclass": FairQueuePool,
        "default_tag": "layer3",
        "pool_timeout": 3,
        "echo": True,
        **options,
    }
    assert said == (
        "sqla-fairpool run: engine for postgresql://db:5432/app: fair pool, "
        "tag 'layer3', ledger /run/app.ledger\n"
    )


def test_size_of_the_script_gives_way_to_the_budget(arguments):
    got, said = arguments(URL, pool_size=5, max_overflow=10)
    assert not {"pool_size", "max_overflow"} & set(got)
    assert said.endswith(
        "; pool_size=20 in place of the script's pool_size=5, max_overflow=10\n"
    )


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


@pytest.mark.parametrize(
    ("url", "given", "why"),
    [
        (URL, {"poolclass": NullPool}, "it has a pool class of its own, NullPool"),
        (URL, {"pool": QueuePool(lambda: None)}, "it has a pool of its own"),
        (URL + "&plugin=fairpool", {}, "its plugin fairpool sees to it"),
        (URL + "&plugin=x&plugin=fairpool", {}, "its plugin fairpool sees to it"),
        (URL, {"plugins": ["fairpool"]}, "its plugin fairpool sees to it"),
        (URL, {"strategy": "mock"}, "it is a mock"),
        ("sqlite://", {}, "other connections would have other databases"),
        ("sqlite:///:memory:", {}, "other connections would have other databases"),
        ("sqlite:///file:a?mode=memory&uri=true", {}, "other connections would have"),
        ("sqlite:///file::memory:?uri=true", {}, "other connections would have"),
        ("sqlite+aiosqlite://", {"_is_async": True}, "other connections would have"),
    ],
)
def test_left_alone(arguments, url, given, why):
    """Warnings, of the spelling of a URL say, are given by create_engine alone."""
    given = {"pool_size": 3, **given}
    got, said = arguments(url, **given)
    assert got == given
    assert f" left alone: {why}" in said
    assert said.count("\n") == 1


OURS = {"poolclass": NullPool, "connect_args": {"application_name": "sqla_fairpool x"}}


@pytest.mark.parametrize(
    ("url", "given"),
    [*((url, {"echo": True}) for url in ("bad", "nosuch://db/app", 5)), (URL, OURS)],
)
def test_what_is_no_scripts_engine_is_left_alone_in_silence(arguments, url, given):
    assert arguments(url, **given) == (given, "")


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
    got, said = arguments(url, database=PLACE)
    if is_adopted:
        assert "poolclass" in got
    else:
        why = "its database is not postgresql://db:5432/app"
        assert (got, said.partition(" left alone: ")[2]) == ({}, f"{why}\n")


@pytest.mark.parametrize(("verbose", "stderr"), [(False, "stderr"), (True, "none")])
def test_silent_unless_verbose_and_heard(capsys, monkeypatch, verbose, stderr):
    if stderr == "none":
        monkeypatch.setattr("sys.stderr", None)
    for url in ("sqlite://", URL):
        engine_arguments(Run("a", verbose=verbose), {"ledger": None}, url, {})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rest", ["h/d?ledger=x", "h:port/d"])
def test_ledger_is_shown_without_a_password(arguments, rest):
    _, said = arguments(URL, options={"ledger": f"postgresql://u:s3cret@{rest}"})
    assert said.endswith(f", ledger postgresql://u:***@{rest}\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no host store")
def test_engine_that_is_not_initialized_is_told_its_ledger(arguments):
    """As ``create_pool_from_url`` makes one: the pool is told no database."""
    got, _ = arguments(URL, options={"ledger": "host"}, _initialize=False)
    assert got["ledger"] == str(default_path(make_url(URL)))
    got, _ = arguments(URL, options={"ledger": "database"}, _initialize=False)
    assert got["ledger"].startswith("postgresql+psycopg2://app:s3cret@db/app")
    got, _ = arguments(URL, options={"ledger": "host"})
    assert got["ledger"] == "host"


# -- for a process ---------------------------------------------------------------------


def test_settings_are_read_once(monkeypatch):
    run = Run("a", options={"idle_timeout": "7", "ledger": None}).text
    monkeypatch.setenv("DYNAMIC_POOL_SIZE", "12")
    monkeypatch.setenv("IDLE_TIMEOUT", "99")
    first = adopt(run, (URL,), {})
    assert (first["pool_size"], first["idle_timeout"]) == ("12", "7")
    monkeypatch.setenv("DYNAMIC_POOL_SIZE", "13")
    assert adopt(run, (), {"url": URL})["pool_size"] == "12"


def test_bad_variable_is_named(monkeypatch):
    monkeypatch.setenv("SCRAPER_SOFT_LIMIT", "many")
    with pytest.raises(ArgumentError, match=r"^SCRAPER_SOFT_LIMIT='many' is not"):
        adopt(Run("a").text, (URL,), {})


@pytest.mark.parametrize(
    ("run", "args"),
    [
        ("{}", (URL,)),  # of another version
        ("nonsense", (URL,)),
        ('{"scraper": "a", "new": 1}', (URL,)),
        (Run("a").text, ()),  # a call without a URL is left to create_engine
    ],
)
def test_what_is_not_understood_is_left_alone(run, args):
    assert adopt(run, args, {"echo": True}) == {"echo": True}


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
