"""Nodes that were removed from a graph and may have to be written again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["SavedNode"]


@dataclass(frozen=True)
class SavedNode:
    """A node as it was before it was removed; ``node`` is the removed one."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]

    @staticmethod
    def of(node: fx.Node) -> SavedNode:
        return SavedNode(node, node.target, node.args, dict(node.kwargs), node.meta)

    @property
    def reads(self) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.node.map_arg((self.args, self.kwargs), found.append)
        return found

    def write(self, graph: fx.Graph, before: fx.Node, current: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Writes the call again; ``current`` gives what stands for an argument now."""
        args, kwargs = fx.node.map_arg((self.args, self.kwargs), current)
        with graph.inserting_before(before):
            node = graph.call_function(self.target, args, kwargs)
        node.meta = self.meta
        return node
