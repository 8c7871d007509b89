"""Which values can a term of the scores take? Told from how the graph computes it, not from data."""

from __future__ import annotations

import enum
import itertools
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.bounds import TENSOR_VALUES
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.ops import CAST_OPS, VIEW_OPS
from attnrewrite.ir.products import is_product
from attnrewrite.ir.stored import StoredPattern

__all__ = [
    "ABSORBING",
    "FAR_BELOW",
    "MOVES",
    "ORDINARY",
    "UNDERFLOW",
    "ValueKind",
    "as_stored",
    "constant_value",
    "is_far_below",
    "is_ordinary",
    "possible_values",
]

aten = torch.ops.aten

ABSORBING = -(2.0**126)
"""A score that no finite score of ordinary size can lift: exact in float32 and bfloat16, and still finite after the
multiplication by log2(e) that fused kernels apply before exponentiation."""


class ValueKind(enum.Enum):
    """What is known of values that are no listed constants.

    LEARNED is an expectation and no proof: a parameter may hold minus infinity as well. It says that the numbers are
    there to be added to scores like any other, so that rounding them is the rounding that any sum has.
    """

    LEARNED = "learned, or computed from what is"
    INTEGER = "an integer"
    ANY = "anything, infinities included"


Value = float | ValueKind

ORDINARY = 64.0
"""Constants up to this size are taken for scores like any other; beyond it they may be there to mask."""


FAR_BELOW = -(2.0**24)
"""A value from here down is taken for a mask: at this magnitude float32 itself resolves no fraction of a score."""

UNDERFLOW = -1000.0
"""The exponential of this is 0 in every dtype."""


def is_far_below(value: float, dtype: torch.dtype) -> bool:
    return value <= FAR_BELOW or value <= torch.finfo(dtype).min


def possible_values(node: fx.Node) -> frozenset[Value]:
    """A set that holds every value the node's entries can take; constants listed, the rest as :class:`ValueKind`."""
    return _values(node, {})


def _values(node: Any, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    if isinstance(node, (bool, int, float)):
        return frozenset({float(node)})
    if not is_tensor(node):
        # A Python float that changes between calls is a symbol of the graph, and may be any float.
        value = node.meta.get("val") if isinstance(node, fx.Node) else node
        return frozenset({ValueKind.INTEGER if isinstance(value, (int, torch.SymInt)) else ValueKind.ANY})
    if node not in memo:
        memo[node] = frozenset({ValueKind.ANY})
        memo[node] = _limited(_values_of_call(node, memo), tensor(node).dtype)
    return memo[node]


def _limited(values: frozenset[Value], dtype: torch.dtype) -> frozenset[Value]:
    if dtype is torch.bool:
        return frozenset({0.0, 1.0})
    values = frozenset(as_stored(value, dtype) if isinstance(value, float) else value for value in values)
    return values if TENSOR_VALUES.allows(len(values)) else frozenset({ValueKind.ANY})


def _values_of_call(node: fx.Node, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    target: Any = node.target
    args: Any = node.args
    if node.op in ("placeholder", "get_attr"):
        return frozenset({_kind_of_input(node)})
    if node.op != "call_function":
        return frozenset({ValueKind.ANY})
    constant = constant_value(node)
    if constant is not None:
        return frozenset({constant})
    if target in MOVES or target in CAST_OPS or target is aten.embedding.default:
        return _values(args[0], memo)
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        return _values(args[1], memo) | _values(args[2], memo)
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _values(args[0], memo) | _values(args[2], memo)
    if target in (aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default):
        return _values(args[0], memo) | _values(args[1], memo)
    if target in (aten.cat.default, aten.stack.default):
        return frozenset().union(*(_values(part, memo) for part in args[0]))
    if target in (aten.tril.default, aten.triu.default, aten.constant_pad_nd.default, aten.pad.default):
        filler = args[2] if target is aten.constant_pad_nd.default and len(args) > 2 else 0.0
        if target is aten.pad.default and (len(args) > 2 or node.kwargs):
            return frozenset({ValueKind.ANY})
        return _values(args[0], memo) | _values(filler, memo)
    if target in _ARITHMETIC and not node.kwargs:
        function = _ARITHMETIC[target]
        pairs = itertools.product(_values(args[0], memo), _values(args[1], memo))
        return frozenset(function(a, b) for a, b in pairs)
    if target is aten.neg.default:
        return frozenset(_times(value, -1.0) for value in _values(args[0], memo))
    if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        return frozenset({ValueKind.INTEGER})
    if target in _POWERS:
        return _values_of_power(args[0], args[1], memo)
    if target is aten.div.Tensor and not node.kwargs:
        return _values_of_quotient(args[0], args[1], memo)
    if target in _COMPUTED or is_product(node):
        return frozenset({ValueKind.LEARNED})
    if target in _ORDINARY:
        inputs = [_values(arg, memo) for arg in node.all_input_nodes if is_tensor(arg)]
        if all(value is not ValueKind.ANY and is_ordinary(value) for values in inputs for value in values):
            return frozenset({ValueKind.LEARNED})
    return frozenset({ValueKind.ANY})


_POWERS = (aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar)


def _values_of_power(base: Any, exponent: Any, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    """A power is of ordinary size where nothing is divided by zero: of positive numbers, or by a positive number."""
    bases, exponents = _values(base, memo), _values(exponent, memo)
    positive = all(isinstance(value, float) and 0 < value <= ORDINARY for value in bases)
    learned = all(value is ValueKind.LEARNED or isinstance(value, float) for value in bases)
    raised = all(isinstance(value, float) and 0 <= value <= 4 for value in exponents)
    safe = (positive and ValueKind.ANY not in exponents) or (learned and raised)
    return frozenset({ValueKind.LEARNED if safe else ValueKind.ANY})


def _values_of_quotient(dividend: Any, divisor: Any, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    """By a number it is a product; by a tensor only what is learned is expected to stay of ordinary size."""
    number = constant_value(divisor)
    dividends, divisors = _values(dividend, memo), _values(divisor, memo)
    if number is not None:
        return frozenset(_over(value, number) for value in dividends)
    ordinary = all(value is not ValueKind.ANY and is_ordinary(value) for value in divisors)
    learned = all(value in (ValueKind.LEARNED, ValueKind.INTEGER) for value in dividends)
    return frozenset({ValueKind.LEARNED if ordinary and learned else ValueKind.ANY})


def _over(value: Value, number: float) -> Value:
    if number == 0:
        return ValueKind.ANY
    return value / number if isinstance(value, float) else _times(value, 1.0 / number)


def _kind_of_input(node: fx.Node) -> ValueKind:
    """A parameter holds learned numbers; a tensor that the caller hands over may hold anything."""
    stored = node.meta.get("stored")
    if isinstance(stored, StoredPattern) and stored.holds_only_up_to(ORDINARY):
        return ValueKind.LEARNED
    example = node.meta.get("example_value", tensor(node))
    return ValueKind.LEARNED if isinstance(example, torch.nn.Parameter) and example.requires_grad else ValueKind.ANY


def is_ordinary(value: Value) -> bool:
    return abs(value) <= ORDINARY if isinstance(value, float) else value is not ValueKind.ANY


def _plus(a: Value, b: Value) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a + b
    if ValueKind.ANY in (a, b):
        return ValueKind.ANY
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float) and not isinstance(other, float):
            if one <= ABSORBING:
                return one
            return other if one == 0 else ValueKind.LEARNED if is_ordinary(one) else ValueKind.ANY
    return ValueKind.INTEGER if a is b is ValueKind.INTEGER else ValueKind.LEARNED


def _times(a: Value, b: Value) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a * b
    if 0.0 in (a, b) and ValueKind.ANY not in (a, b):
        return 0.0
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float):
            return (
                other
                if one == 1.0
                else ValueKind.LEARNED
                if other is not ValueKind.ANY and is_ordinary(one)
                else ValueKind.ANY
            )
    if ValueKind.ANY in (a, b):
        return ValueKind.ANY
    return ValueKind.INTEGER if a is b is ValueKind.INTEGER else ValueKind.LEARNED


def _minus(a: Value, b: Value) -> Value:
    return _plus(a, _times(b, -1.0))


_ARITHMETIC = {
    aten.add.Tensor: _plus,
    aten.add.Scalar: _plus,
    aten.sub.Tensor: _minus,
    aten.sub.Scalar: _minus,
    aten.rsub.Scalar: lambda a, b: _minus(b, a),
    aten.mul.Tensor: _times,
    aten.mul.Scalar: _times,
}

MOVES = VIEW_OPS | {
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.roll.default,
    aten.flip.default,
}
"""Operators that only move entries of their first argument about."""

_ORDINARY = frozenset(
    {
        *MOVES,
        aten.relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.abs.default,
        aten.exp.default,
        aten.sqrt.default,
        aten.clamp.default,
    }
)
"""Operators that make numbers of ordinary size from numbers of ordinary size; a logarithm does not, nor a quotient."""

_COMPUTED = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.layer_norm.default,
        aten.group_norm.default,
        aten.softmax.int,
        aten.sigmoid.default,
        aten.tanh.default,
    }
)
"""What a model computes by these is there to be added to scores like any other number, whatever it is made from."""


def constant_value(node: Any) -> float | None:
    """The one value that all entries of the node have, where the graph says so in numbers."""
    if isinstance(node, (bool, int, float)):
        return float(node)
    if not isinstance(node, fx.Node) or node.op != "call_function" or not is_tensor(node):
        return None
    args: Any = node.args
    target: Any = node.target
    value: Any
    if target in (aten.full.default, aten.full_like.default):
        value = args[1]
    elif target is aten.new_full.default:
        value = args[2]
    elif target is aten.scalar_tensor.default:
        value = args[0]
    elif target in (aten.fill.Scalar, aten.fill.Tensor):
        value = constant_value(args[1])
    elif target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        value = 0.0
    elif target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        value = 1.0
    elif target in MOVES or target in CAST_OPS:
        value = constant_value(args[0])
    else:
        return None
    return as_stored(value, tensor(node).dtype) if isinstance(value, (bool, int, float)) else None


def as_stored(value: float, dtype: torch.dtype) -> float:
    """What ``dtype`` makes of a number: float32's lowest is minus infinity in bfloat16, 0.5 is 0 in int64."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))
