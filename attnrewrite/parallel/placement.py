"""Placements: whether a rank holds the whole of a tensor, or a shard of it along which dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from attnrewrite.parallel.lengths import Lengths

__all__ = ["Placement", "Shard", "placed_in"]


@dataclass(frozen=True)
class Shard:
    """The rank holds ``length`` entries of the sequence, in dimension ``dim`` of the tensor.

    The dimension has ``outer`` sequences one after the other, whose entries are ``inner`` long: a dimension of the
    sequence alone has one of both, and ``x.flatten(0, 1)`` of shape (batch * length, features) has ``outer`` = batch.

    Attributes:
        of_heads: what is sharded are heads, of which each rank has the next ``length``, and not the sequence.
    """

    dim: int
    length: sympy.Expr
    outer: sympy.Expr = sympy.S.One
    inner: sympy.Expr = sympy.S.One
    of_heads: bool = False

    def at(self, dim: int) -> Shard:
        return replace(self, dim=dim)

    @property
    def size(self) -> sympy.Expr:
        """The size of the dimension, on this rank."""
        return self.outer * self.length * self.inner

    @property
    def is_plain(self) -> bool:
        """Whether the dimension is the sequence's alone."""
        return bool(self.outer == 1 and self.inner == 1)


Placement = Shard | None
"""None: the whole, or a tensor that has no dimension of the sequence."""


def placed_in(
    shard: Shard, sizes: Sequence[sympy.Expr], others: Sequence[sympy.Expr], lengths: Lengths
) -> Shard | None:
    """Where the shard of a tensor is in a view of it; None if the view takes the sequence apart.

    Args:
        sizes: those of the whole tensor.
        others: those of the view of the whole.
    """
    outside = sympy.prod(sizes[: shard.dim]) * shard.outer
    within = shard.inner * sympy.prod(sizes[shard.dim + 1 :])
    for dim, size in enumerate(others):
        outer = sympy.cancel(outside / sympy.prod(others[:dim]))
        inner = sympy.cancel(within / sympy.prod(others[dim + 1 :]))
        whole = all(sympy.fraction(part)[1] == 1 for part in (outer, inner))
        if whole and sympy.expand(outer * lengths.ranks * shard.length * inner - size) == 0:
            return replace(shard, dim=dim, outer=outer, inner=inner)
    return None
