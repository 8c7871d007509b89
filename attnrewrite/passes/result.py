"""The result of the passes over a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from attnrewrite.analysis.kinds import SiteKind
from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.site import AttentionSite
from attnrewrite.report.rows import SiteReport

__all__ = ["ReportedSite", "Rewritten"]


class ReportedSite(NamedTuple):
    """An attention and its row of the report."""

    site: AttentionSite | LinearAttention
    row: SiteReport


@dataclass
class Rewritten:
    """The result of the passes over a graph.

    Attributes:
        sites: a row for each site, in graph order.
        offered: whether any site was offered to kernels, so that the result depends on the requested kernels.
        projections_changed: whether projections were joined or fused.
        regions_changed: whether a graph within the graph was rewritten.
        regions_inlined: whether regions were put in the place of their calls.
        results: for each attention, rewritten or not: its row, its kind (None if kinds were not requested), and the
        node
            that now holds its result.
        begins_with_batch: see :func:`attnrewrite.analysis.kinds.begins_with_batch`; empty if not requested.
    """

    sites: list[SiteReport] = field(default_factory=list)
    offered: bool = False
    projections_changed: bool = False
    regions_changed: bool = False
    regions_inlined: bool = False
    results: list[tuple[SiteReport, SiteKind | None, fx.Node]] = field(default_factory=list)
    begins_with_batch: frozenset[fx.Node] = frozenset()

    @property
    def changed(self) -> bool:
        return (
            self.projections_changed or self.regions_changed or any(site.status == "rewritten" for site in self.sites)
        )
