"""The report: well-formed, self-contained, escaped, and of a stable form."""

import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks.harness.findings import (
    Bar,
    Bars,
    Distribution,
    Distributions,
    Figure,
    Lines,
    Report,
    Section,
    Series,
    Table,
    Target,
)
from benchmarks.report.page import page
from benchmarks.report.plots import draw, nice_number, seconds_text

NASTY = '<script>alert("&$_$")</script>'

AT_MOST = Target("cost", "QueuePool", 0.95, at_most=True)
MISSING = Target("never measured", "-", 1.0, at_most=False)
MET = Figure("cost", "QueuePool", (0.8, 0.9, 0.94), AT_MOST, "a remark")
BAD = Figure("cost", "QueuePool", (1.5,), AT_MOST)

SERIES = (
    Series(NASTY, ((0.0, 15.0), (1.0, 15.0), (1.0, 10.0), (2.0, 10.0)), "a"),
    Series("two", ((0.0, 0.0), (1.0, 0.0), (1.0, 10.0), (2.0, 10.0)), "b"),
)
NOTES = {"marks": ((1.0, NASTY),), "levels": ((20.0, NASTY),)}
BARS = (Bar("FairQueuePool", 2.0, 1.5, 2.5), Bar(NASTY, 0.0, 0.0, 0.0, NASTY))
WAITS = (
    Distribution.of("FairQueuePool", [0.05] * 99 + [0.06]),
    Distribution.of(NASTY, [0.0, 2.0], NASTY),
)
PLOTS = [
    Lines("steps", NASTY, NASTY, SERIES, steps=True, **NOTES),
    Lines("stacked", "s", "n", SERIES, steps=True, stacked=True),
    Lines("curve", "tags", "µs", (Series("f", ((1, 2.0), (10_000, 3.0))),), log_x=True),
    Lines("empty", "tags", "µs", (Series("a", ()),)),
    Bars(NASTY, NASTY, BARS, level=(3.0, NASTY)),
    Distributions("waits", WAITS),
]

ABOUT = {
    "date": "2030-01-01 00:00 UTC",
    "form": "short",
    "machine": {"cores": 2, "architecture": "x", "system": "Linux", "load": "0.1"},
    "versions": {"CPython": "3.11.7"},
    "server": {"url": NASTY},
}


def report(*figures, targets=(AT_MOST, MISSING), plots=(), **more):
    table = Table(NASTY, ("pool", NASTY), ((NASTY, 1.5),))
    findings = [*figures, *plots, table, "A note.", NASTY]
    section = Section("one", "Section one", "What was done.", findings, 1.5)
    return Report(ABOUT, [section], targets, **more)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.title[:8])
def test_plot_is_svg_that_names_everything_in_it_in_the_colours_of_the_page(plot):
    text = draw(plot)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("aria-label") == plot.title
    assert not re.search(r"\b(nan|inf)\b|<script", text)
    shown = "".join(root.itertext())
    for part in getattr(plot, "series", ()) or getattr(plot, "bars", ()) or plot.rows:
        assert part.name in shown
        assert getattr(part, "remark", "") in shown
    # White is the ground, which is transparent.
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", text)) <= {"#ffffff"}


def test_distribution_counts_every_value_and_numbers_are_short():
    row = Distribution.of("x", [0.0, 1e-6, 0.001, 0.0011, 0.5, 3.0])
    assert sum(count for _, count in row.histogram) == row.count == 6
    assert (row.most, row.p50) == (3.0, 0.001)
    assert [bound for bound, _ in row.histogram] == sorted(b for b, _ in row.histogram)
    numbers = (0, 0.0123, 15, 123.4, 9730)
    assert [*map(nice_number, numbers)] == ["0", "0.0123", "15", "123", "9,730"]
    assert [*map(seconds_text, (5e-6, 0.0511, 2.0))] == ["5 µs", "51.1 ms", "2 s"]


def test_page_is_well_formed_escaped_and_fetches_nothing():
    nasty = Figure(NASTY, NASTY, (1.0,), remark=NASTY)
    text = page(report(MET, nasty, plots=PLOTS, cut_short="It was interrupted."))
    assert text.startswith("<!DOCTYPE html>")
    root = ElementTree.fromstring(text)
    assert len(root.findall(".//{*}svg")) == len(PLOTS)
    shown = "".join(root.itertext())
    for part in ("Section one", "What was done.", "A note.", "a remark", "2 cores"):
        assert part in shown
    assert "It was interrupted." in shown
    assert "busy" not in shown
    machine = {**ABOUT["machine"], "load": "1.4"}
    busy = page(dataclasses.replace(report(MET), about={**ABOUT, "machine": machine}))
    assert "Measured on a busy machine, load 1.4 on 2 cores: look again." in busy
    assert "<script" not in text
    assert shown.count(NASTY) >= 9
    bare = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?:|<link|<img|@import|url\((?!#)", bare)
    assert set(re.findall(r'href="(.)', bare)) == {"#"}


def test_page_tells_met_from_not_met_and_not_run():
    root = ElementTree.fromstring(page(report(MET, BAD)))
    rows = root.findall(".//table")[0].findall("tr")
    cells = [[" ".join(c.itertext()) for c in row] for row in rows[1:]]
    assert [row[-1] for row in cells] == ["met", "NOT MET", "not run"]
    assert cells[0][3:5] == ["0.900", "0.800 .. 0.940"]
    assert not report(MET).ok  # one was not run
    assert report(MET, targets=(AT_MOST,)).ok
    assert not report(MET, BAD, targets=(AT_MOST,)).ok


def test_form_of_the_json_is_stable():
    data = json.loads(json.dumps(report(MET, plots=PLOTS).as_dict(), allow_nan=False))
    assert data["schema"] == 2
    (section,) = data["sections"]
    keys = "what beside median spread rounds target verdict remark"
    measured, missing = data["targets"]
    assert [" ".join(part) for part in (data, section, measured, missing)] == [
        "schema about seconds cut_short targets sections",
        "name title text seconds figures plots tables notes",
        keys,
        keys,
    ]
    assert section["figures"] == [measured] == [MET.as_dict()]
    assert (measured["median"], measured["spread"]) == (0.9, [0.8, 0.94])
    assert (missing["median"], missing["verdict"]) == (None, "not run")
    kinds = {plot["kind"] for plot in section["plots"]}
    assert kinds == {"lines", "bars", "distributions"}
