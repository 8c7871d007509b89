"""Boolean masks, and what becomes of rows that lose all of their keys.

Kernels differ in what they give a row without a key, and some do not document it. So no kernel is left to decide: such
a row gets every key and a query of zero, for which any softmax gives the mean of the values. What the source gives
instead (zero, NaN) replaces it afterwards. For an added mask that may hold minus infinity, NaN is put there as well.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import fx

from attnrewrite.analysis.masks import added_values
from attnrewrite.analysis.values import ABSORBING, ValueKind, is_far_below, is_ordinary, possible_values
from attnrewrite.ir.site import Bias, CanonicalAttention, Fill, Floor, Lift, MaskedRows, Raise
from attnrewrite.kernels.common.layout import KernelLayout
from attnrewrite.kernels.common.mask import Mask
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["KeepMask", "MaskKind", "mask_kind", "why_rows_are_not_restored"]

aten = torch.ops.aten

MaskKind = Literal["none", "key padding", "boolean", "additive"]


def mask_kind(site: CanonicalAttention) -> MaskKind:
    """The least general kind of tensor that says what the site's terms do.

    "key padding": which keys of a batch entry are kept, the same for all its queries and heads; "boolean": which keys
    are kept; "additive": numbers. A number far below zero masks, as everywhere in this project.
    """
    scores = site.scores
    if not scores.terms:
        return "none"
    batch = set(KernelLayout.of(site).score_dims[0])
    only_keys = True
    for term in scores.terms:
        if isinstance(term, Fill) and is_far_below(term.value, term.dtype):
            operand = term.condition
        elif isinstance(term, Bias) and _masked_by(term) is not None:
            operand = term.operand
        else:
            return "additive"
        only_keys = only_keys and set(operand.resolved().axes) <= batch | set(site.key_axes)
    return "key padding" if only_keys else "boolean"


def _masked_by(term: Bias) -> float | None:
    """The highest number that the bias masks with, if it is 0 elsewhere; None if it may be anything else."""
    values = possible_values(term.operand.node)
    if not all(isinstance(value, float) for value in values):
        return None
    added = {value: term.of(value) for value in values if isinstance(value, float)}
    low = [number for value, number in added.items() if value != 0]
    if added.get(0.0, 0.0) != 0 or not low:
        return None
    if any(number is None or not is_far_below(number, term.dtype) for number in low):
        return None
    return max(number for number in low if number is not None)


def why_rows_are_not_restored(site: CanonicalAttention, kind: MaskKind) -> Refusal:
    """Why a row that loses its keys cannot be given what the source gives it; None if it can."""
    scores = site.scores
    if scores.fills_decide:
        return None
    fills = all(isinstance(term, Fill) and term.value == -math.inf for term in scores.terms)
    if site.fused and kind != "additive" and fills:
        return None
    if site.fused or site.differentiable or site.rounds_rows:
        return _not_restored(site)
    if kind == "additive":
        # NaN times whatever the kernel gives is NaN; finite numbers that mask would leave it to the kernel.
        if scores.masked_rows is MaskedRows.NAN and all(map(_is_ordinary_or_infinite, scores.terms)):
            return None
    else:
        # One bias that swallows the scores of a whole row leaves them all the same: the mean of the values. With
        # gradients it is another matter: they pass through the addition, and a query of zero stops them.
        (first, *more) = scores.terms
        low = _masked_by(first) if isinstance(first, Bias) and not more else None
        single = isinstance(first, Bias) and len(possible_values(first.operand.node) - {0.0}) == 1
        mean = scores.masked_rows is MaskedRows.MEAN_OF_VALUE
        if low is not None and single and -math.inf < low <= ABSORBING and mean:
            return None
    return _not_restored(site)


def _not_restored(site: CanonicalAttention) -> str:
    rows = site.scores.masked_rows.value
    return f"a row may have no key, and this kernel cannot give it what the source does ({rows})"


def _is_ordinary_or_infinite(term: Bias | Fill | Floor | Raise) -> bool:
    if isinstance(term, Raise):
        return False
    if not isinstance(term, Bias):
        return term.value == -math.inf
    values = added_values(term)
    return all(
        value is ValueKind.LEARNED or (isinstance(value, float) and (value == -math.inf or is_ordinary(value)))
        for value in values
    )


class KeepMask(Mask):
    """The site's terms as one boolean tensor: (batch or 1, heads or 1, query length or 1, key length), true to keep.

    Attributes:
        node: the tensor, with every key kept in rows that lost theirs.
        opened_rows: those rows, (..., 1); None if there are none.
    """

    def _lift_of(self, site: CanonicalAttention) -> Lift:
        """Nothing is added."""
        return Lift.NONE

    def _write(self, fills_decide: bool) -> None:
        call = self._builder.call
        site = self._site
        for term in self._terms:
            if isinstance(term, Bias):
                keep = call(aten.eq.Scalar, self._laid_out(term.operand), 0)
            else:
                assert isinstance(term, Fill)
                condition = self._condition(term.condition)
                keep = condition if term.invert else call(aten.logical_not.default, condition)
            self.node = keep if self.node is None else call(aten.logical_and.default, self.node, keep)
        assert self.node is not None
        if site.scores.masked_rows.may_occur:
            any_kept = call(aten.any.dim, self.node, -1, True)
            self.opened_rows = call(aten.logical_not.default, any_kept)
            self.node = call(aten.logical_or.default, self.node, self.opened_rows)

    def with_source_rows(self, output: fx.Node, value: fx.Node, layout: KernelLayout) -> fx.Node:
        """The output, (batch, heads, length, features), with what the source gives rows without a key."""
        if self._site.fused and self.opened_rows is not None:
            # PyTorch's own rule: https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/attention.cpp
            return self._builder.call(aten.where.ScalarSelf, self.opened_rows, 0.0, output)
        return super().with_source_rows(output, value, layout)
