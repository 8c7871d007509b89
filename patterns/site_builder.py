"""Building the :class:`AttentionSite` of a call whose operands are laid out simply: help for patterns of one's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import Axis, Dim, Layout, Operand, broadcast
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import Size, is_tensor, same, tensor
from attnrewrite.ir.site import AttentionSite, Bias, Fill, NotAttention, Scale, ScoreMod
from attnrewrite.ir.source import source_location
from attnrewrite.torch_private import schema_of

__all__ = ["attention_site", "call_arguments"]


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
        grouped: the last dimension of the heads is larger in the query, and neighbouring query heads share a key and a
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
    ranks = {name: tensor(node).dim() for name, node in operands.items() if is_tensor(node)}
    if set(ranks) != set(operands):
        raise NotAttention(f"the {min(set(operands) - set(ranks))} is no tensor that the graph knows")
    if len(set(ranks.values())) != 1 or not -ranks["query"] <= length_dim <= -2:
        raise NotAttention(f"query, key, value and result have {ranks} dimensions, with the length at {length_dim}")
    if mask is not None and is_causal:
        raise NotAttention("a mask beside causal masking")
    sizes = {name: _parts(tensor(node).shape, length_dim) for name, node in operands.items()}
    (_, length, width), (_, keys, _), (_, _, value_width) = (sizes[name] for name in ("query", "key", "value"))
    if not all(
        same(a, b)
        for a, b in (
            (width, sizes["key"][2]),
            (keys, sizes["value"][1]),
            (length, sizes["result"][1]),
            (value_width, sizes["result"][2]),
        )
    ):
        raise NotAttention("the lengths or features of query, key, value and result do not fit for every size")
    heads = sizes["result"][0]
    axes: Layout = tuple(_fresh(size, "batch") for size in heads)
    positions, key_positions = _fresh(length, "query"), _fresh(keys, "key")
    features, value_features = _fresh(width, "feature"), _fresh(value_width, "value feature")
    key_axes, key_heads = (_grouped(axes, heads, sizes["key"][0], sizes["value"][0])) if grouped else (axes, heads)
    layouts: dict[str, Layout] = {}
    for name, own_axes, own_heads, own_length, own_features in (
        ("query", axes, heads, positions, features),
        ("key", key_axes, key_heads, key_positions, features),
        ("value", key_axes, key_heads, key_positions, value_features),
        ("result", axes, heads, positions, value_features),
    ):
        own = broadcast(own_axes, own_heads, sizes[name][0])
        if own is None:
            raise NotAttention(f"the heads of the {name} do not broadcast to those of the result for every size")
        layouts[name] = _joined(own, own_length, own_features, length_dim)
    mods: list[ScoreMod] = [Scale(_scale(scale, width))]
    if mask is not None:
        mods.append(_mask(mask, mask_drops, (*axes, positions, key_positions), (*heads, length, keys)))
    origins = {
        name: view.origin(Operand(operands[name], layouts[name]), anchor).resolved()
        for name in ("query", "key", "value")
    }
    nodes = view.ordered([anchor, *interior, result])
    _require_no_other_reader(nodes)
    dtype = tensor(query).dtype
    for node in (key, value):
        dtype = torch.promote_types(dtype, tensor(node).dtype)
    return AttentionSite(
        pattern=pattern,
        anchor=anchor,
        result=result,
        result_layout=layouts["result"],
        query=origins["query"],
        key=origins["key"],
        value=origins["value"],
        query_axes=positions,
        key_axes=key_positions,
        feature_axes=features,
        mods=tuple(mods),
        softmax_dtype=torch.promote_types(dtype, torch.float32),
        compute_dtype=compute_dtype or dtype,
        weight_layout=(*axes, positions, key_positions),
        dropout=dropout,
        is_causal=is_causal,
        default_scale=scale is None and not isinstance(width, int),
        differentiable=view.differentiable(anchor),
        fused=empty_rows_like_sdpa,
        in_autocast=view.in_autocast(anchor),
        interior=nodes,
    )


def _require_no_other_reader(interior: Sequence[fx.Node]) -> None:
    for node in interior[:-1]:
        for user in node.users:
            if user not in interior:
                where = source_location(user) or ("the graph's results" if user.op == "output" else user.name)
                raise NotAttention(f"{node.name} is read at {where}, too, so it must exist in memory")


def _parts(shape: Sequence[Size], length_dim: int) -> tuple[tuple[Size, ...], Size, Size]:
    """(batch and heads, length, features)"""
    sizes = list(shape)
    features = sizes.pop()
    length = sizes.pop(length_dim + 1)
    return tuple(sizes), length, features


def _joined(heads: Layout, length: Dim, features: Dim, length_dim: int) -> Layout:
    dims = list(heads)
    dims.insert(len(dims) + 2 + length_dim, length)
    return (*dims, features)


def _fresh(size: Size, name: str) -> Dim:
    return () if same(size, 1) else (Axis(size, name),)


def _grouped(
    axes: Layout, heads: tuple[Size, ...], key: tuple[Size, ...], value: tuple[Size, ...]
) -> tuple[Layout, tuple[Size, ...]]:
    """The axes and sizes of the heads that key and value have: the last one without its groups."""
    if not heads or not key or not value or not same(key[-1], value[-1]):
        raise NotAttention("key and value have not the same heads")
    if same(heads[-1], key[-1]) or same(key[-1], 1):
        return axes, heads
    divided = axes[-1][0].divide(heads[-1] // key[-1]) if axes[-1] else None
    if divided is None or not same(divided[0].size, key[-1]):
        raise NotAttention("the query's heads are not known to be a multiple of the key's")
    return (*axes[:-1], (divided[0],)), (*heads[:-1], key[-1])


def _scale(scale: float | None, width: Size) -> float:
    if scale is None:
        return 1 / math.sqrt(width) if isinstance(width, int) and width else 1.0
    if not isinstance(scale, (int, float)):
        raise NotAttention("the scale is not a number that the graph knows")
    return float(scale)


def _mask(mask: fx.Node, drops: bool, layout: Layout, shape: Sequence[Size]) -> ScoreMod:
    value = tensor(mask)
    own = broadcast(layout, shape, value.shape)
    if own is None:
        raise NotAttention("the mask does not broadcast to the scores for every size")
    if value.dtype is torch.bool:
        return Fill(Operand(mask, own), -math.inf, torch.float32, invert=not drops)
    if not value.dtype.is_floating_point:
        raise NotAttention(f"a mask of {value.dtype}, which is neither boolean nor floating".replace("torch.", ""))
    return Bias(Operand(mask, own), torch.promote_types(value.dtype, torch.float32))
