"""Normalization: brings operators that have several spellings to the one that the rest of the package reads.

ATen has many operators under two names (``multiply`` and ``mul``), and tracing keeps the one that the user called. One
walk over the graph renames them, and decomposes a few calls that are short for others. Results stay the same to the
bit, except those of ``addcmul`` and ``addcdiv`` between a matrix product and a softmax (:func:`_multiply_and_add`).
Operators that are not in the table stay as they are. ``tests/capture/vocabulary_2.13.txt`` lists operators before and
after normalization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from attnrewrite.capture.parts import applied_to_all
from attnrewrite.ir.bounds import STEPS_OF_SCORES
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import is_tensor, memory_order, same_shape, tensor
from attnrewrite.ir.ops import CAST_OPS, MASKED_FILL_OPS, SCATTER_OPS, has_effect, is_elementwise, is_random, is_view
from attnrewrite.ir.spans import argument_of, taken_from
from attnrewrite.torch_private import OpOverload, is_erased, schema_of

__all__ = ["ALIASES", "normalize"]

aten = torch.ops.aten

_OTHER_NAMES = {
    "abs": ("absolute",),
    "acos": ("arccos",),
    "acosh": ("arccosh",),
    "asin": ("arcsin",),
    "asinh": ("arcsinh",),
    "atan": ("arctan",),
    "atan2": ("arctan2",),
    "atanh": ("arctanh",),
    "bitwise_and": ("__and__",),
    "bitwise_or": ("__or__",),
    "bitwise_xor": ("__xor__",),
    "cat": ("concat", "concatenate"),
    "clamp": ("clip",),
    "digamma": ("special_digamma", "special_psi"),
    "div": ("divide", "true_divide"),
    "erf": ("special_erf",),
    "erfc": ("special_erfc",),
    "erfinv": ("special_erfinv",),
    "exp2": ("special_exp2",),
    "expm1": ("special_expm1",),
    "ge": ("greater_equal",),
    "gt": ("greater",),
    "i0": ("special_i0",),
    "igamma": ("special_gammainc",),
    "igammac": ("special_gammaincc",),
    "le": ("less_equal",),
    "lgamma": ("special_gammaln",),
    "log1p": ("special_log1p",),
    "logit": ("special_logit",),
    "logsumexp": ("special_logsumexp",),
    "lt": ("less",),
    "matmul": ("linalg_matmul",),
    "mul": ("multiply",),
    "mvlgamma": ("special_multigammaln",),
    "ne": ("not_equal",),
    "neg": ("negative",),
    "outer": ("ger",),
    "polygamma": ("special_polygamma",),
    "sigmoid": ("special_expit",),
    "sinc": ("special_sinc",),
    "sub": ("subtract",),
    "trunc": ("fix",),
}
"""Operators with their other names: ATen implements those by the same call, overload by overload."""


def _aliases() -> dict[Any, Any]:
    aliases: dict[Any, Any] = {
        aten.max.other: aten.maximum.default,
        aten.min.other: aten.minimum.default,
        aten.special_log_softmax.default: aten.log_softmax.int,
        aten.special_softmax.default: aten.softmax.int,
        aten.special_xlogy.default: aten.xlogy.Tensor,
        aten.special_xlogy.other_scalar: aten.xlogy.Scalar_Other,
        aten.special_xlogy.self_scalar: aten.xlogy.Scalar_Self,
    }
    for name, others in _OTHER_NAMES.items():
        packet = getattr(aten, name)
        for other in (getattr(aten, each) for each in others):
            for overload in sorted(set(packet.overloads()) & set(other.overloads())):
                alias, target = getattr(other, overload), getattr(packet, overload)
                takes_tensors = any("Tensor" in str(argument.type) for argument in schema_of(target).arguments)
                if takes_tensors and not schema_of(target).is_mutable:
                    aliases[alias] = target
    return aliases


ALIASES = _aliases()
"""For each overload that is another name: the overload that it stands for."""


def normalize(ir: fx.GraphModule, *, gradients: bool = True) -> None:
    """Brings each operator of ``ir`` to its one spelling, in place.

    Args:
        gradients: whether any part of the program may have gradients; without them ``detach`` does nothing.
    """
    for node in list(ir.graph.nodes):
        if node.op != "call_function" or is_erased(node):
            continue
        rule = _RULES.get(node.target)
        while isinstance(rule, OpOverload):
            node.target = rule
            rule = _RULES.get(rule)
        if rule is not None and not (gradients and rule is _without_gradients):
            rule(ir, node)
    for node in reversed(ir.graph.nodes):
        # Functional tracing leaves views of what was updated in place that nothing reads.
        if is_view(node) and not node.users:
            ir.graph.erase_node(node)


def _replace(node: fx.Node, by: fx.Node) -> None:
    by.meta = {**node.meta}
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    return node.kwargs.get(name, default)


# Booleans.


def _truth_values(target: Any) -> Callable[[fx.GraphModule, fx.Node], None]:
    """The rule that renames logical operators on booleans to ``target``; on numbers they also compare with zero."""

    def rename(ir: fx.GraphModule, node: fx.Node) -> None:
        if all(is_tensor(arg) and tensor(arg).dtype is torch.bool for arg in node.args):
            node.target = target

    return rename


# Concatenation and repetition.


def _concatenate(dim: int, rank: int) -> Callable[[fx.GraphModule, fx.Node], None]:
    """The rule that renames ``vstack`` and the like to ``cat``, unless they raise tensors to ``rank`` first."""

    def rename(ir: fx.GraphModule, node: fx.Node) -> None:
        (parts,) = node.args
        assert isinstance(parts, (list, tuple))
        if all(tensor(part).dim() >= rank for part in parts):
            node.target, node.args = aten.cat.default, (parts, dim)

    return rename


def _hstack(ir: fx.GraphModule, node: fx.Node) -> None:
    (parts,) = node.args
    assert isinstance(parts, (list, tuple))
    if all(tensor(part).dim() >= 1 for part in parts):
        node.target, node.args = aten.cat.default, (parts, 0 if tensor(parts[0]).dim() == 1 else 1)


def _tile(ir: fx.GraphModule, node: fx.Node) -> None:
    source, repeats = node.args
    assert isinstance(repeats, (list, tuple))
    missing = tensor(source).dim() - len(repeats)
    node.target, node.args = aten.repeat.default, (source, [1] * missing + list(repeats))


# Sums and products.


def _reversed_difference(ir: fx.GraphModule, node: fx.Node) -> None:
    subtracted, other = node.args[:2]
    if is_tensor(other):
        node.target, node.args = aten.sub.Tensor, (other, subtracted, *node.args[2:])


def _inner_products(ir: fx.GraphModule, node: fx.Node) -> None:
    """Decomposes ``vecdot`` into ``mul`` and ``sum``.

    Not for two vectors, which have a kernel of their own, nor for complex numbers, which are conjugated.
    """
    left, right = node.args[:2]
    if tensor(left).is_complex() or max(tensor(left).dim(), tensor(right).dim()) < 2:
        return
    builder = Builder(ir, before=node, like=node)
    multiplied = builder.call(aten.mul.Tensor, left, right)
    _replace(node, builder.call(aten.sum.dim_IntList, multiplied, [_argument(node, "dim", -1)]))


def _multiply_and_add(ir: fx.GraphModule, node: fx.Node) -> None:
    """Decomposes ``addcmul`` (``a + value * b * c``) and ``addcdiv`` (``a + value * b / c``).

    Only if it may be an operation on scores: the kernel may round once where the decomposition rounds twice, and
    elsewhere that change of the last bit would serve nothing.
    """
    added, factor, other = node.args[:3]
    value = _argument(node, "value", 1)
    dtypes = {tensor(arg).dtype for arg in (added, factor, other)}
    if len(dtypes) > 1 or not tensor(node).is_floating_point() or not _is_step_of_scores(node):
        return
    builder = Builder(ir, before=node, like=node)
    if not (isinstance(value, (int, float)) and value == 1):
        factor = builder.call(aten.mul.Tensor, factor, value)
    combine = aten.mul.Tensor if node.target is aten.addcmul.default else aten.div.Tensor
    _replace(node, builder.call(aten.add.Tensor, added, builder.call(combine, factor, other)))


_MATRIX_PRODUCTS = frozenset(
    {
        *(aten.matmul.default, aten.linalg_matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default),
        *(aten.baddbmm.default, aten.addmm.default, aten.linear.default, aten.inner.default, aten.tensordot.default),
        aten.sum.dim_IntList,
    }
)
_SOFTMAX = frozenset({aten.softmax.int, aten.special_softmax.default, aten.exp.default})


def _is_step_of_scores(node: fx.Node) -> bool:
    """Whether elementwise operators and views lead from a matrix product to the node, and from there to a softmax."""
    return _reaches(node, lambda step: step.all_input_nodes, _MATRIX_PRODUCTS) and _reaches(
        node, lambda step: step.users, _SOFTMAX
    )


def _reaches(start: fx.Node, neighbors: Callable[[fx.Node], Iterable[fx.Node]], targets: frozenset[Any]) -> bool:
    """Whether one of ``targets`` is found from ``start`` through elementwise nodes, ``STEPS_OF_SCORES`` at most."""
    pending, seen = [start], {start}
    while pending and len(seen) < STEPS_OF_SCORES:
        for other in neighbors(pending.pop()):
            if other.target in targets:
                return True
            if other not in seen and _is_step(other):
                seen.add(other)
                pending.append(other)
    return False


def _is_step(node: fx.Node) -> bool:
    # Fills and assignments do not say that they are elementwise.
    named = node.target in CAST_OPS or node.target in SCATTER_OPS or node.target in MASKED_FILL_OPS
    return named or node.target is aten.index_put.default or is_view(node) or is_elementwise(node)


def _step_on_a_part(ir: fx.GraphModule, node: fx.Node) -> None:
    """Writes a step on a part of the scores as one on all of them, and removes what only the assignment used."""
    if not _is_step_of_scores(node):
        return
    by = applied_to_all(ir, node)
    if by is not None:
        node.replace_all_uses_with(by)
        _remove_unused(node)


def _remove_unused(node: fx.Node) -> None:
    """Removes the node, and those before it that nothing reads any more."""
    pending = [node]
    while pending:
        node = pending.pop()
        if not (is_erased(node) or node.users or node.op != "call_function" or has_effect(node) or is_random(node)):
            pending += node.all_input_nodes
            node.graph.erase_node(node)


# Arguments that are read only for their shape, dtype or device: replaced, so that they are not kept alive for that.


def _fill_value(number: float | None) -> Callable[[fx.GraphModule, fx.Node], None]:
    """The rule that replaces ``zeros_like`` and the like of a computed tensor by ``full`` with ``number``.

    With None, the number is the last argument.
    """

    def spell(ir: fx.GraphModule, node: fx.Node) -> None:
        like, value = node.args[0], node.meta["val"]
        if has_free_unbacked_symbols(value):
            return  # Whether it is contiguous is not to be asked.
        filled = node.args[-1] if number is None else number
        dense = value.is_contiguous() or all(user.target is aten.where.self for user in node.users)
        if not isinstance(like, fx.Node) or like.op != "call_function" or not dense:
            return
        if not isinstance(filled, (bool, int, float)):
            return
        kind = {"dtype": value.dtype, "layout": value.layout, "device": value.device, "pin_memory": False}
        builder = Builder(ir, before=node, like=node)
        _replace(node, builder.insert(aten.full.default, (list(value.shape), filled), kind, value))

    return spell


def _dtype_of_other(ir: fx.GraphModule, node: fx.Node) -> None:
    source, value = node.args[0], node.meta["val"]
    if value.device == tensor(source).device:
        _replace(node, Builder(ir, before=node, like=node).call(aten.to.dtype, source, value.dtype))


def _layout_as_it_is(ir: fx.GraphModule, node: fx.Node) -> None:
    """Of ``to.dtype_layout``, which exported programs have, a cast is left, or nothing."""
    (source,), value = node.all_input_nodes, node.meta["val"]
    kept = any(node.kwargs.get(name) for name in ("copy", "memory_format", "pin_memory"))
    if kept or value.layout != tensor(source).layout:
        return
    builder = Builder(ir, before=node, like=node)
    if value.device != tensor(source).device:
        _replace(node, builder.call(aten.to.device, source, value.device, value.dtype))
    elif value.dtype is not tensor(source).dtype:
        _replace(node, builder.call(aten.to.dtype, source, value.dtype))
    else:
        node.replace_all_uses_with(source)
        ir.graph.erase_node(node)


def _shape_of_other(target: Any) -> Callable[[fx.GraphModule, fx.Node], None]:
    def spell(ir: fx.GraphModule, node: fx.Node) -> None:
        builder = Builder(ir, before=node, like=node)
        _replace(node, builder.call(target, node.args[0], list(tensor(node).shape)))

    return spell


def _without_gradients(ir: fx.GraphModule, node: fx.Node) -> None:
    """Removes ``detach`` of scores or weights, such as that of ``scores.data.masked_fill_``.

    One that an output, or an input that is updated, may be made of stays: it decides which tensors are one object.
    """
    source: Any = node.args[0]
    ends = _MATRIX_PRODUCTS | _SOFTMAX
    between = all(_reaches(node, step, ends) for step in (lambda n: n.all_input_nodes, lambda n: list(n.users)))
    if source.op == "call_function" and between and not _leads_out(node):
        node.replace_all_uses_with(source)
        ir.graph.erase_node(node)


def _leads_out(node: fx.Node) -> bool:
    """Whether anything but a softmax or a matrix product leads to an output, or into an input."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.op == "output" or has_effect(user) or len(seen) > STEPS_OF_SCORES:
                return True
            if user not in seen and user.target not in _MATRIX_PRODUCTS | _SOFTMAX:
                seen.add(user)
                pending.append(user)
    return False


def _assigned_by_numbers(ir: fx.GraphModule, node: fx.Node) -> None:
    """``x[..., rows, columns] = number`` fills where ``mask[..., rows, columns] = True`` does: one boolean mask."""
    args: Any = node.args
    value, indices, number, *accumulate = args
    first = next((place for place, index in enumerate(indices) if index is not None), 0)
    by_number = all(is_tensor(index) and not tensor(index).dtype.is_floating_point for index in indices[first:])
    if any(accumulate) or node.kwargs or not by_number or not is_tensor(number) or tensor(number).numel() != 1:
        return
    if any(tensor(index).dtype in (torch.bool, torch.uint8) for index in indices[first:]) or tensor(number).dim() > 1:
        return
    if not _is_step_of_scores(node):
        return
    builder = Builder(ir, before=node, like=node)
    kind = {"dtype": torch.bool, "device": tensor(value).device, "pin_memory": False}
    shape = tensor(value).shape[first : len(indices)]
    mask = _triangle(indices[first:], shape, builder, tensor(value).device)
    if mask is None:
        nothing = builder.call(aten.full.default, list(shape), False, **kind)
        true = builder.call(aten.full.default, [], True, **kind)
        mask = builder.call(aten.index_put.default, nothing, list(indices[first:]), true)
    node.args = (value, [*indices[:first], mask], number)


def _triangle(
    indices: Sequence[fx.Node], shape: Sequence[Any], builder: Builder, device: torch.device
) -> fx.Node | None:
    """The mask of ``rows, columns = torch.triu_indices(*shape, offset)``; None if the indices are others.

    Indices may lie on the CPU beside scores on a GPU; a mask lies on ``device``, where they are.
    """
    parts = [taken_from(index) for index in indices]
    if len(parts) != 2 or not all(part is not None and part.selected and part.dim == 0 for part in parts):
        return None
    rows, columns = (part for part in parts if part is not None)
    whole: Any = rows.source
    compare = {aten.triu_indices.default: aten.ge.Scalar, aten.tril_indices.default: aten.le.Scalar}.get(whole.target)
    if compare is None or columns.source is not whole or (rows.span.start, columns.span.start) != (0, 1):
        return None
    if not same_shape([argument_of(whole, place, "", None) for place in (0, 1)], shape):
        return None
    row, column = (builder.call(aten.arange.default, size, device=device, pin_memory=False) for size in shape)
    apart = builder.call(aten.sub.Tensor, column, builder.call(aten.unsqueeze.default, row, 1))
    return builder.call(compare, apart, argument_of(whole, 2, "offset", 0))


def _identity(ir: fx.GraphModule, node: fx.Node) -> None:
    """``eye(n, m)`` is ``(row == column).to(dtype)``."""
    value = tensor(node)
    builder = Builder(ir, before=node, like=node)
    kind = {"device": value.device, "pin_memory": False}
    rows, columns = (builder.call(aten.arange.default, size, **kind) for size in value.shape)
    equal = builder.call(aten.eq.Tensor, builder.call(aten.unsqueeze.default, rows, 1), columns)
    _replace(node, equal if value.dtype is torch.bool else builder.call(aten.to.dtype, equal, value.dtype))


def _conversions(ir: fx.GraphModule, node: fx.Node) -> None:
    """Decomposes ``aten.copy``, which slice assignments leave, into conversions, which have a derivative."""
    builder = Builder(ir, before=node, like=node)
    value, source = tensor(node), node.args[1]
    if not is_tensor(source):
        kind = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        return _replace(node, builder.call(aten.full.default, list(value.shape), source, **kind))
    if tensor(source).device != value.device:
        source = builder.call(aten.to.device, source, value.device, value.dtype)
    elif tensor(source).dtype is not value.dtype:
        source = builder.call(aten.to.dtype, source, value.dtype)
    if not same_shape(tensor(source).shape, value.shape):
        source = builder.call(aten.expand.default, source, list(value.shape))
    order = memory_order(value)
    if order == sorted(order):
        copied = builder.call(aten.clone.default, source, memory_format=torch.contiguous_format)
    else:
        # As the tensor that is copied into: what is written back, or returned, may be a view that needs its strides.
        permuted = builder.call(aten.permute.default, source, order)
        copied = builder.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
        copied = builder.call(aten.permute.default, copied, [order.index(dim) for dim in range(len(order))])
    node.replace_all_uses_with(copied)
    ir.graph.erase_node(node)


def _alpha_by_name(ir: fx.GraphModule, node: fx.Node) -> None:
    """``rsub.Scalar(x, 1, 2)`` is ``rsub.Scalar(x, 1, alpha=2)``: overloads of tensors take it by name alone."""
    if len(node.args) > 2:
        alpha = node.args[2]
        node.args = node.args[:2]
        if alpha != 1:
            node.kwargs = {**node.kwargs, "alpha": alpha}


_RULES: dict[Any, Any] = {
    **ALIASES,
    aten.add.Scalar: _alpha_by_name,
    aten.sub.Scalar: _alpha_by_name,
    aten.rsub.Scalar: _alpha_by_name,
    aten.logical_not.default: _truth_values(aten.bitwise_not.default),
    aten.logical_and.default: _truth_values(aten.bitwise_and.Tensor),
    aten.logical_or.default: _truth_values(aten.bitwise_or.Tensor),
    aten.logical_xor.default: _truth_values(aten.bitwise_xor.Tensor),
    aten.hstack.default: _hstack,
    aten.vstack.default: _concatenate(0, 2),
    aten.row_stack.default: _concatenate(0, 2),
    aten.dstack.default: _concatenate(2, 3),
    aten.column_stack.default: _concatenate(1, 2),
    aten.tile.default: _tile,
    aten.rsub.Tensor: _reversed_difference,
    aten.linalg_vecdot.default: _inner_products,
    aten.addcmul.default: _multiply_and_add,
    aten.addcdiv.default: _multiply_and_add,
    aten.zeros_like.default: _fill_value(0),
    aten.ones_like.default: _fill_value(1),
    aten.new_zeros.default: _fill_value(0),
    aten.new_ones.default: _fill_value(1),
    aten.full_like.default: _fill_value(None),
    aten.new_full.default: _fill_value(None),
    aten.eye.default: _identity,
    aten.eye.m: _identity,
    aten.type_as.default: _dtype_of_other,
    aten.to.dtype_layout: _layout_as_it_is,
    aten.view_as.default: _shape_of_other(aten.reshape.default),
    aten.reshape_as.default: _shape_of_other(aten.reshape.default),
    aten.expand_as.default: _shape_of_other(aten.expand.default),
    aten.copy.default: _conversions,
    aten.detach.default: _without_gradients,
    aten.index_put.default: _assigned_by_numbers,
    aten.slice_scatter.default: _step_on_a_part,
    aten.select_scatter.default: _step_on_a_part,
    aten.diagonal_scatter.default: _step_on_a_part,
}
