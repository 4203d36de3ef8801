"""How the programs tell what they found."""

from __future__ import annotations

from sqla_fairpool.bench.figures import render
from sqla_fairpool.bench.report import Distributions, Findings
from sqla_fairpool.bench.svg import seconds_text


def tell(found: Findings) -> None:
    for plot in found.plots:
        if isinstance(plot, Distributions):
            print(plot.title)
            for row in plot.rows:
                print(
                    f"  {row.name:26} {row.count:9,} waits: median "
                    f"{seconds_text(row.p50)}, p99 {seconds_text(row.p99)}, longest "
                    f"{seconds_text(row.most)} {row.remark}"
                )
    for line in render(found.figures, ()):
        print(line)
