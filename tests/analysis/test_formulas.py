"""Formulas in normal form mean what they are made of, and equal ones are equal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrewrite.analysis.formulas import (
    All,
    AtLeast,
    Formula,
    Known,
    Some,
    at_least,
    conjunction,
    disjunction,
    largest,
    negation,
    parts,
    symbols,
)
from attnrewrite.ir.bounds import LONGEST_SEQUENCE
from attnrewrite.torch_private import SYMPY_QUOTIENTS
from tests.support.formulas import arithmetic, holds

X, Y = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "xy")
N = sympy.Symbol("n", integer=True, positive=True)
HIGHEST = {X: N - 1, Y: N + 1}
FACTS = ("p", "q")
quick = settings(max_examples=120, deadline=None, derandomize=True)


def _places() -> Iterator[tuple[dict[Any, int], dict[str, bool]]]:
    """Every position for a few sizes, with everything that may be known there."""
    for n in (1, 2, 3):
        for x, y in itertools.product(range(n), range(n + 2)):
            for known in itertools.product((False, True), repeat=len(FACTS)):
                yield {X: x, Y: y, N: n}, dict(zip(FACTS, known, strict=True))


PLACES = list(_places())


def table(formula: Formula) -> list[bool]:
    """Where a formula holds."""
    return [bool(holds(formula, at, known.__getitem__)) for at, known in PLACES]


_factors = st.integers(-2, 2)


@st.composite
def expressions(draw: st.DrawFn, distances: bool = True) -> Any:
    a, b, c, d = draw(_factors), draw(_factors), draw(st.integers(-3, 3)), draw(st.sampled_from((0, 0, 1, -1)))
    linear = a * X + b * Y + c + d * N
    return linear + draw(_factors) * sympy.Abs(X - Y + draw(_factors)) if distances and draw(st.booleans()) else linear


def literals(distances: bool = True) -> st.SearchStrategy[Formula]:
    """Inequalities and facts; one of a distance is two inequalities."""
    facts = st.sampled_from([Known("p", frozenset({X})), Known("q", frozenset({Y}))])
    inequalities = expressions(distances).map(lambda expression: at_least(expression, HIGHEST))
    return st.one_of(inequalities, facts, facts.map(negation))


def formulas() -> st.SearchStrategy[Formula]:
    return st.recursive(
        literals(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(conjunction),
            st.lists(inner, max_size=3).map(disjunction),
            inner.map(negation),
        ),
        max_leaves=6,
    )


@quick
@given(formulas())
def test_negation(formula: Formula) -> None:
    assert table(negation(formula)) == [not value for value in table(formula)]
    assert negation(negation(formula)) == formula


@quick
@given(st.lists(formulas(), max_size=4))
def test_all_and_some(terms: list[Formula]) -> None:
    rows = [table(term) for term in terms]
    every = [all(row[place] for row in rows) for place in range(len(PLACES))]
    some = [any(row[place] for row in rows) for place in range(len(PLACES))]
    assert table(conjunction(terms)) == every
    assert table(disjunction(terms)) == some


@quick
@given(st.lists(literals(distances=False), max_size=4))
def test_de_morgan(terms: list[Formula]) -> None:
    assert negation(conjunction(terms)) == disjunction(map(negation, terms))
    assert negation(disjunction(terms)) == conjunction(map(negation, terms))


@quick
@given(st.lists(formulas(), max_size=3))
def test_de_morgan_of_nested_formulas(terms: list[Formula]) -> None:
    assert table(negation(conjunction(terms))) == table(disjunction(map(negation, terms)))
    assert table(negation(disjunction(terms))) == table(conjunction(map(negation, terms)))


@quick
@given(st.lists(literals(), max_size=4), st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_matters(terms: list[Formula], order: Any) -> None:
    other = [*terms, *terms[:2]]
    order.shuffle(other)
    assert conjunction(other) == conjunction(terms)
    assert disjunction(other) == disjunction(terms)


@quick
@given(formulas(), formulas())
def test_what_says_nothing_more_is_left_out(a: Formula, b: Formula) -> None:
    assert table(conjunction([a, disjunction([a, b])])) == table(a)
    assert table(disjunction([a, conjunction([a, b])])) == table(a)
    assert conjunction([a]) == conjunction([a, True]) == conjunction([a, a]) == a
    assert disjunction([a]) == disjunction([a, False]) == disjunction([a, a]) == a
    assert conjunction([a, False]) is False
    assert disjunction([a, True]) is True


@quick
@given(literals(distances=False), literals(distances=False))
def test_absorption_and_contradiction(a: Formula, b: Formula) -> None:
    assert conjunction([a, disjunction([a, b])]) == a
    assert disjunction([a, conjunction([a, b])]) == a
    assert conjunction([a, negation(a)]) is False
    assert disjunction([a, negation(a)]) is True


@quick
@given(formulas())
def test_no_formula_holds_a_truth_value_or_one_of_its_own_kind(formula: Formula) -> None:
    def check(part: Formula, above: type) -> None:
        assert not isinstance(part, (bool, above))
        if isinstance(part, (All, Some)):
            assert len(part.terms) > 1
            for term in part.terms:
                check(term, type(part))

    if not isinstance(formula, bool):
        check(formula, type(None))
    together = parts(formula)
    assert conjunction(together) == formula
    assert not any(isinstance(part, All) for part in together)


@quick
@given(expressions())
def test_at_least(expression: Any) -> None:
    formula = at_least(expression, HIGHEST)
    values = [arithmetic(sympy.sympify(expression), at) >= 0 for at, _ in PLACES]
    assert table(formula) == values


@quick
@given(expressions(distances=False), st.integers(1, 4), st.integers(1, 4))
def test_a_linear_expression_is_decided_exactly_where_it_is_the_same_everywhere(
    expression: Any, x: int, y: int
) -> None:
    expression = sympy.sympify(expression).subs(N, 2)
    values = {arithmetic(expression, {X: i, Y: j}) >= 0 for i, j in itertools.product(range(x), range(y))}
    formula = at_least(expression, {X: sympy.Integer(x - 1), Y: sympy.Integer(y - 1)})
    assert isinstance(formula, bool) == (len(values) == 1)
    assert not isinstance(formula, bool) or values == {formula}


def test_at_least_of_lengths() -> None:
    assert at_least(N - 1 - X, HIGHEST) is True  # Every position is inside.
    assert at_least(-1 - X, HIGHEST) is False
    assert at_least(N - 2 - X, HIGHEST) == AtLeast(N - 2 - X)  # Not the last one.
    assert at_least(N - 2, HIGHEST) == AtLeast(N - 2)  # Not if there is but one.
    assert at_least(X * Y, HIGHEST) == AtLeast(X * Y)  # Of products nothing is said.
    other = sympy.Symbol("z", integer=True)
    assert at_least(other, HIGHEST) == AtLeast(other)  # It may be negative.


def test_a_common_factor_says_nothing() -> None:
    assert at_least(6 * X - 3 * Y - 4, HIGHEST) == AtLeast(2 * X - Y - 2)
    assert at_least(6 * X - 3 * Y + 2, HIGHEST) == AtLeast(2 * X - Y)
    assert at_least(6 * X - 4 * Y * N + 1, HIGHEST) == AtLeast(3 * X - 2 * Y * N)
    half = sympy.Rational(1, 2)
    assert at_least(2 * X - 2 * half * Y + half, HIGHEST) == AtLeast(2 * X - Y + half)


def test_a_distance_is_two_inequalities() -> None:
    within = at_least(2 - sympy.Abs(X - Y), HIGHEST)
    assert within == All(frozenset({AtLeast(2 - X + Y), AtLeast(2 + X - Y)}))
    assert at_least(sympy.Abs(X - Y) - 3, HIGHEST) == negation(within)


def test_the_stronger_of_two_bounds_says_all() -> None:
    strong, weak = AtLeast(X - Y - 2), AtLeast(X - Y)
    assert conjunction([strong, weak]) == strong
    assert disjunction([strong, weak]) == weak
    longer = AtLeast(X - Y + N)  # Weaker, as a length is positive.
    assert conjunction([weak, longer]) == weak
    # Which of these is stronger depends on the length.
    assert conjunction([AtLeast(X - Y - N), strong]) == All(frozenset({AtLeast(X - Y - N), strong}))


def test_what_contradicts_the_rest_is_out_of_the_alternatives() -> None:
    p, q = (Known(name, frozenset({X})) for name in FACTS)
    assert conjunction([p, disjunction([negation(p), q])]) == All(frozenset({p, q}))
    assert disjunction([p, conjunction([negation(p), q])]) == Some(frozenset({p, q}))
    assert conjunction([p, negation(q), disjunction([negation(p), q])]) is False


@quick
@given(formulas())
def test_only_its_symbols_matter(formula: Formula) -> None:
    used = symbols(formula)
    if X in used:
        return
    for at, known in PLACES:
        # "p" is a fact of x.
        elsewhere, otherwise = {**at, X: 0}, {**known, "p": not known["p"]}
        assert holds(formula, at, known.__getitem__) == holds(formula, elsewhere, otherwise.__getitem__)


@pytest.mark.parametrize("formula", [True, False])
def test_truth_values_depend_on_nothing(formula: bool) -> None:
    assert symbols(formula) == frozenset()
    assert parts(formula) == (() if formula else (False,))


@pytest.mark.parametrize(
    "expression, known",
    [
        (X + 2 * Y - 3, True),
        (SYMPY_QUOTIENTS[1](X, 2) + Y, True),
        (sympy.Max(X, Y) - N, True),
        (sympy.Abs(X - Y), True),
        (SYMPY_QUOTIENTS[1](X, Y), False),
        (2**X, False),
        (sympy.Symbol("m", integer=True), False),
    ],
)
def test_bounds_of_expressions(expression: Any, known: bool) -> None:
    assert math.isfinite(largest(expression)) is known


def test_a_quotient_of_a_product_is_bounded_by_the_product() -> None:
    assert largest(SYMPY_QUOTIENTS[1](X * Y, 2)) >= LONGEST_SEQUENCE**2
