"""The linear attention site: attention without softmax, as its pattern finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from attnrewrite.ir.axes import Axis, Layout, Operand, axes_of
from attnrewrite.ir.reason import FINE, Reason
from attnrewrite.ir.site import Scale

__all__ = ["LinearAttention"]


Order = Literal["linear", "quadratic"]
"""Which two of ``query``, ``key`` and ``value`` are multiplied first: key and value, or query and key."""


@dataclass(frozen=True, eq=False)
class LinearAttention:
    """Attention without softmax, ``scales(query @ key) @ value``: a product of three, in either order.

    The source computes ``outer @ (middle @ inner)``. The key is always in the middle; ``order`` says which of the
    others is the query. Operations between the products do not depend on the axes that the second product sums over, so
    they may be applied after it.

    Attributes:
        pattern: the name of the pattern that found it.
        anchor: the node whose source line the report shows.
        result: the node that holds the product of all three; ``result_layout`` has the axes of its dimensions.
        order: which product the source computes first.
        outer, middle, inner: operands, as far back as views and repetitions could be followed.
        first_summed, then_summed: the axes that ``middle @ inner``, and the product with ``outer``, sum over.
        scales: factors and divisors of the products, in order.
        sums: the normalizing sums of ``middle @ inner`` over ``then_summed``; each as an operand, with the number of
            ``scales`` that were applied before it.
        features: the feature maps of query and key, in words.
        nonnegative: query and key were proved to have no negative entry.
        normalizer: how the result is normalized, in words; empty if it is not.
        fixed: why the order must not be changed, whatever it costs; empty if it may be.
        dtype: the dtype that the products are computed in.
        interior: the nodes from the first product to the second, in graph order.
    """

    pattern: str
    anchor: fx.Node
    result: fx.Node
    result_layout: Layout
    order: Order
    outer: Operand
    middle: Operand
    inner: Operand
    first_summed: tuple[Axis, ...]
    then_summed: tuple[Axis, ...]
    scales: tuple[Scale, ...] = ()
    sums: tuple[tuple[Operand, int], ...] = ()
    features: tuple[str, ...] = ()
    nonnegative: bool = False
    normalizer: str = ""
    fixed: Reason = FINE
    dtype: torch.dtype = torch.float32
    interior: tuple[fx.Node, ...] = ()

    def resolved(self) -> LinearAttention:
        """The site with each axis that was divided since it was found replaced by its parts."""
        outer, middle, inner = (part.resolved() for part in self.operands)
        first, then = axes_of((self.first_summed,)), axes_of((self.then_summed,))
        return replace(self, outer=outer, middle=middle, inner=inner, first_summed=first, then_summed=then)

    def with_operands(self, change: Callable[[Operand], Operand]) -> LinearAttention:
        """The site with ``change`` applied to query, key, value and every tensor among the scales."""
        outer, middle, inner = map(change, self.operands)
        scales = tuple(
            Scale(change(scale.factor), scale.divide) if isinstance(scale.factor, Operand) else scale
            for scale in self.scales
        )
        return replace(self, outer=outer, middle=middle, inner=inner, scales=scales)

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """``outer``, ``middle`` and ``inner``."""
        return self.outer, self.middle, self.inner

    @property
    def query(self) -> Operand:
        return self.outer if self.order == "linear" else self.inner

    @property
    def key(self) -> Operand:
        return self.middle

    @property
    def value(self) -> Operand:
        return self.inner if self.order == "linear" else self.outer

    @property
    def key_axes(self) -> tuple[Axis, ...]:
        """The key positions."""
        return self.first_summed if self.order == "linear" else self.then_summed

    @property
    def feature_axes(self) -> tuple[Axis, ...]:
        """The features of query and key."""
        return self.then_summed if self.order == "linear" else self.first_summed

    @property
    def outer_axes(self) -> tuple[Axis, ...]:
        """The axes of the result that only ``outer`` has."""
        return _only(self.outer, self.middle, self.inner)

    @property
    def inner_axes(self) -> tuple[Axis, ...]:
        """The axes of the result that only ``inner`` has."""
        return _only(self.inner, self.middle, self.outer)

    @property
    def batch_axes(self) -> tuple[Axis, ...]:
        """All other axes of the result."""
        own = {*self.outer_axes, *self.inner_axes}
        return tuple(axis for axis in axes_of(self.result_layout) if axis not in own)

    @property
    def query_axes(self) -> tuple[Axis, ...]:
        """The query positions."""
        return self.outer_axes if self.order == "linear" else self.inner_axes

    @property
    def value_axes(self) -> tuple[Axis, ...]:
        """The features of the value and of the result."""
        return self.inner_axes if self.order == "linear" else self.outer_axes


def _only(operand: Operand, *others: Operand) -> tuple[Axis, ...]:
    elsewhere = {axis for other in others for axis in other.axes}
    return tuple(axis for axis in operand.axes if axis not in elsewhere)
