"""Right may import left, never back: the layers of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import sqla_fairpool

PACKAGE = Path(sqla_fairpool.__file__).parent

#: Each layer may import the ones above it.
LAYERS = [
    {"callers", "diagnosis", "options", "stats"},
    {"drivers", "errors"},
    {"policy", "agenda", "meters"},
    {"ledger"},
    {"environment"},
    {"account"},
    {"roster"},
    {"scheduler"},
    {"_private", "callers", "journal"},
    {"endings", "tagging"},
    {"connections", "waiters"},
    {"seats", "share"},
    {"section", "server_tag"},
    {"desk"},
    {"inquiry", "lifetimes"},
    {"deadlock", "leaks", "upkeep"},
    {"exchange"},
    {"metrics", "overview", "snapshot"},
    {"joining", "observer", "overview_text"},
    {"pool"},
    {"opentelemetry", "plugin", "prometheus"},
    {"adoption", "started"},
    {"launch", "manager"},
    {"__init__"},
    {"bench"},
    {"cli"},
    {"__main__"},
]

#: Modules that may not know SQLAlchemy, threads or the time.
PURE = {"policy", "agenda", "meters", "account", "roster", "scheduler"}


def modules():
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        name = relative.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        # How deep the module lies: one dot more leads to the package itself.
        tree.depth = len(relative.parts) - 1
        yield name, tree


def imports(tree):
    """Yield (module of ours or None, module of others or None) for each import.

    What stands below ``if TYPE_CHECKING`` is for the type checker, and skipped.
    """
    hidden = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                is_ours = top == "sqla_fairpool"
                yield (rest or "__init__", None) if is_ours else (None, top)
        elif isinstance(node, ast.ImportFrom):
            top, _, rest = (node.module or "").partition(".")
            if 0 < node.level <= tree.depth:
                continue  # of a sub-package, which is one layer: its own part
            if node.level and not node.module:
                for alias in node.names:
                    is_public = alias.name in sqla_fairpool.__all__
                    yield "__init__" if is_public else alias.name, None
            elif node.level:
                yield top, None
            elif top == "sqla_fairpool":
                yield rest.partition(".")[0] or "__init__", None
            else:
                yield None, top


def level(name):
    return next(n for n, layer in enumerate(LAYERS) if name in layer)


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} <= set().union(*LAYERS)


def test_no_module_imports_to_the_right():
    for name, tree in modules():
        for ours, _ in imports(tree):
            if ours is not None:
                assert level(ours) < level(name), f"{name} imports {ours}"


def test_core_knows_no_thread_no_clock_and_no_database():
    allowed = {"__future__", "bisect", "collections", "heapq", "math", "typing"}
    for name, tree in modules():
        if name in PURE:
            others = {other for _, other in imports(tree) if other is not None}
            assert others <= allowed, f"{name} imports {others - allowed}"


def test_only_one_module_uses_sqlalchemys_private_names():
    private = {"_dbapi_connection", "_connection_record", "_revalidate_connection"}
    for name, tree in modules():
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if name != "_private":
            assert not used & private, f"{name} uses {used & private}"


def test_public_names_are_these():
    assert sorted(sqla_fairpool.__all__) == [
        "AsyncAdaptedFairQueuePool",
        "CheckoutTimeout",
        "Diagnosis",
        "FairQueuePool",
        "Holding",
        "PoolStats",
        "SelfDeadlock",
        "Summary",
        "TagStats",
        "TooManyWaiting",
        "set_tag",
        "tag",
    ]
    assert all(hasattr(sqla_fairpool, name) for name in sqla_fairpool.__all__)
