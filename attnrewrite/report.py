"""What the rewriting did and why: plain data first, every rendering made from it.

The data model is filled by :mod:`attnrewrite.rewrite` and :mod:`attnrewrite.backend` and read by the renderings
(:mod:`attnrewrite.render`), by the dump (:mod:`attnrewrite.dump`) and by users. Nothing in this file renders.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["GraphReport", "KernelVerdict", "RewriteReport", "SiteReport", "SourceLocation"]


@dataclass(frozen=True)
class SourceLocation:
    """Where a node comes from in the user's source.

    ``module`` is the dotted path of the ``nn.Module`` that ran it ("encoder.layer.0.attention"), empty for a function.
    """

    file: str
    line: int
    function: str
    code: str
    module: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class KernelVerdict:
    """One kernel's answer for one site: willing, or the reason why not."""

    kernel: str
    willing: bool
    reason: str = ""


@dataclass
class SiteReport:
    """One attention, or one near miss.

    ``status``: "rewritten"; "recognised" for an attention that is in its best form already; "kept" for what was left as
    it was for another reason. ``reason`` says why it was not rewritten.

    Shapes are tuples of strings, since a size may be symbolic ("s37"); they read (batch..., heads, length, features).
    ``requested``: the kernels that were asked for here, and where; empty for the automatic choice.
    ``slices``: that the site was merged from slices of one attention, or why slices were not merged.
    ``projections``: which projections around the attention are one, of parts of the batch or of one input; and with
    ``fuse_projections`` why others of one input are not.
    ``tolerance``: the largest relative error that a lower-precision kernel was admitted with; 0 for any other kernel.
    ``order``: of linear attention, in which its products are multiplied: "linear" (key and value first), "quadratic"
    (query and key first), or "linear, was quadratic". ``operations``: the floating-point operations of either order.
    ``cached``: with a cache, as which kind the attention is reused across steps and why, or "no: " and why not.
    ``nodes_before`` and ``nodes_after`` are the names of graph nodes: the left-hand sides of the lines in
    ``GraphReport.before_code`` and ``GraphReport.after_code`` that belong to this site.
    """

    name: str
    pattern: str
    status: Literal["rewritten", "recognised", "kept"]
    location: SourceLocation | None = None
    kernel: str | None = None
    reason: str = ""
    query_shape: tuple[str, ...] = ()
    key_shape: tuple[str, ...] = ()
    value_shape: tuple[str, ...] = ()
    dtype: str = ""
    device: str = ""
    scale: str = ""
    mask: str = "none"
    score_mods: tuple[str, ...] = ()
    dropout: str = ""
    grouping: str = ""
    proof: tuple[str, ...] = ()
    verdicts: tuple[KernelVerdict, ...] = ()
    requested: str = ""
    tolerance: float = 0.0
    slices: str = ""
    order: str = ""
    operations: dict[str, str] = field(default_factory=dict)
    projections: str = ""
    cached: str = ""
    nodes_before: tuple[str, ...] = ()
    nodes_after: tuple[str, ...] = ()


@dataclass
class GraphReport:
    """One graph that Dynamo handed over.

    ``captured`` is False when the graph went to the inner compiler untouched; ``reason`` then says why.
    ``before_code`` and ``after_code`` are Python source of the graph's module. ``seconds`` maps the name of a step
    ("capture", "find", "choose", "splice", "inner") to the time that it took. ``unmatched_rules``: the globs of
    ``options["kernel_rules"]`` that match no site of this graph; those of another graph may.
    """

    name: str
    captured: bool = True
    reason: str = ""
    sites: list[SiteReport] = field(default_factory=list)
    before_code: str = ""
    after_code: str = ""
    node_count: int = 0
    inner_backend: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unmatched_rules: tuple[str, ...] = ()

    @property
    def rewritten(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "rewritten"]

    @property
    def recognised(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "recognised"]

    @property
    def kept(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "kept"]


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
        from attnrewrite.render import report_to_text

        return report_to_text(self, width=width)

    def to_html(self) -> str:
        """One self-contained HTML page: the table, and the code of each graph before and after, side by side."""
        from attnrewrite.render import report_to_html

        return report_to_html(self)

    def save_html(self, path: str | Path) -> Path:
        """Writes :meth:`to_html` to ``path`` and returns it."""
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path

    def __str__(self) -> str:
        return self.to_text()
