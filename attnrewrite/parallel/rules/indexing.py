"""Lookups: what is looked up in is whole, and the result is sharded as the indices are."""

from __future__ import annotations

import torch
from torch import fx

from attnrewrite.ir.nodes import tensor
from attnrewrite.parallel.placement import Placement, Shard
from attnrewrite.parallel.rules.rule import (
    Emitter,
    Rule,
    broadcast_to,
    operand_of,
    replayed,
)

__all__ = ["Embedding", "Index"]


class Embedding(Rule):
    """``embedding``: the table is whole."""

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        return part.native(node.args[1])  # type: ignore[arg-type]

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return placement.dim < tensor(node).dim() - 1

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        indices = node.args[1]
        return replayed(node, part, lambda operand: placement if operand is indices else None)


class Index(Rule):
    """``x[i, j]`` with tensors of positions: what is indexed is whole along those dimensions."""

    def _indices(self, node: fx.Node) -> list[fx.Node | None]:
        return list(node.args[1])  # type: ignore[arg-type]

    def _first(self, node: fx.Node) -> tuple[int, int] | None:
        """The first of the result's dimensions that come from indices, and their number; None if it is not known."""
        indexed = [at for at, index in enumerate(self._indices(node)) if index is not None]
        together = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
        dims = max(tensor(self._indices(node)[at]).dim() for at in indexed)
        return (indexed[0], dims) if together else None

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        if part.native(operand_of(node)) is not None:
            raise part.refuse(node, "indexes the sequence, of which each rank has a part")
        found = self._first(node)
        for index in filter(None, self._indices(node)):
            placement = part.native(index)
            if placement is not None and found is not None:
                return placement.at(placement.dim + found[0] + found[1] - tensor(index).dim())
        return None

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        found = self._first(node)
        integers = all(tensor(index).dtype is not torch.bool for index in filter(None, self._indices(node)))
        return integers and found is not None and found[0] <= placement.dim < found[0] + found[1]

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        if placement is None:
            return replayed(node, part, lambda operand: None)
        found = self._first(node)
        assert found is not None
        inner = placement.at(placement.dim - found[0])
        indices = [
            index if index is None else part.at(index, broadcast_to(index, found[1], inner))
            for index in self._indices(node)
        ]
        return part.call(node, node.target, part.at(operand_of(node), None), indices)
