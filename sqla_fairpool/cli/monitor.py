"""``sqla-fairpool monitor``, ``stats``, ``explain``: who has the connections, and why.

The whole screen is in :mod:`.monitor_app`, which needs Textual. Plain text and JSON are
here, and need nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import Future, wait
from importlib.util import find_spec
from typing import Any

from sqlalchemy import exc

from ..checks import validate_tag
from ..ledger.overview import Overview
from ..ledger.overview_text import lines, printable
from ..scheduling import policy
from ..scheduling.explanation import Explanation, Observed, TagFacts, explain
from ..scheduling.tags import ALL
from ..scheduling.ticket import TagLimits
from ..stats import TagStats
from ..threads import make_lock
from . import EXIT_OK, CommandError, add_places, find_store
from .poller import Picture, Poller

#: Seconds from one look to the next.
_INTERVAL = 5.0

#: Seconds after which a wait for an answer handles signals, on every system.
_TICK = 0.2

#: Seconds that a scrape waits for a look: less than Prometheus waits, 10.
_SCRAPE = 5.0

_EPILOG = """\
examples:
  sqla-fairpool monitor                       every 5 seconds
  sqla-fairpool monitor 1 --url postgresql://app@db/app
  sqla-fairpool monitor --ledger /run/scrapers/app.ledger
  watch sqla-fairpool monitor --once
  sqla-fairpool monitor 60 --json >> pool.jsonl
  sqla-fairpool monitor --prometheus 9187   for Prometheus, on port 9187

keys: q quit, p pause, s sort, + and - interval; up and down choose a scraper, d or
Enter shows it in detail, Esc all of them again; left and right scroll

The column server is what the server sees of a scraper: sessions at work, of all; "-"
where it has none, "?" where the role may not see what they do.

exit status: 0 after q or --once, 2 if nothing can be shown, 130 after Ctrl-C.

The environment's FAIRPOOL_LEDGER and DATABASE_URL stand in for --ledger and --url.
Without any of them, and with one ledger in use on this host, that one is shown.
"""


def add_command(commands: Any) -> None:
    """Add ``monitor``, ``stats`` and ``explain``."""
    parser = commands.add_parser(
        "monitor",
        help="watch who has the connections, on the whole screen",
        description="Watch who has the connections of a budget that processes share. "
        "On a terminal on the whole screen, else as plain text.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "seconds",
        nargs="?",
        type=_seconds,
        default=_INTERVAL,
        metavar="SECONDS",
        help="from one look to the next (default: %(default)g)",
    )
    parser.add_argument("--once", action="store_true", help="look once, as plain text")
    parser.add_argument(
        "--prometheus",
        type=_address,
        metavar="[HOST:]PORT",
        help="serve the figures to Prometheus, on all interfaces without HOST; each "
        "scrape is a look",
    )
    stats = commands.add_parser(
        "stats",
        help="tell once who has the connections",
        description="Tell once who has the connections, as monitor --once does.",
        epilog="examples:\n  sqla-fairpool stats\n  sqla-fairpool stats --json",
    )
    stats.set_defaults(once=True, seconds=_INTERVAL, prometheus=None)
    _add_explain(commands)
    what = "for programs: one JSON document per look, each on a line if not once"
    for command in (parser, stats):
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help=what)
        add_places(command)


def _add_explain(commands: Any) -> None:
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
    parser.set_defaults(run=_explain)
    add_places(parser)


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a number of seconds, more than 0, at most 3600"
        )
    return number


def _address(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"{value!r} is not [HOST:]PORT")
    return host.strip("[]") or "0.0.0.0", int(port)


def run(arguments: argparse.Namespace) -> int:
    """Run the monitor, return the exit status.

    :raises CommandError: if there is nothing to watch.
    """
    if arguments.prometheus is not None:
        return _export(arguments)
    is_live = not (arguments.once or arguments.json) and _has_terminal()
    if is_live and find_spec("textual") is None:
        raise CommandError(
            "textual not installed: pip install 'sqla-fairpool[monitor]', "
            "or look once by sqla-fairpool stats"
        )
    _escape_output()
    store, database = find_store(arguments)
    is_asked = database is not None and (
        arguments.url is not None or database.get_backend_name() == "postgresql"
    )
    poller = Poller(store, database if is_asked else None)
    try:
        if is_live:
            from .monitor_app import Monitor  # the import takes half a second

            app = Monitor(poller.start, arguments.seconds, store.name)
            return app.run_until_quit()
        return _print(poller, arguments.seconds, arguments.once, arguments.json)
    finally:
        poller.close()


def _escape_output() -> None:
    """Have characters escaped that the output has not: a name may have any."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _has_terminal() -> bool:
    """Tell if there is a terminal; Textual draws on standard error."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return os.environ.get("TERM") not in ("dumb", "unknown") and all(
        stream is not None and stream.isatty() for stream in streams
    )


# -- as text ---------------------------------------------------------------------------


def _print(poller: Poller, interval: float, is_once: bool, as_json: bool) -> int:
    """Print what is seen, once or until a signal."""
    while True:
        due = time.monotonic() + interval
        answer = poller.start()
        while not answer.done():
            wait([answer], _TICK)
        picture = answer.result()
        if is_once and picture.overview is None:
            raise CommandError(picture.trouble or "nothing to be seen")
        if as_json:
            print(_document(picture, indent=1 if is_once else None), flush=True)
        else:
            print(_block(picture), end="\n" if is_once else "\n\n", flush=True)
        if is_once:
            return EXIT_OK
        time.sleep(max(due - time.monotonic(), 0.0))


def _block(picture: Picture) -> str:
    trouble = picture.trouble_at(time.monotonic())
    if trouble is not None or picture.overview is None:
        # No old figures: in a log they would be taken for new ones.
        return f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}  {trouble}"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    found = lines(picture.overview, width)
    if picture.server is not None:
        found.append(str(picture.server))
        found += [f"Warning: {printable(text)}" for text in picture.server.warnings]
    return "\n".join(found)


def _document(picture: Picture, indent: int | None) -> str:
    if picture.trouble is not None or picture.overview is None:
        taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        document: dict[str, Any] = {"taken_at": taken, "error": picture.trouble}
    else:
        document = picture.overview.as_dict()
        if picture.server is not None:
            document["server"] = picture.server.as_dict()
    # DEL is the one control character that json leaves as it is.
    return json.dumps(document, indent=indent).replace("\x7f", "\\u007f")


# -- for Prometheus --------------------------------------------------------------------


def _export(arguments: argparse.Namespace) -> int:
    """Serve what is seen at each scrape, until a signal."""
    if arguments.once or arguments.json:
        raise CommandError("--prometheus goes with neither --once nor --json")
    if find_spec("prometheus_client") is None:
        raise CommandError(
            "prometheus_client not installed: pip install 'sqla-fairpool[prometheus]'"
        )
    from prometheus_client import CollectorRegistry, start_http_server

    from ..prometheus import OverviewCollector

    store, _ = find_store(arguments)
    poller = Poller(store, None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(OverviewCollector(store.name, _Looks(poller)))
    host, port = arguments.prometheus
    at = f"[{host}]" if ":" in host else host
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        what = f"cannot listen at {at}:{port}"
        raise CommandError(f"{what}: {error.strerror or error}") from None
    try:
        at = f"http://{at}:{server.server_port}/metrics"
        print(f"ledger {printable(store.name)}: {at}", flush=True)
        while True:
            time.sleep(3600.0)
    finally:
        server.shutdown()
        server.server_close()
        poller.close()


class _Looks:
    """Returns what is seen now; what takes too long goes on for the next caller.

    For several threads.
    """

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._lock = make_lock()
        self._looking: Future[Picture] | None = None

    def __call__(self) -> Overview | None:
        with self._lock:
            if self._looking is None or self._looking.done():
                self._looking = self._poller.start()
            looking = self._looking
        wait([looking], _SCRAPE)
        picture = looking.result() if looking.done() else Picture(trouble="no answer")
        return picture.overview if picture.trouble is None else None


# -- explain: why a tag has what it has, over a ledger ---------------------------------
#
# Who is before whom is told by what the processes say they hold and have used lately;
# the ledger gives turns by places in line, so the order is what the rules are after,
# and not a promise of the next slot.


def _explain(arguments: argparse.Namespace) -> int:
    try:
        tag = validate_tag(arguments.tag, "TAG")
    except exc.ArgumentError as error:
        raise CommandError(str(error)) from None
    _escape_output()
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
            tag, limit=ceiling, weight=its.weight, max=its.max, reserved=its.reserved
        )
    there = limits.capacity - limits.quarantined
    facts = Observed(
        _facts(own),
        others,
        there,
        limits.tags.reserved,
        (limits.soft_limit, limits.max_limit),
        overview.available,
        max(overview.checked_out - there, 0),
        not overview.paused.keys().isdisjoint((tag, ALL)),
    )
    return explain(facts)


def _facts(row: TagStats) -> TagFacts:
    """Return what the explanation works with."""
    in_line = row.waiting and row.connections < row.limit
    rank = policy.rank(row.connections, row.weight, row.usage, 0, row.reserved)
    wants = row.active, row.connections, row.waiting, row.limit
    party = policy.Party(*wants, row.weight, row.reserved)
    limits = TagLimits(weight=row.weight, max=row.max, reserved=row.reserved)
    return TagFacts(row.name, party, limits, row.usage, rank if in_line else None)
