"""All scenarios, in the order of the report, and the run of one."""

from __future__ import annotations

import time
from functools import partial

from ..harness.bench import Bench, Scenario, scenario
from ..harness.findings import Section
from . import contention, uncontended
from .contention import STYLES
from .generator import GENERATOR
from .peers import PEERS
from .scale import SCALE
from .static import ALONE, BURSTS, SATURATED, SHIFT

POOL = scenario(
    "pool",
    uncontended.uncontended_tag_on_engine,
    uncontended.uncontended_other_roads,
    uncontended.uncontended_in_asyncio,
    contention.with_hold,
    contention.without_hold,
    contention.light_tag,
    uncontended.statement_on_postgresql,
    more=[
        contention.without_hold_on_all_cores,
        partial(contention.light_tag, key="light, full"),
        partial(contention.light_tag, key="light, connection"),
        uncontended.statement_on_sqlite,
        uncontended.settings_of_diagnosis,
        uncontended.settings_and_figures,
        uncontended.settings_server_tag,
    ],
    sessions=2,
)

SCENARIOS: tuple[Scenario, ...] = (
    *(SHIFT, ALONE, BURSTS, SATURATED),
    *(PEERS, STYLES, POOL, SCALE, GENERATOR),
)


def play(bench: Bench, scenario: Scenario) -> Section:
    began = time.monotonic()
    found = scenario.run(bench)
    took = time.monotonic() - began
    return Section(scenario.name, scenario.title, scenario.text, found, took)
