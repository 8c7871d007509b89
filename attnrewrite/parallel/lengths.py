"""Lengths of the sequence: the meaning of a graph of which each rank has a shard.

Dynamo traces the model with the rank's shard, whose length is a symbol of the graph. What the graph computes is a
function of that symbol, so the graph of the whole sequence is the same one at ``ranks`` times the length, as long as
the conditions hold there under which it was traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from attnrewrite.ir.nodes import Size
from attnrewrite.torch_private import PythonReferenceAnalysis, sympy_interp

__all__ = ["Lengths", "expression"]


def expression(value: Any) -> Any:
    """A number, or a symbolic number, as a sympy expression."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return sympy.sympify(value)


class Lengths:
    """Sizes on this rank, and of the whole.

    Attributes:
        symbols: the symbols of the graph that are lengths of shards.
        known: the symbols of the graph's inputs, each with a symbolic number that is it.
        ranks, rank: how many processes share the sequence, and which of them this one is.
    """

    def __init__(self, symbols: Mapping[sympy.Symbol, torch.SymInt], known: Mapping[Any, Any], ranks: int, rank: int):
        """Args:
        symbols: lengths of shards, each with a symbolic number that is it.
        known: all symbols of the graph's inputs, each with a symbolic number that is it.
        """
        self.symbols = frozenset(symbols)
        self.ranks, self.rank = ranks, rank
        self.known = {**known, **symbols}
        self._whole = {symbol: ranks * symbol for symbol in symbols}

    def whole(self, expr: sympy.Expr) -> sympy.Expr:
        """The expression at the length of the whole sequence."""
        return expr.xreplace(self._whole)

    def depends(self, value: Any) -> bool:
        """Whether a number depends on the length of a shard."""
        return not self.symbols.isdisjoint(expression(value).free_symbols)

    def whole_shape(self, shape: Sequence[Size]) -> list[sympy.Expr]:
        return [self.whole(expression(size)) for size in shape]

    def size(self, expr: sympy.Expr) -> Size:
        """The expression as an argument of a call."""
        expr = sympy.expand(expr)
        if expr.is_number:
            return int(expr)
        values = {symbol: self.known[symbol] for symbol in expr.free_symbols}
        return sympy_interp(PythonReferenceAnalysis, values, expr)  # type: ignore[no-any-return]

    def number(self, value: Any) -> Any:
        """A symbolic number at the length of the whole; others as they are."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat)) or not self.depends(value):
            return value
        expr = self.whole(expression(value))
        values = {symbol: self.known[symbol] for symbol in expr.free_symbols}
        return sympy_interp(PythonReferenceAnalysis, values, expr)
