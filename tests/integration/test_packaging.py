"""What a new user does: install it, paste the README, read the metadata."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
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
from support.imports import MODULES
from support.threads import eventually

import sqla_fairpool
from sqla_fairpool import plugin
from sqla_fairpool.cli import make_argument_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_metadata_names_the_one_hard_dependency():
    requires = metadata.requires("sqla-fairpool")
    hard = [r for r in requires if "extra ==" not in r]
    assert len(hard) == 1
    assert re.match(r"SQLAlchemy\s*[<>!]", hard[0])
    extras = metadata.metadata("sqla-fairpool").get_all("Provides-Extra")
    assert {"postgresql", "demo", "test", "bench"} <= set(extras)
    assert sqla_fairpool.__version__ == metadata.version("sqla-fairpool")


def test_index_shows_where_the_project_lives_and_finds_it_by_what_people_look_for():
    fields, address = metadata.metadata("sqla-fairpool"), documents.address()
    links = dict(link.split(", ", 1) for link in fields.get_all("Project-URL"))
    assert {"Source", "Documentation", "Changelog", "Issues"} <= set(links)
    for link in [fields["Home-page"], *links.values()]:
        assert (link + "/").startswith(address + "/")
    wanted = {"tenants", "workloads", "worker fleets", "QueuePool limit"}
    assert wanted <= set(fields["Keywords"].split(","))
    assert fields["Author"] == "sqla_fairpool contributors"


def test_import_loads_no_more_than_a_pool_needs():
    """Not the ledger, nor what makes up figures, messages and explanations."""
    look = "; print(*sorted(set(sys.modules) - before))"
    command = "import sys, sqlalchemy, sqlalchemy.pool; before = set(sys.modules); "

    def loaded(statement):
        line = [sys.executable, "-c", command + statement + look]
        return set(subprocess.check_output(line, text=True).split())

    assert loaded("import sqla_fairpool") == {"sqla_fairpool"}
    names = loaded("from sqla_fairpool import FairQueuePool")
    ours = {name for name in names if name.startswith("sqla_fairpool.")}
    ledger = {name for name in ours if name.startswith("sqla_fairpool.ledger.")}
    assert ledger == {f"sqla_fairpool.ledger.{n}" for n in ("drivers", "store")}
    assert not ours & {
        "sqla_fairpool.stats",
        "sqla_fairpool.diagnosis.report",
        "sqla_fairpool.pool.snapshot",
        "sqla_fairpool.scheduling.explanation",
    }
    assert not names & {"importlib.metadata", "multiprocessing", "sqlite3"}


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


def blocks(path):
    """Return what a document says can be pasted; what it names is a file (start.md)."""
    found = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return [block for block in found if not re.match(r"# \w+\.py\n", block)]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{path.relative_to(ROOT).as_posix()}-{n}")
        for path in documents.DOCUMENTS
        for n, block in enumerate(blocks(path))
    ],
)
def test_code_of_the_documents_runs_when_pasted(block, tmp_path):
    for driver, file in (("psycopg2", "sqlite"), ("asyncpg", "sqlite+aiosqlite")):
        url = f"postgresql+{driver}://app@localhost/app"
        block = block.replace(url, f"{file}:///t.db")
    environment = {**os.environ, "DATABASE_URL": "sqlite:///t.db"}
    command = [sys.executable, "-W", "error", "-c", block]
    how = {"cwd": tmp_path, "env": environment, "timeout": 60}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr


def _shown(path):
    """Yield each line of a document that is set as code, without its comment."""
    text = path.read_text()
    for block in re.findall(r"```(?:console|text|yaml)\n(.*?)```", text, re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"^    (\S.*)", text, re.MULTILINE)


#: What a reader has to fill in.
_PLACEHOLDER = re.compile(r"\.\.\.|[\[<]|\b[A-Z]+\b(?!=)")


def test_commands_and_urls_of_the_documents_are_known():
    seen = []
    for line in (line for path in documents.DOCUMENTS for line in _shown(path)):
        command = re.search(r"(?<![\w/.-])sqla-fairpool ((?:[a-z]+ ?)[^#&;>|]*)", line)
        if command and not _PLACEHOLDER.search(command[1]):
            words, _, _ = command[1].partition("  ")  # what follows explains it
            arguments = shlex.split(words)
            make_argument_parser().parse_args(arguments)
            seen.append(arguments[0])
        if url := re.search(r"postgresql\S*\?plugin=fairpool[^\s'\"`]*", line):
            query = make_url(url[0]).query
            plugin._read({key: query[key] for key in query if key != "plugin"})
            seen.append("url")
    assert {"run", "monitor", "ledger", "explain", "url"} <= set(seen)


@pytest.mark.postgres
def test_commands_of_the_first_page_end_with_two_programs_on_one_budget(
    postgres_url, tmp_path
):
    """As pasted, but for installing, the server, the time and the monitor's screen."""
    page = (ROOT / "docs" / "start.md").read_text()
    (program,) = re.findall(r"```python\n# news\.py\n(.*?)```", page, re.DOTALL)
    for name in ("news", "prices"):
        (tmp_path / f"{name}.py").write_text(program)
    commands = re.findall(r"^sqla-fairpool (run .*) &$", page, re.MULTILINE)
    assert len(commands) == 2
    assert "\nsqla-fairpool stats\n" in page
    path = {"FAIRPOOL_LEDGER": str(tmp_path / "ledger"), "DATABASE_URL": postgres_url}
    how = {"cwd": tmp_path, "env": {**os.environ, **path}}
    command = [sys.executable, "-m", "sqla_fairpool"]
    with contextlib.ExitStack() as stack:
        for line in commands:
            running = subprocess.Popen([*command, *line.split()], **how)
            stack.enter_context(running)
            stack.callback(running.kill)

        def held():
            look = [*command, "stats", "--json"]
            done = subprocess.run(look, capture_output=True, text=True, **how)
            rows = json.loads(done.stdout)["scrapers"] if done.returncode == 0 else ()
            return {row["scraper"]: row["connections"] for row in rows}

        eventually(lambda: held() == {"news": 10, "prices": 10}, "ten for each")


def test_log_messages_of_the_reference_are_those_of_the_code():
    page = (ROOT / "docs" / "reference" / "log.md").read_text()
    listed = set(re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE))
    assert listed == set(logged()), listed ^ set(logged())


def logged():
    """Yield the text of each message that the package logs."""
    for function in (node for tree in MODULES.values() for node in ast.walk(tree)):
        if not isinstance(function, ast.FunctionDef):
            continue
        texts = {
            ast.unparse(node.targets[0]): node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
        }
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and _LOGS.search(ast.unparse(call.func)):
                first = texts.get(ast.unparse(call.args[0]), call.args[0])
                if isinstance(first, ast.Constant):
                    yield first.value


_LOGS = re.compile(r"log(ger)?\.(info|warning|error)$|self\._log$|^log$")


def test_generated_parts_of_the_documents_are_those_of_the_code():
    assert documents.main(check=True) == ""


def test_readme_is_short_and_its_links_work_on_an_index_too():
    assert len(README.splitlines()) <= 200
    assert re.findall(r"\]\((?!https://|#)([^)]+)\)", README) == []


def slugs(text):
    """Return the anchors of a document: its headings' and its own."""
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    plain = [
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
    ]
    return {*plain, *re.findall(r"^\((\S+)\)=$", text, re.MULTILINE)}


def test_help_ends_with_an_address_that_is_there():
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    parsers = [make_argument_parser()]
    for parser in parsers:
        for group in parser._subparsers._group_actions if parser._subparsers else ():
            parsers.extend(group.choices.values())
        address, _, anchor = parser.format_help().split()[-1].partition("#")
        assert address.endswith("/docs/reference/command-line.md")
        assert anchor in slugs(page)
    assert len(parsers) > 12


@pytest.mark.parametrize(
    "path", documents.DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_links_of_the_documents_lead_somewhere(path):
    absolute = re.escape(documents.address()) + r"/(?:blob|tree|raw)/main/"
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        inner = re.sub(absolute, "", target)
        base = path.parent if inner == target else ROOT
        name, _, anchor = inner.partition("#")
        if "://" in name:
            continue
        linked = base / name if name else path
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in slugs(linked.read_text()), target
