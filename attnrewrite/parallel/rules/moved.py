"""Operators of whose result each dimension is one of the operand's: moved, split, joined, or normalized along."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from attnrewrite.ir.nodes import tensor
from attnrewrite.parallel.lengths import expression
from attnrewrite.parallel.placement import Placement, Shard
from attnrewrite.parallel.rules.rule import (
    Emitter,
    Rule,
    argument,
    dim_of,
    operand_of,
    operands_of,
    replayed,
    tensor_of,
)

__all__ = [
    "Moved",
    "along",
    "dims_at",
    "expanded",
    "normalized",
    "permuted",
    "repeated",
    "same",
    "squeezed",
    "stacked",
    "transposed",
    "unsqueezed",
    "without",
]


class Moved(Rule):
    """Dimensions of the first operand are those of the result, some of them moved, some touched.

    Args:
        sources: for each dimension of the result, the operand's that it is; None for a new one.
        touched: dimensions of the operand along which entries are combined, chosen or moved.
        whole: further operands are whole, such as weights.
    """

    def __init__(
        self,
        sources: Callable[[fx.Node], Sequence[int | None]],
        touched: Callable[[fx.Node], Sequence[int]] = lambda node: (),
        *,
        size_at: int | None = None,
        exchanged: bool = False,
    ) -> None:
        self._sources, self._touched = sources, touched
        self._size_at, self._exchanged = size_at, exchanged

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        placement = next(filter(None, map(part.native, operands_of(node))), None)
        if placement is None:
            return None
        if placement.dim in self._touched(node):
            if self._exchanged:
                return None
            raise part.refuse(
                node,
                "goes along the sequence, of which each rank has a part (do it before the inputs are sharded, or "
                "outside of the compiled model)",
            )
        return placement.at(list(self._sources(node)).index(placement.dim))

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        source = self._sources(node)[placement.dim]
        return source is None or source not in self._touched(node)

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        source = None if placement is None else self._sources(node)[placement.dim]
        first = operands_of(node)
        if placement is not None and source is not None:
            of_one = expression(tensor_of(first[0]).shape[source]) == 1
            inner: Placement = None if of_one else placement.at(source)
        else:
            inner = None
        sizes = {} if self._size_at is None else {self._size_at: part.shape(node, placement)}
        return replayed(
            node, part, lambda operand: inner if operand in first else None, sizes, exchanged=self._exchanged
        )


def same(node: fx.Node) -> list[int | None]:
    return list(range(tensor_of(node).dim()))


def transposed(node: fx.Node) -> list[int | None]:
    order = same(node)
    one, other = dim_of(node, 1), dim_of(node, 2)
    order[one], order[other] = order[other], order[one]
    return order


def permuted(node: fx.Node) -> list[int | None]:
    dims = tensor_of(node).dim()
    return [int(dim) % dims for dim in node.args[1]]  # type: ignore[union-attr,arg-type]


def unsqueezed(node: fx.Node) -> list[int | None]:
    order: list[int | None] = list(range(tensor_of(operand_of(node)).dim()))
    order.insert(dim_of(node, 1, of_result=True), None)
    return order


def squeezed(node: fx.Node) -> list[int | None]:
    source = tensor_of(operand_of(node))
    asked = argument(node, 1, "dim", list(range(source.dim())))
    dims = {int(dim) % source.dim() for dim in (asked if isinstance(asked, (list, tuple)) else [asked])}
    return [dim for dim in range(source.dim()) if dim not in dims or expression(source.shape[dim]) != 1]


def without(node: fx.Node) -> list[int | None]:
    """``select`` and ``unbind``."""
    place = 1
    dropped = dim_of(node, place)
    return [dim for dim in range(tensor_of(operand_of(node)).dim()) if dim != dropped]


def expanded(node: fx.Node) -> list[int | None]:
    added = tensor_of(node).dim() - tensor_of(operand_of(node)).dim()
    return [None] * added + list(range(tensor_of(operand_of(node)).dim()))


def stacked(node: fx.Node) -> list[int | None]:
    order: list[int | None] = list(range(tensor_of(operand_of(node)).dim()))
    order.insert(dim_of(node, 1, of_result=True), None)
    return order


def normalized(node: fx.Node) -> list[int]:
    dims = tensor(node).dim()
    return list(range(dims - len(node.args[1]), dims))  # type: ignore[arg-type]


def repeated(node: fx.Node) -> list[int]:
    times = node.args[1]
    added = len(times) - tensor_of(operand_of(node)).dim()  # type: ignore[arg-type]
    return [at for at, count in enumerate(times[added:]) if count != 1]  # type: ignore[index,arg-type]


def along(place: int, default: int = 0) -> Callable[[fx.Node], list[int]]:
    """One dimension, by its place among the arguments."""
    return lambda node: [dim_of(node, place, default)]


def dims_at(place: int) -> Callable[[fx.Node], list[int]]:
    """Several dimensions; all if there are none."""

    def dims(node: fx.Node) -> list[int]:
        given = argument(node, place, "dims", [])
        return [int(dim) % tensor(node).dim() for dim in given] or list(range(tensor(node).dim()))

    return dims
