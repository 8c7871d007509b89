"""Tensors that are made in the graph, and what depends on a position's number: the shard begins where the rank does."""

from __future__ import annotations

import torch
from torch import fx

from attnrewrite.ir.nodes import tensor
from attnrewrite.ir.ops import FILLED_OPS
from attnrewrite.parallel.placement import Placement, Shard
from attnrewrite.parallel.rules.pointwise import Pointwise
from attnrewrite.parallel.rules.rule import (
    Emitter,
    Rule,
    argument,
    operand_of,
    replayed,
)

__all__ = ["Arange", "Creation", "ShiftedTriangle"]

aten = torch.ops.aten


class Creation(Rule):
    """A tensor of a given shape, the same number everywhere, or not written to yet."""

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return True

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        return Pointwise().propose(node, part) if is_like(node) else None

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        if is_like(node):
            return replayed(node, part, lambda operand: placement)
        place = 0 if node.target in FILLED_OPS or node.target is aten.empty.memory_format else 1
        return replayed(node, part, part.native, {place: part.shape(node, placement)})


def is_like(node: fx.Node) -> bool:
    return node.target in (
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
    )


class Arange(Rule):
    """Positions: those of the rank's shard begin where it does."""

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        """Of fractions, the sum of a start and many steps is rounded."""
        numbers = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
        return placement.is_plain and all(isinstance(number, (int, torch.SymInt)) for number in numbers)

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        if placement is None:
            return replayed(node, part, lambda operand: None)
        start, step = 0, 1
        if node.target is not aten.arange.default:
            start = part.number(node.args[0])
            step = part.number(node.args[2]) if len(node.args) > 2 else 1
        options = {**node.kwargs, "dtype": tensor(node).dtype}
        start, step = (value.meta["val"] if isinstance(value, fx.Node) else value for value in (start, step))
        ranges = [
            part.call(
                node, aten.arange.start_step, start + first * step, start + (first + length) * step, step, **options
            )
            if step != 1
            else part.call(node, aten.arange.start, start + first, start + first + length, **options)
            for first, length in part.starts(placement)
        ]
        return ranges[0] if len(ranges) == 1 else part.call(node, aten.cat.default, ranges)


class ShiftedTriangle(Rule):
    """``tril`` and ``triu``: the diagonal of a shard of the rows lies as many columns further as rows are before it."""

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        first = tensor(node).dim() - 2
        return placement.dim < first or (placement.is_plain and len(part.starts(placement)) == 1)

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        source = part.at(operand_of(node), placement)
        diagonal = part.number(argument(node, 1, "diagonal", 0))
        diagonal = diagonal.meta["val"] if isinstance(diagonal, fx.Node) else diagonal
        at = None if placement is None else placement.dim - tensor(node).dim()
        if placement is not None and at in (-1, -2):
            ((start, _),) = part.starts(placement)
            diagonal = diagonal + start if at == -2 else diagonal - start
        return part.call(node, node.target, source, diagonal)
