"""Feature maps of linear attention: the functions of query and key that replace softmax."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.values import constant_value
from attnrewrite.ir.bounds import FEATURE_MAP
from attnrewrite.ir.nodes import is_tensor, same_shape, tensor
from attnrewrite.ir.ops import (
    ADD_OPS,
    CAT_OPS,
    DIV_OPS,
    FACTORY_OPS,
    MASKED_FILL_OPS,
    MUL_OPS,
    PIECE_OPS,
    SOFTMAX_OPS,
    SUB_OPS,
    WHERE_OPS,
    is_cast,
)
from attnrewrite.ir.views import is_layout_op

__all__ = ["Features", "features_of"]

aten = torch.ops.aten

_NONNEGATIVE = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.exp.default: "exp",
    aten.exp2.default: "exp2",
    aten.softplus.default: "softplus",
    aten.sigmoid.default: "sigmoid",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.square.default: "square",
    aten.abs.default: "abs",
    aten.softmax.int: "softmax",
    aten._softmax.default: "softmax",
}
_SIGNED = {
    aten.elu.default: "elu",
    aten.selu.default: "selu",
    aten.celu.default: "celu",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.mish.default: "mish",
    aten.hardswish.default: "hardswish",
    aten.leaky_relu.default: "leaky_relu",
    aten.tanh.default: "tanh",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
}
_SUMS = frozenset(
    {
        aten.sum.dim_IntList,
        aten.sum.default,
        aten.mean.dim,
        aten.mean.default,
        aten.amax.default,
        aten.sqrt.default,
        aten.reciprocal.default,
        aten.cumsum.default,
    }
)
_NORMS = frozenset({aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar})


@dataclass(frozen=True)
class Features:
    """What is known of the entries of a tensor.

    Attributes:
        name: the feature map that the tensor went through; empty if there is none.
        nonnegative: whether no entry is negative, whatever the inputs.
    """

    name: str = ""
    nonnegative: bool = False


_NOTHING = Features()


def features_of(node: Any, is_attention: Callable[[fx.Node], bool], depth: int = 0) -> Features:
    """The feature map of ``node``, behind views, casts, masks and scalings.

    Args:
        node: a node or a number.
        is_attention: whether a softmax node is a softmax of scores, and so not a feature map.
        depth: how many steps the search has taken.
    """
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        return Features("", node >= 0)
    if not is_tensor(node):
        return _NOTHING
    if tensor(node).dtype in (torch.bool, torch.uint8):
        return Features("", True)
    if node.op != "call_function" or not node.args or not FEATURE_MAP.allows(depth):
        return _NOTHING

    def of(argument: Any) -> Features:
        return features_of(argument, is_attention, depth + 1)

    target: Any = node.target
    args: Any = node.args
    if target in _NONNEGATIVE:
        own = target not in SOFTMAX_OPS or not is_attention(node)
        falls = target is aten.softplus.default and len(args) > 1 and not _is_positive(args[1])
        return Features(_NONNEGATIVE[target] if own else "", not falls)
    if target in _SIGNED:
        return Features(_SIGNED[target], False)
    if target in FACTORY_OPS:
        number = constant_value(node)
        return Features("", number is not None and number >= 0)
    if target in _NORMS:
        return Features("", True)
    if target in _SUMS:
        return Features("", of(args[0]).nonnegative)
    if is_layout_op(node) or is_cast(node) or target in PIECE_OPS or target is aten.dropout.default:
        return of(args[0])
    if target is operator.getitem:
        return _of_piece(node, of)
    return _of_arithmetic(node, of)


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and number > 0


_Of = Callable[[Any], Features]


def _of_piece(node: fx.Node, of: _Of) -> Features:
    """The features of one of the results of a split."""
    source: Any = node.args[0]
    if not isinstance(source, fx.Node) or source.target not in PIECE_OPS:
        return _NOTHING
    return of(source.args[0])


def _of_arithmetic(node: fx.Node, of: _Of) -> Features:
    target: Any = node.target
    args: Any = node.args
    if target in CAT_OPS:
        parts = [of(part) for part in args[0]]
        every = all(part.name for part in parts)
        return replace(parts[0] if every else _NOTHING, nonnegative=all(part.nonnegative for part in parts))
    if target in MUL_OPS:
        return _of_product(node, of)
    if target in DIV_OPS or target is aten.clamp_max.default:
        first = of(args[0])
        return replace(first, nonnegative=first.nonnegative and of(args[1]).nonnegative)
    if target in ADD_OPS:
        return _of_sum(node, of)
    if target in SUB_OPS or target is aten.neg.default:
        return replace(_NOTHING if len(args) > 1 and is_tensor(args[1]) else of(args[0]), nonnegative=False)
    if target is aten.pow.Tensor_Scalar:
        even = isinstance(args[1], (int, float)) and args[1] % 2 == 0
        base = Features("square") if args[1] == 2 else of(args[0])
        return replace(base, nonnegative=even or base.nonnegative)
    if target in (aten.clamp.default, aten.clamp_min.default):
        least = args[1] if len(args) > 1 else node.kwargs.get("min")
        cut = isinstance(least, (int, float)) and least >= 0
        before = of(args[0])
        return replace(before, name=before.name or "clamp" * cut, nonnegative=cut or before.nonnegative)
    if target in MASKED_FILL_OPS:
        first = of(args[0])
        return replace(first, nonnegative=first.nonnegative and of(args[2]).nonnegative)
    if target in WHERE_OPS:
        chosen, other = of(args[1]), of(args[2])
        named = chosen if chosen.name else other
        return replace(named, nonnegative=chosen.nonnegative and other.nonnegative)
    return _NOTHING


def _of_product(node: fx.Node, of: _Of) -> Features:
    """The features of a product: those of the factor that has the shape of the result."""
    args: Any = node.args
    first, second = args[:2]
    if first is second:
        return Features("square", True)
    factors = (of(first), of(second))
    # Masks and decays over positions are smaller than the result. If both factors have its shape, one is a gate.
    whole = [is_tensor(factor) and same_shape(tensor(factor).shape, tensor(node).shape) for factor in (first, second)]
    named = factors[whole.index(True)] if whole.count(True) == 1 else _NOTHING
    return replace(named, nonnegative=all(factor.nonnegative for factor in factors))


def _of_sum(node: fx.Node, of: _Of) -> Features:
    """The features of a sum, of which ``elu(x) + 1`` has a name of its own."""
    args: Any = node.args
    if len(args) > 2 or node.kwargs.get("alpha", 1) != 1:
        return _NOTHING
    first, second = of(args[0]), of(args[1])
    nonnegative = first.nonnegative and second.nonnegative
    if not isinstance(args[1], (int, float)):
        return replace(first if second.name else _NOTHING, nonnegative=nonnegative)
    source = args[0]
    while is_layout_op(source) or is_cast(source):
        source = source.args[0]
    # elu with default arguments is never below -1.
    plain = source.target is aten.elu.default and all(
        value == 1 for value in (*source.args[1:], *source.kwargs.values())
    )
    if plain and args[1] >= 1:
        return Features("elu + 1", True)
    return replace(first, nonnegative=nonnegative)
