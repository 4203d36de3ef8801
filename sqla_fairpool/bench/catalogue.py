"""All scenarios, in the order of the report, and the run of some of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from .report import Findings, Section
from .stage import Scenario, Stage
from .static import ALONE, BURSTS, SATURATED

__all__ = ["SCENARIOS", "play"]

SCENARIOS: tuple[Scenario, ...] = (ALONE, BURSTS, SATURATED)


def play(stage: Stage, scenarios: Sequence[Scenario]) -> Iterator[Section]:
    """Run the scenarios, yield what each has found as soon as it is over."""
    for scenario in scenarios:
        stage.audience.section(scenario.title)
        began = time.monotonic()
        found = Findings()
        for number, part in enumerate(scenario.parts):
            stage.part(number, len(scenario.parts))
            found += part(stage)
        took = time.monotonic() - began
        section = Section(scenario.name, scenario.title, scenario.text, found, took)
        stage.audience.found(section)
        yield section
