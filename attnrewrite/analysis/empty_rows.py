"""Conditions that hold exactly for the rows of a softmax that have no key: those whose scores are all minus infinity.

    torch.where((scores == -inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))

Softmax is NaN there. A row with a score that is NaN, or infinite, is another row, whatever softmax makes of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.scores import keeps_numbers, row_maximum
from attnrewrite.analysis.values import constant_value
from attnrewrite.ir.axes import Dim, Layout, axes_of, resolve
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.ops import ALL_OPS, ANY_OPS, EQ_OPS, LE_OPS, NE_OPS, NOT_OPS
from attnrewrite.ir.views import is_layout_op, pull

__all__ = ["EmptyRows"]

aten = torch.ops.aten

_EQUAL = EQ_OPS | LE_OPS
"""Nothing is less than minus infinity, and NaN is not at most anything."""

_REDUCTIONS = (aten.amax.default, aten.max.dim, aten.logsumexp.default)


class EmptyRows:
    """Tells conditions that hold for the empty rows of one softmax."""

    def __init__(self, weights: fx.Node, scores: fx.Node, layout: Layout, dim: int) -> None:
        """
        Args:
            weights: the result of softmax.
            scores: its argument.
            layout: the layout of both.
            dim: the dimension that softmax runs over.
        """
        self._keys: Dim = layout[dim]
        self._weights, self._layout = weights, layout
        self._scores = {scores: layout}
        """The scores, and what they were before steps that no row becomes empty by, or ceases to be."""
        self._follow(scores, layout)

    def _follow(self, node: fx.Node, layout: Layout) -> None:
        while node.op == "call_function":
            args: Any = node.args
            if is_layout_op(node):
                before = pull(node, layout)
                if before is None or set(axes_of(before)) != set(axes_of(layout)):
                    return
                layout = before
            elif _keeps_entries(node):
                pass
            elif node.target is aten.sub.Tensor and not node.kwargs and is_tensor(args[0]) and is_tensor(args[1]):
                # Where the row is not empty, neither is its maximum minus infinity; where it is, the difference is NaN.
                if row_maximum(args[1], args[0], layout, axes_of((self._keys,))) is None:
                    return
                self._scores.clear()
            else:
                return
            node = args[0]
            self._scores.setdefault(node, layout)

    def nodes_of(self, condition: Any, layout: Layout, holds: bool) -> tuple[fx.Node, ...] | None:
        """The nodes that compute ``condition`` from the scores; None unless it holds exactly for the empty rows.

        One that holds for scores of minus infinity will do as well: their weight is zero in other rows.

        Args:
            condition: the condition.
            layout: its layout, in the axes of the scores.
            holds: with False, the condition must fail exactly for the empty rows.
        """
        return self._of_rows(condition, layout, holds) or self._of_entries(condition, layout, holds)

    def _of_rows(self, node: Any, layout: Layout, holds: bool) -> tuple[fx.Node, ...] | None:
        """The nodes of a condition on rows that holds (or with ``holds`` false, fails) exactly for the empty ones."""
        if not is_tensor(node) or node.op != "call_function":
            return None
        args: Any = node.args
        found: tuple[fx.Node, ...] | None = None
        if is_layout_op(node):
            before = pull(node, layout)
            found = None if before is None else self._of_rows(args[0], before, holds)
        elif node.target in NOT_OPS:
            found = self._of_rows(args[0], layout, not holds) if tensor(args[0]).dtype is torch.bool else None
        elif node.target in (*ALL_OPS, *ANY_OPS):
            before = self._before_reduction(node, layout)
            if before is not None and node.target in (ALL_OPS if holds else ANY_OPS):
                found = self._of_entries(args[0], before, holds)
            if before is not None and found is None and holds:
                found = self._of_nan(args[0], before)
        else:
            # The highest score of the row, and the logarithm of their sum, are minus infinity there and nowhere else.
            operand = _compared(node, holds)
            found = None if operand is None else self._of_reduced(operand, layout)
        return None if found is None else (*found, node)

    def _of_entries(self, node: Any, layout: Layout, holds: bool) -> tuple[fx.Node, ...] | None:
        """The nodes of a condition on single scores: that each is (or is not) minus infinity."""
        if not is_tensor(node) or node.op != "call_function":
            return None
        args: Any = node.args
        found: tuple[fx.Node, ...] | None = None
        operand = _compared(node, holds)
        if is_layout_op(node):
            before = pull(node, layout)
            found = None if before is None else self._of_entries(args[0], before, holds)
        elif node.target in NOT_OPS:
            found = self._of_entries(args[0], layout, not holds) if tensor(args[0]).dtype is torch.bool else None
        elif operand is not None:
            found = self._of_scores(operand, layout)
        return None if found is None else (*found, node)

    def _of_nan(self, node: Any, layout: Layout) -> tuple[fx.Node, ...] | None:
        """The nodes of a test of the weights for NaN: where one weight of a row is, all are."""
        tests = is_tensor(node) and node.target is aten.isnan.default and node.args[0] is self._weights
        return (node,) if tests and resolve(layout) == resolve(self._layout) else None

    def _of_reduced(self, node: Any, layout: Layout) -> tuple[fx.Node, ...] | None:
        if not is_tensor(node) or node.op != "call_function":
            return None
        args: Any = node.args
        if is_layout_op(node) or _keeps_entries(node):
            before = pull(node, layout) if is_layout_op(node) else layout
            found = None if before is None else self._of_reduced(args[0], before)
            return None if found is None else (*found, node)
        reduction: Any = args[0] if node.target is operator.getitem and args[1] == 0 else node
        if reduction.target not in _REDUCTIONS or (reduction is node) == (reduction.target is aten.max.dim):
            return None
        before = self._before_reduction(reduction, layout)
        found = None if before is None else self._of_scores(reduction.args[0], before)
        return None if found is None else (*found, *dict.fromkeys((reduction, node)))

    def _of_scores(self, node: Any, layout: Layout) -> tuple[fx.Node, ...] | None:
        """The nodes from the scores to ``node``, which must be the scores up to views and casts that lose nothing."""
        nodes: list[fx.Node] = []
        while is_tensor(node):
            if node in self._scores:
                return tuple(reversed(nodes)) if resolve(self._scores[node]) == resolve(layout) else None
            before = pull(node, layout) if is_layout_op(node) else layout if _keeps_entries(node) else None
            if before is None:
                return None
            nodes.append(node)
            node, layout = node.args[0], before
        return None

    def _before_reduction(self, node: fx.Node, layout: Layout) -> Layout | None:
        """The layout of what ``node`` reduces over the keys alone; None if it reduces anything else."""
        args: Any = node.args
        rank = tensor(args[0]).dim()
        dims: Any = args[1] if len(args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        keep = bool(args[2]) if len(args) > 2 else bool(node.kwargs.get("keepdim"))
        if not rank or not isinstance(dims, Sequence) or len(dims) != 1 or len(layout) != rank - (not keep):
            return None
        dim = int(dims[0]) % rank
        return (*layout[:dim], self._keys, *layout[dim + keep :])


def _compared(node: fx.Node, holds: bool) -> Any:
    """``x`` where the node holds (or with ``holds`` false, fails) exactly where x is minus infinity; else None."""
    args: Any = node.args
    if holds and node.target is aten.isneginf.default:
        return args[0]
    if node.target not in (_EQUAL if holds else NE_OPS):
        return None
    return args[0] if constant_value(args[1]) == -math.inf else None


def _keeps_entries(node: fx.Node) -> bool:
    """Whether the node is a cast that keeps every number as it is, or stops the gradient alone."""
    return node.target is aten.detach.default or keeps_numbers(node)
