"""Writes runs as one HTML file that needs no other: the table of their reports, and the plots. It measures nothing."""

from collections.abc import Mapping, Sequence
from html import escape

from stallfree.core.slo import Slo
from stallfree.metrics.plot import attainment, latencies, loads
from stallfree.metrics.report import Report
from stallfree.metrics.table import classes, table, tenants
from stallfree.metrics.timeline import Timeline

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
p, h1 { overflow-wrap: anywhere } .wide { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: .1em 1.2em .1em 0; text-align: right }
th:first-child, td:first-child { text-align: left }
tr:nth-child(even) { background: #f3f3f3 } .problem { color: #b00020 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26em), 1fr)); gap: 1em; margin-top: 1em }
svg { width: 100%; max-width: 48em; height: auto }
"""


def page(
    title: str, facts: Sequence[str], problems: Sequence[str], runs: Mapping[str, tuple[Report, Sequence[Timeline]]], slo: Slo
) -> str:
    """The file's text. `facts`: lines on how the runs were made. `problems`: why they are not valid, if they are not."""
    reports = {name: report for name, (report, _) in runs.items()}
    tables = [rows for rows in (table(reports), classes(reports), tenants(reports)) if rows]
    return _page(title, facts, problems, tables, latencies({name: lines for name, (_, lines) in runs.items()}, slo))


def loads_page(title: str, facts: Sequence[str], rows: Sequence[Sequence[str]], reports: Mapping[tuple[str, float], Report]) -> str:
    """The text of a file on several configurations at several rates: a table of `rows`, the first of which are names, and plots of
    the `reports`, by configuration and requests per second.
    """
    return _page(title, facts, [], [rows], loads(reports))


def plan_page(
    title: str,
    facts: Sequence[str],
    rows: Sequence[Sequence[str]],
    points: Mapping[str, Sequence[tuple[float, Report]]],
    slo: Slo,
) -> str:
    """The text of a file on searched deployments: `rows` as in `loads_page`, and their attainments at several rates."""
    return _page(title, facts, [], [rows], attainment(points, slo))


def _page(title: str, facts: Sequence[str], problems: Sequence[str], tables: Sequence[Sequence[Sequence[str]]], plots: str) -> str:
    paragraphs = [f"<p>{escape(fact)}</p>" for fact in facts] + [f"<p class=problem>{escape(problem)}</p>" for problem in problems]
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<h1>{escape(title)}</h1>
{"".join(paragraphs)}
{"".join(map(_table, tables))}<div class="plots">
{plots}
</div>
</html>
"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first of the rows has the names of its columns."""
    names, *others = rows
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in others)
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    return f'<div class="wide" tabindex="0"><table>\n<tr>{heads}</tr>\n{cells}</table></div>\n'
