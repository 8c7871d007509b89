"""Attention weights that are divided by their own sum over the keys, which is not known.

    (w / f(w.sum(-1))) @ v   =   o[..., :-1] / f(o[..., -1:])        where o = w @ [v, 1]

The sum is the product with a value of ones, whatever a mask or a factor made of the weights. So what lies between the
sum and the division, a small number that is added to it or a clamp, is computed as in the source.

AllenNLP: https://github.com/allenai/allennlp/blob/v2.10.1/allennlp/nn/util.py masked_softmax
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import DIV_OPS, MATRIX_OPS
from attnrewrite.passes.regrouping import Found, NotRegrouped, Weights, require_one_dtype
from attnrewrite.passes.renormalization import Summed, number_after, sum_behind, with_steps

__all__ = ["divided_after_product", "may_be_divided"]

aten = torch.ops.aten

_LEAST = 2.0**-90
"""What is lost where exponentials leave the range of normal numbers, 2^-126, is nothing beside this."""


@dataclass(frozen=True)
class _Divided:
    """``(weights @ value) / denominator``, or the same with the weights divided before.

    Attributes:
        product: the product.
        weights, value: its operands, the weights before they are divided.
        denominator: what they are divided by.
        summed: the sum of the weights that this is made of.
    """

    product: fx.Node
    weights: fx.Node
    value: fx.Node
    denominator: fx.Node
    summed: Summed


def may_be_divided(node: fx.Node) -> bool:
    """Whether the node is of the kinds that are looked at: a division, a product."""
    return is_tensor(node) and node.op == "call_function" and node.target in MATRIX_OPS | DIV_OPS


def divided_after_product(node: fx.Node, builder: Builder, weights: Weights, softmaxes: set[fx.Node]) -> Found | None:
    """A product of weights that are divided by their sum, before the product or after it; None for any other node.

    Args:
        node: the last of product and division.
        builder: writes before it.
        softmaxes: is given the one that takes part, for the reason.

    Raises:
        NotRegrouped: the product stays as it is.
    """
    found = _read(node)
    softmax = None if found is None else weights.behind(found.weights)
    if found is None or softmax is None:
        return None
    softmaxes.add(softmax)
    require_one_dtype([found.weights, found.value, found.denominator, found.product, node])
    if tensor(node).dtype.itemsize < 4:
        raise NotRegrouped(
            "the attention weights are divided by their sum in half precision, where their product with the value "
            "would be rounded before it is divided"
        )
    if number_after(0.0, found.summed.steps) < _LEAST:
        raise NotRegrouped(
            f"the attention weights are divided by their sum, and no number of at least {_LEAST:.0e} is added to it or "
            "bounds it from below, so that weights which leave the range of their dtype would count"
        )
    size = tensor(found.value).shape[-1]
    value = builder.call(aten.constant_pad_nd.default, found.value, [0, 1], 1.0)
    whole = builder.call(found.product.target, found.weights, value)
    attended = builder.call(aten.slice.Tensor, whole, -1, 0, size)
    total = builder.call(aten.slice.Tensor, whole, -1, size, size + 1)
    if not found.summed.kept:
        total = builder.call(aten.squeeze.dim, total, -1)
    return Found(builder.call(aten.div.Tensor, attended, with_steps(total, found.summed, builder)), (whole,))


def _read(node: fx.Node) -> _Divided | None:
    """The node as such a product; None if it is none."""
    args: Any = node.args
    if node.kwargs or len(args) != 2 or not all(map(is_tensor, args)):
        return None
    before = node.target in MATRIX_OPS
    division, product = (args[0], node) if before else (node, args[0])
    if not _is_division(division) or product.target not in MATRIX_OPS or product.kwargs:
        return None
    weights: Any = division.args[0] if before else product.args[0]
    denominator: Any = division.args[1]
    value: Any = product.args[1]
    summed = sum_behind(denominator)
    if summed is None or summed.source is not weights:
        return None
    shape, rank = tensor(denominator).shape, tensor(weights).dim()
    # What is the same for all keys may be divided by before or after them.
    alike = summed.dim == rank - 1 and rank >= 2 and 1 <= len(shape) <= rank and same(shape[-1], 1)
    whole = same_shape(tensor(division).shape, tensor(division.args[0]).shape)
    # A vector has no features.
    plain = tensor(value).dim() >= 2 and same_shape(tensor(product).shape[:-1], tensor(weights).shape[:-1])
    return _Divided(product, weights, value, denominator, summed) if alike and whole and plain else None


def _is_division(node: fx.Node) -> bool:
    args: Any = node.args
    plain = node.op == "call_function" and node.target is aten.div.Tensor and not node.kwargs
    return plain and all(map(is_tensor, args))
