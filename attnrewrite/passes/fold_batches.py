"""Batches that share their keys and values, as one batch with more queries.

    softmax(query[f] @ key) @ value  for all f  =  softmax(fold(query) @ key) @ value,  fold: f and length as one

Rows of softmax are independent, so an axis that key and value lack may be counted among the query positions, and
nothing is repeated. The other way to do without copies is that of grouped queries, which counts the axis among the
heads.

The rule: queries are folded where their memory is not that of grouped heads already, so that grouping would copy them:
frames stand outside the positions, (batch, frame, position, head, feature), and heads inside. A mask must have all of
the folded positions or none: one of a few of them would be written out for all. Under a causal mask, a window or an
isolated block positions count, and nothing is folded.
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
    """The site in which axes that key and value lack are query positions, where the rule says so: its ``folded``.

    What was proved of its mask holds for every row by itself, and so for those of all batches.
    """
    scores, groups = site.scores, site.group_axes
    if not groups or site.is_causal or scores.is_causal or scores.band is not None or scores.isolated is not None:
        return site
    strides = _strides(site.query)
    if _is_one_dimension(KernelLayout.of(site).query_dims[1], strides):
        return site
    folded, positions = _beside(groups, site.query_axes, strides)
    if not folded:
        # They are copied either way; kernels that take no grouped heads take these.
        folded, positions = groups, (*groups, *site.query_axes)
    if all(_has_all_or_none(operand, positions) for operand in site.modifiers):
        return replace(site, query_axes=positions, folded=folded)
    return site


def _strides(operand: Operand) -> dict[Axis, Size]:
    """How far apart in memory the entries of each axis are."""
    strides: dict[Axis, Size] = {}
    operand = operand.resolved()
    for dim, own in zip(operand.layout, tensor(operand.node).stride(), strict=True):
        stride: Size = own
        for axis in reversed(dim):
            strides[axis] = stride
            stride = stride * axis.size
    return strides


def _is_one_dimension(axes: Sequence[Axis], strides: dict[Axis, Size]) -> bool:
    """Whether the axes, major to minor, lie in memory as one dimension does."""
    return all(_holds(major, minor, strides) for major, minor in itertools.pairwise(axes))


def _holds(major: Axis, minor: Axis, strides: dict[Axis, Size]) -> bool:
    return same(strides[major], minor.size * strides[minor])


def _beside(
    groups: tuple[Axis, ...], positions: tuple[Axis, ...], strides: dict[Axis, Size]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The groups that lie next to the query positions in memory, and the positions with them."""
    if not positions or not _is_one_dimension(positions, strides):
        return (), positions
    folded: tuple[Axis, ...] = ()
    left = [*groups]
    while left:
        outside = next((axis for axis in left if _holds(axis, positions[0], strides)), None)
        inside = next((axis for axis in left if _holds(positions[-1], axis, strides)), None)
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
