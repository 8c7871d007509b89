"""Attention weights that are divided by their own sum over the keys, which is known.

    w / w.sum(-1)                   =  w                        where w = softmax(s)
    (a w + b u) / (a w + b u).sum() =  (a w + b u) / (a + b)    with factors that are the same for all keys

A clamp of the sum from below, and a number that is added to it, are applied to the known sum as well.

ConViT: https://github.com/huggingface/pytorch-image-models/blob/v1.0.20/timm/models/convit.py GPSA.get_attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.scores import FLOATING, bounds_of
from attnrewrite.ir.bounds import AROUND_SOFTMAX
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import ADD_OPS, CLAMP_OPS, MUL_OPS, RESHAPE_OPS, is_cast, is_view
from attnrewrite.passes.regrouping import Found, Weights

__all__ = ["Summed", "may_be_renormalized", "number_after", "renormalized", "sum_behind", "with_steps"]

aten = torch.ops.aten


def may_be_renormalized(node: fx.Node) -> bool:
    return node.target is aten.div.Tensor and not node.kwargs and len(node.args) == 2 and all(map(is_tensor, node.args))


def renormalized(node: fx.Node, builder: Builder, weights: Weights, softmaxes: set[fx.Node]) -> Found | None:
    """Weights divided by their known sum; None for any other node.

    Args:
        node: the division.
        builder: writes before it.
        softmaxes: is given those that take part, for the reason.
    """
    numerator: Any = node.args[0]
    denominator: Any = node.args[1]
    summed = sum_behind(denominator)
    if summed is None or summed.source is not numerator or not same_shape(tensor(node).shape, tensor(numerator).shape):
        return None
    taking_part: set[fx.Node] = set()
    known = _known_sum(numerator, summed.dim, weights, taking_part)
    if known is None:
        return None
    softmaxes |= taking_part
    total = known(builder)
    if isinstance(total, (int, float)):
        total = number_after(float(total), summed.steps)
        if abs(total - 1) < torch.finfo(tensor(node).dtype).eps / 2:
            return Found(builder.call(aten.alias.default, numerator), ())
        return Found(builder.call(aten.div.Tensor, numerator, total), ())
    if not summed.kept:
        total = builder.call(aten.squeeze.dim, total, summed.dim - tensor(numerator).dim())
    # Views of the sum have its shape.
    total = builder.call(aten.expand.default, total, [*tensor(summed.node).shape])
    if tensor(total).dtype is not tensor(summed.node).dtype:
        total = builder.call(aten.to.dtype, total, tensor(summed.node).dtype)
    total = with_steps(total, summed, builder)
    return Found(builder.call(aten.div.Tensor, numerator, total), ())


def with_steps(total: fx.Node, summed: Summed, builder: Builder) -> fx.Node:
    """What is done to the sum, done to ``total``, which has its shape and dtype."""
    for step in summed.steps:
        arguments: Any = step.args
        # What is expanded has no view of fewer dimensions.
        target: Any = aten.reshape.default if step.target in RESHAPE_OPS else step.target
        total = builder.call(target, total, *arguments[1:], **step.kwargs)
    return total


@dataclass(frozen=True)
class Summed:
    """``steps(source.sum(dim))``.

    Attributes:
        node: the sum.
        source: what is summed.
        dim: the dimension, nonnegative.
        kept: keepdim.
        steps: what is done to the sum, in order: views, casts, clamps and numbers that are added.
    """

    node: fx.Node
    source: fx.Node
    dim: int
    kept: bool
    steps: tuple[fx.Node, ...]


def sum_behind(node: fx.Node) -> Summed | None:
    """The node as a sum over one dimension, with steps; None for any other."""
    steps: list[fx.Node] = []
    while is_tensor(node) and node.op == "call_function":
        args: Any = node.args
        if node.target is aten.sum.dim_IntList:
            dims = [args[1]] if isinstance(args[1], int) else args[1]
            if not dims or len(dims) != 1 or "dtype" in node.kwargs or not is_tensor(args[0]):
                return None
            if not tensor(args[0]).dim():
                return None  # A tensor without dimensions takes a dim as well.
            kept = bool(args[2]) if len(args) > 2 else bool(node.kwargs.get("keepdim"))
            return Summed(node, args[0], dims[0] % tensor(args[0]).dim(), kept, tuple(reversed(steps)))
        clamped = (
            node.target in CLAMP_OPS and isinstance(bounds_of(node)[0], (int, float)) and bounds_of(node)[1] is None
        )
        added = node.target in ADD_OPS and len(args) == 2 and isinstance(args[1], (int, float)) and not node.kwargs
        # A sum of about one may be zero as an integer.
        if not (clamped or added or is_view(node) or _is_rounding(node)):
            return None
        steps.append(node)
        node = args[0]
    return None


def _is_rounding(node: fx.Node) -> bool:
    return is_cast(node) and tensor(node).dtype in FLOATING


def number_after(total: float, steps: tuple[fx.Node, ...]) -> float:
    """What the steps make of a sum that is the number ``total``."""
    for step in steps:
        args: Any = step.args
        if step.target in CLAMP_OPS:
            total = max(total, float(bounds_of(step)[0]))
        elif step.target in ADD_OPS:
            total += float(args[1])
    return total


_Sum = Callable[[Builder], Any]
"""Writes the sum: a number, or a tensor whose dimension of the keys has size one."""


def _known_sum(node: Any, dim: int, weights: Weights, softmaxes: set[fx.Node], depth: int = 0) -> _Sum | None:
    """The sum of the weights over ``dim``; None if it is not known."""
    if not is_tensor(node) or node.op != "call_function" or not AROUND_SOFTMAX.allows(depth):
        return None
    args: Any = node.args
    softmax = weights.softmaxes.get(node)
    if softmax is not None:
        # Empty rows sum to zero, a sink takes a part, and rounding may leave weights of one each.
        others = softmax.sink is not None or softmax.nan_to_zero or softmax.rounds_rows
        if others or softmax.dim != dim:
            return None
        softmaxes.add(node)
        return lambda builder: 1.0
    if _is_rounding(node):
        return _known_sum(args[0], dim, weights, softmaxes, depth + 1)
    if node.target in MUL_OPS and len(args) == 2 and not node.kwargs:
        for source, factor in (args[:2], args[1::-1]):
            if _is_same_for_all_keys(factor, source, node, dim):
                inner = _known_sum(source, dim, weights, softmaxes, depth + 1)
                return None if inner is None else _times(inner, factor)
    if node.target in ADD_OPS and len(args) == 2 and not node.kwargs:
        if not all(
            is_tensor(arg) and same(tensor(arg).shape[dim - tensor(node).dim()], tensor(node).shape[dim])
            for arg in args
        ):
            return None
        parts = [
            _known_sum(arg, dim - tensor(node).dim() + tensor(arg).dim(), weights, softmaxes, depth + 1) for arg in args
        ]
        return None if parts[0] is None or parts[1] is None else _plus(parts[0], parts[1])
    return None


def _is_same_for_all_keys(factor: Any, source: Any, node: fx.Node, dim: int) -> bool:
    if not is_tensor(source) or not same_shape(tensor(source).shape, tensor(node).shape):
        return False
    if isinstance(factor, (int, float)):
        return True
    from_last = dim - tensor(node).dim()
    return is_tensor(factor) and tensor(factor).dim() >= -from_last and same(tensor(factor).shape[from_last], 1)


def _times(inner: _Sum, factor: Any) -> _Sum:
    def write(builder: Builder) -> Any:
        total = inner(builder)
        if isinstance(total, (int, float)):
            if isinstance(factor, (int, float)):
                return total * factor
            return factor if total == 1 else builder.call(aten.mul.Tensor, factor, total)
        return builder.call(aten.mul.Tensor, total, factor)

    return write


def _plus(first: _Sum, second: _Sum) -> _Sum:
    def write(builder: Builder) -> Any:
        a, b = first(builder), second(builder)
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            return a + b
        tensor_, other = (b, a) if isinstance(a, (int, float)) else (a, b)
        return builder.call(aten.add.Tensor, tensor_, other)

    return write
