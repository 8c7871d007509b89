"""A rule: where an operator's result is sharded, and which shards of its operands a shard of the result needs.

Also what rules have in common: the call again of other operands, broadcasting, and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from attnrewrite.ir.nodes import Size
from attnrewrite.parallel.lengths import Lengths, expression
from attnrewrite.parallel.placement import Placement, Shard

__all__ = [
    "Emitter",
    "Rule",
    "argument",
    "broadcast_to",
    "dim_of",
    "holds_tensors",
    "operand_of",
    "operands_of",
    "replayed",
    "tensor_of",
]


class Emitter(Protocol):
    """What a rule writes with; see :class:`attnrewrite.parallel.partition.Partition`."""

    @property
    def lengths(self) -> Lengths: ...

    def native(self, node: fx.Node) -> Placement:
        """Where the node is sharded if nobody asks for something else."""

    def at(self, node: fx.Node, placement: Placement, *, exchanged: bool = False) -> fx.Node:
        """The node at a placement. With ``exchanged``, activations may be gathered."""

    def call(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in the place of ``node``."""

    def number(self, value: Any) -> Any:
        """A number, or a node that is one, at the length of the whole."""

    def shape(self, node: fx.Node, placement: Placement) -> list[Size]:
        """The sizes that a node's tensor has at a placement."""

    def starts(self, shard: Shard) -> list[tuple[Size, Size]]:
        """The ranges (first position, length) of the whole sequence that the rank's shard consists of."""

    def refuse(self, node: fx.Node, reason: str) -> Exception:
        """The error that says what is in the way."""


class Rule:
    """One operator's; this one computes the whole of whole operands."""

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        """Where the result is sharded, given where its operands are."""
        return None

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        """Whether a shard of the result can be computed by itself."""
        return False

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        """The node at a placement that the rule takes, or at None."""
        return replayed(node, part, lambda operand: None)


def replayed(
    node: fx.Node,
    part: Emitter,
    where: Callable[[fx.Node], Placement],
    sizes: Mapping[int, Sequence[Size]] | None = None,
    *,
    exchanged: bool = False,
) -> fx.Node:
    """The same call of operands at their placements, with numbers at the length of the whole.

    Args:
        sizes: arguments, by their places, that are replaced.
    """

    def mapped(value: Any) -> Any:
        if isinstance(value, fx.Node):
            value = part.at(value, where(value), exchanged=exchanged) if holds_tensors(value) else part.number(value)
        return value

    args = list(fx.node.map_aggregate(node.args, mapped))
    kwargs = fx.node.map_aggregate(node.kwargs, mapped)
    for place, value in (sizes or {}).items():
        args[place] = list(value)
    return part.call(node, node.target, *args, **kwargs)


def holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(each, torch.Tensor) for each in value)
    )


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The node's tensor, or the first of its tensors."""
    value = node.meta["val"]
    return value if isinstance(value, torch.Tensor) else value[0]


def broadcast_to(operand: fx.Node, dims: int, placement: Placement) -> Placement:
    """The placement of an operand that is broadcast to ``dims`` dimensions and that placement."""
    if placement is None:
        return None
    dim = placement.dim - dims + tensor_of(operand).dim()
    is_one = dim < 0 or expression(tensor_of(operand).shape[dim]) == 1
    return None if is_one else placement.at(dim)


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The first argument, or those in it if it is a list."""
    first = node.args[0]
    return list(first) if isinstance(first, (list, tuple)) else [first]  # type: ignore[arg-type,list-item]


def operand_of(node: fx.Node) -> fx.Node:
    return operands_of(node)[0]


def dim_of(node: fx.Node, place: int, default: int = 0, of_result: bool = False) -> int:
    """The dimension among the arguments, counted from the front."""
    dim = argument(node, place, "dim", default)
    dims = tensor_of(node if of_result else operand_of(node)).dim()
    return int(dim) % max(dims, 1)


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
