"""What a canonical attention means, as something that runs: slow, plain, in float64.

    weights = softmax(softcap(scale * query_factors * key_factors * (query @ key)) + terms)
    result = output_mods(weights @ value_mods(value))

Each tensor is spread over the axes that the attention has, so that no kernel's layout stands between the definition and
its result. Gradients are autograd's. Dropout is left out, and sizes must be numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from attnrewrite.analysis.values import ABSORBED, FAR_BELOW
from attnrewrite.ir.axes import Axis, Operand, axes_of, resolve
from attnrewrite.ir.site import (
    Bias,
    CanonicalAttention,
    Fill,
    MaskedRows,
    Scale,
    WeightMod,
    Zero,
)

__all__ = ["interpreted"]

Values = Callable[[fx.Node], Tensor]
"""What a node of the source has computed."""


def interpreted(site: CanonicalAttention, values: Values) -> Tensor:
    """The result of the attention in float64, laid out as its source's.

    Args:
        site: a site in canonical form, that is with no reason in ``site.scores.inexpressible`` but a soft cap.
        values: of the operands' nodes, at sizes that are numbers.

    Raises:
        ValueError: the site is not in canonical form, or a size is symbolic.
    """
    scores = site.scores
    if scores.inexpressible and scores.softcap is None:
        raise ValueError(f"the site has no canonical form: {scores.inexpressible}")
    reader = _Reader(site, values)
    products = reader.products() * _scale_of(site)
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    added, dropped = reader.terms(torch.zeros_like(products))
    # A number this low takes all digits of a score, in every dtype that a source may compute in.
    kept = ~(dropped | (added <= ABSORBED))
    weights = reader.weights(added + torch.where(kept, products, 0.0))
    weights = _in_rows_without_key(weights, reader.highest(added), scores.masked_rows)
    value = reader.modified(reader.spread(site.value), scores.value_mods)
    result = reader.total(weights * value)
    return reader.laid_out(reader.modified(result, scores.output_mods))


def _scale_of(site: CanonicalAttention) -> float:
    if site.scores.scale is not None:
        return site.scores.scale
    return 1 / math.sqrt(math.prod(_size(axis) for axis in site.feature_axes))


def _in_rows_without_key(weights: Tensor, highest: Tensor, worth: MaskedRows) -> Tensor:
    """The weights with those of rows that have no key as the source has them; ``highest`` is added at most in a row."""
    masked, infinite = highest <= FAR_BELOW, highest == -math.inf
    if worth is MaskedRows.ZERO:
        return torch.where(masked, 0.0, weights)
    if worth is MaskedRows.ZERO_UNLESS_NAN:
        return torch.where(masked & ~infinite, 0.0, weights)
    if worth is MaskedRows.ZERO_WHERE_NAN:
        return torch.where(infinite, 0.0, weights)
    return weights


def _size(axis: Axis) -> int:
    if not isinstance(axis.size, int):
        raise ValueError(f"the size of {axis} is symbolic")
    return axis.size


class _Reader:
    """Tensors of a site, each with a dimension for every axis of the attention."""

    def __init__(self, site: CanonicalAttention, values: Values) -> None:
        self._site, self._values = site, values
        rows = [*site.query.axes, *site.key.axes, *site.value.axes, *axes_of(site.weight_layout)]
        self._axes = list(dict.fromkeys(leaf for axis in rows for leaf in axis.leaves()))
        self._axes += [axis for axis in axes_of(site.result_layout) if axis not in self._axes]
        self._keys = self._places(site.key_axes)
        self._features = self._places(site.feature_axes)

    def _places(self, axes: Sequence[Axis]) -> list[int]:
        return [self._axes.index(leaf) for axis in axes for leaf in axis.leaves()]

    def spread(self, operand: Operand) -> Tensor:
        """The operand with a dimension of size 1 for each axis that it lacks, in float64 unless it is boolean."""
        value = self._values(operand.node)
        value = value.double() if value.is_floating_point() else value
        own = [axis for dim in resolve(operand.layout) for axis in dim]
        value = value.reshape([_size(axis) for axis in own])
        order = sorted(range(len(own)), key=lambda place: self._axes.index(own[place]))
        return value.permute(order).reshape([_size(axis) if axis in own else 1 for axis in self._axes])

    def products(self) -> Tensor:
        site, scores = self._site, self._site.scores
        query = self.modified(self.spread(site.query), scores.query_factors)
        key = self.modified(self.spread(site.key), scores.key_factors)
        product = query * key
        return product.sum(self._features, keepdim=True) if self._features else product

    def total(self, value: Tensor) -> Tensor:
        """The sum over the keys, of which a single one has no axis."""
        return value.sum(self._keys, keepdim=True) if self._keys else value

    def highest(self, value: Tensor) -> Tensor:
        return value.amax(self._keys, keepdim=True) if self._keys else value

    def modified(self, value: Tensor, mods: Sequence[WeightMod]) -> Tensor:
        for mod in mods:
            value = self._scaled(value, mod) if isinstance(mod, Scale) else self._zeroed(value, mod)
        return value

    def _scaled(self, value: Tensor, scale: Scale) -> Tensor:
        factor: Tensor | float
        if isinstance(scale.factor, Operand):
            factor = self.spread(scale.factor)
        elif isinstance(scale.factor, fx.Node):
            factor = self._values(scale.factor)
        else:
            factor = scale.factor
        return value / factor if scale.divide else value * factor

    def _zeroed(self, value: Tensor, mod: Zero) -> Tensor:
        condition = self.spread(mod.condition)
        if mod.multiplied:
            return value * condition
        condition = condition != 0
        return torch.where(condition, value, 0.0) if mod.invert else torch.where(condition, 0.0, value)

    def terms(self, nothing: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the products, and where these are dropped."""
        scores = self._site.scores
        added, dropped = nothing, torch.zeros_like(nothing, dtype=torch.bool)
        for term in scores.terms:
            if isinstance(term, Bias):
                number = self.spread(term.operand).double()
                for scale in term.scales:
                    number = self._scaled(number, scale)
                added = added + number * term.factor
            elif isinstance(term, Fill):
                condition = self.spread(term.condition) != 0
                condition = ~condition if term.invert else condition
                added, dropped = torch.where(condition, term.value, added), dropped | condition
            else:
                low = added < term.value
                added, dropped = torch.where(low, term.value, added), dropped | low
            for factor in getattr(term, "rescaled", ()):
                added = added * factor
        if scores.is_causal:
            later = self._position(self._site.key_axes) > self._position(self._site.query_axes)
            added, dropped = torch.where(later, -math.inf, added), dropped | later
        return added, dropped

    def _position(self, axes: Sequence[Axis]) -> Tensor:
        leaves = [leaf for axis in axes for leaf in axis.leaves()]
        count = math.prod(_size(leaf) for leaf in leaves)
        shape = [1] * len(self._axes)
        position = torch.arange(count).reshape([_size(leaf) for leaf in leaves])
        order = sorted(range(len(leaves)), key=lambda place: self._axes.index(leaves[place]))
        for leaf in leaves:
            shape[self._axes.index(leaf)] = _size(leaf)
        return position.permute(order).reshape(shape)

    def weights(self, scores: Tensor) -> Tensor:
        """Softmax over the keys, and the sink."""
        highest = self.highest(scores).detach()
        sink = self._sink()
        if sink is not None:
            shifted = self._site.sink_is_shifted & (highest == -math.inf)
            highest = torch.where(shifted, highest, torch.maximum(highest, sink.detach()))
        exponentials = (scores - highest).exp()
        total = self.total(exponentials)
        if sink is not None:
            total = total + (sink - highest).exp()
        return exponentials / total

    def _sink(self) -> Tensor | None:
        sink = self._site.sink
        if sink is None:
            return None
        return self.spread(sink) if isinstance(sink, Operand) else torch.tensor(float(sink), dtype=torch.float64)

    def laid_out(self, result: Tensor) -> Tensor:
        layout = resolve(self._site.result_layout)
        wanted = [axis for dim in layout for axis in dim]
        result = result.expand([_size(axis) if axis in wanted else 1 for axis in self._axes])
        result = result.reshape([size for size, axis in zip(result.shape, self._axes, strict=True) if axis in wanted])
        order = [axis for axis in self._axes if axis in wanted]
        result = result.permute([order.index(axis) for axis in wanted])
        return result.reshape([math.prod(_size(axis) for axis in dim) for dim in layout])
