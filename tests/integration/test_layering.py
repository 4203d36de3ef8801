"""Which part of the package may import which; imports for type checkers count."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
from sqlalchemy import exc
from support import documents
from support.imports import MODULES, imports

import sqla_fairpool
from sqla_fairpool import manager, opentelemetry, plugin, prometheus
from sqla_fairpool.checks import PAGES, Documented

#: Each may import those before it, and what stands beside it in its own folder.
ORDER = [
    {"scheduling", "stats", "threads"},
    {"checks"},
    {"options"},
    {"diagnosis"},
    {"errors", "tagging"},
    {"ledger"},
    {"pool"},
    {"launch"},
    {"manager", "opentelemetry", "plugin", "prometheus"},
    {"__init__"},
    {"cli"},
    {"demo"},
    {"__main__"},
]


def level(part):
    return next(n for n, parts in enumerate(ORDER) if part in parts)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_what_comes_after_it(name):
    part = name.partition(".")[0]
    for imported in imports(name):
        top, _, other = imported.partition(".")
        other = other.partition(".")[0] or "__init__"
        if top == "sqla_fairpool" and other != part:
            assert level(other) < level(part), imported


def test_scheduling_knows_no_thread_no_clock_and_no_database():
    allowed = {"__future__", "bisect", "collections", "dataclasses", "heapq", "math"}
    allowed.add("typing")
    for name in MODULES:
        if name.startswith("scheduling."):
            tops = {imported.partition(".")[0] for imported in imports(name)}
            assert tops <= allowed | {"sqla_fairpool"}, name


def test_only_one_module_uses_sqlalchemys_private_names():
    private = {"_dbapi_connection", "_connection_record", "_revalidate_connection"}
    for name, tree in MODULES.items():
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if name != "pool.sqlalchemy_private":
            assert not used & private, f"{name} uses {used & private}"


def test_public_names_are_those_that_the_reference_lists():
    text = (documents.ROOT / "docs" / "reference" / "api.md").read_text()
    listed = re.findall(r"\.\. auto(?:class|function):: sqla_fairpool\.(\S+)", text)
    names = list(sqla_fairpool.__all__)
    for module in (manager, opentelemetry, plugin, prometheus):
        short = module.__name__.removeprefix("sqla_fairpool.")
        names += [f"{short}.{name}" for name in module.__all__]
    assert sorted(listed) == sorted(names)
    for module in (sqla_fairpool, manager, opentelemetry, plugin, prometheus):
        assert all(hasattr(module, name) for name in module.__all__)


def error_classes(below=Documented):
    """Yield our errors that are raised, by way of their base."""
    for error in below.__subclasses__():
        yield error
        yield from error_classes(error)


def test_each_error_is_on_one_line_that_ends_with_the_address_of_its_page():
    for name in (n for n, tree in MODULES.items() if "Documented" in ast.dump(tree)):
        importlib.import_module(f"sqla_fairpool.{name}")
    folder = documents.ROOT / "docs" / "reference" / "errors"
    assert (
        f"{documents.address()}/blob/main/{folder.relative_to(documents.ROOT)}" == PAGES
    )
    found = set(error_classes())
    assert {error.__name__ for error in found} >= {
        "SelfDeadlock",
        "RowBroken",
        "BadOption",
    }
    for error in found:
        plain = exc.SQLAlchemyError.__new__(error, "what is wrong")
        Exception.__init__(plain, "what is wrong")
        text = f"what is wrong (Background on this error at: {PAGES}/{error.page}.md)"
        assert str(plain) == text
        page = (folder / f"{error.page}.md").read_text()
        assert "**Cause.**" in page and "**Cure.**" in page, error
    assert {path.stem for path in folder.iterdir()} == {error.page for error in found}


def test_each_error_of_ours_has_a_page():
    """What is raised is of a class of ours, not one of SQLAlchemy's as it is."""
    undocumented = (
        r"^exc\.(ArgumentError|InvalidRequestError|TimeoutError|SQLAlchemyError)$"
    )
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert not re.match(undocumented, ast.unparse(node.func)), name
