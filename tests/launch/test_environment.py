"""The settings of scripts, from the environment, and the databases that URLs name."""

from __future__ import annotations

import socket
import sys

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from sqla_fairpool.launch import RUN, VARIABLES, Run, Settings, parse_url
from sqla_fairpool.ledger import addresses
from sqla_fairpool.ledger.addresses import (
    database_place,
    default_ledger,
    with_threads_driver,
)
from sqla_fairpool.ledger.drivers import asyncpg_arguments, for_asyncio, for_threads

VALUES = {
    "DYNAMIC_POOL_SIZE": "30",
    "SCRAPER_SOFT_LIMIT": "12",
    "SCRAPER_MAX_LIMIT": "25",
    "IDLE_TIMEOUT": "5.5",
    "REALLOCATION_INTERVAL": "2",
    "FAIRPOOL_LEDGER": "/run/app.ledger",
    "FAIRPOOL_TAGS": '{"api": {"weight": 3}}',
}


def test_variables_stand_for_options():
    settings = Settings.read({"DATABASE_URL": "postgresql://host/app", **VALUES})
    assert settings.url == "postgresql://host/app"
    assert VALUES.keys() == VARIABLES.keys()
    options = {VARIABLES[name]: value for name, value in VALUES.items()}
    assert settings.with_arguments({}) == options
    changed = settings.with_arguments({"idle_timeout": 7})
    assert changed == {**options, "idle_timeout": 7}
    # What the launcher was told wins over what it found.
    run = Run("layer3", ("postgresql", "db", "5432", "app"), {"pool_size": 8}, True)
    settings = Settings.read({RUN: run.text, "DYNAMIC_POOL_SIZE": "30"})
    assert settings.run == run
    assert settings.with_arguments({})["pool_size"] == 8
    assert Run.of({}) is None


def test_nothing_set_is_the_host_ledger_and_the_pools_defaults():
    for environment, ledger in (
        ({"IDLE_TIMEOUT": "", "DATABASE_URL": ""}, default_ledger()),
        ({"FAIRPOOL_LEDGER": "None"}, None),
    ):
        settings = Settings.read(environment)
        assert settings.with_arguments({}) == {"ledger": ledger}
        assert settings.database(None) is None


def test_bad_value_names_the_variable_unless_it_is_an_arguments():
    for variable, name in VARIABLES.items():
        if name not in ("ledger", "tags"):
            settings = Settings.read({variable: "none"})
            with pytest.raises(ArgumentError, match=f"^{variable}='none' is not all"):
                settings.with_arguments({})
            with pytest.raises(ArgumentError, match=f"^{name}=0 is not allowed"):
                settings.with_arguments({name: 0})
            settings.with_arguments({name: 10})
    for limit in ("max", "statement_timeout", "lock_timeout"):
        settings = Settings.read({"FAIRPOOL_TAGS": f'{{"api": {{"{limit}": 0}}}}'})
        with pytest.raises(ArgumentError, match=rf"^FAIRPOOL_TAGS=\{{'api': .*{limit}"):
            settings.with_arguments({})
    settings = Settings.read({"SCRAPER_SOFT_LIMIT": "12"})
    with pytest.raises(ArgumentError, match=r"^SCRAPER_SOFT_LIMIT=.12. is not"):
        settings.with_arguments({"max_limit": 11})
    for bad in ("s3cret", "postgresql://u:s3cret@h:port/d"):
        with pytest.raises(ArgumentError, match=r"^DATABASE_URL=.* a dat") as caught:
            Settings.read({"DATABASE_URL": bad}).database(None)
        assert "s3cret" not in str(caught.value)


# -- one database by many names --------------------------------------------------------


def place(url):
    return database_place(parse_url(url, "url"))


def postgresql(rest):
    """Return the place of a PostgreSQL, by the URL without its scheme."""
    return place(f"postgresql{'' if rest.startswith('+') else ':'}{rest}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("//app@localhost/app", "+asyncpg://x@127.0.0.1:5432/app"),
        ("///app", "//[::1]/app"),
        ("//u@db", "//db:5432/u"),
        ("///app?host=/tmp/s", "///app?host=/tmp/s&port=5432"),
        ("//LOCALHOST/app", "///app?host=/var/run/postgresql"),
        ("//127.0.1.1/app", "///app?host=/tmp"),
        ("//127.1/app", "//[0:0:0:0:0:0:0:1]:5432/app"),
        ("///app?host=/run/postgresql/", "//0.0.0.0/app"),
        ("///app", "//[::ffff:127.0.0.1]/app"),
        ("///app", "//localhost.localdomain./app"),
        ("///app", f"//{socket.gethostname().upper()}/app"),
        ("//DB.example./app", "//db.example/app"),
        ("//10.0.0.1/app", "//[::ffff:10.0.0.1]/app"),
        ("//[2001:DB8::0:1]/app", "//[2001:db8:0::1]:05432/app"),
        ("//h/app", "//x/app?host=h"),
        ("//h/app", "///other?host=h:5432&dbname=app"),
        ("//10.1.2.3/app", "//any/app?hostaddr=10.1.2.3"),
        ("///app?host=A,b&port=1,2", "///app?host=a:1&host=B:2"),
        ("///app?host=a,b", "///app?host=a,b.&port=5432"),
        ("///app?host=localhost,::1", "///app"),
    ],
)
def test_ways_to_name_one_postgresql(one, other):
    assert postgresql(one) == postgresql(other)


def test_ways_to_name_one_database_of_another_kind():
    one = place("mysql+pymysql://h/app")
    assert one == place("mariadb+asyncmy://h:3306/app") != postgresql("//h/app")
    one = place(f"mysql://{socket.gethostname()}:3306/app")
    assert one == place("mysql://localhost/app")
    assert place("sqlite:////tmp/x/../x.db") == place("sqlite:////tmp/x.db")
    assert parse_url("postgres://u@h/d", "--url").drivername == "postgresql"
    assert parse_url("postgres+asyncpg://h/d", "x").drivername == "postgresql+asyncpg"


def test_databases_that_are_not_one(tmp_path, monkeypatch):
    """Embedded servers have the same port, and each a directory."""
    named = "//db/app //db/app2 //db:5433/app //db2/app ///app?host=@s"
    named += " ///app?host=db,db2 ///app?host=db&port=5434"
    assert len({*map(postgresql, named.split())}) == len(named.split())
    one, two, link = (tmp_path / name for name in ("one", "two", "link"))
    one.mkdir()
    link.symlink_to(one)
    hosts = [one, two, "@One", "@one", "a,b", "b,a"]
    places = [postgresql(f"///app?host={host}") for host in hosts]
    assert len({*places, postgresql("///app")}) == len(hosts) + 1
    assert postgresql(f"///app?host={link}") == places[0]
    assert places[-2][1:3] == ("a,b", "5432,5432")
    (one / "x.db").touch()
    (one / "link.db").symlink_to(one / "x.db")
    assert place(f"sqlite:///{one}/x.db") == place(f"sqlite:///{one}/link.db")
    # What the URL leaves out is as libpq has it.
    for name, value in (("HOST", "DB"), ("PORT", "5433"), ("DATABASE", "app")):
        monkeypatch.setenv(f"PG{name}", value)
    assert postgresql("//") == postgresql("//db:5433/app")
    assert postgresql("//h:1/d") == ("postgresql", "h", "1", "d")
    assert place("mysql:///d") == ("mysql", "localhost", "3306", "d")


HOSTS = """
# a comment
127.0.1.1\tmachine.example.com machine # of Debian
10.0.0.5 other Machine2.lan
10.0.0.6 elsewhere
"""


@pytest.mark.parametrize("is_there", [True, False])
def test_names_in_the_hosts_file_are_known(tmp_path, monkeypatch, is_there):
    monkeypatch.setattr(addresses, "_HOSTS_FILE", tmp_path / "hosts")
    monkeypatch.setattr("socket.gethostname", lambda: "machine2.lan")
    here = {"machine2"}
    if is_there:
        (tmp_path / "hosts").write_text(HOSTS)
        here |= {"machine", "machine.example.com", "other", "10.0.0.5"}
    addresses._names_of_this_host.cache_clear()
    names = here | {"elsewhere", "10.0.0.6", "comment", "machine", "other"}
    found = {name for name in names if postgresql(f"//{name}/app")[1] == "localhost"}
    addresses._names_of_this_host.cache_clear()
    assert found == here


# -- drivers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "chosen", "missing"),
    [
        ("psycopg2://u@h/d", "psycopg2://u@h/d", ""),
        (
            "psycopg://h/d?sslmode=require&plugin=fairpool&fairpool_x=1",
            "psycopg://h/d?sslmode=require",
            "",
        ),
        (
            "asyncpg://u@/d?host=/t&prepared_statement_cache_size=0",
            "psycopg://u@/d?host=/t",
            "",
        ),
        (
            "asyncpg://u@/d?ssl=verify-full&timeout=2.5&command_timeout=9",
            "psycopg://u@/d?sslmode=verify-full&connect_timeout=3",
            "",
        ),
        (
            "asyncpg://u@/d?sslmode=verify-ca&sslrootcert=/ca.pem&ledger=x",
            "psycopg://u@/d?sslmode=verify-ca&sslrootcert=/ca.pem",
            "",
        ),
        ("psycopg2://u@h/d", "psycopg://u@h/d", "psycopg2"),
        ("://u@h/d", "psycopg2://u@h/d", "psycopg"),
    ],
)
def test_driver_for_questions_to_a_postgresql(given, chosen, missing, monkeypatch):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    given = make_url("postgresql" + (given if given[0] == ":" else f"+{given}"))
    assert with_threads_driver(given) == make_url(f"postgresql+{chosen}")


def test_driver_for_threads_and_for_asyncio(monkeypatch):
    for given, threads, asyncio in (
        ("postgresql+psycopg2", "postgresql+psycopg2", "postgresql+asyncpg"),
        ("postgresql+asyncpg", "postgresql+psycopg2", "postgresql+asyncpg"),
        ("postgresql+psycopg", "postgresql+psycopg", "postgresql+psycopg"),
        ("sqlite", "sqlite", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite", "sqlite+pysqlite", "sqlite+aiosqlite"),
    ):
        url = make_url(f"{given}:///d")
        chosen = for_threads(url).drivername, for_asyncio(url).drivername
        assert chosen == (threads, asyncio)
    url = make_url("postgresql+asyncpg://h/d?ssl=verify_full&statement_cache_size=0")
    chosen = make_url("postgresql+psycopg2://h/d?sslmode=verify-full")
    assert for_threads(url) == chosen
    # A URL without a driver gets one that is installed.
    url = make_url("postgresql://h/d")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert for_threads(url).get_driver_name() == "psycopg2"
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ArgumentError, match="install one of asyncpg, psycopg"):
        for_asyncio(url)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    assert for_threads(url) == url  # SQLAlchemy will complain


def arguments_of(query):
    return asyncpg_arguments(
        make_url(f"postgresql+asyncpg://u:s3cret@h/d?{query}").query
    )


@pytest.mark.parametrize(
    ("query", "arguments"),
    [
        ("", {}),
        ("sslmode=require", "sslmode=require"),
        (
            "sslmode=verify-full&sslrootcert=/a b/ca.pem",
            "sslmode=verify-full&sslrootcert=%2Fa%20b%2Fca.pem",
        ),
        ("sslmode=verify-full&sslrootcert=system", {"ssl": True}),
        ("connect_timeout=10", {"timeout": 10.0}),
        ("connect_timeout=0", {"timeout": None}),
        ("timeout=2.5&command_timeout=9", {"timeout": 2.5, "command_timeout": 9.0}),
        ("statement_cache_size=0", {"statement_cache_size": 0}),
        (
            "options=-c statement_timeout%3D5s&application_name=x",
            "options=-c%20statement_timeout%3D5s&application_name=x",
        ),
        ("sslmode=allow&sslmode=prefer", "sslmode=prefer"),
        ("host=/tmp&port=5&ssl=require&prepared_statement_cache_size=0", {}),
        ("target_session_attrs=read-write&krbsrvname=x", {}),
        ("keepalives=1&keepalives_idle=5&client_encoding=utf8&gssencmode=prefer", {}),
    ],
)
def test_libpqs_keys_as_asyncpgs_arguments(query, arguments):
    """A text stands for the query of the ``dsn``, which asyncpg reads as libpq does."""
    if isinstance(arguments, str):
        arguments = {"dsn": f"postgresql://?{arguments}"}
    assert arguments_of(query) == arguments


def test_key_that_asyncpg_cannot_honour_is_refused(caplog):
    for query in (
        "gssencmode=require",
        "require_auth=scram-sha-256",
        "requirepeer=postgres",
        "sslmod=require",
        "connect_timeout=soon",
        "statement_cache_size=many",
        "sslmode=require&sslrootcert=system",
    ):
        name = query.rpartition("&")[2].partition("=")[0]
        with pytest.raises(ArgumentError, match=rf"^{name}=.* is not allowed: "):
            arguments_of(query)
    # One that it has not, and that is no matter of safety, is left out and told of.
    assert set(arguments_of("sslmode=require&channel_binding=require")) == {"dsn"}
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "WARNING",
        "asyncpg has no channel_binding: channel_binding=require is left out",
    )
