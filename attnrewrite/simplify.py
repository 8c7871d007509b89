"""Algebra on sites: the scores' modifications brought to the one form that kernels read.

``scores = scale * (query @ key) + mask``, where ``scale`` is a number, what is left of the scaling is multiplied into
query or key, and ``mask`` is a sum of biases and fills replayed in their order. The form is only taken where it gives
what the source gives; otherwise the reason is said.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from attnrewrite.analysis.masks import (
    ABSORBING,
    ORDINARY,
    Kind,
    as_stored,
    attended_everywhere,
    possible_values,
)
from attnrewrite.analysis.views import Operand
from attnrewrite.policy import Policy
from attnrewrite.site import (
    AttentionSite,
    Bias,
    CanonicalScores,
    Elementwise,
    Fill,
    NotAttention,
    RoundingDecides,
    Scale,
)

__all__ = ["canonical_scores"]


FAR_BELOW = -(2.0**24)
"""A fill value from here down is taken for a mask: at this magnitude float32 itself resolves no fraction of a score."""


def canonical_scores(site: AttentionSite, policy: Policy) -> CanonicalScores:
    """The canonical form of ``site``'s modifications.

    Raises:
        NotAttention: there is none that gives the source's values for every input.
    """
    scale = 1.0
    query_factors: list[Scale] = []
    key_factors: list[Scale] = []
    terms: list[Bias | Fill] = []
    for mod in site.mods:
        if isinstance(mod, Elementwise):
            raise NotAttention(
                f"{getattr(mod.node.target, '_opname', mod.node.target)} of the scores needs a kernel with a score_mod"
            )
        if isinstance(mod, (Bias, Fill)):
            terms.append(mod)
        elif isinstance(mod.factor, (int, float)):
            if mod.divide and mod.factor == 0:
                raise NotAttention("the scores are divided by zero")
            number = 1.0 / mod.factor if mod.divide else float(mod.factor)
            scale *= number
            terms = [_scaled(term, number) for term in terms]
        else:
            if terms:
                raise NotAttention("a tensor scales the scores after a mask was applied")
            _place_factor(mod, site, query_factors, key_factors)
    if not math.isfinite(scale):
        raise NotAttention(f"the scale is {scale}")

    attended = "the caller's word (assume_attended_rows)" if policy.assume_attended_rows else None
    attended = attended_everywhere(terms, site.query_axes, site.key_axes) or attended
    values = [value for term in terms for value in _values(term)]
    dtype = min((term.dtype for term in terms), key=lambda dtype: dtype.itemsize, default=site.softmax_dtype)
    fills_decide = False
    if not site.fused:
        _check_fills(terms, attended)
        _check_rounding(terms, dtype, attended)
        fills_decide = attended is None and _only_fills_mask(terms)
        if site.differentiable and attended is None and not fills_decide and _mixes_fills_and_biases(terms):
            raise NotAttention(
                "a fill lets no gradient through and a bias does, and a row that both mask may have no key (if no such "
                "row occurs, say so: options={'assume_attended_rows': True})"
            )
    return CanonicalScores(
        None if site.default_scale else scale,
        tuple(query_factors),
        tuple(key_factors),
        tuple(terms),
        dtype,
        any(value in (Kind.ANY, Kind.LEARNED, -math.inf) for value in values) or _sum_may_overflow(terms),
        attended,
        fills_decide,
    )


def _scaled(term: Bias | Fill, number: float) -> Bias | Fill:
    if isinstance(term, Bias):
        return Bias(term.operand, term.dtype, term.factor * number)
    if number <= 0:
        raise NotAttention("a filled mask is multiplied by a number that is not positive")
    return Fill(term.condition, as_stored(term.value * number, term.dtype), term.dtype, term.invert)


def _place_factor(mod: Scale, site: AttentionSite, query: list[Scale], key: list[Scale]) -> None:
    if isinstance(mod.factor, fx.Node):
        query.append(mod)
        return
    assert isinstance(mod.factor, Operand)
    axes = set(mod.factor.axes)
    if axes <= set(site.query.axes):
        query.append(mod)
    elif axes <= set(site.key.axes):
        key.append(mod)
    else:
        raise NotAttention("the scores are multiplied by a tensor over query and key positions, which is no scale")


def _values(term: Bias | Fill) -> list[object]:
    if isinstance(term, Fill):
        return [term.value]
    return [
        as_stored(value * term.factor, term.dtype) if isinstance(value, float) else value
        for value in possible_values(term.operand.node)
    ]


def _only_fills_mask(terms: list[Bias | Fill]) -> bool:
    """Whether a row can lose its keys to fills alone, and to fills of one value."""
    fills = {term.value for term in terms if isinstance(term, Fill)}
    return len(fills) == 1 and not any(isinstance(term, Bias) and _may_mask(term) for term in terms)


def _mixes_fills_and_biases(terms: list[Bias | Fill]) -> bool:
    return any(isinstance(term, Fill) for term in terms)


def _may_mask(term: Bias) -> bool:
    return any(value is Kind.ANY or (isinstance(value, float) and value < -ORDINARY) for value in _values(term))


def _sum_may_overflow(terms: list[Bias | Fill]) -> bool:
    """Two terms that each are as low as the dtype goes add up to minus infinity."""
    return sum(any(isinstance(v, float) and v <= ABSORBING for v in _values(term)) for term in terms) > 1


def _check_fills(terms: list[Bias | Fill], attended: str | None) -> None:
    """A filled score is replaced, a masked one is added to: the same only if no score can lift the fill."""
    low = [min((v for v in _values(term) if isinstance(v, float)), default=0.0) for term in terms]
    for position, term in enumerate(terms):
        if not isinstance(term, Fill):
            continue
        if term.value > FAR_BELOW and term.value > torch.finfo(term.dtype).min:
            raise NotAttention(
                f"{term.value:g} is filled in for masked scores: scores may be as low, so it is a value and no mask "
                "(fill with -inf or torch.finfo(dtype).min)"
            )
        if (
            term.value > ABSORBING
            and attended is None
            and (sum(value < -1.0 for value in low) > 1 or any(isinstance(later, Bias) for later in terms[position:]))
        ):
            raise NotAttention(
                f"{term.value:g} is filled in beside another mask or bias, and a row may have no key: which key such a "
                "row attends depends on both (fill with -inf or torch.finfo(dtype).min)"
            )


def _check_rounding(terms: list[Bias | Fill], dtype: torch.dtype, attended: str | None) -> None:
    """Half-precision sources round a score that has a large negative number added to it; fused kernels do not.

    Where a row keeps a key the difference vanishes in softmax. Where it may not, only a term that swallows the score
    in float32 as well gives the source's value.
    """
    if attended is not None or dtype.itemsize >= 4:
        return
    for term in terms:
        if isinstance(term, Fill):
            continue
        for value in _values(term):
            if value is Kind.ANY or (isinstance(value, float) and ABSORBING < value < -(2.0**8)):
                what = "whatever the caller hands over" if value is Kind.ANY else f"{value:g}"
                raise RoundingDecides(
                    f"{what} is added to scores in {str(dtype).removeprefix('torch.')}, which rounds them away in a "
                    "row whose keys are all masked, and no such row could be ruled out (if none occurs, say so: "
                    "options={'assume_attended_rows': True})"
                )
