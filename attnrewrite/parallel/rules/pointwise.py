"""Operators whose operands are broadcast to the result: a shard of it needs the same shard of each."""

from __future__ import annotations

from torch import fx

from attnrewrite.parallel.placement import Placement, Shard
from attnrewrite.parallel.rules.rule import (
    Emitter,
    Rule,
    broadcast_to,
    holds_tensors,
    replayed,
    tensor_of,
)

__all__ = ["Pointwise"]


class Pointwise(Rule):
    """Operands are broadcast to the result."""

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        dims = tensor_of(node).dim()
        for operand in filter(holds_tensors, node.all_input_nodes):
            placement = part.native(operand)
            if placement is not None:
                return placement.at(placement.dim + dims - tensor_of(operand).dim())
        return None

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return True

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        return replayed(node, part, lambda operand: broadcast_to(operand, tensor_of(node).dim(), placement))
