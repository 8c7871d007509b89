"""What an attention means, as one value: the contract between patterns, which find it, and kernels, which compute it.

``result = dropout(softmax(mods(query @ key))) @ value``, where softmax runs over the key axes. How the source spelled
it is gone: which tensor dimension is a batch, a head, a position or a feature is told by axes
(:mod:`attnrewrite.analysis.views`), and grouped or broadcast operands are operands that lack an axis.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import Axis, Layout, Operand, axes_of
from attnrewrite.ir.nodes import Size, tensor
from attnrewrite.ir.reason import FINE, Reason

__all__ = [
    "AttentionSite",
    "Band",
    "Bias",
    "CanonicalAttention",
    "CanonicalScores",
    "Elementwise",
    "Fill",
    "Floor",
    "MaskedRows",
    "Narrow",
    "NotAttention",
    "Reach",
    "RoundingDecides",
    "Scale",
    "ScoreMod",
    "Shift",
    "WeightMod",
    "Zero",
    "scale_in_words",
]


class NotAttention(Exception):
    """A near miss: something that looks like attention, with the reason why it is not taken."""


class RoundingDecides(NotAttention):
    """It is attention, but the rounding of half-precision scores decides the result of a fully masked row."""


@dataclass(frozen=True)
class Scale:
    """``scores * factor``, or ``scores / factor``; a number, a symbolic number's node, or a tensor."""

    factor: float | fx.Node | Operand
    divide: bool = False


@dataclass(frozen=True)
class Bias:
    """``scores + factor * operand``, computed in ``dtype``; ``scales`` are applied to the operand first, in order."""

    operand: Operand
    dtype: torch.dtype
    factor: float = 1.0
    scales: tuple[Scale, ...] = ()

    def of(self, value: float) -> float | None:
        """What is added where the operand is ``value``, each step rounded; None where a tensor scales it."""
        for scale in self.scales:
            if not isinstance(scale.factor, (int, float)):
                return None
            value = _stored(value / scale.factor if scale.divide else value * scale.factor, self.dtype)
        return _stored(value * self.factor, self.dtype)

    def scaled(self, scale: Scale) -> Bias:
        """The bias with one more factor, which is applied as a step of its own."""
        own = () if self.factor == 1 else (Scale(self.factor),)
        return Bias(self.operand, self.dtype, 1.0, (*self.scales, *own, scale))


def _stored(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


@dataclass(frozen=True)
class Fill:
    """``where(condition, value, scores)``, or with ``invert`` where the condition does not hold.

    ``multiplied``: it is written as a product with zeros and ones, which lets NaN through, also in gradients.
    """

    condition: Operand
    value: float
    dtype: torch.dtype
    invert: bool = False
    multiplied: bool = False


@dataclass(frozen=True)
class Floor:
    """``maximum(scores, value)`` with a value that only masked scores are below."""

    value: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Shift:
    """A number is added to all scores of a row, which is nothing to softmax.

    ``by_maximum``: it is minus their maximum, which makes low scores ordinary again before more is added.
    """

    by_maximum: bool = False


@dataclass(frozen=True)
class Narrow:
    """``scores.to(dtype)`` with a dtype that holds smaller numbers, or fewer of them."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Elementwise:
    """Any other function of one score (tanh, clamp), as the node that applies it to its first argument."""

    node: fx.Node


ScoreMod = Scale | Bias | Fill | Floor | Shift | Narrow | Elementwise


@dataclass(frozen=True)
class Zero:
    """``where(condition, 0, weights)``, or with ``invert`` where the condition does not hold.

    ``multiplied``: it is written as a product with zeros and ones, which leaves NaN as it is.
    """

    condition: Operand
    invert: bool = False
    multiplied: bool = False


WeightMod = Scale | Zero


Reach = tuple[int | None, int | None]
"""How many positions before and after its own a query attends, both included; None where there is no bound."""


@dataclass(frozen=True)
class Band:
    """A mask that keeps the keys around the diagonal, which may be told in two ways.

    Attributes:
        from_first: the reach where the first query stands beside the first key; None if it is not known in numbers.
        from_last: the reach where the last query stands beside the last key; None if it is not known in numbers.
    """

    from_first: Reach | None
    from_last: Reach | None

    @property
    def is_causal(self) -> bool:
        """Whether exactly the keys up to the query's own position are kept, counted from the first."""
        return self.from_first == (None, 0)


class MaskedRows(str, enum.Enum):
    """What the source gives rows whose keys are all masked. The value is what reports say.

    Members are strings as well: in kernels of one's own that compare with the words, ``== "NaN"`` says what it said.
    """

    NONE = "none"
    """There are no such rows."""
    MEAN_OF_VALUE = "mean of value"
    """The mean of the values: softmax of scores that are all the same, and finite."""
    NAN = "NaN"
    """NaN where the mask is infinite, as softmax gives there; else the mean of the values."""
    ZERO = "zero"
    """Zero, whatever the mask is."""
    ZERO_UNLESS_NAN = "zero unless NaN"
    """NaN where the mask is infinite, else zero: weights that were multiplied by the mask."""
    ZERO_WHERE_NAN = "zero where NaN"
    """Zero where the mask is infinite, else the mean of the values."""

    def __str__(self) -> str:
        return self.value

    @property
    def may_occur(self) -> bool:
        """Whether there may be such rows at all."""
        return self is not MaskedRows.NONE

    @property
    def may_be_nan(self) -> bool:
        """Whether the source gives NaN where the mask is infinite."""
        return self in (MaskedRows.NAN, MaskedRows.ZERO_UNLESS_NAN)

    @property
    def tells_nan(self) -> bool:
        """Whether the source gives rows in which softmax is NaN something else than the others."""
        return self.may_be_nan or self is MaskedRows.ZERO_WHERE_NAN

    @property
    def is_zero_unless_nan(self) -> bool:
        """Whether all such rows that are not NaN are zero."""
        return self in (MaskedRows.ZERO, MaskedRows.ZERO_UNLESS_NAN)

    @property
    def is_mean_of_value(self) -> bool:
        """Whether all such rows, if there are any, are the mean of the values."""
        return self in (MaskedRows.NONE, MaskedRows.MEAN_OF_VALUE)


@dataclass(frozen=True)
class CanonicalScores:
    """``scale * query_factors * key_factors * (query @ key) + replay(terms)``.

    Attributes:
        scale: a number; None for one over the root of the head size, which is symbolic.
        query_factors, key_factors: what is multiplied (or, with ``divide``, divided) into query and key beforehand.
        value_mods, output_mods: what is done to the value beforehand and to the output afterwards.
        terms: biases, fills and floors, in the order in which they apply; a factor includes the scaling after it.
        dtype: the dtype in which the source adds the terms.
        rounded_to: the dtype that the masked scores are rounded to at last; None where that is no narrower one.
        attended: how it was proved that every row keeps a key, or None.
        masked_rows: what the source gives rows that have no key.
        fills_decide: rows without a key can come from fills alone, and all fill in the same value: the kernel is
            given such rows as rows that attend every key with a score of zero, and what the source gives them (the
            mean of the values, zero or NaN) is made from that.
        is_causal: the mask was proved to be causal from the first key on, and is asked of the kernel by name.
        band: what all terms together were proved to be, every row with a key; a kernel with a window or a causal mask
            of its own takes it in the terms' place.
        isolated: the positions, from the first up to and without the second, within which each attends to itself alone;
            to those outside it attends, and they to all. All terms together were proved to say no more and no less.
        softcap: where ``inexpressible`` is for nothing but a soft cap, its height: the scores that the terms apply to
            are ``softcap * tanh(scale * (query @ key) / softcap)``.
        structure: the mask's structure in words.
        inexpressible: why the modifications are not of this form; a kernel that applies any function of the scores
            replays the site's own.
    """

    scale: float | None
    query_factors: tuple[Scale, ...]
    key_factors: tuple[Scale, ...]
    terms: tuple[Bias | Fill | Floor, ...]
    dtype: torch.dtype
    attended: str | None
    masked_rows: MaskedRows
    rounded_to: torch.dtype | None = None
    fills_decide: bool = False
    is_causal: bool = False
    band: Band | None = None
    isolated: tuple[Size, Size] | None = None
    softcap: float | None = None
    value_mods: tuple[WeightMod, ...] = ()
    output_mods: tuple[WeightMod, ...] = ()
    structure: tuple[str, ...] = ()
    inexpressible: Reason = FINE


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention, found. It does not change: what a pass makes of it is another.

    Attributes:
        pattern: the name of the pattern that found it.
        anchor: the node whose source line stands for the site (the softmax, or the call).
        result: the node that the kernel's output replaces; ``result_layout`` names its dimensions.
        query, key, value: operands, as far back as views and repetitions could be followed.
        query_axes: the axes that are query positions. Other axes that the key lacks are groups of query heads.
        folded: those of the query axes that are batches, or heads, which share their key and value.
        key_axes: the axes that softmax runs over.
        feature_axes: the axes that query and key are contracted over.
        weight_layout: the dimensions of the scores in the source. A batch or a head may be there that no operand has.
        mods: what is done to the scores, in the order in which it is done.
        sink: the score of one more key, whose value is zero: a number, or a tensor over all axes but the key's.
        sink_is_shifted: a row whose scores are all minus infinity gives NaN in spite of the sink.
        weight_mods: what is done to the weights between softmax and the product with the value, dropout apart.
        underflows: a row whose scores are all far below zero gives NaN.
        rounds_rows: the weights of a row whose scores are all far below zero, and finite, are 1 each.
        nan_to_zero: weights that are NaN, as in rows without a key, are set to zero.
        softmax_dtype: the dtype that softmax is computed in.
        dropout: the probability of dropping a weight; 0 when not training.
        is_causal: top-left aligned causal masking asked of an existing fused call.
        default_scale: an existing fused call leaves the scale to its default, and the head size is symbolic.
        differentiable: a backward pass may follow.
        fused: the site is a fused call already; its own rules for fully masked rows hold.
        foreign: the call is a library's own operator; what it gives rows without a key is not known.
        compute_dtype: the lowest dtype in which the products may be computed without losing what the source kept.
        interior: the nodes that go when the site is replaced, in graph order.
        for_inductor: the graph goes on to Inductor.
        in_autocast: whether an autocast region is in force around the site.
        parts: the sites of the slices that this one was merged from; they stand for it where no kernel takes the whole.
        written: nodes that hold operands of a merged site and were not in the source.
        windowed: the slices that it was merged from had a window of the keys each, and computed no more.
        unmerged: why the site, whose result is put together with those of others, was not merged with them.
        still_repeated: at which bounds the search for repetitions behind key and value ended, without one, in words.
    """

    pattern: str
    anchor: fx.Node
    result: fx.Node
    result_layout: Layout
    query: Operand
    key: Operand
    value: Operand
    query_axes: tuple[Axis, ...]
    key_axes: tuple[Axis, ...]
    feature_axes: tuple[Axis, ...]
    mods: tuple[ScoreMod, ...]
    softmax_dtype: torch.dtype
    compute_dtype: torch.dtype
    weight_layout: Layout = ()
    dropout: float = 0.0
    is_causal: bool = False
    default_scale: bool = False
    differentiable: bool = False
    fused: bool = False
    foreign: bool = False
    in_autocast: bool = False
    for_inductor: bool = False
    interior: tuple[fx.Node, ...] = ()
    sink: Operand | float | None = None
    sink_is_shifted: bool = False
    weight_mods: tuple[WeightMod, ...] = ()
    nan_to_zero: bool = False
    underflows: bool = False
    rounds_rows: bool = False
    parts: tuple[AttentionSite, ...] = ()
    written: tuple[fx.Node, ...] = ()
    windowed: bool = False
    unmerged: Reason = FINE
    still_repeated: Reason = FINE
    folded: tuple[Axis, ...] = ()

    def with_operands(self, change: Callable[[Operand], Operand]) -> AttentionSite:
        """The site with query, key, value, and every tensor that modifies scores or weights, changed."""
        return replace(
            self,
            query=change(self.query),
            key=change(self.key),
            value=change(self.value),
            mods=tuple(_with_operands(mod, change) for mod in self.mods),
            weight_mods=tuple(_with_operands(mod, change) for mod in self.weight_mods),
            sink=change(self.sink) if isinstance(self.sink, Operand) else self.sink,
        )

    @property
    def modifiers(self) -> tuple[Operand, ...]:
        """The tensors that modify scores or weights."""
        found = [operand for mod in (*self.mods, *self.weight_mods) for operand in _operands_of(mod)]
        return (*found, self.sink) if isinstance(self.sink, Operand) else tuple(found)

    @property
    def device(self) -> torch.device:
        return tensor(self.query.node).device

    @property
    def shared_axes(self) -> tuple[Axis, ...]:
        """Batch and head axes, those of query heads that share a key apart: in the query's order, then the others."""
        own = {*self.query_axes, *self.key_axes, *self.feature_axes, *self.value_axes}
        stored = dict.fromkeys(axis for axis in (*self.key.axes, *self.value.axes) if axis not in own)
        stored |= dict.fromkeys(axis for axis in self._batch_axes if axis not in self.query.axes)
        query = [axis for axis in self.query.axes if axis in stored]
        return (*query, *(axis for axis in stored if axis not in query))

    @property
    def group_axes(self) -> tuple[Axis, ...]:
        """Axes of the query, positions apart, over which one key and value serve many."""
        stored = {*self.key.axes, *self.value.axes, *self.query_axes}
        return tuple(axis for axis in self.query.axes if axis not in stored)

    @property
    def value_axes(self) -> tuple[Axis, ...]:
        """The features of the value and of the result."""
        rows = {*self.query.axes, *self.key.axes, *self.key_axes, *self._batch_axes}
        return tuple(axis for axis in self.value.axes if axis not in rows)

    @property
    def _batch_axes(self) -> tuple[Axis, ...]:
        positions = {*self.query_axes, *self.key_axes}
        return tuple(axis for axis in axes_of(self.weight_layout) if axis not in positions)

    def describe_scale(self) -> str:
        parts: list[str] = []
        for mod in self.mods:
            if isinstance(mod, Scale):
                parts.append(scale_in_words(mod))
        return " * ".join(parts)


@dataclass(frozen=True, eq=False)
class CanonicalAttention(AttentionSite):
    """A site with its modifications in the form that kernels read."""

    scores: CanonicalScores = field(kw_only=True)

    @staticmethod
    def of(site: AttentionSite, scores: CanonicalScores) -> CanonicalAttention:
        return CanonicalAttention(
            **{each.name: getattr(site, each.name) for each in fields(AttentionSite)}, scores=scores
        )


def _operands_of(mod: ScoreMod | WeightMod) -> Iterator[Operand]:
    if isinstance(mod, Bias):
        yield mod.operand
    elif isinstance(mod, (Fill, Zero)):
        yield mod.condition
    for scale in mod.scales if isinstance(mod, Bias) else (mod,):
        if isinstance(scale, Scale) and isinstance(scale.factor, Operand):
            yield scale.factor


def _with_operands(mod: Any, change: Callable[[Operand], Operand]) -> Any:
    if isinstance(mod, Scale):
        return replace(mod, factor=change(mod.factor)) if isinstance(mod.factor, Operand) else mod
    if isinstance(mod, Bias):
        scales = tuple(_with_operands(scale, change) for scale in mod.scales)
        return replace(mod, operand=change(mod.operand), scales=scales)
    return replace(mod, condition=change(mod.condition)) if isinstance(mod, (Fill, Zero)) else mod


def scale_in_words(scale: Scale) -> str:
    factor: Any = scale.factor
    text = f"{factor:.6g}" if isinstance(factor, (int, float)) else f"tensor {getattr(factor, 'node', factor)}"
    return f"1/{text}" if scale.divide else text
