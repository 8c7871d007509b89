"""The report as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attnrewrite.ir.source import SourceLocation

__all__ = ["GraphReport", "KernelVerdict", "SiteReport"]


@dataclass(frozen=True)
class KernelVerdict:
    """One kernel's verdict on one site: willing, or the reason why not."""

    kernel: str
    willing: bool
    reason: str = ""


@dataclass
class SiteReport:
    """One attention, or one near miss.

    ``status``: "rewritten"; "recognized" for an attention that is already in its best form; "kept" if it was left
    unchanged for another reason. ``reason`` says why it was not rewritten, and ``blamed`` names the operation that is
    in the way, with its source line.

    Shapes are tuples of strings, since a size may be symbolic ("s37"); they read (batch..., heads, length, features).
    ``requested``: the kernels that were requested for the site, and by what; empty for the automatic choice.
    ``slices``: whether the site was merged from slices of one attention, or why slices were not merged.
    ``projections``: which projections around the attention were joined (parts of the batch) or fused (one input); with
    ``fuse_projections`` also why others were not.
    ``tolerance``: the largest relative error that a lower-precision kernel was admitted with; 0 for any other kernel.
    ``order``: the order of linear attention's products: "linear" (key and value first), "quadratic" (query and key
    first), or "linear, was quadratic". ``operations``: the floating-point operations of either order.
    ``cached``: with a cache, the kind as which the attention is reused across steps and why, or "no: " and why not.
    ``nodes_before`` and ``nodes_after`` are the names of graph nodes: the left-hand sides of the lines in
    ``GraphReport.before_code`` and ``GraphReport.after_code`` that belong to this site.
    """

    name: str
    pattern: str
    status: Literal["rewritten", "recognized", "kept"]
    location: SourceLocation | None = None
    kernel: str | None = None
    reason: str = ""
    blamed: str = ""
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
    """One graph that Dynamo passed to the backend.

    ``captured`` is False when the graph went to the inner compiler untouched; ``reason`` then says why.
    ``before_code`` and ``after_code`` are Python source of the graph's module. ``seconds`` maps the name of each step,
    in the order in which the steps ran, to the time that it took: "capture", those of
    :func:`attnrewrite.passes.pipeline.rewrite`, "inner", and others that depend on options. ``unmatched_rules``: the
    globs of ``options["kernel_rules"]`` that match no site of this graph; they may match sites of another graph.
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
    def recognized(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "recognized"]

    @property
    def kept(self) -> list[SiteReport]:
        return [site for site in self.sites if site.status == "kept"]
