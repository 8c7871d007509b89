"""Boolean formulas over positions, in a normal form: where a mask keeps a score.

A formula is True, False, or built from two kinds of literals: inequalities ``expression >= 0`` over integer positions
and sizes, and facts of the data (an unknown entry of a tensor). Negation is pushed down to the literals, and ``All``
and ``Some`` are sets, so ``~(a | b)`` and ``~b & ~a`` are the same formula.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from attnrewrite.ir.bounds import LONGEST_SEQUENCE
from attnrewrite.torch_private import SYMPY_EXTREMES, SYMPY_QUOTIENTS

__all__ = [
    "All",
    "AtLeast",
    "Formula",
    "Known",
    "Some",
    "at_least",
    "conjunction",
    "disjunction",
    "largest",
    "negation",
    "parts",
]


@dataclass(frozen=True)
class AtLeast:
    """The literal ``expression >= 0`` over integers."""

    expression: Any


@dataclass(frozen=True)
class Known:
    """The literal that a fact of the data, named by ``key``, is true; with ``holds=False``, that it is false."""

    key: Hashable
    symbols: frozenset[Any]
    holds: bool = True


@dataclass(frozen=True)
class All:
    """The conjunction of at least two terms."""

    terms: frozenset[Any]


@dataclass(frozen=True)
class Some:
    """The disjunction of at least two terms."""

    terms: frozenset[Any]


Formula = bool | AtLeast | Known | All | Some


def negation(formula: Formula) -> Formula:
    if isinstance(formula, bool):
        return not formula
    if isinstance(formula, AtLeast):
        return AtLeast(sympy.expand(-formula.expression - 1))
    if isinstance(formula, Known):
        return Known(formula.key, formula.symbols, not formula.holds)
    turned = frozenset(negation(term) for term in formula.terms)
    return Some(turned) if isinstance(formula, All) else All(turned)


def conjunction(formulas: Iterable[Formula]) -> Formula:
    return _joined(formulas, All, neutral=True)


def disjunction(formulas: Iterable[Formula]) -> Formula:
    return _joined(formulas, Some, neutral=False)


def _joined(formulas: Iterable[Formula], kind: type[All] | type[Some], neutral: bool) -> Formula:
    """The conjunction (``All``) or disjunction (``Some``) of formulas, in normal form."""
    terms: set[Any] = set()
    for formula in formulas:
        if isinstance(formula, bool):
            if formula is not neutral:
                return not neutral
        elif isinstance(formula, kind):
            terms |= formula.terms
        else:
            terms.add(formula)
    if any(negation(term) in terms for term in terms):
        return not neutral
    # a & (~a | b) is a & b, and a | (~a & b) is a | b.
    other = Some if kind is All else All
    for term in [term for term in terms if isinstance(term, other)]:
        left = frozenset(part for part in term.terms if negation(part) not in terms)
        if left != term.terms:
            terms.discard(term)
            rest = _joined(left, other, not neutral)
            if isinstance(rest, bool):
                if rest is not neutral:
                    return rest
            else:
                return _joined([*terms, rest], kind, neutral)
    inequalities = [term for term in terms if isinstance(term, AtLeast)]
    for a in inequalities:
        for b in inequalities:
            difference = sympy.expand(b.expression - a.expression)
            # a implies b, so that a & b is a, and a | b is b.
            if a is not b and difference.is_nonnegative:
                terms.discard(b if neutral else a)
    terms = _absorbed(terms, kind)
    if not terms:
        return neutral
    return next(iter(terms)) if len(terms) == 1 else kind(frozenset(terms))


def _absorbed(terms: set[Any], kind: type[All] | type[Some]) -> set[Any]:
    """The terms without those that others absorb: ``a & (a | b)`` is ``a``, and so is ``a | (a & b)``."""
    other = Some if kind is All else All
    return {
        term for term in terms if not (isinstance(term, other) and any(t in term.terms for t in terms if t is not term))
    }


def at_least(expression: Any, highest: Mapping[Any, Any]) -> Formula:
    """The formula ``expression >= 0``; True or False if it is the same for all positions.

    Args:
        expression: an integer expression of positions and sizes.
        highest: the largest value of each position; the smallest is 0.
    """
    if isinstance(expression, (sympy.Symbol, sympy.Integer)) and expression.is_nonnegative is not None:
        return bool(expression.is_nonnegative)
    expression = sympy.expand(expression)
    distances = expression.atoms(sympy.Abs)
    if len(distances) == 1:
        (distance,) = distances
        factor = expression.coeff(distance)
        rest = expression - factor * distance
        if factor.is_number and not rest.atoms(sympy.Abs):
            both = [at_least(rest + sign * factor * distance.args[0], highest) for sign in (1, -1)]
            return conjunction(both) if factor.is_negative else disjunction(both)
    low, high = _extremes(expression, highest)
    if low is not None and low.is_nonnegative:
        return True
    if high is not None and high.is_negative:
        return False
    return AtLeast(_without_common_factor(expression))


def _without_common_factor(expression: Any) -> Any:
    """``2 * x - 2 * y + 1 >= 0`` says no more than ``x - y >= 0``, of integers."""
    factors = expression.as_coefficients_dict()
    rest = factors.pop(sympy.S.One, sympy.S.Zero)
    common = sympy.igcd(0, *factors.values()) if all(factor.is_Integer for factor in factors.values()) else 1
    if common < 2 or not rest.is_Integer or not all(term.is_integer for term in factors):
        return expression
    return sympy.Add(*(factor // common * term for term, factor in factors.items()), rest // common)


def _extremes(expression: Any, highest: Mapping[Any, Any]) -> tuple[Any, Any]:
    """The smallest and the largest value of an expression over all positions; (None, None) if it is not linear."""
    low = high = expression
    for symbol in expression.free_symbols:
        if symbol not in highest:
            continue
        factor = expression.coeff(symbol)
        if not factor.is_number or symbol in (expression - factor * symbol).free_symbols:
            return None, None
        best, worst = (highest[symbol], 0) if factor > 0 else (0, highest[symbol])
        low, high = low.subs(symbol, worst), high.subs(symbol, best)
    return sympy.expand(low), sympy.expand(high)


def parts(formula: Formula) -> tuple[Formula, ...]:
    """The terms whose conjunction the formula is: those of ``All``, else the formula itself; none for True."""
    if formula is True:
        return ()
    return tuple(formula.terms) if isinstance(formula, All) else (formula,)


@functools.singledispatch
def symbols(formula: Any) -> frozenset[Any]:
    """The symbols (positions and sizes) that the formula depends on."""
    return frozenset()


@symbols.register
def _(formula: AtLeast) -> frozenset[Any]:
    return frozenset(formula.expression.free_symbols)


@symbols.register
def _(formula: Known) -> frozenset[Any]:
    return formula.symbols


@symbols.register(All)
@symbols.register(Some)
def _(formula: Any) -> frozenset[Any]:
    return frozenset().union(*(symbols(term) for term in formula.terms))


def largest(expression: Any) -> float:
    """An upper bound of the absolute value of an expression of positions and lengths.

    A symbol that may be negative is no length: an integer that is an argument of the program has no bound.
    """
    total = 0.0
    for term in sympy.Add.make_args(sympy.expand(expression)):
        factor, rest = term.as_coeff_Mul()
        size = abs(float(factor))
        for base, power in rest.as_powers_dict().items():
            if base == 1:
                continue
            if not power.is_Integer or power < 0:
                return math.inf
            size *= _largest_of(base) ** int(power)
        total += size
    return total


def _largest_of(base: Any) -> float:
    """The same for what is no sum and no product."""
    if isinstance(base, sympy.Symbol):
        return float(LONGEST_SEQUENCE) if base.is_nonnegative else math.inf
    if isinstance(base, sympy.Abs):
        return largest(base.args[0])
    if isinstance(base, (*SYMPY_EXTREMES, sympy.Max, sympy.Min)):
        return max(map(largest, base.args))
    if isinstance(base, SYMPY_QUOTIENTS) and base.args[1].is_Integer and base.args[1] >= 1:
        return largest(base.args[0]) + 1
    return math.inf
