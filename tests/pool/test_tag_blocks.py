"""Blocks that end in another order, or elsewhere, than they began."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.threads import Caller

from sqla_fairpool import set_tag, tag, tagging
from sqla_fairpool.tagging import context_tag, context_timeout


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert in_force() == (None, None)


def leave(block):
    block.__exit__(None, None, None)


async def passes(number):
    for _ in range(number):
        await asyncio.sleep(0)


def generator(block):
    with block:
        yield


async def async_generator(block):
    with block:
        yield


# -- in another order ------------------------------------------------------------------


def in_force():
    return context_tag(), context_timeout()


TIMEOUTS = {"a": 1.0, "b": None, "c": 3.0}

STEPS = st.one_of(
    st.tuples(st.sampled_from(["function", "generator"]), st.sampled_from("abc")),
    st.tuples(st.just("end"), st.integers(0, 9)),
)


@given(st.lists(STEPS, max_size=12))
@example([("generator", "a"), ("function", "b"), ("generator", "a"), ("end", 0)])
@example([("function", "a"), ("function", "b"), ("generator", "a"), ("end", 0)])
@example([("function", "a"), ("generator", "b"), ("function", "a"), ("end", 0)])
@settings(max_examples=300)
def test_innermost_of_the_open_blocks_is_in_force_whichever_ends(steps):
    """Also if one object is that of several of them."""
    objects = {name: tag(name, timeout=timeout) for name, timeout in TIMEOUTS.items()}
    opened = []  # (name, the generator in which the block is, None in a function)

    def end(number):
        name, inside = opened[number]
        if inside is None:
            leave(objects[name])
            # Of one object, the innermost block ends.
            number = max(n for n, one in enumerate(opened) if one == (name, None))
        else:
            inside.close()
        del opened[number]

    def check():
        timeouts = [TIMEOUTS[name] for name, _ in opened if TIMEOUTS[name]]
        innermost = opened[-1][0] if opened else None
        assert in_force() == (innermost, timeouts[-1] if timeouts else None)

    for kind, which in steps:
        if kind == "function":
            objects[which].__enter__()
            opened.append((which, None))
        elif kind == "generator":
            opened.append((which, generator(objects[which])))
            next(opened[-1][1])
        elif opened:
            end(which % len(opened))
        check()
    while opened:
        end(0)
        check()


def test_one_object_for_the_blocks_of_many_tasks_and_threads():
    shared = tag("shared")

    async def visit(number):
        await passes(number)
        with tag("own"):
            with shared:
                await passes(number)
                assert context_tag() == "shared"
            await passes(1)
            assert context_tag() == "own"
        assert context_tag() is None

    async def main():
        await asyncio.gather(*map(visit, range(20)))

    for caller in [Caller(asyncio.run, main()) for _ in range(2)]:
        caller.result()


def test_one_object_for_two_blocks_of_a_generator():
    shared = tag("shared")

    def twice():
        with shared, tag("between"), shared:
            yield

    both = twice()
    next(both)
    assert context_tag() == "shared"
    with tag("b"):
        both.close()
        assert context_tag() == "b"


class Scope:
    """A tag in methods of its own, as a library would write it."""

    def __init__(self, block):
        self.block = block

    async def __aenter__(self):
        self.block.__enter__()

    async def __aexit__(self, *exc_info):
        self.block.__exit__(*exc_info)


@pytest.mark.parametrize("is_shared", [False, True])
def test_block_that_begins_and_ends_in_different_functions(is_shared):
    shared = tag("a")

    async def visit(scope):
        with tag("outer"):
            async with scope(shared if is_shared else tag("a")):
                await asyncio.sleep(0)
                assert context_tag() == "a"
            assert context_tag() == "outer"
        assert tagging.blocks() == ()

    @asynccontextmanager
    async def stack(block):
        async with AsyncExitStack() as stack:
            stack.enter_context(block)
            yield

    @asynccontextmanager
    async def twice(block):
        async with Scope(block), stack(block):
            yield

    async def main():
        for _ in range(2):
            await asyncio.gather(
                *[visit(scope) for scope in (Scope, stack, twice, Scope, stack, twice)]
            )

    asyncio.run(main())
    assert not shared._open.keys() - {None}


# -- elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("is_collected", [False, True])
def test_generators_block_that_another_thread_ends_is_over(is_collected):
    abandoned = [generator(tag("a"))]
    next(abandoned[0])

    def elsewhere():
        with tag("elsewhere"):
            gc.collect() if is_collected else abandoned[0].close()
            return context_tag()

    gc.disable()
    try:
        with tag("b"):
            if is_collected:
                cycle = [abandoned.pop()]
                cycle.append(cycle)
                del cycle
            assert Caller(elsewhere).result() == "elsewhere"
            assert context_tag() == "b"
    finally:
        gc.enable()


async def let_go(abandoned):
    """The loop ends it in a task of its own, whose context is a copy."""
    abandoned.clear()
    await passes(5)


async def in_a_task(abandoned):
    await asyncio.create_task(abandoned[0].aclose())


@pytest.mark.parametrize("end", [let_go, in_a_task])
def test_block_of_an_async_generator_that_another_task_ends_is_over(end):
    async def main():
        with tag("b"):
            for _ in range(50):
                abandoned = [async_generator(tag("a"))]
                await anext(abandoned[0])
                assert context_tag() == "a"
                await end(abandoned)
                assert context_tag() == "b"
                with tag("c"):
                    pass
            assert len(tagging.blocks()) <= 2, "ended blocks pile up"
        assert context_tag() is None

    asyncio.run(main())


def test_one_object_in_abandoned_async_generators_of_many_tasks():
    shared = tag("shared")

    async def consume():
        for _ in range(10):
            async for _ in async_generator(shared):
                break
            await passes(1)
            with shared:
                await passes(1)
                assert context_tag() == "shared"
            await passes(5)  # the loop ends it meanwhile
            assert context_tag() is None
            assert len(tagging.blocks()) <= 1

    async def main():
        await asyncio.gather(*[consume() for _ in range(5)])

    asyncio.run(main())
    assert not shared._open.keys() - {None}


def test_block_that_ends_in_another_context_ends_in_the_first_as_well():
    block, first = tag("a"), contextvars.copy_context()
    for _ in range(2):  # it may be used again
        first.run(block.__enter__)
        assert first.run(context_tag) == "a"
        Caller(leave, block).result()
        assert first.run(context_tag) is None
    inner = generator(block)
    first.run(next, inner)
    with block:
        inner.close()
        assert context_tag() == "a"
    assert first.run(context_tag) is None


def test_block_that_begins_and_ends_in_threads_of_a_framework():
    """As FastAPI runs a dependency: each part in a thread, in a copy of the context."""
    dependency = generator(tag("a"))
    with tag("request"):
        for step in (lambda: next(dependency), dependency.close):
            context = contextvars.copy_context()
            Caller(context.run, step).result()
            assert context_tag() == "request"


def test_task_keeps_the_tag_of_the_block_in_which_it_was_made():
    shared = tag("a", timeout=1.0)

    async def main():
        go = asyncio.Event()

        async def background(block):
            await go.wait()
            first = context_tag()
            with block:
                pass
            return first, context_tag()

        with shared:
            blocks = [tag("own"), shared, shared]
            tasks = [asyncio.create_task(background(block)) for block in blocks]
            assert await asyncio.create_task(at_once(shared)) == "a"
            assert context_tag() == "a"  # blocks of tasks end none of their maker
        go.set()
        assert await asyncio.gather(*tasks) == [("a", "a")] * 3

    async def at_once(block):
        with block:
            return context_tag()

    asyncio.run(main())


# -- set_tag ---------------------------------------------------------------------------


def test_set_tag_in_a_block_ends_with_the_block():
    set_tag("outside")
    with tag("block", timeout=1.0):
        for name in ("inside", None, "again"):
            set_tag(name)
            assert in_force() == (name, 1.0)
    assert in_force() == ("outside", None)
    set_tag(None)


def test_set_tag_belongs_to_the_innermost_block_whichever_ends_first():
    outer, inner = tag("outer"), tag("inner")
    outer.__enter__()
    inner.__enter__()
    set_tag("set")
    leave(outer)
    assert context_tag() == "set"
    leave(inner)
    assert context_tag() is None


def test_set_tag_in_a_thread_that_ends_is_not_the_next_ones():
    barrier = threading.Barrier(2)

    def work(name):
        set_tag(name)
        barrier.wait(30)
        return context_tag()

    callers = [Caller(work, name) for name in "ab"]
    assert [caller.result() for caller in callers] == ["a", "b"]
