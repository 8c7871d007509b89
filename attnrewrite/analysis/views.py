"""Layout algebra: which axis of the attention each dimension of a tensor is, followed through views.

An :class:`Axis` is an atomic index range of one attention: a batch, a head, a query position, a key position, a
feature. A tensor's :data:`Layout` says for each of its dimensions which axes it holds, major to minor: the scores of
``q.view(B * H, L, D) @ k.view(B * H, D, S)`` have the layout ``((b, h), (l,), (s,))``. A dimension of size one holds no
axis: ``()``. Views are followed in either direction; where a reshape divides what was one axis until then, the axis
itself is divided, so every layout that mentions it sees the parts. An ``expand`` or ``repeat`` shows as an axis that
the operand lacks, which is all that grouped, multi-query and broadcast attention are.

No size is guessed or guarded on: two sizes are equal only if that is known for every input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.ir import Size, is_tensor, product, same, same_shape, tensor

__all__ = [
    "Axis",
    "Layout",
    "Operand",
    "Product",
    "axes_of",
    "broadcast",
    "fresh_layout",
    "peel",
    "pull",
    "push",
    "size_of",
]

aten = torch.ops.aten


class Axis:
    """An index range; ``parts`` once it has been divided."""

    __slots__ = ("name", "parts", "size")

    def __init__(self, size: Size, name: str = "") -> None:
        self.size = size
        self.name = name
        self.parts: tuple[Axis, ...] | None = None

    def leaves(self) -> tuple[Axis, ...]:
        if self.parts is None:
            return (self,)
        return tuple(leaf for part in self.parts for leaf in part.leaves())

    def divide(self, minor: Size) -> tuple[Axis, Axis] | None:
        """Divides the axis into (major, minor), if its size is known to be a multiple of ``minor``."""
        assert self.parts is None
        if isinstance(minor, int) and minor == 0:
            return None
        major = self.size // minor
        if not same(major * minor, self.size):
            return None
        self.parts = (Axis(major, self.name), Axis(minor, self.name))
        return self.parts[0], self.parts[1]

    def __repr__(self) -> str:
        return f"{self.name or 'axis'}:{self.size}" if self.parts is None else repr(self.parts)


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def resolve(layout: Iterable[Dim]) -> Layout:
    """The layout in terms of axes that are not divided further."""
    return tuple(tuple(leaf for axis in dim for leaf in axis.leaves()) for dim in layout)


def axes_of(layout: Iterable[Dim]) -> tuple[Axis, ...]:
    """The undivided axes of a layout, in memory order of a contiguous tensor."""
    return tuple(axis for dim in resolve(layout) for axis in dim)


def size_of(dim: Dim) -> Size:
    return product([axis.size for axis in dim])


def fresh_layout(shape: Sequence[Size], name: str = "") -> Layout:
    return tuple(_fresh(size, name) for size in shape)


def _fresh(size: Size, name: str = "") -> Dim:
    return () if same(size, 1) else (Axis(size, name),)


@dataclass(frozen=True)
class Operand:
    """A node and the axes of the attention that its dimensions are."""

    node: fx.Node
    layout: Layout

    def resolved(self) -> Operand:
        return Operand(self.node, resolve(self.layout))

    @property
    def axes(self) -> tuple[Axis, ...]:
        return axes_of(self.layout)

    @property
    def dtype(self) -> torch.dtype:
        return tensor(self.node).dtype


# Regrouping: the same elements in the same order, other dimensions.


def regroup(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout that a reshape to ``shape`` gives, or None where it mixes axes so that no layout can say."""
    axes = list(axes_of(layout))
    result: list[Dim] = []
    for size in reversed(shape):
        dim = _take_minor(axes, size)
        if dim is None:
            return None
        result.append(dim)
    return None if axes else tuple(reversed(result))


def _take_minor(axes: list[Axis], size: Size) -> Dim | None:
    """Takes from the end of ``axes`` those that make up ``size``, dividing the last one if need be."""
    taken: list[Axis] = []
    rest = size
    while not same(rest, 1):
        if not axes:
            return None
        axis = axes[-1]
        if same(axis.size, rest):
            taken.append(axes.pop())
            rest = 1
        elif _is_multiple(rest, axis.size):
            taken.append(axes.pop())
            rest = rest // axis.size
        else:
            divided = axis.divide(rest)
            if divided is None:
                return None
            axes[-1] = divided[0]
            taken.append(divided[1])
            rest = 1
    return tuple(reversed(taken))


def _is_multiple(size: Size, of: Size) -> bool:
    return not (isinstance(of, int) and of == 0) and same(size // of * of, size)


def broadcast(layout: Layout, shape: Sequence[Size], operand_shape: Sequence[Size]) -> Layout | None:
    """The layout of an operand that broadcasts to a result with ``layout`` and ``shape``."""
    if len(operand_shape) > len(shape):
        return None
    offset = len(shape) - len(operand_shape)
    result: list[Dim] = []
    for dim, size, own in zip(layout[offset:], shape[offset:], operand_shape, strict=True):
        if same(own, size):
            result.append(dim)
        elif same(own, 1):
            result.append(())
        else:
            return None
    return tuple(result)


# Views, from the result's layout to the operand's (pull) and the other way (push).

_SHAPE_ONLY = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.reshape_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
_SAME_LAYOUT = frozenset(
    {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default}
)
_REPEATS = frozenset(
    {
        aten.expand.default,
        aten.expand_as.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.tile.default,
    }
)


def _permutation(node: fx.Node) -> list[int] | None:
    """``result dim -> operand dim`` of an operator that only reorders dimensions."""
    rank = tensor(node.args[0]).dim()
    order = list(range(rank))
    target: Any = node.target
    args: Any = node.args
    if target is aten.permute.default:
        return [int(dim) % rank for dim in args[1]]
    if target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        a, b = int(args[1]) % rank, int(args[2]) % rank
        order[a], order[b] = order[b], order[a]
        return order
    if target in (aten.t.default, aten.numpy_T.default):
        return order[::-1]
    if target is aten.mT.default:
        return [*order[:-2], order[-1], order[-2]]
    if target in (aten.movedim.int, aten.movedim.intlist):
        source, destination = (arg if isinstance(arg, (list, tuple)) else [arg] for arg in args[1:3])
        sources = [int(dim) % rank for dim in source]
        destinations = [int(dim) % rank for dim in destination]
        remaining = iter(dim for dim in order if dim not in sources)
        placed = dict(zip(destinations, sources, strict=True))
        return [placed[dim] if dim in placed else next(remaining) for dim in order]
    return None


def is_layout_op(node: fx.Node) -> bool:
    """Whether ``pull`` may see through the node: a view, a copy, a repetition."""
    return (
        node.op == "call_function"
        and bool(node.args)
        and is_tensor(node.args[0])
        and (
            node.target in _SHAPE_ONLY
            or node.target in _SAME_LAYOUT
            or node.target in _REPEATS
            or _permutation(node) is not None
        )
    )


def pull(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of ``node``'s operand, given the layout of its result; None where that cannot be said."""
    source = tensor(node.args[0])
    if node.target in _SAME_LAYOUT:
        return layout
    order = _permutation(node)
    if order is not None:
        result: list[Dim] = [()] * len(order)
        for position, dim in enumerate(order):
            result[dim] = layout[position]
        return tuple(result)
    if node.target in _SHAPE_ONLY:
        return regroup(layout, source.shape)
    if node.target in (aten.expand.default, aten.expand_as.default):
        return broadcast(layout, tensor(node).shape, source.shape)
    if node.target in (aten.repeat.default, aten.tile.default):
        return _pull_repeat(layout, tensor(node).shape, source.shape)
    if node.target is aten.repeat_interleave.self_int:
        return _pull_repeat_interleave(node, layout, source.shape)
    return None


def _pull_repeat(layout: Layout, shape: Sequence[Size], source: Sequence[Size]) -> Layout | None:
    """``repeat`` lays copies one after another: each result dimension is (copy, own)."""
    if len(source) > len(shape):
        return None
    offset = len(shape) - len(source)
    result: list[Dim] = []
    for dim, own in zip(layout[offset:], source, strict=True):
        axes = list(axes_of((dim,)))
        taken = _take_minor(axes, own)
        if taken is None:
            return None
        result.append(taken)
    return tuple(result)


def _pull_repeat_interleave(node: fx.Node, layout: Layout, source: Sequence[Size]) -> Layout | None:
    """``repeat_interleave`` lays copies beside each element: the result dimension is (own, copy)."""
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(dim, int):
        return None
    dim %= len(source)
    axes = list(axes_of((layout[dim],)))
    copies = node.args[1]
    if isinstance(copies, fx.Node):
        copies = copies.meta["val"]
    if not isinstance(copies, (int, torch.SymInt)) or _take_minor(axes, copies) is None:
        return None
    return (*layout[:dim], tuple(axes), *layout[dim + 1 :])


def push(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of ``node``'s result, given the layout of its first operand; None where that cannot be said."""
    if node.target in _SAME_LAYOUT:
        return layout
    order = _permutation(node)
    if order is not None:
        return tuple(layout[dim] for dim in order)
    if node.target in _SHAPE_ONLY:
        return regroup(layout, tensor(node).shape)
    if node.target in (aten.expand.default, aten.expand_as.default):
        source, shape = tensor(node.args[0]).shape, tensor(node).shape
        offset = len(shape) - len(source)
        padded: Layout = ((),) * offset + layout
        own: list[Size] = [1] * offset
        own.extend(source)
        return tuple(
            dim if same(size, before) else _fresh(size) for dim, size, before in zip(padded, shape, own, strict=True)
        )
    return None


def peel(operand: Operand, may_enter: Callable[[fx.Node], bool]) -> list[Operand]:
    """The operand as seen behind each view, copy and repetition that made it, nearest first.

    ``may_enter(node)`` says whether the walk may look behind ``node``.
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


# Products, all of them as one thing: an einsum over axes.


@dataclass(frozen=True)
class Product:
    """A matrix product whose result has ``layout``; ``contracted`` are the axes that it sums over.

    ``addend``: a ``baddbmm``'s first operand with its factor; ``factor``: what the product is multiplied by.
    """

    node: fx.Node
    lhs: Operand
    rhs: Operand
    layout: Layout
    contracted: Dim
    factor: Any = 1
    addend: Operand | None = None
    addend_factor: Any = 1


def is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS


def product_from_result(node: fx.Node, layout: Layout) -> Product | None:
    """The product ``node``, given the layout of its result."""
    if node.target is aten.einsum.default:
        return _einsum(node, result=layout)
    if node.target not in _PRODUCTS:
        return None
    lhs_node, rhs_node, factor, addend, addend_factor = _matrices(node)
    lhs_shape, rhs_shape = tensor(lhs_node).shape, tensor(rhs_node).shape
    if len(lhs_shape) < 2 or len(rhs_shape) < 2:
        return None
    contracted = _fresh(lhs_shape[-1], "feature")
    batch, shape = layout[:-2], tensor(node).shape[:-2]
    lhs_batch = broadcast(batch, shape, lhs_shape[:-2])
    rhs_batch = broadcast(batch, shape, rhs_shape[:-2])
    if lhs_batch is None or rhs_batch is None:
        return None
    addend_operand = None
    if addend is not None:
        addend_layout = broadcast(layout, tensor(node).shape, tensor(addend).shape)
        if addend_layout is None:
            return None
        addend_operand = Operand(addend, addend_layout)
    return Product(
        node,
        Operand(lhs_node, (*lhs_batch, layout[-2], contracted)),
        Operand(rhs_node, (*rhs_batch, contracted, layout[-1])),
        layout,
        contracted,
        factor,
        addend_operand,
        addend_factor,
    )


def product_from_operand(node: fx.Node, operand: fx.Node, layout: Layout) -> Product | None:
    """The product ``node``, given the layout of one of its operands."""
    if node.target is aten.einsum.default:
        return _einsum(node, operand=(operand, layout))
    if node.target not in _PRODUCTS:
        return None
    lhs_node, rhs_node, factor, addend, _ = _matrices(node)
    if addend is not None or (lhs_node is operand) == (rhs_node is operand):
        return None
    lhs_shape, rhs_shape, shape = tensor(lhs_node).shape, tensor(rhs_node).shape, tensor(node).shape
    if len(lhs_shape) < 2 or len(rhs_shape) < 2:
        return None
    is_lhs = lhs_node is operand
    own_shape, other_shape = (lhs_shape, rhs_shape) if is_lhs else (rhs_shape, lhs_shape)
    batch = _union(layout[:-2], own_shape[:-2], other_shape[:-2], shape[:-2])
    if batch is None:
        return None
    other_batch = broadcast(batch, shape[:-2], other_shape[:-2])
    if other_batch is None:
        return None
    contracted = layout[-1] if is_lhs else layout[-2]
    kept = layout[-2] if is_lhs else layout[-1]
    new = _fresh(other_shape[-1] if is_lhs else other_shape[-2], "value feature")
    own = Operand(operand, layout)
    other = Operand(
        rhs_node if is_lhs else lhs_node, (*other_batch, *((contracted, new) if is_lhs else (new, contracted)))
    )
    lhs, rhs = (own, other) if is_lhs else (other, own)
    result = (*batch, *((kept, new) if is_lhs else (new, kept)))
    return Product(node, lhs, rhs, result, contracted, factor)


def _union(layout: Layout, own: Sequence[Size], other: Sequence[Size], shape: Sequence[Size]) -> Layout | None:
    """The layout of the broadcast batch dimensions, where the other operand may bring axes of its own."""
    offset = len(shape) - len(own)
    result: list[Dim] = []
    for position, size in enumerate(shape):
        if position >= offset and same(own[position - offset], size):
            result.append(layout[position - offset])
        elif position < offset or same(own[position - offset], 1):
            result.append(_fresh(size))
        else:
            return None
    return tuple(result)


_PRODUCTS = frozenset(
    {
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.baddbmm.default,
        aten.einsum.default,
    }
)


def _matrices(node: fx.Node) -> tuple[fx.Node, fx.Node, Any, fx.Node | None, Any]:
    """(lhs, rhs, factor of the product, addend, factor of the addend)."""
    args: Any = node.args
    if node.target is aten.baddbmm.default:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        unused = isinstance(beta, (int, float)) and beta == 0
        return args[1], args[2], alpha, None if unused else args[0], beta
    return args[0], args[1], 1, None, 1


def _einsum(
    node: fx.Node, result: Layout | None = None, operand: tuple[fx.Node, Layout] | None = None
) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    lhs_node, rhs_node = operands
    if not (isinstance(lhs_node, fx.Node) and isinstance(rhs_node, fx.Node)):
        return None
    terms = _einsum_terms(equation, tensor(lhs_node).dim(), tensor(rhs_node).dim())
    if terms is None:
        return None
    left, right, out = terms
    shapes = ((left, tensor(lhs_node).shape), (right, tensor(rhs_node).shape))
    known: dict[str, Dim] = {}
    if result is not None:
        known.update(zip(out, result, strict=True))
    if operand is not None:
        given, layout = operand
        if lhs_node is rhs_node:
            return None
        letters = left if given is lhs_node else right
        for letter, dim, size in zip(letters, layout, tensor(given).shape, strict=True):
            if not same(size, 1):
                known[letter] = dim
    sizes: dict[str, Size] = {}
    for letters, shape in shapes:
        for letter, size in zip(letters, shape, strict=True):
            if letter not in sizes or same(sizes[letter], 1):
                sizes[letter] = size
            elif not same(size, 1) and not same(size, sizes[letter]):
                return None
    for letter, extent in sizes.items():
        known.setdefault(letter, _fresh(extent, "feature"))

    def layout_of(letters: str, shape: Sequence[Size]) -> Layout:
        return tuple(() if same(size, 1) else known[letter] for letter, size in zip(letters, shape, strict=True))

    contracted = tuple(axis for letter in sizes if letter not in out for axis in known[letter])
    return Product(
        node,
        Operand(lhs_node, layout_of(*shapes[0])),
        Operand(rhs_node, layout_of(*shapes[1])),
        tuple(known[letter] for letter in out),
        contracted,
    )


def _einsum_terms(equation: str, left_rank: int, right_rank: int) -> tuple[str, str, str] | None:
    """Three strings of single letters; an ellipsis is spelled out in letters that the equation does not use."""
    equation = equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    if inputs.count(",") != 1:
        return None
    left, right = inputs.split(",")
    if not arrow:
        letters = [letter for letter in left + right if letter != "."]
        out = ("..." if "..." in inputs else "") + "".join(
            sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        )
    spare = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in equation]
    spare += [chr(code) for code in range(ord("a"), ord("z") + 1) if chr(code) not in equation]
    counts = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in ((left, left_rank), (right, right_rank))
    ]
    widest = max(counts)
    if widest > len(spare):
        return None
    ellipsis = "".join(spare[:widest])
    left = left.replace("...", ellipsis[widest - counts[0] :])
    right = right.replace("...", ellipsis[widest - counts[1] :])
    out = out.replace("...", ellipsis)
    terms = (left, right, out)
    if any(len(set(term)) != len(term) for term in terms) or (len(left), len(right)) != (left_rank, right_rank):
        return None
    if not set(out) <= set(left) | set(right):
        return None
    return terms


def same_layout(a: Layout, b: Layout) -> bool:
    return resolve(a) == resolve(b)


def shape_of(layout: Layout) -> tuple[Size, ...]:
    return tuple(size_of(dim) for dim in resolve(layout))


def fits(operand: Operand) -> bool:
    """Whether a layout tells the truth about its node's shape; a check for tests and assertions."""
    return same_shape(shape_of(operand.layout), tensor(operand.node).shape)
