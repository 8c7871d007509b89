"""Builds the :class:`AttentionSite` of a call, for the patterns here and for patterns of users.

:func:`attention_site` does it in one step if all operands have one order of dimensions. Its parts serve other layouts:
:class:`Sizes` of each operand, :func:`call_axes` of all, masks over them, and :func:`site_of_call`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import Dim, Layout, Operand, broadcast, fresh_dim, fresh_layout, size_of
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import Size, dtype_name, is_tensor, same, tensor
from attnrewrite.ir.site import AttentionSite, Bias, Fill, NotAttention, Scale, ScoreMod
from attnrewrite.ir.source import source_location
from attnrewrite.torch_private import schema_of

__all__ = [
    "CallAxes",
    "Dims",
    "Sizes",
    "added_mask",
    "attention_site",
    "call_arguments",
    "call_axes",
    "mask_operand",
    "site_of_call",
]


def call_arguments(call: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by name, defaults included, as its schema has them.

    Raises:
        TypeError: ``call`` is no call of an operator with a schema (``torch.ops.<namespace>.<name>.<overload>``).
    """
    schema = schema_of(call.target)
    if schema is None:
        raise TypeError(f"{call.target} is no operator with a schema, such as torch.ops.aten.softmax.int")
    given = dict(zip((argument.name for argument in schema.arguments), call.args, strict=False))
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    return {**defaults, **given, **call.kwargs}


def attention_site(
    view: GraphView,
    *,
    pattern: str,
    anchor: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    scale: float | None,
    mask: fx.Node | None = None,
    mask_drops: bool = False,
    is_causal: bool = False,
    dropout: float = 0.0,
    length_dim: int = -2,
    grouped: bool = False,
    result: fx.Node | None = None,
    interior: Sequence[fx.Node] = (),
    compute_dtype: torch.dtype | None = None,
    empty_rows_like_sdpa: bool = False,
) -> AttentionSite:
    """The site that means ``dropout(softmax(scale * query @ key^T + mask)) @ value``.

    Query, key, value and result have the same order of dimensions: the last holds the features, ``length_dim`` the
    positions, and the others are batch and heads, in this order, which broadcast from operand to operand. With the
    default that is (batch..., heads, length, features); (batch, length, heads, features) is ``length_dim=-3``. Views,
    copies and repetitions in front of the operands are looked through.

    Args:
        view: what ``find`` was given.
        pattern: the pattern's name.
        anchor: the node whose source line the report shows, usually the call.
        query: (batch..., heads, query length, features), or in the order that ``length_dim`` says; so the next two.
        key: (batch..., heads, key length, features).
        value: (batch..., heads, key length, value features).
        scale: what the product of query and key is multiplied by; None for one over the root of the features.
        mask: broadcasts to (batch..., heads, query length, key length), whatever ``length_dim`` is. Boolean: true for
            scores that stay, or with ``mask_drops`` for scores that become minus infinity. Floating: added to the
            scaled scores, in float32 or wider.
        is_causal: query position i reads the key positions up to i. Not together with ``mask``.
        dropout: the probability of dropping a weight; 0 when the model does not train.
        length_dim: the dimension of the positions, counted from the end: -2, or -3 and so on; default -2.
        grouped: the last dimension of the heads is larger in the query, and neighboring query heads share a key and a
            value head.
        result: the node that holds the result, (batch..., heads, query length, value features); default ``anchor``.
            An operator that returns several tensors needs it: its ``getitem``.
        interior: further nodes that go with the site; ``anchor`` and ``result`` are added. All but ``result`` may be
            read by each other only.
        compute_dtype: the lowest dtype in which the products may be computed; default that of query, key and value
            promoted.
        empty_rows_like_sdpa: what a row without a key gives may be left to the kernel, as in a call of
            ``scaled_dot_product_attention``; by default it gives NaN, as softmax does.

    Raises:
        NotAttention: the shapes do not fit together for every size, or the graph does not say what is needed. Let it
            pass into a ``NearMiss``.
    """
    result = anchor if result is None else result
    operands = {"query": query, "key": key, "value": value, "result": result}
    _require_alike(operands, length_dim)
    if mask is not None and is_causal:
        raise NotAttention("a mask beside causal masking")
    if not isinstance(scale, (int, float, type(None))):
        raise NotAttention("the scale is not a constant number")
    sizes = {name: Sizes.of(node, length_dim) for name, node in operands.items()}
    _require_fitting(**sizes)
    axes = call_axes(sizes["query"], sizes["key"], sizes["value"], sizes["result"].heads, grouped)
    masks = () if mask is None else (_mask(mask, mask_drops, axes),)
    nodes = view.ordered([anchor, *interior, result])
    _require_no_other_reader(nodes)
    dtype = tensor(query).dtype
    for node in (key, value):
        dtype = torch.promote_types(dtype, tensor(node).dtype)
    site = site_of_call(
        view,
        pattern=pattern,
        anchor=anchor,
        result=result,
        operands=(query, key, value),
        axes=axes,
        layout=lambda dims: dims.with_length_at(length_dim),
        scale=scale,
        masks=masks,
        is_causal=is_causal,
        dropout=dropout,
        dtype=dtype,
        interior=nodes,
    )
    return replace(site, compute_dtype=compute_dtype or dtype, fused=empty_rows_like_sdpa)


def _require_alike(operands: dict[str, fx.Node], length_dim: int) -> None:
    ranks = {name: tensor(node).dim() for name, node in operands.items() if is_tensor(node)}
    if set(ranks) != set(operands):
        raise NotAttention(f"the {min(set(operands) - set(ranks))} is not a tensor of the graph")
    if len(set(ranks.values())) != 1 or not -ranks["query"] <= length_dim <= -2:
        raise NotAttention(f"query, key, value and result have {ranks} dimensions, with the length at {length_dim}")


def _require_fitting(query: Sizes, key: Sizes, value: Sizes, result: Sizes) -> None:
    alike = (
        (query.features, key.features),
        (key.length, value.length),
        (query.length, result.length),
        (value.features, result.features),
    )
    if not all(same(a, b) for a, b in alike):
        raise NotAttention("the lengths or features of query, key, value and result do not fit for every size")


def _require_no_other_reader(interior: Sequence[fx.Node]) -> None:
    for node in interior[:-1]:
        for user in node.users:
            if user not in interior:
                where = source_location(user) or ("the graph's results" if user.op == "output" else user.name)
                raise NotAttention(f"{node.name} is read at {where}, too, so it must exist in memory")


def _mask(mask: fx.Node, drops: bool, axes: CallAxes) -> ScoreMod:
    operand = mask_operand(mask, axes)
    if operand.dtype is torch.bool:
        return Fill(operand, -math.inf, torch.float32, invert=not drops)
    if not operand.dtype.is_floating_point:
        raise NotAttention(f"a mask of {dtype_name(operand.dtype)}, which is neither boolean nor floating-point")
    return added_mask(operand)


# The parts.


@dataclass(frozen=True)
class Sizes:
    """The sizes of an operand: batch and heads, which broadcast, positions and features."""

    heads: tuple[Size, ...]
    length: Size
    features: Size

    @staticmethod
    def of(node: fx.Node, length_dim: int = -2) -> Sizes:
        """Those of (batch and heads..., features), with the positions at ``length_dim``, counted from the end."""
        sizes = list(tensor(node).shape)
        features = sizes.pop()
        length = sizes.pop(length_dim + 1)
        return Sizes(tuple(sizes), length, features)


@dataclass(frozen=True)
class Dims:
    """The dimensions of an operand as axes: batch and heads, positions and features."""

    heads: Layout
    length: Dim
    features: Dim

    def with_length_at(self, length_dim: int) -> Layout:
        """(batch and heads..., features), with the positions at ``length_dim``, counted from the end."""
        dims = list(self.heads)
        dims.insert(len(dims) + 2 + length_dim, self.length)
        return (*dims, self.features)


@dataclass(frozen=True)
class CallAxes:
    """The dimensions of a call's operands and its result."""

    query: Dims
    key: Dims
    value: Dims
    result: Dims

    @property
    def scores(self) -> Layout:
        """(batch and heads..., query positions, key positions)"""
        return (*self.result.heads, self.query.length, self.key.length)


def call_axes(query: Sizes, key: Sizes, value: Sizes, heads: Sequence[Size], grouped: bool = False) -> CallAxes:
    """The axes of a call.

    Args:
        query, key, value: the sizes of the operands, whose batch and heads broadcast to those of the result.
        heads: the sizes of the result's batch and heads.
        grouped: the last dimension of the heads may be larger in the query, and neighboring query heads share a key
            and a value head.

    Raises:
        NotAttention: they do not broadcast for every size.
    """
    axes = fresh_layout(heads, "batch")
    length, keys = fresh_dim(query.length, "query"), fresh_dim(key.length, "key")
    features, value_features = fresh_dim(query.features, "feature"), fresh_dim(value.features, "value feature")
    key_axes, key_heads = _without_groups(axes, heads, key.heads, value.heads) if grouped else (axes, heads)
    return CallAxes(
        Dims(_broadcast(axes, heads, query.heads, "query"), length, features),
        Dims(_broadcast(key_axes, key_heads, key.heads, "key"), keys, features),
        Dims(_broadcast(key_axes, key_heads, value.heads, "value"), keys, value_features),
        Dims(axes, length, value_features),
    )


def _broadcast(axes: Layout, heads: Sequence[Size], own: Sequence[Size], name: str) -> Layout:
    layout = broadcast(axes, heads, own)
    if layout is None:
        raise NotAttention(f"the heads of the {name} do not broadcast to those of the result for every size")
    return layout


def _without_groups(
    axes: Layout, heads: Sequence[Size], key: Sequence[Size], value: Sequence[Size]
) -> tuple[Layout, Sequence[Size]]:
    """The axes and sizes of the heads that key and value have: the last one without its groups."""
    if not heads or (key and same(heads[-1], key[-1])):
        return axes, heads
    if not key or not value or not same(key[-1], value[-1]):
        raise NotAttention("key and value do not have the same number of heads")
    if same(key[-1], 1):
        return axes, heads
    divided = axes[-1][0].divide(heads[-1] // key[-1]) if axes[-1] else None
    if divided is None or not same(divided[0].size, key[-1]):
        raise NotAttention("the query's heads are not known to be a multiple of the key's heads")
    return (*axes[:-1], (divided[0],)), (*heads[:-1], key[-1])


def mask_operand(mask: fx.Node, axes: CallAxes) -> Operand:
    """A mask that broadcasts to the scores.

    Raises:
        NotAttention: it does not for every size.
    """
    layout = broadcast(axes.scores, [size_of(dim) for dim in axes.scores], tensor(mask).shape)
    if layout is None:
        raise NotAttention("the mask does not broadcast to the scores for every size")
    return Operand(mask, layout)


def added_mask(operand: Operand) -> Bias:
    """Numbers that are added to the scores, in float32 or wider."""
    return Bias(operand, torch.promote_types(operand.dtype, torch.float32))


def site_of_call(
    view: GraphView,
    *,
    pattern: str,
    anchor: fx.Node,
    result: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    axes: CallAxes,
    layout: Callable[[Dims], Layout],
    scale: float | fx.Node | None,
    masks: Sequence[ScoreMod],
    is_causal: bool,
    dropout: float,
    dtype: torch.dtype,
    interior: tuple[fx.Node, ...],
) -> AttentionSite:
    """The site of a call that leaves rows without a key to its kernel.

    Args:
        operands: query, key and value.
        layout: the dimensions of an operand, and of the result, in the order in which they are stored.
        scale: None for one over the root of the features.
        dtype: what the call computes in.
        interior: the nodes that go with it, in graph order.
    """
    width = size_of(axes.query.features)
    if scale is None:
        factor: float | fx.Node = 1 / math.sqrt(width) if isinstance(width, int) and width else 1.0
    else:
        factor = scale
    query, key, value = (
        view.origin(Operand(node, layout(dims)), anchor).resolved()
        for node, dims in zip(operands, (axes.query, axes.key, axes.value), strict=True)
    )
    return AttentionSite(
        pattern=pattern,
        anchor=anchor,
        result=result,
        result_layout=layout(axes.result),
        query=query,
        key=key,
        value=value,
        query_axes=axes.query.length,
        key_axes=axes.key.length,
        feature_axes=axes.query.features,
        mods=(Scale(factor), *masks),
        softmax_dtype=torch.promote_types(dtype, torch.float32),
        compute_dtype=dtype,
        weight_layout=axes.scores,
        dropout=dropout,
        is_causal=is_causal,
        default_scale=scale is None and not isinstance(width, int),
        differentiable=view.differentiable(anchor),
        fused=True,
        in_autocast=view.in_autocast(anchor),
        interior=interior,
    )
