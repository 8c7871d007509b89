"""Score modifications: the operations of a graph between the product of query and key and softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.values import (
    ABSORBING,
    ORDINARY,
    UNDERFLOW,
    constant_value,
    is_far_below,
    number_of,
    possible_values,
)
from attnrewrite.ir.axes import Axis, Dim, Layout, Operand, axes_of, broadcast, resolve
from attnrewrite.ir.bounds import AROUND_SOFTMAX
from attnrewrite.ir.nodes import dtype_name, is_tensor, same_shape, scalar, tensor
from attnrewrite.ir.ops import ADD_OPS, CLAMP_OPS, DIV_OPS, MASKED_FILL_OPS, MUL_OPS, SUB_OPS, WHERE_OPS, is_cast
from attnrewrite.ir.products import Product, is_product, product_from_result
from attnrewrite.ir.rounding import as_stored
from attnrewrite.ir.site import Bias, Elementwise, Fill, Floor, Narrow, NotAttention, Scale, ScoreMod, Shift, blaming
from attnrewrite.ir.source import source_location
from attnrewrite.ir.views import is_layout_op, pull, push
from attnrewrite.torch_private import operator_name

__all__ = [
    "BOUNDED",
    "FLOATING",
    "ScoreWalk",
    "assigned_mask",
    "bounds_of",
    "is_narrower",
    "leads_to_product",
    "node_in_words",
    "read_scores",
    "row_maximum",
    "sources_of_scores",
    "steps_to_product",
]

aten = torch.ops.aten

_ELEMENTWISE = frozenset(
    {
        aten.tanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.relu.default,
        aten.abs.default,
        aten.sigmoid.default,
        aten.nan_to_num.default,
    }
)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that attention is computed in."""

_UNARY = _ELEMENTWISE | MASKED_FILL_OPS | {aten.index_put.default, aten.neg.default}
_BINARY = ADD_OPS | SUB_OPS | MUL_OPS | DIV_OPS | {aten.rsub.Scalar}


@dataclass(frozen=True)
class ScoreWalk:
    """The way from the product of query and key to softmax.

    Attributes:
        product: the product of query and key.
        mods: the operations on the scores, in order.
        nodes: the nodes on the way, in order.
    """

    product: Product
    mods: tuple[ScoreMod, ...]
    nodes: tuple[fx.Node, ...]


def leads_to_product(node: Any, memo: dict[fx.Node, bool]) -> bool:
    """Whether a walk back from ``node`` through operations on scores reaches a matrix product; ``memo`` caches."""
    if not is_tensor(node) or node.op != "call_function":
        return False
    if node not in memo:
        memo[node] = False
        memo[node] = is_product(node) or any(leads_to_product(arg, memo) for arg in sources_of_scores(node))
    return memo[node]


def sources_of_scores(node: fx.Node) -> list[Any]:
    """The arguments of ``node`` that may be the scores; empty if it is not an operation on scores."""
    args: Any = node.args
    target: Any = node.target
    if is_cast(node) or is_layout_op(node) or target in _UNARY:
        return [args[0]]
    if target in _BINARY or target is aten.maximum.default:
        return [args[0]] if target in DIV_OPS or target is aten.rsub.Scalar else [args[0], args[1]]
    if target in WHERE_OPS:
        return [args[1], args[2]]
    return []


@dataclass(frozen=True)
class _WalkContext:
    """The arguments of :func:`read_scores` that stay the same along the walk."""

    memo: dict[fx.Node, bool]
    key_axes: tuple[Axis, ...]
    accepts: Callable[[Product], object]
    sink: bool


def read_scores(
    node: fx.Node,
    layout: Layout,
    memo: dict[fx.Node, bool],
    key_axes: tuple[Axis, ...],
    accepts: Callable[[Product], object],
    sink: bool = False,
) -> ScoreWalk:
    """Walks back from the argument of softmax to the product of query and key.

    If two terms of a sum are products (relative positions added to the scores), the one whose operands share more axes
    is the product of query and key, and the other is a bias.

    Args:
        node: the argument of softmax.
        layout: its layout.
        memo: the cache of :func:`leads_to_product`.
        key_axes: the axes that softmax runs over.
        accepts: raises NotAttention for a product that is not of query and key.
        sink: softmax has an attention sink, so that a number added to all scores matters.

    Raises:
        NotAttention: an operation on the way cannot be read as a function of the scores.
    """
    return _walk(node, layout, _WalkContext(memo, key_axes, accepts, sink), plain=True, bare=not sink)


def _walk(node: fx.Node, layout: Layout, context: _WalkContext, plain: bool, bare: bool) -> ScoreWalk:
    """
    Args:
        plain: only sums, scales and masks lie between ``node`` and softmax, so a constant of a row cancels.
        bare: only views and casts do.
    """
    if is_product(node):
        with blaming(node):
            return _walk_from_product(node, layout, context)
    if bare and _bounds_nothing(node, layout, context):
        source: Any = node.args[0]
        walk = _walk(source, layout, context, plain, bare)
        return replace(walk, nodes=(*walk.nodes, node))
    sources = [arg for arg in dict.fromkeys(sources_of_scores(node)) if leads_to_product(arg, context.memo)]
    if not sources:
        stopping = _stopping(node)
        raise NotAttention(
            f"{node_in_words(stopping)} lies between softmax and the product of query and key, and is not an "
            "operation on scores that can be rewritten",
            stopping,
        )
    walks: list[ScoreWalk] = []
    reasons: list[NotAttention] = []
    for source in sources:
        try:
            with blaming(node):
                mods, extra = _read_step(node, source, layout, context, plain)
                before = _step_back(node, source, layout)
            mods = [replace(mod, written_at=node) for mod in mods]
            still_plain = plain and all(_keeps_constants(mod, context) for mod in mods)
            still_bare = bare and all(isinstance(mod, Narrow) for mod in mods)
            walk = _walk(source, before, context, still_plain, still_bare)
        except NotAttention as reason:
            reasons.append(reason)
        else:
            walks.append(ScoreWalk(walk.product, (*walk.mods, *reversed(mods)), (*walk.nodes, *extra, node)))
    if not walks:
        raise reasons[0]
    return max(walks, key=lambda walk: len({*walk.product.lhs.axes} & {*walk.product.rhs.axes}))


def _bounds_nothing(node: fx.Node, layout: Layout, context: _WalkContext) -> bool:
    """Whether ``node`` bounds scores less their row's maximum where softmax sees no difference.

    The highest of them is zero, and what lies below the lower bound has a weight of zero on both sides of it.
    """
    current: Any = node
    while is_tensor(current) and current.target in CLAMP_OPS:
        low, high = bounds_of(current)
        if not (low is None or (isinstance(low, (int, float)) and low <= UNDERFLOW)):
            return False
        if not (high is None or (isinstance(high, (int, float)) and high >= 0)):
            return False
        current = current.args[0]
    if current is node or not is_tensor(current) or current.target not in SUB_OPS or current.kwargs:
        return False
    scores, maximum = current.args[:2]
    if not is_tensor(scores) or not same_shape(tensor(scores).shape, tensor(current).shape):
        return False
    return row_maximum(maximum, scores, layout, context, own_row=True) is not None


def bounds_of(node: fx.Node) -> tuple[Any, Any]:
    """The lowest and the highest number that one of ``CLAMP_OPS`` gives; None for no bound."""
    args: Any = node.args
    if node.target is aten.clamp.default:
        low = args[1] if len(args) > 1 else node.kwargs.get("min")
        return low, args[2] if len(args) > 2 else node.kwargs.get("max")
    return (args[1], None) if node.target is aten.clamp_min.default else (None, args[1])


def _stopping(node: fx.Node) -> fx.Node:
    """The node at which the walk back from ``node`` to a product ends, since it is no operation on scores.

    Of the arguments that may be the scores, the walk follows that to which a product is nearest: others are masks.
    """
    while True:
        sources = [arg for arg in sources_of_scores(node) if is_tensor(arg)]
        distances = {source: steps_to_product(source, lambda each: each.all_input_nodes) for source in sources}
        nearest = min(distances, key=lambda arg: distances[arg], default=None)
        if nearest is None or math.isinf(distances[nearest]):
            return node
        node = nearest


def steps_to_product(node: fx.Node, neighbors: Callable[[fx.Node], Iterable[fx.Node]]) -> float:
    """The number of steps from ``node`` to the nearest matrix product; infinity if none is near."""
    steps = {node: 0}
    for each in (pending := [node]):
        if is_product(each):
            return steps[each]
        for other in neighbors(each):
            # The bound is not reported: it decides which step a reason names, and not what is found.
            if other not in steps and len(steps) < AROUND_SOFTMAX.most:
                steps[other] = steps[each] + 1
                pending.append(other)
    return math.inf


def _keeps_constants(mod: ScoreMod, context: _WalkContext) -> bool:
    """Whether a number added to a whole row before ``mod`` is still cancelled by softmax after it."""
    if isinstance(mod, Scale) and isinstance(mod.factor, Operand):
        if possible_values(mod.factor.node) <= {0.0, 1.0}:
            return True  # A mask, if large negative numbers are added where it is zero; else `canonicalize` refuses it.
        return not set(mod.factor.axes) & {leaf for axis in context.key_axes for leaf in axis.leaves()}
    if isinstance(mod, Fill):
        return is_far_below(mod.value, mod.dtype)
    return not isinstance(mod, Elementwise)


def _walk_from_product(node: fx.Node, layout: Layout, context: _WalkContext) -> ScoreWalk:
    """The walk's end at the product ``node``, whose factor and addend are the first modifications."""
    product = product_from_result(node, layout)
    if tensor(node).dtype not in FLOATING:
        dtype = dtype_name(tensor(node).dtype)
        raise NotAttention(f"{node_in_words(node)} computes the scores in {dtype}, not in a floating-point dtype")
    if product is None:
        raise NotAttention(
            f"the dimensions of an operand of {node_in_words(node)} cannot be matched with those of the scores"
        )
    context.accepts(product)
    mods: list[ScoreMod] = []
    if product.scale is not None:
        mods.append(Scale(product.scale))
    if not (scalar(product.factor) and product.factor == 1):
        mods.append(Scale(_factor(product.factor)))
    if product.addend is not None:
        if _number(product.addend_factor, node) == 0:
            raise NotAttention(f"what {node_in_words(node)} adds counts for nothing, and has a gradient of zeros")
        mods.append(Bias(product.addend, tensor(node).dtype, _number(product.addend_factor, node)))
    return ScoreWalk(product, tuple(replace(mod, written_at=node) for mod in mods), product.nodes)


def _step_back(node: fx.Node, source: fx.Node, layout: Layout) -> Layout:
    """The layout of the scores in ``source``, given that in ``node``."""
    if is_layout_op(node):
        before = pull(node, layout)
        if before is None or set(axes_of(before)) != set(axes_of(layout)):
            raise NotAttention(
                f"{node_in_words(node)} mixes the dimensions of the scores, so that queries, keys and heads cannot be "
                "told apart"
            )
        return before
    if is_cast(node):
        return layout
    before = broadcast(layout, tensor(node).shape, tensor(source).shape)
    if before is None or set(axes_of(before)) != set(axes_of(layout)):
        raise NotAttention(f"{node_in_words(node)} expands the scores to a larger shape")
    return before


_Step = tuple[list[ScoreMod], tuple[fx.Node, ...]]


def _read_step(node: fx.Node, source: fx.Node, layout: Layout, context: _WalkContext, plain: bool) -> _Step:
    """The modifications by ``node``, last one first, and the other nodes that only they use (the row's maximum)."""
    args: Any = node.args
    target: Any = node.target
    if is_cast(node):
        _refuse_lossy_cast(node)
        narrower = is_narrower(tensor(node).dtype, tensor(source).dtype)
        return [Narrow(tensor(node).dtype)] if narrower else [], ()
    if is_layout_op(node):
        return [], ()
    dtype = tensor(node).dtype
    if dtype.is_complex:
        raise NotAttention(f"{node_in_words(node)} computes the scores in {dtype_name(dtype)}")
    if target in _ELEMENTWISE or target is aten.maximum.default:
        return [_clamp_or_function(node, source)], ()
    if target is aten.neg.default:
        return [Scale(-1.0)], ()
    if target in MASKED_FILL_OPS:
        return [Fill(_aligned(args[1], node, layout), as_stored(_fill_value(args[2], node), dtype), dtype)], ()
    if target is aten.index_put.default:
        return [_index_put(node, layout)], ()
    if target in WHERE_OPS:
        if args[0] is source or (args[1] is source) == (args[2] is source):
            raise NotAttention(f"{node_in_words(node)} has the scores as its condition or as both of its values")
        kept_first = args[1] is source
        other = args[2] if kept_first else args[1]
        value = as_stored(_fill_value(other, node), dtype)
        return [Fill(_aligned(args[0], node, layout), value, dtype, invert=kept_first)], ()
    first = args[0] is source
    other = args[1] if first else args[0]
    if len(args) > 1 and args[0] is args[1]:
        raise NotAttention(f"{node_in_words(node)} combines the scores with themselves")
    if node.kwargs.get("rounding_mode") is not None or len(args) > 2:
        raise NotAttention(f"{node_in_words(node)} rounds the scores")
    alpha = _number(node.kwargs.get("alpha", 1), node)
    if target is aten.rsub.Scalar:
        return [*_shift(other, node, context, plain), Scale(-alpha)], ()
    if target in ADD_OPS or target in SUB_OPS:
        sign = alpha if target in ADD_OPS else -alpha
        if alpha == 1 and plain and not context.sink:
            own = broadcast(layout, tensor(node).shape, tensor(source).shape)
            found = _shift_by_own_row(node, source, own, context)
            if found is not None:
                return found
        if not is_tensor(other):
            steps = _shift(
                _number(other, node) * alpha if isinstance(other, (int, float)) else other, node, context, plain
            )
        else:
            steps = [Bias(_aligned(other, node, layout), dtype, sign if first else 1.0)]
        # a - alpha * scores: the scores are negated first, so that comes last here.
        return (steps if first or sign == 1 else [*steps, Scale(sign)]), ()
    if is_tensor(other) and tensor(other).dim() > 0:
        return [Scale(_aligned(other, node, layout), target in DIV_OPS, dtype)], ()
    return [Scale(_factor(other), target in DIV_OPS, dtype)], ()


def _shift(number: Any, node: fx.Node, context: _WalkContext, plain: bool) -> list[ScoreMod]:
    """The modification by a number of ordinary size that is added to all scores of a row, and that softmax cancels."""
    if not plain or context.sink or not isinstance(number, (int, float)) or not abs(number) <= ORDINARY:
        raise NotAttention(
            f"{node_in_words(node)} adds a number to the scores that softmax does not cancel: it is symbolic or above "
            f"{ORDINARY:g}, or a function of the scores or an attention sink follows"
        )
    return [Shift()]


def _clamp_or_function(node: fx.Node, source: fx.Node) -> ScoreMod:
    """The modification by ``maximum``, ``clamp`` and the like: a floor far below, or any function of one score."""
    args: Any = node.args
    if node.target is aten.maximum.default:
        low = constant_value(args[1] if args[0] is source else args[0])
        if low is None:
            raise NotAttention(
                f"{node_in_words(node)} takes the maximum of the scores and a tensor that is not constant"
            )
        high = None
    else:
        low, high = bounds_of(node) if node.target in CLAMP_OPS else (None, math.inf)
    lowest = torch.finfo(tensor(node).dtype).min  # Which lifts nothing but minus infinity, also in float16.
    if high is None and isinstance(low, (int, float)) and low <= max(ABSORBING, lowest):
        return Floor(as_stored(float(low), tensor(node).dtype), tensor(node).dtype)
    if any(isinstance(arg, fx.Node) for arg in args[1:]) or any(isinstance(a, fx.Node) for a in node.kwargs.values()):
        raise NotAttention(
            f"{node_in_words(node)} applies a function to the scores whose other arguments are not plain numbers"
        )
    numbers = [*args[1:], *node.kwargs.values()]
    if node.target is aten.nan_to_num.default and not all(n is None or math.isfinite(n) for n in numbers):
        raise NotAttention(f"{node_in_words(node)} puts infinities or NaN in the place of scores")
    return Elementwise(node)


def _index_put(node: fx.Node, layout: Layout) -> Fill:
    """The modification by ``scores[mask] = value``."""
    dtype = tensor(node).dtype
    return Fill(assigned_mask(node, layout), as_stored(_fill_value(node.args[2], node), dtype), dtype)


def assigned_mask(node: fx.Node, layout: Layout) -> Operand:
    """The mask of ``x[mask] = number`` or ``x[:, mask] = number``, where ``x`` has the layout ``layout``.

    Raises:
        NotAttention: the assignment is another.
    """
    args: Any = node.args
    indices = [*args[1]]
    places = [place for place, index in enumerate(indices) if index is not None]
    accumulate = args[3] if len(args) > 3 else node.kwargs.get("accumulate", False)
    mask: Any = indices[places[0]] if len(places) == 1 else None
    if not is_tensor(mask) or tensor(mask).dtype is not torch.bool or accumulate:
        raise NotAttention(
            f"{node_in_words(node)} assigns to the scores or weights by an index that is not one boolean mask"
        )
    first, last = places[0], places[0] + tensor(mask).dim()
    if not same_shape(tensor(mask).shape, tensor(node).shape[first:last]):
        raise NotAttention(
            f"{node_in_words(node)} assigns to the scores or weights by a mask of another shape than theirs"
        )
    return Operand(mask, layout[first:last])


def _shift_by_own_row(node: fx.Node, source: fx.Node, layout: Layout | None, context: _WalkContext) -> _Step | None:
    """The step by ``node`` if it is the sum or difference of the scores and a number made from each row of them.

    Softmax cancels such a number, and the gradients through it add up to zero. Where the row is not finite it may not
    be: max - scores is infinite beside a score of minus infinity, where scores - max has a weight of zero.
    """
    args: Any = node.args
    first = args[0] is source
    subtracts = node.target in SUB_OPS
    negated = subtracts and not first
    other = args[1] if first else args[0]
    if first and subtracts:
        maximum = row_maximum(other, source, layout, context)
        if maximum is not None:
            exact = row_maximum(other, source, layout, context, own_row=True) is not None
            return [Shift(by_maximum=True, own_row=exact)], maximum
    for reductions, sign in _REDUCTIONS:
        nodes = _reduction_of_row(
            other, source, layout, set(context.key_axes), reductions, _passes_finite_numbers, own_row=True
        )
        if nodes is None or any(
            is_narrower(tensor(each).dtype, tensor(source).dtype) for each in nodes if is_tensor(each)
        ):
            continue
        if sign is not None and negated is (sign < 0):
            # As scores - max, or as min - scores, which is the same of the negated scores.
            subtracted = (subtracts and first) is not _is_negated(nodes)
            scaled = any(each.target in MUL_OPS or each.target in DIV_OPS for each in nodes)
            if scaled or subtracted is negated:
                return None
            return [Shift(by_maximum=True), *[Scale(-1.0)] * negated], nodes
        return [Shift(needs_finite=True), *[Scale(-1.0)] * negated], nodes
    return None


def _is_negated(nodes: Sequence[fx.Node]) -> bool:
    return sum(node.target is aten.neg.default for node in nodes) % 2 == 1


def row_maximum(
    node: Any, scores: fx.Node, layout: Layout | None, context: _WalkContext | tuple[Axis, ...], own_row: bool = False
) -> tuple[fx.Node, ...] | None:
    """The nodes that compute ``node`` as a maximum of ``scores`` that is the same for all keys of a row; else None.

    Subtracting such a maximum does not change softmax, which subtracts one itself. It may be detached, since the
    gradients through it add up to zero.

    Args:
        node: the node that may be the maximum.
        scores: the scores that it is subtracted from.
        layout: the layout of the scores.
        context: the walk, or the axes that softmax runs over.
        own_row: only the exact maximum of each row counts, not one over several rows or a clamped one.
    """
    keys = set(context.key_axes if isinstance(context, _WalkContext) else context)

    def passes(step: fx.Node) -> bool:
        return keeps_numbers(step) or (not own_row and step.target in BOUNDED)

    return _reduction_of_row(node, scores, layout, keys, _MAXIMA, passes, own_row)


def _reduction_of_row(
    node: Any,
    scores: fx.Node,
    layout: Layout | None,
    keys: set[Axis],
    reductions: frozenset[Any],
    passes: Callable[[fx.Node], bool],
    own_row: bool,
) -> tuple[fx.Node, ...] | None:
    """The nodes that compute ``node`` from ``scores`` by one of ``reductions`` as the same for all keys of a row.

    None if it is anything else. ``passes`` says which steps may follow the reduction, besides views and detaching; with
    ``own_row`` each row has a number of its own.
    """
    if layout is None or not is_tensor(node):
        return None
    layout, keys = resolve(layout), {leaf for axis in keys for leaf in axis.leaves()}
    chain: list[fx.Node] = []
    current = node
    while current.target not in reductions:
        if current.op != "call_function" or not (
            is_layout_op(current) or current.target in _AFTER_REDUCTION or passes(current)
        ):
            return None
        if any(isinstance(arg, fx.Node) for arg in current.args[1:]):
            return None
        chain.append(current)
        current = current.args[0]
        if not isinstance(current, fx.Node):
            return None
    chain.append(current)
    reduction = current
    own = _layout_of_reduction(reduction, layout)
    if own is None:
        return None
    for step in reversed(chain[:-1]):
        if step.target is operator.getitem:
            if step.args[1] != 0:
                return None
        elif is_layout_op(step):
            pushed = push(step, own)
            if pushed is None:
                return None
            own = pushed
    source = reduction.args[0]
    while isinstance(source, fx.Node) and source is not scores:
        if not (is_cast(source) or source.target is aten.detach.default):
            return None
        chain.append(source)
        source = source.args[0]
    if source is not scores or set(axes_of(own)) & keys:
        return None
    if own_row and set(axes_of(layout)) - set(axes_of(own)) != keys:
        return None
    # Each dimension must be aligned with the same one of the scores, or broadcast. Axes that `expand` made are new.
    rows = set(axes_of(layout))
    expected = layout[len(layout) - len(own) :]
    if len(own) > len(layout) or any(
        rows.intersection(dim) and dim != other for dim, other in zip(own, expected, strict=True)
    ):
        return None
    return tuple(reversed(chain))


def _passes_finite_numbers(step: fx.Node) -> bool:
    """Whether a step behind the reduction of a row keeps finite numbers finite and infinite ones infinite."""
    if step.target in MUL_OPS or step.target in DIV_OPS:
        factor = step.args[1]
        return isinstance(factor, (int, float)) and 2**-20 <= factor <= 2**20 and not step.kwargs
    return step.target is aten.neg.default or (is_cast(step) and tensor(step).dtype in FLOATING)


_AFTER_REDUCTION = (aten.detach.default, operator.getitem)
BOUNDED = (aten.clamp.default, aten.clamp_min.default, aten.nan_to_num.default, aten.relu.default)
_MAXIMA = frozenset({aten.amax.default, aten.max.dim, aten.max.default})
_REDUCTIONS: tuple[tuple[frozenset[Any], int | None], ...] = (
    (frozenset({aten.amax.default, aten.max.dim, aten.logsumexp.default}), 1),
    (frozenset({aten.amin.default, aten.min.dim}), -1),
    (frozenset({aten.mean.dim, aten.sum.dim_IntList}), None),
)
"""Reductions of a row, each with the sign of the scores for which a finite result does not say that all are finite."""


def _layout_of_reduction(reduction: fx.Node, layout: Layout) -> Layout | None:
    """The layout of a reduction of scores with ``layout``."""
    args: Any = reduction.args
    if reduction.target is aten.max.default:
        return ()
    dims = args[1] if len(args) > 1 else ()
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    reduced = {dim % len(layout) for dim in dims} or set(range(len(layout)))
    keep = bool(args[2]) if len(args) > 2 else bool(reduction.kwargs.get("keepdim"))
    result: list[Dim] = []
    for position, dim in enumerate(layout):
        if position not in reduced:
            result.append(dim)
        elif keep:
            result.append(())
    return tuple(result)


def keeps_numbers(node: fx.Node) -> bool:
    """Whether the node is a cast between floating dtypes that keeps every number as it is."""
    if not is_cast(node):
        return False
    dtype, source = tensor(node).dtype, tensor(node.args[0]).dtype
    return dtype.is_floating_point and source.is_floating_point and not is_narrower(dtype, source)


def is_narrower(dtype: torch.dtype, source: torch.dtype) -> bool:
    return torch.promote_types(dtype, source) is not dtype


def _refuse_lossy_cast(node: fx.Node) -> None:
    """Refuses casts of the scores that may change more than rounding: to integers, to float8."""
    source, dtype = tensor(node.args[0]).dtype, tensor(node).dtype
    if source is not dtype and (dtype not in FLOATING or source not in FLOATING):
        raise NotAttention(
            f"{node_in_words(node)} casts the scores from {dtype_name(source)} to {dtype_name(dtype)}, which may "
            "change more than their rounding"
        )


def _aligned(other: Any, node: fx.Node, layout: Layout) -> Operand:
    """A tensor that is combined with the scores in ``node``, with its layout."""
    if not is_tensor(other):
        raise NotAttention(f"the mask of {node_in_words(node)} is not a tensor")
    own = broadcast(layout, tensor(node).shape, tensor(other).shape)
    if own is None:
        raise NotAttention(f"an operand of {node_in_words(node)} may not broadcast to the scores for every size")
    return Operand(other, own)


def _fill_value(value: Any, node: fx.Node) -> float:
    constant = number_of(value)
    if constant is None:
        raise NotAttention(f"the value that {node_in_words(node)} fills in is not a constant; pass a Python number")
    if math.isnan(constant):
        raise NotAttention(f"{node_in_words(node)} fills in NaN")
    return constant


def _number(value: Any, node: fx.Node) -> float:
    if not isinstance(value, (int, float)):
        raise NotAttention(f"alpha or beta of {node_in_words(node)} is not a plain number")
    return float(value)


def _factor(value: Any) -> float | fx.Node:
    constant = constant_value(value)
    return value if constant is None else constant


def node_in_words(node: fx.Node) -> str:
    """An operator in the words of the report: its name and the source line that called it."""
    name = "the output of the graph" if node.op == "output" else operator_name(node.target)
    where = source_location(node)
    return f"{name} ({where.code!r}, {where})" if where else name
