"""What can be proved about a mask from how the graph computes it.

Two questions are answered here, neither by looking at data. Which values can a term of the scores take
(:func:`possible_values`)? Does every query row keep a key (:func:`attended_everywhere`)? The second is shown by a
witness: a key position, written in terms of the query position, at which the mask is computed to be open.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from attnrewrite.analysis.views import Axis, Dim, Operand
from attnrewrite.ir import CAST_OPS, is_tensor, same, tensor
from attnrewrite.site import Bias, Fill, ScoreMod

__all__ = ["ABSORBING", "ORDINARY", "Kind", "as_stored", "attended_everywhere", "constant_value", "possible_values"]

aten = torch.ops.aten

ABSORBING = -(2.0**126)
"""A score that no finite score of ordinary size can lift: exact in float32 and bfloat16, and still finite after the
multiplication by log2(e) that fused kernels apply before exponentiation."""


class Kind(enum.Enum):
    """What is known of values that are no listed constants.

    LEARNED is an expectation and no proof: a parameter may hold minus infinity as well. It says that the numbers are
    there to be added to scores like any other, so that rounding them is the rounding that any sum has.
    """

    LEARNED = "learned, or computed from what is"
    INTEGER = "an integer"
    ANY = "anything, infinities included"


Value = float | Kind
_MANY = 16

ORDINARY = 64.0
"""Constants up to this size are taken for scores like any other; beyond it they may be there to mask."""


# Which values?


def possible_values(node: fx.Node) -> frozenset[Value]:
    """A set that holds every value the node's entries can take; constants listed, the rest as :class:`Kind`."""
    return _values(node, {})


def _values(node: Any, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    if isinstance(node, (bool, int, float)):
        return frozenset({float(node)})
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return frozenset({Kind.INTEGER})
    if node not in memo:
        memo[node] = frozenset({Kind.ANY})
        memo[node] = _limited(_values_of_call(node, memo), tensor(node).dtype)
    return memo[node]


def _limited(values: frozenset[Value], dtype: torch.dtype) -> frozenset[Value]:
    if dtype is torch.bool:
        return frozenset({0.0, 1.0})
    values = frozenset(as_stored(value, dtype) if isinstance(value, float) else value for value in values)
    if len(values) <= _MANY:
        return values
    return frozenset({Kind.ANY})


def _values_of_call(node: fx.Node, memo: dict[fx.Node, frozenset[Value]]) -> frozenset[Value]:
    target: Any = node.target
    args: Any = node.args
    if node.op in ("placeholder", "get_attr"):
        return frozenset({_kind_of_input(node)})
    if node.op != "call_function":
        return frozenset({Kind.ANY})
    constant = constant_value(node)
    if constant is not None:
        return frozenset({constant})
    if target in _MOVES or target in CAST_OPS or target is aten.embedding.default:
        return _values(args[0], memo)
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        return _values(args[1], memo) | _values(args[2], memo)
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _values(args[0], memo) | _values(args[2], memo)
    if target in (aten.cat.default, aten.stack.default):
        return frozenset().union(*(_values(part, memo) for part in args[0]))
    if target in (aten.tril.default, aten.triu.default, aten.constant_pad_nd.default, aten.pad.default):
        filler = args[2] if target is aten.constant_pad_nd.default and len(args) > 2 else 0.0
        if target is aten.pad.default and (len(args) > 2 or node.kwargs):
            return frozenset({Kind.ANY})
        return _values(args[0], memo) | _values(filler, memo)
    if target in _ARITHMETIC and not node.kwargs:
        function = _ARITHMETIC[target]
        pairs = itertools.product(_values(args[0], memo), _values(args[1], memo))
        return frozenset(function(a, b) for a, b in pairs)
    if target is aten.neg.default:
        return frozenset(_times(value, -1.0) for value in _values(args[0], memo))
    if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        return frozenset({Kind.INTEGER})
    if target in _ORDINARY:
        inputs = [_values(arg, memo) for arg in node.all_input_nodes if is_tensor(arg)]
        if all(value is not Kind.ANY and _ordinary(value) for values in inputs for value in values):
            return frozenset({Kind.LEARNED})
    return frozenset({Kind.ANY})


def _kind_of_input(node: fx.Node) -> Kind:
    """A parameter holds learned numbers; a float tensor that the caller hands over may hold anything."""
    value = tensor(node)
    if not value.dtype.is_floating_point:
        return Kind.INTEGER
    example = node.meta.get("example_value", value)
    return Kind.LEARNED if isinstance(example, torch.nn.Parameter) and example.requires_grad else Kind.ANY


def _ordinary(value: Value) -> bool:
    return abs(value) <= ORDINARY if isinstance(value, float) else value is not Kind.ANY


def _plus(a: Value, b: Value) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a + b
    if Kind.ANY in (a, b):
        return Kind.ANY
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float) and not isinstance(other, float):
            if one <= ABSORBING:
                return one
            return other if one == 0 else Kind.LEARNED if _ordinary(one) else Kind.ANY
    return Kind.INTEGER if a is b is Kind.INTEGER else Kind.LEARNED


def _times(a: Value, b: Value) -> Value:
    if isinstance(a, float) and isinstance(b, float):
        return a * b
    if 0.0 in (a, b) and Kind.ANY not in (a, b):
        return 0.0
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float):
            return other if one == 1.0 else Kind.LEARNED if other is not Kind.ANY and _ordinary(one) else Kind.ANY
    if Kind.ANY in (a, b):
        return Kind.ANY
    return Kind.INTEGER if a is b is Kind.INTEGER else Kind.LEARNED


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

_MOVES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.expand_as.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.index_select.default,
        aten.index.Tensor,
        aten.gather.default,
        aten.roll.default,
        aten.flip.default,
    }
)
"""Operators that only move entries of their first argument about."""

_ORDINARY = frozenset(
    {
        *_MOVES,
        aten.linear.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.relu.default,
        aten.abs.default,
    }
)
"""Operators that make numbers of ordinary size from numbers of ordinary size."""


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
    elif target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        value = 0.0
    elif target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        value = 1.0
    elif target in _MOVES or target in CAST_OPS:
        value = constant_value(args[0])
    else:
        return None
    return as_stored(value, tensor(node).dtype) if isinstance(value, (bool, int, float)) else None


def as_stored(value: float, dtype: torch.dtype) -> float:
    """What ``dtype`` makes of a number: float32's lowest is minus infinity in bfloat16, 0.5 is 0 in int64."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


# Does every row keep a key?


def attended_everywhere(mods: Sequence[ScoreMod], query_axes: Sequence[Axis], key_axes: Sequence[Axis]) -> str | None:
    """A proof that every query row has a key whose score no mod lowers by a large amount; None if none was found.

    The proof is a witness in words, such as "key position = query position". Tried: the query's own position, the
    first key, and the query's position counted from the end.
    """
    masking = [mod for mod in mods if isinstance(mod, (Bias, Fill))]
    if not masking:
        return "there is no mask"
    positions = {
        axis: sympy.Symbol(f"x{i}", integer=True, nonnegative=True) for i, axis in enumerate(_all_axes(masking))
    }
    if len(query_axes) > 1 or len(key_axes) > 1:
        return None
    keys = sympy.sympify(_expression(key_axes[0].size)) if key_axes else sympy.Integer(1)
    queries = sympy.sympify(_expression(query_axes[0].size)) if query_axes else sympy.Integer(1)
    query = (
        positions.get(query_axes[0], sympy.Symbol("q", integer=True, nonnegative=True))
        if query_axes
        else sympy.Integer(0)
    )
    witnesses = [("the first key", sympy.Integer(0))]
    if (keys - queries).is_nonnegative or _at_least(keys, queries):
        witnesses += [
            ("key position = query position", query),
            ("key position = query position, counted from the end", query + keys - queries),
        ]
    for words, witness in witnesses:
        at = dict(positions)
        if key_axes:
            at[key_axes[0]] = witness
        if all(_is_open(mod, at) for mod in masking):
            return words
    return None


def _at_least(a: Any, b: Any) -> bool:
    difference = sympy.expand(a - b)
    return bool(difference.is_nonnegative)


def _all_axes(mods: Sequence[Bias | Fill]) -> list[Axis]:
    axes: dict[Axis, None] = {}
    for mod in mods:
        operand = mod.operand if isinstance(mod, Bias) else mod.condition
        axes.update(dict.fromkeys(operand.axes))
    return list(axes)


def _is_open(mod: Bias | Fill, at: dict[Axis, Any]) -> bool:
    if isinstance(mod, Fill):
        condition = _evaluate(mod.condition.node, _index(mod.condition, at))
        return isinstance(condition, bool) and condition == mod.invert
    if all(isinstance(value, float) and _ordinary(value * mod.factor) for value in possible_values(mod.operand.node)):
        return True
    value = _evaluate(mod.operand.node, _index(mod.operand, at))
    return isinstance(value, sympy.Number) and _ordinary(float(value) * mod.factor)


def _index(operand: Operand, at: dict[Axis, Any]) -> list[Any]:
    return [_position(dim, at) for dim in operand.resolved().layout]


def _position(dim: Dim, at: dict[Axis, Any]) -> Any:
    position: Any = sympy.Integer(0)
    for axis in dim:
        position = position * _expression(axis.size) + at.get(
            axis, sympy.Symbol(f"y{id(axis)}", integer=True, nonnegative=True)
        )
    return position


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


_EXACT = (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)
"""Dtypes in which positions, and what is computed from them here, are what they are in mathematics."""


def _evaluate(node: Any, index: list[Any]) -> Any:
    """The node's entry at ``index``: a truth value (bool), an expression of positions or a number (sympy), or None.

    None means that nothing is known. A truth value is returned only for boolean nodes, and only when it holds for
    every position.
    """
    if isinstance(node, bool):
        return node
    if isinstance(node, (int, float)):
        return sympy.sympify(node) if math.isfinite(node) else None
    if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return _expression(node.meta["val"])
    if not isinstance(node, fx.Node) or node.op != "call_function" or not is_tensor(node):
        return None
    dtype = tensor(node).dtype
    constant = constant_value(node)
    if constant is not None:
        return bool(constant) if dtype is torch.bool else _evaluate(constant, index)
    if dtype not in _EXACT:
        return None
    target: Any = node.target
    args: Any = node.args
    moved = _moved_index(node, index)
    if moved is not None:
        return _evaluate(args[0], moved)
    if target in CAST_OPS:
        return _as_dtype(_evaluate(args[0], index), tensor(args[0]).dtype, dtype)
    if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        start, step = (0, 1) if target is aten.arange.default else (args[0], args[2] if len(args) > 2 else 1)
        start, step = _integer(start), _integer(step)
        return None if start is None or step is None else sympy.expand(start + step * index[0])
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        condition = _operand(args[0], node, index)
        return _operand(args[1] if condition else args[2], node, index) if isinstance(condition, bool) else None
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        condition = _operand(args[1], node, index)
        return _operand(args[2] if condition else args[0], node, index) if isinstance(condition, bool) else None
    if target in (aten.tril.default, aten.triu.default):
        diagonal = _integer(args[1] if len(args) > 1 else 0)
        if diagonal is None:
            return None
        kept = _compare("le" if target is aten.tril.default else "ge", index[-1] - index[-2], diagonal)
        if kept is None:
            return None
        return _evaluate(args[0], index) if kept else (False if dtype is torch.bool else sympy.Integer(0))
    if target in _COMPARISONS:
        return _compare(_COMPARISONS[target], _operand(args[0], node, index), _operand(args[1], node, index))
    if target in _LOGIC:
        return _logic(_LOGIC[target], [_operand(arg, node, index) for arg in args])
    if target in _SUMS and not node.kwargs:
        a, b = (_as_number(_operand(arg, node, index)) for arg in args[:2])
        return None if a is None or b is None or dtype is torch.bool else sympy.expand(_SUMS[target](a, b))
    return None


_LOGIC = {
    aten.logical_not.default: "not",
    aten.bitwise_not.default: "not",
    aten.logical_and.default: "and",
    aten.bitwise_and.Tensor: "and",
    aten.logical_or.default: "or",
    aten.bitwise_or.Tensor: "or",
}
_SUMS: dict[Any, Callable[[Any, Any], Any]] = {
    aten.add.Tensor: lambda a, b: a + b,
    aten.sub.Tensor: lambda a, b: a - b,
    aten.mul.Tensor: lambda a, b: a * b,
    aten.rsub.Scalar: lambda a, b: b - a,
}


def _logic(relation: str, values: list[Any]) -> bool | None:
    """Three-valued logic. Anything but a truth value counts as unknown."""
    truths = [value if isinstance(value, bool) else None for value in values]
    if relation == "not":
        return None if truths[0] is None else not truths[0]
    decisive = relation == "or"
    if decisive in truths:
        return decisive
    return None if None in truths else not decisive


def _as_number(value: Any) -> Any:
    return sympy.Integer(int(value)) if isinstance(value, bool) else value


def _as_dtype(value: Any, source: torch.dtype, dtype: torch.dtype) -> Any:
    """A cast between dtypes that hold positions exactly; to bool only where the answer is the same everywhere."""
    if value is None or source not in _EXACT:
        return None
    if dtype is torch.bool:
        return value if isinstance(value, bool) else _compare("ne", value, sympy.Integer(0))
    if source.is_floating_point and not dtype.is_floating_point:
        return None
    return _as_number(value)


def _integer(value: Any) -> Any:
    """An integer argument of an operator, as an expression."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return _expression(value)
    return None


def _operand(arg: Any, node: fx.Node, index: list[Any]) -> Any:
    """The entry of a broadcast operand at the result's index."""
    if not is_tensor(arg):
        return _evaluate(arg, index)
    shape = tensor(arg).shape
    tail = index[len(index) - len(shape) :]
    return _evaluate(arg, [sympy.Integer(0) if same(size, 1) else i for size, i in zip(shape, tail, strict=True)])


def _moved_index(node: fx.Node, index: list[Any]) -> list[Any] | None:
    """Where in the first argument the entry at ``index`` comes from, for operators that only move entries."""
    target: Any = node.target
    args: Any = node.args
    if target in (
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    ):
        return index
    if target is aten.unsqueeze.default:
        dim = args[1] % len(index)
        return index[:dim] + index[dim + 1 :]
    if target in (aten.expand.default, aten.expand_as.default):
        shape = tensor(args[0]).shape
        tail = index[len(index) - len(shape) :]
        return [sympy.Integer(0) if same(size, 1) else i for size, i in zip(shape, tail, strict=True)]
    if target is aten.transpose.int:
        a, b = args[1] % len(index), args[2] % len(index)
        result = list(index)
        result[a], result[b] = result[b], result[a]
        return result
    if target is aten.permute.default:
        result = list(index)
        for position, dim in enumerate(args[1]):
            result[dim % len(index)] = index[position]
        return result
    if target is aten.slice.Tensor:
        dim = (args[1] if len(args) > 1 else 0) % len(index)
        start = _integer(args[2] if len(args) > 2 and args[2] is not None else 0)
        step = _integer(args[4] if len(args) > 4 else 1)
        if start is None or step is None or not sympy.sympify(start).is_nonnegative:
            return None
        return [*index[:dim], start + step * index[dim], *index[dim + 1 :]]
    if target is aten.select.int:
        dim = args[1] % (len(index) + 1)
        position = _integer(args[2])
        if position is None or not sympy.sympify(position).is_nonnegative:
            return None
        return [*index[:dim], sympy.sympify(position), *index[dim:]]
    if target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        before, after = tensor(args[0]).shape, tensor(node).shape
        kept = [i for i, size in zip(index, after, strict=True) if not same(size, 1)]
        wanted = [size for size in before if not same(size, 1)]
        sizes = [size for size in after if not same(size, 1)]
        if len(wanted) != len(sizes) or not all(same(a, b) for a, b in zip(wanted, sizes, strict=True)):
            return None
        remaining = iter(kept)
        return [sympy.Integer(0) if same(size, 1) else next(remaining) for size in before]
    return None


_COMPARISONS = {
    aten.le.Tensor: "le",
    aten.le.Scalar: "le",
    aten.lt.Tensor: "lt",
    aten.lt.Scalar: "lt",
    aten.ge.Tensor: "ge",
    aten.ge.Scalar: "ge",
    aten.gt.Tensor: "gt",
    aten.gt.Scalar: "gt",
    aten.eq.Tensor: "eq",
    aten.eq.Scalar: "eq",
    aten.ne.Tensor: "ne",
    aten.ne.Scalar: "ne",
}


def _compare(relation: str, a: Any, b: Any) -> bool | None:
    if a is None or b is None:
        return None
    difference = sympy.expand(_as_number(a) - _as_number(b))
    answers = {
        "le": difference.is_nonpositive,
        "lt": difference.is_negative,
        "ge": difference.is_nonnegative,
        "gt": difference.is_positive,
        "eq": difference.is_zero,
        "ne": None if difference.is_zero is None else not difference.is_zero,
    }
    answer = answers[relation]
    return None if answer is None else bool(answer)
