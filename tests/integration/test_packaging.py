"""What a new user does: install it, paste the README, read the metadata."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from sqlalchemy import make_url
from support import documents
from support.threads import eventually

import sqla_fairpool
from sqla_fairpool.options import OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MIGRATION = (ROOT / "examples" / "migration.md").read_text()


def test_metadata_names_the_one_hard_dependency():
    requires = metadata.requires("sqla-fairpool")
    hard = [r for r in requires if "extra ==" not in r]
    assert len(hard) == 1
    assert re.match(r"SQLAlchemy\s*[<>!]", hard[0])
    extras = metadata.metadata("sqla-fairpool").get_all("Provides-Extra")
    assert {"postgresql", "demo", "test", "bench"} <= set(extras)


def test_too_old_a_python_is_refused_before_what_an_extra_needs():
    """Else pip looks for versions of all that for minutes, before it says why not."""
    needed = [Requirement(text) for text in metadata.requires("sqla-fairpool")]
    extras = metadata.metadata("sqla-fairpool").get_all("Provides-Extra")
    for extra in extras:
        for version, is_any in (("3.9", False), ("3.10", True)):
            python = {"extra": extra, "python_version": version}
            found = [r.name for r in needed if r.marker and r.marker.evaluate(python)]
            assert bool(found) is is_any, (extra, found)


@pytest.mark.parametrize("extra", ["postgresql", "demo"])
def test_url_without_a_driver_works_with_the_extra(extra):
    """``postgresql://`` means another driver in each SQLAlchemy."""
    module = make_url("postgresql://h/d").get_dialect().import_dbapi().__name__
    brought = [
        re.match(r"[\w-]+", requirement)[0].removesuffix("-binary")
        for requirement in metadata.requires("sqla-fairpool")
        if f'extra == "{extra}"' in requirement
    ]
    assert module in brought


def test_oldest_sqlalchemy_that_is_admitted_is_tested_and_named():
    setup, tox = (ROOT / "setup.cfg").read_text(), (ROOT / "tox.ini").read_text()
    (oldest,) = re.findall(r"SQLAlchemy >=([\d.]+), <2.2", setup)
    refused = re.findall(r"!=2\.1\.(\d+)", setup)
    assert [int(patch) for patch in refused] == list(range(len(refused)))
    assert f"sqlalchemy20oldest: SQLAlchemy =={oldest}\n" in tox
    assert f"sqlalchemy21oldest: SQLAlchemy ==2.1.{len(refused)}\n" in tox
    assert f"SQLAlchemy {oldest} or later" in README
    assert f"2.1.{len(refused)} or later" in README


def test_build_system_stands_beside_setup_cfg_and_the_marker_of_types_is_there():
    """setup.cfg alone does not install: pip needs a build system beside it."""
    text = (ROOT / "pyproject.toml").read_text()
    assert ("[build-system]" in text, "[project]" in text) == (True, False)
    assert (Path(sqla_fairpool.__file__).parent / "py.typed").exists()


@pytest.mark.postgres
def test_session_that_is_ended_by_sigterm_leaves_no_server():
    program = ROOT / "tests" / "support" / "server_program.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", program]
    said = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as session:
        for line in session.stdout:
            what, _, number = line.decode().partition(" ")
            if what in ("server", "child"):
                said[what] = int(number)
            if what == "child":
                session.terminate()
    assert said["child"] == signal.SIGTERM
    eventually(lambda: not psutil.pid_exists(said["server"]), "the server's end")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("block", [*blocks(README), *blocks(MIGRATION)])
def test_code_of_the_documents_runs_when_pasted(block, tmp_path):
    for driver, file in (("psycopg2", "sqlite"), ("asyncpg", "sqlite+aiosqlite")):
        url = f"postgresql+{driver}://app@localhost/app"
        block = block.replace(url, f"{file}:///t.db")
    environment = {**os.environ, "DATABASE_URL": "sqlite:///t.db"}
    command = [sys.executable, "-W", "error", "-c", block]
    how = {"cwd": tmp_path, "env": environment, "timeout": 60}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr


def test_readmes_options_are_those_of_the_code():
    assert documents.with_tables(README) == README
    (text,) = re.findall(r"Any option can be\schanged but (.*?)\.\n", README, re.DOTALL)
    fixed = {name for name, option in OPTIONS.items() if option.is_fixed}
    assert set(re.findall(r"`(\w+)`", text)) == fixed | {"pool_use_lifo"}


def test_links_between_the_documents_lead_somewhere():
    for name in ("README.md", "examples/migration.md", "examples/deployment.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"
