"""Every attention and near miss of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.patterns import Finding, GraphView, NearMiss
from attnrewrite.patterns.registry import catalogue

__all__ = ["find"]


def find(view: GraphView) -> list[Finding]:
    """The findings of all patterns, in graph order; of findings that share nodes, the first pattern's counts."""
    findings = [finding for pattern in catalogue() for finding in pattern.find(view)]
    order = {node: position for position, node in enumerate(view.graph.nodes)}
    claimed: dict[fx.Node, str] = {}
    found: list[Finding] = []
    # A softmax attention contains products that linear attention would match, so it comes first.
    for finding in sorted(findings, key=lambda each: (isinstance(each, LinearAttention), order[each.anchor])):
        nodes = set(_nodes_of(finding))
        # Sites of one pattern may share their scores; nodes that another pattern has claimed are taken.
        if all(claimed.get(node, finding.pattern) == finding.pattern for node in nodes):
            claimed.update(dict.fromkeys(nodes, finding.pattern))
            found.append(finding)
    found.sort(key=lambda each: order[each.anchor])
    return found


def _nodes_of(finding: Finding) -> Sequence[fx.Node]:
    nodes: Sequence[fx.Node] = finding.nodes if isinstance(finding, NearMiss) else finding.interior
    return nodes
