"""Formulas and expressions over positions, evaluated: by plain numbers, or in the terms of a solver."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
from torch import fx

from attnrewrite.analysis.entries import Cases
from attnrewrite.analysis.formulas import All, AtLeast, Formula, Known, Some

__all__ = ["PLAIN", "Computed", "Logic", "arithmetic", "holds"]


@dataclass(frozen=True)
class Logic:
    """How truth values are joined, and the size of a number is taken."""

    every: Callable[[Iterable[Any]], Any]
    some: Callable[[Iterable[Any]], Any]
    negated: Callable[[Any], Any]
    size: Callable[[Any], Any]


PLAIN = Logic(all, any, operator.not_, abs)


def arithmetic(expression: Any, at: Mapping[Any, Any], logic: Logic = PLAIN) -> Any:
    """The value of a polynomial with integer coefficients, and absolute values in it; ``at`` gives each symbol's."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return at[expression]
    parts = [arithmetic(part, at, logic) for part in expression.args]
    if isinstance(expression, sympy.Add):
        return reduce(operator.add, parts)
    if isinstance(expression, sympy.Mul):
        return reduce(operator.mul, parts)
    if isinstance(expression, sympy.Abs):
        return logic.size(parts[0])
    if isinstance(expression, sympy.Pow) and isinstance(expression.exp, sympy.Integer) and expression.exp > 0:
        return reduce(operator.mul, [parts[0]] * int(expression.exp))
    raise TypeError(f"{type(expression).__name__} in {expression}")


def holds(formula: Formula, at: Mapping[Any, Any], fact: Callable[[Any], Any], logic: Logic = PLAIN) -> Any:
    """Whether the formula holds at the positions; ``fact`` tells what is known under a key."""
    if isinstance(formula, bool):
        return formula
    if isinstance(formula, AtLeast):
        return arithmetic(formula.expression, at, logic) >= 0
    if isinstance(formula, Known):
        value = fact(formula.key)
        return value if formula.holds else logic.negated(value)
    if isinstance(formula, All):
        return logic.every([holds(term, at, fact, logic) for term in formula.terms])
    if isinstance(formula, Some):
        return logic.some([holds(term, at, fact, logic) for term in formula.terms])
    raise TypeError(f"{formula!r} is no formula")


class Computed:
    """Formulas over nodes whose values were computed, at positions ``at``."""

    def __init__(self, values: Mapping[fx.Node, Any], at: Mapping[Any, int]) -> None:
        self._values, self._at = values, at

    def holds(self, formula: Formula) -> bool:
        return bool(holds(formula, self._at, self._fact))

    def _fact(self, key: Any) -> bool:
        if isinstance(key[0], fx.Node):
            return bool(self._value(key))
        relation, *rest = key
        if relation == "eq":
            numbers = [self._value(part) for part in rest[0]]
            return bool(numbers[0] == numbers[-1])
        first, second = (self._value(part) for part in rest)
        return bool(first < second if relation == "lt" else first <= second)

    def _value(self, part: Any) -> Any:
        """A number that is compared."""
        if isinstance(part, tuple):
            node, index = part
            place = tuple(arithmetic(position, self._at) for position in index)
            value = self._values[node]
            # An entry that is not there is read only where it does not matter.
            inside = all(0 <= position < size for position, size in zip(place, value.shape, strict=True))
            return value[place].item() if inside else 0
        if isinstance(part, Cases):
            return next(number for number, formula in part.numbers if self.holds(formula))
        return arithmetic(part, self._at) if isinstance(part, sympy.Expr) else self.holds(part)
