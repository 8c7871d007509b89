"""Score algebra: what a graph does to the scores between the product of query and key and the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.masks import as_stored, constant_value
from attnrewrite.analysis.views import (
    Layout,
    Operand,
    Product,
    axes_of,
    broadcast,
    is_layout_op,
    is_product,
    product_from_result,
    pull,
)
from attnrewrite.ir import is_cast, is_tensor, scalar, source_location, tensor
from attnrewrite.site import Bias, Elementwise, Fill, NotAttention, Scale, ScoreMod

__all__ = ["FLOATING", "ScoreWalk", "leads_to_product", "read_scores"]

aten = torch.ops.aten

_ADD = frozenset({aten.add.Tensor, aten.add.Scalar})
_SUB = frozenset({aten.sub.Tensor, aten.sub.Scalar})
_MUL = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIV = frozenset({aten.div.Tensor, aten.div.Scalar})
_WHERE = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar})
_FILL = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_ELEMENTWISE = frozenset(
    {aten.tanh.default, aten.clamp.default, aten.clamp.Tensor, aten.relu.default, aten.abs.default, aten.neg.default}
)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that attention is computed in."""

_BINARY = _ADD | _SUB | _MUL | _DIV


@dataclass(frozen=True)
class ScoreWalk:
    """The product of query and key, what is then done to it in order, and the nodes on the way, nearest to it first."""

    product: Product
    mods: tuple[ScoreMod, ...]
    nodes: tuple[fx.Node, ...]


def leads_to_product(node: Any, memo: dict[fx.Node, bool]) -> bool:
    """Whether a walk back from ``node`` through score operations can reach a matrix product."""
    if not is_tensor(node) or node.op != "call_function":
        return False
    if node not in memo:
        memo[node] = False
        memo[node] = is_product(node) or any(leads_to_product(arg, memo) for arg in _paths(node))
    return memo[node]


def _paths(node: fx.Node) -> list[Any]:
    """The arguments through which the scores may have come."""
    args: Any = node.args
    if is_cast(node) or is_layout_op(node) or node.target in _ELEMENTWISE or node.target in _FILL:
        return [args[0]]
    if node.target in _BINARY:
        return [args[0]] if node.target in _DIV else [args[0], args[1]]
    if node.target in _WHERE:
        return [args[1], args[2]]
    return []


def read_scores(node: fx.Node, layout: Layout, memo: dict[fx.Node, bool]) -> ScoreWalk:
    """Walks back from the argument of softmax, whose dimensions are ``layout``, to the product of query and key.

    Raises:
        NotAttention: something on the way cannot be read as a function of the scores.
    """
    mods: list[ScoreMod] = []
    nodes: list[fx.Node] = []
    while True:
        nodes.append(node)
        if is_product(node):
            product = product_from_result(node, layout)
            if tensor(node).dtype not in FLOATING:
                raise NotAttention(f"{_name(node)} multiplies in {tensor(node).dtype}".replace("torch.", ""))
            if product is None:
                raise NotAttention(f"the operands of {_name(node)} cannot be laid out along the scores' axes")
            # Read backwards: what is done last stands first.
            if product.addend is not None:
                mods.append(Bias(product.addend, tensor(node).dtype, _number(product.addend_factor, node)))
            if not (scalar(product.factor) and product.factor == 1):
                mods.append(Scale(_factor(product.factor)))
            return ScoreWalk(product, tuple(reversed(mods)), tuple(reversed(nodes)))
        source = next((arg for arg in _paths(node) if leads_to_product(arg, memo)), None)
        if source is None:
            raise NotAttention(f"{_name(node)} stands between softmax and a product of query and key")
        mods.extend(_read_step(node, source, layout))
        layout = _step_back(node, source, layout)
        node = source


def _step_back(node: fx.Node, source: fx.Node, layout: Layout) -> Layout:
    if is_layout_op(node):
        before = pull(node, layout)
        if before is None or set(axes_of(before)) != set(axes_of(layout)):
            raise NotAttention(f"{_name(node)} reorders or repeats scores in a way that no layout expresses")
        return before
    if is_cast(node):
        return layout
    before = broadcast(layout, tensor(node).shape, tensor(source).shape)
    if before is None or set(axes_of(before)) != set(axes_of(layout)):
        raise NotAttention(f"{_name(node)} broadcasts the scores themselves")
    return before


def _read_step(node: fx.Node, source: fx.Node, layout: Layout) -> list[ScoreMod]:
    args: Any = node.args
    target: Any = node.target
    if is_cast(node):
        _require_harmless_cast(node)
        return []
    if is_layout_op(node):
        return []
    if target in _ELEMENTWISE:
        return [Elementwise(node)]
    dtype = tensor(node).dtype
    if target in _FILL:
        return [Fill(_aligned(args[1], node, layout), as_stored(_fill_value(args[2], node), dtype), dtype)]
    if target in _WHERE:
        if args[0] is source or (args[1] is source) == (args[2] is source):
            raise NotAttention(f"{_name(node)} chooses between two values of the scores")
        kept_first = args[1] is source
        other = args[2] if kept_first else args[1]
        value = as_stored(_fill_value(other, node), dtype)
        return [Fill(_aligned(args[0], node, layout), value, dtype, invert=kept_first)]
    first = args[0] is source
    other = args[1] if first else args[0]
    if args[0] is args[1]:
        raise NotAttention(f"{_name(node)} combines the scores with themselves")
    if node.kwargs.get("rounding_mode") is not None or len(args) > 2:
        raise NotAttention(f"{_name(node)} rounds the scores")
    alpha = _number(node.kwargs.get("alpha", 1), node)
    if target in _ADD or target in _SUB:
        sign = alpha if target in _ADD else -alpha
        if first:
            return [_bias(other, node, layout, sign)]
        # a - alpha * scores: the scores are negated first. Read backwards, the addition comes before.
        steps: list[ScoreMod] = [_bias(other, node, layout, 1.0)]
        return steps if sign == 1 else [*steps, Scale(sign)]
    if is_tensor(other) and tensor(other).dim() > 0:
        return [Scale(_aligned(other, node, layout), divide=target in _DIV)]
    return [Scale(_factor(other), divide=target in _DIV)]


def _require_harmless_cast(node: fx.Node) -> None:
    """A change of precision is one of rounding only; to integers, to float8 or into float16's range it is more."""
    source, dtype = tensor(node.args[0]).dtype, tensor(node).dtype
    if source is not dtype and (dtype not in FLOATING or source not in FLOATING or dtype is torch.float16):
        raise NotAttention(f"{_name(node)} turns scores in {source} into {dtype}".replace("torch.", ""))


def _bias(other: Any, node: fx.Node, layout: Layout, factor: float) -> ScoreMod:
    if not is_tensor(other):
        raise NotAttention(f"{_name(node)} adds a plain number to the scores, which softmax cancels")
    return Bias(_aligned(other, node, layout), tensor(node).dtype, factor)


def _aligned(other: Any, node: fx.Node, layout: Layout) -> Operand:
    if not is_tensor(other):
        raise NotAttention(f"{_name(node)} takes a mask that is no tensor")
    own = broadcast(layout, tensor(node).shape, tensor(other).shape)
    if own is None:
        raise NotAttention(f"an operand of {_name(node)} does not broadcast to the scores for every size")
    return Operand(other, own)


def _fill_value(value: Any, node: fx.Node) -> float:
    constant = constant_value(value)
    if constant is None:
        raise NotAttention(f"the value that {_name(node)} fills in is not a constant of the graph")
    return constant


def _number(value: Any, node: fx.Node) -> float:
    if not isinstance(value, (int, float)):
        raise NotAttention(f"a factor of {_name(node)} is not a number")
    return float(value)


def _factor(value: Any) -> float | fx.Node:
    constant = constant_value(value)
    return value if constant is None else constant


def _name(node: fx.Node) -> str:
    """An operator in the user's terms: its name and the line that called it."""
    name = getattr(node.target, "_opname", None) or str(node.target)
    where = source_location(node)
    return f"{name} ({where.code!r}, {where})" if where else name
