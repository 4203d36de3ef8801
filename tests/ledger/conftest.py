from __future__ import annotations

import uuid

import pytest
from sqlalchemy import create_engine, make_url, text
from support.ledger import World
from support.stores import Elsewhere, store_at


@pytest.fixture
def world():
    """Processes that share a ledger, in one thread."""
    return World()


@pytest.fixture
def path(tmp_path):
    """Where a host ledger is to be, in a directory of its own."""
    path = tmp_path / "run" / "app.ledger"
    path.parent.mkdir()
    return path


@pytest.fixture(
    params=[
        "host",
        pytest.param("psycopg2", marks=pytest.mark.postgres),
        pytest.param("psycopg", marks=pytest.mark.postgres),
    ]
)
def place(request, path):
    """Where a new ledger is, of each kind."""
    if request.param == "host":
        return path
    url = make_url(request.getfixturevalue("postgres_url"))
    return url.set(drivername=f"postgresql+{request.param}"), uuid.uuid4().hex


@pytest.fixture(params=["host", "postgresql"])
def ledger(request, tmp_path, postgres_url):
    """What names a new ledger, of each kind; or a fixture that does."""
    if request.param == "host":
        return str(tmp_path / "app.ledger")
    if request.param != "postgresql":
        return request.getfixturevalue(request.param)
    url = make_url(postgres_url).update_query_dict({"ledger": uuid.uuid4().hex})
    return url.render_as_string(hide_password=False)


@pytest.fixture
def opened():
    """Open stores, or the stores at places; they are closed after the test."""
    stores = []

    def opened(store):
        store = store if hasattr(store, "transaction") else store_at(store)
        stores.append(store)
        store.open()
        return store

    yield opened
    for store in stores:
        store.close()


@pytest.fixture
def make(opened, place):
    """Make open stores of each kind."""
    return lambda: opened(place)


@pytest.fixture
def make_host(opened, path):
    """Make open host stores."""
    return lambda: opened(path)


@pytest.fixture
def elsewhere():
    """Start processes with an open store, killed after the test."""
    started = []

    def elsewhere(place, prepare=None):
        started.append(Elsewhere(place, prepare))
        return started[-1]

    yield elsewhere
    for other in started:
        other.kill()


@pytest.fixture
def operator(postgres_url):
    """Run statements as the operator does, in a database; quotes nothing."""

    def run(url, *statements, **values):
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                result = connection.execute(text(statement), values)
        found = result.scalars().all() if result.returns_rows else None
        engine.dispose()
        return found

    return run
