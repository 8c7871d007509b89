"""Products and attention: of two operands whose result would be sharded twice, the second is gathered."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from attnrewrite.ir.nodes import tensor
from attnrewrite.parallel.lengths import expression
from attnrewrite.parallel.placement import Placement, Shard
from attnrewrite.parallel.rules.rule import (
    Emitter,
    Rule,
    argument,
    broadcast_to,
    operand_of,
    replayed,
)

__all__ = ["AddedProduct", "Attention", "Einsum", "Linear", "OperandProduct", "RingStep"]

aten = torch.ops.aten


class Linear(Rule):
    """``linear``: the weights are whole."""

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        placement = part.native(operand_of(node))
        if placement is not None and placement.dim == tensor(operand_of(node)).dim() - 1:
            raise part.refuse(node, "is a projection of the sequence, of which each rank has a part")
        return placement

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return placement.dim < tensor(node).dim() - 1

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        first = operand_of(node)
        return replayed(node, part, lambda operand: placement if operand is first else None)


class OperandProduct(Rule):
    """``matmul`` and its relatives. Of two operands whose result would be sharded twice, the second is gathered; so is
    what is contracted.
    """

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        return node.args[0], node.args[1]  # type: ignore[return-value]

    def _has_matrices(self, node: fx.Node) -> bool:
        left, right = self._operands(node)
        return min(tensor(left).dim(), tensor(right).dim()) >= 2

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        if not self._has_matrices(node):
            return None
        left, right = self._operands(node)
        dims = tensor(node).dim()
        of_left, of_right = part.native(left), part.native(right)
        if of_left is not None and of_left.dim != tensor(left).dim() - 1:
            return of_left.at(of_left.dim + dims - tensor(left).dim())
        if of_left is None and of_right is not None and of_right.dim != tensor(right).dim() - 2:
            return of_right.at(of_right.dim + dims - tensor(right).dim())
        return None

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return self._has_matrices(node)

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        return part.call(node, node.target, *self._parts(node, placement, part))

    def _parts(self, node: fx.Node, placement: Placement, part: Emitter) -> tuple[fx.Node, fx.Node]:
        left, right = self._operands(node)
        dims = tensor(node).dim()
        at = None if placement is None else placement.dim - dims
        of_left = None if at == -1 else broadcast_to(left, dims, placement)
        of_right = None if at == -2 else broadcast_to(right, dims, placement)
        return part.at(left, of_left, exchanged=True), part.at(right, of_right, exchanged=True)


class AddedProduct(OperandProduct):
    """``addmm`` and ``baddbmm``: what is added is broadcast to the product."""

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        return node.args[1], node.args[2]  # type: ignore[return-value]

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        added: fx.Node = node.args[0]  # type: ignore[assignment]
        numbers = {name: part.number(value) for name, value in node.kwargs.items()}
        addend = part.at(added, broadcast_to(added, tensor(node).dim(), placement))
        return part.call(node, node.target, addend, *self._parts(node, placement, part), **numbers)


class Einsum(Rule):
    """``einsum``, as :class:`OperandProduct`."""

    def _letters(self, node: fx.Node) -> tuple[list[str], str] | None:
        """A letter for each dimension of each operand, and of the result; None if one stands for a diagonal."""
        equation = str(node.args[0]).replace(" ", "")
        inputs, arrow, output = equation.partition("->")
        terms = inputs.split(",")
        if not arrow:
            once = sorted(letter for letter in set(inputs) - set(",.") if inputs.count(letter) == 1)
            output = "..." * ("..." in inputs) + "".join(once)
        dims = [tensor(operand).dim() for operand in node.args[1]]  # type: ignore[union-attr]
        terms = [_spelled_out(term, count) for term, count in zip(terms, dims, strict=True)]
        if any(len(set(term)) < len(term) for term in terms):
            return None
        return terms, _spelled_out(output, tensor(node).dim())

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        letters = self._letters(node)
        for place, operand in enumerate(node.args[1]):  # type: ignore[arg-type]
            placement = part.native(operand)
            if letters is not None and placement is not None and letters[0][place][placement.dim] in letters[1]:
                return placement.at(letters[1].index(letters[0][place][placement.dim]))
        return None

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return self._letters(node) is not None

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        letters = self._letters(node)
        operands = []
        for place, operand in enumerate(node.args[1]):  # type: ignore[arg-type]
            inner = None
            if placement is not None and letters is not None:
                dim = letters[0][place].find(letters[1][placement.dim])
                is_one = dim < 0 or expression(tensor(operand).shape[dim]) == 1
                inner = None if is_one else placement.at(dim)
            operands.append(part.at(operand, inner, exchanged=True))
        return part.call(node, node.target, node.args[0], operands)


def _spelled_out(term: str, dims: int) -> str:
    """The term with digits, the last of which is the last dimension, in the place of an ellipsis."""
    count = dims - len(term.replace("...", ""))
    return term.replace("...", "".join(str(at) for at in reversed(range(count))))


class Attention(Rule):
    """``scaled_dot_product_attention``: key and value are gathered, unless batches or heads are sharded."""

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        query, key = node.args[:2]
        placement = part.native(query)  # type: ignore[arg-type]
        if placement is not None:
            return placement
        of_key = part.native(key)  # type: ignore[arg-type]
        return of_key if of_key is not None and of_key.dim < tensor(key).dim() - 2 else None

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return placement.dim < tensor(node).dim() - 1

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        query, key, value = node.args[:3]
        rows = placement is not None and placement.dim == tensor(node).dim() - 2
        of_keys = None if rows else _of_shared_heads(node, placement)
        mask = argument(node, 3, "attn_mask")
        causal = argument(node, 5, "is_causal", False)
        dims = tensor(node).dim()
        parts = [part.at(query, placement)]  # type: ignore[arg-type]
        parts += [part.at(each, of_keys, exchanged=True) for each in (key, value)]  # type: ignore[arg-type]
        if mask is not None:
            mask = part.at(mask, broadcast_to(mask, dims, placement))
        if rows and causal:
            assert placement is not None
            mask = _causal(node, parts[1], placement, part)
        numbers = [part.number(argument(node, 4, "dropout_p", 0.0)), bool(causal) and not rows]
        options = {name: part.number(node.kwargs[name]) for name in ("scale", "enable_gqa") if name in node.kwargs}
        if len(node.args) > 6:
            raise part.refuse(node, "has its scale as a positional argument, which is not read")
        return part.call(node, node.target, *parts, mask, *numbers, **options)


def _of_shared_heads(node: fx.Node, placement: Placement) -> Placement:
    """Where key and value are sharded: heads of the query that share one of theirs are beside each other."""
    if placement is None or placement.dim != tensor(node).dim() - 3:
        return placement
    query, key = (expression(tensor(operand).shape[-3]) for operand in node.args[:2])
    return placement if key == query else replace(placement, inner=placement.inner / (query / key))


def _causal(node: fx.Node, key: fx.Node, placement: Shard, part: Emitter) -> fx.Node:
    """The rows of a causal mask that the shard has, first query at first key."""
    device = tensor(node).device
    rows = [
        part.call(node, aten.arange.start, first, first + length, device=device)
        for first, length in part.starts(placement)
    ]
    row = rows[0] if len(rows) == 1 else part.call(node, aten.cat.default, rows)
    columns = part.call(node, aten.arange.default, tensor(key).shape[-2], device=device)
    return part.call(node, aten.le.Tensor, columns, part.call(node, aten.unsqueeze.default, row, 1))


class RingStep(Rule):
    """Ring attention, between the ranks' shards of queries, keys and values."""

    def propose(self, node: fx.Node, part: Emitter) -> Placement:
        placement = part.native(operand_of(node))
        if placement is None or placement.dim != 2 or not placement.is_plain:
            raise part.refuse(node, "was chosen for a query that is not sharded along its length (use kernel='gather')")
        return placement

    def takes(self, node: fx.Node, placement: Shard, part: Emitter) -> bool:
        return placement.dim == 2

    def emit(self, node: fx.Node, placement: Placement, part: Emitter) -> fx.Node:
        query, key, value, *numbers = node.args
        of_keys = part.native(key)  # type: ignore[arg-type]
        if placement is None or of_keys is None or of_keys.dim != 2 or not of_keys.is_plain:
            raise part.refuse(node, "was chosen for keys that are not sharded along their length (use kernel='gather')")
        operands = [part.at(query, placement), *(part.at(each, of_keys) for each in (key, value))]  # type: ignore[arg-type]
        return part.call(node, node.target, *operands, *numbers)
