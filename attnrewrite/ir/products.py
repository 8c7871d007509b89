"""Matrix products in every spelling (matmul, einsum, linear, mul and sum), read as einsums over axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import Dim, Layout, Operand, broadcast, fresh_dim
from attnrewrite.ir.model_state import is_learned, may_have_gradient
from attnrewrite.ir.nodes import Size, is_tensor, same, tensor
from attnrewrite.ir.ops import MATRIX_OPS

__all__ = ["Contraction", "Product", "contraction_of", "factors_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A matrix product, ``addend_factor * addend + factor * scale * (lhs @ rhs)``.

    Attributes:
        node: the node of the result.
        lhs, rhs: the two operands.
        layout: the layout of the result.
        contracted: the axes that the product sums over.
        factor: a number that multiplies the product.
        addend: the first operand of ``baddbmm``, or the bias of ``linear``; None if nothing is added.
        addend_factor: a number that multiplies the addend.
        scale: a third operand of an einsum, which is not summed over.
        nodes: the nodes that compute the product, ``node`` last.
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
    """A product as an einsum with a letter for each dimension, or None for a summed one that is kept (``keepdim``)."""

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
    """Whether the node is a product of two computed tensors; ``linear`` with learned weights is a projection."""
    return _terms(node) is not None


def product_of_factor(node: fx.Node) -> fx.Node | None:
    """For ``a * b`` in ``(a * b).sum(dim)``: the sum, which is the node of the product. None for any other node."""
    if node.target is aten.mul.Tensor and len(node.users) == 1:
        (user,) = node.users
        return user if user.target is aten.sum.dim_IntList and is_product(user) else None
    return None


def factors_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two operands of a product; empty if the node is not a product, or adds or scales as well."""
    terms = _terms(node)
    plain = terms is not None and terms.addend is None and terms.scale is None
    return (terms.lhs, terms.rhs) if terms is not None and plain else ()


@dataclass(frozen=True)
class Contraction:
    """A product of two operands and nothing else, with a letter for each dimension, as an einsum has them."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    letters: tuple[tuple[str, ...], tuple[str, ...]]
    out: tuple[str, ...]

    def arguments(self, lhs: fx.Node, rhs: fx.Node) -> tuple[Any, ...]:
        """The arguments with which the same operator multiplies other operands."""
        args: Any = self.node.args
        return (args[0], [lhs, rhs]) if self.node.target is aten.einsum.default else (lhs, rhs)

    def is_like(self, other: Contraction) -> bool:
        """Whether both are calls of one operator, with the same equation."""
        return self.node.target is other.node.target and (self.letters, self.out) == (other.letters, other.out)


def contraction_of(node: Any) -> Contraction | None:
    """The contraction that the node is; None for a product that adds or scales as well, and for any other node."""
    if not is_tensor(node) or node.target not in _CONTRACTIONS or node.kwargs:
        return None
    terms = _terms(node)
    if terms is None or terms.scale is not None:
        return None
    out = tuple(letter for letter in terms.out if letter is not None)
    return Contraction(node, (terms.lhs, terms.rhs), (terms.left, terms.right), out)


_CONTRACTIONS = MATRIX_OPS | {aten.einsum.default}


def product_from_result(node: fx.Node, layout: Layout) -> Product | None:
    """The product ``node``, given the layout of its result; None if it is not a product or its sizes may not agree."""
    terms = _terms(node)
    if terms is None:
        return None
    known = {letter: dim for letter, dim in zip(terms.out, layout, strict=True) if letter is not None}
    return _laid_out(node, terms, known)


def product_from_operand(node: fx.Node, operand: fx.Node, layout: Layout) -> Product | None:
    """The product ``node``, given the layout of one operand; None if it is not a product of that operand."""
    terms = _terms(node)
    if terms is None or terms.addend is not None or (terms.lhs is operand) == (terms.rhs is operand):
        return None
    letters = terms.left if terms.lhs is operand else terms.right
    sizes = tensor(operand).shape
    known = {letter: dim for letter, dim, size in zip(letters, layout, sizes, strict=True) if not same(size, 1)}
    return _laid_out(node, terms, known)


def _laid_out(node: fx.Node, terms: _Terms, known: dict[str, Dim]) -> Product | None:
    """The product with layouts, given the dimensions of some letters; None if sizes may not agree.

    Letters without a known dimension are features: each gets a new axis.
    """
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
        known.setdefault(letter, fresh_dim(extent, "feature"))

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
    """A product of matrices or vectors with batch dimensions, as ``matmul`` defines it."""
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
    if unused and torch.is_grad_enabled() and isinstance(addend, fx.Node):
        unused = not may_have_gradient(addend)  # The gradient is zeros, and of what is not read there would be none.
    return _matrices(lhs, rhs, factor=alpha, addend=None if unused else addend, addend_factor=beta)


def _linear(node: fx.Node) -> _Terms | None:
    """``x @ weight.T + bias`` with a computed weight; with a learned one it is a projection (None)."""
    args: Any = node.args
    lhs, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if not (is_tensor(lhs) and is_tensor(weight)) or tensor(weight).dim() != 2 or is_learned(weight):
        return None
    batch = _letters(tensor(lhs).dim() - 1)
    more = {"addend": bias} if is_tensor(bias) else {}
    return _Terms(lhs, weight, (*batch, "inner"), ("column", "inner"), (*batch, "column"), **more)  # type: ignore[arg-type]


def _inner(node: fx.Node) -> _Terms | None:
    """``inner(a, b)``, which sums over the last dimension of both."""
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


def _multiplied_and_summed(node: fx.Node) -> _Terms | None:
    """``(a * b).sum(dim)``, with any broadcasting."""
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
        # One operand scales the product of the others: all its letters are theirs, and in the result.
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
    """The letters of each operand, and of the result last, with an ellipsis replaced by unused letters.

    None if the equation does not fit the ranks, or an operand repeats a letter.
    """
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
