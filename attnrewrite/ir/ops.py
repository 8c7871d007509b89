"""What an operator is: every table of operators, and every predicate on them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.torch_private import OpOverload, is_composite, schema_of

__all__ = [
    "ADD_OPS",
    "ALL_OPS",
    "ANY_OPS",
    "ARANGE_OPS",
    "AS_STRIDED_OPS",
    "CAST_OPS",
    "CAT_OPS",
    "CLAMP_OPS",
    "CONVOLUTION_OPS",
    "COPY_OPS",
    "DIV_OPS",
    "EMPTY_OPS",
    "EQ_OPS",
    "FACTORY_OPS",
    "FILLED_OPS",
    "LE_OPS",
    "LOG_SOFTMAX_OPS",
    "MASKED_FILL_OPS",
    "MATRIX_OPS",
    "MOVE_OPS",
    "MUL_OPS",
    "NE_OPS",
    "NORM_OPS",
    "NOT_OPS",
    "ONES_OPS",
    "PAD_OPS",
    "PIECE_OPS",
    "PROJECTION_OPS",
    "REMAINDER_OPS",
    "RESHAPE_OPS",
    "SCATTER_OPS",
    "SOFTMAX_OPS",
    "SPLIT_OPS",
    "STORED_NORM_OPS",
    "SUB_OPS",
    "TRIANGLE_OPS",
    "VIEW_OPS",
    "WHERE_OPS",
    "ZEROS_OPS",
    "has_effect",
    "is_cast",
    "is_elementwise",
    "is_function",
    "is_pointwise",
    "is_pure",
    "is_random",
    "is_view",
    "may_share_memory",
    "same_argument",
    "shares_memory",
    "writes",
]

aten = torch.ops.aten

VIEW_OPS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.t.default,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.select.int,
        aten.slice.Tensor,
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
        aten._to_copy.default,
    }
)

SPLIT_OPS = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
    }
)
"""Operators that return the parts of their first argument as a list."""

PIECE_OPS = SPLIT_OPS | {
    aten.slice.Tensor,
    aten.select.int,
    aten.index_select.default,
    aten.roll.default,
}
"""Operators whose result holds entries of their first argument, and no others."""

RESHAPE_OPS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})

COPY_OPS = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    }
)
"""Operators whose result has the shape and the entries of their argument."""

MOVE_OPS = (
    VIEW_OPS
    | COPY_OPS
    | {
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.index_select.default,
        aten.index.Tensor,
        aten.gather.default,
        aten.roll.default,
        aten.flip.default,
    }
)
"""Operators that only move entries of their first argument about."""

CAT_OPS = frozenset({aten.cat.default, aten.stack.default})
PAD_OPS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
INDICES, REPEATS = -1, -2

REORDERING_OPS = {
    **dict.fromkeys((aten.cat, aten.stack, aten.flip, aten.slice, aten.select, aten.index_select, aten.gather), 1),
    **dict.fromkeys((aten.sort, aten.unbind, aten.index_copy, aten.index_add, aten.scatter, aten.scatter_add), 1),
    **dict.fromkeys((aten.cumsum, aten.cumprod, aten.logcumsumexp), 1),
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.roll, aten.topk), 2),
    **dict.fromkeys((aten.slice_scatter, aten.select_scatter), 2),
    **dict.fromkeys((aten.index, aten.index_put), INDICES),
    aten.repeat: REPEATS,
}
"""Operators that may change which entries there are along a dimension or their order, each with the place of the
dimension among its arguments; or that have positions for each, or numbers of repetitions."""

SCATTER_OPS = frozenset({aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default})
"""Operators that put their second argument in the place of a part of the first."""

AS_STRIDED_OPS = frozenset({aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default})
"""Operators that count from where the first argument's memory begins."""

ADD_OPS = frozenset({aten.add.Tensor, aten.add.Scalar})
SUB_OPS = frozenset({aten.sub.Tensor, aten.sub.Scalar})
MUL_OPS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
DIV_OPS = frozenset({aten.div.Tensor, aten.div.Scalar})
REMAINDER_OPS = frozenset({aten.remainder.Scalar, aten.remainder.Tensor})
CLAMP_OPS = frozenset({aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default})

WHERE_OPS = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar})
MASKED_FILL_OPS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
EQ_OPS = frozenset({aten.eq.Scalar, aten.eq.Tensor})
NE_OPS = frozenset({aten.ne.Scalar, aten.ne.Tensor})
LE_OPS = frozenset({aten.le.Scalar, aten.le.Tensor})
NOT_OPS = frozenset({aten.bitwise_not.default, aten.logical_not.default})
ALL_OPS = frozenset({aten.all.dim, aten.all.dims})
ANY_OPS = frozenset({aten.any.dim, aten.any.dims})
TRIANGLE_OPS = frozenset({aten.tril.default, aten.triu.default})

SOFTMAX_OPS = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
PARTIAL_OPS = frozenset(
    {aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default, aten.sqrt.default, aten.rsqrt.default}
)
"""Functions that give NaN for negative numbers."""

LOG_SOFTMAX_OPS = (aten.log_softmax.int, aten._log_softmax.default)
MATRIX_OPS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
CONVOLUTION_OPS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
PROJECTION_OPS = CONVOLUTION_OPS | {aten.linear.default, aten.addmm.default}
NORM_OPS = frozenset({aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default})
"""Normalizations of a tensor's entries by their own mean or size, but not over a batch."""

STORED_NORM_OPS = frozenset({aten._native_batch_norm_legit_no_training.default})
"""Batch norm with stored statistics; the first result is the normalized tensor."""

ZEROS_OPS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})
ONES_OPS = frozenset({aten.ones.default, aten.ones_like.default, aten.new_ones.default})
FILLED_OPS = frozenset({aten.full.default, aten.zeros.default, aten.ones.default})
"""Operators that are given a shape and make a tensor of one number of it."""
ARANGE_OPS = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})
EMPTY_OPS = frozenset(
    {
        *(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default),
        *(aten.empty_strided.default, aten.new_empty_strided.default),
    }
)
FACTORY_OPS = frozenset(
    {
        *(*ZEROS_OPS, *ONES_OPS, *EMPTY_OPS),
        *(aten.full.default, aten.full_like.default, aten.new_full.default),
    }
)
"""Operators whose result is one number everywhere, or not written to yet, whatever tensor they are given."""


def is_view(node: fx.Node) -> bool:
    return node.target in VIEW_OPS


def is_cast(node: fx.Node) -> bool:
    """Whether the node changes the dtype and not the device."""
    return node.target in CAST_OPS and is_tensor(node.args[0]) and tensor(node).device == tensor(node.args[0]).device


def _tags(target: Any) -> Sequence[torch.Tag]:
    return target.tags if isinstance(target, OpOverload) else ()


def writes(node: fx.Node) -> bool:
    """Whether the operator writes to an argument, or changes something else."""
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable)


def has_effect(node: fx.Node) -> bool:
    """Whether a call does more than to give its result, or may do so; a draw of random numbers does not count."""
    return node.target is not operator.getitem and (schema_of(node.target) is None or writes(node))


def is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in _tags(node.target)


def is_function(target: Any) -> bool:
    """Whether an operator says that its result depends on its arguments alone, and that it writes to none of them."""
    if target is operator.getitem:
        return True
    schema = schema_of(target)
    return schema is not None and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in _tags(target)


def is_pure(node: fx.Node) -> bool:
    """Whether the operator mutates nothing and returns the same for the same arguments; False outside of ATen."""
    return isinstance(node.target, OpOverload) and _is_pure(node.target)


@functools.cache
def _is_pure(target: OpOverload) -> bool:
    return is_function(target) and target.namespace == "aten"


def is_elementwise(node: fx.Node) -> bool:
    """Whether the operator says that it computes entry by entry, its arguments broadcast, be they random or others'."""
    # Not all overloads of `where` have the tag.
    return torch.Tag.pointwise in _tags(node.target) or node.target in WHERE_OPS


def is_pointwise(node: fx.Node) -> bool:
    """Whether each entry of the result depends only on the entries of the arguments that broadcast to its position."""
    return isinstance(node.target, OpOverload) and _is_pure(node.target) and is_elementwise(node)


def shares_memory(node: fx.Node) -> bool:
    """Whether the node may be a view of its argument, or one of several, by what its operator says.

    The unsafe splits are views as well, though their schema does not say so.
    """
    schema = schema_of(node.target)
    aliases = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return aliases or node.target in VIEW_OPS or node.target in SPLIT_OPS or node.target is operator.getitem


def may_share_memory(node: fx.Node) -> bool:
    """Whether the node may be a view of its argument, or its argument itself, as the inner compiler computes it.

    An operator that decomposes into others (einsum, to, dropout that drops nothing) may come down to a view.
    """
    target = node.target
    return shares_memory(node) or (
        isinstance(target, OpOverload) and is_composite(target) and target not in _OWN_MEMORY
    )


_OWN_MEMORY = frozenset({aten.linear.default, aten.matmul.default, aten.layer_norm.default, aten.conv2d.default})
"""Operators that decompose into others, and never return their argument."""


_SYMBOLIC = (torch.SymInt, torch.SymFloat)


def same_argument(a: Any, b: Any) -> bool:
    """Whether two arguments of operators are known to be equal for all inputs; tensors are equal only to themselves."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        numbers = [value for value in (a.meta.get("val"), b.meta.get("val")) if isinstance(value, _SYMBOLIC)]
        return a is b or (len(numbers) == 2 and statically_known_true(numbers[0] == numbers[1]))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_argument, a, b))
    return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)
