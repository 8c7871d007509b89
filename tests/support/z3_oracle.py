"""z3 as an oracle: whether a claim about positions and sizes has a counterexample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import z3

from tests.support.formulas import Logic

__all__ = ["SOLVER", "counterexample"]

SOLVER = Logic(
    every=lambda terms: z3.And(*terms),
    some=lambda terms: z3.Or(*terms),
    negated=lambda value: z3.Not(value),
    size=lambda number: z3.If(number >= 0, number, -number),
)
"""Truth values and numbers that are z3's."""


def counterexample(claim: Any, given: Sequence[Any]) -> str | None:
    """Where the claim fails although all that is ``given`` holds; None if nowhere.

    Raises:
        TimeoutError: z3 does not know.
    """
    solver = z3.Solver()
    solver.set("timeout", 20_000)
    solver.add(*given, z3.Not(claim))
    answer = solver.check()
    if answer == z3.unknown:
        raise TimeoutError(solver.reason_unknown())
    return str(solver.model()) if answer == z3.sat else None
