"""What became of a graph."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import fx

from attnrewrite.analysis.kinds import SiteKind
from attnrewrite.report.rows import SiteReport

__all__ = ["Rewritten"]


@dataclass
class Rewritten:
    """What became of a graph: a row for each site, in graph order, and the seconds that each step took.

    ``results``: of each attention, rewritten or not, its row, its kind with the reason for it where kinds were asked
    for, and the node that holds its result now. ``begins_with_batch``: if asked for, see
    :func:`attnrewrite.analysis.kinds.begins_with_batch`.
    ``round_like_eager``: a site was kept because the rounding of its scores decides its result. ``offered``: kernels
    were asked, so that what comes out depends on the kernels that the user asks for. ``joined``: projections were
    joined or fused.
    """

    sites: list[SiteReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    round_like_eager: bool = False
    offered: bool = False
    joined: bool = False
    results: list[tuple[SiteReport, SiteKind | None, fx.Node]] = field(default_factory=list)
    begins_with_batch: frozenset[fx.Node] = frozenset()

    @property
    def changed(self) -> bool:
        return self.joined or any(site.status == "rewritten" for site in self.sites)

    def add_time(self, step: str, start: float) -> None:
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
