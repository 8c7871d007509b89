"""Projections behind the operands of an attention."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.bounds import BESIDE_ATTENTION
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.ops import NORM_OPS, PAD_OPS, PIECE_OPS, is_cast, is_pointwise
from attnrewrite.ir.views import is_layout_op
from attnrewrite.torch_private import is_erased

__all__ = ["ROW_WISE", "is_piece", "is_row_wise", "projections_behind", "treats_rows_alike"]

aten = torch.ops.aten


_LINEAR = frozenset({aten.linear.default})


def projections_behind(operand: fx.Node, products: Collection[Any] = _LINEAR) -> list[fx.Node]:
    """The projections that an operand of an attention is computed from, behind views, slices, norms and arithmetic.

    Args:
        operand: the node of the operand.
        products: the operators that count as projections.
    """
    found: dict[fx.Node, None] = {}
    seen = [] if is_erased(operand) else [operand]
    for node in seen:
        if node.target in products:
            found[node] = None
        elif is_row_wise(node) or is_piece(node) or node.target is aten.cat.default or node.target in PAD_OPS:
            others = [source for source in node.all_input_nodes if source not in seen]
            seen += [source for source in others if BESIDE_ATTENTION.allows(len(seen) + 1)]
    return list(found)


def is_piece(node: fx.Node) -> bool:
    """Whether the node takes a part of its operand: a slice, a split, or one result of a split."""
    return node.target in PIECE_OPS or node.target is operator.getitem


ROW_WISE = NORM_OPS | {aten.linear.default}


def is_row_wise(node: fx.Node) -> bool:
    """Whether the node is a projection, a norm, a view, a cast or elementwise."""
    return node.target in ROW_WISE or is_layout_op(node) or is_cast(node) or is_pointwise(node)


def treats_rows_alike(node: fx.Node) -> bool:
    """Whether a projection or norm does the same to every row: ``linear`` takes a bias of several rows, too."""
    args: Any = node.args
    if node.target is not aten.linear.default:
        return True
    weight, biases = args[1], [arg for arg in (*args[2:], *node.kwargs.values()) if is_tensor(arg)]
    return is_tensor(weight) and tensor(weight).dim() == 2 and all(tensor(bias).dim() == 1 for bias in biases)
