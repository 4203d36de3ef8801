"""The report as one HTML file: no script, nothing fetched, day and night."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .figures import Figure, Target
from .report import Report, Section, Table
from .svg import draw, nice_number

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f24;
  --soft: #5b6470; --rule: #d9dee5; --ours: #0b7285; --base: #e8590c;
  --other: #98a2b0; --a: #0b7285; --b: #e8590c; --c: #7048e8; --good: #2b8a3e;
  --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2127;
  --ink: #e6e9ed; --soft: #9aa5b1; --rule: #333b45; --ours: #3bc9db;
  --base: #ff922b; --other: #6b7683; --a: #3bc9db; --b: #ff922b; --c: #b197fc;
  --good: #69db7c; --bad: #ff8787; } }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--paper);
  color: var(--ink); max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 48px 0 6px; }
h3 { font-size: 15px; margin: 0 0 6px; } p { max-width: 78ch; margin: 6px 0 12px; }
.soft, figcaption { color: var(--soft); } .small-print { font-size: 13px; }
nav a { margin-right: 14px; } a { color: var(--ours); }
table { border-collapse: collapse; margin: 10px 0 18px; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.met { color: var(--good); font-weight: 600; white-space: nowrap; }
.not { color: var(--bad); font-weight: 600; white-space: nowrap; }
.plots { display: grid; gap: 18px; margin: 14px 0; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 10px;
  padding: 14px 16px 8px; break-inside: avoid; }
.scroll { overflow-x: auto; } .meter { width: 130px; height: 14px; }
svg { width: 100%; height: auto; display: block; } svg.meter { width: 130px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .tick, svg .label, svg .small { fill: var(--soft); font-size: 11px; }
svg .strong { font-weight: 700; } svg .alarm { fill: var(--bad); }
svg line { stroke: var(--soft); stroke-width: 1; } svg .grid { stroke: var(--rule); }
svg .level { stroke: var(--soft); stroke-dasharray: 5 4; }
svg .mark { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .whisker, svg .median { stroke: var(--ink); stroke-width: 1.5; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
svg .line.ours { stroke: var(--ours); } svg .line.base { stroke: var(--base); }
svg .line.other { stroke: var(--other); } svg .line.a { stroke: var(--a); }
svg .line.b { stroke: var(--b); } svg .line.c { stroke: var(--c); }
svg .ours { fill: var(--ours); } svg .base { fill: var(--base); }
svg .other { fill: var(--other); } svg .a { fill: var(--a); }
svg .b { fill: var(--b); } svg .c { fill: var(--c); } svg .line { fill: none; }
svg .stack { stroke: var(--card); stroke-width: .7; }
svg .area { fill-opacity: .55; } svg .bar { fill-opacity: .85; }
svg .ok { fill: var(--good); } svg .bad { fill: var(--bad); }
svg .track { fill: var(--rule); }
"""


def page(report: Report) -> str:
    """Return the whole HTML document."""
    return "\n".join(_document(report)) + "\n"


def _document(report: Report) -> Iterator[str]:
    title = "FairQueuePool: what it does, beside what people would use instead"
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8"/>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
    yield f"<title>{title}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{title}</h1>"
    yield f'<p class="soft">{escape(summary(report.about))}</p>'
    if report.cut_short:
        yield f'<p class="not">{escape(report.cut_short)}</p>'
    yield "<nav>"
    for section in report.sections:
        yield f'<a href="#{escape(section.name)}">{escape(section.title)}</a>'
    yield "</nav>"
    yield from _targets(report)
    for section in report.sections:
        yield from _section(section)
    yield from _small_print(report)
    yield "</body></html>"


def summary(about: Mapping[str, Any]) -> str:
    """Say in a line where and with what the run was made."""
    machine, versions = about["machine"], about["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{about['date']}, {about['form']} form. {machine['cores']} cores, "
        f"{machine['system']} {machine['architecture']}, load before the run "
        f"{machine['load']}. {known}."
    )


def _targets(report: Report) -> Iterator[str]:
    figures, missing = report.figures, report.missing
    if not figures and not missing:
        return
    met = sum(figure.verdict == "met" for figure in figures)
    yield f'<h2 id="targets">Targets: {met} of {len(figures) + len(missing)} met</h2>'
    yield (
        '<p class="soft">Ratios of what was measured in the same round, contenders '
        "taking turns: the median over the rounds and where their middle half lies."
        "</p>"
    )
    yield '<div class="scroll"><table><tr><th>what</th><th>beside</th><th>target</th>'
    yield "<th>measured</th><th>middle half</th><th></th><th></th></tr>"
    for figure in figures:
        yield _target_row(figure)
    for target in missing:
        yield (
            f"<tr><td>{escape(target.what)}</td><td>{escape(target.beside)}</td>"
            f'<td class="n">{escape(str(target))}</td><td></td><td></td><td></td>'
            f'<td class="soft">not run</td></tr>'
        )
    yield "</table></div>"


def _target_row(figure: Figure) -> str:
    assert figure.target is not None
    low, high = figure.spread
    is_met = figure.verdict == "met"
    return (
        f"<tr><td>{escape(figure.what)}</td><td>{escape(figure.beside)}</td>"
        f'<td class="n">{escape(str(figure.target))}</td>'
        f'<td class="n"><b>{figure.median:.3f}</b></td>'
        f'<td class="n soft">{low:.3f} .. {high:.3f}</td>'
        f"<td>{_meter(figure, figure.target)}</td>"
        f'<td class="{"met" if is_met else "not"}">{escape(figure.verdict)}</td></tr>'
    )


def _meter(figure: Figure, target: Target) -> str:
    """Draw the figure on a scale on which the target is in the middle."""
    part = min(max(figure.median / (2 * target.bound), 0.0), 1.0)
    kind = "ok" if target.met(figure.median) else "bad"
    return (
        '<svg class="meter" viewBox="0 0 130 14" role="img" '
        f'aria-label="{figure.median:.3f}, target {escape(str(target))}">'
        '<rect x="0" y="4" width="130" height="6" rx="3" class="track"/>'
        f'<rect x="0" y="4" width="{130 * part:.1f}" height="6" rx="3" class="{kind}"/>'
        '<line x1="65" y1="0" x2="65" y2="14" class="whisker"/></svg>'
    )


def _section(section: Section) -> Iterator[str]:
    found = section.findings
    yield f'<h2 id="{escape(section.name)}">{escape(section.title)}</h2>'
    yield f"<p>{escape(section.text)}</p>"
    if found.plots:
        yield '<div class="plots">'
        for plot in found.plots:
            yield f"<figure><h3>{escape(plot.title)}</h3>{draw(plot)}</figure>"
        yield "</div>"
    for note in found.notes:
        yield f"<p>{escape(note)}</p>"
    yield from _figures(found.figures)
    for table in found.tables:
        yield from _table(table)


def _figures(figures: Sequence[Figure]) -> Iterator[str]:
    if not figures:
        return
    yield '<div class="scroll"><table><tr><th>figure</th><th>beside</th>'
    yield "<th>median</th><th>middle half</th><th>remark</th></tr>"
    for figure in figures:
        low, high = figure.spread
        yield (
            f"<tr><td>{escape(figure.what)}</td><td>{escape(figure.beside)}</td>"
            f'<td class="n">{_number(figure.median)}</td>'
            f'<td class="n soft">{_number(low)} .. {_number(high)}</td>'
            f'<td class="soft small-print">{escape(figure.remark)}</td></tr>'
        )
    yield "</table></div>"


def _number(value: float) -> str:
    """Return a ratio; what is not one may be large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _table(table: Table) -> Iterator[str]:
    yield f'<h3>{escape(table.title)}</h3><div class="scroll"><table><tr>'
    yield "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    yield "</tr>"
    for row in table.rows:
        cells = (
            f"<td>{escape(cell)}</td>"
            if isinstance(cell, str)
            else f'<td class="n">{nice_number(cell)}</td>'
            for cell in row
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</table></div>"


def _small_print(report: Report) -> Iterator[str]:
    about = escape(json.dumps(report.about, indent=2, ensure_ascii=False))
    yield '<h2 id="run">The run</h2>'
    yield (
        f'<p class="soft">It took {report.seconds:.0f} s. The JSON file beside this '
        "one has every figure, and the data of every plot.</p>"
    )
    yield f'<pre class="soft small-print">{about}</pre>'
