"""The canonical form of an attention's scores, which is what kernels read.

    source:     softmax(mod_n(... mod_1(query @ key)))
    canonical:  softmax(scale * (query_factors * query) @ (key_factors * key) + mask)

``scale`` is a number, the factors are tensors or signs, and ``mask`` is made of biases and fills (the *terms*), applied
in their order. The steps, in the order of :func:`canonicalized`:

1. Require that no size depends on the data, except a number of queries or keys that is at least one.
2. Read the score mods one by one into scale, factors and terms (``_read_mods``). What no scale, bias or fill expresses
   (such as a tanh) makes the form *inexpressible*: only a kernel that takes a ``score_mod`` can serve it.
3. Drop the terms that are proved never to mask.
4. Prove that every row attends a key, or let the user assert it (``_attended``). If neither holds, the form has to give
   the source's values and gradients in a row without a key as well (``_terms_for_rows_without_key``).
5. Check that the fills can be added as a mask (``_why_not_a_mask``).
6. Move modifications of the weights behind softmax to the value or the output (``_placed_weight_mods``).
7. Recognize the shape of the mask: causal, a band, an isolated block (``_shape_of_mask``).
8. Fold batches that share keys and values into the query positions (:mod:`attnrewrite.passes.fold_batches`).

A step that cannot prove that result and gradients are the source's raises :class:`NotAttention` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from typing import Any, Literal, TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from attnrewrite.analysis.entries import Cases
from attnrewrite.analysis.formulas import Formula, conjunction, negation
from attnrewrite.analysis.masks import (
    Positions,
    added_values,
    attended_everywhere,
    band_of,
    in_words,
    isolated_block_of,
    kept_where,
    may_mask,
    repeated_along,
    spread_of,
    truth,
)
from attnrewrite.analysis.scores import bounds_of
from attnrewrite.analysis.shared_entries import SharedEntries
from attnrewrite.analysis.values import (
    ABSORBED,
    ABSORBING,
    FAR_BELOW,
    ORDINARY,
    UNDERFLOW,
    Range,
    ValueKind,
    is_nan_by_formula,
    is_ordinary,
    possible_values,
    why_not_finite,
)
from attnrewrite.ir.axes import Operand, size_of
from attnrewrite.ir.nodes import Size, is_tensor, same, tensor
from attnrewrite.ir.ops import CLAMP_OPS
from attnrewrite.ir.products import is_product
from attnrewrite.ir.reason import FINE, Reason
from attnrewrite.ir.rounding import as_stored
from attnrewrite.ir.site import (
    AttentionSite,
    Band,
    Bias,
    CanonicalAttention,
    CanonicalScores,
    Elementwise,
    Fill,
    Floor,
    Lift,
    MaskedRows,
    Narrow,
    NotAttention,
    Raise,
    Scale,
    ScoreMod,
    Shift,
    WeightMod,
    Zero,
    blaming,
)
from attnrewrite.ir.source import source_name
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.fold_batches import with_folded_batches
from attnrewrite.torch_private import operator_name

__all__ = ["canonical_scores", "canonicalized"]

aten = torch.ops.aten

Term = Bias | Fill | Floor | Raise


@dataclass
class _Reading:
    """The score mods read so far: what is multiplied, what is added, and what is known of masked scores."""

    scale: float = 1.0
    query_factors: list[Scale] = field(default_factory=list)
    key_factors: list[Scale] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    inexpressible: Reason = FINE
    softcap: float | None = None
    """The factor after a tanh; None unless that tanh is the only reason for ``inexpressible``."""
    needs_finite: bool = False
    """Whether rows whose scores are not finite became NaN, as ``max - scores`` does, unless negated again."""
    shifted: bool = False
    """Whether a number that is the same for all keys of a row was added or subtracted."""
    narrowed: Reason = FINE
    rounded_to: torch.dtype | None = None
    """The dtype that masked scores were rounded to, if it resolves them; terms added later meet its infinities."""
    lifted: Literal["", "to zero", "to NaN", "perhaps"] = ""
    """What a row whose keys are all masked became when the maximum of masked scores was subtracted.

    A maximum over several rows has raised such a row only if there is no other.
    """
    overflows: Reason = FINE
    """Why a row whose keys are all masked may change: its scores overflow, or become ordinary numbers again."""
    bounded: float = 0.0
    """Bound of the absolute value of masked scores after a bounded function, which removes the terms of the mask."""
    bounded_terms: list[Term] = field(default_factory=list)
    """The terms that the bounded function removed."""
    makes_nan: bool = False
    """Whether scores that may be -inf are multiplied by a tensor that may be zero."""
    overflows_at: fx.Node | None = None
    """The operation after which ``overflows`` holds."""
    inexpressible_at: fx.Node | None = None
    """The operation after which ``inexpressible`` holds."""

    def take_function(self, reason: str) -> None:
        """Makes the form inexpressible: scale and mask no longer describe the scores."""
        self.inexpressible, self.softcap = Reason(reason), None


def canonicalized(site: AttentionSite, policy: Policy, shared: SharedEntries | None = None) -> CanonicalAttention:
    """The site with its scores in canonical form and with batches that share keys and values folded.

    Args:
        shared: what is known of the graph's tensors from its other attentions; default: nothing.

    Raises:
        NotAttention: no canonical form gives the source's values for every input.
    """
    _require_sizes(site)
    site = _with_maximum(site)
    scores = canonical_scores(site, policy, shared)
    _require_lengths(site, scores)
    return with_folded_batches(CanonicalAttention.of(site, scores))


def _with_maximum(site: AttentionSite) -> AttentionSite:
    """The site without what the lack of a maximum does to its rows, if the scores' own was subtracted before."""
    if not (site.underflows or site.rounds_rows) or site.never_nan or site.sink is not None:
        return site
    for mod in reversed(site.mods):
        if isinstance(mod, Shift) and mod.by_maximum and mod.own_row:
            return replace(site, underflows=False, rounds_rows=False)
        if not (isinstance(mod, Scale) and isinstance(mod.factor, (int, float)) and 0 < mod.factor < math.inf):
            return site
    return site


def _require_sizes(site: AttentionSite) -> None:
    """Raises:
    NotAttention: a size other than the number of queries or keys depends on the data.
    """
    positions = {*site.query_axes, *site.key_axes}
    others = [axis.size for axis in (*site.query.axes, *site.key.axes, *site.value.axes) if axis not in positions]
    if has_free_unbacked_symbols(others):
        raise NotAttention(
            "a size depends on the data (such as a selection by a mask), and the choice of a kernel needs every size"
        )


def _require_lengths(site: AttentionSite, scores: CanonicalScores) -> None:
    """Raises:
    NotAttention: there may be no query or no key, and the operator that asks for that at run time does not do.
    """
    if not site.lengths_that_may_be_zero:
        return
    beyond = (
        "gradients" if site.differentiable else "dropout" if site.dropout else "a sink" if site.sink is not None else ""
    )
    if not beyond and scores.masked_rows.may_occur:
        beyond = "a mask that may take every key from a row"
    if not beyond and not is_product(site.result):
        # Over no key, the sum that the product is divided by is zero.
        beyond = "a division behind the product with the value"
    if beyond:
        size = _of_input(site.lengths_that_may_be_zero[0], site.query.node.graph)
        raise NotAttention(
            f"the number of queries or keys{f' ({size}, marked unbacked)' if size else ''} depends on the data and may "
            f"be zero, which PyTorch's kernels must know when they are traced, and here it has {beyond} (if it never "
            f"is, say so in the model: torch._check({size or 'number'} > 0))"
        )


def _of_input(size: Size, graph: fx.Graph) -> str:
    """The size as one of an input of the graph; empty if it is none."""
    for node in graph.find_nodes(op="placeholder"):
        for dim, own in enumerate(tensor(node).shape if is_tensor(node) else ()):
            if same(own, size):
                return f"{source_name(node) or node.name}.shape[{dim}]"
    return ""


def canonical_scores(site: AttentionSite, policy: Policy, shared: SharedEntries | None = None) -> CanonicalScores:
    """The canonical form of the site's score mods and weight mods.

    If only a kernel that takes any ``score_mod`` can compute the source, the form's ``inexpressible`` has the reason,
    and its terms are those that may mask after the function.

    Raises:
        NotAttention: no canonical form gives the source's values for every input.
    """
    positions = Positions(site.query_axes, site.key_axes, shared)
    reading = _read_mods(site, positions)
    counting, graded = _counting(site, reading.terms, positions)
    # Unless a reason names another operation, it is the mask that is in the way.
    with blaming(_last_mask([term for term, _ in counting])):
        _require_no_counterweight([term for term, _ in counting])
        attended = _attended(site, reading, [term for term, _ in counting], positions, policy)
    if attended is not None:
        counting = [pair for pair in counting if not isinstance(pair[0], Raise)]
    terms, kept = [term for term, _ in counting], [formula for _, formula in counting]
    dtypes = [term.dtype for term in terms if not isinstance(term, Raise)]
    dtype = min(dtypes, key=lambda dtype: dtype.itemsize, default=site.softmax_dtype)
    inexpressible, refused = reading.inexpressible, FINE
    if attended is None:
        with blaming(_last_mask(terms)):
            terms = _terms_for_rows_without_key(site, terms)
    if not site.fused:
        refused = _why_not_a_mask(terms, attended, site.differentiable)
        inexpressible = inexpressible or refused
    masked = _kept_by_all(terms, kept)
    masked_rows = _rows_without_key(site, terms) if attended is None else MaskedRows.NONE
    certain = _kept_by_last_fills(terms, kept) if masked is None and not masked_rows.may_occur else masked
    value_mods, output_mods, masked_rows = _placed_weight_mods(site, positions, certain, masked_rows)
    with blaming(_last_mask(terms)):
        _require_raised_rows(terms, bool(inexpressible), masked_rows, site)
    nan_gradients = attended is None and _gradients_are_nan(site, terms)
    lift = _lift(site, terms, nan_gradients) if attended is None else Lift.NONE
    nan_gradients = nan_gradients or (lift is not Lift.NONE and _mask_gradient_is_nan(site, terms))
    band, isolated = _shape_of_mask(site, positions, masked if None not in kept else None, attended)
    becomes_causal = not inexpressible and site.sink is None and band is not None and band.is_causal and not graded
    masks = [term for term in terms if isinstance(term, (Bias, Fill)) and not becomes_causal]
    return CanonicalScores(
        scale=None if site.default_scale else reading.scale,
        query_factors=tuple(reading.query_factors),
        key_factors=tuple(reading.key_factors),
        terms=() if becomes_causal else tuple(terms),
        dtype=dtype,
        rounded_to=reading.rounded_to,
        attended=attended,
        masked_rows=masked_rows,
        fills_decide=_fills_decide(site, terms, attended is not None or bool(inexpressible)),
        lift=Lift.NONE if refused or (inexpressible and not reading.softcap) else lift,
        nan_gradients=nan_gradients,
        is_causal=site.is_causal or becomes_causal,
        band=band,
        isolated=isolated,
        softcap=abs(reading.softcap) if reading.softcap and not refused else None,
        value_mods=value_mods,
        output_mods=output_mods,
        structure=_structure(site, terms, kept, positions),
        repeated_along=tuple(filter(None, (repeated_along(term, positions) for term in masks))),
        inexpressible=inexpressible,
        inexpressible_at=reading.inexpressible_at or (_last_mask(terms) if inexpressible else None),
    )


def _counting(
    site: AttentionSite, given: Sequence[Term], positions: Positions
) -> tuple[list[tuple[Term, Formula | None]], bool]:
    """The terms that change a score, each with where it keeps one as far as that is known; and whether one has a
    gradient.

    What has a gradient keeps it, be it zero: an optimizer lets a parameter decay whose gradient is zero, and leaves one
    alone that has none.
    """
    formulas = [kept_where(term, positions) if _masks_by_formula(term) else None for term in given]
    graded = [site.differentiable and isinstance(term, Bias) and _may_have_gradient(term) for term in given]
    counting = [
        (term, formula)
        for term, formula, has_gradient in zip(given, formulas, graded, strict=True)
        if formula is not True or has_gradient
    ]
    biases = [isinstance(term, Bias) for term, _ in counting]
    counting = [pair for place, pair in enumerate(counting) if any(biases[:place]) or not isinstance(pair[0], Floor)]
    # No row is raised that nothing masks before.
    counting = list(dropwhile(lambda pair: isinstance(pair[0], Raise), counting))
    return counting, any(graded)


def _last_mask(terms: Sequence[Term]) -> fx.Node | None:
    """The operation that masks last."""
    return next((term.written_at for term in reversed(terms) if _may_mask(term) and term.written_at), None)


def _fills_decide(site: AttentionSite, terms: list[Term], decided: bool) -> bool:
    return not (site.fused or site.sink is not None or decided or _is_raised(terms)) and _only_fills_mask(terms)


def _is_raised(terms: Sequence[Term]) -> bool:
    return any(isinstance(term, Raise) for term in terms)


def _require_raised_rows(
    terms: Sequence[Term], inexpressible: bool, masked_rows: MaskedRows, site: AttentionSite
) -> None:
    """
    Raises:
        NotAttention: a row is raised between two masks where more than its mask depends on that.
    """
    if not _is_raised(terms):
        return
    beside = site.sink is not None or any(isinstance(term, Floor) for term in terms)
    beside |= any(_shows_in_raised_rows(term, site) for term in terms)
    # A fill stops the gradients of the scores that it takes the place of.
    beside |= site.differentiable and (site.in_half or any(isinstance(term, Fill) for term in terms))
    if inexpressible or beside or masked_rows.is_zero_unless_nan:
        rounded = {term.rounded_to for term in terms if isinstance(term, Raise)} - {None}
        raise NotAttention(_without_key(_rounded(rounded.pop()) if rounded else Reason(_CHANGED_LATER)))


def _shows_in_raised_rows(term: Term, site: AttentionSite) -> bool:
    """Whether scores show beside a number of the term where they are lost in the source, or are rounded there.

    A fill is added as a mask; float16 and float64 have digits of a score beside numbers that other dtypes have not.
    """
    if any(isinstance(value, float) and _LOST_IN_FLOAT32 < value < _KEPT_IN_FLOAT32 for value in _values(term)):
        return True
    wide = site.softmax_dtype is torch.float64
    if not wide and (site.compute_dtype is not torch.float16 or not isinstance(term, Fill)):
        return False
    shows_below = -ORDINARY if isinstance(term, Fill) else _ROUNDED_IN_FLOAT64
    return any(isinstance(value, float) and ABSORBED < value < shows_below for value in _values(term))


_KEPT_IN_FLOAT32, _LOST_IN_FLOAT32 = -(2.0**17), -(2.0**29)
"""Beside numbers between these, float32 has some of a score's digits, and not as many as the result shows."""

_ROUNDED_IN_FLOAT64 = -(2.0**33)
"""Beside numbers below this, float64 rounds scores by more than results may differ."""


def _rounded(dtype: torch.dtype | None) -> Reason:
    return Reason(f"masked scores are rounded to {dtype}".replace("torch.", ""))


_CHANGED_LATER = "masked scores are changed further after their maximum was subtracted"


def _without_key(reason: Reason) -> str:
    return (
        f"{reason}, which changes the result of a row without a key, and such a row cannot be ruled out (if none "
        "occurs, set options={'assume_attended_rows': True})"
    )


def _masks_by_formula(term: Term) -> TypeGuard[Bias | Fill]:
    """Whether what the term masks is told by its own formula alone."""
    if isinstance(term, Fill):
        return not term.loosened or term.value == -math.inf
    return isinstance(term, Bias) and not term.loosened


def _attended(
    site: AttentionSite, reading: _Reading, terms: list[Term], positions: Positions, policy: Policy
) -> str | None:
    """How it is known that every row attends a key; None if it is not known.

    Raises:
        NotAttention: it is not known, and neither is the source's value of a row without a key.
    """
    asserted = "asserted by the option assume_attended_rows" if policy.assume_attended_rows else None
    attended = attended_everywhere(terms, positions) or _attended_by_sink(site, terms) or asserted
    if site.foreign and attended is None and any(map(_may_mask, terms)):
        raise NotAttention(
            "the library's result for a row whose keys are all masked is not known, and such a row cannot be ruled out "
            "(if none occurs, set options={'assume_attended_rows': True})"
        )
    if reading.makes_nan and (site.nan_to_zero or any(isinstance(mod, Zero) for mod in site.weight_mods)):
        raise NotAttention(
            "masked scores are multiplied by a tensor, which gives NaN where it is zero, and NaN is replaced in the "
            "result"
        )
    if site.nan_to_zero and any(isinstance(term, Bias) and is_nan_by_formula(term.operand.node) for term in terms):
        raise NotAttention(
            "the mask that is added is NaN in places by its formula (0 * -inf), and NaN is replaced in the result"
        )
    overflows = reading.overflows
    leaves_range = reading.bounded > (_EXPONENT if site.underflows else -ABSORBING)
    # The terms before the function may have masked whole rows as well.
    if leaves_range and attended_everywhere([*reading.bounded_terms, *terms], positions) is None:
        attended = asserted
        overflows = Reason("masked scores underflow or overflow after a function that bounds them")
    # A row that is NaN already is NaN without a maximum, too.
    infinite = reading.lifted == "to NaN" or not any(map(_may_be_low, terms))
    stays_nan = infinite and not (site.differentiable or site.never_nan or site.sink is not None)
    if reading.lifted and (site.underflows or site.rounds_rows) and not stays_nan:
        overflows = Reason("the exponential is taken of masked scores whose maximum was subtracted before")
    if attended is None and overflows:
        raise NotAttention(_without_key(overflows), reading.overflows_at)
    return attended


def _shape_of_mask(
    site: AttentionSite, positions: Positions, kept: Formula | None, attended: str | None
) -> tuple[Band | None, tuple[Size, Size] | None]:
    """The band and the isolated block that the terms together are proved to be; None for each that is not proved."""
    if site.is_causal:
        square = same(size_of(site.query_axes), size_of(site.key_axes))
        return Band((None, 0), (None, 0) if square else None), None
    if attended is None or kept is None:
        return None, None
    return band_of(kept, positions), _isolated_block(kept, positions, site)


def _require_no_counterweight(terms: Sequence[Term]) -> None:
    """
    Raises:
        NotAttention: two numbers that are added cancel, and the one has taken the score's digits before; or one is as
            large as a dtype holds; or what is computed from positions may be as large as a mask.
    """
    numbers = [value for term in terms if isinstance(term, Bias) for value in _values(term) if isinstance(value, float)]
    if any(-FAR_BELOW <= number < math.inf for number in numbers) and any(
        -math.inf < number <= FAR_BELOW for number in numbers
    ):
        raise NotAttention(
            "large numbers of both signs are added to scores, and the first of them takes the digits of the scores"
        )
    fills = [term.value for term in terms if isinstance(term, Fill)]
    spread = sum(spread_of(term) for term in terms if isinstance(term, Bias))
    masking = [number for number in (*numbers, *fills) if -math.inf < number <= FAR_BELOW]
    # A row without a key is told by numbers as low as FAR_BELOW.
    if masking and spread and (max(masking) + spread > FAR_BELOW or spread >= -FAR_BELOW):
        raise NotAttention("numbers that are computed from positions may outweigh a mask that they are added to")
    if any(number >= _HIGHEST for number in (*numbers, *fills)):
        raise NotAttention("a number near the largest of its dtype takes the place of scores, or is added to them")


_HIGHEST = 2.0**127
"""Kernels multiply scores by log2(e), which numbers from here on may not stand."""


def _require_finite(scale: Scale, name: str) -> None:
    """
    Raises:
        NotAttention: a factor is known to hold infinities, or a divisor zeros.
    """
    if isinstance(scale.factor, Operand) and (what := why_not_finite(scale.factor.node, scale.divide)):
        raise NotAttention(f"the {name} are {what}")


def _terms_for_rows_without_key(site: AttentionSite, terms: list[Term]) -> list[Term]:
    """The terms with the values that they have in a written-out softmax, where a row may have no key.

    Raises:
        NotAttention: such a row's value or gradient in the source is not the one of the canonical form.
    """
    if site.underflows:
        terms = [_underflown(term) for term in terms]
        if any(isinstance(term, Fill) and -math.inf < term.value < -ORDINARY for term in terms):
            raise NotAttention(
                "the exponential of a score that a finite fill masks underflows, and a row without a key cannot be "
                "ruled out (fill with -inf, call torch.softmax, or set options={'assume_attended_rows': True})"
            )
        if any(isinstance(value, Range) and value.low < -ORDINARY for term in terms for value in _values(term)):
            raise NotAttention(
                "the exponential of scores underflows where the numbers that are computed from positions are low in a "
                "whole row (call torch.softmax, or set options={'assume_attended_rows': True})"
            )
    infinite = _may_be_infinite(terms) or site.underflows
    if site.differentiable and infinite and any(isinstance(term, Fill) and term.multiplied for term in terms):
        raise NotAttention(
            "scores or exponentials are multiplied by a mask, which makes the gradient of a row without a key NaN "
            "(if no such row occurs, set options={'assume_attended_rows': True})"
        )
    masked = any(isinstance(term, Fill) and _may_mask(term) for term in terms) or _gradients_are_nan(site, terms)
    if site.sink is not None and site.differentiable and masked:
        raise NotAttention(
            "the sink may be -inf or NaN, and then the gradient of a row whose keys are all masked is not known (if no "
            "such row occurs, set options={'assume_attended_rows': True})"
        )
    biases = [term for term in terms if isinstance(term, Bias)]
    if site.compute_dtype is torch.float64 and any(b.dtype is not torch.float64 and _may_mask(b) for b in biases):
        raise NotAttention(
            "a mask is added in a narrower dtype than the float64 of softmax, and rounding decides what is left of a "
            "row whose keys are all masked (if no such row occurs, set options={'assume_attended_rows': True})"
        )
    added = (value for term in biases for value in _values(term) if isinstance(value, float))
    rounding = next((value for value in added if site.in_half and ABSORBED < value < _RESOLVED), None)
    if rounding is not None:
        raise NotAttention(
            f"beside {rounding:g}, which is added to whole rows, float64 has some digits of a score and not the others "
            "(add -1e18 or less, or -1e15 or more; if no row is masked as a whole, set "
            "options={'assume_attended_rows': True})"
        )
    if site.rounds_rows and any(isinstance(value, float) and value > ORDINARY for t in terms for value in _values(t)):
        raise NotAttention("a large number is added to scores, which the logsumexp of a row is rounded to")
    if site.rounds_rows and site.differentiable and any(map(_may_be_low, terms)):
        raise NotAttention(
            "rounding loses the logsumexp of a row whose keys are all masked by finite numbers, and such a row cannot "
            "be ruled out (if none occurs, set options={'assume_attended_rows': True})"
        )
    return terms


_RESOLVED = -(2.0**53)
"""Beside numbers from here on, float64 has the digits of a score that show in half precision."""


def _rows_without_key(site: AttentionSite, terms: list[Term]) -> MaskedRows:
    """The source's weights in a row whose keys are all masked, before weight mods."""
    rounded = any(isinstance(term, Raise) and term.rounded_to for term in terms)
    infinite = rounded or _may_be_infinite(terms) or _sum_may_overflow(terms)
    floored = bool(terms) and isinstance(terms[-1], Floor)
    if not site.underflows and (floored or not infinite):
        return MaskedRows.MEAN_OF_VALUE
    return MaskedRows.ZERO_WHERE_NAN if site.nan_to_zero else MaskedRows.NAN


def _gradients_are_nan(site: AttentionSite, terms: list[Term]) -> bool:
    """Whether gradients are NaN in rows of minus infinity although the weights there are set to zero.

    Weights that a mask of zeros multiplies stay NaN, and those of a fill never had a gradient.
    """
    zeroed = site.nan_to_zero or any(isinstance(mod, Zero) and not mod.multiplied for mod in site.weight_mods)
    if not (site.differentiable and zeroed) or site.fused or site.never_nan:
        return False
    # Who replaces NaN expects it: also from a mask that is stored as a parameter.
    return _biases_give_nan(site, terms) or _may_be_infinite([term for term in terms if isinstance(term, Bias)])


def _mask_gradient_is_nan(site: AttentionSite, terms: list[Term]) -> bool:
    """Whether what is added may have a gradient, and softmax be NaN: a lifted mask has none in such a row."""
    biases = [term for term in terms if isinstance(term, Bias)]
    nan = not site.never_nan and _biases_give_nan(site, terms)
    return site.differentiable and nan and any(map(_may_have_gradient, biases))


def _biases_give_nan(site: AttentionSite, terms: list[Term]) -> bool:
    """Whether what is added may be minus infinity in a whole row; a parameter is not expected to be."""
    biases = [term for term in terms if isinstance(term, Bias)]
    infinite = any(value in (ValueKind.ANY, -math.inf) for term in biases for value in _values(term))
    return infinite or _sum_may_overflow(biases) or (site.underflows and any(map(may_mask, biases)))


def _may_have_gradient(term: Bias) -> bool:
    node = term.operand.node
    if node.op == "placeholder":
        return bool(getattr(node.meta.get("example_value"), "requires_grad", True))
    return not all(isinstance(value, float) for value in possible_values(node))


def _lift(site: AttentionSite, terms: list[Term], nan_gradients: bool) -> Lift:
    """What is done to the mask where rows may have no key, so that kernels lose neither their scores nor gradients."""
    biases = [term for term in terms if isinstance(term, Bias)]
    if site.fused or site.sink is not None or len(biases) < len(terms):
        return Lift.NONE
    if not site.differentiable:
        return _lift_of_forward(site, biases)
    lift = Lift.OPENED if nan_gradients else Lift.NONE
    if any(ValueKind.ANY in _values(term) and term.dtype is not torch.float16 for term in biases):
        return Lift.SUBSET if site.in_half else lift
    numbers = [[value for value in _values(term) if isinstance(value, float)] for term in biases]
    low = {number for each in numbers for number in each if -math.inf < number < -ORDINARY}
    masks = sum(any(number < -ORDINARY for number in each) for each in numbers)
    if any(number > ORDINARY for each in numbers for number in each):
        return lift
    if site.underflows:
        return Lift.ROWS if masks and all(number <= UNDERFLOW for number in low) else lift
    # Float64 resolves more beside a number.
    absorbed = ABSORBING if site.softmax_dtype is torch.float64 else ABSORBED
    if any(number > absorbed for number in low) and not site.in_half:
        return lift
    if any(number <= ABSORBED for number in low):
        # Of all keys, that is: the key's gradient is made for rows that attend each of them alike.
        single = masks == 1 and len(low) == 1 and not any(-math.inf in each for each in numbers)
        # Nor does it know which weights dropout drops.
        return Lift.ABSORBED if single and not site.dropout else Lift.SUBSET
    return Lift.ROWS if masks or any(ValueKind.ANY in _values(term) for term in biases) else lift


def _lift_of_forward(site: AttentionSite, biases: list[Bias]) -> Lift:
    """What is done to the mask where there is no backward pass: kernels take numbers of the dtype of the query only."""
    if any(term.dtype.itemsize > site.compute_dtype.itemsize for term in biases) and site.in_half:
        values = [value for term in biases for value in _values(term)]
        if len(biases) > 1 and ValueKind.ANY in values:
            return Lift.SUBSET
        known = all(isinstance(value, float) and (value <= 0 or is_ordinary(value)) for value in values)
        return Lift.ABSORBED if known and any(map(may_mask, biases)) else Lift.NONE
    steps = len(biases) + sum(len(term.scales) + len(term.rescaled) + (term.factor != 1) for term in biases)
    if steps < 2 or not site.in_half:
        return Lift.NONE
    # A sum leaves the range of float16, and in bfloat16 its digits get lost.
    absorbing = any(
        value is ValueKind.ANY or (isinstance(value, float) and abs(value) >= -ABSORBED)
        for term in biases
        for value in _values(term)
    )
    half = all(term.dtype is torch.float16 for term in biases)
    return Lift.ROWS if half or not absorbing else Lift.NONE


def _may_be_infinite(terms: Sequence[Term]) -> bool:
    return any(value in (ValueKind.ANY, ValueKind.LEARNED, -math.inf) for term in terms for value in _values(term))


def _kept_by_all(terms: list[Term], kept: Sequence[Formula | None]) -> Formula | None:
    """Condition under which every term leaves the score unmasked; None if it is unknown for a term that may mask.

    It is unknown, too, where a large positive number may outweigh a mask.
    """
    if any(isinstance(value, float) and value > ORDINARY for term in terms for value in _values(term)):
        return None
    for term, formula in zip(terms, kept, strict=True):
        if formula is None and (not isinstance(term, Bias) or may_mask(term)):
            return None
    return conjunction([formula for formula in kept if formula is not None])


def _kept_by_last_fills(terms: list[Term], kept: Sequence[Formula | None]) -> Formula | None:
    """Condition under which no fill masks the score, of those that stay as low as they were; None if none does.

    Outside of it the weight is zero, whatever was added before, if the row attends a key. A fill of ordinary size may
    take the place of what was filled before it. Whatever is added to minus infinity leaves it what it is.
    """
    known: list[Formula] = []
    unknown_follows = False
    for term, formula in zip(reversed(terms), reversed(kept), strict=True):
        ordinary = all(value == -math.inf or _is_ordinary(value) for value in _values(term))
        if isinstance(term, Bias) and (term.scales or not ordinary):
            unknown_follows = True
        if isinstance(term, Fill) and (term.value > FAR_BELOW or (unknown_follows and term.value != -math.inf)):
            break
        if isinstance(term, (Floor, Raise)) and unknown_follows:
            break
        if isinstance(term, Fill) and formula is not None:
            known.append(formula)
    return conjunction(known) if known else None


def _read_mods(site: AttentionSite, positions: Positions) -> _Reading:
    reading = _Reading()
    terms = reading.terms
    in_range = site.in_half and site.score_dtype is site.compute_dtype
    for mod in site.mods:
        in_range = in_range and _stays_in_range(mod, site.compute_dtype)
        before = reading.overflows, reading.inexpressible
        with blaming(mod.written_at):
            _read_mod(mod, reading, site, positions, in_range)
        if reading.overflows != before[0]:
            reading.overflows_at = mod.written_at
        if reading.inexpressible != before[1]:
            reading.inexpressible_at = mod.written_at
    if not math.isfinite(reading.scale):
        raise NotAttention(f"the scale is {reading.scale}")
    if reading.scale < 0:
        # FlashAttention and cuDNN take the highest product before they scale it: where the sign turns, exponentials
        # overflow.
        reading.scale = -reading.scale
        reading.query_factors.append(Scale(-1.0))
    elif reading.scale == 0:
        # PyTorch's CPU kernel scales after it masks: 0 * -inf is NaN there.
        reading.scale = 1.0
        reading.query_factors.append(Scale(0.0))
    if any(isinstance(term, _Multiplied) for term in terms):
        if any(isinstance(term, _Multiplied) and term.after_shift for term in terms):
            raise NotAttention("shifted scores are multiplied by a mask, and softmax still counts the masked zeros")
        reading.take_function("the scores are multiplied by a mask, and softmax still counts the masked zeros")
        last = max(place for place, term in enumerate(terms) if isinstance(term, _Multiplied))
        terms[:] = [*map(_loosened, terms[:last]), *terms[last:]]
        terms[:] = [term for term in terms if not isinstance(term, _Multiplied)]
    return reading


def _read_mod(mod: ScoreMod, reading: _Reading, site: AttentionSite, positions: Positions, in_range: bool) -> None:
    """
    Args:
        in_range: the scores are known to be in the range of their products' half precision.
    """
    terms = reading.terms
    if reading.lifted and isinstance(mod, (Bias, Fill)) and site.nan_to_zero and _may_be_infinite(terms):
        # Minus infinity less itself is NaN, for which a condition on minus infinity does not hold.
        reading.overflows = Reason(_CHANGED_LATER)
    if reading.lifted == "to zero" and isinstance(mod, Narrow) and _only_narrows(mod, site):
        # No score is above zero here, and the exponential of what leaves the range of the narrower dtype is zero.
        reading.narrowed = _rounded(mod.dtype)
        return
    if reading.lifted and not _stays_lifted(mod, reading):
        _read_after_maximum(mod, reading, site)
    if reading.narrowed and isinstance(mod, (Bias, Fill)):
        reading.overflows = reading.narrowed
    if isinstance(mod, Elementwise):
        _read_function(mod, reading)
    elif isinstance(mod, Bias):
        merged = _fill_of_product(terms[-1], mod, positions) if terms else None
        if merged is not None:
            terms[-1] = merged
        else:
            terms.append(mod)
    elif isinstance(mod, Fill):
        terms.append(_of_half_scores(mod, site.compute_dtype) if in_range else mod)
    elif isinstance(mod, Floor):
        _read_floor(reading, mod)
        if _is_raised(terms):
            reading.overflows = Reason(_CHANGED_LATER)
    elif isinstance(mod, Narrow):
        _read_narrow(mod, reading, site)
    elif isinstance(mod, Shift):
        _read_shift(mod, reading, site)
    else:
        _read_scale(mod, site, reading)


def _read_scale(mod: Scale, site: AttentionSite, reading: _Reading) -> None:
    terms = reading.terms
    if reading.needs_finite and not (isinstance(mod.factor, (int, float)) and mod.factor > 0):
        raise NotAttention(
            "scores that were subtracted from a number made of their row are multiplied by what may be negative, "
            "and then infinite ones no longer make the row NaN"
        )
    if isinstance(mod.factor, (int, float)):
        if mod.divide and mod.factor == 0:
            raise NotAttention("the scores are divided by zero")
        number = 1.0 / mod.factor if mod.divide else float(mod.factor)
        if mod.divide and math.isinf(mod.factor):
            raise NotAttention("the scores are divided by infinity")
        _require_ordinary_factor(number)
        reading.makes_nan |= number == 0 and _may_be_infinite(terms)
        reading.scale *= number
        reading.bounded *= abs(number)
        if reading.softcap is not None:
            reading.softcap *= number
        _scale_terms(number, reading, mod.dtype)
        return
    _require_finite(mod, "scores")
    if (reading.shifted and _zeroes_keys(mod, site)) or not _place_factor(mod, site, reading):
        assert isinstance(mod.factor, Operand)
        if mod.divide or not possible_values(mod.factor.node) <= {0.0, 1.0}:
            reading.take_function("the scores are multiplied by a tensor with query and key positions")
            # A bias that masks nothing is a part of the scores from here on.
            terms[:] = [term for term in terms if not _is_part_of_scores(term)]
            if any(isinstance(term, (Bias, Floor)) for term in terms):
                reading.overflows = Reason("a tensor scales masked scores")
            reading.makes_nan |= _may_be_infinite(terms) or _added_masks_may_overflow(terms)
            _loosen(reading, site)
        elif _added_masks_may_overflow(terms) or any(
            value in (ValueKind.ANY, -math.inf) for term in terms for value in _values(term)
        ):
            raise NotAttention("scores that may be -inf are multiplied by zeros, which gives NaN")
        else:
            terms.append(_Multiplied(mod.factor, 0.0, site.softmax_dtype, True, after_shift=reading.shifted))


def _require_ordinary_factor(number: float) -> None:
    """
    Raises:
        NotAttention: numbers that are multiplied one after the other may leave the range of their dtype between.
    """
    if number and not _LEAST_FACTOR <= abs(number) <= 1 / _LEAST_FACTOR:
        raise NotAttention(f"a factor of {number:g} may bring numbers out of the range of their dtype")


_LEAST_FACTOR = 2.0**-40


def _read_shift(mod: Shift, reading: _Reading, site: AttentionSite) -> None:
    reading.shifted = True
    if mod.needs_finite:
        _require_plain_scores(site, reading)
        reading.needs_finite = True
    if mod.by_maximum and any(map(_may_mask, reading.terms)):
        low = any(map(_may_be_low, reading.terms))
        reading.lifted = ("to zero" if low else "to NaN") if mod.own_row else "perhaps"


def _require_plain_scores(site: AttentionSite, reading: _Reading) -> None:
    """Raises:
    NotAttention: scores may be infinite on purpose, were made finite before, or NaN is replaced in the weights.
    """
    factors = [scale.factor for scale in (*reading.query_factors, *reading.key_factors)]
    tensors = [factor.node for factor in factors if isinstance(factor, Operand)]
    reason = reading.inexpressible
    if any(map(_may_mask, reading.terms)):
        reason = Reason("they were masked before")
    elif any(ValueKind.ANY in possible_values(node) for node in tensors):
        reason = Reason("they were multiplied by a tensor before, which may be infinite")
    elif site.nan_to_zero or any(isinstance(mod, Zero) and not mod.multiplied for mod in site.weight_mods):
        reason = Reason("NaN is replaced in the weights")
    if reason:
        raise NotAttention(
            "a number that is made from each row of scores is added to them or subtracted, or they are subtracted from "
            f"it, which makes rows NaN that are not finite, and {reason}"
        )


def _of_half_scores(term: Fill, dtype: torch.dtype) -> Fill:
    """A fill that no score is lower than counts as one of the products' dtype, whose lowest number that is."""
    return replace(term, dtype=dtype) if FAR_BELOW < term.value <= torch.finfo(dtype).min else term


def _stays_in_range(mod: ScoreMod, dtype: torch.dtype) -> bool:
    """Whether scores that are in the range of ``dtype`` stay in it: they are stored in it, or do not grow."""
    if isinstance(mod, Scale):
        number = mod.factor if isinstance(mod.factor, (int, float)) else None
        return mod.dtype is dtype or (number is not None and (abs(number) >= 1 if mod.divide else abs(number) <= 1))
    return isinstance(mod, Fill) or (isinstance(mod, (Bias, Narrow)) and mod.dtype is dtype)


_EXPONENT = 80.0
"""The exponentials of numbers up to this size are ordinary numbers in float32 and wider dtypes."""

_BOUNDED = (aten.tanh.default, aten.sigmoid.default, aten.clamp.default)


def _read_function(mod: Elementwise, reading: _Reading) -> None:
    """Reads an elementwise function. After a bounded one no score is infinite, so only later terms mask.

    A bound from above alone leaves masked scores as they are.
    """
    target: Any = mod.node.target
    name = operator_name(target)
    low, high = bounds_of(mod.node) if target in CLAMP_OPS else (None, None)
    if target in CLAMP_OPS and low is None and isinstance(high, (int, float)) and high >= 0:
        return reading.take_function(f"{name} of the scores needs a kernel with a score_mod")
    unbounded = target is aten.clamp.default and not (isinstance(low, (int, float)) and math.isfinite(low))
    masks = bool(reading.terms) or reading.bounded > 0
    if _is_raised(reading.terms):
        reading.overflows = Reason(_CHANGED_LATER)
    if reading.terms and (target not in _BOUNDED or unbounded):
        raise NotAttention(f"{name} is applied to scores that were masked before")
    caps = target is aten.tanh.default and not (reading.terms or reading.inexpressible)
    reading.take_function(f"{name} of the scores needs a kernel with a score_mod")
    reading.softcap = 1.0 if caps else None
    reading.bounded_terms += reading.terms
    reading.terms.clear()
    if masks and target in _BOUNDED:
        bounds = (low, high) if target is aten.clamp.default else (1.0,)
        reading.bounded = max(abs(float(bound)) for bound in bounds if isinstance(bound, (int, float)))


def _read_after_maximum(mod: ScoreMod, reading: _Reading, site: AttentionSite) -> None:
    """Reads what follows after the maximum of masked scores was subtracted, before it is read as a term."""
    counted = site.underflows or site.rounds_rows
    known = isinstance(mod, (Bias, Fill)) or (
        isinstance(mod, Scale) and isinstance(mod.factor, (int, float)) and mod.factor > 0
    )
    if not known or reading.inexpressible or counted or reading.lifted == "perhaps":
        reading.overflows = Reason(_CHANGED_LATER)
        return
    float32 = site.softmax_dtype is torch.float32 and not site.in_half
    reading.terms.append(Raise(FAR_BELOW if float32 else ABSORBED, written_at=mod.written_at))
    reading.lifted = ""


def _only_narrows(mod: Narrow, site: AttentionSite) -> bool:
    """Whether a cast of scores whose maximum was subtracted changes none that counts."""
    return not site.in_half and mod.dtype.itemsize >= 4


def _stays_lifted(mod: ScoreMod, reading: _Reading) -> bool:
    """Whether ``mod`` leaves ``reading.lifted`` true for rows whose keys are all masked.

    Zeros stay zeros under a positive factor, if the terms do not overflow under it. NaN stays NaN unless it is filled.
    """
    if isinstance(mod, Shift):
        return True
    if reading.lifted == "to NaN":
        return isinstance(mod, (Scale, Bias, Narrow))
    if not isinstance(mod, Scale) or not isinstance(mod.factor, (int, float)) or mod.factor <= 0:
        return False
    number = 1 / mod.factor if mod.divide else mod.factor
    return not any(_may_overflow(term, number) for term in reading.terms)


def _may_overflow(term: Term, number: float) -> bool:
    """Whether a finite term may become infinite when it is multiplied by ``number``, after its own scales."""
    if isinstance(term, Raise):
        return False
    if not isinstance(term, Bias):
        return math.isfinite(term.value) and not math.isfinite(as_stored(term.value * number, term.dtype))
    factor = term.factor * number
    for scale in term.scales:
        if not isinstance(scale.factor, (int, float)):
            return True
        factor *= 1 / scale.factor if scale.divide else scale.factor
    return abs(factor) > 1


def _may_mask(term: Term) -> bool:
    if isinstance(term, Raise):
        return False
    return may_mask(term) if isinstance(term, Bias) else term.value < -ORDINARY


def _may_be_low(term: Term) -> bool:
    """Whether a term may lower scores by a large finite number."""
    return any(
        value is ValueKind.ANY or (isinstance(value, float) and -math.inf < value < -ORDINARY)
        for value in _values(term)
    )


def _underflown(term: Term) -> Term:
    """The term with -inf in place of a fill whose exponential underflows to 0."""
    return replace(term, value=-math.inf) if isinstance(term, Fill) and term.value <= UNDERFLOW else term


def _read_narrow(mod: Narrow, reading: _Reading, site: AttentionSite) -> None:
    """Reads a cast of the scores: large numbers may become infinite in the narrower dtype.

    Where the products are in half precision, such a cast is a rounding of the source that its formula does not have.
    """
    if site.in_half and mod.dtype.itemsize < 4:
        return
    if mod.dtype is torch.float16:
        raise NotAttention(
            "the scores are cast to float16, whose range may change more than their rounding (the products are not in "
            "half precision)"
        )
    terms = reading.terms
    terms[:] = [
        replace(term, value=as_stored(term.value, mod.dtype), dtype=mod.dtype) if isinstance(term, Fill) else term
        for term in terms
    ]
    rounded = _rounded(mod.dtype)
    if (reading.inexpressible and terms) or _is_raised(terms):
        reading.overflows = rounded
    if any(isinstance(term, Floor) or (isinstance(term, Bias) and may_mask(term)) for term in terms):
        resolved = any(
            value is ValueKind.ANY or (isinstance(value, float) and ABSORBED < value < -ORDINARY)
            for term in terms
            for value in _values(term)
        )
        counted = site.underflows or site.rounds_rows
        if mod.dtype.itemsize < 4 or (counted and (resolved or any(_overflows(term, mod.dtype) for term in terms))):
            reading.overflows = rounded
        elif resolved or any(_overflows(term, mod.dtype) for term in terms):
            terms.append(Raise(FAR_BELOW, rounded_to=mod.dtype, written_at=mod.written_at))
            reading.narrowed = rounded
        else:
            # No score is large enough to matter here: the mask, rounded as a whole, is infinite where the scores are.
            reading.narrowed, reading.rounded_to = rounded, mod.dtype


def _overflows(term: Term, dtype: torch.dtype) -> bool:
    """Whether a finite number that the term is known to add is infinite in ``dtype``."""
    numbers = [value for value in _values(term) if isinstance(value, float) and math.isfinite(value)]
    return isinstance(term, Floor) or any(math.isinf(as_stored(number, dtype)) for number in numbers)


def _read_floor(reading: _Reading, floor: Floor) -> None:
    if floor.value == -math.inf:
        return  # Its dtype does not hold the number.
    terms = reading.terms
    terms[:] = [replace(term, value=max(term.value, floor.value)) if isinstance(term, Fill) else term for term in terms]
    shows = floor.value > ABSORBING and any(isinstance(term, Bias) and may_mask(term) for term in terms)
    if shows:
        # No score shows beside such a number in float16, and in the dtype in which kernels add masks it does.
        reading.take_function(f"{floor.value:g} bounds scores to which a mask was added")
    if shows or (floor.value <= ABSORBING and any(isinstance(term, Bias) for term in terms)):
        terms.append(floor)


def _scale_terms(number: float, reading: _Reading, dtype: torch.dtype | None) -> None:
    """Scales the terms by a number, each by itself; as a sum where that may overflow before it is scaled down."""
    terms = reading.terms
    raises = [place for place, term in enumerate(terms) if isinstance(term, Raise)]
    if raises:
        _scale_after_raise(number, reading, dtype, raises[-1])
        return
    if any(isinstance(term, Bias) and _outgrows(term, number, dtype) for term in terms):
        reading.overflows = Reason("masks are added in one dtype and scaled in a wider one, which holds larger numbers")
    if _is_rescaled(terms) or (0 <= number < 1 and _added_masks_may_overflow(terms)):
        _require_no_zero([number])
        sums = [term for term in terms if isinstance(term, Bias) or _fills_far_below(term, number)]
        if number > 0 and len(sums) == len(terms):
            terms[:] = [replace(term, rescaled=(*term.rescaled, number)) for term in sums]
            return
        reading.overflows = Reason(_SUM_SCALED)
    terms[:] = [_scaled(term, number, dtype) for term in terms]


def _scale_after_raise(number: float, reading: _Reading, dtype: torch.dtype | None, place: int) -> None:
    """Scales what the terms had become when their maximum was subtracted as a whole, and each later term by itself."""
    raised, later = reading.terms[place], _Reading(terms=reading.terms[place + 1 :])
    assert isinstance(raised, Raise)
    _scale_terms(number, later, dtype)
    reading.overflows = later.overflows or reading.overflows
    if number <= 0:
        reading.overflows = Reason(_CHANGED_LATER)
    elif number < 1 and _added_masks_may_overflow(reading.terms):
        reading.overflows = Reason(_SUM_SCALED)
    reading.terms[place:] = [replace(raised, factor=raised.factor * number), *later.terms]


def _outgrows(term: Bias, number: float, dtype: torch.dtype | None) -> bool:
    """Whether a term that is scaled in ``dtype`` is a number there, and infinite in the dtype that it is added in."""
    wider = _wider(term.dtype, dtype)
    values = [value * number for value in _values(term) if isinstance(value, float) and math.isfinite(value)]
    return wider is not term.dtype and any(
        math.isfinite(as_stored(value, wider)) and not math.isfinite(as_stored(value, term.dtype)) for value in values
    )


def _is_rescaled(terms: Sequence[Term]) -> bool:
    """Whether the sum of the terms was formed, and may have overflowed, before it was scaled."""
    return any(isinstance(term, (Bias, Fill)) and term.rescaled for term in terms)


def _fills_far_below(term: Term, number: float) -> TypeGuard[Fill]:
    """Whether the term fills in a number that is far below any score, also when it has been scaled."""
    if not isinstance(term, Fill):
        return False
    return term.value == -math.inf or (
        term.dtype.itemsize >= 4 and term.value * math.prod(term.rescaled) * number <= ABSORBED
    )


def _added_masks_may_overflow(terms: Sequence[Term]) -> bool:
    """Whether a mask is added to scores that another finite number masked before; a fill replaces what was there."""
    masked, lowest = False, 0.0
    for term in terms:
        unknown = any(value is ValueKind.ANY for value in _values(term))
        number = _lowest_number(term)
        if isinstance(term, Bias):
            if (masked and unknown) or (lowest < 0 and _is_infinite(lowest + number, term)):
                return True
            lowest += number
        else:
            lowest = min(lowest, number)
        masked |= unknown or lowest <= ABSORBING
    return False


def _lowest_number(term: Term) -> float:
    """The lowest finite number that a term is known to add or fill in; zero if there is none below it."""
    numbers = [value for value in _values(term) if isinstance(value, float) and math.isfinite(value)]
    return min(0.0, *numbers, 0.0)


def _is_infinite(total: float, term: Term) -> bool:
    """Whether a sum is minus infinity in the dtype that it is formed in; half precision has the sums of float32."""
    wide = isinstance(term, (Bias, Fill)) and term.dtype is torch.float64
    return math.isinf(as_stored(total, torch.float64 if wide else torch.float32))


def _is_low(term: Term) -> bool:
    return any(isinstance(value, float) and value <= ABSORBING for value in _values(term))


def _scaled(term: Term, number: float, dtype: torch.dtype | None) -> Term:
    if isinstance(term, Bias):
        # A step that may overflow is kept as a step.
        large = any(not isinstance(value, float) or abs(value) > 1e30 for value in possible_values(term.operand.node))
        if large and abs(number) != 1:
            return term.scaled(Scale(number))
        return replace(term, factor=term.factor * number)
    assert not isinstance(term, Raise)
    if number <= 0:
        raise NotAttention("a filled mask is multiplied by a number that is not positive")
    return replace(term, value=as_stored(term.value * number, _wider(term.dtype, dtype)))


def _wider(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a term is scaled: scores may have been cast up since it was added."""
    return own if dtype is None else torch.promote_types(own, dtype)


_SUM_SCALED = "two masks may add up to minus infinity, and their sum is scaled afterwards"


def _place_factor(mod: Scale, site: AttentionSite, reading: _Reading) -> bool:
    """Moves a factor of the scores into query or key; returns False if it has both query and key positions."""
    factor = mod.factor
    axes = set(factor.axes) if isinstance(factor, Operand) else set()
    if not (axes <= set(site.query.axes) or axes <= set(site.key.axes)):
        return False
    terms = reading.terms
    values = possible_values(factor.node) if isinstance(factor, Operand) else frozenset({ValueKind.ANY})
    infinite = _may_be_infinite(terms) or _added_masks_may_overflow(terms)
    if infinite and (0.0 in values or ValueKind.ANY in values):
        reading.makes_nan = True
    if any(not isinstance(term, Bias) for term in terms):
        reading.take_function("a tensor scales the scores after a mask was applied")
        _loosen(reading, site)
        return True
    if _is_rescaled(terms) or _added_masks_may_overflow(terms):
        _require_no_zero(values)
        reading.overflows = Reason(_SUM_SCALED)
    terms[:] = [term.scaled(mod) for term in terms if isinstance(term, Bias)]
    (reading.query_factors if axes <= set(site.query.axes) else reading.key_factors).append(mod)
    reading.softcap = None
    return True


def _require_no_zero(factors: Container[object]) -> None:
    """
    Raises:
        NotAttention: a factor of masks that may add up to minus infinity may be zero.
    """
    if 0.0 in factors or ValueKind.ANY in factors:
        raise NotAttention(
            "two masks may add up to minus infinity, and their sum is multiplied by what may be zero, which gives NaN"
        )


def _loosen(reading: _Reading, site: AttentionSite) -> None:
    """What a tensor does to masked scores: the kernel that repeats the steps gives what they become."""
    terms = reading.terms
    # Without a maximum it counts how low a row is, which is not known any more.
    counted = (site.underflows or site.rounds_rows) and any(isinstance(t, Floor) or _may_be_low(t) for t in terms)
    if counted or any(isinstance(term, Fill) and -math.inf < term.value < _LEAST_SCALED for term in terms):
        # A row of them may become minus infinity, which is NaN in the source and zero in the kernel.
        reading.overflows = Reason("a tensor scales masked scores")
    terms[:] = map(_loosened, terms)


def _loosened(term: Term) -> Term:
    return replace(term, loosened=True) if isinstance(term, (Bias, Fill)) else term


_LEAST_SCALED = -(2.0**64)
"""A finite fill that is not lower stays finite under any factor that a tensor is expected to hold."""


@dataclass(frozen=True)
class _Multiplied(Fill):
    """``scores * mask`` with a mask of zeros and ones; it becomes a fill if a large negative bias is added next.

    ``after_shift``: the maximum or another number was subtracted from all scores before the multiplication.
    """

    after_shift: bool = False


def _zeroes_keys(mod: Scale, site: AttentionSite) -> bool:
    factor = mod.factor
    return isinstance(factor, Operand) and bool(set(factor.axes) & set(site.key_axes)) and not mod.divide


def _fill_of_product(before: Term, bias: Bias, positions: Positions) -> Fill | None:
    """The fill that ``scores * mask + (1 - mask) * -1e9`` is; None if ``before`` and ``bias`` are something else."""
    if not isinstance(before, Fill) or before.value != 0:
        return None
    entry = positions.of(bias.operand)
    condition = truth(positions.of(before.condition))
    if not isinstance(entry, Cases) or condition is None:
        return None
    zeroed = negation(condition) if before.invert else condition
    low = [number for number, _ in entry.numbers if number != 0]
    if len(low) != 1 or entry.where(lambda number: number != 0) != zeroed:
        return None
    value = bias.of(low[0])
    return None if value is None else Fill(before.condition, value, bias.dtype, before.invert, multiplied=True)


def _isolated_block(kept: Formula, positions: Positions, site: AttentionSite) -> tuple[Size, Size] | None:
    """The bounds of the block of positions that ``kept`` isolates, as sizes of the graph; None if there is no block."""
    bounds = isolated_block_of(kept, positions)
    if bounds is None:
        return None
    sizes: list[Size] = []
    known: list[Size] = [axis.size for axis in (*site.query_axes, *site.key_axes)]
    known += [size for part in (site.query, site.key) for size in tensor(part.node).shape]
    symbolic = [size for size in known if isinstance(size, torch.SymInt)]
    for bound in bounds:
        if bound.is_Integer:
            sizes.append(int(bound))
        elif symbolic:
            sizes.append(symbolic[0].node.shape_env.create_symintnode(bound, hint=None))
        else:
            return None
    return sizes[0], sizes[1]


# Modifications of the weights.


def _require_factor_of_weights(mod: Scale) -> None:
    """
    Raises:
        NotAttention: the factor is none that moves to the value or to the output.
    """
    if not isinstance(mod.factor, (int, float)):
        return _require_finite(mod, "attention weights")
    if mod.divide and mod.factor == 0:
        raise NotAttention("the attention weights are divided by zero")
    return _require_ordinary_factor(1 / mod.factor if mod.divide else float(mod.factor))


def _zeroed_of_masked(mod: Zero, positions: Positions, kept: Formula | None) -> Formula | None:
    """Where weights are set to zero, if all of them were masked before softmax; None if that is not proved."""
    zeroed = truth(positions.of(mod.condition))
    zeroed = None if zeroed is None else negation(zeroed) if mod.invert else zeroed
    return zeroed if zeroed is not None and kept is not None and conjunction([zeroed, kept]) is False else None


def _placed_weight_mods(
    site: AttentionSite, positions: Positions, kept: Formula | None, masked_rows: MaskedRows
) -> tuple[tuple[WeightMod, ...], tuple[WeightMod, ...], MaskedRows]:
    """The weight mods for the value, those for the output, and what rows without a key become after them.

    Args:
        kept: the condition outside of which a weight is zero, in rows that attend a key. If a row may have none, the
            key is masked exactly where it does not hold.

    Raises:
        NotAttention: a weight mod has query and key positions and is not known to be the mask.
    """
    value_mods: list[WeightMod] = []
    output_mods: list[WeightMod] = []
    fills = [mod for mod in site.weight_mods if isinstance(mod, Zero) and not mod.multiplied]
    by_fills = [zeroed for mod in fills if (zeroed := _zeroed_of_masked(mod, positions, kept)) is not None]
    for mod in site.weight_mods:
        with blaming(mod.written_at):
            if isinstance(mod, Scale):
                _require_factor_of_weights(mod)
            else:
                zeroed = _zeroed_of_masked(mod, positions, kept)
                if zeroed is not None and kept is not None:
                    # What is zeroed was masked: it is zero already, except in rows that have no key.
                    if not masked_rows.may_occur:
                        continue
                    # Two fills may zero what two masks have masked, each its own.
                    others = [zeroed] if mod.multiplied else by_fills
                    if conjunction([*map(negation, others), negation(kept)]) is False:
                        stays = mod.multiplied and masked_rows.may_be_nan
                        masked_rows = MaskedRows.ZERO_UNLESS_NAN if stays else MaskedRows.ZERO
                        continue
            operand = mod.condition if isinstance(mod, Zero) else mod.factor
            axes = set(operand.axes) if isinstance(operand, Operand) else set()
            if not axes & set(site.key_axes) and axes <= {*site.query.axes, *site.value.axes}:
                output_mods.append(mod)
            elif axes <= set(site.value.axes):
                if isinstance(mod, Zero) and not mod.multiplied and masked_rows.tells_nan:
                    raise NotAttention(
                        "the attention weights may be NaN, and are set to zero by a mask that was not applied before "
                        "softmax"
                    )
                value_mods.append(mod)
            else:
                raise NotAttention(
                    "the attention weights are multiplied by a tensor with query and key positions that is not known "
                    "to be the mask applied before softmax"
                )
    return tuple(value_mods), tuple(output_mods), masked_rows


# Values of the terms.


def _attended_by_sink(site: AttentionSite, terms: Sequence[Term]) -> str | None:
    """The proof by a sink, a further key that is never masked; None unless its score is an ordinary number."""
    sink = site.sink
    if sink is None or site.sink_is_shifted:
        return None
    if site.sink_of_masked and sum(map(_may_mask, terms)) == 1:
        return "the sink of the masked keys"
    values = possible_values(sink.node) if isinstance(sink, Operand) else {float(sink)}
    return "the sink" if all(is_ordinary(value) for value in values) else None


def _structure(
    site: AttentionSite, terms: list[Term], kept: Sequence[Formula | None], positions: Positions
) -> tuple[str, ...]:
    known = [formula for formula in kept if formula is not None]
    words = list(in_words(conjunction(known), positions)) if known else []
    words += ["bias"] * any(
        formula is None and isinstance(term, Bias) for term, formula in zip(terms, kept, strict=True)
    )
    words += [
        f"fill {term.value:g}"
        for term, formula in zip(terms, kept, strict=True)
        if formula is None and isinstance(term, Fill)
    ]
    return (*["causal"] * site.is_causal, *words, *["sink"] * (site.sink is not None))


def _values(term: Term) -> list[object]:
    if isinstance(term, Raise):
        return [0.0]
    if isinstance(term, (Fill, Floor)):
        return [term.value]
    return list(added_values(term))


def _is_ordinary(value: object) -> bool:
    return isinstance(value, (float, ValueKind)) and is_ordinary(value)


def _is_part_of_scores(term: Term) -> bool:
    """Whether a term is added that neither masks nor outweighs a mask."""
    large = any(isinstance(value, float) and value > ORDINARY for value in _values(term))
    return isinstance(term, Bias) and not may_mask(term) and not large


def _lowest(value: object) -> float:
    """The lowest number that a value may stand for."""
    if isinstance(value, float):
        return value
    return -math.inf if value is ValueKind.ANY else 0.0


def _only_fills_mask(terms: list[Term]) -> bool:
    """Whether only fills mask, and all of them with one value."""
    fills = {term.value for term in terms if isinstance(term, Fill)}
    return len(fills) == 1 and not any(isinstance(term, Bias) and may_mask(term) for term in terms)


def _sum_may_overflow(terms: Sequence[Term]) -> bool:
    """Whether the sum of two terms may be -inf, each as low as the dtype goes, or nearly so."""
    added = [replace(term, rescaled=()) for term in terms if isinstance(term, (Bias, Fill))]
    total = sum(map(_lowest_number, added))
    low = [term for term in added if _is_low(term)]
    return len(low) > 1 or (len(added) > 1 and bool(low) and _is_infinite(total, low[0]))


def _why_not_a_mask(terms: list[Term], attended: str | None, differentiable: bool) -> Reason:
    """Why the fills cannot be added to the scores as a mask; empty if they can.

    A fill replaces the score and a mask is added to it: both agree only if no score is large enough to matter.
    """
    low = [min(map(_lowest, _values(term)), default=0.0) for term in terms]
    alike = _only_fills_mask(terms)  # The fills are one, of what any of them fills.
    for position, term in enumerate(terms):
        if not isinstance(term, Fill):
            continue
        if term.value > FAR_BELOW and term.value > torch.finfo(term.dtype).min:
            return Reason(
                f"{term.value:g} is filled in for masked scores, but other scores may be as low, so the fill does not "
                "mask "
                "(fill with -inf or torch.finfo(dtype).min)"
            )
        masks = sum(value < -1.0 for value in low)
        if term.dtype is torch.float64:
            # Which resolves scores beside a number that float32 does not.
            masks = sum(map(_may_mask, terms))
        if (
            term.value > ABSORBING
            and attended is None
            and ((masks > 1 and not alike) or any(isinstance(later, Bias) for later in terms[position:]))
        ):
            return Reason(
                f"{term.value:g} is filled in together with another mask or bias, and which key a row without a key "
                "attends depends on both (fill with -inf or torch.finfo(dtype).min)"
            )
    if differentiable and attended is None and any(isinstance(term, Floor) for term in terms):
        return Reason(
            "in a row whose keys are all masked the gradient is split between the scores and their lower bound (clamp, "
            "maximum) (if "
            "no such row occurs, set options={'assume_attended_rows': True})"
        )
    fills = [position for position, term in enumerate(terms) if isinstance(term, Fill)]
    biases = [position for position, term in enumerate(terms) if isinstance(term, Bias)]
    # A bias that is added last has a gradient in rows that are filled.
    entangled = fills and any(
        fills[0] < bias and (bias < fills[-1] or _values(terms[fills[0]]) == [-math.inf]) for bias in biases
    )
    if differentiable and attended is None and fills and (entangled or not _only_fills_mask(terms)):
        return Reason(
            "a fill stops the gradient and a bias passes it on, and a row that both mask may have no key (if no such "
            "row occurs, set options={'assume_attended_rows': True})"
        )
    return FINE
