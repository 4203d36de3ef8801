"""Inside other people's programs: two requests at once, errors, only the URL edited."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from pathlib import Path

import httpx
import pytest
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from fastapi import BackgroundTasks
from fastapi.responses import StreamingResponse
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import create_engine, inspect, make_url, text
from sqlalchemy.pool import NullPool, StaticPool
from support.state import assert_quiet
from support.threads import PATIENCE, Caller, ensure_waiting

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool, tag
from sqla_fairpool.tagging import context_tag

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("flask_app", "fastapi_app"):
        sys.modules.pop(name, None)


@pytest.fixture
def file_url(tmp_path):
    return f"sqlite:///{tmp_path / 'test.db'}"


# -- Flask ---------------------------------------------------------------------------


@pytest.fixture
def flask(examples, file_url):
    import flask_app

    app = flask_app.create_app(
        f"{file_url}?fairpool_pool_size=4&fairpool_soft_limit=1&fairpool_max_limit=1"
    )
    with app.app_context():
        pool = flask_app.db.engine.pool
    app.fair_pool = pool
    yield app
    assert_quiet(pool)
    pool.dispose()


def test_flask_requests_in_flight_have_each_their_own_tag(flask):
    import flask_app

    together = threading.Barrier(2)

    @flask.get("/wait/<name>", endpoint="wait")
    def wait(name):
        with tag(name):  # in a view it may be said more finely
            flask_app.db.session.execute(text("select 1"))
        together.wait(PATIENCE)
        held = flask_app.holders()
        together.wait(PATIENCE)
        return held

    @flask.get("/fail", endpoint="fail")
    def fail():
        flask_app.db.session.execute(text("select 1"))
        raise ZeroDivisionError

    def visit(path):
        return flask.test_client().get(path)

    callers = [Caller(visit, f"/wait/{name}") for name in "ab"]
    for caller in callers:
        assert caller.result().get_json() == {"a": 1, "b": 1}
    # A blueprint at its ceiling does not block another.
    with tag("reports"):
        held = flask.fair_pool.connect()
    waiting = Caller(visit, "/reports/")
    ensure_waiting(flask.fair_pool, 1)
    assert visit("/shop/").get_json() == {"reports": 1, "shop": 1}
    held.close()
    assert waiting.result().get_json() == {"reports": 1}
    # An error leaves neither tag nor connection.
    assert visit("/fail").status_code == 500
    assert (context_tag(), flask.fair_pool.checkedout()) == (None, 0)


def test_flask_sqlalchemy_with_only_the_urls_edited(file_url, tmp_path):
    app, db = Flask(__name__, instance_path=str(tmp_path)), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = (
        f"{file_url}?plugin=fairpool&fairpool_soft_limit=3&fairpool_scraper=web"
    )
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 6, "pool_pre_ping": True}
    app.config["SQLALCHEMY_BINDS"] = {
        "other": f"sqlite:///{tmp_path / 'other.db'}?plugin=fairpool",
        "memory": "sqlite:///:memory:",
    }
    db.init_app(app)
    with app.app_context():
        pool = db.engine.pool
        assert type(pool) is FairQueuePool
        assert (pool.size(), pool.options.soft_limit) == (6, 3)
        db.session.execute(text("create table t (x int)"))
        assert pool.stats().tag("web").connections == 1
        db.session.remove()
        assert type(db.engines["other"].pool) is FairQueuePool
        assert type(db.engines["memory"].pool) is StaticPool
        assert_quiet(pool)
        for engine in db.engines.values():
            engine.dispose()


# -- FastAPI -------------------------------------------------------------------------


@pytest.fixture
def fastapi(examples, file_url):
    import fastapi_app

    url = file_url.replace("sqlite", "sqlite+aiosqlite")
    app = fastapi_app.create_app(url, pool_size=4)
    app.holders = lambda: fastapi_app.holders(app.state.engine)
    return app


def in_fastapi(app, visit):
    async def main():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://app")
        async with app.router.lifespan_context(app), client:
            result = await asyncio.wait_for(visit(client), PATIENCE)
            assert_quiet(app.state.engine.pool)
            return result

    return asyncio.run(main())


def test_fastapi_requests_in_flight_have_each_their_own_tag(fastapi):
    arrived, looked = [], []

    async def until_both(did):
        did.append(1)
        while len(did) < 2:
            await asyncio.sleep(0)

    @fastapi.get("/wait")
    async def wait():
        async with fastapi.state.engine.connect():
            await until_both(arrived)
            held = fastapi.holders()
            await until_both(looked)
        return held

    async def visit(client):
        requests = (client.get("/wait", headers={"x-tenant": t}) for t in ("a", "b"))
        return [answer.json() for answer in await asyncio.gather(*requests)]

    assert in_fastapi(fastapi, visit) == [{"a": 1, "b": 1}] * 2


def test_fastapi_streams_and_background_tasks_keep_their_tag(fastapi):
    seen = []

    async def look(error=None):
        async with fastapi.state.engine.connect():
            seen.append(fastapi.holders())
            if error:
                raise error

    async def parts():
        for _ in range(2):
            await look()
            yield "part "

    @fastapi.get("/stream")
    async def stream():
        return StreamingResponse(parts())

    @fastapi.get("/later")
    async def later(tasks: BackgroundTasks):
        tasks.add_task(look)

    @fastapi.get("/fail")
    async def fail():
        await look(ZeroDivisionError)

    async def visit(client):
        acme = {"headers": {"x-tenant": "acme"}}
        paths = ("/stream", "/later", "/fail")
        return [(await client.get(path, **acme)).status_code for path in paths]

    assert in_fastapi(fastapi, visit) == [200, 200, 500]
    assert seen == [{"acme": 1}] * 4


# -- Alembic -------------------------------------------------------------------------

_REVISION = '''
"""One table."""
from alembic import op
import sqlalchemy as sa
revision = "1"
down_revision = None
def upgrade():
    op.create_table("made", sa.Column("x", sa.Integer))
'''


@pytest.fixture
def alembic(tmp_path, monkeypatch):
    """Make a project with `alembic init`; only the URL is edited."""
    # Its env.py would disable every logger that there is in the tests' process.
    monkeypatch.setattr("logging.config.fileConfig", lambda name: None)

    def make(url, template="generic", without=""):
        config = Config(tmp_path / "alembic.ini")
        command.init(config, str(tmp_path / "scripts"), template=template)
        keys = {"plugin": "fairpool", "fairpool_soft_limit": "3"}
        url = make_url(url).update_query_dict(keys)
        shown = url.render_as_string(hide_password=False).replace("%", "%%")
        config = Config(tmp_path / "alembic.ini")
        config.set_main_option("sqlalchemy.url", shown)
        config.set_main_option("script_location", str(tmp_path / "scripts"))
        env = tmp_path / "scripts" / "env.py"
        env.write_text(env.read_text().replace(without, ""))
        (tmp_path / "scripts" / "versions" / "1_one.py").write_text(_REVISION)
        return config

    return make


#: What stands in Alembic's env.py.
ITS_POOL = "        poolclass=pool.NullPool,\n"


# Its env.py never disposes of the engine, which only a NullPool closes by itself; the
# driver of SQLite warns of that, from Python 3.13 on.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*(sqlite3|aiosqlite)"
    ":pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:alembic")
@pytest.mark.parametrize(
    ("template", "driver", "without", "pool"),
    [
        ("generic", "sqlite", "", NullPool),
        ("generic", "sqlite", ITS_POOL, FairQueuePool),
        ("async", "sqlite+aiosqlite", "", NullPool),
        ("async", "sqlite+aiosqlite", ITS_POOL, AsyncAdaptedFairQueuePool),
    ],
)
def test_alembic_with_only_the_url_edited(
    alembic, file_url, monkeypatch, template, driver, without, pool
):
    used = []
    config = alembic(file_url.replace("sqlite", driver), template, without)
    connect = pool.connect
    monkeypatch.setattr(
        pool, "connect", lambda self: used.append(type(self)) or connect(self)
    )
    command.upgrade(config, "head")
    assert set(used) == {pool}
    engine = create_engine(file_url, poolclass=NullPool)
    assert "made" in inspect(engine).get_table_names()
    gc.collect()  # what is left of env.py, here and not in another test


@pytest.mark.filterwarnings("ignore::DeprecationWarning:alembic")
def test_alembic_offline(alembic, file_url, capsys):
    command.upgrade(alembic(file_url), "head", sql=True)
    assert "CREATE TABLE made" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:alembic")
def test_alembic_reports_a_bad_key(alembic, file_url):
    config = alembic(file_url + "?fairpool_softlimit=3")
    with pytest.raises(Exception, match="unknown key 'fairpool_softlimit'") as caught:
        command.upgrade(config, "head")
    assert not isinstance(caught.value, CommandError)
