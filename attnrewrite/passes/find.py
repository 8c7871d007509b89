"""Every attention and near miss of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.patterns import Finding, GraphView, NearMiss
from attnrewrite.patterns.registry import catalogue

__all__ = ["find"]


def find(view: GraphView) -> list[Finding]:
    """What the patterns find, in graph order; of what several find, the first pattern's reading counts."""
    findings = [finding for pattern in catalogue() for finding in pattern.find(view)]
    order = {node: position for position, node in enumerate(view.graph.nodes)}
    claimed: dict[fx.Node, str] = {}
    found: list[Finding] = []
    # Scores, or weights and values, may be a product of three as well: what has a softmax is read first.
    for finding in sorted(findings, key=lambda each: (isinstance(each, LinearAttention), order[each.anchor])):
        nodes = set(_nodes_of(finding))
        # Sites of one pattern may share their scores; what another pattern has read is taken.
        if all(claimed.get(node, finding.pattern) == finding.pattern for node in nodes):
            claimed.update(dict.fromkeys(nodes, finding.pattern))
            found.append(finding)
    found.sort(key=lambda each: order[each.anchor])
    return found


def _nodes_of(finding: Finding) -> Sequence[fx.Node]:
    nodes: Sequence[fx.Node] = finding.nodes if isinstance(finding, NearMiss) else finding.interior
    return nodes
