"""Which module of the package imports which, read from the source.

Imports for type checkers count.
"""

from __future__ import annotations

import ast
from pathlib import Path

import sqla_fairpool

PACKAGE = Path(sqla_fairpool.__file__).parent


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


def parts():
    """Return for each part of the package, a folder or a module, those it imports."""
    found = {}
    for name in sorted(MODULES):
        part = name.partition(".")[0]
        if part.startswith("__"):
            continue
        known = found.setdefault(part, set())
        for imported in imports(name):
            top, _, other = imported.partition(".")
            other = other.partition(".")[0]
            if top == "sqla_fairpool" and other and other != part:
                known.add(other)
    return found
