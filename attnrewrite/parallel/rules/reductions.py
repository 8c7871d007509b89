"""Sums, means, maxima and the like: the operand is whole along what is reduced."""

from __future__ import annotations

from typing import Any

from torch import fx

from attnrewrite.parallel.placement import Placement, Shard
from attnrewrite.parallel.rules.rule import (
    Emitter,
    Rule,
    argument,
    operand_of,
    replayed,
    tensor_of,
)
from attnrewrite.torch_private import schema_of

__all__ = ["Reduction"]


class Reduction(Rule):
    """Dimensions are reduced, along which the operand has to be whole."""

    def _reduced(self, node: fx.Node) -> tuple[list[int], bool]:
        dims = tensor_of(operand_of(node)).dim()
        asked, keeps = _named(node, "dim"), bool(_named(node, "keepdim"))
        if asked is None or asked == []:
            return list(range(dims)), keeps
        given = asked if isinstance(asked, (list, tuple)) else [asked]
        return [int(dim) % dims for dim in given], keeps

    def _sources(self, node: fx.Node) -> list[int | None]:
        reduced, keeps = self._reduced(node)
        dims = range(tensor_of(operand_of(node)).dim())
        return [None if dim in reduced else dim for dim in dims if keeps or dim not in reduced]

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        placement = part.native(operand_of(node))
        if placement is None:
            return None
        if placement.dim in self._reduced(node)[0]:
            raise part.refuse(
                node,
                "is taken over the sequence, of which each rank has a part (compute it outside of the compiled model, "
                "from all ranks' parts)",
            )
        return placement.at(self._sources(node).index(placement.dim))

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return self._sources(node)[placement.dim] is not None

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        source = None if placement is None else self._sources(node)[placement.dim]
        return replayed(
            node, part, lambda operand: None if placement is None or source is None else placement.at(source)
        )


def _named(node: fx.Node, name: str) -> Any:
    """The argument of that name; None if it is left out, or if the operator has none."""
    schema = schema_of(node.target)
    assert schema is not None
    places = {each.name: place for place, each in enumerate(schema.arguments)}
    return argument(node, places[name], name) if name in places else None
