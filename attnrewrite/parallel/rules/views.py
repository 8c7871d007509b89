"""Views, slices and copies: where the sequence's entries are in what has other sizes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from attnrewrite.ir.nodes import tensor
from attnrewrite.parallel.lengths import expression
from attnrewrite.parallel.placement import Placement, Shard, placed_in
from attnrewrite.parallel.rules.rule import (
    Emitter,
    Rule,
    argument,
    dim_of,
    operand_of,
    replayed,
)

__all__ = ["Repeat", "Slice", "View"]

aten = torch.ops.aten


class View(Rule):
    """``view`` and the like: the sequence stays in one piece."""

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        placement = part.native(operand_of(node))
        if placement is None:
            return None
        found = self._placed(operand_of(node), node, placement, part)
        if found is None:
            raise part.refuse(node, "takes the sequence apart, of which each rank has a part")
        return found

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return self._placed(node, operand_of(node), placement, part) is not None

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        inner = None if placement is None else self._placed(node, operand_of(node), placement, part)
        source = part.at(operand_of(node), inner)
        # Strides of a shard may be others than those of the traced tensor.
        return part.call(node, aten.reshape.default, source, part.shape(node, placement))

    @staticmethod
    def _placed(source: fx.Node, result: fx.Node, placement: Shard, part: Emitter) -> Shard | None:
        of = part.lengths.whole_shape
        return placed_in(placement, of(tensor(source).shape), of(tensor(result).shape), part.lengths)


class Slice(Rule):
    """``slice`` along other dimensions, or of everything."""

    def _is_all(self, node: fx.Node) -> bool:
        dim = dim_of(node, 1)
        step = argument(node, 4, "step", 1)
        same = expression(tensor(node).shape[dim]) == expression(tensor(operand_of(node)).shape[dim])
        return bool(step == 1 and same)

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        placement = part.native(operand_of(node))
        if placement is not None and placement.dim == dim_of(node, 1) and not self._is_all(node):
            raise part.refuse(
                node,
                "takes a part of the sequence, of which each rank has one already (shift labels, and cut sequences, "
                "before the inputs are sharded)",
            )
        return placement

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return placement.dim != dim_of(node, 1) or self._is_all(node)

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        source = operand_of(node)
        if self._is_all(node):
            return part.at(source, placement)
        return replayed(node, part, lambda operand: placement)


class Repeat(Rule):
    """``repeat_interleave``, as of keys for heads that share them: copies stay beside what they are copies of."""

    def _times(self, node: fx.Node, placement: Shard) -> int:
        times = node.args[1]
        return times if placement.dim == dim_of(node, 2) and isinstance(times, int) else 1

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        placement = part.native(operand_of(node))
        return None if placement is None else replace(placement, inner=placement.inner * self._times(node, placement))

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return bool((placement.inner / self._times(node, placement)).is_integer)

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        if placement is not None:
            placement = replace(placement, inner=placement.inner / self._times(node, placement))
        return replayed(node, part, lambda operand: placement)
