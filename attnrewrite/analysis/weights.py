"""Attention weights: the spellings of softmax, and the operations between it and the product with the value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.empty_rows import EmptyRows
from attnrewrite.analysis.scores import (
    BOUNDED,
    FLOATING,
    assigned_mask,
    bounds_of,
    is_narrower,
    node_in_words,
    row_maximum,
    steps_to_product,
)
from attnrewrite.analysis.values import constant_value, possible_values
from attnrewrite.ir.axes import Axis, Dim, Layout, Operand, axes_of, broadcast, fresh_layout, resolve, size_of
from attnrewrite.ir.nodes import Size, dtype_name, is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import (
    ADD_OPS,
    CLAMP_OPS,
    DIV_OPS,
    LOG_SOFTMAX_OPS,
    MASKED_FILL_OPS,
    MUL_OPS,
    PAD_OPS,
    SOFTMAX_OPS,
    WHERE_OPS,
    is_cast,
)
from attnrewrite.ir.products import Product, factors_of, is_product, product_from_operand, product_of_factor
from attnrewrite.ir.site import Fill, NotAttention, Scale, WeightMod, Zero, blaming
from attnrewrite.ir.views import is_layout_op, push

__all__ = ["Softmax", "WeightWalk", "every_softmax", "follow_weights", "split_sink"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Softmax:
    """A softmax over one dimension, in any spelling.

    Attributes:
        node: the node of the weights.
        scores: the node of the scores.
        dim: the dimension, nonnegative.
        nodes: the nodes that compute the weights from ``scores``.
        sink: the score of one more key, whose weight is dropped: the 1 in ``exp(x) / (1 + exp(x).sum())`` is exp(0).
        nan_to_zero: a row whose scores are all minus infinity is zero.
        sink_is_shifted: the row's maximum is subtracted from the sink as well, so that a row whose scores are all minus
            infinity is NaN in spite of the sink.
        underflows: no maximum is subtracted from the scores, so that a row whose scores are all far below zero is NaN,
            0 / 0.
        rounds_rows: ``logsumexp`` is subtracted, and rounded away if all scores are far below zero, so that the weights
            of such a row are 1 each.
        fills: masks that the exponentials are multiplied by before they are summed, as fills with minus infinity.
        layout: the layout of the weights.
        late: the division by the sum, if it comes after the product with the value: ``exp(x) @ v / exp(x).sum()``.
        late_views: the views between the product and that division.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]
    sink: Operand | float | None = None
    nan_to_zero: bool = False
    sink_is_shifted: bool = False
    underflows: bool = False
    rounds_rows: bool = False
    fills: tuple[Fill, ...] = ()
    layout: Layout = ()
    late: fx.Node | None = None
    late_views: tuple[fx.Node, ...] = ()


def every_softmax(graph: fx.Graph) -> Iterator[Softmax]:
    """Yields every softmax of the graph, in all spellings."""
    for target in SOFTMAX_OPS:
        for node in graph.find_nodes(op="call_function", target=target):
            dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            scores = node.args[0]
            if isinstance(dim, int) and is_tensor(scores) and tensor(node).dim():
                safe = target is aten._safe_softmax.default
                yield _with_layout(Softmax(node, scores, dim % tensor(node).dim(), (node,), nan_to_zero=safe))
    for node in graph.find_nodes(op="call_function", target=aten.exp.default):
        found = _exponential_of_logarithm(node)
        if found is not None:
            yield _with_layout(found)
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        found = _divided_by_sum(node)
        if found is not None:
            yield found


def _with_layout(found: Softmax) -> Softmax:
    return replace(found, layout=fresh_layout(tensor(found.node).shape))


def _exponential_of_logarithm(node: fx.Node) -> Softmax | None:
    """The softmax written ``log_softmax(x).exp()`` or ``exp(x - logsumexp(x))``; None for any other exponential."""
    inner, casts = _behind_casts(node.args[0])
    if inner is None:
        return None
    args: Any = inner.args
    if inner.target in LOG_SOFTMAX_OPS:
        dim = args[1] if len(args) > 1 else inner.kwargs.get("dim")
        if not isinstance(dim, int) or not is_tensor(args[0]) or not tensor(inner).dim():
            return None
        return Softmax(node, args[0], dim % tensor(inner).dim(), (inner, *casts, node))
    if inner.target is not aten.sub.Tensor or not is_tensor(args[1]) or args[1].target is not aten.logsumexp.default:
        return None
    total = args[1]
    dims = total.args[1]
    keep = bool(total.args[2]) if len(total.args) > 2 else bool(total.kwargs.get("keepdim"))
    if total.args[0] is not args[0] or inner.kwargs or not keep or len(dims) != 1 or not tensor(args[0]).dim():
        return None
    return Softmax(node, args[0], int(dims[0]) % tensor(args[0]).dim(), (total, inner, *casts, node), rounds_rows=True)


def _behind_casts(node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    casts: list[fx.Node] = []
    while is_tensor(node) and is_cast(node) and tensor(node).dtype in FLOATING:
        casts.append(node)
        node = node.args[0]
    return (node if is_tensor(node) and node.op == "call_function" else None), casts


# exp(x) / exp(x).sum().


@dataclass
class _Exponentials:
    """The exponentials ``exp(argument) * masks`` of a decomposed softmax, with the nodes that compute them."""

    node: fx.Node
    argument: fx.Node
    fills: list[tuple[fx.Node, fx.Node, bool]]
    """For each mask: its node, the node that applies it, and whether that multiplies (1 keeps) or fills (1 masks)."""
    nodes: list[fx.Node]


def _divided_by_sum(node: fx.Node) -> Softmax | None:
    """The softmax whose division by the sum of exponentials is ``node``; None for any other division."""
    if node.kwargs or not (is_tensor(node.args[0]) and is_tensor(node.args[1])):
        return None
    args: Any = node.args
    numerator, denominator = args[:2]
    whole = _exponentials(numerator)
    late = whole is None
    found = _exponentials_in_product(numerator) if whole is None else (whole, (), ())
    if found is None:
        return None
    top, late_views, weight_views = found
    total = _denominator(denominator, top)
    if total is None or not same_shape(tensor(node).shape, tensor(numerator).shape):
        return None
    dim, addends, lowest, bottom_nodes, kept_dim = total
    layout = fresh_layout(tensor(top.node).shape)
    divided = _result_layout(numerator, top.node, layout, late_views, weight_views) if late else layout
    sums = _sum_layout(bottom_nodes, layout, dim, kept_dim)
    if divided is None or sums is None or not _divides_rows(divided, sums, layout, dim):
        return None
    keys = axes_of((layout[dim],))
    shifted, maximum = _without_maximum(top.argument, layout, keys, own_row=False)
    exact = bool(_without_maximum(top.argument, layout, keys, own_row=True)[1])
    fills = _fills(top, layout)
    if fills is None:
        return None
    negligible = torch.finfo(tensor(node).dtype).eps / 2 if exact and not fills else None
    if lowest is not None and (negligible is None or addends or not lowest <= 1):
        return None  # A clamp of the sum does nothing if that is at least 1.
    read = _sink_among(addends, shifted, maximum, layout, axes_of((layout[dim],)), negligible)
    if read is None:
        return None
    sink, sink_nodes = read
    bounded = any(map(_is_bounded_below, maximum))
    if sink is not None and maximum and not (exact or bounded):
        # Of several rows: whether one of minus infinity is NaN depends on the others.
        return None
    # Without a sink, read_scores reads the subtraction of the maximum as one of the steps.
    scores, own = (shifted, maximum) if sink_nodes else (top.argument, ())
    nodes = dict.fromkeys([*top.nodes, *bottom_nodes, *([] if late else [node]), *sink_nodes])
    return Softmax(
        top.node if late else node,
        scores,
        dim,
        (*own, *(each for each in nodes if each not in maximum)),
        sink,
        late=node if late else None,
        late_views=late_views,
        sink_is_shifted=bool(maximum) and not bounded,
        # The maximum may be that of a score whose exponential is set to zero, and that of a sink may be zero.
        underflows=not (exact and not fills),
        fills=tuple(fills),
        layout=layout,
    )


def _is_bounded_below(step: fx.Node) -> bool:
    if step.target in CLAMP_OPS:
        low, _ = bounds_of(step)
        return isinstance(low, (int, float)) and low > -math.inf
    return step.target in BOUNDED


def _fills(top: _Exponentials, layout: Layout) -> list[Fill] | None:
    """The masks of exponentials as fills of the scores; None if one may not broadcast."""
    fills = []
    for condition, at, multiplied in top.fills:
        own = broadcast(layout, tensor(at).shape, tensor(condition).shape)
        if own is None:
            return None
        dtype = tensor(at).dtype
        fills.append(Fill(Operand(condition, own), -math.inf, dtype, multiplied, multiplied, written_at=at))
    return fills


def _sink_among(
    addends: Sequence[Any],
    shifted: fx.Node,
    maximum: tuple[fx.Node, ...],
    layout: Layout,
    keys: tuple[Axis, ...],
    negligible: float | None,
) -> tuple[Operand | float | None, Sequence[fx.Node]] | None:
    """The sink that is added to the sum of exponentials, or None, and the nodes that compute it.

    Args:
        addends: what is added to the sum.
        shifted: the scores before their maximum is subtracted.
        maximum: the nodes that subtract it; empty if none is subtracted.
        layout: the layout of the scores.
        keys: the axes that softmax runs over.
        negligible: a number below this (an epsilon) is rounded away, since the sum is at least 1; None if the sum may
            be smaller.

    Returns:
        None if an addend is not a sink, or there are several.
    """
    sink: Operand | float | None = None
    nodes: Sequence[fx.Node] = ()
    for addend in addends:
        if sink is not None:
            return None
        if not isinstance(addend, (int, float)):
            read = _sink_in_denominator(addend, shifted, maximum, layout, keys)
            if read is None:
                return None
            sink, nodes = read
        elif negligible is not None:
            # An epsilon that is rounded away is not a sink.
            if not 0 <= addend < negligible:
                return None
        elif addend <= 0 or maximum:
            return None
        else:
            sink = math.log(addend)
    return sink, nodes


def _exponentials_in_product(
    numerator: fx.Node,
) -> tuple[_Exponentials, tuple[fx.Node, ...], tuple[fx.Node, ...]] | None:
    """For ``numerator``, views of a product: its factor of exponentials, these views, and views of the exponentials.

    None if no factor of the product is made of exponentials.
    """
    product, late_views = _behind_views(numerator)
    for factor in factors_of(product):
        inner, views = _behind_views(factor)
        top = _exponentials(inner)
        if top is not None:
            return top, late_views, views
    return None


def _behind_views(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node behind views, and the views, nearest to it first."""
    views: list[fx.Node] = []
    while is_layout_op(node):
        views.append(node)
        node = node.all_input_nodes[0]
    return node, tuple(reversed(views))


def _result_layout(
    numerator: fx.Node,
    weights: fx.Node,
    layout: Layout,
    late_views: tuple[fx.Node, ...],
    weight_views: tuple[fx.Node, ...],
) -> Layout | None:
    """The layout of ``numerator``, views of the product with the value, in the axes of the exponentials."""
    own = _pushed(weight_views, layout)
    factor = weight_views[-1] if weight_views else weights
    product = None if own is None else product_from_operand(_behind_views(numerator)[0], factor, own)
    return None if product is None else _pushed(late_views, product.layout)


def _pushed(views: tuple[fx.Node, ...], layout: Layout | None) -> Layout | None:
    for view in views:
        layout = None if layout is None else push(view, layout)
    return layout


def _sum_layout(nodes: list[fx.Node], layout: Layout, dim: int, kept: bool) -> Layout | None:
    """The layout of the denominator; ``nodes`` lead from it back to the sum."""
    place = next(place for place, node in enumerate(nodes) if node.target is aten.sum.dim_IntList)
    own: Layout | None = (*layout[:dim], *([()] if kept else []), *layout[dim + 1 :])
    return _pushed(tuple(node for node in reversed(nodes[:place]) if is_layout_op(node)), own)


def _divides_rows(divided: Layout, sums: Layout, layout: Layout, dim: int) -> bool:
    """Whether each row is divided by the sum of its own exponentials."""
    if len(sums) > len(divided):
        return False
    expected = resolve(divided)[len(divided) - len(sums) :]
    rows = {axis for position, part in enumerate(resolve(layout)) if position != dim for axis in part}
    aligned = all(not own or own == other for own, other in zip(resolve(sums), expected, strict=True))
    return aligned and set(axes_of(sums)) == rows


def _exponentials(node: Any) -> _Exponentials | None:
    """The exponentials at ``node``, behind casts and masks; None if there are none."""
    start = node
    nodes: list[fx.Node] = []
    fills: list[tuple[fx.Node, fx.Node, bool]] = []
    while is_tensor(node) and node.op == "call_function":
        nodes.append(node)
        args: Any = node.args
        if node.target is aten.exp.default:
            return _Exponentials(start, args[0], fills, nodes) if is_tensor(args[0]) else None
        if is_cast(node) and tensor(node).dtype in FLOATING:
            node = args[0]
        elif node.target is aten.masked_fill.Scalar and constant_value(args[2]) == 0:
            fills.append((args[1], node, False))
            node = args[0]
        elif node.target is aten.mul.Tensor and is_tensor(args[0]) and is_tensor(args[1]):
            masks = [arg for arg in args[:2] if possible_values(arg) <= {0.0, 1.0}]
            if len(masks) != 1:
                return None
            fills.append((masks[0], node, True))
            node = args[1] if masks[0] is args[0] else args[0]
        else:
            return None
    return None


def _denominator(node: fx.Node, top: _Exponentials) -> tuple[int, list[Any], float | None, list[fx.Node], bool] | None:
    """``sum(exponentials, dim) + addends``, or the sum clamped from below; None for other nodes.

    Returns:
        The dim, the addends, the number that it is clamped to, the nodes from the last on, and keepdim.
    """
    addends: list[Any] = []
    lowest: float | None = None
    nodes: list[fx.Node] = []
    current: Any = node
    while is_tensor(current) and current.op == "call_function" and tensor(current).dtype in FLOATING:
        nodes.append(current)
        args: Any = current.args
        if current.target is aten.sum.dim_IntList:
            dims, keep = args[1], bool(args[2]) if len(args) > 2 else bool(current.kwargs.get("keepdim"))
            if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not _equal_up_to_casts(args[0], top, nodes):
                return None
            return int(dims[0]) % tensor(top.node).dim(), addends, lowest, nodes, keep
        if current.target in CLAMP_OPS and lowest is None:
            low, high = bounds_of(current)
            if not isinstance(low, (int, float)) or high is not None:
                return None
            lowest, current = float(low), args[0]
        elif is_cast(current) or is_layout_op(current):
            current = args[0]
        elif current.target in ADD_OPS and not current.kwargs and not addends:
            first, second = args[:2]
            into_first = is_tensor(first) and _reaches_sum(first)
            addend, current = (second, first) if into_first else (first, second)
            # A tensor is aligned with the dimensions of the exponentials, so the sum must have kept them.
            if is_tensor(addend) and not (is_tensor(current) and _is_plain_sum(current, nodes[-1])):
                return None
            addends.append(addend)
        else:
            return None
    return None


def _is_plain_sum(node: fx.Node, added: fx.Node) -> bool:
    args: Any = node.args
    while is_cast(node):
        node = args[0]
        args = node.args
    keep = bool(args[2]) if len(args) > 2 else bool(node.kwargs.get("keepdim"))
    return node.target is aten.sum.dim_IntList and keep and same_shape(tensor(node).shape, tensor(added).shape)


def _reaches_sum(node: Any) -> bool:
    while is_tensor(node) and node.op == "call_function":
        if node.target is aten.sum.dim_IntList:
            return True
        if not (is_cast(node) or is_layout_op(node) or node.target in ADD_OPS or node.target in CLAMP_OPS):
            return False
        node = node.args[0]
    return False


def _equal_up_to_casts(node: Any, top: _Exponentials, nodes: list[fx.Node]) -> bool:
    """Whether ``node`` has the exponentials ``top``, up to casts: what is summed must be what is divided."""
    while node not in top.nodes and is_tensor(node) and is_cast(node) and tensor(node).dtype in FLOATING:
        nodes.append(node)
        node = node.args[0]
    if node not in top.nodes:
        return False
    # Above it, the numerator may only have casts.
    above = top.nodes[: top.nodes.index(node)]
    return all(is_cast(part) for part in above)


def _without_maximum(
    argument: fx.Node, layout: Layout, key_axes: tuple[Axis, ...], own_row: bool
) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """``x`` for ``x - x.max()``, with the nodes that subtract; the argument itself, and none, for anything else."""
    inner, casts = _behind_casts(argument)
    if inner is None or inner.target is not aten.sub.Tensor or inner.kwargs or not is_tensor(inner.args[1]):
        return argument, ()
    source: Any = inner.args[0]
    if not is_tensor(source) or not same_shape(tensor(source).shape, tensor(inner).shape):
        return argument, ()
    maximum = row_maximum(inner.args[1], source, layout, key_axes, own_row)
    return (source, (*maximum, inner, *casts)) if maximum is not None else (argument, ())


def _sink_in_denominator(
    addend: Any, scores: fx.Node, maximum: tuple[fx.Node, ...], layout: Layout, key_axes: tuple[Axis, ...]
) -> tuple[Operand | float, list[fx.Node]] | None:
    """The sink of ``addend``, with its nodes; None if ``addend`` is not a sink.

    It is ``exp(sink)``, or with a maximum ``exp(sink - max)`` (the sink may be a number) or ``exp(-max)``, of zero.
    """
    inner, casts = _behind_casts(addend)
    if inner is None or inner.target is not aten.exp.default or not is_tensor(inner.args[0]):
        return None
    argument: Any = inner.args[0]
    nodes = [*casts, inner]

    def operand(node: fx.Node) -> Operand | None:
        shape = [*tensor(scores).shape]
        own = broadcast(layout, shape, tensor(node).shape)
        return None if own is None or set(axes_of(own)) & set(key_axes) else Operand(node, own)

    if not maximum:
        found = operand(argument)
        return None if found is None else (found, nodes)
    if argument.target is aten.neg.default:
        inside: Any = argument.args[0]
        return (0.0, [*nodes, argument]) if inside in maximum and inside is _result_of(maximum) else None
    if argument.target is aten.sub.Tensor and not argument.kwargs:
        sink, subtracted = argument.args[:2]
        if subtracted is _result_of(maximum) and is_tensor(sink):
            found = operand(sink)
            return None if found is None else (found, [*nodes, argument])
    if argument.target is aten.rsub.Scalar and len(argument.args) == 2 and not argument.kwargs:
        subtracted, number = argument.args
        if subtracted is _result_of(maximum) and isinstance(number, (int, float)) and math.isfinite(number):
            return float(number), [*nodes, argument]
    return None


def _result_of(maximum: tuple[fx.Node, ...]) -> Any:
    """The node of the maximum, among the nodes of ``x - x.max()``."""
    subtraction = next((node for node in maximum if node.target is aten.sub.Tensor), None)
    return None if subtraction is None else subtraction.args[1]


# An attention sink as one more column of the scores.


def split_sink(softmax: Softmax, key_dim: Dim) -> tuple[Softmax, Dim, bool] | None:
    """Reads a softmax over scores with one concatenated column as a softmax with a sink.

    Returns:
        The softmax over the scores without the column, the dimension of the keys without the sink, and whether the sink
        comes first. None if the scores are not concatenated from two parts, one of them of size one.
    """
    chain: list[fx.Node] = []
    node: Any = softmax.scores
    layout = softmax.layout
    while is_tensor(node) and node.op == "call_function":
        args: Any = node.args
        if is_cast(node) and tensor(node).dtype in FLOATING:
            chain.append(node)
            node = args[0]
            continue
        if node.target is aten.sub.Tensor and is_tensor(args[0]) and is_tensor(args[1]) and not node.kwargs:
            maximum = row_maximum(args[1], args[0], layout, axes_of((key_dim,)))
            if maximum is None or not same_shape(tensor(args[0]).shape, tensor(node).shape):
                return None
            chain.extend([*maximum, node])
            node = args[0]
            continue
        break
    # A mask of exponentials takes that of the column as well.
    if not is_tensor(node) or node.op != "call_function" or softmax.sink is not None or softmax.fills:
        return None
    joined = _sink_column(node, softmax.dim)
    if joined is None:
        return None
    scores, column, first = joined
    keys: Dim = () if same(tensor(scores).shape[softmax.dim], 1) else (Axis(tensor(scores).shape[softmax.dim], "key"),)
    sink: Operand | float
    if isinstance(column, float):
        sink = column
    else:
        own = list(resolve(layout))
        own[softmax.dim] = ()
        sink = Operand(column, tuple(own))
    nodes = (*chain, node, *softmax.nodes)
    # A maximum that is subtracted afterward has the sink among its numbers.
    return replace(softmax, scores=scores, sink=sink, nodes=nodes, sink_is_shifted=False), keys, first


def _sink_column(node: fx.Node, dim: int) -> tuple[fx.Node, fx.Node | float, bool] | None:
    """(scores, column, whether it comes first) of ``cat([scores, column], dim)`` or ``pad``; None for other nodes."""
    args: Any = node.args
    value: Any
    rank = tensor(node).dim()
    if node.target is aten.cat.default and len(args[0]) == 2:
        given: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
        along = given % rank
        a, b = args[0]
        if along != dim or not (is_tensor(a) and is_tensor(b)):
            return None
        if same(tensor(b).shape[dim], 1):
            return a, _constant_or_node(b), False
        return (b, _constant_or_node(a), True) if same(tensor(a).shape[dim], 1) else None
    if node.target in PAD_OPS:
        pads = list(args[1])
        if node.target is aten.pad.default:
            mode = args[2] if len(args) > 2 else node.kwargs.get("mode", "constant")
            value = args[3] if len(args) > 3 else node.kwargs.get("value")
            if mode != "constant":
                return None
        else:
            value = args[2] if len(args) > 2 else 0
        wanted = 2 * (rank - 1 - dim)
        if any(pads[:wanted]) or any(pads[wanted + 2 :]) or len(pads) < wanted + 2:
            return None
        if pads[wanted : wanted + 2] not in ([0, 1], [1, 0]):
            return None
        return args[0], float(value or 0), pads[wanted] == 1
    return None


def _constant_or_node(node: fx.Node) -> fx.Node | float:
    constant = constant_value(node)
    return node if constant is None else constant


# From softmax to the product with the value.


@dataclass
class WeightWalk:
    """The way from softmax to the product with the value.

    Attributes:
        weights: the operand of the product.
        product: the product.
        dropout: the probability of dropping a weight.
        mods: the operations on the weights, in order.
        nan_to_zero: NaN among the weights is replaced by zero.
        nodes: the nodes on the way.
    """

    weights: fx.Node
    product: Product = field(default=None)  # type: ignore[assignment]
    dropout: float = 0.0
    mods: list[WeightMod] = field(default_factory=list)
    nan_to_zero: bool = False
    nodes: list[fx.Node] = field(default_factory=list)


def follow_weights(softmax: Softmax, layout: Layout, sink_dim: tuple[Dim, Dim, bool] | None) -> list[WeightWalk]:
    """Follows the weights to the products with a value; usually there is one.

    Args:
        softmax: the softmax.
        layout: the layout of the weights.
        sink_dim: the dimension of keys with the sink, the same without it, and whether the sink comes first. A slice
            must drop the sink on the way. None if the weights have no column for a sink.

    Raises:
        NotAttention: an operation on the way cannot be read.
    """
    return _follow(softmax.node, WeightWalk(softmax.node), softmax, layout, sink_dim)


def _follow(
    node: fx.Node, walk: WeightWalk, softmax: Softmax, layout: Layout, sink_dim: tuple[Dim, Dim, bool] | None
) -> list[WeightWalk]:
    """The walks from ``node`` on, after ``walk``; if none reaches a product, raises the reason at the nearest one."""
    users = [user for user in node.users if user.op != "output" and user not in softmax.nodes]
    tests = [user for user in users if user.target is aten.isnan.default]
    users = [user for user in users if user not in tests]
    if not users:
        raise NotAttention(
            "the attention weights are returned, and fused kernels never store them: turn that off "
            "(output_attentions=False, need_weights=False)",
            node,
        )
    walks: list[WeightWalk] = []
    reasons: dict[fx.Node, NotAttention] = {}
    for user in users:
        try:
            with blaming(user):
                walks += _walks_past(user, node, walk, softmax, layout, sink_dim, tests)
        except NotAttention as reason:
            reasons[user] = reason
    if not walks:
        raise reasons[min(reasons, key=lambda user: steps_to_product(user, lambda each: each.users))]
    return walks


def _walks_past(
    user: fx.Node,
    node: fx.Node,
    walk: WeightWalk,
    softmax: Softmax,
    layout: Layout,
    sink_dim: tuple[Dim, Dim, bool] | None,
    tests: Sequence[fx.Node],
) -> list[WeightWalk]:
    """The walks that ``user`` ends or continues, one of those that read ``node``."""
    product = _product_with_value(user, node, layout)
    if product is not None:
        if sink_dim is not None:
            raise NotAttention("the column of the weights for the attention sink is multiplied with the value")
        return [replace(walk, weights=node, product=product, nodes=[*walk.nodes, *product.nodes[:-1]])]
    if not _may_pass(user, node):
        raise NotAttention(_unreadable(user))
    further = replace(walk, mods=[*walk.mods], nodes=[*walk.nodes, *tests, user])
    if sink_dim is not None and user.target is aten.slice.Tensor:
        return _follow(user, further, softmax, _without_sink(user, layout, sink_dim), None)
    behind = _step(user, node, layout, further, softmax, sink_dim)
    known = len(walk.mods)
    further.mods[known:] = [replace(mod, written_at=user) for mod in further.mods[known:]]
    return _follow(user, further, softmax, behind, sink_dim)


def _product_with_value(user: fx.Node, node: fx.Node, layout: Layout) -> Product | None:
    """The product with the value that ``user`` is, or that it is ``a * b`` of in ``(a * b).sum(dim)``; else None."""
    found = user if is_product(user) else None
    if found is None and product_of_factor(user) is not None and _sums_keys(user, node):
        found = product_of_factor(user)
    if found is None:
        return None
    product = product_from_operand(found, node, layout)
    if product is None:
        raise NotAttention("the dimensions of the product with the value cannot be matched with those of the weights")
    return product


_FILLS = MASKED_FILL_OPS | {aten.index_put.default}
_PASSING = {aten.dropout.default, aten.slice.Tensor, aten.nan_to_num.default} | _FILLS | WHERE_OPS | MUL_OPS | DIV_OPS


def _sums_keys(factor: fx.Node, weights: fx.Node) -> bool:
    """Whether ``a * b`` in ``(a * b).sum(dim)`` broadcasts the weights, as over the features of the value."""
    other = factor.args[1] if factor.args[0] is weights else factor.args[0]
    return is_tensor(other) and any(same(size, 1) for size in tensor(weights).shape)


def _may_pass(user: fx.Node, node: fx.Node) -> bool:
    if user.target in DIV_OPS and user.args[0] is not node:
        return False
    return is_cast(user) or is_layout_op(user) or user.target in _PASSING


def _step(
    user: fx.Node,
    node: fx.Node,
    layout: Layout,
    walk: WeightWalk,
    softmax: Softmax,
    sink_dim: tuple[Dim, Dim, bool] | None,
) -> Layout:
    """The layout of the weights after ``user``, whose effect is added to ``walk``."""
    args: Any = user.args
    target: Any = user.target
    if (
        target is not aten.slice.Tensor
        and not is_layout_op(user)
        and not same_shape(tensor(user).shape, tensor(node).shape)
    ):
        raise NotAttention(f"{node_in_words(user)} expands the attention weights to a larger shape")
    if tensor(user).dtype.is_complex:
        raise NotAttention(f"{node_in_words(user)} computes the attention weights in {dtype_name(tensor(user).dtype)}")
    if target is aten.dropout.default:
        if args[2] and args[1] > 0:
            if walk.dropout:
                raise NotAttention("dropout is applied to the weights twice")
            walk.dropout = float(args[1])
        return layout
    if is_cast(user):
        if tensor(user).dtype not in FLOATING:
            raise NotAttention(f"the attention weights are cast to {dtype_name(tensor(user).dtype)}")
        return layout
    if is_layout_op(user):
        pushed = push(user, layout)
        if pushed is None or set(axes_of(pushed)) != set(axes_of(layout)):
            raise NotAttention(
                f"{node_in_words(user)} mixes the dimensions of the attention weights, so that queries, keys and heads "
                "cannot be told apart"
            )
        return pushed
    if target is aten.nan_to_num.default:
        nan = args[1] if len(args) > 1 else user.kwargs.get("nan")
        if nan not in (None, 0, 0.0):
            raise NotAttention(f"{node_in_words(user)} replaces NaN in the weights by a number other than zero")
        _replace_nan(user, walk)
        return layout
    if target in WHERE_OPS or (target in _FILLS and args[0] is node):
        _set_to_zero(user, node, layout, walk, softmax, sink_dim)
        return layout
    if target in MUL_OPS or target in DIV_OPS:
        other = args[1] if args[0] is node else args[0]
        if other is node or user.kwargs.get("rounding_mode") is not None:
            raise NotAttention(f"{node_in_words(user)} combines the weights with themselves, or rounds them")
        walk.mods.append(_factor(other, user, layout))
        return layout
    raise NotAttention(_unreadable(user))


def _set_to_zero(
    user: fx.Node,
    node: fx.Node,
    layout: Layout,
    walk: WeightWalk,
    softmax: Softmax,
    sink_dim: tuple[Dim, Dim, bool] | None,
) -> None:
    """Adds to ``walk`` that ``user`` sets weights to zero."""
    args: Any = user.args
    if user.target not in WHERE_OPS:
        _require_zero(args[2], user)
        if user.target is aten.index_put.default:
            walk.mods.append(Zero(assigned_mask(user, layout)))
        elif not _replaces_nan(args[1], True, user, node, layout, walk, softmax, sink_dim):
            walk.mods.append(Zero(_aligned(args[1], user, layout)))
        return
    kept_first = args[1] is node
    if args[0] is node or kept_first == (args[2] is node):
        raise NotAttention(f"{node_in_words(user)} has the weights as its condition or as both of its values")
    _require_zero(args[2] if kept_first else args[1], user)
    if not _replaces_nan(args[0], not kept_first, user, node, layout, walk, softmax, sink_dim):
        walk.mods.append(Zero(_aligned(args[0], user, layout), invert=kept_first))


def _replaces_nan(
    condition: Any,
    holds: bool,
    user: fx.Node,
    node: fx.Node,
    layout: Layout,
    walk: WeightWalk,
    softmax: Softmax,
    sink_dim: tuple[Dim, Dim, bool] | None,
) -> bool:
    """Whether ``user`` sets weights to zero where they are NaN, or where no score of the row is above minus infinity.

    Args:
        condition: where it sets them; with ``holds`` false, where it leaves them as they are.
    """
    if holds and is_tensor(condition) and condition.target is aten.isnan.default and condition.args[0] is node:
        _replace_nan(user, walk)
        return True
    # With a sink no row is empty; without a maximum, with masks on exponentials and after a cast, others are NaN, too.
    narrowed = is_narrower(tensor(softmax.node).dtype, tensor(softmax.scores).dtype)
    if softmax.sink is not None or sink_dim is not None or softmax.underflows or softmax.fills or narrowed:
        return False
    rows = EmptyRows(softmax.node, softmax.scores, softmax.layout, softmax.dim)
    nodes = rows.nodes_of(condition, _aligned(condition, user, layout).layout, holds)
    if nodes is None:
        return False
    _replace_nan(user, walk)
    walk.nodes += nodes
    return True


def _replace_nan(user: fx.Node, walk: WeightWalk) -> None:
    if any(isinstance(mod, Scale) for mod in walk.mods):
        raise NotAttention(f"{node_in_words(user)} replaces NaN that scaling the weights may have made")
    walk.nan_to_zero = True


def _unreadable(user: fx.Node) -> str:
    """The reason to keep an attention whose weights go through ``user``, which is not understood."""
    return (
        f"{node_in_words(user)} lies between softmax and the product with the value, and is not an operation on "
        "weights that can be rewritten"
    )


def _factor(other: Any, user: fx.Node, layout: Layout) -> WeightMod:
    """The modification of the weights by a factor: masks of zeros and ones set weights to zero."""
    divide = user.target in DIV_OPS
    if not is_tensor(other):
        return Scale(other, divide)
    operand = _aligned(other, user, layout)
    if not divide and possible_values(other) <= {0.0, 1.0} and constant_value(other) is None:
        return Zero(operand, invert=True, multiplied=True)
    return Scale(operand, divide)


def _aligned(other: Any, user: fx.Node, layout: Layout) -> Operand:
    own = broadcast(layout, tensor(user).shape, tensor(other).shape) if is_tensor(other) else None
    if own is None:
        raise NotAttention(
            f"an operand of {node_in_words(user)} may not broadcast to the attention weights for every size"
        )
    return Operand(other, own)


def _require_zero(value: Any, user: fx.Node) -> None:
    if constant_value(value) != 0:
        raise NotAttention(f"{node_in_words(user)} replaces attention weights by a value other than zero")


def _without_sink(user: fx.Node, layout: Layout, sink_dim: tuple[Dim, Dim, bool]) -> Layout:
    """The layout of the weights after ``user``, a slice that must drop exactly the sink's column."""
    with_sink, keys, first = sink_dim
    args: Any = user.args
    dim = (args[1] if len(args) > 1 else 0) % len(layout)
    size: Size = tensor(user).shape[dim]
    before: Size = tensor(args[0]).shape[dim]
    start = args[2] if len(args) > 2 else None
    step = args[4] if len(args) > 4 else 1
    starts_right = start == 1 if first else start in (None, 0)
    if resolve((layout[dim],)) != resolve((with_sink,)) or step != 1 or not starts_right:
        raise NotAttention(f"{node_in_words(user)} takes a slice of the attention weights")
    if not same(size, size_of(keys)) or not same(before - 1, size):
        raise NotAttention(f"{node_in_words(user)} takes a slice of the attention weights")
    return (*layout[:dim], keys, *layout[dim + 1 :])
