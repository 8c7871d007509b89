"""What an operator is: every table of operators, and every predicate on them."""

from __future__ import annotations

import torch
from torch import fx

from attnrewrite.ir.nodes import is_tensor, tensor

__all__ = ["CAST_OPS", "VIEW_OPS", "is_cast", "is_view"]

aten = torch.ops.aten

VIEW_OPS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.reshape_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.t.default,
        aten.mT.default,
        aten.mH.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.expand_as.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.alias.default,
        aten.diagonal.default,
        aten.detach.default,
    }
)
"""Operators whose result shares memory with their first argument, or may."""

CAST_OPS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.other,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
    }
)


def is_view(node: fx.Node) -> bool:
    return node.target in VIEW_OPS


def is_cast(node: fx.Node) -> bool:
    """A change of dtype and of nothing else."""
    return node.target in CAST_OPS and is_tensor(node.args[0]) and tensor(node).device == tensor(node.args[0]).device
