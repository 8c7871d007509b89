"""Whether rewritten results are as right as eager's own.

Two rules. In float32 and float64 a result agrees with eager up to the order of summation. In float16 and bfloat16 eager
itself only approximates its formula, and the formula in float64 is the reference: a result is right if it lies no
further from the reference than eager's own does, beyond a few roundings of the dtype; or, where a caller gives what
the reference is for inputs that are rounded once more, no further than those move it.

Results are compared row by row, over the last dimension that has more than one entry, since a row of scores is rounded
as a whole: where eager is far off in one row, the others are judged as strictly as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HALF", "disagreement", "disagreements"]

HALF = (torch.float16, torch.bfloat16)

_FACTOR = 4.0
"""How much further than eager's a result may lie: two results that are rounded independently of each other differ that
much, in the largest of a few errors."""

_ROUNDINGS = 4.0
"""Roundings of half precision beyond that; one is half the distance of two neighbors, relative to the row's scale."""

_BLIND = 32.0
"""The same where eager has NaN or an infinity in place of a number, and so is no measure of how much is rounded."""

_SMALL = 16.0
"""A row smaller than this part of the tensor's largest number has a scale of its own, this many times its largest."""

_SUMMATION = {torch.float32: 1e-5, torch.float64: 1e-10}
"""What another order of summation changes, relative to the row's scale."""

_ABSORBED = 1e-2
"""The most that a row may differ from eager's where eager is far from the reference, relative to the row's scale."""

_NOISE = 1e3
"""Eager is this many times further from the reference than the row is large where it has none of its digits."""


@dataclass(frozen=True)
class _Rows:
    """What is compared, as float64 matrices whose rows are judged one by one.

    Attributes:
        new, own, truth: the rewritten result, eager's and the reference.
        scale: the number that a rounding of each row is relative to, one a row.
        moved: how far the reference moves when the inputs are rounded, or zero.
    """

    new: Tensor
    own: Tensor
    truth: Tensor
    scale: Tensor
    moved: Tensor


def disagreements(
    new: Sequence[Tensor],
    own: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    beside: float = 0.0,
    whole: bool = False,
    roundings: float = _ROUNDINGS,
    moved: Sequence[Sequence[Tensor]] = (),
    names: Sequence[str] = (),
) -> str:
    """What is wrong with the first wrong tensor of several that belong together, in words; empty if nothing is.

    Args:
        new, own, truth, dtype, whole, roundings: as for :func:`disagreement`, for each of the tensors.
        beside: what is small beside the other tensors is measured by this part of their size, which is the lower
            median of their largest numbers, of those that are not zero. For gradients, of which some are differences
            of large numbers, or nothing but rounding, while others are sums of many.
        moved: draws of the reference with inputs that are rounded once more, each with all of the tensors. A number
            that such a rounding moves is not known better than that, however near to it eager comes: a sum of many
            rounded numbers, in which eager's one error may be small by luck, or a difference of nearly equal ones.
        names: what to call each tensor; its number by default.
    """
    sizes = sorted(filter(None, (_largest(value.double()) for value in truth if value.numel())))
    floor = beside * sizes[(len(sizes) - 1) // 2] if sizes else 0.0
    for index, (n, o, t) in enumerate(zip(new, own, truth, strict=True)):
        draws = [draw[index] for draw in moved]
        wrong = disagreement(n, o, t, dtype, floor=floor, whole=whole, roundings=roundings, moved=draws)
        if wrong:
            name = names[index] if names else f"number {index + 1} of {len(new)}" if len(new) > 1 else ""
            return f"{name}: {wrong}" if name else wrong
    return ""


def disagreement(
    new: Tensor,
    own: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    *,
    floor: float = 0.0,
    whole: bool = False,
    roundings: float = _ROUNDINGS,
    moved: Sequence[Tensor] = (),
) -> str:
    """What is wrong with a rewritten result, in words; empty if nothing is.

    NaN and infinities are held to both: where eager and the reference agree on one, it must be there; where only one of
    them has it, it may be there, and a finite number is held to the one that is finite. Results that are no floating
    numbers must be equal to eager's or to the reference's.

    Args:
        new: the rewritten result, of any shape.
        own: eager's result, with the shape and the dtype that ``new`` must have.
        truth: the source's formula in float64 on the same inputs, of the same shape.
        dtype: the dtype that the source computes in, which may be lower than that of its results.
        floor: the least number that roundings are relative to, in the unit of the results.
        whole: each tensor is one row, as is right where its rows are sums over the same things: gradients of weights.
        roundings: how many roundings beyond eager's error are allowed. GPU kernels that split float32 into parts of
            TF32, or add up in any order, need more than the default of 4.
        moved: draws of ``truth`` with inputs that are rounded once more, as for :func:`disagreements`; for half
            precision.
    """
    if new.shape != own.shape or new.dtype != own.dtype:
        return f"{new.dtype} {tuple(new.shape)} in place of {own.dtype} {tuple(own.shape)}"
    if truth.shape != own.shape:
        return f"the reference is {tuple(truth.shape)}, eager's result {tuple(own.shape)}"
    if not own.numel():
        return ""
    if not own.is_floating_point() or not truth.is_floating_point():
        other = (new != own) & (new != truth)
        return f"{int(other.sum())} of {new.numel()} are neither eager's nor the reference's" if other.any() else ""
    draws = [_matrix(draw, whole) for draw in moved]
    rows = _rows(_matrix(new, whole), _matrix(own, whole), _matrix(truth, whole), draws, floor)
    if dtype in HALF:
        return _misplaced(rows.new, (rows.own, rows.truth)) or _beyond_own_error(rows, dtype, roundings)
    return _misplaced(rows.new, (rows.own,)) or _beyond_summation(rows, dtype, roundings)


def _rows(new: Tensor, own: Tensor, truth: Tensor, draws: Sequence[Tensor], floor: float) -> _Rows:
    # Where the reference is no number, eager's is what is asked for.
    own_largest = _finite(torch.where(truth.isfinite(), truth, own)).abs().amax(-1, keepdim=True)
    scale = (_SMALL * own_largest).clamp(max=_largest(truth)).clamp(min=floor)
    moved = torch.zeros_like(truth)
    for draw in draws:
        moved = torch.maximum(moved, _finite(draw - truth).abs())
    return _Rows(new, own, truth, scale, moved)


def _matrix(value: Tensor, whole: bool) -> Tensor:
    sizes = [size for size in value.shape if size > 1] or [1]
    return value.detach().double().reshape(1 if whole else -1, value.numel() if whole else sizes[-1])


def _finite(value: Tensor) -> Tensor:
    return value.masked_fill(~value.isfinite(), 0.0)


def _largest(value: Tensor) -> float:
    return float(_finite(value).abs().max())


def _misplaced(new: Tensor, allowed: tuple[Tensor, ...]) -> str:
    """NaN and infinities that none of the ``allowed`` results has in this place, or that all have and ``new`` lacks."""
    right = torch.zeros_like(new, dtype=torch.bool)
    for value in allowed:
        right |= torch.where(value.isfinite(), new.isfinite(), (new == value) | (new.isnan() & value.isnan()))
    if bool(right.all()):
        return ""
    kinds = [f"{int(value.isnan().sum())} NaN and {int(value.isinf().sum())} infinities" for value in (new, *allowed)]
    places = f"{int((~right).sum())} of {new.numel()}"
    return f"{kinds[0]} in place of {' or '.join(dict.fromkeys(kinds[1:]))}: {places} are out of place"


def _beyond_own_error(rows: _Rows, dtype: torch.dtype, allowed_roundings: float) -> str:
    unit = torch.finfo(dtype).eps / 2
    # Below the smallest normal number the distance of neighbors stays the same.
    least = allowed_roundings * 2 * unit * torch.finfo(dtype).smallest_normal
    measure = torch.where(rows.truth.isfinite(), rows.truth, rows.own)
    error = _finite(rows.new - measure).abs().amax(-1, keepdim=True)
    own = torch.maximum(_finite(rows.own - measure).abs(), rows.moved).amax(-1, keepdim=True)
    # A row that eager happens to get right is no measure for one that is rounded otherwise.
    typical = own.median()
    blind = (rows.truth.isfinite() & ~rows.own.isfinite()).any(-1, keepdim=True)
    roundings = torch.where(blind, max(_BLIND, allowed_roundings), allowed_roundings)
    allowed = _FACTOR * torch.maximum(own, typical) + roundings * unit * rows.scale + least
    return _worst(error, allowed, own, rows.scale, "the reference")


def _beyond_summation(rows: _Rows, dtype: torch.dtype, allowed_roundings: float) -> str:
    error = _finite(rows.new - rows.own).abs().amax(-1, keepdim=True)
    own = _finite(rows.own - rows.truth).abs().amax(-1, keepdim=True)
    summation = _SUMMATION.get(dtype, max(_SUMMATION.values())) * rows.scale * (allowed_roundings / _ROUNDINGS)
    # What is absorbed by a large number depends on the order of summation, too.
    allowed = summation + torch.minimum(_FACTOR * own, _ABSORBED * rows.scale)
    # Nothing but rounding: a gradient of zero that is the difference of two numbers.
    allowed = torch.where(own > _NOISE * rows.scale, torch.maximum(allowed, _FACTOR * own), allowed)
    return _worst(error, allowed, own, rows.scale, "eager")


def _worst(error: Tensor, allowed: Tensor, own: Tensor, scale: Tensor, measure: str) -> str:
    over = error - allowed
    row = int(over.argmax())
    if over[row] <= 0:
        return ""
    relative = scale[row].clamp_min(1e-300)
    return (
        f"{float(error[row] / relative):.2g} from {measure}, where eager is {float(own[row] / relative):.2g} from the "
        f"reference and {float(allowed[row] / relative):.2g} is allowed (row {row} of {len(error)}, "
        f"relative to {float(scale[row]):.2g})"
    )
