"""Where a ledger is: default places, and what is refused."""

from __future__ import annotations

import os

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from sqla_fairpool.ledger import addresses
from sqla_fairpool.ledger.addresses import default_path, make_store
from sqla_fairpool.ledger.store import LedgerError

URL = make_url("postgresql://host/app")


def test_default_place_follows_from_the_database(temp, tmp_path, monkeypatch):
    def place(url):
        return default_path(make_url(url))

    path = place("postgresql+psycopg2://me:s3cret@db.example:5433/app?sslmode=require")
    assert path.parent == temp / f"sqla-fairpool-{os.getuid()}"
    assert path.name.startswith("postgresql-db.example-5433-app-")
    assert "s3cret" not in str(path)
    assert place("postgresql+asyncpg://you:other@db.example:5433/app") == path
    for different in (
        "postgresql://db.example:5434/app",
        "postgresql://db.example:5433/app2",
        "postgresql://db_example:5433/app",
        "mysql://db.example:5433/app",
    ):
        assert place(different) != path
    # SQLite's files are told apart by where they are.
    monkeypatch.chdir(tmp_path)
    named = place("sqlite:///x.db")
    assert named == place(f"sqlite:///{tmp_path}/x.db") != place("sqlite:///y/x.db")


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR", "HOME"])
def test_default_place_is_the_same_in_every_environment(
    temp, tmp_path, monkeypatch, variable
):
    """Shells have these variables, cron and system services have others, or none."""
    monkeypatch.delenv(variable, raising=False)
    path = default_path(URL)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert default_path(URL) == path


def test_default_place_is_this_users_alone_or_refused(temp, monkeypatch):
    place = default_path(URL).parent
    place.chmod(0o755)
    with pytest.raises(LedgerError, match="this user alone"):
        default_path(URL)
    place.rmdir()
    (temp / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(temp / "elsewhere")
    with pytest.raises(LedgerError, match="this user alone"):
        default_path(URL)
    monkeypatch.setattr(addresses, "_TEMP", temp / "nowhere")
    with pytest.raises(LedgerError, match=r"cannot be made \(No such file"):
        default_path(URL)


@pytest.mark.parametrize(
    "bad",
    [
        *("hosts", "", "mysql://u:s3cret@h/db", "name", "x://s3cret"),
        *("postgresql://u:s3cret@h:port/db", "u:s3cret@h/db", "u:s3/cret@h"),
    ],
)
def test_anything_else_is_refused_without_a_secret(bad):
    with pytest.raises(ArgumentError, match="ledger=") as caught:
        make_store(bad, URL)
    assert "cret" not in str(caught.value)
