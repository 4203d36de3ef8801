"""Would the tests notice a changed line? A plugin of pytest that changes one at a time.

    HYPOTHESIS_PROFILE=mutants python -m pytest -q -p support.mutants TESTS

Runs the tests once, and notes which functions each of them enters. Then, for each
mutant, in a fork: puts the code of the changed function in the place of the original,
and runs the tests that enter it, the quickest first, until one fails. What no test
notices is printed, but for what `mutants.txt` lists as equivalent with the reason.

Of its own, for tools that start pytest for each mutant (mutmut, cosmic-ray) need a
second for it, for some thousands of them, and mutmut moves functions, whose places in
the source some tests look at. Not changed: what is done when a module or a class is
made, as constants, and the texts of messages.

MUTANTS_MINUTES ends it early; the order is random, by MUTANTS_SEED, so that what was
tried is a sample. MUTANTS_ONLY is a part of the names of those to be tried.
"""

from __future__ import annotations

import ast
import copy
import cProfile
import gc
import os
import random
import resource
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
#: Seconds of the processor that the tests of a mutant may take beyond their own.
PATIENCE = 2
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changed(node):
    """Yield what may stand in the place of a node."""
    new = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in SWAPS:
            new.ops[0] = SWAPS[type(op)]()
            yield new
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if (
            type(op) in SWAPS
        ):
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
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield ast.Pass()
        case ast.If() | ast.IfExp() | ast.While():
            for value in (True, False):
                if not (isinstance(node, ast.While) and value):
                    new = copy.deepcopy(node)
                    new.test = ast.Constant(value)
                    yield new
        case ast.Break():
            yield ast.Pass()
        case ast.Continue():
            yield ast.Break()


class Mutant:
    """A node of a module, what to put in its place, and the function that it is in."""

    def __init__(self, path, tree, function, node, new, put):
        self.path, self.tree, self.function = path, tree, function
        self.new, self.put = new, put
        self.where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
        was, what = (ast.unparse(one).splitlines()[0] for one in (node, new))
        if isinstance(node, ast.If | ast.While) and what == was:
            what = "the same"
        elif isinstance(new, ast.Pass):
            what = "nothing"
        self.name = f"{path.stem}.{function[0]}: {was} -> {what}"

    def be(self, functions):
        """Have the function be the changed one."""
        self.put(self.new)
        code = [compile(ast.fix_missing_locations(self.tree), self.path, "exec")]
        for one in code:
            code += [c for c in one.co_consts if isinstance(c, types.CodeType)]
            if (one.co_name, one.co_firstlineno) == self.function:
                for function in functions[(self.path, *self.function)]:
                    function.__code__ = one


def mutants_of(path):
    """Return all mutants of a module."""
    tree, found = ast.parse(path.read_text()), []

    def visit(node, function, put):
        if isinstance(node, ast.FunctionDef) and function is None:
            lines = [node.lineno, *(d.lineno for d in node.decorator_list)]
            function = node.name, min(lines)
        elif function is not None and put is not None:
            for new in changed(node):
                ast.copy_location(new, node)
                found.append(Mutant(path, tree, function, node, new, put))
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                for n, one in enumerate(value):
                    if isinstance(one, ast.AST) and not isinstance(one, ast.JoinedStr):
                        visit(one, function, partial(value.__setitem__, n))
            elif isinstance(value, ast.AST) and field not in {"annotation", "returns"}:
                visit(value, function, partial(setattr, node, field))

    visit(tree, None, None)
    return found


class Plugin:
    """Runs the tests as this module says. The one of pytest is not called."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        self.entered, took = defaultdict(set), {}
        for item in session.items:
            profile, began = cProfile.Profile(builtins=False), time.process_time()
            profile.enable()
            failed = _fails(item)
            profile.disable()
            assert not failed, f"{item.nodeid} fails without a change"
            took[item] = time.process_time() - began
            for code in (entry.code for entry in profile.getstats()):
                key = code.co_filename, code.co_name, code.co_firstlineno
                self.entered[key].add(item)
        self.took, self.functions = took, defaultdict(list)
        for one in gc.get_objects():
            if isinstance(one, types.FunctionType):
                code = one.__code__
                key = Path(code.co_filename), code.co_name, code.co_firstlineno
                self.functions[key].append(one)
        self.report(session.config.get_terminal_writer().line)
        return True

    def report(self, say):
        """Try the mutants, in two processes at a time."""
        mutants = [one for path in TARGETS for one in mutants_of(path)]
        mutants = [m for m in mutants if os.environ.get("MUTANTS_ONLY", "") in m.name]
        seed = os.environ.get("MUTANTS_SEED", str(os.getpid()))
        random.Random(seed).shuffle(mutants)
        say(f"{len(mutants)} mutants, seed {seed}, {len(self.took)} tests")
        known = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
        end = time.monotonic() + 60 * float(os.environ.get("MUTANTS_MINUTES", "1e6"))
        running, tried, outcomes = {}, iter(mutants), defaultdict(Counter)
        while True:
            while len(running) < 2 and time.monotonic() < end:
                if (mutant := next(tried, None)) is None:
                    break
                if mutant.name in known:
                    outcomes[mutant.path]["equivalent"] += 1
                else:
                    running[self.fork(mutant)] = mutant
            if not running:
                break
            child, status = os.wait()
            mutant = running.pop(child)
            outcomes[mutant.path]["killed" if status else "survived"] += 1
            if not status:
                say(f"survived: {mutant.where} {mutant.name}")
        for path, counts in [*outcomes.items(), (PACKAGE, sum_of(outcomes.values()))]:
            rate = counts["killed"] / max(counts["killed"] + counts["survived"], 1)
            say(f"{path.name}: {dict(counts)}, {rate:.1%} killed")

    def fork(self, mutant):
        """Return the process that ends with 0 if no test fails."""
        key = str(mutant.path), *mutant.function
        items = sorted(self.entered[key], key=self.took.get)
        if child := os.fork():
            return child
        code = 1
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1), os.dup2(nothing, 2)
            seconds = round(2 * sum(map(self.took.get, items)) + PATIENCE)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            mutant.be(self.functions)
            code = int(any(map(_fails, items)))
        finally:
            os._exit(code)


def sum_of(counts):
    return sum(counts, Counter())


def _fails(item):
    return any(r.failed for r in runtestprotocol(item, log=False, nextitem=None))


def pytest_configure(config):
    config.pluginmanager.register(Plugin())
