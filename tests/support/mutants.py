"""Would the tests notice a changed line? A plugin of pytest that changes one at a time.

Runs the tests once and notes which functions each enters. Then, in a fork for each
mutant: puts the code of the changed function in the place of the original, and runs the
tests that enter it, the quickest first, until one fails. What no test notices is
printed, but for what `mutants.txt` lists as equivalent. See `mutants` in tox.ini.

Of its own, for mutmut and cosmic-ray start pytest for each mutant, a second for each,
and mutmut moves functions, whose places in the source some tests look at. Not changed:
what is done when a module or a class is made, as constants; messages; assertions,
of which `invariants.py` consists.

MUTANTS_MINUTES ends it early; the order is random, by MUTANTS_SEED, so what was tried
is a sample. MUTANTS_ONLY is a part of their names, MUTANTS_WORKERS how many at a time.
"""

from __future__ import annotations

import ast
import copy
import cProfile
import gc
import os
import random
import resource
import signal
import time
import types
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

import sqla_fairpool

PACKAGE = Path(sqla_fairpool.__file__).parent
TARGETS = [
    *sorted((PACKAGE / "scheduling").glob("[a-z]*.py")),
    *(PACKAGE / "ledger" / f"{n}.py" for n in ("allocation", "book", "transaction")),
]
EQUIVALENT = Path(__file__).with_suffix(".txt")
#: Seconds of the processor that a test may take beyond twice what it needs.
PATIENCE = 2
#: Seconds after which one that waits is killed.
LONG = 60
PAIRS = "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or, Add Sub, Mult Div"
SWAPS = {getattr(ast, a): getattr(ast, b) for a, b in map(str.split, PAIRS.split(","))}
SWAPS |= {b: a for a, b in SWAPS.items()}
#: What is in them is not changed.
UNCHANGED = ast.JoinedStr | ast.Raise | ast.Assert
#: Defaults are made with the function, which keeps its own.
SKIPPED = {"annotation", "returns", "args"}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changed(node):
    """Yield what may stand in the place of a node."""
    new = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in SWAPS:
            new.ops[0] = SWAPS[type(op)]()
            yield new
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            new.op = SWAPS[type(op)]()
            yield new
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield new.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.AugAssign(op=ast.Add() | ast.Sub() as op):
            new.op = SWAPS[type(op)]()
            yield from (new, ast.Pass())
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Delete() | ast.Break():
            yield ast.Pass()
        case ast.If() | ast.IfExp() | ast.While():
            for value in (True, False):
                new = copy.copy(node)
                new.test = ast.Constant(value)
                yield new


def mutants_of(path):
    """Return (function's name and line, where, what it is, how to do it) of each."""
    tree, found = ast.parse(path.read_text()), []

    def text(node, parent):
        shown = parent if isinstance(node, ast.Constant | ast.Name) else node
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            shown = node.test
        return ast.unparse(shown).splitlines()[0]

    def visit(node, function, put, parent):
        if isinstance(node, ast.FunctionDef) and function is None:
            lines = [node.lineno, *(d.lineno for d in node.decorator_list)]
            function = str(path), node.name, min(lines)
        elif function is not None and put is not None:
            for new in changed(node):
                ast.copy_location(new, node)
                was = text(node, parent)
                put(new)
                name = f"{path.stem}.{function[1]}: {was} -> {text(new, parent)}"
                put(node)
                found.append((function, node.lineno, name, partial(be, tree, put, new)))
        if isinstance(node, UNCHANGED) or getattr(node, "arg", None) == "strict":
            return
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                for n, one in enumerate(value):
                    if isinstance(one, ast.AST):
                        visit(one, function, partial(value.__setitem__, n), node)
            elif isinstance(value, ast.AST) and field not in SKIPPED:
                visit(value, function, partial(setattr, node, field), node)

    visit(tree, None, None, None)
    return found


def be(tree, put, new, function, originals):
    """Have a function be the changed one."""
    put(new)
    codes = [compile(ast.fix_missing_locations(tree), function[0], "exec")]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        if (code.co_name, code.co_firstlineno) == function[1:]:
            for original in originals:
                original.__code__ = code


def fails(item):
    return any(r.failed for r in runtestprotocol(item, log=False, nextitem=None))


def place(code):
    return code.co_filename, code.co_name, code.co_firstlineno


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Run the tests as this module says; no other plugin does."""
    entered, functions, took = defaultdict(set), defaultdict(list), {}
    for item in session.items:
        profile, began = cProfile.Profile(builtins=False), time.process_time()
        assert not profile.runcall(fails, item), f"{item.nodeid} fails unchanged"
        took[item] = time.process_time() - began
        for entry in profile.getstats():
            entered[place(entry.code)].add(item)
    for one in gc.get_objects():
        if isinstance(one, types.FunctionType):
            functions[place(one.__code__)].append(one)

    def fork(function, do):
        items = sorted(entered[function], key=took.get)
        if child := os.fork():
            return child
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1), os.dup2(nothing, 2)
            do(function, functions[function])
            for item in items:  # a test without end is killed
                seconds = int(time.process_time() + 2 * took[item] + PATIENCE)
                resource.setrlimit(resource.RLIMIT_CPU, (seconds, -1))
                signal.alarm(LONG)
                if fails(item):
                    os._exit(1)
            os._exit(0)
        finally:
            os._exit(2)

    report(session.config.get_terminal_writer().line, fork)
    return True


def report(say, fork):
    """Try the mutants, print those that survive, and how many do."""
    mutants = [one for path in TARGETS for one in mutants_of(path)]
    mutants = [m for m in mutants if os.environ.get("MUTANTS_ONLY", "") in m[2]]
    seed = os.environ.get("MUTANTS_SEED", str(os.getpid()))
    random.Random(seed).shuffle(mutants)
    say(f"{len(mutants)} mutants, seed {seed}")
    known = EQUIVALENT.read_text()
    end = time.monotonic() + 60 * float(os.environ.get("MUTANTS_MINUTES", "1e6"))
    workers = int(os.environ.get("MUTANTS_WORKERS", "2"))
    running, tried, counts = {}, iter(mutants), Counter()
    while running or time.monotonic() < end:
        mutant = next(tried, None) if time.monotonic() < end else None
        if mutant is not None and f"{mutant[2]}\n" in known:
            counts["equivalent"] += 1
        elif mutant is not None:
            running[fork(mutant[0], mutant[3])] = mutant
        if not running and mutant is None:
            break
        if len(running) >= workers or mutant is None:
            child, status = os.wait()
            function, line, name, _ = running.pop(child)
            counts["killed" if status else "survived"] += 1
            if not status:
                say(f"{counts.total()}: survived: {function[0]}:{line} {name}")
    rate = counts["killed"] / max(counts["killed"] + counts["survived"], 1)
    say(f"{dict(counts)}, {rate:.1%} killed")
