"""The pictures in the documents: ``python tests/support/screenshots.py [PAGE ...]``.

Writes ``docs/_static/monitor.svg``, the monitor as it shows three busy scrapers. Look
at it before it is committed.

With HTML pages as arguments, it makes pictures of these instead, with Chromium: of a
report of the benchmarks, or of the documentation. Each is ``PAGE-WIDTH.png`` in the
current directory, at the width of a desktop and of a phone. ``REPORT.html#SECTION``
writes ``docs/_static/report.png``, the first two plots of a section of a report.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path

from overviews import process

from sqla_fairpool.cli.monitor_app import Monitor
from sqla_fairpool.cli.poller import Picture
from sqla_fairpool.cli.server import ServerFigures, Sessions
from sqla_fairpool.ledger.overview import Limits, Part, compile_overview
from sqla_fairpool.stats import TagStats

STATIC = Path(__file__).parents[2] / "docs" / "_static"

#: Looks, by what each scraper has in them: one alone, then two, then three.
LOOKS = [(15, 0, 0)] * 18 + [(10, 10, 0)] * 18 + [(7, 7, 6)] * 24


def picture(held):
    names = ("layer1_5", "layer2", "layer3")
    parts = [
        Part(
            process(name, number, slots=count, open=count),
            [
                TagStats(
                    name,
                    active=bool(count),
                    connections=count,
                    waiting=25 - count if count else 0,
                    idle_for=0.1 if count else 75.0,
                    waiting_for=0.4 if count else None,
                    held_for=0.2 if count else None,
                )
            ],
        )
        for number, (name, count) in enumerate(zip(names, held, strict=True), 1)
    ]
    shown = compile_overview(
        parts,
        Limits(20, 20, 10, 15),
        ledger="/run/scrapers/app.ledger",
        taken_at="2026-11-25T12:21:40Z",
    )
    sessions = {name: Sessions(n, n) for name, n in zip(names, held, strict=True)}
    server = ServerFigures(
        total=Sessions(20, 20), scrapers=sessions, others=0, max_connections=100
    )
    return Picture(shown, server, 1000.0)


async def monitor():
    now, looks = [0.0], [picture(held) for held in LOOKS]

    def look():
        answer = Future()
        answer.set_result(looks.pop(0) if len(looks) > 1 else looks[0])
        return answer

    app = Monitor(look, 5.0, "/run/scrapers/app.ledger", lambda: now[0])
    app.title = "sqla-fairpool monitor"
    async with app.run_test(size=(112, 17)) as pilot:
        for _ in LOOKS:
            now[0] += 5.0
            app.tick()
            app.tick()
            await pilot.pause()
        app.save_screenshot("monitor.svg", str(STATIC))


def pages(arguments):
    for path, _, section in (argument.partition("#") for argument in arguments):
        if section:
            plots(Path(path).read_text("utf-8"), section)
        else:
            for width in (1280, 390):
                shoot(Path(path), f"{Path(path).stem}-{width}.png", width, 3000)


def plots(report, section):
    style = f"""<style>body {{ padding: 6px 14px; }} body > * {{ display: none; }}
        #{section} + p + .plots {{ display: grid; margin: 0; }}</style></head>"""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "plots.html")
        page.write_text(report.replace("</head>", style), "utf-8")
        shoot(page, STATIC / "report.png", 1204, 352)


def shoot(page, picture, width, height):
    options = ["--headless", "--no-sandbox", "--hide-scrollbars"]
    options += [f"--window-size={width},{height}", f"--screenshot={picture}"]
    command = ["chromium", *options, page.resolve().as_uri()]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    if sys.argv[1:]:
        pages(sys.argv[1:])
    else:
        asyncio.run(monitor())
