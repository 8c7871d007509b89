"""What the ways to regroup products with attention weights share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.weights import every_softmax
from attnrewrite.ir.bounds import AROUND_SOFTMAX
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import Size, checkpoint_of, is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import COPY_OPS, MASKED_FILL_OPS, MUL_OPS, WHERE_OPS, is_cast, is_elementwise, is_view
from attnrewrite.ir.spans import Span, Taken, taken_from

__all__ = [
    "Found",
    "NotRegrouped",
    "Weights",
    "in_order",
    "piece_of",
    "require_one_dtype",
    "require_one_region",
    "softmaxes_of",
]

aten = torch.ops.aten


class NotRegrouped(Exception):
    """Raised with the reason why a sum of products with attention weights stays as it is."""


@dataclass(frozen=True)
class Found:
    """A sum in its new form.

    Attributes:
        new: the node that takes the place of the sum.
        products: the products in the new form.
    """

    new: fx.Node
    products: tuple[fx.Node, ...]


class Weights:
    """The attention weights of a graph, and what is made of them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.softmaxes = {softmax.node: softmax for softmax in every_softmax(graph) if softmax.late is None}
        self.nodes = set(self.softmaxes)

    def behind(self, node: Any) -> fx.Node | None:
        """The weights that ``node`` is made of by casts, views, slices, dropout, masks and factors; None if of none."""
        pending, seen = [node], {node}
        for each in pending:
            if not is_tensor(each) or each.op != "call_function":
                continue
            if each in self.nodes:
                return each  # type: ignore[no-any-return]
            for source in _sources(each):
                if source not in seen and AROUND_SOFTMAX.allows(len(seen)):
                    seen.add(source)
                    pending.append(source)
        return None


def _sources(node: fx.Node) -> Sequence[Any]:
    args: Any = node.args
    taken = taken_from(node)
    if taken is not None:
        return (taken.source,)
    if node.target in WHERE_OPS:
        return tuple(arg for arg in args[1:3] if is_tensor(arg))
    if node.target in MUL_OPS:
        return tuple(arg for arg in args[:2] if is_tensor(arg))
    passes = is_cast(node) or is_view(node) or node.target in COPY_OPS or node.target in MASKED_FILL_OPS
    return (args[0],) if passes or node.target in (aten.dropout.default, aten.nan_to_num.default) else ()


def softmaxes_of(scores: fx.Node, weights: Weights) -> set[fx.Node]:
    """The softmaxes that the scores go into by elementwise steps and views."""
    pending, seen, found = [scores], {scores}, set()
    for node in pending:
        for user in node.users:
            if user in weights.nodes:
                found.add(user)
            passes = user not in seen and (is_elementwise(user) or is_view(user) or is_cast(user))
            if passes and AROUND_SOFTMAX.allows(len(seen)):
                seen.add(user)
                pending.append(user)
    return found


def piece_of(node: Any) -> Taken | None:
    """The part of another tensor that the node is, past copies and the slices of everything in dynamic shapes."""
    taken = taken_from(_past_copies(node)) if is_tensor(node) else None
    return None if taken is None else replace(taken, source=_past_copies(taken.source))


def _past_copies(node: fx.Node) -> fx.Node:
    while node.target in _COPIES or _takes_everything(node):
        node = node.all_input_nodes[0]
    return node


_COPIES = COPY_OPS - {aten.detach.default}


def _takes_everything(node: fx.Node) -> bool:
    return node.target is aten.slice.Tensor and same_shape(tensor(node).shape, tensor(node.args[0]).shape)


def require_one_region(node: fx.Node, builder: Builder, view: GraphView) -> None:
    """Requires that what leads to ``node``, up to what the new form reads, is computed as the new form is.

    Raises:
        NotRegrouped: grad mode, autocast or a checkpoint changes on the way.
    """
    kept = {source for each in builder.created for source in each.all_input_nodes}
    kept |= {source for each in kept for source in each.all_input_nodes}
    pending, seen = [node], {node}
    for each in pending:
        alike = view.same_region(each, node) and checkpoint_of(each) == checkpoint_of(node)
        if not alike or view.in_autocast(each):
            raise NotRegrouped(
                "the products with parts of the attention weights are in an autocast region, or grad mode or a "
                "checkpoint changes between them"
            )
        for source in each.all_input_nodes:
            if source not in kept and source not in seen:
                seen.add(source)
                pending.append(source)


def require_one_dtype(nodes: Sequence[fx.Node]) -> None:
    """Raises:
    NotRegrouped: the nodes differ in dtype.
    """
    if len({tensor(node).dtype for node in nodes}) > 1:
        raise NotRegrouped("the products with parts of the attention weights differ in dtype")


def in_order(spans: Sequence[Span], size: Size) -> list[int] | None:
    """The order in which the spans cover ``size`` exactly once; None if they are not known to."""
    order: list[int] = []
    reached: Size = 0
    while len(order) < len(spans):
        rest = [index for index in range(len(spans)) if index not in order and same(spans[index].start, reached)]
        if not rest:
            return None
        order.append(rest[0])
        reached = spans[rest[0]].stop
    return order if same(reached, size) else None
