"""Truth of a mask's entry as a formula over positions, in a form in which equal formulas are equal.

A formula is a plain truth value, or built from two kinds of literal: an inequality ``expression >= 0`` over integer
positions and sizes, and an entry of a tensor of which nothing is known. Negation is carried down to the literals, and
``All`` and ``Some`` are sets, so ``~(a | b)`` and ``~b & ~a`` are the same formula.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

__all__ = ["All", "AtLeast", "Formula", "Known", "Some", "at_least", "conjunction", "disjunction", "negation", "parts"]


@dataclass(frozen=True)
class AtLeast:
    """``expression >= 0``, of integers."""

    expression: Any


@dataclass(frozen=True)
class Known:
    """A fact of the data, named by ``key``: true, or with ``holds=False`` not."""

    key: Hashable
    symbols: frozenset[Any]
    holds: bool = True


@dataclass(frozen=True)
class All:
    terms: frozenset[Any]


@dataclass(frozen=True)
class Some:
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
    # Of alternatives those are out that contradict what holds beside them; and the other way round.
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
            # a implies b. Of two that both hold the stronger says all; of two alternatives the weaker does.
            if a is not b and difference.is_nonnegative:
                terms.discard(b if neutral else a)
    terms = _absorbed(terms, kind)
    if not terms:
        return neutral
    return next(iter(terms)) if len(terms) == 1 else kind(frozenset(terms))


def _absorbed(terms: set[Any], kind: type[All] | type[Some]) -> set[Any]:
    """``a & (a | b)`` is ``a``, and the other way round."""
    other = Some if kind is All else All
    return {
        term for term in terms if not (isinstance(term, other) and any(t in term.terms for t in terms if t is not term))
    }


def at_least(expression: Any, highest: Mapping[Any, Any]) -> Formula:
    """``expression >= 0``, decided where it is the same for all positions.

    ``highest``: each position's largest value; the smallest is 0.
    """
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
    return AtLeast(expression)


def _extremes(expression: Any, highest: Mapping[Any, Any]) -> tuple[Any, Any]:
    """The least and the largest value of a linear expression over all positions, which start at 0."""
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
    """What must hold together: the terms of a conjunction, or the formula itself; none where it always holds."""
    if formula is True:
        return ()
    return tuple(formula.terms) if isinstance(formula, All) else (formula,)


@functools.singledispatch
def symbols(formula: Any) -> frozenset[Any]:
    """The positions that the formula depends on."""
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
