"""The report: well-formed, self-contained, escaped, and of a stable form."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks.figures import Figure, Target
from benchmarks.page import page
from benchmarks.report import (
    SCHEMA,
    Bar,
    Bars,
    Distribution,
    Distributions,
    Findings,
    Lines,
    Report,
    Section,
    Series,
    Table,
)
from benchmarks.svg import draw, nice_number, seconds_text

NASTY = '<script>alert("&")</script>'

AT_MOST = Target("cost", "QueuePool", 0.95, at_most=True)
MISSING = Target("never measured", "-", 1.0, at_most=False)

STEPS = Lines(
    "steps",
    "seconds",
    "connections",
    (
        Series("a", ((0.0, 15.0), (1.0, 15.0), (1.0, 10.0), (2.0, 10.0)), "a"),
        Series("b", ((0.0, 0.0), (1.0, 0.0), (1.0, 10.0), (2.0, 10.0)), "b"),
    ),
    steps=True,
    marks=((1.0, "b comes"),),
    levels=((20.0, "20 open"),),
)
STACKED = Lines("stacked", "s", "n", STEPS.series, steps=True, stacked=True)
CURVE = Lines(
    "curve", "tags", "µs", (Series("f", ((1, 2.0), (10_000, 3.0))),), log_x=True
)
BARS = Bars(
    "bars",
    "per second",
    (Bar("ours", 2.0, 1.5, 2.5, "ours"), Bar("none", 0.0, 0.0, 0.0, "base", "why")),
    level=(3.0, "most there could be"),
)
WAITS = Distributions(
    "waits",
    (
        Distribution.of("ours", [0.05] * 99 + [0.06], "ours"),
        Distribution.of("starved", [0.0, 2.0], "base", "90 never served"),
    ),
)
PLOTS = [STEPS, STACKED, CURVE, BARS, WAITS]


def about():
    return {
        "date": "2030-01-01 00:00 UTC",
        "form": "short",
        "scenarios": ["one"],
        "machine": {
            "cores": 2,
            "architecture": "x86_64",
            "system": "Linux",
            "load": "0.1",
        },
        "versions": {"CPython": "3.11.7"},
        "server": None,
    }


def report(*figures, plots=PLOTS, notes=("A note.",), **more):
    findings = Findings(
        figures,
        tuple(plots),
        (Table("table", ("pool", "per s"), (("x", 1.5),)),),
        notes,
    )
    section = Section("one", "Section one", "What was done.", findings, 1.5)
    return Report(about(), (section,), (AT_MOST, MISSING), **more)


MET = Figure("cost", "QueuePool", (0.8, 0.9, 0.94), AT_MOST, "a remark")


# -- plots ----------------------------------------------------------------------------


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.title)
def test_plot_is_well_formed_svg_with_finite_numbers(plot):
    text = draw(plot)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("aria-label") == plot.title
    assert not re.search(r"\b(nan|inf)\b", text)
    _, _, width, height = map(float, root.get("viewBox").split())
    for element in root.iter():
        for name, most in (("x", width), ("x1", width), ("y", height), ("y1", height)):
            if element.get(name) is not None:
                assert 0 <= float(element.get(name)) <= most, element.attrib


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.title)
def test_plot_names_everything_in_it(plot):
    text = "".join(ElementTree.fromstring(draw(plot)).itertext())
    for part in getattr(plot, "series", ()) or getattr(plot, "bars", ()) or plot.rows:
        assert part.name in text


def test_texts_of_a_plot_are_escaped():
    plots = [
        Lines(NASTY, NASTY, NASTY, (Series(NASTY, ((0, 1), (1, 2))),)),
        Bars(NASTY, NASTY, (Bar(NASTY, 1, 1, 1, remark=NASTY),), level=(1, NASTY)),
        Distributions(NASTY, (Distribution.of(NASTY, [1.0], remark=NASTY),)),
    ]
    for plot in plots:
        text = draw(plot)
        assert "<script" not in text
        assert NASTY in "".join(ElementTree.fromstring(text).itertext())


def test_steps_hold_until_the_next_value():
    path = ElementTree.fromstring(draw(STEPS)).find(".//{*}path[@class='line a']")
    assert re.fullmatch(r"M[\d.]+ [\d.]+H[\d.]+V[\d.]+H[\d.]+", path.get("d"))


def test_stacked_areas_lie_on_top_of_each_other():
    paths = ElementTree.fromstring(draw(STACKED)).findall(".//{*}path")
    # The highest is drawn first, and covered by those below it.
    assert [path.get("class") for path in paths] == ["stack b", "stack a"]
    top, bottom = (float(p.get("d").split("V")[1].split("H")[0]) for p in paths)
    assert top < bottom


@pytest.mark.parametrize("plot", [STEPS, CURVE])
def test_plot_without_points_is_drawn_empty(plot):
    empty = Lines(plot.title, "", "", (Series("a", ()),), log_x=plot.log_x)
    assert ElementTree.fromstring(draw(empty)) is not None


def test_distribution_counts_every_value():
    seconds = [0.0, 1e-6, 0.001, 0.0011, 0.5, 3.0]
    row = Distribution.of("x", seconds)
    assert sum(count for _, count in row.histogram) == row.count == 6
    assert row.most == 3.0
    assert row.p50 == 0.001
    assert [bound for bound, _ in row.histogram] == sorted(b for b, _ in row.histogram)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.0123"), (15, "15"), (123.4, "123"), (9730, "9,730")],
)
def test_numbers_have_three_digits_that_count(value, text):
    assert nice_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5e-6, "5 µs"), (0.0511, "51.1 ms"), (2.0, "2 s")]
)
def test_times_have_a_unit(seconds, text):
    assert seconds_text(seconds) == text


# -- the page -------------------------------------------------------------------------


def parsed(text):
    assert text.startswith("<!DOCTYPE html>")
    return ElementTree.fromstring(text)


def test_page_is_well_formed_and_has_every_plot():
    root = parsed(page(report(MET)))
    assert len(root.findall(".//{*}svg")) == len(PLOTS) + 1
    text = "".join(root.itertext())
    for part in ("Section one", "What was done.", "A note.", "a remark", "2 cores"):
        assert part in text


def test_page_fetches_nothing():
    text = page(report(MET)).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", text)
    assert set(re.findall(r'href="(.)', text)) == {"#"}


def test_page_tells_met_from_not_met_and_not_run():
    bad = Figure("cost", "QueuePool", (1.5,), AT_MOST)
    rows = parsed(page(report(MET, bad))).findall(".//table")[0].findall("tr")
    verdicts = ["".join(row.itertext()) for row in rows[1:]]
    assert verdicts[0].endswith("0.800 .. 0.940met")
    assert verdicts[1].endswith("NOT MET")
    assert verdicts[2].endswith("not run")


def test_everything_on_the_page_is_escaped():
    figure = Figure(NASTY, NASTY, (1.0,), remark=NASTY)
    findings = Findings((figure,), (), (Table(NASTY, (NASTY,), ((NASTY,),)),), (NASTY,))
    section = Section("one", NASTY, NASTY, findings)
    odd = about() | {"server": {"url": NASTY}}
    text = page(Report(odd, (section,), (), cut_short=NASTY))
    assert "<script" not in text
    assert "".join(parsed(text).itertext()).count(NASTY) >= 9


def test_page_says_that_a_run_was_cut_short():
    assert "interrupted" in page(report(MET, cut_short="The run was interrupted."))


# -- the JSON file --------------------------------------------------------------------


def test_form_of_the_json_is_stable():
    data = json.loads(json.dumps(report(MET).as_dict(), allow_nan=False))
    assert data["schema"] == SCHEMA == 1
    assert list(data) == [
        "schema",
        "about",
        "seconds",
        "cut_short",
        "targets",
        "sections",
    ]
    (section,) = data["sections"]
    assert list(section) == [
        "name",
        "title",
        "text",
        "seconds",
        "figures",
        "plots",
        "tables",
        "notes",
    ]
    keys = [
        "what",
        "beside",
        "median",
        "spread",
        "rounds",
        "target",
        "verdict",
        "remark",
    ]
    measured, missing = data["targets"]
    assert list(section["figures"][0]) == list(measured) == list(missing) == keys
    assert (measured["median"], measured["verdict"]) == (0.9, "met")
    assert (missing["median"], missing["verdict"]) == (None, "not run")
    kinds = [plot["kind"] for plot in section["plots"]]
    assert kinds == ["lines", "lines", "lines", "bars", "distributions"]


def test_report_is_ok_when_all_is_measured_and_met():
    assert not report(MET).ok  # one was not run
    only = Report(about(), report(MET).sections, (AT_MOST,))
    assert only.ok
    bad = Figure("cost", "QueuePool", (1.5,), AT_MOST)
    assert not Report(about(), report(MET, bad).sections, (AT_MOST,)).ok
