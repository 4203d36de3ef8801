"""The parts of the documents that are made from the code.

``python tests/support/documents.py`` writes them into the documents, each between two
comments: ``<!-- NAME: by tests/support/documents.py -->`` and ``<!-- end -->``. With
``--check`` it writes nothing, and fails if a document is out of date. It also gives
absolute links the address in setup.cfg.
"""

from __future__ import annotations

import argparse
import configparser
import re
import sys
from pathlib import Path

from sqla_fairpool import opentelemetry, plugin, prometheus
from sqla_fairpool.cli import make_argument_parser
from sqla_fairpool.launch import DATABASE, VARIABLES
from sqla_fairpool.options import OPTIONS, PoolOptions

if __package__:
    from .imports import parts
else:  # run as a program
    from imports import parts

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

#: Every document of the project. Some are written by hand altogether.
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def address():
    """Return where the project lives; setup.cfg says it."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    return settings["metadata"]["url"]


# -- the options -----------------------------------------------------------------------


def _default(name, defaults):
    default = getattr(defaults, name)
    return f"`{default}`" if isinstance(default, str) else str(default)


def options():
    """Yield a row for each option of the pool."""
    yield from ("| option | default | meaning |", "|---|---|---|")
    defaults = PoolOptions.parse()
    for name, option in OPTIONS.items():
        none = f"; `None` {option.none}" if option.none else ""
        yield f"| `{name}` | {_default(name, defaults)} | {option.meaning}{none} |"


def option_sections():
    """Yield a section for each option, with an anchor and all ways to set it."""
    defaults = PoolOptions.parse()
    for name, option in OPTIONS.items():
        argument = "pool_timeout" if name == "timeout" else name
        yield from ("", f"(option-{name.replace('_', '-')})=", f"### `{name}`", "")
        meaning = option.meaning[0].upper() + option.meaning[1:]
        none = f" `None` stands {option.none}." if option.none else ""
        yield from (f"{meaning}.{none}".replace(" stands to", " means to"), "")
        yield f"- Default: {_default(name, defaults)}"
        yield f"- `create_engine`: `{argument}=`"
        yield f"- URL: `{plugin.PREFIX}{name}=`"
        if option.variable:
            flag = "--" + name.replace("_", "-")
            yield f"- Environment: `{option.variable}`; `sqla-fairpool run {flag}`"
        answer = "no" if option.is_fixed else "yes, by `pool.reconfigure()`"
        yield f"- Can be changed in a running pool: {answer}"


def variables():
    """Yield a row for each variable of the environment."""
    yield from ("| variable | default | stands for |", "|---|---|---|")
    yield f"| `{DATABASE}` | | the database |"
    defaults = PoolOptions.parse(ledger="host")
    for variable, name in VARIABLES.items():
        none = f"; `none` {OPTIONS[name].none}" if OPTIONS[name].none else ""
        yield f"| `{variable}` | {getattr(defaults, name)} | `{name}`{none} |"


def url_keys():
    """Yield a row for each key of a database URL."""
    yield from ("| key | stands for |", "|---|---|")
    yield f"| `{plugin.PREFIX}scraper` | the tag of the engine |"
    for name in (*OPTIONS, *plugin._OTHERS):
        argument = plugin._ARGUMENTS.get(name, name)
        yield f"| `{plugin.PREFIX}{name}` | `{argument}` |"


# -- metrics ---------------------------------------------------------------------------


def prometheus_metrics():
    """Yield a row for each series of Prometheus."""
    yield from ("| name | type | labels | meaning |", "|---|---|---|---|")
    for (kind, *labels), figures in prometheus._FIGURES.items():
        type_ = kind.__name__.removesuffix("MetricFamily").lower()
        shown = ", ".join(f"`{label}`" for label in ("pool", *labels))
        for name, text, _ in figures:
            full = prometheus._PREFIX + name + "_total" * (type_ == "counter")
            yield f"| `{full}` | {type_} | {shown} | {text} |"


def opentelemetry_metrics():
    """Yield a row for each instrument of OpenTelemetry."""
    yield from ("| name | unit | meaning |", "|---|---|---|")
    o = opentelemetry
    for first, rows in [*o._FIGURES.items(), *o._COUNTERS.items()]:
        for name, unit, text, _ in rows:
            yield f"| `{first}{name}` | `{unit}` | {text} |"
    yield f"| `{o._PREFIX}timeouts` | `{{timeout}}` | Connection timeouts |"
    for _, name, text in o._DURATIONS:
        yield f"| `{o._PREFIX}{name}` | `s` | {text} |"


# -- the command line ------------------------------------------------------------------


def commands():
    """Yield a section for each command."""
    (subparsers,) = make_argument_parser()._subparsers._group_actions
    for name, parser in subparsers.choices.items():
        yield from _command(f"sqla-fairpool {name}", parser, 2)


def _command(name, parser, level):
    text = " ".join((parser.description or "").split())
    yield from ("", f"({name.replace(' ', '-')})=", f"{'#' * level} `{name}`", "")
    yield text if text.endswith(".") else f"{text}."
    shown = [a for a in parser._actions if a.help and a.help != argparse.SUPPRESS]
    plain = [a for a in shown if not isinstance(a, argparse._SubParsersAction)]
    yield from ("", "| option | meaning |", "|---|---|")
    for action in plain:
        value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        meaning = (action.help % {"default": action.default}).replace("|", "\\|")
        cell = f"{flags}{f' `{value.strip()}`' if value else ''}".strip()
        yield f"| {cell} | {meaning} |"
    if parser.epilog:
        yield from ("", "```text", *parser.epilog.strip().splitlines(), "```")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner, other in action.choices.items():
                yield from _command(f"{name} {inner}", other, level + 1)


# -- the architecture ------------------------------------------------------------------


def architecture():
    """Yield a diagram of the parts, each with an arrow to those that it imports.

    An arrow that others imply is left out: what pool imports through ledger, say.
    """
    graph = parts()
    reach = {}
    for part in sorted(graph, key=lambda one: len(graph[one])):
        reach[part] = _reach(part, graph)
    yield from ("```mermaid", "graph TD")
    for part, imported in graph.items():
        for other in sorted(imported):
            if not any(other in reach[third] for third in imported - {other}):
                yield f"    {part} --> {other}"
    yield "```"


def _reach(part, graph):
    found, left = set(), list(graph[part])
    while left:
        other = left.pop()
        if other not in found:
            found.add(other)
            left.extend(graph[other])
    return found


# -- writing ---------------------------------------------------------------------------

PARTS = {
    part.__name__: part
    for part in (
        options,
        option_sections,
        variables,
        url_keys,
        prometheus_metrics,
        opentelemetry_metrics,
        commands,
        architecture,
    )
}

_PART = re.compile(
    r"(<!-- (\w+): by tests/support/documents\.py -->\n).*?(<!-- end -->)", re.DOTALL
)
_ABSOLUTE = re.compile(r"https://[^\s()]+?(/(?:blob|tree|raw)/main\b)")


def renewed(text):
    """Return a document with its parts and its absolute links as they should be."""

    def fill(found):
        return "\n".join([found[1].strip(), *PARTS[found[2]](), "", found[3]])

    return _ABSOLUTE.sub(rf"{address()}\1", _PART.sub(fill, text))


def main(check):
    """Write all documents that are out of date, or return which are."""
    old = [path for path in DOCUMENTS if renewed(path.read_text()) != path.read_text()]
    if check:
        return "".join(f"{path.relative_to(ROOT)} is out of date\n" for path in old)
    for path in old:
        path.write_text(renewed(path.read_text()))
    return None


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]) or None)
