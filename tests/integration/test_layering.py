"""Which part of the package may import which; imports for type checkers count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sqla_fairpool

PACKAGE = Path(sqla_fairpool.__file__).parent

#: Each may import those before it, and what stands beside it in its own folder.
ORDER = [
    {"background", "scheduling", "stats"},
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


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(p): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py")}


def imports(name):
    """Yield what a module imports, of ours by its name within the package."""
    package = ["sqla_fairpool", *name.split(".")[:-1]]
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix("sqla_fairpool.")
                is_module = inner in MODULES or f"{inner}.__init__" in MODULES
                yield f"sqla_fairpool.{inner}" if is_module else module


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


def test_public_names_are_these():
    names = "AsyncAdaptedFairQueuePool CheckoutTimeout Diagnosis FairQueuePool Holding "
    names += "PoolStats SelfDeadlock Summary TagLimits TagStats "
    names += "TooManyWaiting set_tag tag"
    assert " ".join(sorted(sqla_fairpool.__all__)) == names
    assert all(hasattr(sqla_fairpool, name) for name in sqla_fairpool.__all__)
