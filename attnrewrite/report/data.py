"""The data of a report: what was rewritten in a model, and why the rest was not. Every rendering uses it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from attnrewrite.report.rows import GraphReport, SiteReport

__all__ = ["ReportData"]


@dataclass
class ReportData:
    """The graphs of one model and their sites."""

    model: str = ""
    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[SiteReport]:
        """Every row of every graph, rewritten or not."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def rewritten(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "rewritten"]

    @property
    def recognized(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "recognized"]

    @property
    def kept(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "kept"]

    @property
    def unmatched_rules(self) -> list[str]:
        """The globs of ``options["kernel_rules"]`` that match no site of any graph; empty if that is not known."""
        if not self.graphs or not all(graph.captured and not graph.reason for graph in self.graphs):
            return []
        first, *others = self.graphs
        return [glob for glob in first.unmatched_rules if all(glob in graph.unmatched_rules for graph in others)]

    @property
    def remarks(self) -> list[str]:
        """Sentences about the model as a whole: one for each rule of ``kernel_rules`` that matches nothing."""
        places = [site.location for site in self.sites if site.location is not None]
        paths = list(dict.fromkeys(repr(place.module or str(place)) for place in places))
        there = f"; the model has attentions at {', '.join(paths[:4])}" if paths else ""
        there += ", ..." if len(paths) > 4 else ""
        return [f"kernel_rules: {glob!r} matches no attention{there}" for glob in self.unmatched_rules]

    @property
    def summary(self) -> str:
        """One line: "12 of 12 attention sites rewritten in 1 graph"."""
        graphs = len(self.graphs)
        text = f"{len(self.rewritten)} of {len(self.sites)} attention sites rewritten in {graphs} graph" + "s" * (
            graphs != 1
        )
        text += f"; {len(self.recognized)} in the best form already" if self.recognized else ""
        uncaptured = sum(not graph.captured for graph in self.graphs)
        return text + (f"; {uncaptured} not captured" if uncaptured else "")

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-ready data."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)
