"""What an operator is: every table of operators, and every predicate on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.torch_private import schema_of

__all__ = ["CAST_OPS", "SPLIT_OPS", "VIEW_OPS", "is_cast", "is_pointwise", "is_pure", "is_view", "same_argument"]

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


SPLIT_OPS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
        aten.unbind.int,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        aten.unsafe_chunk.default,
    }
)
"""Operators that return the parts of their first argument as a list."""


def is_view(node: fx.Node) -> bool:
    return node.target in VIEW_OPS


def is_cast(node: fx.Node) -> bool:
    """Whether the node changes the dtype and not the device."""
    return node.target in CAST_OPS and is_tensor(node.args[0]) and tensor(node).device == tensor(node.args[0]).device


def _tags(node: fx.Node) -> Sequence[torch.Tag]:
    return getattr(node.target, "tags", ())


def is_pure(node: fx.Node) -> bool:
    """Whether the operator mutates nothing and returns the same for the same arguments; False outside of ATen."""
    target: Any = node.target
    schema = schema_of(target)
    random = torch.Tag.nondeterministic_seeded in _tags(node)
    return schema is not None and target.namespace == "aten" and not schema.is_mutable and not random


def is_pointwise(node: fx.Node) -> bool:
    """Whether each entry of the result depends only on the entries of the arguments that broadcast to its position."""
    return is_pure(node) and (torch.Tag.pointwise in _tags(node) or node.target in _WHERE)


_WHERE = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar})
"""Not all of them have the tag."""


_SYMBOLIC = (torch.SymInt, torch.SymFloat)


def same_argument(a: Any, b: Any) -> bool:
    """Whether two arguments of operators are known to be equal for all inputs; tensors are equal only to themselves."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        numbers = [value for value in (a.meta.get("val"), b.meta.get("val")) if isinstance(value, _SYMBOLIC)]
        return a is b or (len(numbers) == 2 and statically_known_true(numbers[0] == numbers[1]))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_argument, a, b))
    return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)
