"""What an attention means, as one value: the contract between patterns and kernels.

``result = dropout(softmax(mods(query @ key))) @ value``, where softmax runs over the key axes. How the source spelled
it is gone: which tensor dimension is a batch, a head, a position or a feature is told by axes
(:mod:`attnrewrite.analysis.views`), and grouped or broadcast operands are operands that lack an axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.views import Axis, Layout, Operand
from attnrewrite.ir import tensor

__all__ = [
    "AttentionSite",
    "Bias",
    "CanonicalScores",
    "Elementwise",
    "Fill",
    "NotAttention",
    "RoundingDecides",
    "Scale",
    "ScoreMod",
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
    """``scores + factor * operand``, computed in ``dtype``."""

    operand: Operand
    dtype: torch.dtype
    factor: float = 1.0


@dataclass(frozen=True)
class Fill:
    """``where(condition, value, scores)``, or with ``invert`` where the condition does not hold."""

    condition: Operand
    value: float
    dtype: torch.dtype
    invert: bool = False


@dataclass(frozen=True)
class Elementwise:
    """Any other function of the scores (tanh, clamp): no kernel here can apply it, so the site names it."""

    node: fx.Node


ScoreMod = Scale | Bias | Fill | Elementwise


@dataclass(frozen=True)
class CanonicalScores:
    """``scale * query_factors * key_factors * (query @ key) + replay(terms)``.

    Attributes:
        scale: a number; None for one over the root of the head size, which is symbolic.
        query_factors, key_factors: what is multiplied (or, with ``divide``, divided) into query and key beforehand.
        terms: biases and fills, in the order in which they apply; a bias's factor includes the scaling after it.
        dtype: the dtype in which the source adds the terms.
        may_be_minus_infinity: whether a term may be minus infinity, so that a row without a key is NaN in the source.
        attended: how it was proved that every row keeps a key, or None.
        fills_decide: rows without a key can come from fills alone, and all fill in the same value: the kernel is
            given such rows as rows that attend every key with a score of zero, and what the source gives them (the
            mean of the values, or NaN) is made from that.
    """

    scale: float | None
    query_factors: tuple[Scale, ...]
    key_factors: tuple[Scale, ...]
    terms: tuple[Bias | Fill, ...]
    dtype: torch.dtype
    may_be_minus_infinity: bool
    attended: str | None
    fills_decide: bool = False

    @property
    def masked_rows(self) -> str:
        """What is known of rows that have no key: "none", or what the source gives them."""
        if self.attended is not None:
            return "none"
        return "NaN" if self.may_be_minus_infinity else "mean of value"


@dataclass
class AttentionSite:
    """One attention, found.

    Attributes:
        pattern: the name of the pattern that found it.
        anchor: the node whose source line stands for the site (the softmax, or the call).
        result: the node that the kernel's output replaces; ``result_layout`` names its dimensions.
        query, key, value: operands, as far back as views and repetitions could be followed.
        query_axes: the axes that are query positions. Other axes that the key lacks are groups of query heads.
        key_axes: the axes that softmax runs over.
        feature_axes: the axes that query and key are contracted over.
        mods: what is done to the scores, in the order in which it is done.
        softmax_dtype: the dtype that softmax is computed in.
        dropout: the probability of dropping a weight; 0 when not training.
        is_causal: top-left aligned causal masking asked of an existing fused call.
        default_scale: an existing fused call leaves the scale to its default, and the head size is symbolic.
        differentiable: a backward pass may follow.
        fused: the site is a fused call already; its own rules for fully masked rows hold.
        compute_dtype: the lowest dtype in which the products may be computed without losing what the source kept.
        interior: the nodes that go when the site is replaced, in graph order.
        in_autocast: whether an autocast region is in force around the site.
        scores: the modifications in the form that kernels read, once simplified.
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
    dropout: float = 0.0
    is_causal: bool = False
    default_scale: bool = False
    differentiable: bool = False
    fused: bool = False
    in_autocast: bool = False
    interior: tuple[fx.Node, ...] = ()
    scores: CanonicalScores | None = None

    @property
    def device(self) -> torch.device:
        return tensor(self.query.node).device

    @property
    def shared_axes(self) -> tuple[Axis, ...]:
        """Batch and head axes that the key or the value has, in the query's order; then those that the query lacks."""
        own = {*self.query_axes, *self.key_axes, *self.feature_axes, *self.value_axes}
        stored = dict.fromkeys(axis for axis in (*self.key.axes, *self.value.axes) if axis not in own)
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
        rows = {*self.query.axes, *self.key.axes}
        return tuple(axis for axis in self.value.axes if axis not in rows)

    def describe_scale(self) -> str:
        parts: list[str] = []
        for mod in self.mods:
            if isinstance(mod, Scale):
                factor: Any = mod.factor
                text = (
                    f"{factor:.6g}" if isinstance(factor, (int, float)) else f"tensor {getattr(factor, 'node', factor)}"
                )
                parts.append(f"1/{text}" if mod.divide else text)
        return " * ".join(parts)
