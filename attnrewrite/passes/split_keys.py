"""Attention over keys in several parts, such as those of a cache and new ones, as attention over all of them.

    cat([q @ a.mT, q @ b.mT], -1)       =   q @ cat([a, b]).mT
    w[..., :n] @ x + w[..., n:] @ y     =   w @ cat([x, y])

Parts of the weights must cover all keys exactly once, in any order. Scores may be concatenated along their batches,
heads or queries as well, such as those under two masks:

    cat([s + a, s + b])                 =   cat([q, q]) @ cat([k, k]).mT + cat([a, b])        s = q @ k.mT
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.scores import leads_to_product
from attnrewrite.ir.bounds import AROUND_SOFTMAX
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import Size, is_tensor, same, same_shape, scalar, tensor
from attnrewrite.ir.ops import (
    ADD_OPS,
    DIV_OPS,
    MASKED_FILL_OPS,
    MUL_OPS,
    PIECE_OPS,
    SUB_OPS,
    is_cast,
    is_elementwise,
    is_view,
    same_argument,
)
from attnrewrite.ir.products import Contraction, contraction_of
from attnrewrite.ir.spans import Taken
from attnrewrite.ir.views import permutation_of
from attnrewrite.passes.regrouping import (
    Found,
    NotRegrouped,
    Weights,
    in_order,
    piece_of,
    require_one_dtype,
    softmaxes_of,
)

__all__ = ["joined_scores", "joined_values"]

aten = torch.ops.aten


def joined_values(
    node: fx.Node, builder: Builder, view: GraphView, weights: Weights, softmaxes: set[fx.Node]
) -> Found | None:
    """``w[..., :n] @ x + w[..., n:] @ y`` as one product; None for any other node.

    Args:
        node: the sum.
        builder: writes before it.
        softmaxes: is given those that take part, for the reason.

    Raises:
        NotRegrouped: the sum stays as it is.
    """
    if node.target not in ADD_OPS:
        return None
    leaves = _addends(node)
    products = [contraction for leaf in leaves if (contraction := contraction_of(leaf)) is not None]
    if len(products) < len(leaves):
        _require_no_parts_behind_views(leaves, weights, softmaxes)
        return None
    found = _parts_of_weights(products, weights)
    if found is None:
        return None
    place, taken, casts = found
    source, dim = taken[0].source, taken[0].dim
    softmaxes.update(each for each in [weights.behind(source)] if each is not None)
    (first, *others) = products
    letter, letters = first.letters[place][dim], first.letters[1 - place]
    if letter in first.out or letter not in letters:
        return None
    if not all(first.is_like(other) for other in others):
        raise NotRegrouped("parts of the attention weights are multiplied with values by different products")
    order = in_order([part.span for part in taken], tensor(source).shape[dim])
    if order is None:
        raise NotRegrouped("the parts of the attention weights are not known to cover all keys exactly once")
    require_one_dtype(leaves)
    values = [products[index].operands[1 - place] for index in order]
    for part, value in zip((products[index].operands[place] for index in order), values, strict=True):
        if not same(tensor(part).shape[dim], tensor(value).shape[letters.index(letter)]):
            raise NotRegrouped("a part of the attention weights is repeated for several values")
    joined = _joined(values, letters.index(letter), _has_single_row(first, place), builder, view)
    whole = source
    for cast in casts:
        whole = builder.call(cast.target, whole, *cast.args[1:], **cast.kwargs)
    pair = (whole, joined) if place == 0 else (joined, whole)
    new = builder.call(first.node.target, *first.arguments(*pair))
    return Found(new, (new,))


def _require_no_parts_behind_views(leaves: Sequence[fx.Node], weights: Weights, softmaxes: set[fx.Node]) -> None:
    """Raises:
    NotRegrouped: the leaves are products with parts of weights, some of them in another shape.
    """
    sources: set[fx.Node] = set()
    for leaf in leaves:
        product = contraction_of(_past_views(leaf))
        taken = [piece_of(_past_views(operand)) for operand in product.operands] if product is not None else []
        found = {part.source for part in taken if part is not None and part.source in weights.nodes}
        if not found:
            return
        sources |= found
    if len(sources) == 1 and len(leaves) > 1:
        softmaxes |= sources
        raise NotRegrouped(
            "parts of the attention weights are multiplied with values in different shapes, such as those for all "
            "queries and those for each block of queries"
        )


def _past_views(node: fx.Node) -> fx.Node:
    while is_tensor(node) and node.op == "call_function" and is_view(node) and piece_of(node) is None:
        node = node.all_input_nodes[0]
    return node


def _addends(node: fx.Node) -> list[fx.Node]:
    """The terms of a sum."""
    terms: list[fx.Node] = []
    args: Any = node.args
    for arg in args[:2]:
        further = is_tensor(arg) and arg.target in ADD_OPS and len(arg.users) == 1 and not arg.kwargs
        terms += _addends(arg) if further else [arg]
    return [] if node.kwargs else terms


def _parts_of_weights(
    products: Sequence[Contraction], weights: Weights
) -> tuple[int, list[Taken], list[fx.Node]] | None:
    """Which operand is a part of the weights, the parts, and the casts between a part and its product."""
    for place in (0, 1) if len(products) > 1 else ():
        parts = [product.operands[place] for product in products]
        casts: list[fx.Node] = []
        while all(is_cast(part) and part.target is parts[0].target for part in parts):
            if not all(same_argument(part.args[1:], parts[0].args[1:]) for part in parts):
                break
            casts.insert(0, parts[0])
            parts = [part.all_input_nodes[0] for part in parts]
        taken = [part for part in map(piece_of, parts) if part is not None and not part.selected]
        of_one = len(taken) == len(parts) and len({(part.source, part.dim) for part in taken}) == 1
        if of_one and weights.behind(taken[0].source) is not None:
            return place, taken, casts
    return None


def joined_scores(
    node: fx.Node, builder: Builder, view: GraphView, weights: Weights, softmaxes: set[fx.Node]
) -> Found | None:
    """``cat([q @ a.mT, q @ b.mT], dim)`` as one product, and then what is done to all parts alike; else None.

    Raises:
        NotRegrouped: the concatenation stays as it is.
    """
    args: Any = node.args
    if node.target is not aten.cat.default or len(args[0]) < 2 or not all(map(is_tensor, args[0])):
        return None
    rank = tensor(node).dim()
    along: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
    dim = int(along) % rank
    parts: list[fx.Node] = list(args[0])
    if not all(tensor(part).dim() == rank and leads_to_product(part, {}) for part in parts):
        return None
    readers = softmaxes_of(node, weights)
    if not readers or any(map(_is_taken_apart, readers)):
        # Weights in parts have been joined before; what is left are those of a sink, which is a part without a value.
        return None
    softmaxes |= readers
    steps: list[list[fx.Node]] = []
    while (sources := _sources_of_like_steps(parts, dim)) is not None:
        steps.insert(0, parts)
        parts = sources
    products = [contraction for part in parts if (contraction := contraction_of(part)) is not None]
    if len(products) < len(parts):
        raise NotRegrouped("the scores are concatenated from parts that are computed in different ways")
    require_one_dtype(parts)
    first, letter = products[0], products[0].out[dim]
    if letter in first.letters[0] and letter in first.letters[1]:
        _require_no_other_readers([*steps, parts], node)
    pair = [_joined_operands(products, place, dim, builder, view) for place in (0, 1)]
    new = product = builder.call(first.node.target, *first.arguments(pair[0], pair[1]))
    for step in steps:
        new = _repeated(step, new, dim - rank, builder)
    return Found(new, (product,))


def _joined_operands(
    products: Sequence[Contraction], place: int, dim: int, builder: Builder, view: GraphView
) -> fx.Node:
    """The operand of the product of the whole, whose parts are those of ``products``; ``dim`` is one of the result.

    Raises:
        NotRegrouped: the operands cannot be concatenated so that their product is the concatenation.
    """
    first = products[0]
    letter, letters = first.out[dim], first.letters[place]
    operands = [product.operands[place] for product in products]
    shared = all(operand is operands[0] for operand in operands)
    if not all(map(first.is_like, products)) or not (shared or letter in letters):
        raise NotRegrouped("the scores are concatenated from products that do not share their query")
    if letter not in letters:
        return operands[0]
    own = letters.index(letter)
    fits = [
        same(tensor(operand).shape[own], tensor(product.node).shape[dim])
        for product, operand in zip(products, operands, strict=True)
    ]
    if not all(fits):
        if shared and same(tensor(operands[0]).shape[own], 1):
            return operands[0]  # It is broadcast along the parts.
        raise NotRegrouped("the scores are concatenated along a dimension that an operand is broadcast to")
    single = any(_has_single_row(first, each) for each in (0, 1) if each != place or letter in first.letters[1 - each])
    return _joined(operands, own, single, builder, view)


def _require_no_other_readers(steps: Sequence[Sequence[fx.Node]], node: fx.Node) -> None:
    """Raises:
    NotRegrouped: what leads to ``node`` by ``steps`` is read elsewhere as well.
    """
    own = {each for step in steps for each in step} | {node}
    if any(user not in own for each in own - {node} for user in each.users):
        raise NotRegrouped(
            "the scores are concatenated from parts that something else reads as well, so they must exist in memory"
        )


def _is_taken_apart(weights: fx.Node) -> bool:
    """Whether the weights are sliced before they are multiplied."""
    pending, seen = [weights], {weights}
    for node in pending:
        for user in node.users:
            if user.target in PIECE_OPS:
                return True
            passes = is_elementwise(user) or is_view(user) or is_cast(user) or user.target is aten.dropout.default
            if user not in seen and passes and AROUND_SOFTMAX.allows(len(seen)):
                seen.add(user)
                pending.append(user)
    return False


_LIKE_STEPS = MUL_OPS | DIV_OPS | ADD_OPS | SUB_OPS | MASKED_FILL_OPS


def _sources_of_like_steps(parts: Sequence[fx.Node], dim: int) -> list[fx.Node] | None:
    """The scores before a step that is the same for all parts; None if the parts are products, or differ."""
    first = parts[0]
    if contraction_of(first) is not None:
        return None
    args: Any = first.args
    if any(
        part.target is not first.target or part.kwargs != first.kwargs or len(part.args) != len(args) for part in parts
    ):
        return None
    if is_cast(first):
        alike = all(same_argument(part.args[1:], args[1:]) for part in parts)
    else:
        alike = (
            first.target in _LIKE_STEPS
            and all(same_argument(part.args[2:], args[2:]) for part in parts)
            and _are_like([part.args[1] for part in parts], parts, dim)
        )
    sources = [part.args[0] for part in parts]
    alike = alike and all(
        is_tensor(source) and same_shape(tensor(source).shape, tensor(part).shape)
        for source, part in zip(sources, parts, strict=True)
    )
    return sources if alike else None  # type: ignore[return-value]


def _are_like(others: Sequence[Any], parts: Sequence[fx.Node], dim: int) -> bool:
    """Whether the second arguments of a step are one, or entries for each key that can be concatenated."""
    if not any(map(is_tensor, others)):
        return all(scalar(other) and same_argument(other, others[0]) for other in others)
    if not all(map(is_tensor, others)):
        return False
    from_last = dim - tensor(parts[0]).dim()
    return _is_broadcast(others, from_last) or _shapes_along(others, parts, from_last) is not None


def _is_broadcast(others: Sequence[Any], from_last: int) -> bool:
    """Whether ``others`` are one, of which all entries along the concatenation are the same."""
    if any(other is not others[0] for other in others):
        return False
    return tensor(others[0]).dim() < -from_last or same(tensor(others[0]).shape[from_last], 1)


def _shapes_along(others: Sequence[fx.Node], parts: Sequence[fx.Node], from_last: int) -> list[list[Size]] | None:
    """The shapes in which ``others`` have as many entries as ``parts`` where those are concatenated.

    None if they could not be concatenated then.
    """
    rank = max(-from_last, *(tensor(other).dim() for other in others))
    shapes: list[list[Size]] = []
    for other, part in zip(others, parts, strict=True):
        shape: list[Size] = [*[1] * (rank - tensor(other).dim()), *tensor(other).shape]
        if not same(shape[from_last], tensor(part).shape[from_last]):
            if not same(shape[from_last], 1):
                return None
            shape[from_last] = tensor(part).shape[from_last]
        shapes.append(shape)
    rests = [[*shape[:from_last], *shape[rank + from_last + 1 :]] for shape in shapes]
    alike = all(same_shape(rest, rests[0]) for rest in rests)
    return shapes if alike and len({tensor(other).dtype for other in others}) == 1 else None


def _repeated(step: Sequence[fx.Node], new: fx.Node, from_last: int, builder: Builder) -> fx.Node:
    """What is done to each part of the scores, done to all of them."""
    others: list[Any] = [node.args[1] for node in step] if not is_cast(step[0]) else []
    target, rest = step[0].target, step[0].args[1:]
    if is_tensor(others[0] if others else None) and not _is_broadcast(others, from_last):
        shapes = _shapes_along(others, step, from_last)
        assert shapes is not None
        wide = [
            other if same_shape(tensor(other).shape, shape) else builder.call(aten.expand.default, other, shape)
            for other, shape in zip(others, shapes, strict=True)
        ]
        rest = (builder.call(aten.cat.default, wide, from_last), *rest[1:])
    return builder.call(target, new, *rest, **step[0].kwargs)


def _has_single_row(product: Contraction, place: int) -> bool:
    """Whether the operand that has the queries has a single one."""
    own, other = product.letters[place], product.letters[1 - place]
    sizes = zip(own, tensor(product.operands[place]).shape, strict=True)
    return all(same(size, 1) for letter, size in sizes if letter not in other)


def _joined(parts: Sequence[fx.Node], dim: int, single_row: bool, builder: Builder, view: GraphView) -> fx.Node:
    """The tensor that the parts are consecutive slices of along ``dim``, or else their concatenation.

    Raises:
        NotRegrouped: they cannot be concatenated, or copying them takes longer than what it saves.
    """
    first = parts[0]
    if not _fit_along(parts, dim):
        raise NotRegrouped("the parts of the keys or values differ in more than their number")
    taken = [part for part in map(piece_of, parts) if part is not None and part.dim == dim and not part.selected]
    if len(taken) == len(parts) and len({part.source for part in taken}) == 1:
        source = taken[0].source
        if in_order([part.span for part in taken], tensor(source).shape[dim]) == [*range(len(parts))]:
            return source
    orders = [permutation_of(part) if part.op == "call_function" and is_view(part) else None for part in parts]
    if orders[0] is not None and all(order == orders[0] for order in orders):
        sources = [part.all_input_nodes[0] for part in parts]
        joined = _joined(sources, orders[0][dim], single_row, builder, view)
        return builder.call(aten.permute.default, joined, orders[0])
    for user in first.users:
        if _concatenates(user, parts, dim) and user < builder.before and view.same_region(user, builder.before):
            return user
    if single_row:
        raise NotRegrouped("the keys are in several parts, and copying them takes longer than the scores of one query")
    return builder.call(aten.cat.default, [*parts], dim)


def _fit_along(parts: Sequence[fx.Node], dim: int) -> bool:
    """Whether the parts have one dtype, and one shape but for ``dim``."""

    def rest(part: fx.Node) -> list[Any]:
        shape = [*tensor(part).shape]
        del shape[dim]
        return shape

    first = parts[0]
    return all(
        tensor(part).dtype is tensor(first).dtype
        and tensor(part).dim() == tensor(first).dim()
        and same_shape(rest(part), rest(first))
        for part in parts
    )


def _concatenates(node: fx.Node, parts: Sequence[fx.Node], dim: int) -> bool:
    args: Any = node.args
    if node.target is not aten.cat.default or [*args[0]] != [*parts]:
        return False
    given: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
    return int(given) % tensor(node).dim() == dim
