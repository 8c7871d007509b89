"""Sums of attention weights that are multiplied with one value: the same sums of attentions.

    (w1 - c * w2) @ v   =   w1 @ v - c * (w2 @ v)

``c`` is a number, or a tensor that is the same for all keys. Where the weights are slices of one softmax, the product
of the whole comes first, and its result is sliced instead. A term that is no attention weights, such as a matrix of
neighbors, is multiplied as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, is_tensor, same, same_shape, scalar, tensor
from attnrewrite.ir.ops import ADD_OPS, DIV_OPS, MATRIX_OPS, MUL_OPS, SUB_OPS
from attnrewrite.ir.products import Contraction, contraction_of
from attnrewrite.passes.regrouping import (
    Found,
    NotRegrouped,
    Weights,
    in_order,
    piece_of,
    require_one_dtype,
)

__all__ = ["sum_of_attentions"]

aten = torch.ops.aten


def sum_of_attentions(node: fx.Node, builder: Builder, weights: Weights, softmaxes: set[fx.Node]) -> Found | None:
    """``(w1 - c * w2) @ v`` as a sum of products; None for any other node.

    Args:
        node: the product.
        builder: writes before it.
        softmaxes: is given those that take part, for the reason.

    Raises:
        NotRegrouped: the product stays as it is.
    """
    product = contraction_of(node)
    if product is None:
        return None
    for place in (0, 1):
        total = _Sum(product.operands[place], weights)
        if total.leaves and len(total.leaves) + len(total.given) > 1:
            break
    else:
        return None
    softmaxes.update(total.leaves.values())
    leaves = [*total.leaves, *total.given]
    require_one_dtype([*leaves, *total.nodes, node])
    if tensor(node).dtype.itemsize < 4:
        raise NotRegrouped(
            "attention weights are added up in half precision, where the sum of their attentions would be rounded more "
            "than the source's"
        )
    is_matrix = node.target in MATRIX_OPS and place == 0 and tensor(node).dim() == tensor(total.node).dim()
    broadcast = not all(same_shape(tensor(leaf).shape, tensor(total.node).shape) for leaf in leaves)
    if (total.has_tensors or broadcast) and not is_matrix:
        raise NotRegrouped("attention weights are broadcast, or scaled by a tensor, and added up before an einsum")
    results = {leaf: _product(product, place, leaf, builder, broadcast) for leaf in total.given}
    if len(total.leaves) == 1 or not any(map(piece_of, total.leaves)):
        products = {leaf: _product(product, place, leaf, builder, broadcast) for leaf in total.leaves}
        new = total.rebuilt(total.node, results | products, builder)
        return Found(new, tuple(products.values()))
    if not is_matrix:
        raise NotRegrouped("slices of attention weights are added up before an einsum")
    whole, slices = _of_whole(product, [*total.leaves], builder)
    new = total.rebuilt(total.node, results | slices, builder)
    return Found(new, (whole,))


class _Sum:
    """A sum of attention weights with factors.

    Attributes:
        node: the node of the sum.
        leaves: the weights that are added up, each with its softmax.
        given: the other matrices that are added to them.
        nodes: the nodes that add and scale.
        has_tensors: whether a factor is a tensor of more than one entry.
    """

    def __init__(self, node: fx.Node, weights: Weights) -> None:
        self.node = node
        self.leaves: dict[fx.Node, fx.Node] = {}
        self.given: list[fx.Node] = []
        self.nodes: list[fx.Node] = []
        self.has_tensors = False
        self._weights = weights
        self._sums: dict[fx.Node, bool] = {}
        self._read(node)

    def _read(self, node: fx.Node) -> None:
        softmax = self._weights.behind(node)
        terms = self._terms(node)
        if terms is not None:
            self.nodes.append(node)
            for term in terms:
                self._read(term)
        elif softmax is not None:
            self.leaves[node] = softmax
        elif node not in self.given:
            self.given.append(node)

    def _terms(self, node: Any) -> list[fx.Node] | None:
        """What a node adds up, or scales; None if it does neither in a way that can be done to attentions."""
        if not is_tensor(node) or node.op != "call_function" or node in self._weights.nodes:
            return None
        args: Any = node.args
        if node.target is aten.neg.default:
            return [args[0]]
        if node.target in ADD_OPS | SUB_OPS and scalar(node.kwargs.get("alpha", 1)):
            both = len(args) == 2 and all(is_tensor(arg) and self._is_matrix(arg) for arg in args)
            return [*args] if both and any(map(self._is_sum, args)) else None
        if node.kwargs or node.target not in MUL_OPS | DIV_OPS:
            return None
        scaled, factor = args[:2]
        if node.target in MUL_OPS and not (is_tensor(scaled) and self._is_sum(scaled)):
            scaled, factor = factor, scaled
        if not is_tensor(scaled) or not self._is_sum(scaled) or not self._is_factor(factor):
            return None
        # Of one key weights are the same for all keys, too, and a product of weights is no sum of them.
        return None if is_tensor(factor) and self._is_sum(factor) else [scaled]

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether a node is attention weights, or a sum that has some."""
        if node not in self._sums:
            found = self._weights.behind(node) is not None or self._terms(node) is not None
            self._sums[node] = self._is_matrix(node) and found
        return self._sums[node]

    def _is_matrix(self, node: fx.Node) -> bool:
        """Whether a node has an entry for each key."""
        shape, whole = tensor(node).shape, tensor(self.node).shape
        return 2 <= len(shape) <= len(whole) and same(shape[-1], whole[-1])

    def _is_factor(self, factor: Any) -> bool:
        """Whether a factor is the same for all keys, which are the last dimension unless it is a single number."""
        if not is_tensor(factor):
            return scalar(factor) or isinstance(factor, fx.Node)
        if tensor(factor).dim() == 0:
            return True
        is_same = same(tensor(factor).shape[-1], 1)
        self.has_tensors = self.has_tensors or is_same
        return is_same

    def rebuilt(self, node: fx.Node, results: dict[fx.Node, fx.Node], builder: Builder) -> fx.Node:
        """The same sum of the results."""
        if node in results:
            return results[node]
        terms = set(self._terms(node) or ())
        args = [self.rebuilt(arg, results, builder) if arg in terms else arg for arg in node.args]  # type: ignore[arg-type]
        return builder.call(node.target, *args, **node.kwargs)


def _product(product: Contraction, place: int, weights: fx.Node, builder: Builder, broadcast: bool) -> fx.Node:
    value = product.operands[1 - place]
    pair = (weights, value) if place == 0 else (value, weights)
    target = aten.matmul.default if broadcast else product.node.target
    return builder.call(target, *product.arguments(*pair))


def _of_whole(product: Contraction, leaves: list[fx.Node], builder: Builder) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """The product of what the leaves are slices of, and for each leaf the slice of it.

    Raises:
        NotRegrouped: the leaves are not all of it, in equal parts.
    """
    parts = [part for part in map(piece_of, leaves) if part is not None]
    source, dim, selected = parts[0].source, parts[0].dim, parts[0].selected
    alike = len(parts) == len(leaves) and all(
        (part.source, part.dim, part.selected) == (source, dim, selected) and same(part.span.size, parts[0].span.size)
        for part in parts
    )
    shape: list[Size] = [*tensor(source).shape]
    order = in_order([part.span for part in parts], shape[dim]) if alike else None
    if order is None or dim > len(shape) - 3:
        raise NotRegrouped(
            "parts of the attention weights are added up that are not known to be all equal slices of one softmax "
            "along its batches or heads"
        )
    weights = source
    if not selected:
        weights = builder.call(
            aten.reshape.default, source, [*shape[:dim], len(parts), parts[0].span.size, *shape[dim + 1 :]]
        )
    # All slices share the value, which has the dimension that counts them with size one.
    value = product.operands[1]
    place = tensor(value).dim() - tensor(leaves[0]).dim() + dim
    if place >= 0:
        value = builder.call(aten.unsqueeze.default, value, place)
    whole = builder.call(aten.matmul.default, weights, value)
    # The value may have more dimensions than the weights.
    dim += tensor(whole).dim() - tensor(weights).dim()
    slices = {leaf: builder.call(aten.select.int, whole, dim, order.index(index)) for index, leaf in enumerate(leaves)}
    return whole, slices
