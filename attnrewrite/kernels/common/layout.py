"""Bringing an operand into the order of dimensions that a kernel takes, by views wherever views can do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.axes import Axis, Dim, Layout, Operand, resolve, size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, memory_order, same, same_shape, tensor
from attnrewrite.ir.site import CanonicalAttention, Scale, WeightMod

__all__ = ["KernelLayout", "in_memory_order_of", "lay_out", "modified", "padded", "padded_to", "with_unit_stride"]

aten = torch.ops.aten


def lay_out(builder: Builder, node: fx.Node, layout: Layout, wanted: Sequence[Dim], expand: bool = False) -> fx.Node:
    """``node`` as a tensor of ``len(wanted)`` dimensions.

    Args:
        layout: the axes that ``node``'s dimensions are.
        wanted: the axes that the result's dimensions shall be, major to minor. Axes that ``node`` lacks give size one,
            or with ``expand`` their full size; where a dimension mixes axes that it has and lacks, they are expanded.
    """
    layout = resolve(layout)
    wanted = resolve(wanted)
    have = {axis for dim in layout for axis in dim}
    order = [axis for dim in wanted for axis in dim if axis in have]
    assert set(order) == have, f"{node} has axes that are not wanted"

    atoms = [axis for dim in layout for axis in dim]
    singles: list[Size] = []  # The wanted axes one by one, those that are missing with size one.
    full: list[Size] = []  # The same with the missing ones expanded, where they must be.
    merged: list[Size] = []  # The wanted dimensions.
    for dim in wanted:
        present = any(axis in have for axis in dim)
        if not dim or not (present or expand):
            singles.append(1)
            full.append(1)
            merged.append(1)
            continue
        singles.extend(axis.size if axis in have else 1 for axis in dim)
        full.extend(axis.size for axis in dim)
        merged.append(size_of(dim))

    if order != atoms:
        node = _reshaped(builder, node, [axis.size for axis in atoms])
        node = builder.call(aten.permute.default, node, [atoms.index(axis) for axis in order])
    if not same_shape(full, singles):
        node = builder.call(aten.expand.default, _reshaped(builder, node, singles), full)
    return _reshaped(builder, node, merged)


def _reshaped(builder: Builder, node: fx.Node, shape: Sequence[Size]) -> fx.Node:
    if same_shape(tensor(node).shape, shape):
        return node
    return builder.call(aten.reshape.default, node, list(shape))


def padded(builder: Builder, node: fx.Node, dim: int, value: float) -> fx.Node:
    """``node`` with one more entry of ``value`` at the end of ``dim``, counted from the last.

    Features that are not side by side are laid out so before: padding keeps channels last, and kernels refuse the mask.
    Nothing that is expanded over its features counts as channels last.
    """
    if not same(tensor(node).stride()[-1], 0):
        node = with_unit_stride(builder, node)
    fake = tensor(node)
    shape = [*fake.shape]
    shape[dim] = shape[dim] + 1
    pads = [0, 0] * (-1 - dim) + [0, 1]
    # Evaluated by hand: the operator's own fake would fix the symbolic size.
    return builder.insert(aten.constant_pad_nd.default, (node, pads, value), {}, fake.new_empty(shape))


def padded_to(builder: Builder, node: fx.Node, dim: int, multiple: int) -> fx.Node:
    """``node`` with zeros behind ``dim``, counted from the last, up to a multiple; itself if it is known to be one."""
    size = tensor(node).shape[dim]
    missing = -size % multiple
    if same(missing, 0):
        return node
    node = with_unit_stride(builder, node)
    shape = [*tensor(node).shape]
    shape[dim] = size + missing
    pads = [0, 0] * (-1 - dim) + [0, missing]
    return builder.insert(aten.constant_pad_nd.default, (node, pads, 0.0), {}, tensor(node).new_empty(shape))


def with_unit_stride(builder: Builder, node: fx.Node) -> fx.Node:
    """Fused kernels want the features of one position side by side, and those of another elsewhere.

    Windows of a series (``x.unfold(1, window, 1)``) overlap, and PyTorch's kernel for the CPU reads other numbers.

    A view may give a single feature the stride of the positions. The tensor then counts as one with channels last, is
    padded as such, and is refused:
    https://github.com/pytorch/pytorch/blob/v2.13.0/c10/core/MemoryFormat.h is_channels_last_strides_2d_s4
    """
    strides, shape = tensor(node).stride(), tensor(node).shape
    overlaps = len(shape) > 1 and all(
        map(statically_known_true, (shape[-2] > 1, strides[-2] > 0, strides[-2] < shape[-1]))
    )
    if not overlaps and same(strides[-1], 1):
        return node
    return builder.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def in_memory_order_of(original: torch.Tensor, node: fx.Node, builder: Builder) -> fx.Node:
    """``node`` copied so that its dimensions lie in memory as the original's did (an einsum's result is permuted)."""
    order = memory_order(original)
    if order == list(range(original.dim())):
        return builder.copied(node, memory_format=torch.contiguous_format)
    permuted = builder.call(aten.permute.default, node, order)
    copied = builder.copied(permuted, memory_format=torch.contiguous_format)
    return builder.call(aten.permute.default, copied, [order.index(dim) for dim in range(original.dim())])


def modified(builder: Builder, node: fx.Node, mod: WeightMod, dims: tuple[Dim, ...]) -> fx.Node:
    """``node``, whose dimensions are ``dims``, scaled, or zero where a condition holds."""
    if isinstance(mod, Scale):
        amount = mod.factor
        if isinstance(amount, Operand):
            amount = lay_out(builder, amount.node, amount.layout, dims)
        return builder.call(aten.div.Tensor if mod.divide else aten.mul.Tensor, node, amount)
    condition = lay_out(builder, mod.condition.node, mod.condition.layout, dims)
    if mod.multiplied:
        return builder.call(aten.mul.Tensor, node, condition)
    if tensor(condition).dtype is not torch.bool:
        condition = builder.call(aten.ne.Scalar, condition, 0)
    if mod.invert:
        return builder.call(aten.where.ScalarOther, condition, node, 0.0)
    return builder.call(aten.where.ScalarSelf, condition, 0.0, node)


@dataclass(frozen=True)
class KernelLayout:
    """The four dimensions of each operand: (batch, heads, length, features)."""

    query_dims: tuple[Dim, ...]
    key_dims: tuple[Dim, ...]
    value_dims: tuple[Dim, ...]
    score_dims: tuple[Dim, ...]
    output_dims: tuple[Dim, ...]
    grouped: bool

    @staticmethod
    def of(site: CanonicalAttention) -> KernelLayout:
        """The last shared axis is the head, unless groups of query heads share the only one; the others are batch."""
        shared, group = site.shared_axes, site.group_axes
        split = len(shared) - 1 if len(shared) > 1 else len(shared) if group else min(len(shared), 1)
        batch: tuple[Axis, ...] = shared[:split]
        heads: tuple[Axis, ...] = shared[split:]
        query_heads = (*heads, *group)
        return KernelLayout(
            query_dims=(batch, query_heads, site.query_axes, site.feature_axes),
            key_dims=(batch, heads, site.key_axes, site.feature_axes),
            value_dims=(batch, heads, site.key_axes, site.value_axes),
            score_dims=(batch, query_heads, site.query_axes, site.key_axes),
            output_dims=(batch, query_heads, site.query_axes, site.value_axes),
            grouped=bool(group),
        )

    def operands(
        self,
        builder: Builder,
        site: CanonicalAttention,
        *,
        order: Sequence[int] = (0, 1, 2, 3),
        score_factors: bool = True,
        finish: Callable[[Builder, fx.Node], fx.Node] | None = None,
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Query, key and value as the kernel takes them: laid out, with their factors applied, in the compute dtype.

        Args:
            order: which of (batch, heads, length, features) comes first, second, ...
            score_factors: whether factors of the scores that are query's or key's are applied; without it the kernel
                applies all that is done to the scores by itself.
            finish: done to each at last, such as :func:`with_unit_stride`.
        """
        scores = site.scores

        def operand(part: Operand, dims: tuple[Dim, ...], mods: Sequence[WeightMod]) -> fx.Node:
            dims = tuple(dims[place] for place in order)
            node = lay_out(builder, part.node, part.layout, dims, expand=True)
            own = tensor(node).dtype
            if mods and own is not site.compute_dtype and torch.promote_types(own, site.compute_dtype) is not own:
                # Factors may leave the range of the narrower dtype.
                node = builder.call(aten.to.dtype, node, site.compute_dtype)
            for mod in mods:
                node = modified(builder, node, mod, dims)
            if tensor(node).dtype is not site.compute_dtype:
                node = builder.call(aten.to.dtype, node, site.compute_dtype)
            return node if finish is None else finish(builder, node)

        return (
            operand(site.query, self.query_dims, scores.query_factors if score_factors else ()),
            operand(site.key, self.key_dims, scores.key_factors if score_factors else ()),
            operand(site.value, self.value_dims, scores.value_mods),
        )

    def as_result(self, builder: Builder, site: CanonicalAttention, output: fx.Node) -> fx.Node:
        """The kernel's output, whose dimensions are ``output_dims``, as the source's result."""
        for mod in site.scores.output_mods:
            output = modified(builder, output, mod, self.output_dims)
        dtype = tensor(site.result).dtype
        if tensor(output).dtype is not dtype:
            output = builder.call(aten.to.dtype, output, dtype)
        # A value that is expanded along its features has no axis for them.
        return lay_out(builder, output, self.output_dims, site.result_layout, expand=True)
