"""Overviews to look at, and an inspector that shows them."""

from __future__ import annotations

from sqla_fairpool.ledger.overview import (
    Limits,
    Part,
    ProcessRow,
    compile_overview,
)
from sqla_fairpool.stats import TagStats

#: Names that must not do anything to a terminal.
EVIL = [
    "\x1b[2J\x1b[31mred",
    "line\nend\r\tand",
    "\u202egnp.exe",
    "\x9b31m\x07\x7f",
    "x" * 128,
    "\u6570\u636e\u5e93" * 40,
    "[red]markup[/red] [link=http://x]:smile:",
    "e\u0301" * 60,
    "\u200b\u2028\u2066zero",
]


def process(name, number, **more):
    """Return a process with one tag and a slot for each connection."""
    more = {"state": "answers", "slots": 2, "open": 2, "tags": (name,), **more}
    return ProcessRow("host1", 1000 + number, f"{name}.py", number=number, **more)


def overview(names=("layer1_5", "layer2", "layer3"), capacity=20, **more):
    """Return an overview with one process and two connections for each name."""
    parts = [
        Part(
            process(name, number),
            [
                TagStats(
                    name,
                    active=number % 3 != 2,
                    connections=2,
                    waiting=number % 4,
                    idle_for=0.3 * number,
                    waiting_for=41.0 if number % 4 else None,
                    held_for=125.0 if number == 1 else 0.1,
                )
            ],
        )
        for number, name in enumerate(names, 1)
    ]
    half = -(-capacity // 2)
    limits = Limits(capacity, capacity, half, half + 1)
    more = {
        "ledger": "/run/app.ledger",
        "taken_at": "2026-11-25T09:40:45Z",
        **more,
    }
    return compile_overview(parts, limits, **more)


class FakeInspector:
    """Shows what it is given, one after the other, and then the last of it.

    :param scenes: overviews, or errors that are raised.
    """

    def __init__(self, *scenes):
        self.sessions = {}
        self.scenes = list(scenes)
        self.looks = 0
        self.closed = 0

    def look(self):
        self.looks += 1
        scene = self.scenes.pop(0) if len(self.scenes) > 1 else self.scenes[0]
        if isinstance(scene, Exception):
            raise scene
        return scene

    def close(self):
        self.closed += 1
