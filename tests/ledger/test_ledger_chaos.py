"""Worlds of members in which anything goes wrong; other ones in each run.

CHAOS_SEED repeats a run. See `support.ledger_chaos` for what happens, and for more.
"""

from __future__ import annotations

import os
import random
import re

import pytest
from support.ledger_chaos import explore, play

from sqla_fairpool.ledger.book import Book


@pytest.mark.parametrize(("members", "slots"), [(2, 1), (4, 6), (6, 4), (12, 5)])
def test_whatever_happens_the_promises_are_kept(no_log, members, slots):
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**9)))
    print(f"CHAOS_SEED={seed}")  # pytest shows it if the test fails
    for number in range(2):
        explore(seed + number, 300, members, slots)


def test_a_world_that_breaks_a_promise_becomes_a_script(no_log, monkeypatch):
    monkeypatch.setattr(Book, "free", 9)  # always so many more
    with pytest.raises(AssertionError, match="more slots than there are") as raised:
        explore(7, 300, 4, 3)
    script = re.search(r"play\((\[.*\]), 4, 3\)", str(raised.value))[1]
    events = eval(script)
    assert 1 <= len(events) <= 5
    assert play(events, 4, 3)[0] == "more slots than there are"
    monkeypatch.undo()
    assert play(events, 4, 3)[0] is None
