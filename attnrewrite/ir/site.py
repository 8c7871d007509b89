"""The attention site: the contract between patterns, which find attention, and kernels, which compute it.

A site means ``result = dropout(softmax(mods(query @ key))) @ value``, where softmax runs over the key axes. It does not
depend on how the source spelled that: axes (:mod:`attnrewrite.ir.axes`) say whether a dimension of a tensor is a batch,
a head, a position or a feature, and an operand that is shared (GQA) or broadcast lacks an axis.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols, statically_known_true

from attnrewrite.ir.axes import Axis, Layout, Operand, axes_of
from attnrewrite.ir.nodes import Size, tensor
from attnrewrite.ir.reason import FINE, Reason
from attnrewrite.ir.rounding import as_stored

__all__ = [
    "AttentionSite",
    "Band",
    "Bias",
    "CanonicalAttention",
    "CanonicalScores",
    "Elementwise",
    "Fill",
    "Floor",
    "Lift",
    "MaskedRows",
    "Narrow",
    "NotAttention",
    "Raise",
    "Reach",
    "Scale",
    "ScoreMod",
    "Shift",
    "WeightMod",
    "Zero",
    "blaming",
    "scale_in_words",
]


class NotAttention(Exception):
    """Raised with the reason when a computation that looks like attention must be kept: it is a near miss.

    ``node``: the operation that is in the way; None if it is not known, or if no single one is.
    """

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@contextlib.contextmanager
def blaming(node: fx.Node | None) -> Iterator[None]:
    """Whatever is refused within, and names no operation, is refused for ``node``."""
    try:
        yield
    except NotAttention as refusal:
        refusal.node = refusal.node or node
        raise


@dataclass(frozen=True)
class _Step:
    """``written_at``: the operation of the source that does it, for reasons; two steps are alike without it."""

    written_at: fx.Node | None = field(default=None, kw_only=True, compare=False, repr=False)


@dataclass(frozen=True)
class Scale(_Step):
    """``scores * factor``, or with ``divide``, ``scores / factor``, by a number, a symbolic number or a tensor.

    ``dtype``: what it is computed in; None for that of what is scaled.
    """

    factor: float | fx.Node | Operand
    divide: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Bias(_Step):
    """``scores + factor * operand``, computed in ``dtype``; ``scales`` are applied to the operand first, in order.

    ``rescaled``: what the sum of this term and of those before it is multiplied by after that, in order. The sum may
    overflow before, so that the numbers are not factors of each term.
    ``loosened``: a tensor multiplies the sum after that, so that the score may be anything.
    """

    operand: Operand
    dtype: torch.dtype
    factor: float = 1.0
    scales: tuple[Scale, ...] = ()
    rescaled: tuple[float, ...] = ()
    loosened: bool = False

    def of(self, value: float) -> float | None:
        """What is added where the operand is ``value``, each step rounded to ``dtype``; None if a tensor scales it."""
        for scale in self.scales:
            if not isinstance(scale.factor, (int, float)):
                return None
            value = as_stored(value / scale.factor if scale.divide else value * scale.factor, self.dtype)
        for factor in (self.factor, *self.rescaled):
            value = as_stored(value * factor, self.dtype)
        return value

    def scaled(self, scale: Scale) -> Bias:
        """The bias with one more factor, applied after the others and rounded by itself."""
        own = () if self.factor == 1 else (Scale(self.factor),)
        return replace(self, factor=1.0, scales=(*self.scales, *own, scale))


@dataclass(frozen=True)
class Fill(_Step):
    """``where(condition, value, scores)``; with ``invert``, ``where(condition, scores, value)``.

    ``multiplied``: the source multiplies by zeros and ones instead, which lets NaN through, also in gradients.
    ``rescaled``: as a bias's; the value is minus infinity, or far below any score, then.
    ``loosened``: a tensor multiplies what was filled in, so that the score may be anything, and only a fill of minus
    infinity is sure to mask.
    """

    condition: Operand
    value: float
    dtype: torch.dtype
    invert: bool = False
    multiplied: bool = False
    rescaled: tuple[float, ...] = ()
    loosened: bool = False


@dataclass(frozen=True)
class Floor(_Step):
    """``maximum(scores, value)`` with a value so low that only masked scores are below it."""

    value: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Shift(_Step):
    """Adds one number to all scores of a row, which softmax cancels.

    Attributes:
        by_maximum: the number is minus the maximum of the row, which brings low scores back to ordinary size before
            further steps.
        own_row: the maximum is exactly that of the row; without, it may be one of several rows, or a bounded one, which
            leaves the scores of a row without a key as low as they are.
        needs_finite: the number is computed from the row in such a way that the row becomes NaN in the source if any
            of its scores is not finite.
    """

    by_maximum: bool = False
    own_row: bool = True
    needs_finite: bool = False


@dataclass(frozen=True)
class Raise(_Step):
    """The maximum of the row is subtracted, between the terms of a mask or where they are rounded.

    Softmax cancels it, but for a row that the terms before have masked as a whole: the keys that they masked alike are
    alike again, and the terms after decide which of them the row attends.

    ``absorbed``: a number at or below this takes the scores' digits, so that nothing of them is left in such a row.
    ``factor``: what all terms before are multiplied by afterwards.
    ``rounded_to``: the dtype that the masked scores are rounded to before; None if they are not.
    """

    absorbed: float
    factor: float = 1.0
    rounded_to: torch.dtype | None = None


@dataclass(frozen=True)
class Narrow(_Step):
    """``scores.to(dtype)`` with a dtype of less range or precision."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Elementwise(_Step):
    """Any other function of one score, such as tanh or clamp: the node applies it to its first argument."""

    node: fx.Node


ScoreMod = Scale | Bias | Fill | Floor | Shift | Narrow | Elementwise


@dataclass(frozen=True)
class Zero(_Step):
    """``where(condition, 0, weights)``; with ``invert``, ``where(condition, weights, 0)``.

    ``multiplied``: the source multiplies by zeros and ones instead, which leaves NaN as it is.
    """

    condition: Operand
    invert: bool = False
    multiplied: bool = False


WeightMod = Scale | Zero


Reach = tuple[int | None, int | None]
"""How many positions before and after its own a query attends to, inclusive; None on a side without bound."""


@dataclass(frozen=True)
class Band:
    """A mask that keeps the keys in a band around the diagonal.

    Attributes:
        from_first: the reach with the first query aligned to the first key; None if it is not a known number.
        from_last: the reach with the last query aligned to the last key; None if it is not a known number.
    """

    from_first: Reach | None
    from_last: Reach | None

    @property
    def is_causal(self) -> bool:
        """Whether the band is a top-left aligned causal mask."""
        return self.from_first == (None, 0)


class MaskedRows(str, enum.Enum):
    """The source's result for rows whose keys are all masked. The value is what reports say.

    Members are strings, so that custom kernels may compare with the words: ``masked_rows == "NaN"``.
    """

    NONE = "none"
    """There are no such rows."""
    MEAN_OF_VALUE = "mean of value"
    """The mean of the values: softmax of equal, finite scores."""
    NAN = "NaN"
    """NaN where the mask is infinite, as softmax gives; else the mean of the values."""
    ZERO = "zero"
    """Zero, whatever the mask is."""
    ZERO_UNLESS_NAN = "zero unless NaN"
    """NaN where the mask is infinite, else zero: the weights were multiplied by the mask."""
    ZERO_WHERE_NAN = "zero where NaN"
    """Zero where the mask is infinite, else the mean of the values."""

    def __str__(self) -> str:
        return self.value

    @property
    def may_occur(self) -> bool:
        """Whether there may be fully masked rows."""
        return self is not MaskedRows.NONE

    @property
    def may_be_nan(self) -> bool:
        """Whether fully masked rows are NaN where the mask is infinite."""
        return self in (MaskedRows.NAN, MaskedRows.ZERO_UNLESS_NAN)

    @property
    def tells_nan(self) -> bool:
        """Whether fully masked rows with an infinite mask, where softmax is NaN, differ from the others."""
        return self.may_be_nan or self is MaskedRows.ZERO_WHERE_NAN

    @property
    def is_zero_unless_nan(self) -> bool:
        """Whether all fully masked rows that are not NaN are zero."""
        return self in (MaskedRows.ZERO, MaskedRows.ZERO_UNLESS_NAN)

    @property
    def is_mean_of_value(self) -> bool:
        """Whether all fully masked rows, if there are any, are the mean of the values."""
        return self in (MaskedRows.NONE, MaskedRows.MEAN_OF_VALUE)


class Lift(enum.IntEnum):
    """What is done to the added mask of rows without a key before a kernel gets it. Softmax cancels what is subtracted.

    A fused kernel loses such rows otherwise: their scores to the number that is added, and to rounding their logsumexp,
    of which the backward pass makes the weights.
    """

    NONE = 0
    """Nothing."""
    OPENED = 1
    """Zeros replace rows of minus infinity."""
    ROWS = 2
    """The highest number of each row is subtracted as well: in rows that finite numbers mask the scores decide."""
    ABSORBED = 3
    """As ROWS; and where that number is so low that it absorbs the scores, the query is zero."""
    SUBSET = 4
    """As ABSORBED, where such a row may attend some of the keys only, which counts for gradients."""


@dataclass(frozen=True)
class CanonicalScores:
    """The canonical form of the scores: ``scale * query_factors * key_factors * (query @ key) + replay(terms)``.

    Attributes:
        scale: a number; None for ``1 / sqrt(head_dim)`` with a symbolic head_dim.
        query_factors, key_factors: factors (or, with ``divide``, divisors) to apply to query and key beforehand.
        value_mods: what to do to the value beforehand.
        output_mods: what to do to the output afterwards.
        terms: biases, fills, floors and raises, in the order in which they apply; each factor includes all scaling
            after it, up to a raise.
        dtype: the dtype in which the source adds the terms.
        rounded_to: the narrower dtype that the masked scores are rounded to in the end; None if there is none.
        attended: the proof, in words, that every row keeps a key; None if there is none.
        masked_rows: the source's result for rows without a key.
        fills_decide: rows without a key can only come from fills, which all fill in the same value. The kernel then
            computes such rows as attending to every key with a score of zero, and the source's result for them (the
            mean of the values, zero or NaN) is made from its output.
        lift: what is done to the mask of rows without a key.
        nan_gradients: in rows of minus infinity softmax is NaN, its weights are set to zero, and the gradients of
            query, key and mask are NaN there in the source.
        is_causal: the mask was proved to be top-left aligned causal, and the kernel is asked for it by its flag.
        band: the band that all terms together were proved to be, with a key for every row. A kernel with a window or
            causal flag may take it instead of the terms.
        isolated: the block of positions (first, one past the last) that are masked from each other, but not from
            themselves or from positions outside. All terms together were proved to be exactly that.
        softcap: the height of the soft cap, if that is the only reason for ``inexpressible``: the terms apply to
            ``softcap * tanh(scale * (query @ key) / softcap)``.
        structure: the mask's structure, in words.
        repeated_along: tensors of the terms, each with the axes, other than the key's, along which all of its entries
            were proved to be the same.
        inexpressible: why the modifications do not have this form; empty if they do. A kernel that takes any function
            of the scores (score_mod) replays the site's ``mods`` then.
        inexpressible_at: the operation that is in the way; None if no single one is.
    """

    scale: float | None
    query_factors: tuple[Scale, ...]
    key_factors: tuple[Scale, ...]
    terms: tuple[Bias | Fill | Floor | Raise, ...]
    dtype: torch.dtype
    attended: str | None
    masked_rows: MaskedRows
    rounded_to: torch.dtype | None = None
    fills_decide: bool = False
    lift: Lift = Lift.NONE
    nan_gradients: bool = False
    is_causal: bool = False
    band: Band | None = None
    isolated: tuple[Size, Size] | None = None
    softcap: float | None = None
    value_mods: tuple[WeightMod, ...] = ()
    output_mods: tuple[WeightMod, ...] = ()
    structure: tuple[str, ...] = ()
    repeated_along: tuple[tuple[Operand, frozenset[Axis]], ...] = ()
    inexpressible: Reason = FINE
    inexpressible_at: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention in a graph. Sites are immutable: a pass returns a changed copy.

    Attributes:
        pattern: the name of the pattern that found it.
        anchor: the node whose source line the report shows: the softmax, or the fused call.
        result: the node that the kernel's output replaces; ``result_layout`` has the axes of its dimensions.
        query, key, value: operands, as far back as views and repetitions could be followed.
        query_axes: the axes that are query positions. Other axes of the query that the key lacks are query heads that
            share a key (GQA).
        folded: the query axes that were batches or heads with the same key and value, before they were folded into
            the query positions.
        key_axes: the axes that softmax runs over.
        feature_axes: the axes that query and key are contracted over.
        weight_layout: the layout of the scores in the source; it may have batches or heads that no operand has.
        mods: the operations on the scores, in order.
        sink: the score of one more key, whose value is zero: a number, or a tensor over all axes but the key's.
        sink_is_shifted: a row whose scores are all minus infinity is NaN in spite of the sink.
        sink_of_masked: the sink stands for the keys that the last fill masks, so that they, too, leave no row empty.
        weight_mods: the operations on the weights between softmax and the product with the value, except dropout.
        underflows: a row whose scores are all far below zero is NaN.
        rounds_rows: the weights of a row whose scores are all far below zero, but finite, are 1 each.
        nan_to_zero: weights that are NaN, as in rows without a key, are set to zero.
        never_nan: softmax itself gives zeros there, with gradients of zero.
        softmax_dtype: the dtype that softmax is computed in.
        score_dtype: the dtype of the product of query and key; None where it is not known.
        dropout: the probability of dropping a weight; 0 when not training.
        is_causal: an existing fused call asks for top-left aligned causal masking.
        default_scale: an existing fused call uses its default scale, and head_dim is symbolic.
        differentiable: a backward pass may follow.
        fused: the site is a fused call already, whose own rules for fully masked rows hold.
        foreign: the fused call is another library's operator, whose result for rows without a key is unknown.
        compute_dtype: the lowest dtype that the products may be computed in without losing precision the source kept.
        interior: the nodes to delete when the site is replaced, in graph order.
        for_inductor: the graph goes on to Inductor.
        in_autocast: an autocast region is in force around the site.
        parts: the sites of the slices that this one was merged from; they are used if no kernel takes the whole.
        written: nodes with operands of a merged site that were not in the source.
        windowed: the slices that it was merged from each computed only a window of the keys.
        unmerged: why the site, whose result is concatenated with those of others, was not merged with them.
        still_repeated: the bounds that the search for ``repeat_kv`` reached without finding any, in words.
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
    score_dtype: torch.dtype | None = None
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
    sink_of_masked: bool = False
    weight_mods: tuple[WeightMod, ...] = ()
    nan_to_zero: bool = False
    never_nan: bool = False
    underflows: bool = False
    rounds_rows: bool = False
    parts: tuple[AttentionSite, ...] = ()
    written: tuple[fx.Node, ...] = ()
    windowed: bool = False
    unmerged: Reason = FINE
    still_repeated: Reason = FINE
    folded: tuple[Axis, ...] = ()

    def with_operands(self, change: Callable[[Operand], Operand]) -> AttentionSite:
        """The site with ``change`` applied to query, key, value and every tensor that modifies scores or weights."""
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
    def in_half(self) -> bool:
        """Whether the source computes in half precision: its formula in float64 is what the result is held to."""
        return self.compute_dtype.itemsize < 4

    @property
    def lengths_that_may_be_zero(self) -> tuple[Size, ...]:
        """The numbers of queries and keys that depend on the data and are not known to be positive.

        Empty for a call in the source, which decides itself.
        """
        sizes = () if self.fused else tuple(axis.size for axis in (*self.query_axes, *self.key_axes))
        unknown = (size for size in sizes if has_free_unbacked_symbols(size))
        return tuple(size for size in unknown if not statically_known_true(size > 0))

    @property
    def shared_axes(self) -> tuple[Axis, ...]:
        """Batch and head axes, except :attr:`group_axes`: first those of the query, in its order, then the others."""
        own = {*axes_of((self.query_axes, self.key_axes, self.feature_axes)), *self.value_axes}
        stored = dict.fromkeys(axis for axis in (*self.key.axes, *self.value.axes) if axis not in own)
        stored |= dict.fromkeys(axis for axis in self._batch_axes if axis not in self.query.axes)
        query = [axis for axis in self.query.axes if axis in stored]
        return (*query, *(axis for axis in stored if axis not in query))

    @property
    def group_axes(self) -> tuple[Axis, ...]:
        """Axes of the query, except positions and features, over which key and value are shared (GQA)."""
        stored = {*self.key.axes, *self.value.axes, *axes_of((self.query_axes, self.feature_axes))}
        return tuple(axis for axis in self.query.axes if axis not in stored)

    @property
    def value_axes(self) -> tuple[Axis, ...]:
        """The features of the value and of the result."""
        rows = {*self.query.axes, *self.key.axes, *axes_of((self.key_axes,)), *self._batch_axes}
        return tuple(axis for axis in self.value.axes if axis not in rows)

    @property
    def _batch_axes(self) -> tuple[Axis, ...]:
        positions = axes_of((self.query_axes, self.key_axes))
        return tuple(axis for axis in axes_of(self.weight_layout) if axis not in positions)

    def describe_scale(self) -> str:
        """The scales of the scores in words, such as ``0.125 * 1/tensor sigma``; empty if there are none."""
        parts: list[str] = []
        for mod in self.mods:
            if isinstance(mod, Scale):
                parts.append(scale_in_words(mod))
        return " * ".join(parts)


@dataclass(frozen=True, eq=False)
class CanonicalAttention(AttentionSite):
    """A site whose score modifications are in canonical form: what kernels receive."""

    scores: CanonicalScores = field(kw_only=True)

    @property
    def doubles_features(self) -> bool:
        """Whether kernels are given query and key with twice the features, for gradients of rows without a key."""
        raised = any(isinstance(term, Raise) for term in self.scores.terms)
        return self.differentiable and (raised or self.scores.lift is Lift.SUBSET)

    @staticmethod
    def of(site: AttentionSite, scores: CanonicalScores) -> CanonicalAttention:
        return CanonicalAttention(
            **{each.name: getattr(site, each.name) for each in fields(AttentionSite)}, scores=scores
        )


def _operands_of(mod: ScoreMod | WeightMod) -> Iterator[Operand]:
    """Yields the tensors of a modification."""
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
    """A scale in the words of the report: ``0.125``, ``1/8``, ``tensor sigma``."""
    factor: Any = scale.factor
    text = f"{factor:.6g}" if isinstance(factor, (int, float)) else f"tensor {getattr(factor, 'node', factor)}"
    return f"1/{text}" if scale.divide else text
