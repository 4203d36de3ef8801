"""``sqla-fairpool explain TAG``: why a tag has what it has, over a ledger.

The facts are those of the monitor's overview. Who is before whom is told by what the
processes say they hold and have used lately; the ledger gives turns by places in line,
so the order is what the rules are after, and not a promise of the next slot.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sqlalchemy import exc

from ..checks import validate_tag
from ..ledger.overview import Overview
from ..scheduling import policy
from ..scheduling.explanation import Explanation, Observed, TagFacts, explain
from ..scheduling.tags import ALL
from ..scheduling.ticket import TagLimits
from ..stats import TagStats
from . import EXIT_OK, CommandError
from .poller import Poller
from .which_ledger import add_places, find_store

__all__ = ["add_command", "explain_tag"]


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add ``explain`` to the program's commands."""
    parser = commands.add_parser(
        "explain",
        help="tell why a tag has what it has now",
        description="Tell why a tag has the connections that it has now, who is before "
        "it, and what has to happen for it to get one more.",
        epilog="examples:\n  sqla-fairpool explain layer3\n"
        "  sqla-fairpool explain layer3 --json",
    )
    parser.add_argument("tag", metavar="TAG", help="the tag, a scraper's name")
    parser.add_argument("--json", action="store_true", help="the facts as JSON")
    add_places(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        tag = validate_tag(arguments.tag, "TAG")
    except exc.ArgumentError as error:
        raise CommandError(str(error)) from None
    # A name may have characters that the output's encoding has not.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    poller = Poller(find_store(arguments)[0], None)
    try:
        picture = poller.start().result()
    finally:
        poller.close()
    if picture.overview is None:
        raise CommandError(picture.trouble or "nothing to be seen")
    explanation = explain_tag(picture.overview, tag)
    if arguments.json:
        print(json.dumps(explanation.as_dict(), indent=1))
    else:
        print(explanation)
    return EXIT_OK


def explain_tag(overview: Overview, tag: str) -> Explanation:
    """Return why a tag has what it has, over all processes of an overview."""
    limits = overview.limits
    rows: list[TagStats] = list(overview.scrapers)
    own = next((row for row in rows if row.name == tag), None)
    others = [_facts(row) for row in rows if row is not own]
    if own is None:
        its = limits.tags.of(tag)
        active = any(row.active for row in rows)
        rule = policy.ceiling(active, limits.soft_limit, limits.max_limit)
        room = limits.capacity - limits.tags.reserved + its.reserved
        ceiling = policy.own_ceiling(rule, its.max, its.reserved, room)
        own = TagStats(
            tag,
            limit=ceiling,
            weight=its.weight,
            max=its.max,
            reserved=its.reserved,
        )
    there = limits.capacity - limits.quarantined
    return explain(
        Observed(
            _facts(own),
            others,
            there,
            limits.tags.reserved,
            (limits.soft_limit, limits.max_limit),
            overview.available,
            max(overview.checked_out - there, 0),
            not overview.paused.keys().isdisjoint((tag, ALL)),
        )
    )


def _facts(row: TagStats) -> TagFacts:
    """Return what the explanation works with."""
    in_line = row.waiting and row.connections < row.limit
    rank = policy.rank(row.connections, row.weight, row.usage, 0, row.reserved)
    return TagFacts(
        row.name,
        policy.Party(
            row.active,
            row.connections,
            row.waiting,
            row.limit,
            row.weight,
            row.reserved,
        ),
        TagLimits(weight=row.weight, max=row.max, reserved=row.reserved),
        row.usage,
        rank if in_line else None,
    )
