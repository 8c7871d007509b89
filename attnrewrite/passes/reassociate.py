"""Reassociates the products of linear attention: ``query @ (key^T @ value)`` or ``(query @ key^T) @ value``.

The cheaper order is the one with fewer floating-point operations, for all sizes that the graph may be called with. If
symbolic sizes leave this open, no guard is added: the linear order, which needs no matrix of query-key pairs, stays,
and the quadratic order is replaced with it if the linear one is cheaper for the sizes of the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols, statically_known_true

from attnrewrite.ir.axes import Axis, Dim, Operand, axes_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.linear_site import LinearAttention, Order
from attnrewrite.ir.nodes import Size, hint, product
from attnrewrite.kernels.common.layout import lay_out, modified
from attnrewrite.passes.splice import current_operand, replace_node
from attnrewrite.report.rows import SiteReport
from attnrewrite.torch_private import is_erased

__all__ = ["operations", "reassociate"]

aten = torch.ops.aten


def reassociate(gm: fx.GraphModule, site: LinearAttention, row: SiteReport, replaced: dict[fx.Node, fx.Node]) -> None:
    """Multiplies linear attention in the cheaper order. Its row gets that order, or the reason why the source's stays.

    Args:
        site: the linear attention; its operands are in the graph.
        replaced: nodes that are no longer in the graph, each with its replacement; the site's nodes are added.
    """
    choice = _choose_order(site)
    if choice.order == site.order:
        row.status, row.reason = "kept" if choice.refused else "recognized", choice.reason
        return
    row.status, row.kernel = "rewritten", f"{choice.order} order"
    row.order = f"{choice.order}, was {site.order}"
    created: list[fx.Node] = []
    for total, applied in site.sums:
        builder = Builder(gm, before=total.node, like=total.node)
        replace_node(gm.graph, total.node, _emit_sum(site, total, applied, builder), builder, replaced)
        created += builder.created
    site = site.with_operands(lambda operand: current_operand(operand, replaced))
    builder = Builder(gm, before=site.result, like=site.anchor)
    replace_node(gm.graph, site.result, _emit_result(site, builder), builder, replaced)
    row.nodes_after = tuple(node.name for node in (*created, *builder.created) if not is_erased(node))


@dataclass(frozen=True)
class _OrderChoice:
    """The order to multiply in.

    Attributes:
        reason: why the source's order stays; empty if it changes.
        refused: whether the other order would be cheaper but cannot be used.
    """

    order: Order
    reason: str = ""
    refused: bool = False


def operations(site: LinearAttention, order: Order) -> Size:
    """The floating-point operations of the two products, counting a multiply-add as two."""
    return 2 * sum(product([axis.size for axis in axes]) for axes in _spans(site, order))


def _spans(site: LinearAttention, order: Order) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The axes that each of the two products runs over."""
    if order == site.order:
        pair, summed, last = (site.middle, site.inner), site.first_summed, site.outer
    else:
        pair, summed, last = (site.outer, site.middle), site.then_summed, site.inner
    first = dict.fromkeys((*pair[0].axes, *pair[1].axes))
    second = dict.fromkeys((*(axis for axis in first if axis not in summed), *last.axes))
    return tuple(first), tuple(second)


def _choose_order(site: LinearAttention) -> _OrderChoice:
    """The cheaper order, or the source's order and why it stays."""
    own: Order = site.order
    other: Order = "quadratic" if own == "linear" else "linear"
    spans = {order: _spans(site, order) for order in (own, other)}
    # Axes that all products share do not affect the comparison, and their sizes may be unknown.
    common = set.intersection(*(set(axes) for pair in spans.values() for axes in pair))

    def cost(order: Order) -> Size:
        return sum(product([axis.size for axis in axes if axis not in common]) for axes in spans[order])

    before, after = cost(own), cost(other)
    if has_free_unbacked_symbols([before, after]):
        return _OrderChoice(own, "the cheaper order depends on the data")
    if statically_known_true(before <= after):
        return _OrderChoice(own, f"the {own} order is cheaper")
    if not statically_known_true(after < before):
        if own == "linear":
            return _OrderChoice(
                own,
                "the cheaper order depends on symbolic sizes, and the linear one needs no matrix of query-key pairs",
            )
        if not hint(after) < hint(before):
            return _OrderChoice(own, f"the {own} order is cheaper for the sizes of the first call")
    if site.fixed:
        return _OrderChoice(own, f"the {other} order would be cheaper: {site.fixed}", refused=True)
    return _OrderChoice(other)


def _emit_result(site: LinearAttention, builder: Builder) -> fx.Node:
    """Emits the result in the other order than the source's: ``(outer @ middle) @ inner``."""
    batch = _dims(site.batch_axes)
    transposed = not _ends_with(site.result_layout, site.inner_axes)
    rows, columns = (site.outer_axes,), (site.inner_axes,)
    first, then = (site.first_summed,), (site.then_summed,)
    outer, middle, inner = site.outer, site.middle, site.inner
    if transposed:
        pair = _product(builder, _laid(builder, middle, batch, first, then), _laid(builder, outer, batch, then, rows))
        result = _product(builder, _laid(builder, inner, batch, columns, first), pair)
        dims = (*batch, *columns, *rows)
    else:
        pair = _product(builder, _laid(builder, outer, batch, rows, then), _laid(builder, middle, batch, then, first))
        result = _product(builder, pair, _laid(builder, inner, batch, first, columns))
        dims = (*batch, *rows, *columns)
    for scale in site.scales:
        result = modified(builder, result, scale, dims)
    return lay_out(builder, result, dims, site.result_layout)


def _emit_sum(site: LinearAttention, total: Operand, applied: int, builder: Builder) -> fx.Node:
    """Emits a sum of ``middle @ inner`` over the axis that the second product sums over: ``inner @ sum(middle)``.

    Args:
        total: the sum in the source, and its dimensions.
        applied: the number of scales that the sum includes.
    """
    stored = {*site.middle.axes, *site.inner.axes}
    batch = _dims([axis for axis in site.batch_axes if axis in stored])
    columns, first, then = (site.inner_axes,), (site.first_summed,), (site.then_summed,)
    middle = _laid(builder, site.middle, batch, first, then)
    summed = builder.call(aten.sum.dim_IntList, middle, [-1], True)
    result = _product(builder, _laid(builder, site.inner, batch, columns, first), summed)
    dims: tuple[Dim, ...] = (*batch, *columns, ())
    for scale in site.scales[:applied]:
        result = modified(builder, result, scale, dims)
    return lay_out(builder, result, dims, total.layout)


def _dims(axes: Sequence[Axis]) -> tuple[Dim, ...]:
    return tuple((axis,) for axis in axes)


def _laid(builder: Builder, operand: Operand, batch: Sequence[Dim], *matrix: Sequence[Dim]) -> fx.Node:
    """The operand laid out as matrices (batch..., rows, columns), with size one for batch axes that it lacks."""
    return lay_out(builder, operand.node, operand.layout, [*batch, *(dim for dims in matrix for dim in dims)])


def _product(builder: Builder, lhs: fx.Node, rhs: fx.Node) -> fx.Node:
    return builder.call(aten.matmul.default, lhs, rhs)


def _ends_with(layout: Sequence[Dim], axes: Sequence[Axis]) -> bool:
    last = axes_of(layout)[-1:]
    return bool(last) and last[0] in axes
