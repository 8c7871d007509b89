"""What the rewriting did and why: plain data first, every rendering made from it.

The data model is filled by :mod:`attnrewrite.rewrite` and :mod:`attnrewrite.backend` and read by the renderings
(:mod:`attnrewrite.render`), by the dump (:mod:`attnrewrite.dump`) and by users. Nothing in this file renders.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnrewrite.report.rows import GraphReport, SiteReport

__all__ = ["RewriteReport"]


@dataclass
class RewriteReport:
    """All graphs of one model: what was found, what it became, and why the rest was left as it is."""

    model: str = ""
    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[SiteReport]:
        """Every row of every graph, whatever became of it."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def rewritten(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "rewritten"]

    @property
    def recognised(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "recognised"]

    @property
    def kept(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "kept"]

    @property
    def unmatched_rules(self) -> list[str]:
        """The globs of ``options["kernel_rules"]`` that match no site of any graph; none if that is not known."""
        if not self.graphs or not all(graph.captured and not graph.reason for graph in self.graphs):
            return []
        first, *others = self.graphs
        return [glob for glob in first.unmatched_rules if all(glob in graph.unmatched_rules for graph in others)]

    @property
    def remarks(self) -> list[str]:
        """What is to be said of the model as a whole: a sentence for each rule that matches nothing."""
        places = [site.location for site in self.sites if site.location is not None]
        paths = list(dict.fromkeys(repr(place.module or str(place)) for place in places))
        there = f"; there are attentions at {', '.join(paths[:4])}" if paths else ""
        there += ", ..." if len(paths) > 4 else ""
        return [f"kernel_rules: {glob!r} matches no attention here{there}" for glob in self.unmatched_rules]

    @property
    def summary(self) -> str:
        """One line: "12 of 12 attention sites rewritten in 1 graph"."""
        graphs = len(self.graphs)
        text = f"{len(self.rewritten)} of {len(self.sites)} attention sites rewritten in {graphs} graph" + "s" * (
            graphs != 1
        )
        text += f"; {len(self.recognised)} in the best form already" if self.recognised else ""
        uncaptured = sum(not graph.captured for graph in self.graphs)
        return text + (f"; {uncaptured} passed on uncaptured" if uncaptured else "")

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-ready data."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_text(self, width: int | None = None) -> str:
        """The table that a terminal shows, without colours. ``width`` in columns; default: as wide as it needs."""
        from attnrewrite.report.text import report_to_text

        return report_to_text(self, width=width)

    def to_html(self) -> str:
        """One self-contained HTML page: the table, and the code of each graph before and after, side by side."""
        from attnrewrite.report.html import report_to_html

        return report_to_html(self)

    def save_html(self, path: str | Path) -> Path:
        """Writes :meth:`to_html` to ``path`` and returns it."""
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path

    def __str__(self) -> str:
        return self.to_text()
