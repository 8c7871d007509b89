"""What a canonical attention means, as something that runs: slow, plain, in float64.

    weights = softmax(softcap(scale * query_factors * key_factors * (query @ key)) + terms)
    result = output_mods(weights @ value_mods(value))

Each tensor is spread over the axes that the attention has, so that no kernel's layout stands between the definition and
its result. Gradients are autograd's. Dropout is left out, and sizes must be numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.analysis.values import ABSORBED, FAR_BELOW
from attnrewrite.ir.axes import Axis, Operand, axes_of, resolve
from attnrewrite.ir.site import (
    Bias,
    CanonicalAttention,
    Elementwise,
    Fill,
    Floor,
    MaskedRows,
    Narrow,
    Raise,
    Scale,
    Shift,
    WeightMod,
    Zero,
)

__all__ = ["interpreted"]

Values = Callable[[fx.Node], Tensor]
"""What a node of the source has computed."""


def interpreted(site: CanonicalAttention, values: Values) -> Tensor:
    """The result of the attention in float64, laid out as its source's.

    Where the scores have no canonical form, the source's steps are done to them one by one, as a ``score_mod`` does. A
    call of ``scaled_dot_product_attention`` gives zeros in rows whose keys are all masked by minus infinity.

    Args:
        site: a site in canonical form.
        values: of the operands' nodes, at sizes that are numbers.

    Raises:
        ValueError: a size is symbolic, or a step subtracts a number of which it is only known that softmax cancels it,
            and something follows that does not.
    """
    scores = site.scores
    reader = _Reader(site, values)
    if scores.inexpressible and scores.softcap is None:
        added = reader.stepped(reader.products((), ()))
        weights = reader.weights(added)
    else:
        products = reader.products(scores.query_factors, scores.key_factors) * _scale_of(site)
        if scores.softcap is not None:
            products = scores.softcap * torch.tanh(products / scores.softcap)
        added, dropped = reader.terms(torch.zeros_like(products))
        # A number this low takes all digits of a score, in every dtype that a source may compute in.
        kept = ~(dropped | (added <= ABSORBED))
        total = added + torch.where(kept, products, 0.0)
        if scores.dtype is torch.float32:
            # What a sum keeps of scores beside -1e9 is decided by its dtype. (In half precision the formula is meant.)
            total = total.float().double()
        weights = reader.weights(total)
    worth = MaskedRows.ZERO_WHERE_NAN if site.fused else scores.masked_rows
    weights = _in_rows_without_key(weights, reader.highest(added), worth)
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

    def products(self, query_factors: Sequence[Scale], key_factors: Sequence[Scale]) -> Tensor:
        query = self.modified(self.spread(self._site.query), query_factors)
        key = self.modified(self.spread(self._site.key), key_factors)
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
                added = added + self._bias(term)
            elif isinstance(term, Fill):
                condition = self._filled(term)
                added, dropped = torch.where(condition, term.value, added), dropped | condition
            elif isinstance(term, Raise):
                added = added.to(term.rounded_to).double() if term.rounded_to else added
                highest = self.highest(added).clamp(max=0.0)
                alike = (highest <= term.absorbed) | (self.total((~dropped).double()) == 0)
                added, dropped = (added - highest) * term.factor, dropped | alike
            else:
                low = added < term.value
                added, dropped = torch.where(low, term.value, added), dropped | low
            for factor in getattr(term, "rescaled", ()):
                added = added * factor
        # The maximum of a row of minus infinity, less itself.
        added = torch.where(self.total(added.isnan().double()) > 0, -math.inf, added)
        if scores.is_causal:
            later = self._position(self._site.key_axes) > self._position(self._site.query_axes)
            added, dropped = torch.where(later, -math.inf, added), dropped | later
        return added, dropped

    def _bias(self, term: Bias) -> Tensor:
        number = self.spread(term.operand).double()
        for scale in term.scales:
            number = self._scaled(number, scale)
        return number * term.factor

    def _filled(self, term: Fill) -> Tensor:
        condition = self.spread(term.condition) != 0
        return ~condition if term.invert else condition

    def stepped(self, scores: Tensor) -> Tensor:
        """The products after the source's own steps."""
        mods = self._site.mods
        for place, mod in enumerate(mods):
            if isinstance(mod, Scale):
                scores = self._scaled(scores, mod)
            elif isinstance(mod, Bias):
                scores = scores + self._bias(mod)
            elif isinstance(mod, Fill):
                scores = torch.where(self._filled(mod), mod.value, scores)
            elif isinstance(mod, Floor):
                scores = scores.clamp(min=mod.value)
            elif isinstance(mod, Elementwise):
                scores = self._applied(mod.node, scores)
            elif isinstance(mod, Shift) and mod.by_maximum and mod.own_row:
                scores = scores - self.highest(scores).detach()
            elif isinstance(mod, Shift) and not all(isinstance(each, (Shift, Narrow)) for each in mods[place:]):
                raise ValueError("what follows does not cancel a number that was subtracted")
        return scores

    def _applied(self, node: fx.Node, scores: Tensor) -> Tensor:
        target: Any = node.target
        others, named = fx.node.map_arg((node.args[1:], node.kwargs), self._values)
        result: Tensor = target(scores, *others, **named)
        return result

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
