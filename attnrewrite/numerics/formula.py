"""A part of a graph as a formula: evaluated in float64, whatever dtype the graph computes it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.torch_private import tree_map_only

__all__ = ["formula_between", "in_float64"]


def formula_between(inputs: Sequence[fx.Node], result: fx.Node) -> list[fx.Node]:
    """The nodes from the inputs to ``result``, in graph order; what these read beside the inputs is among them."""
    ends = set(inputs)
    found: set[fx.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node not in found and node not in ends:
            found.add(node)
            pending += node.all_input_nodes
    return [node for node in result.graph.nodes if node in found]


def in_float64(
    nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any], call: Callable[[fx.Node, Any, Any], Any]
) -> Any:
    """The last node's value. Numbers stay those of the graph: -65504, where that was the lowest of its dtype.

    Args:
        nodes: as :func:`formula_between` gives them.
        values: those of all other nodes that they read, and of nodes that are no calls.
        call: makes the call of a node with these arguments and keyword arguments.
    """
    wide: dict[fx.Node, Any] = {}

    def read(node: fx.Node) -> Any:
        if node not in wide:
            wide[node] = tree_map_only(Tensor, _widened, values[node])
        return wide[node]

    for node in nodes:
        if node.op == "call_function":
            args, kwargs = tree_map_only(torch.dtype, _dtype_widened, (node.args, node.kwargs))
            args, kwargs = fx.node.map_arg((args, kwargs), read)
            wide[node] = tree_map_only(Tensor, _widened, call(node, args, kwargs))
    return read(nodes[-1])


def _widened(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _dtype_widened(value: torch.dtype) -> torch.dtype:
    return torch.float64 if value.is_floating_point else value
