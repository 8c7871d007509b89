"""Proofs about a mask from how the graph computes it, never from data.

They answer two questions. Which structure does the mask have (:func:`in_words`, :func:`band_of`)? Does every query row
keep a key (:func:`attended_everywhere`)? The second is proved by a witness: a key position, as an expression of the
query position, at which the mask is open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sympy

from attnrewrite.analysis.entries import Cases, Entries, Unknown, expression_of, symbols_of
from attnrewrite.analysis.formulas import (
    All,
    AtLeast,
    Formula,
    Known,
    Some,
    conjunction,
    disjunction,
    negation,
    parts,
    symbols,
)
from attnrewrite.analysis.shared_entries import SharedEntries
from attnrewrite.analysis.values import (
    FAR_BELOW,
    ORDINARY,
    Range,
    Value,
    ValueKind,
    is_far_below,
    is_ordinary,
    possible_values,
)
from attnrewrite.ir.axes import Axis, Dim, Operand
from attnrewrite.ir.site import Band, Bias, Fill, Raise, Reach, ScoreMod

__all__ = [
    "Positions",
    "added_values",
    "attended_everywhere",
    "band_of",
    "in_words",
    "isolated_block_of",
    "kept_where",
    "may_mask",
    "repeated_along",
    "spread_of",
    "truth",
]


class Positions:
    """Symbols for the axes of an attention, in which the entries of its masks are expressed."""

    def __init__(
        self, query_axes: Sequence[Axis], key_axes: Sequence[Axis], shared: SharedEntries | None = None
    ) -> None:
        """Args:
        shared: what is known of the graph's tensors from its other attentions; default: nothing.
        """
        self._shared = shared or SharedEntries()
        self.query_axes, self.key_axes = tuple(query_axes), tuple(key_axes)
        self._symbols: dict[Axis, Any] = {}
        self._highest: dict[Any, Any] = {}
        self.entries = Entries(self._highest)
        self.queries = self._length(query_axes)
        self.keys = self._length(key_axes)

    def _length(self, axes: Sequence[Axis]) -> Any:
        length: Any = sympy.Integer(1)
        for axis in axes:
            length = length * expression_of(axis.size)
            self.symbol(axis)
        return length

    def symbol(self, axis: Axis) -> Any:
        """The symbol of the position along ``axis``, created at the first call."""
        if axis not in self._symbols:
            symbol = sympy.Symbol(f"x{len(self._symbols)}", integer=True, nonnegative=True)
            self._symbols[axis] = symbol
            self._highest[symbol] = expression_of(axis.size) - 1
        return self._symbols[axis]

    def is_position(self, symbol: Any) -> bool:
        """Whether a symbol is the position along an axis, not a size."""
        return symbol in self._highest

    def index(self, operand: Operand, at: dict[Axis, Any] | None = None) -> list[Any]:
        """The symbolic index into ``operand``, where ``at`` gives other positions for some axes."""
        return [self._position(dim, at or {}) for dim in operand.resolved().layout]

    def _position(self, dim: Dim, at: dict[Axis, Any]) -> Any:
        position: Any = sympy.Integer(0)
        for axis in dim:
            position = position * expression_of(axis.size) + at.get(axis, self.symbol(axis))
        return position

    def of(self, operand: Operand, at: dict[Axis, Any] | None = None) -> Any:
        """The operand's entry at the symbolic index, where ``at`` gives other positions for some axes."""
        return self._shared.at(operand.node, self.index(operand, at), self.entries, self._highest)


def kept_where(mod: Bias | Fill, positions: Positions) -> Formula | None:
    """The formula under which a term leaves the score unmasked; None if it is not known to be a mask."""
    if isinstance(mod, Fill):
        if not is_far_below(mod.value, mod.dtype):
            return None
        condition = truth(positions.of(mod.condition))
        return condition if mod.invert or condition is None else negation(condition)
    entry = positions.of(mod.operand)
    if isinstance(entry, sympy.Number) and float(entry) == 0:
        return True
    if not isinstance(entry, Cases):
        return None
    added = {number: mod.of(number) for number, _ in entry.numbers}
    if any(value is None or (value != 0 and not is_far_below(value, mod.dtype)) for value in added.values()):
        return None
    return entry.where(lambda number: added[number] == 0)


def truth(entry: Any) -> Formula | None:
    """The entry of a condition as a formula: numbers hold where they are not 0. None if it is unknown."""
    if isinstance(entry, Cases):
        return entry.where(lambda number: number != 0)
    if isinstance(entry, sympy.Number):
        return float(entry) != 0
    return entry if isinstance(entry, (bool, AtLeast, Known)) or hasattr(entry, "terms") else None


def repeated_along(mod: Bias | Fill, positions: Positions) -> tuple[Operand, frozenset[Axis]] | None:
    """The tensor of a mask, and its axes but the key's along which all entries are the same; None if there are none.

    Entries of which nothing is known may have gradients, and are not looked at.
    """
    operand = (mod.operand if isinstance(mod, Bias) else mod.condition).resolved()
    entry = positions.of(operand)
    if isinstance(entry, Unknown):
        return None
    used = symbols_of(entry)
    own = {axis for axis in operand.axes if axis not in positions.key_axes}
    axes = frozenset(axis for axis in own if positions.symbol(axis) not in used)
    return (operand, axes) if axes else None


# In words.


def in_words(kept: Formula, positions: Positions) -> tuple[str, ...]:
    """The structure of a mask that keeps the scores where ``kept`` holds: a phrase for each term of the conjunction."""
    query = tuple(positions.symbol(axis) for axis in positions.query_axes)
    key = tuple(positions.symbol(axis) for axis in positions.key_axes)
    if kept is False:
        return ("everything masked",)
    block = isolated_block_of(kept, positions)
    if block is not None:
        return (f"isolated from {block[0]} to {block[1]}",)
    return tuple(sorted({_phrase(part, query, key, positions) for part in parts(kept)}))


def band_of(kept: Formula, positions: Positions) -> Band | None:
    """The band of keys that a mask keeps where ``kept`` holds; None if that is not exactly a band."""
    if len(positions.query_axes) != 1 or len(positions.key_axes) != 1 or kept is True:
        return None
    query, key = (positions.symbol(axes[0]) for axes in (positions.query_axes, positions.key_axes))
    shift = positions.keys - positions.queries
    left: list[Any] = []
    right: list[Any] = []
    for part in parts(kept):
        if not isinstance(part, AtLeast):
            return None
        after, before = (sympy.expand(part.expression - gap) for gap in (query - key, key - query))
        if not after.free_symbols & {query, key}:
            right.append(after)
        elif not before.free_symbols & {query, key}:
            left.append(before)
        else:
            return None
    first = _reach(left, right)
    last = _reach([bound + shift for bound in left], [bound - shift for bound in right])
    return Band(first, last) if first or last else None


def isolated_block_of(kept: Formula, positions: Positions) -> tuple[Any, Any] | None:
    """The block of positions (first, one past the last) that a mask isolates from each other.

    Each of them attends to itself and to all positions outside the block, which attend to all. None if ``kept`` is not
    exactly that; it is compared in every order that the query, the key and the bounds of the block can have.
    """
    if len(positions.query_axes) != 1 or len(positions.key_axes) != 1 or not isinstance(kept, (All, Some)):
        return None
    if sympy.expand(positions.keys - positions.queries) != 0:
        return None
    query, key = (positions.symbol(axes[0]) for axes in (positions.query_axes, positions.key_axes))
    literals = {literal: _read_literal(literal, query, key) for literal in _literals(kept)}
    if None in literals.values():
        return None
    bounds = list(dict.fromkeys(read[1] for read in literals.values() if read is not None and read[0] != "distance"))
    if len(bounds) == 2 and (bounds[0] - bounds[1]).is_positive:
        bounds.reverse()
    if any(positions.is_position(symbol) for bound in bounds for symbol in bound.free_symbols):
        return None  # The block differs between batches or heads.
    if not bounds or len(bounds) > 2 or (len(bounds) == 2 and not (bounds[1] - bounds[0]).is_positive):
        return None
    edges = [sympy.Integer(0), *bounds, positions.keys]

    def holds(formula: Formula, places: dict[str, int]) -> bool:
        if isinstance(formula, bool):
            return formula
        if isinstance(formula, (All, Some)):
            return (all if isinstance(formula, All) else any)(holds(term, places) for term in formula.terms)
        read = literals[formula]
        assert read is not None
        what, bound, upwards = read
        place = places[what]
        reached = place >= bound if what == "distance" else place > bounds.index(bound)
        return reached == upwards

    for block in range(len(edges) - 1):
        if len(bounds) == 2 and block != 1:
            continue
        if all(
            holds(kept, places)
            == (
                places["distance"] == 0
                or block not in (places["query"], places["key"])
                or places["query"] != places["key"]
            )
            for places in _arrangements(len(edges) - 1)
        ):
            return edges[block], edges[block + 1]
    return None


def _arrangements(count: int) -> Iterator[dict[str, int]]:
    """Each possible choice of the ranges (of ``count``) with the query and the key, and of the sign of query - key."""
    for query in range(count):
        for key in range(count):
            for distance in (-1, 0, 1) if query == key else ((query > key) - (query < key),):
                yield {"query": query, "key": key, "distance": distance}


def _literals(formula: Formula) -> set[AtLeast | Known]:
    if isinstance(formula, (All, Some)):
        return set().union(*(_literals(term) for term in formula.terms))
    return set() if isinstance(formula, bool) else {formula}


def _read_literal(literal: AtLeast | Known, query: Any, key: Any) -> tuple[str, Any, bool] | None:
    """(what, bound, True) for ``what >= bound`` and (what, bound, False) for ``what < bound``; None for other literals.

    ``what`` is "query", "key", or "distance" for query - key, whose bound must be 0 or 1.
    """
    if not isinstance(literal, AtLeast):
        return None
    for what, subject in (("query", query), ("key", key), ("distance", query - key)):
        for sign in (1, -1):
            rest = sympy.expand(literal.expression - sign * subject)
            if rest.free_symbols & {query, key} or not rest.is_integer:
                continue
            bound = -rest if sign == 1 else rest + 1
            if what == "distance" and bound not in (0, 1):
                return None
            return what, bound, sign == 1
    return None


def _reach(left: list[Any], right: list[Any]) -> Reach | None:
    """The reach with the tightest bound on each side; None if a bound is symbolic."""
    bounds = [[sympy.expand(bound) for bound in side] for side in (left, right)]
    if not all(bound.is_Integer for side in bounds for bound in side):
        return None
    before, after = (min(map(int, side), default=None) for side in bounds)
    return before, after


def _phrase(part: Formula, query: tuple[Any, ...], key: tuple[Any, ...], positions: Positions) -> str:
    """The words for one term of a mask, such as "causal", "sliding window of 8" or "key padding"."""
    used = symbols(part)
    on_query, on_key = bool(used & set(query)), bool(used & set(key))
    if isinstance(part, Some):
        inner = [_phrase(term, query, key, positions) for term in part.terms]
        if any(phrase.startswith("causal") for phrase in inner):
            return "prefix" if not any("documents" in phrase for phrase in inner) else "causal in documents"
        return "dense" if on_query else "key padding"
    if isinstance(part, AtLeast) and len(query) == len(key) == 1 and on_query and on_key:
        rest = sympy.expand(part.expression - (query[0] - key[0]))
        if not rest.free_symbols & {query[0], key[0]}:
            if rest == 0:
                return "causal"
            from_end = sympy.expand(rest - (positions.keys - positions.queries)) == 0
            return "causal from the last key" if from_end else f"causal, shifted by {rest}"
        rest = sympy.expand(part.expression - (key[0] - query[0]))
        if not rest.free_symbols & {query[0], key[0]}:
            return f"sliding window of {rest + 1}"
        return "dense"
    if on_key and not on_query:
        return "key padding"
    if on_query and not on_key:
        return "query padding"
    if isinstance(part, Known) and part.holds and _compares_entries(part.key):
        return "documents"
    return "dense" if on_key else "whole heads"


def _compares_entries(key: Any) -> bool:
    """Whether the key of a fact says that two entries of tensors are equal."""
    if not isinstance(key, tuple) or key[0] != "eq" or len(key[1]) != 2:
        return False
    a, b = key[1]
    return isinstance(a, tuple) and isinstance(b, tuple)


# Does every row keep a key?


def attended_everywhere(mods: Sequence[ScoreMod | Raise], positions: Positions) -> str | None:
    """The proof that every query row has a key that no mod masks; None if none was found.

    The proof is a witness in words, such as "key position = query position". Four are tried: the first key, the
    query's own position, the query's position counted from the end, and the first key or the second, whichever is open
    (no position attends to itself).
    """
    masking = [mod for mod in mods if isinstance(mod, (Bias, Fill))]
    if not masking:
        return "there is no mask"
    query_axes, key_axes = positions.query_axes, positions.key_axes
    if len(query_axes) > 1 or len(key_axes) > 1:
        return "no term masks" if conjunction(_open_where(mod, positions, {}) for mod in masking) is True else None
    keys, queries = positions.keys, positions.queries
    query = positions.symbol(query_axes[0]) if query_axes else sympy.Integer(0)
    witnesses = [("the first key", sympy.Integer(0))]
    if sympy.expand(keys - queries).is_nonnegative:
        witnesses += [
            ("key position = query position", query),
            ("key position = query position, counted from the end", query + keys - queries),
        ]

    def open_at(witness: Any) -> Formula:
        at = {key_axes[0]: witness} if key_axes else {}
        return conjunction(_open_where(mod, positions, at) for mod in masking)

    for words, witness in witnesses:
        if open_at(witness) is True:
            return words
    # A number: tracing takes a symbol for two at least, also where an exported program is given one.
    if isinstance(keys, sympy.Integer) and keys >= 2:
        first, second = (open_at(sympy.Integer(key)) for key in range(2))
        if disjunction([first, second]) is True:
            return "the first or the second key"
    return None


def _open_where(mod: Bias | Fill, positions: Positions, at: dict[Axis, Any]) -> Formula:
    """Under which condition a modification masks no score at the positions ``at``; False where that is not known."""
    if isinstance(mod, Fill):
        filled = truth(positions.of(mod.condition, at))
        return False if filled is None else filled if mod.invert else negation(filled)

    def harmless(value: object) -> bool:
        added = mod.of(value) if isinstance(value, float) else None
        return added is not None and is_ordinary(added)

    if all(harmless(value) for value in possible_values(mod.operand.node)):
        return True
    entry = positions.of(mod.operand, at)
    if isinstance(entry, Cases):
        possible = [number for number, formula in entry.numbers if formula is not False]
        return all(map(harmless, possible)) or entry.where(harmless)
    return isinstance(entry, sympy.Number) and harmless(float(entry))


def may_mask(mod: Bias) -> bool:
    """Whether a bias may mask: its entries may be anything, or large negative numbers."""
    return any(
        value is ValueKind.ANY or (isinstance(value, float) and value < -ORDINARY) for value in added_values(mod)
    )


def added_values(mod: Bias) -> frozenset[Value]:
    """All values that a bias may add to a score."""
    return frozenset(_as_added(mod, value) for value in possible_values(mod.operand.node))


def spread_of(mod: Bias) -> float:
    """How far apart the numbers may be that the bias adds and that are computed from positions."""
    ranges = [value for value in possible_values(mod.operand.node) if isinstance(value, Range)]
    ends = [(mod.of(value.low), mod.of(value.high)) for value in ranges]
    return max((abs(high - low) for low, high in ends if low is not None and high is not None), default=0.0)


def _as_added(mod: Bias, value: Value) -> Value:
    """What the bias adds where its operand is ``value``."""
    if value is ValueKind.ANY:
        return value
    numbers = [value] if isinstance(value, float) else [value.low, value.high] if isinstance(value, Range) else [1.0]
    added = [each for each in map(mod.of, numbers) if each is not None]
    if len(added) < len(numbers):
        # A tensor scales it: a mask is not known any more, and ordinary numbers are taken to stay so.
        return ValueKind.ANY if isinstance(value, float) else value
    if isinstance(value, float):
        return added[0]
    if isinstance(value, Range):
        scaled = Range(min(added), max(added))
        # A mask to which positions were added is one.
        return scaled if scaled.largest <= -FAR_BELOW and scaled.high >= -ORDINARY else ValueKind.ANY
    return value if abs(added[0]) <= ORDINARY else ValueKind.ANY
