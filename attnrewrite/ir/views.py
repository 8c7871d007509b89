"""Layout algebra: follows the axes of an attention through views, in either direction.

An :class:`Axis` is an index range of one attention: a batch, a head, a query position, a key position, a feature. A
tensor's :data:`Layout` says which axes each of its dimensions holds, major to minor: the scores of
``q.view(B * H, L, D) @ k.view(B * H, D, S)`` have the layout ``((b, h), (l,), (s,))``. A dimension of size one holds no
axis: ``()``. If a reshape divides what was one axis until then, the axis itself is divided, so every layout that
mentions it sees the parts. Behind an ``expand`` or ``repeat`` the operand lacks an axis; grouped, multi-query and
broadcast attention are nothing else.

No size is guessed or guarded on: two sizes are equal only if that is known for every input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import Dim, Layout, Operand, axes_of, broadcast, fresh_dim, regroup, take_minor
from attnrewrite.ir.nodes import Size, is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import COPY_OPS, RESHAPE_OPS

__all__ = ["peel", "permutation_of", "pull", "push"]

aten = torch.ops.aten


# Views: from the layout of the result to that of the operand (pull), and back (push).

_SHAPE_ONLY = frozenset(
    {
        *RESHAPE_OPS,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)

_SAME_LAYOUT = COPY_OPS - {aten.detach.default}
"""What is detached is as it was, but its gradient ends there."""

_REPEATS = frozenset(
    {
        aten.expand.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
    }
)


_PERMUTES = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})

_MAY_BE_FOLLOWED = _SHAPE_ONLY | _SAME_LAYOUT | _REPEATS | _PERMUTES | {aten.slice.Tensor}


def permutation_of(node: fx.Node) -> list[int] | None:
    """For each dimension of the result that of the operand; None if the operator does more than reorder them."""
    rank = tensor(node.args[0]).dim()
    order = list(range(rank))
    target: Any = node.target
    args: Any = node.args
    if target is aten.permute.default:
        return [int(dim) % rank for dim in args[1]]
    if target is aten.transpose.int:
        if not rank:
            return []  # A tensor without dimensions has them transposed, too.
        a, b = int(args[1]) % rank, int(args[2]) % rank
        order[a], order[b] = order[b], order[a]
        return order
    if target is aten.t.default:
        return order[::-1]
    return None


def is_layout_op(node: fx.Node) -> bool:
    """Whether the node is a view, copy or repetition that ``pull`` can follow."""
    if node.target not in _MAY_BE_FOLLOWED or node.op != "call_function":
        return False
    if not node.args or not is_tensor(node.args[0]):
        return False
    return node.target is not aten.slice.Tensor or _takes_all(node)


def _takes_all(node: fx.Node) -> bool:
    """Whether the node is a slice of everything, ``x[:, :]``, which dynamic shapes leave in the graph."""
    return node.target is aten.slice.Tensor and same_shape(tensor(node).shape, tensor(node.args[0]).shape)


def pull(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of ``node``'s operand, given the layout of its result; None if no layout expresses it."""
    source = tensor(node.args[0])
    if node.target in _SAME_LAYOUT or _takes_all(node):
        return layout
    order = permutation_of(node)
    if order is not None:
        result: list[Dim] = [()] * len(order)
        for position, dim in enumerate(order):
            result[dim] = layout[position]
        return tuple(result)
    if node.target in _SHAPE_ONLY:
        return regroup(layout, source.shape)
    if node.target is aten.expand.default:
        return broadcast(layout, tensor(node).shape, source.shape)
    if node.target is aten.repeat.default:
        return _pull_repeat(layout, tensor(node).shape, source.shape)
    if node.target is aten.repeat_interleave.self_int:
        return _pull_repeat_interleave(node, layout, source.shape)
    return None


def _pull_repeat(layout: Layout, shape: Sequence[Size], source: Sequence[Size]) -> Layout | None:
    """``repeat`` puts whole copies one after another: each dimension of the result is (copy, own)."""
    if len(source) > len(shape):
        return None
    offset = len(shape) - len(source)
    result: list[Dim] = []
    for dim, own in zip(layout[offset:], source, strict=True):
        axes = list(axes_of((dim,)))
        taken = take_minor(axes, own)
        if taken is None:
            return None
        result.append(taken)
    return tuple(result)


def _pull_repeat_interleave(node: fx.Node, layout: Layout, source: Sequence[Size]) -> Layout | None:
    """``repeat_interleave`` puts copies beside each entry: the dimension of the result is (own, copy)."""
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(dim, int):
        return None
    dim %= len(source)
    axes = list(axes_of((layout[dim],)))
    copies = node.args[1]
    if isinstance(copies, fx.Node):
        copies = copies.meta["val"]
    if not isinstance(copies, (int, torch.SymInt)) or take_minor(axes, copies) is None:
        return None
    return (*layout[:dim], tuple(axes), *layout[dim + 1 :])


def push(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of ``node``'s result, given the layout of its first operand; None if no layout expresses it."""
    if node.target in _SAME_LAYOUT or _takes_all(node):
        return layout
    order = permutation_of(node)
    if order is not None:
        return tuple(layout[dim] for dim in order)
    if node.target in _SHAPE_ONLY:
        return regroup(layout, tensor(node).shape)
    if node.target is aten.expand.default:
        source, shape = tensor(node.args[0]).shape, tensor(node).shape
        offset = len(shape) - len(source)
        padded: Layout = ((),) * offset + layout
        own: list[Size] = [1] * offset
        own.extend(source)
        return tuple(
            dim if same(size, before) else fresh_dim(size) for dim, size, before in zip(padded, shape, own, strict=True)
        )
    return None


def peel(operand: Operand, may_enter: Callable[[fx.Node], bool]) -> list[Operand]:
    """The operand, followed by the operands behind each view, copy and repetition that made it, nearest first.

    The walk looks behind a node only if ``may_enter(node)`` is true.
    """
    chain = [operand]
    while is_layout_op(operand.node) and may_enter(operand.node):
        layout = pull(operand.node, operand.layout)
        source = operand.node.args[0]
        if layout is None or not isinstance(source, fx.Node):
            break
        operand = Operand(source, layout)
        chain.append(operand)
    return chain
