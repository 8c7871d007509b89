"""The partition: writes the graph of the whole sequence so that each rank computes its part of it.

A node of the graph that was traced stands for a tensor of the whole sequence. What is written for it holds that
tensor, or the rank's shard of it, exactly; so each operator is right by itself, whatever is made of it later. Two kinds
of nodes:

- Activations are computed once, sharded as their operands are.
- Positions, masks and the like are written where and as they are needed: for the rank's queries, for all keys, or
  both.

What is not known to have one of these meanings is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from attnrewrite.errors import ContextParallelError
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, is_tensor, same_shape, tensor
from attnrewrite.ir.ops import (
    CONVOLUTION_OPS,
    MATRIX_OPS,
    NORM_OPS,
    PROJECTION_OPS,
    has_effect,
    is_random,
)
from attnrewrite.ir.source import source_location
from attnrewrite.options.context_parallel import ContextParallel
from attnrewrite.parallel.lengths import Lengths, expression
from attnrewrite.parallel.operators import EXCHANGE, GATHER
from attnrewrite.parallel.placement import Placement, Shard
from attnrewrite.parallel.rules.rule import argument, holds_tensors, tensor_of
from attnrewrite.parallel.rules.table import rule_of
from attnrewrite.parallel.sites import Plan
from attnrewrite.torch_private import FloorDiv, enter_autocast, exit_autocast, operator_name, set_grad_enabled

__all__ = ["Partition"]

aten = torch.ops.aten


class Partition:
    """The partition of one graph, in place.

    Attributes:
        lengths: sizes on this rank and of the whole.
    """

    def __init__(
        self, gm: fx.GraphModule, lengths: Lengths, inputs: dict[fx.Node, Shard], plan: Plan, option: ContextParallel
    ) -> None:
        """Args:
        inputs: where inputs of the graph are sharded; others are whole.
        """
        self.lengths = lengths
        self._gm = gm
        self._plan = plan
        self._group, self._balanced = option.group, option.load_balance
        self._written: dict[tuple[fx.Node, Placement], fx.Node] = {}
        self._native: dict[fx.Node, Placement] = {}
        self._builders: dict[fx.Node, Builder] = {}
        self._of_data: set[fx.Node] = set()
        self._activations: set[fx.Node] = set()
        self._writing: fx.Node = next(iter(gm.graph.nodes))
        for node in gm.graph.find_nodes(op="placeholder"):
            self._native[node] = inputs.get(node)
            self._written[node, self._native[node]] = node
            if node in inputs:
                self._of_data.add(node)
                if _is_activation(node, inputs[node]):
                    self._activations.add(node)
        for node in gm.graph.find_nodes(op="get_attr"):
            self._native[node] = None
            self._written[node, None] = node

    def run(self) -> None:
        """Raises:
        ContextParallelError: a node's meaning for the whole sequence is not known.
        """
        for node in list(self._gm.graph.nodes):
            self._writing = node
            if node.op == "output":
                self._write_output(node)
            elif node.op == "call_function":
                self._write(node)
        for node in reversed(list(self._gm.graph.nodes)):
            if node.op == "call_function" and not node.users and not has_effect(node):
                self._gm.graph.erase_node(node)
        self._gm.recompile()

    def _write(self, node: fx.Node) -> None:
        if node.target in (set_grad_enabled, enter_autocast, exit_autocast) or not holds_tensors(node):
            if has_effect(node) and any(map(holds_tensors, node.all_input_nodes)):
                raise self.refuse(node, "has an effect, and is not supported under context_parallel")
            return
        if not self._of_data.isdisjoint(node.all_input_nodes):
            self._of_data.add(node)
        if has_effect(node):
            if self._concerns_sequence(node):
                raise self.refuse(node, "is not an operator that context_parallel knows")
            self._native[node] = None
            self._written[node, None] = node
            return
        if not self._is_activation(node):
            return
        self._activations.add(node)
        if node in self._plan.by_heads:
            self._write_by_heads(node, self._plan.by_heads[node])
            return
        self._native[node] = placement = self._proposed(node)
        self._written[node, placement] = self._emitted(node, placement)

    def _write_by_heads(self, node: fx.Node, heads: Shard) -> None:
        """An attention for the rank's heads over the whole sequence, and its rows for all heads."""
        rows = self._first_length(node)
        if rows is None:
            raise self.refuse(node, "has no rows that are sharded")
        self._native[node] = rows
        self._written[node, heads] = self._emitted(node, heads)
        self._written[node, rows] = self._traded(node, self._written[node, heads], heads, rows)

    def _proposed(self, node: fx.Node) -> Placement:
        if node.target is operator.getitem:
            return self._native[node.args[0]]  # type: ignore[index]
        return rule_of(node).propose(node, self)

    def _is_activation(self, node: fx.Node) -> bool:
        if node not in self._of_data or node in self._plan.inside:
            return False
        learned = node.target in _LEARNED
        random = is_random(node)
        if not _has_fractions(tensor_of(node)):
            return random
        return learned or random or not self._activations.isdisjoint(node.all_input_nodes)

    def _concerns_sequence(self, node: fx.Node) -> bool:
        """Whether the node has to do with the sharded sequence."""
        sizes: list[Any] = [size for value in _tensors(node) for size in value.shape]
        for each in node.all_input_nodes:
            sizes += [size for value in _tensors(each) for size in value.shape]
            sizes += [each.meta["val"]] if isinstance(each.meta.get("val"), (torch.SymInt, torch.SymFloat)) else []
        return node in self._of_data or any(map(self.lengths.depends, sizes))

    # What rules ask for.

    def native(self, node: fx.Node) -> Placement:
        """Where the node is sharded if nobody asks for something else: that of masks, along their first length."""
        if node not in self._native:
            self._native[node] = self._first_length(node)
        return self._native[node]

    def _first_length(self, node: fx.Node) -> Placement:
        for dim, size in enumerate(tensor_of(node).shape):
            expr = expression(size)
            if self.lengths.depends(size) and self.lengths.whole(expr) == self.lengths.ranks * expr:
                return Shard(dim, expr)
        return None

    def at(self, node: fx.Node, placement: Placement, *, exchanged: bool = False) -> fx.Node:
        """The node at a placement. With ``exchanged``, activations may be gathered."""
        if (node, placement) not in self._written:
            if node in self._activations:
                self._written[node, placement] = self._exchanged(node, placement, exchanged)
            elif node.op == "placeholder":
                self._written[node, placement] = self._input(node, placement)
            else:
                self._written[node, placement] = self._emitted(node, placement)
        return self._written[node, placement]

    def call(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call in the place of ``node``."""
        return self._builder(node).call(target, *args, **kwargs)

    def number(self, value: Any) -> Any:
        """A number, or a node that is one, at the length of the whole."""
        if not isinstance(value, fx.Node):
            return self.lengths.number(value)
        known = value.meta.get("val")
        if isinstance(known, torch.SymInt):
            return self.lengths.number(known)
        if not isinstance(known, torch.SymFloat) or not self.lengths.depends(known):
            return value
        args = fx.node.map_aggregate(value.args, lambda each: self.number(each))
        return self.call(value, value.target, *args)

    def shape(self, node: fx.Node, placement: Placement) -> list[Size]:
        """The sizes that a node's tensor has at a placement."""
        return self._sizes(tensor_of(node), placement)

    def _sizes(self, value: torch.Tensor, placement: Placement) -> list[Size]:
        sizes = self.lengths.whole_shape(value.shape)
        if placement is not None:
            sizes[placement.dim] = placement.size
        return [self.lengths.size(size) for size in sizes]

    def starts(self, shard: Shard) -> list[tuple[Size, Size]]:
        """The ranges (first position, length) of the whole sequence that the rank's shard consists of."""
        ranks, rank, length = self.lengths.ranks, self.lengths.rank, shard.length
        if not self._balanced or shard.of_heads:
            return [(self.lengths.size(rank * length), self.lengths.size(length))]
        half = FloorDiv(length, 2)
        # Both halves are as long, which is checked at each call.
        first, second = rank * half, (2 * ranks - 1 - rank) * half
        return [
            (self.lengths.size(first), self.lengths.size(half)),
            (self.lengths.size(second), self.lengths.size(length - half)),
        ]

    def refuse(self, node: fx.Node, reason: str) -> ContextParallelError:
        """The error that says what is in the way."""
        location = source_location(node)
        place = "" if location is None else f" at {location} ({location.code})"
        return ContextParallelError(f"context_parallel: {operator_name(node.target)}{place} {reason}")

    # How nodes are written.

    def _builder(self, node: fx.Node) -> Builder:
        """What is written for a node stands in front of it, in its region."""
        if node not in self._builders:
            before = node if node.op == "call_function" else self._first_call
            self._builders[node] = Builder(self._gm, before=before, like=node)
        return self._builders[node]

    @property
    def _first_call(self) -> fx.Node:
        nodes: Iterator[fx.Node] = iter(self._gm.graph.nodes)
        return next(node for node in nodes if node.op not in ("placeholder", "get_attr"))

    def _emitted(self, node: fx.Node, placement: Placement) -> fx.Node:
        """The node, computed at a placement; by itself if its rule can, else as the rank's part of the whole."""
        self._check_meaning(node, placement)
        if node.target is operator.getitem:
            source, place = node.args
            if placement is not None and not self._comes_in(source, placement):  # type: ignore[arg-type]
                return self._part(node, self.at(node, None), placement)
            return self._checked(node, placement, self.call_item(node, self.at(source, placement), place))  # type: ignore[arg-type]
        rule = rule_of(node)
        if placement is None or rule.takes(node, placement, self):
            return self._checked(node, placement, rule.emit(node, placement, self))
        if node in self._activations:
            raise self.refuse(node, f"cannot be computed of shards {_in_words(placement)}")
        return self._part(node, self.at(node, None), placement)

    def _comes_in(self, source: fx.Node, placement: Shard) -> bool:
        """Whether several tensors can be computed at a placement, or have been."""
        return source in self._activations or rule_of(source).takes(source, placement, self)

    def call_item(self, node: fx.Node, source: fx.Node, place: Any) -> fx.Node:
        return self._builder(node).insert(operator.getitem, (source, place), {}, source.meta["val"][place])

    def _check_meaning(self, node: fx.Node, placement: Placement) -> None:
        if has_effect(node) and node.target is not operator.getitem:
            raise self.refuse(node, "is not an operator that context_parallel knows")
        if _draws(node) and (placement is None or any(of is node for of, _ in self._written)):
            raise self.refuse(
                node,
                "draws random numbers, of which all ranks would need the same (give them as an input that is whole on "
                "all ranks)",
            )
        for value in _tensors(node):
            for size in value.shape:
                if not isinstance(size, int) and size.node.hint is None:
                    raise self.refuse(node, "has a size that depends on data")

    def _checked(self, node: fx.Node, placement: Placement, written: fx.Node) -> fx.Node:
        """What was written for a node: its tensors have the sizes that it has at that placement."""
        for value, found in zip(_tensors(node), _tensors(written), strict=True):
            if not same_shape(self._sizes(value, placement), found.shape) or value.dtype != found.dtype:
                raise self.refuse(
                    node, f"has shape {tuple(found.shape)} {_in_words(placement)}, which is not as the whole has it"
                )
        return written

    def _input(self, node: fx.Node, placement: Placement) -> fx.Node:
        """An input of the graph at another placement than it is given at."""
        native = self._native[node]
        if native is None:
            assert placement is not None
            return self._part(node, node, placement)
        if placement is None:
            return self._gathered(node, node, native)
        return self._part(node, self.at(node, None), placement)

    def _exchanged(self, node: fx.Node, placement: Placement, exchanged: bool) -> fx.Node:
        native = self._native[node]
        written = self._written[node, native]
        if native is None:
            assert placement is not None
            return self._part(node, written, placement)
        if placement is not None and placement.of_heads and node in self._plan.operands:
            return self._traded(node, written, native, placement)
        if not exchanged:
            raise self.refuse(
                self._writing,
                f"needs the result of {operator_name(node.target)} {_in_words(placement)}, which is sharded "
                f"{_in_words(native)}: context_parallel exchanges keys and values of products alone",
            )
        if placement is None:
            return self._gathered(node, written, native)
        return self._part(node, self.at(node, None, exchanged=True), placement)

    def _gathered(self, node: fx.Node, written: fx.Node, shard: Shard) -> fx.Node:
        """The whole, of which each rank has a shard."""
        sizes = self._split_sizes(tensor(written), shard, shard.length)
        apart = written if shard.is_plain else self.call(node, aten.reshape.default, written, sizes)
        dim = shard.dim if shard.is_plain else shard.dim + 1
        whole = self.call(node, GATHER, apart, dim, self._balanced, self.lengths.ranks, self._group)
        return whole if shard.is_plain else self.call(node, aten.reshape.default, whole, self.shape(node, None))

    def _traded(self, node: fx.Node, written: fx.Node, held: Shard, wanted: Shard) -> fx.Node:
        """Heads of the rank's rows for rows of the rank's heads, or back."""
        if held.dim == wanted.dim:
            raise self.refuse(node, "has heads and positions in one dimension")
        sizes: list[Size] = []
        places = {}
        for dim, size in enumerate(tensor(written).shape):
            for shard, length in ((held, held.length), (wanted, self.lengths.ranks * wanted.length)):
                if dim == shard.dim:
                    places[shard.of_heads] = len(sizes) + 1
                    sizes += [self.lengths.size(part) for part in (shard.outer, length, shard.inner)]
                    break
            else:
                sizes.append(size)
        apart = self.call(node, aten.reshape.default, written, sizes)
        split, joined = places[wanted.of_heads], places[held.of_heads]
        numbers = (not wanted.of_heads, self._balanced, self.lengths.ranks, self._group)
        traded = self.call(node, EXCHANGE, apart, split, joined, *numbers)
        return self._checked(node, wanted, self.call(node, aten.reshape.default, traded, self.shape(node, wanted)))

    def _split_sizes(self, value: torch.Tensor, shard: Shard, length: sympy.Expr) -> list[Size]:
        """The sizes with the shard's dimension taken apart, into (outer, length, inner)."""
        parts = [self.lengths.size(part) for part in (shard.outer, length, shard.inner)]
        return [*value.shape[: shard.dim], *parts, *value.shape[shard.dim + 1 :]]

    def _part(self, node: fx.Node, whole: fx.Node, shard: Shard) -> fx.Node:
        """The rank's shard of the whole, which it has."""
        if shard.is_plain:
            return self._checked(node, shard, self._cut(node, whole, shard.dim, shard))
        sizes = self._split_sizes(tensor(whole), shard, self.lengths.ranks * shard.length)
        apart = self.call(node, aten.reshape.default, whole, sizes)
        cut = self._cut(node, apart, shard.dim + 1, shard)
        return self._checked(node, shard, self.call(node, aten.reshape.default, cut, self.shape(node, shard)))

    def _cut(self, node: fx.Node, whole: fx.Node, dim: int, shard: Shard) -> fx.Node:
        pieces = [
            self.call(node, aten.slice.Tensor, whole, dim, first, first + length)
            for first, length in self.starts(shard)
        ]
        return pieces[0] if len(pieces) == 1 else self.call(node, aten.cat.default, pieces, dim)

    def _write_output(self, node: fx.Node) -> None:
        def written(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if not holds_tensors(value):
                if self.lengths.depends(value.meta.get("val", 0)):
                    raise self.refuse(value, "is returned, and depends on the length of the rank's shard")
                return value
            result = self.at(value, self.native(value))
            if is_tensor(value) and not same_shape(tensor(value).shape, tensor(result).shape):
                raise self.refuse(
                    value,
                    f"is returned in shape {tuple(tensor(value).shape)}, and is {tuple(tensor(result).shape)} where "
                    "the sequence is sharded",
                )
            return result

        node.args = fx.node.map_aggregate(node.args, written)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def _draws(node: fx.Node) -> bool:
    """Whether random numbers are drawn. Dropout that drops nothing draws none, though its operators say so."""
    if node.target in (aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default):
        return bool(node.args[1] != 0 and node.args[2])
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(argument(node, 4, "dropout_p", 0.0) != 0)
    return is_random(node)


def _is_activation(node: fx.Node, shard: Shard) -> bool:
    """Whether an input holds features of a sequence, and not one number for each position, such as a mask."""
    value = tensor(node)
    given = node.meta.get("example_value", value)
    return _has_fractions(value) and (shard.dim != value.dim() - 1 or bool(given.requires_grad))


def _has_fractions(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _in_words(placement: Placement) -> str:
    return "as a whole" if placement is None else f"along dimension {placement.dim}"


_LEARNED = {
    *(*MATRIX_OPS, *PROJECTION_OPS, *CONVOLUTION_OPS, *NORM_OPS),
    *(aten.embedding.default, aten.einsum.default, aten.scaled_dot_product_attention.default),
}
"""Operators whose results, computed of data, are activations."""
