"""Draws masks, has them read as the rewriting reads them, and asks z3 whether what was proved is so for every size.

python -m tests.analysis.oracle --cases 10000 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sympy
import torch
import z3
from torch import fx

from attnrewrite.analysis.entries import Cases
from attnrewrite.analysis.formulas import Formula, conjunction
from attnrewrite.analysis.masks import (
    Positions,
    attended_everywhere,
    band_of,
    in_words,
    isolated_block_of,
    kept_where,
    may_mask,
)
from attnrewrite.analysis.values import ORDINARY
from attnrewrite.ir.site import Bias, Reach
from tests.support.drawn_masks import BATCHES, Drawing, Lengths
from tests.support.formulas import Computed, arithmetic, holds
from tests.support.z3_oracle import SOLVER, counterexample

__all__ = ["Findings", "judged", "lengths"]


def lengths() -> list[Lengths]:
    """Of each kind of sizes, with symbols that all cases share."""
    return [
        Lengths(6, 7, dynamic=True),
        Lengths(6, 7, dynamic=True),
        Lengths(6, 6, dynamic=True, equal=True),
        Lengths(5, 5, dynamic=False),
        Lengths(4, 6, dynamic=False),
        Lengths(6, 3, dynamic=False),
        Lengths(1, 5, dynamic=False),
    ]


class Findings:
    """What became of the cases: how often each thing was proved, and what was proved and is false."""

    def __init__(self) -> None:
        self.proved: Counter[str] = Counter()
        self.false: list[str] = []


def judged(cases: int, seed: int) -> Findings:
    """What becomes of so many cases, their masks also computed."""
    findings, kinds = Findings(), lengths()
    for case in range(cases):
        _Case(seed * 1_000_000 + case, kinds[case % len(kinds)], findings).judge()
    return findings


class _Case:
    def __init__(self, seed: int, lengths: Lengths, findings: Findings) -> None:
        self.seed, self.findings = seed, findings
        self.drawing = Drawing(lengths, random.Random(seed))
        _, query, key = self.drawing.axes
        self.positions = Positions(query, key)
        self.queries, self.keys = lengths.solver(lengths.queries), lengths.solver(lengths.keys)
        self.place = [z3.Int("batch"), z3.Int("query"), z3.Int("key")]
        self.at: dict[Any, Any] = {}
        for axes, place in zip(self.drawing.axes, self.place, strict=True):
            self.at |= {self.positions.symbol(axis): place for axis in axes}
        for size in (lengths.queries, lengths.keys):
            if isinstance(size, torch.SymInt):
                self.at[size.node.expr] = lengths.solver(size)
        sizes = (z3.IntVal(BATCHES), self.queries, self.keys)
        self.given = [self.queries >= 1, self.keys >= 1]
        self.given += [z3.And(place >= 0, place < size) for place, size in zip(self.place, sizes, strict=True)]

    def judge(self) -> None:
        terms = self.drawing.terms
        kept = [kept_where(term, self.positions) for term in terms]
        for number, formula in enumerate(kept):
            if formula is not None:
                raw = self.drawing.is_kept(number, *self.place)
                self._claim("kept_where", formula, self._holds(formula) == raw)
        self._attended()
        known = [formula for formula in kept if formula is not None]
        if len(known) == len(kept):
            self._of_all(conjunction(known))
        self._computed(kept)

    def _claim(self, what: str, said: object, claim: Any, given: Sequence[Any] = ()) -> None:
        self.findings.proved[what] += 1
        found = counterexample(claim, [*self.given, *given])
        if found is not None:
            self._false(what, said, found)

    def _false(self, what: str, said: object, found: str) -> None:
        nodes = "\n".join(f"    {node.format_node()}" for node in self.drawing.graph.nodes)
        terms = "\n".join(f"    {term}" for term in self.drawing.terms)
        self.findings.false.append(f"seed {self.seed}: {what} says {said}; but {found}\n{nodes}\n{terms}")

    # The meaning of formulas.

    def _holds(self, formula: Formula) -> Any:
        return holds(formula, self.at, self._fact, SOLVER)

    def _fact(self, key: Any) -> Any:
        if isinstance(key[0], fx.Node):
            return self._entry(key)
        relation, *rest = key
        if relation == "eq":
            numbers = [self._value(part) for part in rest[0]]
            return numbers[0] == numbers[-1]
        first, second = (self._value(part) for part in rest)
        return first < second if relation == "lt" else first <= second

    def _entry(self, key: Any) -> Any:
        node, index = key
        return self.drawing.entry[node]([self._number(position) for position in index])

    def _number(self, expression: Any) -> Any:
        value = arithmetic(expression, self.at, SOLVER)
        return z3.IntVal(value) if isinstance(value, int) else value

    def _value(self, part: Any) -> Any:
        """A number that is compared."""
        if isinstance(part, tuple):
            return self._entry(part)
        if isinstance(part, Cases):
            value: Any = z3.IntVal(0)
            for number, formula in part.numbers:
                value = z3.If(self._holds(formula), z3.IntVal(int(number)), value)
            return value
        if isinstance(part, sympy.Expr):
            return self._number(part)
        return z3.If(self._holds(part), z3.IntVal(1), z3.IntVal(0))

    # What is proved.

    def _attended(self) -> None:
        words = attended_everywhere(self.drawing.terms, self.positions)
        if words is None:
            return
        batch, query, _ = self.place
        witnesses = {
            "the first key": z3.IntVal(0),
            "key position = query position": query,
            "key position = query position, counted from the end": query + self.keys - self.queries,
        }
        if words == "the first or the second key":
            either = [self._is_open(batch, query, z3.IntVal(key)) for key in range(2)]
            self._claim("attended_everywhere", words, z3.Or(*either))
            return
        self._claim("attended_everywhere", words, self._is_open(batch, query, witnesses[words]))

    def _is_open(self, batch: Any, query: Any, key: Any) -> Any:
        kept = [self.drawing.is_kept(n, batch, query, key) for n in range(len(self.drawing.terms))]
        return z3.And(key >= 0, key < self.keys, *kept)

    def _of_all(self, kept: Formula) -> None:
        """What is said of all terms together."""
        _, query, key = self.place
        raw = z3.And([self.drawing.is_kept(n, *self.place) for n in range(len(self.drawing.terms))])
        band = band_of(kept, self.positions)
        if band is not None:
            if band.from_first is not None:
                self._claim("band_of, from the first", band, _within(band.from_first, query, key) == raw)
            if band.from_last is not None:
                from_last = _within(band.from_last, query - self.queries, key - self.keys)
                self._claim("band_of, from the last", band, from_last == raw)
        block = isolated_block_of(kept, self.positions)
        if block is not None:
            start, stop = map(self._number, block)
            self._claim("isolated_block_of", block, _isolated(start, stop, query, key) == raw)
        phrases = in_words(kept, self.positions)
        meanings = [self._meaning(phrase) for phrase in phrases]
        if not any(meaning is None for meaning in meanings):
            self._claim(f"in_words, {_without_numbers(phrases)}", phrases, z3.And(*meanings, True) == raw)
        for words, place, other in (
            ("key padding", query, z3.Int("another query")),
            ("query padding", key, z3.Int("another key")),
        ):
            if phrases == (words,):
                size = self.queries if place is query else self.keys
                elsewhere = z3.substitute(raw, (place, other))
                self._claim(f"in_words, {words}", phrases, raw == elsewhere, [other >= 0, other < size])

    def _meaning(self, phrase: str) -> Any:
        """What a phrase says; None where it only hints."""
        _, query, key = self.place
        if phrase == "everything masked":
            return z3.BoolVal(False)
        if phrase == "causal":
            return key <= query
        if phrase == "causal from the last key":
            return key - self.keys <= query - self.queries
        shifted = re.fullmatch(r"causal, shifted by (-?\d+)", phrase)
        if shifted:
            return key <= query + int(shifted[1])
        window = re.fullmatch(r"sliding window of (-?\d+)", phrase)
        if window:
            return key > query - int(window[1])
        isolated = re.fullmatch(r"isolated from (\d+) to (\d+)", phrase)
        return _isolated(int(isolated[1]), int(isolated[2]), query, key) if isolated else None

    # The masks, computed.

    def _computed(self, kept: Sequence[Formula | None]) -> None:
        for queries, keys in self.drawing.lengths.examples:
            values = self.drawing.values(queries, keys)
            for number, (term, formula) in enumerate(zip(self.drawing.terms, kept, strict=True)):
                condition, open_where_true = self.drawing.kept[number]
                opened = values[condition].expand(BATCHES, queries, keys) == open_where_true
                if isinstance(term, Bias):
                    added = values[term.operand.node].expand(BATCHES, queries, keys)
                    assert torch.equal(added == 0, opened), "the case says itself wrongly what it keeps"
                    if not may_mask(term):
                        self.findings.proved["may_mask, not"] += 1
                        if bool((added < -ORDINARY).any()):
                            self._false("may_mask", False, f"{added.min()} is added")
                if formula is not None:
                    self.findings.proved["kept_where, computed"] += 1
                    self._compare(formula, opened, values)

    def _compare(self, formula: Formula, opened: torch.Tensor, values: dict[fx.Node, Any]) -> None:
        _, queries, keys = opened.shape
        for batch, query, key in torch.cartesian_prod(*map(torch.arange, opened.shape)).tolist():
            at: dict[Any, int] = {}
            for axes, place in zip(self.drawing.axes, (batch, query, key), strict=True):
                at |= {self.positions.symbol(axis): place for axis in axes}
            for size, number in ((self.drawing.lengths.queries, queries), (self.drawing.lengths.keys, keys)):
                if isinstance(size, torch.SymInt):
                    at[size.node.expr] = number
            if Computed(values, at).holds(formula) != bool(opened[batch, query, key]):
                self._false("kept_where", formula, f"computed of {queries} x {keys} it differs at {batch, query, key}")
                return


def _within(reach: Reach, query: Any, key: Any) -> Any:
    before, after = reach
    bounds = [] if before is None else [key >= query - before]
    bounds += [] if after is None else [key <= query + after]
    return z3.And(*bounds, True)


def _isolated(start: Any, stop: Any, query: Any, key: Any) -> Any:
    inside = [z3.And(place >= start, place < stop) for place in (query, key)]
    return z3.Or(query == key, z3.Not(inside[0]), z3.Not(inside[1]))


def _without_numbers(phrases: Sequence[str]) -> str:
    return re.sub(r"-?\d+", "n", " + ".join(phrases)) or "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    findings = judged(given.cases, given.seed)
    for what, count in sorted(findings.proved.items()):
        print(f"{count:8} {what}")
    for disagreement in findings.false[:20]:
        print(disagreement)
    print(f"{given.cases} masks in {time.perf_counter() - start:.0f} s: {len(findings.false)} proved and false")
    return 1 if findings.false else 0


if __name__ == "__main__":
    raise SystemExit(main())
