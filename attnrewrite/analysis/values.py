"""Possible values of a tensor, proved from how the graph computes it and not from data."""

from __future__ import annotations

import enum
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.formulas import largest
from attnrewrite.ir.bounds import BEHIND_PRODUCT, TENSOR_VALUES
from attnrewrite.ir.model_state import is_model_state
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.ops import (
    ADD_OPS,
    ARANGE_OPS,
    CAST_OPS,
    CAT_OPS,
    DIV_OPS,
    MASKED_FILL_OPS,
    MOVE_OPS,
    MUL_OPS,
    ONES_OPS,
    PAD_OPS,
    PARTIAL_OPS,
    PROJECTION_OPS,
    SCATTER_OPS,
    SUB_OPS,
    TRIANGLE_OPS,
    WHERE_OPS,
    ZEROS_OPS,
    is_elementwise,
)
from attnrewrite.ir.products import is_product
from attnrewrite.ir.rounding import as_stored
from attnrewrite.ir.stored import StoredPattern

__all__ = [
    "ABSORBED",
    "ABSORBING",
    "FAR_BELOW",
    "ORDINARY",
    "UNDERFLOW",
    "Range",
    "Value",
    "ValueKind",
    "constant_value",
    "is_far_below",
    "is_held",
    "is_nan_by_formula",
    "is_ordinary",
    "number_of",
    "possible_values",
    "why_not_finite",
]

aten = torch.ops.aten

ABSORBING = -(2.0**126)
"""A score that no finite score of ordinary size can lift: exact in float32 and bfloat16, and still finite after the
multiplication by log2(e) that fused kernels apply before exponentiation."""


ABSORBED = -1.5 * 2.0**59
"""A number at or below this absorbs scores: of a size up to 2**34 in float32, and of up to 64 in float64.

Numbers that are written as masks, such as -1e18, stay at or below it in every dtype.
"""


class ValueKind(enum.Enum):
    """The kind of values that are not known constants.

    LEARNED is an expectation, not a proof: a parameter may hold minus infinity as well. Such numbers are meant to be
    added to scores like any other, so that rounding them is the ordinary rounding of a sum.
    """

    LEARNED = "learned, or computed from what is"
    ANY = "anything, infinities included"


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high``: computed from positions and sizes."""

    low: float
    high: float

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))


Value = float | Range | ValueKind

ORDINARY = 64.0
"""Constants up to this absolute value are taken for ordinary scores; larger ones may be masks."""


FAR_BELOW = -(2.0**24)
"""Values at or below this are taken for a mask: at this magnitude float32 has no fractions of a score left."""

UNDERFLOW = -1000.0
"""The exponential of this is 0 in every dtype."""


def is_far_below(value: float, dtype: torch.dtype) -> bool:
    return value <= FAR_BELOW or value <= torch.finfo(dtype).min


def possible_values(node: fx.Node) -> frozenset[Value]:
    """All values that entries of the node can take: constants as numbers, others as :class:`ValueKind`."""
    return _values(node, {})


def why_not_finite(factor: fx.Node, divide: bool) -> str:
    """What makes products with a factor (quotients by a divisor) NaN or infinite, in words; empty if nothing is known.

    The source has NaN then where its own order of steps puts it. Of an input nothing is known.
    """
    values = possible_values(factor)
    if divide:
        return "divided by a tensor that holds zeros" if 0.0 in values else ""
    infinite = not values.isdisjoint((math.inf, -math.inf))
    return "multiplied by a tensor that holds infinities" if infinite else ""


def is_nan_by_formula(node: fx.Node) -> bool:
    """Whether entries of the node may be NaN by how it is computed, such as ``mask * -inf`` where the mask is zero."""
    memo: dict[fx.Node, frozenset[Value]] = {}
    pending, seen = [node], {node}
    while pending:
        step = pending.pop()
        if step.op != "call_function" or not is_tensor(step) or not tensor(step).dtype.is_floating_point:
            continue
        if _makes_nan(step, memo):
            return True
        pending += [each for each in step.all_input_nodes if each not in seen]
        seen.update(pending)
    return False


def _makes_nan(node: fx.Node, memo: dict[fx.Node, frozenset[Value]]) -> bool:
    multiplies, divides = node.target in MUL_OPS, node.target in DIV_OPS
    if node.target in PARTIAL_OPS:
        lowest = [value.low if isinstance(value, Range) else value for value in _values(node.args[0], memo)]
        return any(isinstance(value, float) and value < 0 for value in lowest)
    if not (multiplies or divides or node.target in (*ADD_OPS, *SUB_OPS)):
        return False
    # Python numbers are rounded before they are used: to float32 where tensors are in half precision.
    dtype = torch.promote_types(tensor(node).dtype, torch.float32)
    first, second = (
        {as_stored(float(arg), dtype)}
        if isinstance(arg, (int, float))
        else {
            value if isinstance(value, float) else 0.0
            for value in _values(arg, memo)
            if isinstance(value, float) or _may_be_zero(value)
        }
        for arg in node.args[:2]
    )
    sign = -1.0 if node.target in SUB_OPS else 1.0
    for a, b in itertools.product(first, second):
        both_infinite = math.isinf(a) and math.isinf(b)
        nan = (a == b == 0 or both_infinite) if divides else math.isnan(a * b if multiplies else a + sign * b)
        if nan or math.isnan(a) or math.isnan(b):
            return True
    return False


def _values(node: Any, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    if isinstance(node, (bool, int, float)):
        return frozenset({float(node)})
    if not is_tensor(node):
        # A Python float that changes between calls is a symbol of the graph and may have any value.
        value = node.meta.get("val") if isinstance(node, fx.Node) else node
        return frozenset({_size(value) if isinstance(value, (int, torch.SymInt)) else ValueKind.ANY})
    if node not in memo:
        memo[node] = frozenset({ValueKind.ANY})
        memo[node] = _bounded(_values_of_call(node, memo), tensor(node).dtype)
    return memo[node]


def _bounded(values: frozenset[Value], dtype: torch.dtype) -> frozenset[Value]:
    """The values as ``dtype`` holds them; anything if there are too many."""
    if dtype is torch.bool:
        return frozenset({0.0, 1.0})
    values = frozenset(
        value if not isinstance(value, float) else as_stored(value, dtype) if is_held(value, dtype) else ValueKind.ANY
        for value in values
    )
    values = frozenset(ValueKind.ANY if value != value or _is_beyond(value, dtype) else value for value in values)
    values = frozenset(
        Range(as_stored(value.low, dtype), as_stored(value.high, dtype)) if isinstance(value, Range) else value
        for value in values
    )
    return values if TENSOR_VALUES.allows(len(values)) else frozenset({ValueKind.ANY})


def _is_beyond(value: Value, dtype: torch.dtype) -> bool:
    """Whether a number that is computed from positions may be too large for a score, or for ``dtype``."""
    if not isinstance(value, Range):
        return False
    limit = float((torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)).max)
    return not value.largest <= min(-FAR_BELOW, limit) or (value.low < 0 and dtype is torch.uint8)


def _size(value: int | torch.SymInt) -> Value:
    """A size, or a number that is computed from sizes."""
    if isinstance(value, int):
        return float(value)
    bound = largest(value.node.expr)
    return Range(-bound, bound) if math.isfinite(bound) else ValueKind.ANY


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
    if target in MOVE_OPS or target in CAST_OPS or target is aten.embedding.default:
        return _values(args[0], memo)
    if target in WHERE_OPS:
        return _values(args[1], memo) | _values(args[2], memo)
    if target in MASKED_FILL_OPS:
        return _values(args[0], memo) | _values(args[2], memo)
    if target in SCATTER_OPS:
        return _values(args[0], memo) | _values(args[1], memo)
    if target in CAT_OPS:
        return frozenset().union(*(_values(part, memo) for part in args[0]))
    if target in TRIANGLE_OPS or target in PAD_OPS:
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
    if target in ARANGE_OPS:
        ends = [end for arg in args[:2] for end in _values(arg, memo)]
        return frozenset({_between(0.0, *ends) if target is aten.arange.default else _between(*ends)})
    if target is aten.exp.default and _reads_buffer_above(args[0], math.log(ORDINARY)):
        return frozenset({ValueKind.ANY})
    if target in _MONOTONE:
        return frozenset(_monotone(_MONOTONE[target], value) for value in _values(args[0], memo))
    if target in _POWERS:
        return _values_of_power(args[0], args[1], memo)
    if target is aten.div.Tensor and not node.kwargs:
        return _values_of_quotient(args[0], args[1], memo)
    if target in _COMPUTED:
        return frozenset({ValueKind.LEARNED})
    if target in PROJECTION_OPS or is_product(node):
        return _values_of_product(node, memo)
    if target in _ORDINARY:
        bounds = (*args[1:], *node.kwargs.values()) if target is aten.clamp.default else ()
        given = [value for arg in (args[0], *bounds) if arg is not None for value in _values(arg, memo)]
        if all(value is not ValueKind.ANY and is_ordinary(value) for value in given):
            bound = max((value.largest for value in given if isinstance(value, Range)), default=None)
            return frozenset({ValueKind.LEARNED if bound is None else _range(-bound - ORDINARY, bound + ORDINARY)})
    return frozenset({ValueKind.ANY})


_POWERS = (aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar)


def _values_of_power(base: Any, exponent: Any, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    """The values of a power: of ordinary size if no zero can be divided by (positive base, or nonnegative exponent)."""
    bases, exponents = _values(base, memo), _values(exponent, memo)
    pairs = list(itertools.product(bases, exponents))
    if any(isinstance(value, Range) for value in bases | exponents):
        return frozenset(_power(a, b) for a, b in pairs)
    positive = all(isinstance(value, float) and 0 < value <= ORDINARY for value in bases)
    growth = max([abs(math.log(value)) for value in bases if isinstance(value, float)]) if positive else 0.0
    if growth and _reads_buffer_above(exponent, math.log(ORDINARY) / growth):
        return frozenset({ValueKind.ANY})
    learned = all(value is ValueKind.LEARNED or isinstance(value, float) for value in bases)
    raised = all(isinstance(value, float) and 0 <= value <= 4 for value in exponents)
    safe = (positive and ValueKind.ANY not in exponents) or (learned and raised)
    return frozenset({ValueKind.LEARNED if safe else ValueKind.ANY})


def _values_of_quotient(dividend: Any, divisor: Any, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    """The values of a quotient. By a tensor, only learned numbers are expected to stay of ordinary size."""
    number = constant_value(divisor)
    dividends, divisors = _values(dividend, memo), _values(divisor, memo)
    if number is not None:
        return frozenset(_over(value, number) for value in dividends)
    ordinary = all(is_ordinary(value) and not _may_be_zero(value) for value in divisors)
    learned = all(value is ValueKind.LEARNED or isinstance(value, Range) for value in dividends)
    if all(isinstance(value, float) or (isinstance(value, Range) and value.low > 0) for value in divisors):
        quotients = [_quotient(a, b) for a, b in itertools.product(dividends, divisors)]
        if ValueKind.ANY not in quotients:
            return frozenset(quotients)
    return frozenset({ValueKind.LEARNED if ordinary and learned else ValueKind.ANY})


def _may_be_zero(value: Value) -> bool:
    return value == 0 or (isinstance(value, Range) and value.low <= 0 <= value.high)


def _values_of_product(node: fx.Node, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    """The values of a matrix product: ordinary scores if a factor is learned and the other is no mask, else anything.

    The last operand is looked at first: it is a projection's weight, and the other may be computed by a whole model.
    """
    operands = [operand for operand in node.all_input_nodes if is_tensor(operand)]
    # A product with what is no parameter may be there to sum up masks that are given.
    by_parameter = any(map(_is_parameter, operands))
    if any(_is_made_of_mask(operand, given=not by_parameter) for operand in operands):
        return frozenset({ValueKind.ANY})
    # As a weight a frozen parameter counts as well.
    learned = any(
        isinstance(operand.meta.get("example_value"), torch.nn.Parameter) or ValueKind.LEARNED in _values(operand, memo)
        for operand in reversed(operands)
    )
    return frozenset({ValueKind.LEARNED if learned else ValueKind.ANY})


def _is_parameter(node: fx.Node) -> bool:
    """Whether the node is a parameter, or computed from one entry by entry, such as a weight that is normalized."""
    return any(
        step is not None and isinstance(step.meta.get("example_value"), torch.nn.Parameter)
        for step in _steps_behind(node, _is_entry_by_entry)
    )


def _reads_buffer_above(value: Any, size: float) -> bool:
    """Whether a buffer that holds a number above ``size`` went into an exponent, entry by entry, or may have."""
    if not isinstance(value, fx.Node):
        return False
    for step in _steps_behind(value, _is_entry_by_entry):
        stored = None if step is None else step.meta.get("stored")
        if step is None or (isinstance(stored, StoredPattern) and not stored.holds_only_up_to(size)):
            return True
    return False


def _is_made_of_mask(node: fx.Node, given: bool) -> bool:
    """Whether a number far below any score went into the node, or may have, through arithmetic and views:
    ``(1 - keep) * -1e9``.

    With ``given``, or an input that is none of the model's may have: it may be a mask.

    Products are looked through as well: a mask that was summed up or spread by one is a mask.
    """
    for step in _steps_behind(node, _may_spread_mask):
        if step is None:
            return True
        if given and step.op == "placeholder" and _kind_of_input(step) is ValueKind.ANY and not is_model_state(step):
            return True
        numbers = [constant_value(arg) for arg in (*step.args, *step.kwargs.values())] if _computes(step) else []
        if any(number is not None and abs(number) >= _MASKING for number in numbers):
            return True
    return False


def _steps_behind(node: fx.Node, passes: Callable[[fx.Node], bool]) -> Iterator[fx.Node | None]:
    """The node and what it is computed from, behind steps that ``passes``; at last None, if the search ended before."""
    pending, seen = [node], {node}
    while pending:
        step = pending.pop()
        yield step
        if step.op == "call_function" and passes(step):
            new = [source for source in step.all_input_nodes if source not in seen and is_tensor(source)]
            seen.update(new)
            pending += new
        if not BEHIND_PRODUCT.allows(len(seen)):
            yield None
            return


def _is_entry_by_entry(step: fx.Node) -> bool:
    return is_elementwise(step) or step.target in _LOOKED_THROUGH


def _may_spread_mask(step: fx.Node) -> bool:
    return _computes(step) or step.target in _LOOKED_THROUGH or is_product(step)


def _computes(step: fx.Node) -> bool:
    squashes = step.op != "call_function" or step.target in _SQUASHING
    return not squashes and (is_elementwise(step) or step.target in _TAKES_A_NUMBER)


_MASKING = 1e4
"""A number of this size may be there to mask scores, in half precision at least."""

_SQUASHING = frozenset(
    {aten.sigmoid.default, aten.tanh.default, aten.exp.default, aten.erf.default, aten.sin.default, aten.cos.default}
)
"""What they give is no mask, whatever they are given."""

_LOOKED_THROUGH = frozenset({*MOVE_OPS, *CAST_OPS, *CAT_OPS, *SCATTER_OPS, *TRIANGLE_OPS})

_TAKES_A_NUMBER = frozenset(
    {aten.full.default, aten.full_like.default, aten.scalar_tensor.default, *PAD_OPS, *MASKED_FILL_OPS}
)


def _over(value: Value, number: float) -> Value:
    if number == 0:
        return ValueKind.ANY
    return value / number if isinstance(value, float) else _times(value, 1.0 / number)


def _kind_of_input(node: fx.Node) -> ValueKind:
    """The kind of an input: parameters, and buffers of small numbers, are learned; other tensors may hold anything."""
    stored = node.meta.get("stored")
    if isinstance(stored, StoredPattern) and stored.holds_only_up_to(ORDINARY):
        return ValueKind.LEARNED
    example = node.meta.get("example_value", tensor(node))
    return ValueKind.LEARNED if isinstance(example, torch.nn.Parameter) and example.requires_grad else ValueKind.ANY


def is_ordinary(value: Value) -> bool:
    """Whether the number is one that a score may be."""
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
            if one == 0:
                return other
    if ValueKind.LEARNED in (a, b):
        return ValueKind.LEARNED if is_ordinary(a) and is_ordinary(b) else ValueKind.ANY
    (low, high), (least, most) = _ends(a), _ends(b)
    return _range(low + least, high + most)


def _times(a: Value, b: Value) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a * b
    if ValueKind.ANY in (a, b):
        return ValueKind.ANY
    if 0.0 in (a, b):
        return 0.0
    if ValueKind.LEARNED in (a, b):
        other = a if b is ValueKind.LEARNED else b
        return ValueKind.LEARNED if is_ordinary(other) else ValueKind.ANY
    products = [x * y for x in _ends(a) for y in _ends(b)]
    return _range(min(products), max(products))


def _ends(value: Value) -> tuple[float, float]:
    assert not isinstance(value, ValueKind)
    return (value, value) if isinstance(value, float) else (value.low, value.high)


def _range(low: float, high: float) -> Value:
    return Range(low, high) if math.isfinite(low) and math.isfinite(high) else ValueKind.ANY


def _between(*ends: Value) -> Value:
    """A number between the smallest and the largest of these."""
    if any(isinstance(end, ValueKind) for end in ends):
        return ValueKind.ANY
    bounds = [bound for end in ends for bound in _ends(end)]
    return _range(min(bounds), max(bounds))


def _quotient(a: Value, b: Value) -> Value:
    low, high = _ends(b)
    if isinstance(a, ValueKind) or low == 0 or high == 0:
        return ValueKind.ANY
    if isinstance(a, float) and isinstance(b, float):
        return a / b
    quotients = [x / y for x in _ends(a) for y in (low, high)]
    return _range(min(quotients), max(quotients))


def _power(base: Value, exponent: Value) -> Value:
    """A power of numbers that are computed from positions: of positive ones, or by a small whole number."""
    if isinstance(base, ValueKind) or isinstance(exponent, ValueKind):
        return ValueKind.ANY
    (low, high), (least, most) = _ends(base), _ends(exponent)
    whole = least == most and float(least).is_integer() and least >= 0
    if low <= 0 and not whole:
        return ValueKind.ANY
    try:
        powers = [float(x**y) for x in (low, high) for y in (least, most)]
    except (OverflowError, ZeroDivisionError):
        return ValueKind.ANY
    return _range(min(*powers, *([0.0] if low <= 0 else [])), max(powers))


def _monotone(function: Callable[[float], float], value: Value) -> Value:
    """The result of a function that grows with its argument; a learned argument gives what is learned."""
    if isinstance(value, ValueKind):
        return value
    try:
        if isinstance(value, float):
            return function(value)
        return _range(function(value.low), function(value.high))
    except (OverflowError, ValueError):
        return ValueKind.ANY


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

_MONOTONE: dict[Any, Callable[[float], float]] = {
    aten.exp.default: math.exp,
    aten.sqrt.default: math.sqrt,
    aten.relu.default: lambda x: max(x, 0.0),
}

_ORDINARY = frozenset({*MOVE_OPS, aten.gelu.default, aten.silu.default, aten.abs.default, aten.clamp.default})
"""Operators whose result is of ordinary size if their arguments are; not so logarithms and quotients."""

_COMPUTED = frozenset(
    {
        aten.layer_norm.default,
        aten.group_norm.default,
        aten.softmax.int,
        aten.sigmoid.default,
        aten.tanh.default,
    }
)
"""Operators whose result is taken for ordinary scores (LEARNED), whatever their arguments."""


def constant_value(node: Any) -> float | None:
    """The value that all entries of the node have, if the graph creates it from a constant number; else None."""
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
    elif target in ZEROS_OPS:
        value = 0.0
    elif target in ONES_OPS:
        value = 1.0
    elif target in MOVE_OPS or target in CAST_OPS:
        value = constant_value(args[0])
    else:
        return None
    exact = isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) <= _INTEGERS)
    return as_stored(value, tensor(node).dtype) if exact else None


def number_of(node: Any) -> float | None:
    """As :func:`constant_value`, also behind arithmetic, and where the number stands in a buffer; else None.

    The buffer counts as read, and is checked at each call. So this is to be asked only where the number decides.
    """
    return _number_of(node, {})


def _number_of(node: Any, memo: dict[fx.Node, float | None]) -> float | None:
    constant = constant_value(node)
    if constant is not None or not is_tensor(node):
        return constant
    if node not in memo:
        memo[node] = None
        value = _computed_number(node, memo)
        known = value is not None and not math.isnan(value)
        known = known and value is not None and is_held(value, tensor(node).dtype)
        memo[node] = as_stored(value, tensor(node).dtype) if value is not None and known else None
    return memo[node]


def _computed_number(node: fx.Node, memo: dict[fx.Node, float | None]) -> float | None:
    args: Any = node.args
    stored = node.meta.get("stored")
    if isinstance(stored, StoredPattern):
        return stored.number
    if node.op != "call_function" or node.kwargs.keys() - {"dtype", "device", "memory_format"}:
        return None
    if node.target in MOVE_OPS or node.target in CAST_OPS:
        return _number_of(args[0], memo)
    function = _NUMBERS.get(node.target)
    numbers = [_number_of(arg, memo) for arg in args] if function is not None else [None]
    if function is None or any(number is None for number in numbers):
        return None
    try:
        return float(function(*numbers))
    except (ZeroDivisionError, OverflowError):
        return None


_NUMBERS: dict[Any, Callable[..., float]] = {
    aten.add.Tensor: operator.add,
    aten.add.Scalar: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.sub.Scalar: operator.sub,
    aten.rsub.Scalar: lambda a, b: b - a,
    aten.mul.Tensor: operator.mul,
    aten.mul.Scalar: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.div.Scalar: operator.truediv,
    aten.neg.default: operator.neg,
    aten.abs.default: abs,
}


def is_held(value: float, dtype: torch.dtype) -> bool:
    """Whether a number that is computed in ``dtype`` is itself there: an integer that is too large wraps."""
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return abs(value) <= _INTEGERS and limits.min <= math.trunc(value) <= limits.max


_INTEGERS = 2**53 - 1
"""Integers up to this size are exact in float64, as which single numbers are followed."""
