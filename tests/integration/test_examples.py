"""The programs below ``examples/`` do what they say, each in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(program, url):
    environment = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"}
    if url is not None:
        environment["DATABASE_URL"] = url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "error", program]
    how = {"cwd": EXAMPLES, "env": environment, "timeout": 60}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


#: What each program prints, its lines joined by "; ".
SAYS = {
    "flask_app.py": "/shop/ {'shop': 1}; /reports/ {'reports': 1}; still held: {}",
    "fastapi_app.py": (
        "/orders acme {'acme': 1}; /orders umbrella {'umbrella': 1}; "
        "/export acme {'exports': 1}; still held: {}"
    ),
    "scraper_threads.py": (
        "{'greedy': 30, 'quick': 30}; greedy checked out 30 times; housekeeping "
        "checked out 1 times; quick checked out 30 times; unknown checked out 1 times"
    ),
    "scrapy_spiders.py": (
        "news checked out 3 times; shops checked out 3 times; "
        "unknown checked out 1 times"
    ),
}


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("pg", marks=pytest.mark.postgres)]
)
@pytest.mark.parametrize("program", SAYS)
def test_program_says_what_it_did(request, database, program):
    url = None
    if database == "pg":
        url = make_url(request.getfixturevalue("postgres_url"))
        if program == "fastapi_app.py":
            url = url.set(drivername="postgresql+asyncpg")
    assert "; ".join(run(program, url)) == SAYS[program]


_DJANGO = """
import django_app, os
django_app.main()
from django.db import connection, OperationalError, InterfaceError
from django.core.signals import request_finished
try:
    with connection.cursor() as cursor:
        cursor.execute("select pg_terminate_backend(pg_backend_pid())")
except (OperationalError, InterfaceError):
    print("lost")
request_finished.send(sender=None)
django_app.visit("acme")
django_app.pools["default"].dispose()
"""


@pytest.mark.postgres
def test_django_gets_its_connections_from_the_pool_and_replaces_a_lost_one(
    postgres_url, tmp_path
):
    (tmp_path / "program.py").write_text(_DJANGO)
    environment = {"PYTHONPATH": str(EXAMPLES), "DATABASE_URL": str(postgres_url)}
    command = [sys.executable, "-W", "error", "program.py"]
    how = {"cwd": tmp_path, "env": {**os.environ, **environment}, "timeout": 60}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.stdout.splitlines() == [
        "acme {'acme': 1}",
        "umbrella {'umbrella': 1}",
        "still held: {}; idle: 1",
        "lost",
        "acme {'acme': 1}",
    ], done.stderr


_CLIENT = """
import json, sys
from celery_app import app
sent = [app.send_task(name) for name in ("orders", "reports") * 4]
print(json.dumps([one.get(timeout=60) for one in sent]))
"""


@pytest.mark.postgres
@pytest.mark.skipif(not hasattr(os, "fork"), reason="prefork needs fork")
def test_celery_with_prefork(postgres_url, tmp_path):
    for folder in ("messages", "results"):
        (tmp_path / folder).mkdir()
    environment = {
        **os.environ,
        "DATABASE_URL": postgres_url,
        "CELERY_BROKER": "filesystem://",
        "CELERY_FOLDER": str(tmp_path / "messages"),
        "CELERY_RESULTS": f"file://{tmp_path / 'results'}",
        "PYTHONPATH": str(EXAMPLES),
    }
    how = {"cwd": tmp_path, "env": environment}
    options = ["worker", "--pool", "prefork", "--concurrency", "2", "-l", "WARNING"]
    command = [sys.executable, "-m", "celery", "-A", "celery_app", *options]
    with open(tmp_path / "log", "w") as log:
        worker = subprocess.Popen(command, stdout=log, stderr=log, **how)
    try:
        client = [sys.executable, "-c", _CLIENT]
        client = subprocess.run(
            client, capture_output=True, text=True, timeout=90, **how
        )
        assert client.returncode == 0, client.stderr + (tmp_path / "log").read_text()
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(60)
    results = json.loads(client.stdout)
    # Each task under its own name, in the children and not in the parent.
    assert [r["holders"] for r in results] == [{"orders": 1}, {"reports": 1}] * 4
    assert worker.pid not in {r["process"] for r in results}
    # None of them used, closed or lost a connection of another process.
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.postgres
def test_unchanged_scripts_do_what_they_do_under_the_launcher(postgres_url):
    environment = {**os.environ, "DATABASE_URL": postgres_url}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    how = {"cwd": EXAMPLES / "unchanged", "env": environment, "text": True, **pipes}
    command = [sys.executable, "-m", "sqla_fairpool", "run", "-v"]
    scripts = {
        name: subprocess.Popen([*command, f"{name}.py", "0.5"], **how)
        for name in ("layer1_5", "layer2", "layer3")
    }
    for name, script in scripts.items():
        out, err = script.communicate("\n", timeout=60)
        assert script.returncode == 0, err
        assert out.startswith(f"{name}: ")
        assert f"fair pool, tag {name!r}, ledger host" in err


_SPIDER = """
import os, scrapy, sqlalchemy
class Store:
    def open_spider(self):
        self.engine = sqlalchemy.create_engine(os.environ["DATABASE_URL"])
    def process_item(self, item):
        with self.engine.connect():
            return item
    def close_spider(self):
        print({row.name: row.checkouts for row in self.engine.pool.stats().tags})
        self.engine.dispose()
class News(scrapy.Spider):
    name = "news"
    start_urls = ["data:,page"]
    custom_settings = {"ITEM_PIPELINES": {Store: 100}}
    def parse(self, response):
        yield {}
"""


def test_unchanged_spider_is_tagged_by_a_setting(tmp_path):
    (tmp_path / "spider.py").write_text(_SPIDER)
    program = ["-m", "scrapy", "runspider", "spider.py", "-L", "ERROR"]
    setting = "ITEM_PROCESSOR=scrapy_spiders.TaggedPipelines"
    environment = {
        **os.environ,
        "DATABASE_URL": f"sqlite:///{tmp_path}/pages.db",
        "PYTHONPATH": str(EXAMPLES),
    }
    done = subprocess.run(
        [sys.executable, "-m", "sqla_fairpool", "run", *program, "-s", setting],
        cwd=tmp_path,
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("{'news': 1}\n", "")


def test_postgresql_to_try_prints_its_url_and_is_gone_with_ctrl_c():
    program = EXAMPLES / "unchanged" / "postgres.py"
    command = [sys.executable, "-W", "ignore", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        assert line.startswith("export DATABASE_URL='postgresql+psycopg2://")
        folder = Path(line.partition("host=")[2].rstrip("'\n"))
        assert folder.is_dir()
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert not folder.exists()
