"""``sqla-fairpool explain TAG``, over a ledger."""

from __future__ import annotations

import json

import pytest
from support.overviews import FakeInspector, overview

from sqla_fairpool.cli import main, poller
from sqla_fairpool.cli.monitor import explain_tag
from sqla_fairpool.ledger.overview import Limits, Part, ProcessRow, compile_overview
from sqla_fairpool.scheduling.ticket import LimitsByTag, TagLimits
from sqla_fairpool.stats import TagStats


def seen(*rows, **own):
    """Return an overview of one process that holds these rows."""
    limits = Limits(20, 20, 10, 15, tags=LimitsByTag(own))
    return compile_overview(
        [Part(ProcessRow("here", 1, "a.py", "answers"), rows)], limits
    )


def test_tag_is_explained_with_those_before_it():
    view = seen(
        TagStats("a", True, connections=9, waiting=3, usage=30.0),
        TagStats("b", True, connections=2, waiting=1, usage=20.0),
        TagStats("c", True, connections=2, waiting=1, usage=10.0),
    )
    found = explain_tag(view, "a")
    assert (found.place, [rival.name for rival in found.before]) == (3, ["c", "b"])
    assert (found.ceiling, found.ceiling_rule, found.active_tags) == (
        10,
        "soft_limit",
        3,
    )


def test_own_limits_are_told_of_a_tag_that_no_process_has():
    found = explain_tag(seen(TagStats("a", True)), "b")
    assert (found.ceiling, found.ceiling_rule) == (10, "soft_limit")
    view = seen(TagStats("a", True), b=TagLimits(max=2, weight=3.0))
    found = explain_tag(view, "b")
    assert (found.ceiling, found.ceiling_rule, found.weight) == (2, "max", 3.0)


@pytest.fixture
def ledger(monkeypatch, tmp_path):
    path = tmp_path / "app.ledger"
    path.touch()
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setattr(poller, "Inspector", lambda store: FakeInspector(overview()))
    return str(path)


def test_command_prints_a_few_lines_or_the_facts(capsys, ledger):
    assert main(["explain", "layer2", "--ledger", ledger]) == 0
    (has, ceiling, *_) = capsys.readouterr().out.splitlines()
    assert has.startswith("layer2 (idle) has 2, 2 wait")
    assert ceiling == "limit 10: soft_limit, 2 tags are active"
    assert main(["explain", "layer2", "--json", "--ledger", ledger]) == 0
    assert json.loads(capsys.readouterr().out)["tag"] == "layer2"


def test_tag_that_cannot_be_one_is_one_line(capsys, ledger):
    assert main(["explain", "", "--ledger", ledger]) == 2
    assert "TAG='' is not allowed" in capsys.readouterr().err
