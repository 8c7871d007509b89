"""Masks at their smallest: along a dimension where all entries are proved to be the same, one entry is computed.

transformers expands a padding mask of (batch, keys) over the queries before it makes numbers of it. What is computed is
the source's steps at the first position of such a dimension: it is carried back through them to where the mask was
expanded, or as far as it goes, and sliced there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.axes import Operand
from attnrewrite.ir.bounds import NARROWED_STEPS
from attnrewrite.ir.builder import Builder, Written
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import FILLED_OPS, is_cast, is_pointwise
from attnrewrite.ir.site import Bias, CanonicalAttention, Fill, Floor, Raise
from attnrewrite.ir.views import permutation_of
from attnrewrite.torch_private import is_erased

__all__ = ["with_narrow_masks"]

aten = torch.ops.aten

_Dims = frozenset[int]


def with_narrow_masks(site: CanonicalAttention, view: GraphView, written: Written) -> CanonicalAttention:
    """The site with masks of size one along the axes that their entries do not depend on; new nodes are ``written``.

    Args:
        written: nodes written for earlier sites, such as the mask that all layers share.
    """
    kept = {site.query.node, site.key.node, site.value.node}
    narrowed: dict[Operand, Operand] = {}
    created: list[fx.Node] = []
    for operand, axes in site.scores.repeated_along:
        sizes = tensor(operand.node).shape
        dims = frozenset(
            place
            for place, (dim, size) in enumerate(zip(operand.layout, sizes, strict=True))
            if dim and axes.issuperset(dim) and not same(size, 1) and statically_known_true(size >= 1)
        )
        if dims and operand.node not in kept:
            node = written.get((operand.node, dims))
            if node is None or is_erased(node) or not node < site.result:
                builder = Builder(view.gm, site.result, site.anchor, written)
                node = written[operand.node, dims] = _Narrowing(builder, view, site.anchor).of(operand.node, dims)
                created += builder.created
            layout = tuple(() if place in dims else dim for place, dim in enumerate(operand.layout))
            narrowed[operand] = Operand(node, layout)
    if not narrowed:
        return site

    def change(operand: Operand) -> Operand:
        return narrowed.get(operand.resolved(), operand)

    terms: list[Bias | Fill | Floor | Raise] = []
    for term in site.scores.terms:
        if isinstance(term, Bias):
            terms.append(replace(term, operand=change(term.operand)))
        else:
            terms.append(replace(term, condition=change(term.condition)) if isinstance(term, Fill) else term)
    scores = replace(site.scores, terms=tuple(terms), repeated_along=())
    return replace(site, mods=site.with_operands(change).mods, scores=scores, written=(*site.written, *created))


class _Narrowing:
    """Writes nodes that are the first entries of others along some dimensions, which keep the size one."""

    def __init__(self, builder: Builder, view: GraphView, anchor: fx.Node) -> None:
        self._builder = builder
        self._view = view
        self._anchor = anchor
        self._memo: dict[tuple[fx.Node, _Dims], fx.Node] = {}

    def of(self, node: fx.Node, dims: _Dims) -> fx.Node:
        """The first entries of ``node`` along ``dims``."""
        dims = frozenset(dim for dim in dims if not same(tensor(node).shape[dim], 1))
        if not dims:
            return node
        key = (node, dims)
        if key not in self._memo:
            # In another region the steps would be computed with gradients, or in another dtype.
            carried = None
            if NARROWED_STEPS.allows(len(self._memo) + 1) and self._view.same_region(node, self._anchor):
                carried = self._carried_back(node, dims)
            self._memo[key] = self._sliced(node, dims) if carried is None else carried
        return self._memo[key]

    def _sliced(self, node: fx.Node, dims: _Dims) -> fx.Node:
        for dim in sorted(dims):
            node = self._builder.call(aten.slice.Tensor, node, dim, 0, 1)
        return node

    def _carried_back(self, node: fx.Node, dims: _Dims) -> fx.Node | None:
        """The node's step applied to the first entries of its arguments; None where it does more than broadcast."""
        args: Any = node.args
        call = self._builder.call
        if node.op != "call_function" or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
            return None
        shape = [1 if dim in dims else size for dim, size in enumerate(tensor(node).shape)]
        if node.target in FILLED_OPS:
            return call(node.target, shape, *args[1:], **node.kwargs)
        if node.target is aten.expand.default:
            source = self._broadcast(args[0], node, dims)
            if source is None or same_shape(tensor(source).shape, shape):
                return source
            return call(aten.expand.default, source, shape)
        if node.target is aten.unsqueeze.default:
            new = args[1] % len(shape)
            return call(node.target, self.of(args[0], frozenset(dim - (dim > new) for dim in dims)), args[1])
        if node.target is aten.index.Tensor:
            return self._indexed(node, dims)
        if is_cast(node) or is_pointwise(node):
            carried = [self._broadcast(arg, node, dims) if is_tensor(arg) else arg for arg in args]
            if any(new is None and old is not None for new, old in zip(carried, args, strict=True)):
                return None
            return call(node.target, *carried, **node.kwargs)
        order = permutation_of(node) if args and is_tensor(args[0]) else None
        if order is None:
            return None
        return call(node.target, self.of(args[0], frozenset(order[dim] for dim in dims)), *args[1:])

    def _broadcast(self, arg: fx.Node, node: fx.Node, dims: _Dims) -> fx.Node | None:
        """The first entries of an argument that broadcasts to ``node``; None if it is not known how."""
        sizes, shape = tensor(arg).shape, tensor(node).shape
        offset = len(shape) - len(sizes)
        if any(not same(size, 1) and not same(size, whole) for size, whole in zip(sizes, shape[offset:], strict=True)):
            return None
        return self.of(arg, frozenset(dim - offset for dim in dims if dim >= offset))

    def _indexed(self, node: fx.Node, dims: _Dims) -> fx.Node | None:
        """``table[rows, columns]``, at the first rows or columns."""
        args: Any = node.args
        table, positions = args[0], list(args[1])
        given = [place for place, position in enumerate(positions) if position is not None]
        if given != list(range(given[0], given[0] + len(given))):
            return None
        parts: Sequence[fx.Node] = [positions[place] for place in given]
        if not all(tensor(part).dtype in (torch.int64, torch.int32) for part in parts):
            return None
        start, rank = given[0], max(tensor(part).dim() for part in parts)
        shape = tensor(node).shape[start : start + rank]
        own = frozenset(dim - start for dim in dims if start <= dim < start + rank)
        others = [dim if dim < start else dim - rank + len(given) for dim in dims if dim - start not in own]
        for place, part in zip(given, parts, strict=True):
            offset = rank - tensor(part).dim()
            sizes = tensor(part).shape
            if any(not same(a, 1) and not same(a, b) for a, b in zip(sizes, shape[offset:], strict=True)):
                return None
            positions[place] = self.of(part, frozenset(dim - offset for dim in own if dim >= offset))
        return self._builder.call(aten.index.Tensor, self.of(table, frozenset(others)), positions)
