r"""Softmax attention, written out.

    scores = query @ key^T                      (..., query length, key length)
    scores = mods(scores)                       scale, bias, mask, in any order
    weights = dropout(softmax(scores, key length))
    result = weights @ value

The rule starts at a softmax and reads in both directions. Forward, past casts, dropout and views, it must come to one
matrix product that contracts exactly the axis that softmax ran over. Backward, past what is done to the scores, it
must come to a matrix product in which that axis belongs to one operand alone: that operand is the key. Any spelling of
a product, of a view and of a mask will do, since products are read as einsums over axes and views as layouts.

Where something else reads the weights or the scores they must exist in memory, and the site is kept as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from attnrewrite.analysis.scores import ScoreWalk, is_narrower, leads_to_product, node_in_words, read_scores
from attnrewrite.analysis.values import ORDINARY, Range, is_ordinary, possible_values
from attnrewrite.analysis.weights import Softmax, WeightWalk, every_softmax, follow_weights, split_sink
from attnrewrite.ir.axes import Axis, Dim, Layout, Operand, axes_of
from attnrewrite.ir.bounds import AROUND_SOFTMAX, searching
from attnrewrite.ir.finding import Finding, NearMiss
from attnrewrite.ir.graph_view import GraphView, reader_in_words
from attnrewrite.ir.model_state import is_learned
from attnrewrite.ir.nodes import dtype_name, is_tensor, same, tensor
from attnrewrite.ir.ops import CONVOLUTION_OPS, NORM_OPS
from attnrewrite.ir.products import Product, is_product
from attnrewrite.ir.site import AttentionSite, Bias, Narrow, NotAttention, Scale, WeightMod, Zero, blaming
from attnrewrite.ir.source import source_location
from attnrewrite.ir.views import peel, push
from attnrewrite.patterns.base import Specimen
from attnrewrite.patterns.softmax.graph_breaks import cut_before, cut_behind
from attnrewrite.patterns.softmax.specimens import SPECIMENS

__all__ = ["PATTERN"]

aten = torch.ops.aten


class SoftmaxAttention:
    name = "softmax"
    precedence = 20

    @property
    def specimens(self) -> tuple[Specimen, ...]:
        return SPECIMENS

    def find(self, view: GraphView) -> Iterator[Finding]:
        readings: list[_FoundSite] = []
        for softmax in every_softmax(view.graph):
            with searching() as ended:
                between = _between_products(softmax, view)
            if not between:
                cut = _cut(softmax, view)
                if cut:
                    yield NearMiss(self.name, softmax.node, cut, (softmax.node,))
                continue
            try:
                readings += self._read_all(softmax, view)
            except NotAttention as reason:
                yield NearMiss(self.name, softmax.node, ended.added_to(str(reason)), (softmax.node,), reason.node)
        yield from _served(readings, view)

    def _read_all(self, softmax: Softmax, view: GraphView) -> list[_FoundSite]:
        """A reading for each product that the weights go into."""
        layout = softmax.layout
        key_dim = layout[softmax.dim]
        split = split_sink(softmax, key_dim)
        sink_dim = None
        if not key_dim and softmax.sink is not None:
            raise NotAttention("softmax runs over a single key and a sink")
        if split is not None:
            softmax, keys, sink_first = split
            if not keys:
                raise NotAttention("softmax runs over a single key and a sink")
            sink_dim = (key_dim, keys, sink_first)
            key_dim = keys
        walks = follow_weights(softmax, layout, sink_dim)
        if softmax.late is not None:
            # The same exponentials may go into other products, which are divided elsewhere.
            divided = softmax.late_views[0] if softmax.late_views else softmax.late
            walks = [walk for walk in walks if walk.product.node is divided.args[0]]
            if not walks:
                raise NotAttention("the product of exponentials and value that is divided by their sum cannot be read")
        scores = read_scores(
            softmax.scores,
            (*layout[: softmax.dim], key_dim, *layout[softmax.dim + 1 :]),
            view.leads_to_product,
            axes_of((key_dim,)),
            accepts=lambda product: _query_and_key(product, axes_of((key_dim,))),
            sink=softmax.sink is not None,
        )
        if len({walk.product.node for walk in walks}) < len(walks):
            raise NotAttention("the attention weights are multiplied with themselves, so they must exist in memory")
        readings: list[_FoundSite] = []
        reasons: list[NotAttention] = []
        for walk in walks:
            try:
                if walk.dropout and len(walks) > 1:
                    raise NotAttention("the same weights, after the same dropout, go into several products")
                readings.append(self._read(softmax, scores, walk, key_dim, view))
            except NotAttention as reason:
                reasons.append(reason)
        if not readings:
            raise reasons[0]
        return readings

    def _read(self, softmax: Softmax, scores: ScoreWalk, walk: WeightWalk, key_dim: Dim, view: GraphView) -> _FoundSite:
        product = walk.product
        result = softmax.late or product.node
        interior = view.ordered([*scores.nodes, *softmax.nodes, *walk.nodes, product.node, *softmax.late_views, result])
        result_layout = _result_layout(softmax, product)
        _require_one_grad_mode(product, interior, view)
        key_axes = axes_of((key_dim,))
        query, key = _query_and_key(scores.product, key_axes)
        value = product.rhs if product.lhs.node is walk.weights else product.lhs
        _require_contraction(product, key_axes)
        _require_no_detour(softmax)
        # Fused kernels multiply query and key with float32 accumulation, so casting them up first adds nothing, unless
        # it is to float64; weights and value are multiplied in the dtype that the source multiplies them in.
        dtype, score_dtype = tensor(product.node).dtype, tensor(scores.product.node).dtype
        if score_dtype is torch.float64:
            dtype = score_dtype
        query, key = (view.origin(operand, scores.product.node, narrow_to=dtype) for operand in (query, key))
        value = view.origin(value, product.node)
        key_axes = axes_of((key_axes,))  # Keys that were repeated along their positions have divided them.
        query_axes = _query_axes(scores, key_axes, key)
        with blaming(scores.product.node):
            _require_attention(scores.product, query, key, value, query_axes, key_axes)
        # Kernels themselves say that there is no key.
        others = {axis for operand in (query, key, value) for axis in operand.axes} - set(key_axes)
        if any(same(axis.size, 0) for axis in others):
            raise NotAttention("a dimension is empty, so there is nothing to compute")
        own_dtype = tensor(softmax.node).dtype
        narrowed = [Narrow(own_dtype)] if is_narrower(own_dtype, tensor(softmax.scores).dtype) else []
        site = AttentionSite(
            pattern=self.name,
            anchor=softmax.node,
            result=result,
            result_layout=result_layout,
            query=query.resolved(),
            key=key.resolved(),
            value=value.resolved(),
            query_axes=query_axes,
            key_axes=axes_of((key_dim,)),
            feature_axes=axes_of((scores.product.contracted,)),
            mods=(*scores.mods, *narrowed, *softmax.fills),
            softmax_dtype=own_dtype,
            score_dtype=score_dtype,
            compute_dtype=_compute_dtype(softmax, scores, product, (query, key), view),
            weight_layout=(*softmax.layout[: softmax.dim], key_dim, *softmax.layout[softmax.dim + 1 :]),
            dropout=walk.dropout,
            sink=_behind_views(softmax.sink),
            sink_is_shifted=softmax.sink_is_shifted and softmax.sink is not None,
            weight_mods=tuple(_without_copies(mod, product, view) for mod in (*walk.mods, *_scales_of(product))),
            nan_to_zero=softmax.nan_to_zero or walk.nan_to_zero,
            never_nan=softmax.nan_to_zero,
            underflows=softmax.underflows,
            rounds_rows=softmax.rounds_rows,
            differentiable=view.differentiable(product.node),
            in_autocast=view.in_autocast(product.node),
            interior=interior,
        )
        return _FoundSite(site, view.other_readers(interior), {softmax.node, *walk.nodes})


def _require_contraction(product: Product, key_axes: Sequence[Axis]) -> None:
    if set(axes_of((product.contracted,))) != set(key_axes):
        raise NotAttention(
            "the product after softmax does not contract the axis that softmax runs over, so this is no attention",
            product.node,
        )


def _require_no_detour(softmax: Softmax) -> None:
    """
    Raises:
        NotAttention: exponentials pass through a dtype that is narrower than that of the scores and of the weights.
    """
    given, own = tensor(softmax.scores).dtype, tensor(softmax.node).dtype
    for node in softmax.nodes:
        dtype = tensor(node).dtype if is_tensor(node) else own
        if dtype.is_floating_point and is_narrower(dtype, given) and is_narrower(dtype, own):
            raise NotAttention(
                f"{node_in_words(node)} computes the softmax of {dtype_name(given)} in {dtype_name(dtype)}, which may "
                "overflow or underflow",
                node,
            )


def _result_layout(softmax: Softmax, product: Product) -> Layout:
    """The dimensions of the result, which may be divided by the sum of exponentials only behind views of the product.

    Raises:
        NotAttention: no layout tells them, or the product is read before.
    """
    layout: Layout | None = product.layout
    for step in softmax.late_views:
        layout = None if layout is None else push(step, layout)
    if layout is None:
        raise NotAttention("the result is reordered in a way that is not supported")
    if softmax.late is not None and any(len(node.users) != 1 for node in (product.node, *softmax.late_views)):
        raise NotAttention("the product of exponentials and value is read before it is divided by their sum")
    return layout


def _require_one_grad_mode(product: Product, interior: Sequence[fx.Node], view: GraphView) -> None:
    for node in interior:
        if view.grad_region(node) != view.grad_region(product.node):
            raise NotAttention("grad mode is switched between the scores and the product with the value", node)


def _require_attention(
    product: Product,
    query: Operand,
    key: Operand,
    value: Operand,
    query_axes: tuple[Axis, ...],
    key_axes: tuple[Axis, ...],
) -> None:
    alone = set(query.axes) == set(axes_of((product.contracted,))) and query.node.op != "call_function"
    if alone and key.node is value.node:
        raise NotAttention("every key is scored by one and the same stored vector: this is pooling")
    if key_axes and is_learned(key.node) and tensor(key.node).dim() == 2:
        raise NotAttention("the keys are a learned matrix: this is a gate over its rows")
    if set(axes_of((query_axes,))) & set(value.axes):
        raise NotAttention("the value differs from one query position to the next, so this is no attention", value.node)


def _scales_of(product: Product) -> list[Scale]:
    """What the product with the value multiplies by, too."""
    factor = product.factor
    scales = [] if isinstance(factor, (int, float)) and factor == 1 else [Scale(factor)]
    return scales if product.scale is None else [*scales, Scale(product.scale)]


def _without_copies(mod: WeightMod, product: Product, view: GraphView) -> WeightMod:
    """``mod`` by what its operand was repeated from, if it was: what is the same for all keys moves to the output."""
    operand = mod.condition if isinstance(mod, Zero) else mod.factor
    if not isinstance(operand, Operand):
        return mod
    source = view.origin(operand, product.node, behind_widening=True).resolved()
    if len(source.axes) >= len(operand.resolved().axes):
        return mod
    return replace(mod, condition=source) if isinstance(mod, Zero) else replace(mod, factor=source)


def _compute_dtype(
    softmax: Softmax, scores: ScoreWalk, product: Product, operands: tuple[Operand, Operand], view: GraphView
) -> torch.dtype:
    """The lowest dtype in which the products may be computed; ``operands`` are query and key.

    Autocast may be on for one product and off for the other. Where it is on, the product is in the dtype of its result.
    """
    if torch.float64 in (tensor(softmax.node).dtype, tensor(softmax.scores).dtype):
        return torch.float64
    dtype, of_scores = tensor(product.node).dtype, tensor(scores.product.node).dtype
    dtypes = [of_scores] if view.in_autocast(scores.product.node) else [operand.dtype for operand in operands]
    factors = [mod.factor for mod in scores.mods if isinstance(mod, Scale) and not isinstance(mod.factor, (int, float))]
    if factors:
        # It is multiplied into query or key, and rounded there.
        dtypes.append(of_scores)
    if not all(map(_is_ordinary, factors)):
        # There it may leave the range of float16 before the product does.
        dtypes += [torch.float32] * (torch.float16 in (dtype, *dtypes))
    return _widest([dtype, *dtypes])


def _is_ordinary(factor: fx.Node | Operand) -> bool:
    node = factor.node if isinstance(factor, Operand) else factor
    # A position or a size is no number of ordinary size in float16.
    values = possible_values(node)
    return all(is_ordinary(value) and not (isinstance(value, Range) and value.largest > ORDINARY) for value in values)


@dataclass
class _FoundSite:
    """A site, and what else reads what it computes: ``weights`` are the nodes that are computed after the scores."""

    site: AttentionSite
    others: dict[fx.Node, list[fx.Node]]
    weights: set[fx.Node]


def _served(readings: list[_FoundSite], view: GraphView) -> Iterator[Finding]:
    """The sites whose scores and weights need not exist: what else reads them are other such sites."""
    # One softmax may be part of another: exponentials less their logsumexp, divided by their sum. The last is whole.
    readings = list({reading.site.result: reading for reading in readings}.values())
    accepted = list(readings)
    while True:
        own = {node for reading in accepted for node in reading.site.interior}
        taken, added = (
            {operand.node for reading in accepted for operand in operands(reading.site)}
            for operands in (_taken, _added)
        )
        # A site that takes them for its query, key, value or mask needs them as they are. Scores that it adds to its
        # own stay for that, and what follows them is fused all the same (RealFormer) where there is no backward pass,
        # which needs the weights beside them.
        left = [
            r
            for r in accepted
            if not (taken | (added if r.site.differentiable else added & r.weights)) & set(r.others)
            and all(user in own for users in r.others.values() for user in users)
        ]
        if len(left) == len(accepted):
            break
        accepted = left
    yield from (reading.site for reading in accepted)
    anchors = {reading.site.anchor for reading in accepted}
    for reading in readings:
        if any(reading is other for other in accepted) or reading.site.anchor in anchors:
            continue
        anchors.add(reading.site.anchor)
        node, users = next(iter(reading.others.items()))
        what = "the attention weights" if node in reading.weights else "the scores"
        names = ", ".join(sorted({reader_in_words(user) for user in users}))
        reason = f"{what} are read more than once ({names}), so they must exist in memory"
        if node in reading.weights and any(map(_leads_to_output, users)):
            module = getattr(source_location(reading.site.anchor), "module", "")
            reason += f" (if nobody reads them, say so: options={{'unread_weights': {module or '*'!r}}})"
        yield NearMiss("softmax", reading.site.anchor, reason, (reading.site.anchor,), _reader_of_source(users))


def _added(site: AttentionSite) -> tuple[Operand, ...]:
    return tuple(mod.operand for mod in site.mods if isinstance(mod, Bias) and not mod.scales)


def _taken(site: AttentionSite) -> tuple[Operand, ...]:
    added = _added(site)
    return site.query, site.key, site.value, *(operand for operand in site.modifiers if operand not in added)


def _reader_of_source(users: Sequence[fx.Node]) -> fx.Node:
    """The reader that a reason names: an operation of the source, if there is one."""
    return next((user for user in users if source_location(user)), users[0])


def _leads_to_output(node: fx.Node) -> bool:
    """Whether a node is the results of the graph, or is read by these alone."""
    return node.op == "output" or (bool(node.users) and all(map(_leads_to_output, node.users)))


def _behind_views(sink: Operand | float | None) -> Operand | float | None:
    """The sink as it was before it was stretched over batches and rows."""
    return peel(sink, lambda node: True)[-1].resolved() if isinstance(sink, Operand) else sink


_BARRIERS = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        *CONVOLUTION_OPS,
        *NORM_OPS,
        aten.embedding.default,
    }
)
"""Operators behind which a product has nothing to do with this softmax any more."""


def _between_products(softmax: Softmax, view: GraphView) -> bool:
    """Whether matrix products lie before and after: an attention, or a near miss that the report names.

    What the rule can read counts at any distance, so that a mask that takes many steps to make hides no attention.
    Where the search on one side ended before it found any, one on the other side is enough.
    """
    before = leads_to_product(softmax.scores, view.leads_to_product) or _product_near(
        softmax.scores, lambda node: node.all_input_nodes
    )
    if before is False:
        return False
    after = _product_near(softmax.node, lambda node: list(node.users))
    return after is not False and (before is True or after is True)


def _cut(softmax: Softmax, view: GraphView) -> str:
    """Why an attention has only one of its products here if a graph break lies within it; else empty."""
    if _product_near(softmax.node, lambda node: list(node.users)):
        return cut_before(softmax.scores)
    return cut_behind(softmax.node, view.ends_at) if leads_to_product(softmax.scores, view.leads_to_product) else ""


def _product_near(start: fx.Node, neighbors: Callable[[fx.Node], list[fx.Node]]) -> bool | None:
    """Whether there is one; None where the search ended before that is known."""
    pending, seen = [start], {start}
    for node in pending:
        for other in neighbors(node):
            if is_product(other):
                return True
            if other not in seen and other.op == "call_function" and other.target not in _BARRIERS:
                if not AROUND_SOFTMAX.allows(len(seen)):
                    return None
                seen.add(other)
                pending.append(other)
    return False


def _query_and_key(product: Product, key_axes: tuple[Axis, ...]) -> tuple[Operand, Operand]:
    lhs, rhs = set(product.lhs.axes), set(product.rhs.axes)
    keys = set(key_axes)
    if not keys and rhs > lhs:
        # Over a single key: it lacks the axis of the queries.
        query, key = product.rhs, product.lhs
    elif keys <= rhs and not keys & lhs:
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
