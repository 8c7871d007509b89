"""The report as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from attnrewrite.report.data import ReportData
from attnrewrite.report.rows import GraphReport, SiteReport
from attnrewrite.report.text import ASSIGNMENT, became, graph_summary, meaning, versions, where, why

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["report_to_html"]


# -- HTML -------------------------------------------------------------------------------------------------------------


@dataclass
class _CodeLine:
    """One line of highlighted code.

    ``anchors``: the sites whose first line on this side it is. ``first``: whether the line before belongs to another
    site, or to none.
    """

    number: int
    html: Markup
    site: _SiteView | None = None
    anchors: list[str] = field(default_factory=list)
    first: bool = False


@dataclass
class _SiteView:
    """One site as the template shows it."""

    site: SiteReport
    id: str
    hue: int
    where: list[str]
    meaning: list[str]
    why: list[str]
    became: str
    before: str = ""
    after: str = ""

    @property
    def status(self) -> str:
        return self.site.status


@dataclass
class _GraphPanel:
    """One graph as the template shows it."""

    graph: GraphReport
    id: str
    summary: str
    rows: list[_SiteView]
    before: list[_CodeLine]
    after: list[_CodeLine]


# Hues of rewritten sites: greens, blues and purples, with neighbors far apart. All kept sites have the same orange.
_REWRITTEN_HUES = (150, 215, 280, 180, 250, 320, 120, 200)

_KEPT_HUE = 35


def report_to_html(report: ReportData) -> str:
    """The report as one self-contained HTML page."""
    # Imported here, since only this rendering needs a template engine, and text is rendered far more often.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    graphs = [_graph_view(graph, f"g{index}") for index, graph in enumerate(report.graphs)]
    page = environment.get_template("report.html.j2")
    return page.render(report=report, graphs=graphs, versions=versions(report))


def _graph_view(graph: GraphReport, id: str) -> _GraphPanel:
    rows = []
    for index, site in enumerate(graph.sites):
        hue = _KEPT_HUE if site.status == "kept" else _REWRITTEN_HUES[index % len(_REWRITTEN_HUES)]
        rows.append(
            _SiteView(site, f"{id}-s{index}", hue, where(site.location), meaning(site), why(site), became(site))
        )
    before = _code(graph.before_code, "before", rows)
    unchanged = not graph.after_code or graph.after_code == graph.before_code
    # Kept sites appear on the right as well, under the names that they had.
    after = [] if unchanged else _code(graph.after_code, "after", rows)
    return _GraphPanel(graph, id, graph_summary(graph), rows, before, after)


def _code(source: str, side: str, rows: Sequence[_SiteView]) -> list[_CodeLine]:
    """The lines of the source, each with its site; sets the anchors that the rows link to."""
    from markupsafe import Markup
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    source = source.strip("\n")
    if not source:
        return []
    owners: dict[str, list[_SiteView]] = {}
    for row in rows:
        for name in row.site.nodes_before if side == "before" else row.site.nodes_after:
            owners.setdefault(name, []).append(row)
    html = highlight(source, PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    lines: list[_CodeLine] = []
    functions = 0
    previous: _SiteView | None = None
    for number, (text, markup) in enumerate(zip(source.split("\n"), html.split("\n"), strict=False), start=1):
        line = _CodeLine(number, Markup(markup))
        functions += text.startswith("def ")
        assigned = ASSIGNMENT.match(text)
        # The sites' names refer to the first function; the nested graphs that follow have their own names.
        found = owners.get(assigned["name"], []) if assigned and functions == 1 else []
        if found:
            line.site = found[0]
            line.first = previous is not line.site
        if not text.lstrip().startswith("#"):  # the place in the user's source, between two lines of code
            previous = line.site
        for row in found:
            if not getattr(row, side):
                anchor = f"{row.id}-{side}"
                setattr(row, side, anchor)
                line.anchors.append(anchor)
        lines.append(line)
    return lines
