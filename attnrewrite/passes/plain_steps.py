"""Steps between the product of query and key and softmax that are plain steps in another form.

    batch_norm(s, mean, var, weight, bias)   =   s * scale + shift        with the statistics that were stored
    s.sum(dim)                               =   s.reshape(...)           over a dimension of size one
    where(c, s + x, s)                       =   s + where(c, x, 0)

Batch norm of scores has a factor and a number for each head, which patterns read like any other.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.scores import sources_of_scores
from attnrewrite.analysis.values import FAR_BELOW
from attnrewrite.ir.bounds import AROUND_SOFTMAX
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import ADD_OPS, STORED_NORM_OPS, SUB_OPS
from attnrewrite.ir.products import is_product
from attnrewrite.ir.rounding import as_stored
from attnrewrite.passes.regrouping import Found, NotRegrouped, Weights, softmaxes_of

__all__ = ["may_be_plain", "plain_step"]

aten = torch.ops.aten


def may_be_plain(node: fx.Node) -> bool:
    """Whether the node is one of the steps, be it on scores or not."""
    return _source_of(node) is not None


def plain_step(node: fx.Node, builder: Builder, weights: Weights, softmaxes: set[fx.Node]) -> Found | None:
    """A step on scores in its plain form; None for any other node.

    Args:
        node: the step.
        builder: writes before it.
        softmaxes: is given those that the scores go into, for the reason.

    Raises:
        NotRegrouped: the step stays as it is.
    """
    source = _source_of(node)
    if source is None or not _leads_to_product(source):
        return None
    readers = softmaxes_of(node, weights)
    if not readers:
        return None
    softmaxes |= readers
    if node.target is operator.getitem:
        return Found(_normalized(node, source, builder), ())
    if node.target is aten.where.self:
        return Found(_added(node, source, builder), ())
    return Found(builder.call(aten.reshape.default, source, [*tensor(node).shape]), ())


def _source_of(node: fx.Node) -> fx.Node | None:
    """What the step is done to; None if the node is no such step."""
    if not is_tensor(node) or node.op != "call_function" or node.kwargs:
        return None
    args: Any = node.args
    if node.target is operator.getitem:
        norm = args[0]
        return norm.args[0] if args[1] == 0 and norm.target in STORED_NORM_OPS else None
    if node.target is aten.where.self:
        return _common_source(node)
    if node.target is not aten.sum.dim_IntList or is_product(node):
        return None
    dims = [args[1]] if isinstance(args[1], int) else args[1]
    shape, dtype = tensor(args[0]).shape, tensor(args[0]).dtype
    # A tensor without dimensions takes a dim as well.
    single = bool(dims) and bool(shape) and all(same(shape[dim], 1) for dim in dims)
    return args[0] if single and dtype is tensor(node).dtype else None


def _leads_to_product(node: fx.Node) -> bool:
    """Whether a walk back through operations on scores, and through these steps, reaches a matrix product."""
    pending, seen = [node], {node}
    for each in pending:
        if is_product(each):
            return True
        source = _source_of(each)
        for other in sources_of_scores(each) if source is None else [source]:
            if is_tensor(other) and other not in seen and AROUND_SOFTMAX.allows(len(seen)):
                seen.add(other)
                pending.append(other)
    return False


def _normalized(node: fx.Node, scores: fx.Node, builder: Builder) -> fx.Node:
    """Batch norm with stored statistics as a product and a sum, of one number for each channel.

    Raises:
        NotRegrouped: it is computed in half precision, or its numbers are in another dtype than the scores.
    """
    norm: Any = node.args[0]
    _, weight, bias, mean, variance, _, epsilon = norm.args
    given = [each for each in (scores, weight, bias, mean, variance) if each is not None]
    if tensor(scores).dtype.itemsize < 4 or len({tensor(each).dtype for each in given}) > 1:
        raise NotRegrouped(
            "the scores go through a batch norm in half precision, or in another dtype than its numbers, which rounds "
            "once where its factor and its sum would round twice"
        )
    # Batch norm gives its statistics no gradient.
    mean, variance = (builder.call(aten.detach.default, each) for each in (mean, variance))
    factor = builder.call(aten.rsqrt.default, builder.call(aten.add.Tensor, variance, epsilon))
    if weight is not None:
        factor = builder.call(aten.mul.Tensor, factor, weight)
    shift = builder.call(aten.mul.Tensor, mean, factor)
    shift = builder.call(aten.neg.default, shift) if bias is None else builder.call(aten.sub.Tensor, bias, shift)
    channels = [tensor(mean).shape[0], *[1] * (tensor(scores).dim() - 2)]
    factor, shift = (builder.call(aten.reshape.default, each, channels) for each in (factor, shift))
    return builder.call(aten.add.Tensor, builder.call(aten.mul.Tensor, scores, factor), shift)


@dataclass(frozen=True)
class _SumWith:
    """``source + sign * added``."""

    source: fx.Node
    added: fx.Node | float = 0.0
    sign: float = 1.0


def _sums_of(node: Any) -> list[_SumWith]:
    """What ``node`` is the sum of, in each way to read it: itself and nothing, and a tensor and what is added to it."""
    if not is_tensor(node):
        return []
    found = [_SumWith(node)]
    if node.op == "call_function" and node.target in ADD_OPS | SUB_OPS and not node.kwargs and len(node.args) == 2:
        first: Any = node.args[0]
        second: Any = node.args[1]
        subtracted = node.target in SUB_OPS
        if is_tensor(first) and (is_tensor(second) or isinstance(second, (int, float))):
            found.append(_SumWith(first, second, -1.0 if subtracted else 1.0))
        if is_tensor(second) and not subtracted and is_tensor(first):
            found.append(_SumWith(second, first))
    return found


def _common_sums(node: fx.Node) -> tuple[_SumWith, _SumWith] | None:
    """Both values of ``where`` as sums with one tensor that has their shape and dtype; None if they are not."""
    _, chosen, other = node.args
    if not tensor(node).dtype.is_floating_point:
        return None
    for one in _sums_of(chosen):
        for two in _sums_of(other):
            source = tensor(one.source)
            alike = source.dtype is tensor(node).dtype and same_shape(source.shape, tensor(node).shape)
            if (
                one.source is two.source
                and one != two
                and alike
                and all(_keeps_dtype(each, node) for each in (one, two))
            ):
                return one, two
    return None


def _keeps_dtype(part: _SumWith, node: fx.Node) -> bool:
    """Whether what is added is the same number in the dtype of the sum, or as good as minus infinity in both."""
    dtype = tensor(node).dtype
    if isinstance(part.added, fx.Node):
        return tensor(part.added).dtype is dtype
    stored = as_stored(part.added, dtype)
    return stored == part.added or max(stored * part.sign, part.added * part.sign) <= FAR_BELOW


def _common_source(node: fx.Node) -> fx.Node | None:
    sums = _common_sums(node)
    return None if sums is None else sums[0].source


def _added(node: fx.Node, source: fx.Node, builder: Builder) -> fx.Node:
    sums = _common_sums(node)
    assert sums is not None
    like = tensor(node)

    def added(part: _SumWith) -> fx.Node:
        if isinstance(part.added, fx.Node):
            return part.added if part.sign == 1 else builder.call(aten.neg.default, part.added)
        # Filling raises for a number beyond the dtype's range, to which adding makes it infinite.
        number = as_stored(part.added * part.sign, like.dtype)
        return builder.call(aten.full.default, [], number, dtype=like.dtype, device=like.device)

    chosen = builder.call(aten.where.self, node.args[0], *map(added, sums))
    return builder.call(aten.add.Tensor, source, chosen)
