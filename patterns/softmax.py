r"""Softmax attention, written out.

    scores = query @ key^T                      (..., query length, key length)
    scores = mods(scores)                       scale, bias, mask, in any order
    weights = dropout(softmax(scores, key length))
    result = weights @ value

The rule starts at a softmax and reads in both directions. Forwards, past casts, dropout and views, it must come to one
matrix product that contracts exactly the axis that softmax ran over. Backwards, past what is done to the scores, it
must come to a matrix product in which that axis belongs to one operand alone: that operand is the key. Any spelling of
a product, of a view and of a mask will do, since products are read as einsums over axes and views as layouts.

Where something else reads the weights or the scores they must exist in memory, and the site is kept as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.scores import ScoreWalk, leads_to_product, read_scores
from attnrewrite.analysis.views import (
    Axis,
    Layout,
    Operand,
    Product,
    axes_of,
    fresh_layout,
    is_layout_op,
    is_product,
    product_from_operand,
    push,
)
from attnrewrite.ir import is_cast, tensor
from attnrewrite.site import AttentionSite, NotAttention

from .base import Finding, GraphView, NearMiss, Specimen

__all__ = ["PATTERN"]

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_DROPOUT = (aten.dropout.default,)


class SoftmaxAttention:
    name = "softmax"
    precedence = 20

    @property
    def specimens(self) -> tuple[Specimen, ...]:
        return SPECIMENS

    def find(self, view: GraphView) -> Iterator[Finding]:
        for target in _SOFTMAX:
            for node in view.graph.find_nodes(op="call_function", target=target):
                if not (leads_to_product(node.args[0], view.leads_to_product) and _feeds_product(node)):
                    continue
                try:
                    yield self._read(node, view)
                except NotAttention as reason:
                    yield NearMiss(self.name, node, str(reason), (node,))

    def _read(self, softmax: fx.Node, view: GraphView) -> AttentionSite:
        if softmax.target is aten._safe_softmax.default:
            raise NotAttention("a softmax that gives fully masked rows the value 0")
        source = softmax.args[0]
        assert isinstance(source, fx.Node)
        layout = fresh_layout(tensor(softmax).shape)
        dim = softmax.args[1]
        assert isinstance(dim, int)
        key_dim = layout[dim]
        weights, product, dropout, after = _weights_product(softmax, layout)
        walk = read_scores(source, layout, view.leads_to_product)
        view.require_single_reader([softmax, *after], "the attention weights")
        view.require_single_reader(walk.nodes, "the scores")
        interior = view.ordered([*walk.nodes, softmax, *after, product.node])
        for node in interior:
            if view.grad_region(node) != view.grad_region(product.node):
                raise NotAttention("grad mode is switched between the scores and the product with the value")
        if not view.same_region(walk.product.node, product.node):
            raise NotAttention(
                "autocast is switched between the product of query and key and the product with the value"
            )

        key_axes = axes_of((key_dim,))
        query, key = _query_and_key(walk.product, key_axes)
        value = product.rhs if product.lhs.node is weights else product.lhs
        if set(axes_of((product.contracted,))) != set(key_axes):
            raise NotAttention(
                "the product after softmax does not contract the axis that softmax runs over, so this is no attention"
            )
        # Fused kernels multiply query and key with float32 accumulation, so casting them up first adds nothing; weights
        # and value are multiplied in the dtype that the source multiplies them in.
        dtype = tensor(product.node).dtype
        query, key = (view.origin(operand, walk.product.node, narrow_to=dtype) for operand in (query, key))
        value = view.origin(value, product.node)
        if view.in_autocast(product.node):
            dtype = _widest([dtype, tensor(walk.product.node).dtype])
        else:
            dtype = _widest([dtype, query.dtype, key.dtype])
        return AttentionSite(
            pattern=self.name,
            anchor=softmax,
            result=product.node,
            result_layout=product.layout,
            query=query.resolved(),
            key=key.resolved(),
            value=value.resolved(),
            query_axes=_query_axes(walk, key_axes, key),
            key_axes=axes_of((key_dim,)),
            feature_axes=axes_of((walk.product.contracted,)),
            mods=walk.mods,
            softmax_dtype=tensor(softmax).dtype,
            compute_dtype=dtype,
            dropout=dropout,
            in_autocast=view.in_autocast(product.node),
            interior=interior,
        )


def _feeds_product(node: fx.Node) -> bool:
    """Whether a reader of the weights, past casts, dropout and views, is a matrix product."""
    for user in node.users:
        if is_product(user):
            return True
        if (is_cast(user) or is_layout_op(user) or user.target in _DROPOUT) and _feeds_product(user):
            return True
    return False


def _weights_product(softmax: fx.Node, layout: Layout) -> tuple[fx.Node, Product, float, list[fx.Node]]:
    """Follows the weights to the product with the value: (weights, product, dropout, nodes between)."""
    node = softmax
    dropout = 0.0
    between: list[fx.Node] = []
    while True:
        users = [user for user in node.users if user.op != "output"]
        if not users:
            raise NotAttention("the attention weights are returned")
        products = [user for user in users if is_product(user)]
        if products:
            product = product_from_operand(products[0], node, layout)
            if product is None:
                raise NotAttention("the product of weights and value cannot be laid out along the weights' axes")
            return node, product, dropout, between
        user = next((user for user in users if is_cast(user) or is_layout_op(user) or user.target in _DROPOUT), None)
        if user is None:
            name = getattr(users[0].target, "_opname", users[0].target)
            raise NotAttention(f"{name} stands between softmax and the product with the value")
        if user.target in _DROPOUT:
            args: Any = user.args
            if args[2] and args[1] > 0:
                if dropout:
                    raise NotAttention("dropout is applied to the weights twice")
                dropout = float(args[1])
        elif is_layout_op(user):
            pushed = push(user, layout)
            if pushed is None or set(axes_of(pushed)) != set(axes_of(layout)):
                raise NotAttention("the weights are reordered in a way that no layout expresses")
            layout = pushed
        between.append(user)
        node = user


def _query_and_key(product: Product, key_axes: tuple[Axis, ...]) -> tuple[Operand, Operand]:
    lhs, rhs = set(product.lhs.axes), set(product.rhs.axes)
    keys = set(key_axes)
    if not key_axes:
        raise NotAttention("softmax runs over a single key, whose weight is always 1")
    if keys <= rhs and not keys & lhs:
        query, key = product.lhs, product.rhs
    elif keys <= lhs and not keys & rhs:
        query, key = product.rhs, product.lhs
    else:
        raise NotAttention(
            "softmax runs over an axis that query and key share (a batch or a head) and not over the keys, so this is "
            "no attention"
        )
    contracted = set(axes_of((product.contracted,)))
    if not contracted <= set(query.axes) or not contracted <= set(key.axes):
        raise NotAttention("the product sums over an axis that only one operand has")
    return query, key


def _query_axes(walk: ScoreWalk, key_axes: tuple[Axis, ...], key: Operand) -> tuple[Axis, ...]:
    """The query positions: the last dimension of the scores, the keys' apart, that the key does not share."""
    shared = set(key.axes)
    for dim in reversed(walk.product.layout):
        axes = axes_of((dim,))
        if set(axes) & set(key_axes) or (axes and set(axes) <= shared):
            continue
        return tuple(axis for axis in axes if axis not in shared)
    return ()


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


PATTERN = SoftmaxAttention()

SPECIMENS: tuple[Specimen, ...] = ()
