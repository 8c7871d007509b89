"""Renders a :class:`~attnrewrite.report.data.ReportData` as text and as a colored table.

A rendering adds nothing to the report's data and shows all of it in full.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnrewrite.ir.source import SourceLocation
from attnrewrite.report.data import ReportData
from attnrewrite.report.rows import GraphReport, SiteReport

__all__ = ["print_report", "report_to_text", "short_path"]

ASSIGNMENT = re.compile(r"^ {4}(?:\w+ [^\w\s=]{1,3}= [^;]+;  )?(?P<name>\w+)(?: ?: [^=]+)? = ")
"""A line of a graph's code that gives a node its value. In-place operators read ``x += y;  iadd = x``."""

_TABLE_MIN_WIDTH = 110
"""The smallest width of the table; on narrower terminals the sites are listed one after another."""


def report_to_text(report: ReportData, width: int | None = None) -> str:
    """The report as plain text. ``width`` in columns; by default as wide as the table needs."""
    out = io.StringIO()
    # Columns have a maximum width, so the table is only as wide as it needs to be.
    console = Console(file=out, width=width or 240, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(_report(report, width or 240))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n")) + "\n"


def print_report(report: ReportData, console: Console | None = None) -> None:
    """Prints the report to a terminal, in color if the terminal supports it."""
    console = console or Console()
    console.print(_report(report, console.width))


def short_path(file: str) -> str:
    """A path relative to the working directory, or to the installation directory of its package."""
    path = Path(file)
    for root in ("site-packages", "dist-packages"):
        if root in path.parts:
            return Path(*path.parts[len(path.parts) - path.parts[::-1].index(root) :]).as_posix()
    try:
        return path.relative_to(os.getcwd()).as_posix()
    except (ValueError, OSError):  # elsewhere; or the working directory is gone
        return file


# -- the lines of a site, the same for every rendering ----------------------------------------------------------------


def _shape(shape: Sequence[str]) -> str:
    return f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"


def meaning(site: SiteReport) -> list[str]:
    """The properties of the attention that the report has: shapes, dtype, scale, mask and so on."""
    shapes = {"q": site.query_shape, "k": site.key_shape, "v": site.value_shape}
    lines: list[str] = []
    for name, shape in shapes.items():
        if not shape:
            continue
        if lines and lines[-1].endswith(f" {_shape(shape)}"):
            # "q, k, v (2, 12, 128, 64)" rather than three times the same
            names = lines[-1].removesuffix(f" {_shape(shape)}")
            lines[-1] = f"{names}, {name} {_shape(shape)}"
        else:
            lines.append(f"{name} {_shape(shape)}")
    kind = " on ".join(part for part in (site.dtype, site.device) if part)
    pairs = [("scale", site.scale), ("mask", site.mask), ("heads", site.grouping), ("dropout", site.dropout)]
    lines += [kind] if kind else []
    lines += [f"{name}: {text}" for name, text in pairs if text]
    lines += [f"order: {site.order}"] if site.order else []
    lines += [f"{order} order: {count} operations" for order, count in site.operations.items()]
    return lines + [f"score: {mod}" for mod in site.score_mods]


def why(site: SiteReport) -> list[str]:
    """The reason, the proof, and the kernels' verdicts."""
    cached = f"reused across steps: {site.cached}" if site.cached else ""
    blamed = f"in the way: {site.blamed}" if site.blamed and site.blamed not in site.reason else ""
    lines = [text for text in (site.reason, blamed, site.slices, site.projections, cached) if text]
    lines += site.proof
    for verdict in site.verdicts:
        if verdict.reason and verdict.reason not in site.reason:
            lines.append(f"{'' if verdict.willing else 'not '}{verdict.kernel}: {verdict.reason}")
    return lines


def where(location: SourceLocation | None) -> list[str]:
    if location is None:
        return ["not known"]
    lines = [f"{short_path(location.file)}:{location.line}"]
    if location.module:
        lines.append(location.module)
    elif location.function:
        lines.append(f"in {location.function}")
    return lines


def became(site: SiteReport) -> str:
    return (site.kernel or "rewritten") if site.status == "rewritten" else site.status


def graph_summary(graph: GraphReport) -> str:
    """One line: "2 of 3 attention sites rewritten · 412 nodes · inner compiler inductor · find 0.01 s"."""
    if not graph.captured:
        found = "passed on unchanged"
    elif graph.sites:
        count = len(graph.sites)
        found = f"{len(graph.rewritten)} of {count} attention site{'s' * (count != 1)} rewritten"
        found += f", {len(graph.recognized)} in the best form already" if graph.recognized else ""
    else:
        found = "no attention found"
    parts = [found]
    if graph.node_count:
        parts.append(f"{graph.node_count} nodes")
    if graph.inner_backend:
        parts.append(f"inner compiler {graph.inner_backend}")
    parts += [f"{step} {seconds:.2f} s" for step, seconds in graph.seconds.items()]
    return " · ".join(parts)


def versions(report: ReportData) -> str:
    return " · ".join(f"{name} {version}" for name, version in report.versions.items())


# -- terminal ---------------------------------------------------------------------------------------------------------


def _report(report: ReportData, width: int) -> RenderableType:
    # Everything is put into Text objects: a "[" in a module's path must not be read as markup by rich.
    parts: list[RenderableType] = []
    if report.model:
        parts.append(Text(report.model, style="bold"))
    parts.append(Text(report.summary, style="bold green" if report.rewritten else "bold"))
    for graph in report.graphs:
        parts += [Text(), *_graph(graph, width)]
    if report.remarks:
        parts += [Text(), *(_item(text, "yellow") for text in report.remarks)]
    if report.graph_breaks:
        count = len(report.graph_breaks)
        parts += [Text(), Text(f"{count} graph break{'s' * (count != 1)}:", style="bold yellow")]
        parts += [_item(text) for text in report.graph_breaks]
    if report.versions:
        parts += [Text(), Text(versions(report), style="dim")]
    return Group(*parts)


def _graph(graph: GraphReport, width: int) -> Iterator[RenderableType]:
    yield Text.assemble((graph.name, "bold"), ": ", graph_summary(graph))
    if not graph.captured:
        yield _item(f"not captured: {graph.reason or 'no reason was given'}", "yellow")
    if graph.sites:
        yield _table(graph.sites) if width >= _TABLE_MIN_WIDTH else Group(*map(_block, graph.sites))
    for note in graph.notes:
        yield _item(f"note: {note}", "dim")


def _item(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style, overflow="fold"), (0, 0, 0, 2), expand=False)


def _table(sites: Sequence[SiteReport]) -> Table:
    table = Table(box=box.ROUNDED, show_lines=True, header_style="bold")
    # "fold" breaks a word that is longer than its column; nothing is ever cut off.
    for title, most in (("site", 24), ("where", 56), ("what it means", 36), ("became", 20), ("why", 64)):
        table.add_column(title, overflow="fold", max_width=most)
    for site in sites:
        color = _color(site)
        name = Text(site.name, style=color)
        if site.pattern:
            name.append(f"\n{site.pattern}", style="dim")
        outcome = Text(became(site), style=f"bold {color}")
        table.add_row(name, _lines(where(site.location)), _lines(meaning(site)), outcome, _lines(why(site)))
    return table


def _color(site: SiteReport) -> str:
    return "yellow" if site.status == "kept" else "green"


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), overflow="fold")


def _block(site: SiteReport) -> RenderableType:
    """One site on a narrow terminal: labeled lines in place of a row."""
    color = _color(site)
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(overflow="fold", style="dim", min_width=6)
    grid.add_column(overflow="fold")
    for label, lines in (("where", where(site.location)), ("means", meaning(site)), ("why", why(site))):
        if lines:
            grid.add_row(label, _lines(lines))
    heading = Text.assemble((site.name, color), " -> ", (became(site), f"bold {color}"), overflow="fold")
    if site.pattern:
        heading.append(f"  ({site.pattern})", style="dim")
    return Group(Text(), heading, Padding(grid, (0, 0, 0, 2), expand=False))
