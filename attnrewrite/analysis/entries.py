"""Symbolic entries of a tensor: the value at an index of symbols, as the graph computes it.

An entry of a boolean tensor is a formula (:mod:`attnrewrite.analysis.formulas`). An entry of a numeric tensor is an
expression of positions and sizes, one of a few numbers or integer expressions depending on formulas (:class:`Cases`,
:class:`Pieces`), or :class:`Unknown`, which equals only itself.

An expression is over the integers. Each step is followed only where the dtype that it is computed in holds every value
that the expression may have, so that nothing wraps and nothing is rounded.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attnrewrite.analysis.formulas import (
    AtLeast,
    Formula,
    Known,
    at_least,
    conjunction,
    disjunction,
    largest,
    negation,
    symbols,
)
from attnrewrite.analysis.formulas import parts as conjuncts
from attnrewrite.analysis.values import constant_value, is_held
from attnrewrite.ir.bounds import ENTRY_NUMBERS
from attnrewrite.ir.nodes import is_tensor, same, tensor
from attnrewrite.ir.ops import (
    ARANGE_OPS,
    CAST_OPS,
    COPY_OPS,
    MASKED_FILL_OPS,
    REMAINDER_OPS,
    RESHAPE_OPS,
    SCATTER_OPS,
    TRIANGLE_OPS,
    WHERE_OPS,
)
from attnrewrite.ir.rounding import as_stored
from attnrewrite.ir.spans import span_of
from attnrewrite.ir.stored import StoredPattern, Triangle

__all__ = ["Cases", "Entries", "Unknown", "expression_of", "symbols_of"]

aten = torch.ops.aten


_EXACT = (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)
"""Dtypes in which positions, and the arithmetic on them that is followed here, are exact."""


@dataclass(frozen=True)
class Cases:
    """Numbers, each with the formula under which the entry has it; exactly one of the formulas holds."""

    numbers: tuple[tuple[float, Formula], ...]

    def where(self, accepted: Callable[[float], bool]) -> Formula:
        """The formula under which the entry is a number that ``accepted`` accepts."""
        return disjunction(formula for number, formula in self.numbers if accepted(number))


@dataclass(frozen=True)
class Pieces:
    """Integer expressions, each with the formula under which it is the entry; exactly one of the formulas holds."""

    parts: tuple[tuple[Any, Formula], ...]


@dataclass(frozen=True)
class Unknown:
    """An entry of which nothing is known but ``key``, which names it, the symbols that it depends on, and its dtype.

    The dtype is None for what is no tensor.
    """

    key: Hashable
    symbols: frozenset[Any]
    dtype: torch.dtype | None = None


Entry = Any
"""Formula | sympy.Expr | Cases | Pieces | Unknown."""


def expression_of(size: Any) -> Any:
    """A size as an expression of the graph's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


class Entries:
    """Reads entries of tensors; ``highest`` maps each position's symbol to its largest value."""

    def __init__(self, highest: Mapping[Any, Any]) -> None:
        self._highest = ChainMap[Any, Any]({}, highest)  # type: ignore[arg-type]
        self._memo: dict[tuple[fx.Node, tuple[Any, ...]], Entry] = {}
        self._steps: dict[tuple[fx.Node, int], Any] = {}

    def at(self, node: Any, index: Sequence[Any]) -> Entry:
        """The entry of ``node``, a tensor's node or a number, at an index of expressions."""
        if isinstance(node, bool):
            return node
        if isinstance(node, (int, float)):
            # Numbers are followed as float64.
            return (
                Unknown(node, frozenset()) if abs(node) > _INTEGERS and isinstance(node, int) else _number(float(node))
            )
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), (int, torch.SymInt)):
            return expression_of(node.meta["val"])
        if not is_tensor(node):
            return Unknown(node, frozenset())
        key = (node, tuple(index))
        if key not in self._memo:
            entry = self._entry(node, list(index))
            dtype = tensor(node).dtype
            if entry is None:
                self._memo[key] = self._unknown(node, index)
            elif node.target in ARANGE_OPS and dtype is torch.int64:
                self._memo[key] = entry  # It ends below a number that is an integer of this size.
            else:
                self._memo[key] = _in_dtype(entry, dtype)
            if self._memo[key] is None:
                self._memo[key] = self._unknown(node, index)
        return self._memo[key]

    def _unknown(self, node: fx.Node, index: Sequence[Any]) -> Entry:
        symbols = frozenset().union(*(position.free_symbols for position in index))
        if tensor(node).dtype is torch.bool:
            return Known((node, tuple(index)), symbols)
        return Unknown((node, tuple(index)), symbols, tensor(node).dtype)

    def _entry(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of a node that is computed; None if nothing is known of it."""
        if node.op != "call_function":
            return self._stored_entry(node, index)
        dtype = tensor(node).dtype
        constant = constant_value(node)
        if constant is not None:
            return bool(constant) if dtype is torch.bool else _number(constant)
        target: Any = node.target
        args: Any = node.args
        moved = _moved_index(node, index)
        if moved is not None:
            return self.at(args[0], moved)
        if target in CAST_OPS:
            entry = self.at(args[0], index)
            if dtype is torch.bool and tensor(args[0]).dtype is not torch.bool:
                return self._compared("ne", entry, sympy.Integer(0), exact=True)
            return entry
        if target in ARANGE_OPS:
            start, step = (0, 1) if target is aten.arange.default else (args[0], args[2] if len(args) > 2 else 1)
            start, step = _integer(start), _integer(step)
            return None if start is None or step is None else sympy.expand(start + step * index[0])
        if target in WHERE_OPS:
            condition, first, second = (self._operand(arg, index) for arg in args[:3])
            return self._where(condition, first, second, dtype)
        if target in MASKED_FILL_OPS:
            otherwise, condition, filled = (self._operand(arg, index) for arg in args[:3])
            return self._where(condition, filled, otherwise, dtype)
        if target in TRIANGLE_OPS:
            diagonal = _integer(args[1] if len(args) > 1 else 0)
            if diagonal is None:
                return None
            distance = index[-1] - index[-2] - diagonal
            kept = at_least(-distance if target is aten.tril.default else distance, self._highest)
            nothing = False if dtype is torch.bool else sympy.Integer(0)
            return self._where(kept, self.at(args[0], index), nothing, dtype)
        if target in _COMPARISONS:
            operands = self._promoted(args[:2], index)
            exact = not any(map(_may_be_nan, args[:2]))
            return None if operands is None else self._compared(_COMPARISONS[target], *operands, exact)
        if target in _LOGIC:
            return self._logic(_LOGIC[target], args, index)
        if target in _SUMS and not node.kwargs and dtype is not torch.bool:
            operands = self._promoted(args[:2], index)
            return None if operands is None else _combined(_SUMS[target], *operands, dtype)
        if target is aten.neg.default:
            return _combined(lambda a, b: a * b, self.at(args[0], index), sympy.Integer(-1), dtype)
        if target is aten.abs.default:
            return self._absolute(self.at(args[0], index))
        if target in SCATTER_OPS:
            return self._scattered(node, index)
        reader = _READERS.get(target)
        return None if reader is None else reader(self, node, index)

    # Integers.

    def _joined(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of ``cat`` or ``stack``."""
        dim = _argument(node, 1, "dim", 0)
        given: Any = node.args[0]
        if not isinstance(dim, int) or not all(map(is_tensor, given)):
            return None
        dim %= len(index)
        if node.target is aten.stack.default:
            rest = [*index[:dim], *index[dim + 1 :]]
            if any(tensor(part).dtype is not tensor(node).dtype for part in given):
                return None
            return self._one_of(
                [(sympy.Integer(1), self.at(part, rest)) for part in given], index[dim], tensor(node).dtype
            )
        # An empty tensor of one dimension counts as none.
        parts = [part for part in given if tensor(part).dim() == len(index)]
        return self._concatenated(parts, index, dim, tensor(node).dtype)

    def _concatenated(self, parts: Sequence[Any], index: list[Any], dim: int, dtype: torch.dtype) -> Entry | None:
        """The entry of tensors side by side along ``dim``."""
        pieces: list[tuple[Any, Entry | None]] = []
        before: Any = sympy.Integer(0)
        for part in parts:
            size = tensor(part).shape[dim]
            own = sympy.Integer(0) if same(size, 1) else sympy.expand(index[dim] - before)
            entry: Entry | None = self._within(part, index, dim, own)
            if tensor(part).dtype is not dtype:
                entry = None if isinstance(entry, Unknown) else _in_dtype(entry, dtype)
            pieces.append((expression_of(size), entry))
            before += expression_of(size)
        return self._one_of(pieces, index[dim], dtype)

    def _within(self, node: fx.Node, index: list[Any], dim: int, own: Any) -> Entry:
        """The entry at the position ``own`` along ``dim``, which counts only where that is a position of the tensor."""
        step = self._step(node, dim)
        entry = self.at(node, [*index[:dim], step, *index[dim + 1 :]])
        if isinstance(entry, sympy.Expr):
            return sympy.expand(entry.subs(step, own))
        return entry if step not in symbols_of(entry) else self.at(node, [*index[:dim], own, *index[dim + 1 :]])

    def _step(self, node: fx.Node, dim: int) -> Any:
        """The symbol of any position of a tensor along ``dim``."""
        if (node, dim) not in self._steps:
            step = sympy.Dummy("step", integer=True, nonnegative=True)
            self._steps[node, dim] = step
            self._highest[step] = expression_of(tensor(node).shape[dim]) - 1
        return self._steps[node, dim]

    def _one_of(self, pieces: Sequence[tuple[Any, Entry | None]], position: Any, dtype: torch.dtype) -> Entry | None:
        """The entry at ``position`` of parts, each given by its size and its entry there; parts that do not reach it
        may have any entry."""
        if not pieces or not ENTRY_NUMBERS.allows(len(pieces)) or any(entry is None for _, entry in pieces):
            return None
        entry: Entry | None
        (_, entry), *others = reversed(pieces)
        stop = sum((size for size, _ in pieces[:-1]), sympy.Integer(0))
        for size, earlier in others:
            within = at_least(stop - 1 - position, self._highest)
            entry, stop = self._where(within, earlier, entry, dtype), stop - size
            if entry is None:
                return None
        return entry

    def _padded(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of a tensor with a number around it."""
        source: Any = node.args[0]
        pads, value = _argument(node, 1, "pad", ()), _argument(node, 2, "value", 0.0)
        if node.target is aten.pad.default:
            mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", 0.0)
            if mode != "constant":
                return None
        value = 0.0 if value is None else value
        if not isinstance(value, (bool, int, float)) or any(_integer(pad) is None for pad in pads):
            return None
        dtype = tensor(node).dtype
        outside: Entry = bool(value) if dtype is torch.bool else self.at(value, [])
        own, inside = list(index), []
        for place, before in enumerate(pads[::2]):
            dim = len(index) - 1 - place
            own[dim] = index[dim] - _integer(before)
            last = expression_of(tensor(source).shape[dim]) - 1
            inside += [at_least(own[dim], self._highest), at_least(last - own[dim], self._highest)]
        return self._where(conjunction(inside), self.at(source, own), outside, dtype)

    def _difference(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of ``diff``: of each entry and the one before it."""
        dtype = tensor(node).dtype
        source: Any = node.args[0]
        count, dim = _argument(node, 1, "n", 1), _argument(node, 2, "dim", -1)
        before, after = _argument(node, 3, "prepend", None), _argument(node, 4, "append", None)
        if dtype not in _COUNTING or count != 1 or not isinstance(dim, int):
            return None
        dim %= len(index)
        parts = [part for part in (before, source, after) if part is not None]
        following = [*index[:dim], index[dim] + 1, *index[dim + 1 :]]
        first, second = (self._concatenated(parts, place, dim, dtype) for place in (index, following))
        return None if first is None or second is None else _combined(lambda a, b: b - a, first, second, dtype)

    def _running_sum(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of ``cumsum`` over entries that are all the same."""
        source: Any = node.args[0]
        dim = _argument(node, 1, "dim", None)
        if tensor(node).dtype not in _COUNTING or not isinstance(dim, int) or not index:
            return None
        if tensor(source).dtype.is_floating_point:
            return None
        dim %= len(index)
        step = self._step(source, dim)
        added = _pieces(self.at(source, [*index[:dim], step, *index[dim + 1 :]]))
        if added is None or any(step in expression.free_symbols | symbols_of(formula) for expression, formula in added):
            return None
        return _pieced([(sympy.expand(expression * (index[dim] + 1)), formula) for expression, formula in added])

    def _clamped(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of ``clamp``, ``minimum`` or ``maximum`` of integers."""
        dtype = tensor(node).dtype
        args: Any = node.args
        low: Any = None
        high: Any = None
        if node.target is aten.clamp.default:
            low, high = _argument(node, 1, "min", None), _argument(node, 2, "max", None)
        elif node.target in (aten.clamp_min.default, aten.maximum.default, aten.max.other):
            low = args[1]
        else:
            high = args[1]
        if dtype not in _COUNTING:
            return None
        entry: Entry | None = _in_dtype(self._operand(args[0], index), dtype)
        for bound, sign in ((low, 1), (high, -1)):
            if bound is None or entry is None:
                continue
            limit = _in_dtype(self._operand(bound, index), dtype)
            if limit is None:
                return None
            # The upper bound counts last, as in PyTorch.
            beyond = self._compared("lt", entry, limit, True) if sign > 0 else self._compared("lt", limit, entry, True)
            entry = self._where(beyond, limit, entry, dtype)
        return entry

    def _divided(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of a quotient or remainder of integers by a positive number that is known to divide a part."""
        dtype = tensor(node).dtype
        args: Any = node.args
        divisor = args[1]
        mode = node.kwargs.get("rounding_mode", "floor")
        if dtype not in _COUNTING or not isinstance(divisor, int) or isinstance(divisor, bool) or divisor < 1:
            return None
        parts = _pieces(_in_dtype(self._operand(args[0], index), dtype))
        if parts is None:
            return None
        results: list[tuple[Any, Formula]] = []
        for expression, formula in parts:
            quotient, rest = _split(expression, divisor)
            bounds = (rest, divisor - 1 - rest)
            if not all(at_least(bound, self._highest) is True for bound in bounds):
                return None
            if mode == "trunc" and at_least(expression, self._highest) is not True:
                return None
            results.append((rest if node.target in REMAINDER_OPS else quotient, formula))
        return None if mode is None else _pieced(results)

    def _taken(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of ``index_select``, ``gather`` or ``take_along_dim`` at computed positions."""
        table: Any = node.args[0]
        places = (2, 1) if node.target is aten.take_along_dim.default else (1, 2)
        dim, positions = (
            _argument(node, place, name, None) for place, name in zip(places, ("dim", "index"), strict=True)
        )
        if not index or not isinstance(dim, int) or not is_tensor(positions):
            return None
        if tensor(positions).dtype not in _COUNTING:
            return None
        dim %= len(index)
        if node.target is aten.index_select.default:
            return self._looked_up(table, index[:dim], [self._operand(positions, [index[dim]])], index[dim + 1 :])
        if node.target is aten.take_along_dim.default:
            shapes = tensor(table).shape, tensor(positions).shape
            if any(not same(a, b) for own, (a, b) in enumerate(zip(*shapes, strict=True)) if own != dim):
                return None
        return self._looked_up(table, index[:dim], [self._operand(positions, index)], index[dim + 1 :])

    def _looked_up(
        self, table: fx.Node, before: Sequence[Any], entries: Sequence[Entry], after: Sequence[Any]
    ) -> Entry | None:
        """The entry of a table at computed positions; None if they are not known, or may be negative."""
        if not all(isinstance(entry, sympy.Expr) and entry.is_integer for entry in entries):
            return None
        # A negative position counts from the end, which is not modeled.
        if not all(at_least(entry, self._highest) is True for entry in entries):
            return None
        return self.at(table, [*before, *entries, *after])

    # Masks.

    def _scattered(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry after an assignment to a slice, row or diagonal: the new value inside, the old one outside."""
        args: Any = node.args
        before, written = args[:2]
        if node.target is aten.diagonal_scatter.default:
            place = _diagonal_arguments(args[2:], node.kwargs, len(index))
            if place is None:
                return None
            offset, rows, columns = place
            distance = index[columns] - index[rows] - offset
            inside = conjunction([at_least(distance, self._highest), at_least(-distance, self._highest)])
            rest = [position for dim, position in enumerate(index) if dim not in (rows, columns)]
            own = [*rest, index[rows] if offset >= 0 else index[columns]]
        else:
            span = span_of(node, tensor(written), 2)
            if span is None:
                return None
            given: Any = args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
            dim = given % len(index)
            first, size = expression_of(span.start), expression_of(span.size)
            from_first = index[dim] - first
            inside = conjunction([at_least(from_first, self._highest), at_least(size - 1 - from_first, self._highest)])
            own = [*index[:dim], *([from_first] * (node.target is aten.slice_scatter.default)), *index[dim + 1 :]]
        # Outside of the slice ``own`` is no valid index, but there the condition does not hold.
        return self._where(inside, self.at(written, own), self.at(before, index), tensor(node).dtype)

    def _operand(self, arg: Any, index: list[Any]) -> Entry:
        """The entry of an operand, which may broadcast, at an index of the result."""
        if not is_tensor(arg):
            return self.at(arg, index)
        shape = tensor(arg).shape
        tail = index[len(index) - len(shape) :]
        return self.at(arg, [sympy.Integer(0) if same(size, 1) else i for size, i in zip(shape, tail, strict=True)])

    def _promoted(self, args: Sequence[Any], index: list[Any]) -> tuple[Entry, Entry] | None:
        """The entries of two operands in their common dtype; None if one of them may change when it is cast."""
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        dtype = torch.result_type(*(_for_promotion(value) for value in values))
        entries: list[Entry] = []
        for arg, value in zip(args, values, strict=True):
            entry = self._operand(arg, index)
            # A number that an operator takes as an integer is one of int64.
            whole = isinstance(value, (int, torch.SymInt)) and type(value) is not bool and dtype is torch.int64
            if not whole and (not isinstance(value, torch.Tensor) or value.dtype is not dtype):
                entry = _in_dtype(entry, dtype)
            entries.append(entry)
        return None if None in entries else (entries[0], entries[1])

    def _gathered(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of ``table[rows, columns]`` with computed positions; None if they may be negative."""
        table: Any = node.args[0]
        positions = node.args[1]
        if not is_tensor(table) or not isinstance(positions, (list, tuple)):
            return None
        given = [place for place, position in enumerate(positions) if position is not None]
        if not given or given != list(range(given[0], given[0] + len(given))):
            return None
        parts = [positions[place] for place in given]
        if not all(is_tensor(part) and not tensor(part).dtype.is_floating_point for part in parts):
            return None
        if any(tensor(part).dtype is torch.bool for part in parts):
            return None
        rank = max(tensor(part).dim() for part in parts)
        own = index[given[0] : given[0] + rank]
        entries = [self._operand(part, own) for part in parts]
        return self._looked_up(table, index[: given[0]], entries, index[given[0] + rank :])

    def _where(self, condition: Formula, first: Entry, second: Entry, dtype: torch.dtype) -> Entry | None:
        """The entry of ``where(condition, first, second)``; None if nothing is known of it."""
        if isinstance(condition, bool):
            chosen = first if condition else second
            return self._as_truth(chosen) if dtype is torch.bool else chosen
        if not _is_formula(condition):
            return None
        if dtype is torch.bool:
            chosen, other = self._as_truth(first), self._as_truth(second)
            return disjunction([conjunction([condition, chosen]), conjunction([negation(condition), other])])
        a, b = _cases(first), _cases(second)
        if a is None or b is None:
            pieces = _pieces(first), _pieces(second)
            if pieces[0] is None or pieces[1] is None:
                return None
            return _pieced(
                [(number, conjunction([condition, formula])) for number, formula in pieces[0]]
                + [(number, conjunction([negation(condition), formula])) for number, formula in pieces[1]]
            )
        return _merged(
            [(number, conjunction([condition, formula])) for number, formula in a.numbers]
            + [(number, conjunction([negation(condition), formula])) for number, formula in b.numbers],
            dtype,
        )

    def _as_truth(self, entry: Entry) -> Formula:
        """The entry as a formula: a number counts as true where it is not 0."""
        return entry if _is_formula(entry) else self._compared("ne", entry, sympy.Integer(0), exact=True)

    def _absolute(self, entry: Entry | None) -> Entry | None:
        if isinstance(entry, Cases):
            return Cases(tuple((abs(number), formula) for number, formula in entry.numbers))
        return sympy.Abs(entry) if isinstance(entry, sympy.Expr) and entry.is_integer else None

    def _logic(self, relation: str, args: Sequence[Any], index: list[Any]) -> Entry | None:
        """The entry of a logical or bitwise operator; None if an argument of the latter is not boolean."""
        entries = []
        for arg in args:
            entry = self._operand(arg, index)
            if not _is_formula(entry):
                if not is_tensor(arg) or not relation.startswith("logical"):
                    return None
                entry = self._as_truth(entry)
            entries.append(entry)
        name = relation.removeprefix("logical ")
        if name == "not":
            return negation(entries[0])
        if name == "xor":
            a, b = entries
            return disjunction([conjunction([a, negation(b)]), conjunction([negation(a), b])])
        return conjunction(entries) if name == "and" else disjunction(entries)

    def _compared(self, relation: str, a: Entry, b: Entry, exact: bool) -> Formula:
        """The formula of ``a relation b``.

        ``exact``: both are integers or booleans. Floats may be NaN, which is neither less, equal nor greater.
        """
        if relation == "ne":
            return negation(self._compared("eq", a, b, exact))
        if relation in ("gt", "ge"):
            return self._compared("lt" if relation == "gt" else "le", b, a, exact)
        if _is_formula(a) and _is_formula(b) and relation == "eq":
            return disjunction([conjunction([a, b]), conjunction([negation(a), negation(b)])])
        if isinstance(a, Pieces) or isinstance(b, Pieces):
            ours, theirs = (entry.parts if isinstance(entry, Pieces) else ((entry, True),) for entry in (a, b))
            return disjunction(
                conjunction([f, g, self._compared(relation, x, y, exact)]) for x, f in ours for y, g in theirs
            )
        first, second = _cases(a), _cases(b)
        if first is not None and second is not None:
            return disjunction(
                conjunction([f, g]) for x, f in first.numbers for y, g in second.numbers if _RELATIONS[relation](x, y)
            )
        if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and (b - a).is_integer:
            difference = sympy.expand(b - a)
            if relation == "eq":
                return conjunction([at_least(difference, self._highest), at_least(-difference, self._highest)])
            return at_least(difference - int(relation == "lt"), self._highest)
        keys = (_key(a), _key(b))
        symbols = symbols_of(a) | symbols_of(b)
        if relation == "eq":
            return True if exact and keys[0] == keys[1] else Known(("eq", frozenset(keys)), symbols)
        if relation == "le" and exact:
            return negation(Known(("lt", keys[1], keys[0]), symbols))
        return Known((relation, *keys), symbols)

    def _stored_entry(self, node: fx.Node, index: list[Any]) -> Entry | None:
        """The entry of a tensor that holds one number, a range, or a triangle (GPT-2's causal buffer); else None."""
        stored = node.meta.get("stored")
        pattern = stored.pattern if isinstance(stored, StoredPattern) else None
        dtype = tensor(node).dtype
        if isinstance(pattern, Triangle):
            kept = at_least(index[-2] - index[-1] + pattern.diagonal, self._highest)
            inside, outside = _number(pattern.inside), _number(pattern.outside)
            if dtype is torch.bool:
                return kept if pattern.inside else negation(kept)
            return self._where(kept, inside, outside, dtype)
        if isinstance(pattern, range):
            return index[-1] + pattern.start
        if pattern is None:
            return None
        return bool(pattern) if dtype is torch.bool else _number(pattern)


def _may_be_nan(value: Any) -> bool:
    """Whether an operand may hold NaN: a float that changes between calls may, too."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point
    return not isinstance(value, (bool, int, torch.SymInt)) and not (isinstance(value, float) and math.isfinite(value))


def _for_promotion(value: Any) -> Any:
    """The value itself, or for a symbolic number a plain one of the same type, for type promotion."""
    if isinstance(value, torch.SymInt):
        return 1
    return 1.0 if isinstance(value, torch.SymFloat) else value


def _is_formula(entry: Entry) -> bool:
    return not isinstance(entry, (sympy.Expr, Cases, Pieces, Unknown)) and entry is not None


def _number(value: float) -> Entry:
    if not math.isfinite(value):
        return Cases(((value, True),))
    return sympy.Integer(int(value)) if value == int(value) else sympy.Float(value, 17)


def _cases(entry: Entry) -> Cases | None:
    """The entry as numbers with formulas; None if it is unknown or an expression of positions."""
    if isinstance(entry, Cases):
        return entry
    if isinstance(entry, sympy.Number):
        return Cases(((float(entry), True),))
    if _is_formula(entry):
        return Cases(((1.0, entry), (0.0, negation(entry))))
    return None


def _pieces(entry: Entry | None) -> tuple[tuple[Any, Formula], ...] | None:
    """The entry as integer expressions with formulas; None if it is not known to be one."""
    if isinstance(entry, Pieces):
        return entry.parts
    if isinstance(entry, sympy.Expr):
        return ((entry, True),) if entry.is_integer else None
    cases = _cases(entry)
    if cases is None or not all(number.is_integer() for number, _ in cases.numbers):
        return None
    return tuple((sympy.Integer(int(number)), formula) for number, formula in cases.numbers)


def _pieced(parts: Sequence[tuple[Any, Formula]]) -> Entry | None:
    """The entry with one formula for each expression; None if there are too many."""
    merged: dict[Any, Formula] = {}
    for expression, formula in parts:
        if formula is not False:
            merged[expression] = disjunction([merged.get(expression, False), formula])
    for expression in list(merged):
        # Where a position is 0, what is the same at 0 is the same.
        first = {position: 0 for position in map(_first, conjuncts(merged[expression])) if position is not None}
        for other in merged if first else ():
            if other is not expression and sympy.expand(other.subs(first) - expression.subs(first)) == 0:
                merged[other] = disjunction([merged[other], merged.pop(expression)])
                break
    if not ENTRY_NUMBERS.allows(len(merged)):
        return None
    if len(merged) == 1:
        return next(iter(merged))
    if all(expression.is_Integer and abs(expression) <= _INTEGERS for expression in merged):
        return Cases(
            tuple(sorted(((float(number), formula) for number, formula in merged.items()), key=lambda c: c[0]))
        )
    return Pieces(tuple(merged.items()))


def _first(formula: Formula) -> Any:
    """The position, which is not negative, that the formula says is 0; None if it says nothing like it."""
    position = -formula.expression if isinstance(formula, AtLeast) else None
    return position if isinstance(position, sympy.Symbol) and position.is_nonnegative else None


def _split(expression: Any, divisor: int) -> tuple[Any, Any]:
    """(quotient, rest) with ``expression = divisor * quotient + rest``, the rest without what the divisor divides."""
    quotient: Any = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(expression)):
        factor, symbol = term.as_coeff_Mul()
        if factor.is_Integer and symbol.is_integer:
            quotient += (factor // divisor if symbol == 1 or factor % divisor == 0 else 0) * symbol
    return sympy.expand(quotient), sympy.expand(expression - divisor * quotient)


def _merged(numbers: Sequence[tuple[float, Formula]], dtype: torch.dtype) -> Entry | None:
    """The entry with one formula for each number, rounded to ``dtype``; None if one is NaN or there are too many."""
    merged: dict[float, Formula] = {}
    for number, formula in numbers:
        if formula is False:
            continue
        if not is_held(number, dtype):
            return None
        number = as_stored(number, dtype)
        if math.isnan(number):
            return None
        merged[number] = disjunction([merged.get(number, False), formula])
    if not ENTRY_NUMBERS.allows(len(merged)):
        return None
    if len(merged) == 1:
        return _number(next(iter(merged)))
    return Cases(tuple(sorted(merged.items(), key=lambda item: item[0])))


def _combined(function: Callable[[Any, Any], Any], a: Entry, b: Entry, dtype: torch.dtype) -> Entry | None:
    """The entry of ``function(a, b)``; None if nothing is known of it."""
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return sympy.expand(function(a, b))
    first, second = _cases(a), _cases(b)
    if first is None or second is None:
        ours, theirs = _pieces(a), _pieces(b)
        if ours is None or theirs is None:
            return None
        return _pieced([(sympy.expand(function(x, y)), conjunction([f, g])) for x, f in ours for y, g in theirs])
    return _merged([(function(x, y), conjunction([f, g])) for x, f in first.numbers for y, g in second.numbers], dtype)


def _in_dtype(entry: Entry, dtype: torch.dtype) -> Entry | None:
    """The entry as ``dtype`` holds it; None if its value there is not exactly known."""
    if dtype is torch.bool:
        return entry if _is_formula(entry) else None
    if isinstance(entry, Unknown):
        # Rounded, it is another number.
        return entry if dtype in _EXACT and (entry.dtype is dtype or (entry.dtype, dtype) in _WIDER) else None
    if isinstance(entry, (sympy.Number, Cases)) or _is_formula(entry):
        cases = _cases(entry)
        return None if cases is None else _merged(cases.numbers, dtype)
    if isinstance(entry, Pieces):
        held = all(_in_dtype(expression, dtype) == expression for expression, _ in entry.parts)
        return entry if dtype in _EXACT and held else None
    if entry is None:
        return None
    # Each step of computing a fraction of positions rounds, so its value is not exactly known.
    if dtype not in _EXACT or not entry.is_integer:
        return None
    return entry if largest(entry) <= _EXACT_UP_TO[dtype] else None


_WIDER = frozenset({(torch.int32, torch.int64), (torch.int32, torch.float64), (torch.float32, torch.float64)})
"""Dtypes, each with one that holds all of its numbers."""

_INTEGERS = 2**53 - 1
"""Integers up to this size are exact in float64, as which single numbers are followed."""

_EXACT_UP_TO = {torch.float32: 2**24, torch.float64: 2**53, torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}


def _key(entry: Entry) -> Hashable:
    return entry.key if isinstance(entry, Unknown) else entry


def symbols_of(entry: Entry) -> frozenset[Any]:
    """The symbols (positions and sizes) that an entry depends on."""
    if isinstance(entry, Unknown):
        return entry.symbols
    if isinstance(entry, Cases):
        return frozenset().union(*(symbols(formula) for _, formula in entry.numbers))
    if isinstance(entry, Pieces):
        return frozenset().union(*(part.free_symbols | symbols(formula) for part, formula in entry.parts))
    return frozenset(entry.free_symbols) if isinstance(entry, sympy.Expr) else symbols(entry)


def _integer(value: Any) -> Any:
    """An integer argument of an operator as an expression; None if it is not an integer."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return expression_of(value)
    return None


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """An argument of a call, given by its place or by its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _moved_index(node: fx.Node, index: list[Any]) -> list[Any] | None:
    """For an operator that only moves entries: the index in its first argument of the entry at ``index``; else None."""
    target: Any = node.target
    args: Any = node.args
    if target in COPY_OPS:
        return index
    if target is aten.unsqueeze.default:
        dim = args[1] % len(index)
        return index[:dim] + index[dim + 1 :]
    if target is aten.expand.default:
        shape = tensor(args[0]).shape
        tail = index[len(index) - len(shape) :]
        return [sympy.Integer(0) if same(size, 1) else i for size, i in zip(shape, tail, strict=True)]
    if target is aten.transpose.int:
        result = list(index)
        if not result:
            return result  # A tensor without dimensions has them transposed, too.
        a, b = args[1] % len(index), args[2] % len(index)
        result[a], result[b] = result[b], result[a]
        return result
    if target is aten.permute.default:
        result = list(index)
        for position, dim in enumerate(args[1]):
            result[dim % len(index)] = index[position]
        return result
    if target is aten.flip.default:
        last = [expression_of(size) - 1 for size in tensor(node).shape]
        turned = [dim % len(index) for dim in args[1]]
        return [last[dim] - i if dim in turned else i for dim, i in enumerate(index)]
    if target is aten.repeat.default:
        return _repeated_index(node, index)
    if target is aten.slice.Tensor:
        return _sliced_index(node, index)
    if target is aten.diagonal.default:
        place = _diagonal_arguments(args[1:], node.kwargs, len(index) + 1)
        if place is None:
            return None
        offset, rows, columns = place
        rest = iter(index[:-1])
        own = {rows: index[-1] - min(offset, 0), columns: index[-1] + max(offset, 0)}
        return [own[dim] if dim in own else next(rest) for dim in range(len(index) + 1)]
    if target is aten.select.int:
        dim = args[1] % (len(index) + 1)
        position = _integer(args[2])
        if position is None or not sympy.sympify(position).is_nonnegative:
            return None
        return [*index[:dim], sympy.sympify(position), *index[dim:]]
    if target in RESHAPE_OPS:
        before, after = tensor(args[0]).shape, tensor(node).shape
        kept = [i for i, size in zip(index, after, strict=True) if not same(size, 1)]
        wanted = [size for size in before if not same(size, 1)]
        sizes = [size for size in after if not same(size, 1)]
        if len(wanted) != len(sizes) or not all(same(a, b) for a, b in zip(wanted, sizes, strict=True)):
            return None
        remaining = iter(kept)
        return [sympy.Integer(0) if same(size, 1) else next(remaining) for size in before]
    return None


def _sliced_index(node: fx.Node, index: list[Any]) -> list[Any] | None:
    """The index in the argument of ``slice``; None where it is not known where the slice begins."""
    args: Any = node.args
    dim = (args[1] if len(args) > 1 else 0) % len(index)
    start = _integer(args[2] if len(args) > 2 and args[2] is not None else 0)
    step = _integer(args[4] if len(args) > 4 else 1)
    if start is not None and start.is_negative:
        start = sympy.expand(start + expression_of(tensor(args[0]).shape[dim]))
    if start is None or step is None or not start.is_nonnegative:
        return None
    return [*index[:dim], start + step * index[dim], *index[dim + 1 :]]


def _repeated_index(node: fx.Node, index: list[Any]) -> list[Any] | None:
    """The index in the argument of ``repeat``; None where a dimension of several entries is repeated."""
    source: Any = node.args[0]
    shape, repeated = tensor(source).shape, tensor(node).shape[len(index) - tensor(source).dim() :]
    own: list[Any] = []
    for size, result, position in zip(shape, repeated, index[len(index) - len(shape) :], strict=True):
        if not same(size, 1) and not same(size, result):
            return None
        own.append(sympy.Integer(0) if same(size, 1) else position)
    return own


def _diagonal_arguments(given: Sequence[Any], named: Mapping[str, Any], rank: int) -> tuple[int, int, int] | None:
    """The offset of a diagonal and the two dimensions that it runs along; None if the offset is symbolic."""
    values = {"offset": 0, "dim1": 0, "dim2": 1, **dict(zip(("offset", "dim1", "dim2"), given, strict=False)), **named}
    offset, rows, columns = (values[name] for name in ("offset", "dim1", "dim2"))
    return (offset, rows % rank, columns % rank) if isinstance(offset, int) else None


_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
_LOGIC = {
    aten.logical_not.default: "logical not",
    aten.logical_and.default: "logical and",
    aten.logical_or.default: "logical or",
    aten.logical_xor.default: "logical xor",
    aten.bitwise_not.default: "not",
    aten.bitwise_and.Tensor: "and",
    aten.bitwise_or.Tensor: "or",
    aten.bitwise_xor.Tensor: "xor",
}
_SUMS: dict[Any, Callable[[Any, Any], Any]] = {
    aten.add.Tensor: lambda a, b: a + b,
    aten.add.Scalar: lambda a, b: a + b,
    aten.sub.Tensor: lambda a, b: a - b,
    aten.sub.Scalar: lambda a, b: a - b,
    aten.mul.Tensor: lambda a, b: a * b,
    aten.mul.Scalar: lambda a, b: a * b,
    aten.rsub.Scalar: lambda a, b: b - a,
}
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
_COUNTING = (torch.int32, torch.int64)
"""Dtypes of integers that are followed."""

_Reader = Callable[[Entries, fx.Node, list[Any]], Entry | None]
_READERS: dict[Any, _Reader] = {
    aten.index.Tensor: Entries._gathered,
    aten.cat.default: Entries._joined,
    aten.stack.default: Entries._joined,
    aten.constant_pad_nd.default: Entries._padded,
    aten.pad.default: Entries._padded,
    aten.diff.default: Entries._difference,
    aten.cumsum.default: Entries._running_sum,
    aten.clamp.default: Entries._clamped,
    aten.clamp_min.default: Entries._clamped,
    aten.clamp_max.default: Entries._clamped,
    aten.minimum.default: Entries._clamped,
    aten.maximum.default: Entries._clamped,
    aten.max.other: Entries._clamped,
    aten.min.other: Entries._clamped,
    aten.floor_divide.default: Entries._divided,
    aten.floor_divide.Scalar: Entries._divided,
    aten.div.Tensor_mode: Entries._divided,
    aten.div.Scalar_mode: Entries._divided,
    aten.remainder.Scalar: Entries._divided,
    aten.remainder.Tensor: Entries._divided,
    aten.index_select.default: Entries._taken,
    aten.gather.default: Entries._taken,
    aten.take_along_dim.default: Entries._taken,
}
