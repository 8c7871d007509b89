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

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.ir import Size, is_cast, is_tensor, product, same, same_shape, tensor

__all__ = [
    "Axis",
    "Layout",
    "Operand",
    "Product",
    "axes_of",
    "broadcast",
    "factors_of",
    "fresh_layout",
    "peel",
    "permutation_of",
    "pull",
    "push",
    "size_of",
    "take_minor",
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
        dim = take_minor(axes, size)
        if dim is None:
            return None
        result.append(dim)
    return None if axes else tuple(reversed(result))


def take_minor(axes: list[Axis], size: Size) -> Dim | None:
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


def permutation_of(node: fx.Node) -> list[int] | None:
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
            or permutation_of(node) is not None
            or _takes_all(node)
        )
    )


def _takes_all(node: fx.Node) -> bool:
    """``x[:, :]``, which dynamic shapes leave in the graph."""
    return node.target is aten.slice.Tensor and same_shape(tensor(node).shape, tensor(node.args[0]).shape)


def pull(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of ``node``'s operand, given the layout of its result; None where that cannot be said."""
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
        taken = take_minor(axes, own)
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
    if not isinstance(copies, (int, torch.SymInt)) or take_minor(axes, copies) is None:
        return None
    return (*layout[:dim], tuple(axes), *layout[dim + 1 :])


def push(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of ``node``'s result, given the layout of its first operand; None where that cannot be said."""
    if node.target in _SAME_LAYOUT or _takes_all(node):
        return layout
    order = permutation_of(node)
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

    ``addend``: a ``baddbmm``'s first operand (or a ``linear``'s bias) with its factor; ``factor``: a number that the
    product is multiplied by; ``scale``: a third operand of an einsum, which is not summed over; ``nodes``: the nodes
    that compute it, ``node`` last.
    """

    node: fx.Node
    lhs: Operand
    rhs: Operand
    layout: Layout
    contracted: Dim
    factor: Any = 1
    addend: Operand | None = None
    addend_factor: Any = 1
    scale: Operand | None = None
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Terms:
    """A product as an einsum: a letter for each dimension, None for one of size one that is kept after summing."""

    lhs: fx.Node
    rhs: fx.Node
    left: tuple[str, ...]
    right: tuple[str, ...]
    out: tuple[str | None, ...]
    factor: Any = 1
    addend: fx.Node | None = None
    addend_factor: Any = 1
    scale: fx.Node | None = None
    scale_letters: tuple[str, ...] = ()
    nodes: tuple[fx.Node, ...] = ()


def is_product(node: fx.Node) -> bool:
    """Whether the node is a product of two computed tensors; a projection by learned weights is none."""
    return _terms(node) is not None


def product_of_factor(node: fx.Node) -> fx.Node | None:
    """The product that ``node`` is the elementwise half of: the sum in ``(a * b).sum(dim)``."""
    if node.target is aten.mul.Tensor and len(node.users) == 1:
        (user,) = node.users
        return user if user.target is aten.sum.dim_IntList and is_product(user) else None
    return None


def factors_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two operands of a product; none where the node is no plain product."""
    terms = _terms(node)
    plain = terms is not None and terms.addend is None and terms.scale is None
    return (terms.lhs, terms.rhs) if terms is not None and plain else ()


def product_from_result(node: fx.Node, layout: Layout) -> Product | None:
    """The product ``node``, given the layout of its result."""
    terms = _terms(node)
    if terms is None:
        return None
    known = {letter: dim for letter, dim in zip(terms.out, layout, strict=True) if letter is not None}
    return _laid_out(node, terms, known)


def product_from_operand(node: fx.Node, operand: fx.Node, layout: Layout) -> Product | None:
    """The product ``node``, given the layout of one of its operands."""
    terms = _terms(node)
    if terms is None or terms.addend is not None or (terms.lhs is operand) == (terms.rhs is operand):
        return None
    letters = terms.left if terms.lhs is operand else terms.right
    sizes = tensor(operand).shape
    known = {letter: dim for letter, dim, size in zip(letters, layout, sizes, strict=True) if not same(size, 1)}
    return _laid_out(node, terms, known)


def _laid_out(node: fx.Node, terms: _Terms, known: dict[str, Dim]) -> Product | None:
    operands = [(terms.left, tensor(terms.lhs).shape), (terms.right, tensor(terms.rhs).shape)]
    if terms.scale is not None:
        operands.append((terms.scale_letters, tensor(terms.scale).shape))
    sizes: dict[str, Size] = {}
    for letters, shape in operands:
        for letter, size in zip(letters, shape, strict=True):
            if letter not in sizes or same(sizes[letter], 1):
                sizes[letter] = size
            elif letter in terms.out and not same(size, 1) and not same(size, sizes[letter]):
                return None
    for letter, extent in sizes.items():
        known.setdefault(letter, _fresh(extent, "feature"))

    def layout_of(letters: Sequence[str], shape: Sequence[Size]) -> Layout:
        return tuple(() if same(size, 1) else known[letter] for letter, size in zip(letters, shape, strict=True))

    layout = tuple(() if letter is None else known[letter] for letter in terms.out)
    addend = None
    if terms.addend is not None:
        own = broadcast(layout, tensor(node).shape, tensor(terms.addend).shape)
        if own is None:
            return None
        addend = Operand(terms.addend, own)
    return Product(
        node,
        Operand(terms.lhs, layout_of(*operands[0])),
        Operand(terms.rhs, layout_of(*operands[1])),
        layout,
        tuple(axis for letter in sizes if letter not in terms.out for axis in known[letter]),
        terms.factor,
        addend,
        terms.addend_factor,
        Operand(terms.scale, layout_of(*operands[2])) if terms.scale is not None else None,
        terms.nodes or (node,),
    )


_PRODUCTS: dict[Any, Callable[[fx.Node], _Terms | None]] = {}


def _terms(node: fx.Node) -> _Terms | None:
    read = _PRODUCTS.get(node.target)
    return None if read is None or not is_tensor(node) else read(node)


def _letters(count: int, start: int = 0) -> tuple[str, ...]:
    return tuple(f"{position + start}" for position in range(count))


def _matmul(node: fx.Node) -> _Terms | None:
    lhs, rhs = node.args[:2]
    return _matrices(lhs, rhs)


def _matrices(lhs: Any, rhs: Any, **more: Any) -> _Terms | None:
    if not (is_tensor(lhs) and is_tensor(rhs)):
        return None
    left_rank, right_rank = tensor(lhs).dim(), tensor(rhs).dim()
    if left_rank == 0 or right_rank == 0:
        return None
    batch = tuple(reversed([f"batch{i}" for i in range(max(left_rank, right_rank) - 2)]))
    left = (*batch[len(batch) - max(left_rank - 2, 0) :], *(("row",) if left_rank > 1 else ()), "inner")
    right = (*batch[len(batch) - max(right_rank - 2, 0) :], "inner", *(("column",) if right_rank > 1 else ()))
    out = (*batch, *left[-2:-1] * (left_rank > 1), *right[-1:] * (right_rank > 1))
    return _Terms(lhs, rhs, left, right, out, **more)


def _baddbmm(node: fx.Node) -> _Terms | None:
    addend, lhs, rhs = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    unused = isinstance(beta, (int, float)) and beta == 0
    return _matrices(lhs, rhs, factor=alpha, addend=None if unused else addend, addend_factor=beta)


def _linear(node: fx.Node) -> _Terms | None:
    """``x @ weight.T + bias`` of a weight that was computed; by a parameter it is a projection."""
    args: Any = node.args
    lhs, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if not (is_tensor(lhs) and is_tensor(weight)) or tensor(weight).dim() != 2 or _is_learned(weight):
        return None
    batch = _letters(tensor(lhs).dim() - 1)
    more = {"addend": bias} if is_tensor(bias) else {}
    return _Terms(lhs, weight, (*batch, "inner"), ("column", "inner"), (*batch, "column"), **more)  # type: ignore[arg-type]


def _inner(node: fx.Node) -> _Terms | None:
    """``inner(a, b)``: both over their last dimension."""
    args: Any = node.args
    lhs, rhs = args[:2]
    if not (is_tensor(lhs) and is_tensor(rhs)) or not tensor(lhs).dim() or not tensor(rhs).dim():
        return None
    left, right = _letters(tensor(lhs).dim() - 1), _letters(tensor(rhs).dim() - 1, start=100)
    return _Terms(lhs, rhs, (*left, "inner"), (*right, "inner"), (*left, *right))


def _tensordot(node: fx.Node) -> _Terms | None:
    args: Any = node.args
    lhs, rhs, dims, other_dims = args[:4]
    if not (is_tensor(lhs) and is_tensor(rhs) and isinstance(dims, (list, tuple)) and dims):
        return None
    left, right = list(_letters(tensor(lhs).dim())), list(_letters(tensor(rhs).dim(), start=100))
    for a, b in zip(dims, other_dims, strict=True):
        right[int(b)] = left[int(a)]
    summed = {left[int(a)] for a in dims}
    out = [letter for letter in (*left, *right) if letter not in summed]
    return _Terms(lhs, rhs, tuple(left), tuple(right), tuple(out))


def _is_learned(node: fx.Node) -> bool:
    """Whether the node is a parameter, seen through views, casts and pieces of it."""
    while node.op == "call_function" and (is_layout_op(node) or is_cast(node) or node.target in _PIECES):
        node = node.all_input_nodes[0]
    return node.op == "get_attr" or isinstance(node.meta.get("example_value"), torch.nn.Parameter)


_PIECES = frozenset({aten.slice.Tensor, aten.select.int, aten.narrow.default, operator.getitem, aten.chunk.default})


def _multiplied_and_summed(node: fx.Node) -> _Terms | None:
    """``(a * b).sum(dim)``, which broadcasts as it likes."""
    args: Any = node.args
    multiplied = args[0]
    if not isinstance(multiplied, fx.Node) or multiplied.target is not aten.mul.Tensor or len(multiplied.users) != 1:
        return None
    factors: Any = multiplied.args
    lhs, rhs = factors[:2]
    if not (is_tensor(lhs) and is_tensor(rhs)) or lhs is rhs or node.kwargs.get("dtype") is not None:
        return None
    dtype = tensor(node).dtype
    if any(tensor(part).dtype is not dtype for part in (multiplied, lhs, rhs)):
        return None
    rank = tensor(multiplied).dim()
    dims = args[1] if len(args) > 1 else None
    if not isinstance(dims, (list, tuple)) or not dims or tensor(lhs).dim() == 0 or tensor(rhs).dim() == 0:
        return None
    summed = {int(dim) % rank for dim in dims}
    keep = (len(node.args) > 2 and bool(node.args[2])) or bool(node.kwargs.get("keepdim"))
    letters = _letters(rank)
    out: list[str | None] = []
    for position, letter in enumerate(letters):
        if position not in summed:
            out.append(letter)
        elif keep:
            out.append(None)
    return _Terms(
        lhs,
        rhs,
        letters[rank - tensor(lhs).dim() :],
        letters[rank - tensor(rhs).dim() :],
        tuple(out),
        nodes=(multiplied, node),
    )


def _einsum(node: fx.Node) -> _Terms | None:
    args: Any = node.args
    equation, operands = args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return None
    nodes = [operand for operand in operands if is_tensor(operand)]
    if len(nodes) != len(operands) or len(nodes) not in (2, 3):
        return None
    spelled = _einsum_terms(equation, [tensor(operand).dim() for operand in nodes])
    if spelled is None:
        return None
    *inputs, out = spelled
    scale = None
    if len(nodes) == 3:
        # The operand that brings no letter of its own and is summed over nothing scales the product of the others.
        scale = next(
            (
                position
                for position in reversed(range(3))
                if set(inputs[position]) <= set(out)
                and all(set(inputs[position]) <= set(inputs[a]) | set(inputs[b]) for a, b in [_others(position)])
            ),
            None,
        )
        if scale is None:
            return None
    first, second = (0, 1) if scale is None else _others(scale)
    more = {} if scale is None else {"scale": nodes[scale], "scale_letters": tuple(inputs[scale])}
    return _Terms(
        nodes[first],
        nodes[second],
        tuple(inputs[first]),
        tuple(inputs[second]),
        tuple(out),
        **more,
    )


def _others(position: int) -> tuple[int, int]:
    first, second = (other for other in range(3) if other != position)
    return first, second


_PRODUCTS.update(
    {
        aten.matmul.default: _matmul,
        aten.bmm.default: _matmul,
        aten.mm.default: _matmul,
        aten.mv.default: _matmul,
        aten.baddbmm.default: _baddbmm,
        aten.addmm.default: _baddbmm,
        aten.linear.default: _linear,
        aten.einsum.default: _einsum,
        aten.inner.default: _inner,
        aten.tensordot.default: _tensordot,
        aten.sum.dim_IntList: _multiplied_and_summed,
    }
)


def _einsum_terms(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """Strings of single letters, the result last; an ellipsis is spelled out in letters that are not in use."""
    equation = equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(ranks):
        return None
    if not arrow:
        letters = [letter for letter in inputs if letter not in ".,"]
        out = ("..." if "..." in inputs else "") + "".join(
            sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        )
    spare = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in equation]
    spare += [chr(code) for code in range(ord("a"), ord("z") + 1) if chr(code) not in equation]
    counts = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]
    widest = max(counts)
    if widest > len(spare):
        return None
    ellipsis = "".join(spare[:widest])
    terms = [term.replace("...", ellipsis[widest - count :]) for term, count in zip(terms, counts, strict=True)]
    out = out.replace("...", ellipsis)
    if any(len(set(term)) != len(term) for term in (*terms, out)) or [len(term) for term in terms] != list(ranks):
        return None
    if not set(out) <= set("".join(terms)):
        return None
    return [*terms, out]


def same_layout(a: Layout, b: Layout) -> bool:
    return resolve(a) == resolve(b)


def shape_of(layout: Layout) -> tuple[Size, ...]:
    return tuple(size_of(dim) for dim in resolve(layout))


def fits(operand: Operand) -> bool:
    """Whether a layout tells the truth about its node's shape; a check for tests and assertions."""
    return same_shape(shape_of(operand.layout), tensor(operand.node).shape)
