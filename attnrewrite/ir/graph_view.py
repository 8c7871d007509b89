"""The read-only view of a graph that patterns get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import Operand
from attnrewrite.ir.nodes import AutocastState, is_tensor, regions, tensor
from attnrewrite.ir.ops import is_cast, is_view
from attnrewrite.ir.source import ENDS_AT, source_location
from attnrewrite.ir.views import peel
from attnrewrite.torch_private import operator_name

__all__ = ["GraphView", "is_copy_of_input"]


class GraphView:
    """A graph as patterns read it: its methods never change the graph, and see nodes that passes insert later."""

    def __init__(self, gm: fx.GraphModule, *, has_gradients: bool = False) -> None:
        """Args:
        has_gradients: a backward pass may follow although no input of this graph says so, as in a region of another.
        """
        self.gm = gm
        self.graph = gm.graph
        self.ends_at = str(gm.meta.get(ENDS_AT, ""))
        """The graph break that ends the graph; empty if none does."""
        self._regions = regions(gm.graph)
        self.leads_to_product: dict[fx.Node, bool] = {}
        inputs = [node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")]
        # A tensor subclass has no value in the IR, and may be what gradients are wanted of.
        self.has_gradients = has_gradients or any(
            isinstance(value, torch.Tensor) and value.requires_grad
            for node in inputs
            for value in (node.meta.get("val"), node.meta.get("example_value"))
        )

    def _region(self, node: fx.Node) -> tuple[bool, AutocastState]:
        """The grad mode and autocast at ``node``, as :func:`~attnrewrite.ir.nodes.regions` has them.

        A node that was inserted later switches nothing, so it lies in the region of the node before it.
        """
        known = node
        while known not in self._regions:
            known = known.prev
        return self._regions[known]

    def ordered(self, nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """The nodes in graph order, without duplicates."""
        return tuple(sorted(set(nodes)))

    def same_region(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether both nodes run under the same grad mode and autocast."""
        return self._region(a) == self._region(b)

    def grad_region(self, node: fx.Node) -> bool:
        return self._region(node)[0]

    def in_autocast(self, node: fx.Node) -> bool:
        """Whether autocast is on at ``node``, for tensors of its device."""
        kinds = {kind for kind, _ in self._region(node)[1]}
        return tensor(node).device.type in kinds if is_tensor(node) else bool(kinds)

    @property
    def trains(self) -> bool:
        """Whether a backward pass may follow, as far as the inputs and the mode outside of the graph say."""
        return self.has_gradients and torch.is_grad_enabled()

    def differentiable(self, node: fx.Node) -> bool:
        """Whether a backward pass may go through ``node``."""
        return self.has_gradients and self.grad_region(node)

    def origin(
        self,
        operand: Operand,
        consumer: fx.Node,
        narrow_to: torch.dtype | None = None,
        behind_widening: bool = False,
    ) -> Operand:
        """The operand behind its views, copies and repetitions.

        Args:
            operand: the operand, with its layout in ``consumer``.
            consumer: the node that reads it; the walk does not leave its grad-mode region.
            narrow_to: if given, the walk goes behind casts from this dtype to wider ones as well.
            behind_widening: the walk goes behind casts from any dtype to wider ones.
        """
        region = self.grad_region(consumer)

        saved = self.differentiable(consumer)

        def may_enter(node: fx.Node) -> bool:
            return self.grad_region(node) == region and not (saved and is_copy_of_input(node))

        while True:
            operand = peel(operand, may_enter)[-1]
            node = operand.node
            if not (is_cast(node) and may_enter(node)):
                return operand
            if not _widens(node, tensor(node.args[0]).dtype if behind_widening else narrow_to):
                return operand
            operand = Operand(node.all_input_nodes[0], operand.layout)

    def other_readers(self, interior: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """For each node of ``interior`` but the last that nodes outside read: these readers."""
        own = set(interior)
        readers = {node: [user for user in node.users if user not in own] for node in interior[:-1]}
        return {node: users for node, users in readers.items() if users}


def reader_in_words(node: fx.Node) -> str:
    """A node that reads a value, in the words of the report: its operator's name and source line."""
    if node.op == "output":
        return "returned from the graph"
    where = source_location(node)
    name = operator_name(node.target)
    return f"{name} at {where}" if where else name


def is_copy_of_input(node: fx.Node) -> bool:
    """Whether the source asks for a copy of what the caller owns, and may update before the backward pass."""
    if node.target is not torch.ops.aten.clone.default or node.kwargs.get("memory_format") is torch.contiguous_format:
        return False
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and (is_view(source) or source.target is torch.ops.aten.detach.default):
        source = source.args[0]
    return isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr")


def _widens(cast: fx.Node, dtype: torch.dtype | None) -> bool:
    """Whether the cast goes from ``dtype`` to a dtype that holds all of its numbers."""
    source = tensor(cast.args[0]).dtype
    return (
        source is dtype
        and source is not tensor(cast).dtype
        and torch.promote_types(source, tensor(cast).dtype) is tensor(cast).dtype
    )
