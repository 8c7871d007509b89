"""Folds batches that share keys and values into the query positions of one batch.

    softmax(query[f] @ key) @ value  for all f  =  softmax(fold(query) @ key) @ value,  fold: f and length as one

Rows of softmax are independent, so an axis that key and value lack may be counted among the query positions, and key
and value need no copies. The alternative without copies is GQA, which counts the axis among the heads.

An axis is folded if the query's memory layout is not the one of grouped heads, so that GQA would have to copy the
query: in (batch, frame, position, head, feature) frames lie outside the positions, and heads inside. A mask must have
either all folded axes or none of them; otherwise it would have to be expanded. Nothing is folded under a causal mask, a
window or an isolated block, since these depend on the index of a position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from attnrewrite.ir.axes import Axis, Operand
from attnrewrite.ir.nodes import Size, same, tensor
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.layout import KernelLayout

__all__ = ["with_folded_batches"]


def with_folded_batches(site: CanonicalAttention) -> CanonicalAttention:
    """The site with axes that key and value lack folded into the query positions (``folded``), or the site unchanged.

    What was proved of the mask holds for each row separately, and so for the rows of all batches.
    """
    scores, groups = site.scores, site.group_axes
    if not groups or site.is_causal or scores.is_causal or scores.band is not None or scores.isolated is not None:
        return site
    strides = _strides(site.query)
    rows = KernelLayout.of(site).query_dims[1]
    # Where there is a single key, a batch of its own counts among the query positions.
    if any(axis not in strides for axis in (*rows, *site.query_axes)) or _is_one_dimension(rows, strides):
        return site
    folded, positions = _contiguous_with(groups, site.query_axes, strides)
    if not folded:
        # The query is copied either way, and kernels without GQA take the folded form.
        folded, positions = groups, (*groups, *site.query_axes)
    if all(_has_all_or_none(operand, positions) for operand in site.modifiers):
        return replace(site, query_axes=positions, folded=folded)
    return site


def _strides(operand: Operand) -> dict[Axis, Size]:
    """The stride of each axis of the operand."""
    strides: dict[Axis, Size] = {}
    operand = operand.resolved()
    for dim, own in zip(operand.layout, tensor(operand.node).stride(), strict=True):
        stride: Size = own
        for axis in reversed(dim):
            strides[axis] = stride
            stride = stride * axis.size
    return strides


def _is_one_dimension(axes: Sequence[Axis], strides: dict[Axis, Size]) -> bool:
    """Whether the axes, major to minor, are contiguous with each other, as one dimension is."""
    return all(_are_contiguous(major, minor, strides) for major, minor in itertools.pairwise(axes))


def _are_contiguous(major: Axis, minor: Axis, strides: dict[Axis, Size]) -> bool:
    return same(strides[major], minor.size * strides[minor])


def _contiguous_with(
    groups: tuple[Axis, ...], positions: tuple[Axis, ...], strides: dict[Axis, Size]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The group axes that are contiguous with the query positions, and the positions with these axes added."""
    if not positions or not _is_one_dimension(positions, strides):
        return (), positions
    folded: tuple[Axis, ...] = ()
    left = [*groups]
    while left:
        outside = next((axis for axis in left if _are_contiguous(axis, positions[0], strides)), None)
        inside = next((axis for axis in left if _are_contiguous(positions[-1], axis, strides)), None)
        axis = outside if outside is not None else inside
        if axis is None:
            break
        positions = (axis, *positions) if axis is outside else (*positions, axis)
        folded = (*folded, axis)
        left.remove(axis)
    return folded, positions


def _has_all_or_none(operand: Operand, positions: tuple[Axis, ...]) -> bool:
    own = set(operand.resolved().axes) & set(positions)
    return not own or own == set(positions)
