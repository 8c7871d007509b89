"""Masks that are drawn: a graph of operators, each with what its entries are in the terms of z3.

What an entry is (:attr:`Drawing.entry`) is said here operator by operator, apart from how the rewriting reads graphs.
The graph is also run on real tensors.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import z3
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnrewrite.ir.axes import Axis, Layout, Operand
from attnrewrite.ir.site import Bias, Fill
from attnrewrite.ir.stored import StoredPattern

__all__ = ["Drawing", "Lengths"]

aten = torch.ops.aten

BATCHES = 2
TABLE = 64
Entry = Callable[[Sequence[Any]], Any]
"""What stands at an index."""


class Lengths:
    """How many queries and keys there are: numbers, or symbols that are shared by all graphs drawn with them."""

    def __init__(self, queries: int, keys: int, dynamic: bool, equal: bool = False) -> None:
        """
        Args:
            equal: of symbols, that both are one.
        """
        self.dynamic = dynamic
        self.equal = equal or (not dynamic and queries == keys)
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        kind = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, kind, kind])
        self.scores: torch.Tensor = self.mode.from_tensor(torch.zeros(BATCHES, queries, keys), symbolic_context=context)
        _, self.queries, self.keys = self.scores.shape
        if dynamic and equal:
            self.scores = self.scores.new_empty((BATCHES, self.queries, self.queries))
            self.keys = self.queries

    @property
    def examples(self) -> list[tuple[int, int]]:
        """Sizes at which masks are computed."""
        if not self.dynamic:
            return [(int(self.queries), int(self.keys))]
        return [(5, 5), (2, 2)] if self.equal else [(3, 5), (5, 3), (4, 4)]

    def solver(self, size: Any) -> Any:
        """A length in z3."""
        return z3.Int(str(size.node.expr)) if isinstance(size, torch.SymInt) else z3.IntVal(int(size))


class Drawing:
    """A graph that is drawn by ``pick``.

    Attributes:
        entry: for each node what stands at an index.
        terms: the masks as terms of the scores, and ``kept``: for each the boolean node that says where it keeps them.
    """

    def __init__(self, lengths: Lengths, pick: random.Random) -> None:
        self.lengths, self.pick = lengths, pick
        self.graph = fx.Graph()
        self.entry: dict[fx.Node, Entry] = {}
        self._inputs: dict[str, fx.Node] = {}
        sizes: list[Any] = [BATCHES, lengths.queries, lengths.keys]
        self.axes: list[tuple[Axis, ...]] = [
            () if isinstance(size, int) and size == 1 else (Axis(size, name),)
            for size, name in zip(sizes, "bqk", strict=True)
        ]
        scores = self._input("scores", lengths.scores, lambda index: z3.IntVal(0))
        self.size_nodes: list[Any] = [BATCHES]
        for dim, size in ((1, lengths.queries), (2, lengths.keys)):
            if not isinstance(size, torch.SymInt):
                self.size_nodes.append(size)
                continue
            node = self.graph.call_function(aten.sym_size.int, (scores, dim))
            node.meta["val"] = size
            self.size_nodes.append(node)
        self.terms: list[Bias | Fill] = []
        self.kept: list[tuple[fx.Node, bool]] = []
        """The condition, and whether it says where scores are kept or where they are not."""
        for _ in range(pick.choice((1, 1, 1, 2))):
            self._draw_term()

    # Nodes.

    def _input(self, name: str, value: Any, entry: Entry) -> fx.Node:
        if name not in self._inputs:
            node = self.graph.placeholder(name)
            node.meta["val"] = value
            self._inputs[name], self.entry[node] = node, entry
        return self._inputs[name]

    def _call(self, entry: Entry, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fakes = fx.node.map_arg((args, kwargs), lambda argument: argument.meta["val"])
        with self.lengths.mode:
            node.meta["val"] = target(*fakes[0], **fakes[1])
        self.entry[node] = entry
        return node

    def _at(self, value: Any, index: Sequence[Any]) -> Any:
        """The entry of a broadcast operand."""
        if not isinstance(value, fx.Node):
            return z3.BoolVal(value) if isinstance(value, bool) else z3.IntVal(value)
        fake = value.meta["val"]
        if not isinstance(fake, torch.Tensor):
            return self._size(value)
        tail = index[len(index) - fake.dim() :]
        own = [z3.IntVal(0) if isinstance(n, int) and n == 1 else i for n, i in zip(fake.shape, tail, strict=True)]
        return self.entry[value](own)

    def _size(self, value: Any) -> Any:
        """A length, or a sum of lengths."""
        if not isinstance(value, fx.Node):
            return z3.IntVal(int(value))
        if value.target is operator.sub:
            return self._size(value.args[0]) - self._size(value.args[1])
        return self.lengths.solver(value.meta["val"])

    def _elementwise(self, function: Callable[..., Any], target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._call(lambda index: function(*(self._at(arg, index) for arg in args)), target, *args, **kwargs)

    def _unsqueezed(self, node: fx.Node, dim: int) -> fx.Node:
        return self._call(
            lambda index: self.entry[node]([*index[:dim], *index[dim + 1 :]]), aten.unsqueeze.default, node, dim
        )

    # Numbers.

    def _arange(self, dim: int) -> fx.Node:
        first = self.pick.choice((0, 0, 0, 1, -2))
        size = self.size_nodes[dim]
        if first and not isinstance(size, fx.Node):
            node = self._call(lambda index: index[0] + first, aten.arange.start, first, first + size)
        else:
            node = self._call(lambda index: index[0], aten.arange.default, size)
        return self._unsqueezed(node, 1 if dim == 1 else 0)

    def _of_batch(self, name: str, dtype: torch.dtype, dim: int) -> fx.Node:
        """An input that the caller hands over: a number or a truth value for each position, or for each batch."""
        sizes = [BATCHES, *([] if dim == 0 else [(self.lengths.queries, self.lengths.keys)[dim - 1]])]
        kind = z3.BoolSort() if dtype is torch.bool else z3.IntSort()
        name = f"{name}_of_positions" if dim and self.lengths.equal else f"{name}_{dim}"
        function = z3.Function(name, *[z3.IntSort()] * len(sizes), kind)
        with self.lengths.mode:
            fake = torch.empty(sizes, dtype=dtype)
        node = self._input(name, fake, lambda index: function(*index))
        if dim == 0:
            return self._unsqueezed(self._unsqueezed(node, 1), 2)
        return self._unsqueezed(node, 2 if dim == 1 else 1)

    def _gap(self) -> Any:
        """How many more keys there are than queries."""
        _, queries, keys = self.size_nodes
        if not isinstance(queries, fx.Node):
            return keys - queries
        node = self.graph.call_function(operator.sub, (keys, queries))
        node.meta["val"] = keys.meta["val"] - queries.meta["val"]
        return node

    def _number(self, depth: int = 0) -> fx.Node:
        pick = self.pick
        way = pick.choice(_OPERANDS)
        if depth > 2 and way not in ("i", "j", "input"):
            way = pick.choice("ij")
        deeper = depth + 1
        if way == "i":
            return self._arange(1)
        if way == "j":
            return self._arange(2)
        if way == "i-j":
            pair = [self._arange(1), self._arange(2)]
            pick.shuffle(pair)
            return self._elementwise(operator.sub, aten.sub.Tensor, *pair)
        if way == "distance":
            return self._elementwise(lambda a: z3.If(a >= 0, a, -a), aten.abs.default, self._number(deeper))
        if way == "plus":
            target, function = pick.choice(((aten.add.Tensor, operator.add), (aten.sub.Tensor, operator.sub)))
            return self._elementwise(
                function, target, self._number(deeper), pick.choice((self._number(deeper), 1, 3, -2))
            )
        if way == "times":
            return self._elementwise(operator.mul, aten.mul.Tensor, self._number(deeper), pick.choice((2, 3, -1, 0)))
        if way == "input":
            return self._of_batch("numbers", torch.int64, pick.choice((0, 1, 2)))
        if way == "blocks":
            # z3 divides as Python does where the divisor is positive.
            return self._elementwise(
                operator.truediv, aten.floor_divide.default, self._number(deeper), pick.choice((2, 3))
            )
        if way == "table":
            table = self._call(lambda index: index[0], aten.arange.default, TABLE)
            positions = self._arange(pick.choice((1, 2)))
            if pick.random() < 0.3:
                positions = self._elementwise(operator.add, aten.add.Tensor, positions, pick.choice((1, -1)))

            def looked_up(index: Sequence[Any]) -> Any:
                position = self._at(positions, index)
                return z3.If(position < 0, position + TABLE, position)

            return self._call(looked_up, aten.index.Tensor, table, [positions])
        if way == "chosen":
            condition = self._truth(deeper)
            target = aten.where.Scalar
            a, b = pick.choice(((0, 1), (1, 0), (2, -1)))
            return self._elementwise(lambda c, x, y: z3.If(c, x, y), target, condition, a, b)
        if way == "negative":
            return self._elementwise(operator.neg, aten.neg.default, self._number(deeper))
        if way == "between":
            return self._between(self._number(deeper))
        if way == "remainder":
            divisor = pick.choice((2, 4, 5, 6, 64))
            target = aten.remainder.Scalar
            return self._elementwise(operator.mod, target, self._number(deeper), divisor)
        if way in ("joined", "differences", "sums", "turned", "taken"):
            return self._along(way, self._number(deeper))
        return self._elementwise(operator.add, aten.add.Tensor, self._arange(1), self._gap())

    def _between(self, number: fx.Node) -> fx.Node:
        """Not below or not above a bound."""
        pick = self.pick
        low, high = pick.choice(((0, None), (-2, 3), (None, 4), (3, 1)))
        if pick.random() < 0.3:
            larger = pick.random() < 0.5
            target = aten.maximum.default if larger else aten.minimum.default
            return self._elementwise(
                lambda a, b: z3.If((a > b) if larger else (a < b), a, b), target, number, self._number(3)
            )

        def bounded(a: Any, *_: Any) -> Any:
            a = a if low is None else z3.If(a < low, z3.IntVal(low), a)
            return a if high is None else z3.If(a > high, z3.IntVal(high), a)

        entry = lambda index: bounded(self._at(number, index))  # noqa: E731
        return self._call(entry, aten.clamp.default, number, low, high)

    def _along(self, way: str, number: fx.Node) -> fx.Node:
        """What is computed of a number's neighbors along the queries or the keys."""
        pick = self.pick
        shape = number.meta["val"].shape
        dims = [dim for dim in (-1, -2) if len(shape) >= -dim and not (isinstance(shape[dim], int) and shape[dim] == 1)]
        if not dims:
            return number
        dim = pick.choice(dims)
        size, length = self.size_nodes[3 + dim], (self.lengths.queries, self.lengths.keys)[2 + dim]
        own = self.entry[number]
        if way == "sums" and isinstance(length, torch.SymInt):
            way = "differences"  # z3 does not add up a number of them that it does not know.

        def at(index: Sequence[Any], position: Any) -> Any:
            place = list(index)
            place[dim] = position
            return own(place)

        if way == "turned":
            last = self.lengths.solver(length) - 1
            return self._call(lambda index: at(index, last - index[dim]), aten.flip.default, number, [dim])
        if way == "taken":
            first = pick.choice((0, 2))
            table = self._call(lambda index: index[0] + first, aten.arange.start, first, first + TABLE)
            positions = self._call(lambda index: index[0], aten.arange.default, size)
            target = pick.choice((aten.index_select.default, aten.gather.default))
            taken = self._call(lambda index: index[0] + first, target, table, 0, positions)
            return self._unsqueezed(taken, 1) if dim == -2 else taken
        if way == "sums":
            of = pick.choice((number, self._elementwise(operator.ne, aten.ne.Scalar, number, pick.randint(-1, 2))))
            if pick.random() < 0.4:
                same = self._elementwise(operator.mul, aten.mul.Tensor, number, 0)
                of = self._elementwise(operator.add, aten.add.Tensor, same, pick.choice((1, 2, -1)))

            def total(index: Sequence[Any]) -> Any:
                result: Any = z3.IntVal(0)
                for step in range(int(length)):
                    place = list(index)
                    place[dim] = z3.IntVal(step)
                    entry = self.entry[of](place)
                    entry = z3.If(entry, 1, 0) if z3.is_bool(entry) else entry
                    result += z3.If(step <= index[dim], entry, z3.IntVal(0))
                return result

            return self._call(total, aten.cumsum.default, of, dim)
        front = self._call(lambda index: own(index), aten.slice.Tensor, number, dim, 0, 1)
        less = pick.choice((0, 1, 1, 1, 2))
        before = self._elementwise(operator.sub, aten.sub.Tensor, front, less)

        def earlier(index: Sequence[Any]) -> Any:
            """The entry before, and for the first one what stands in front."""
            return z3.If(index[dim] == 0, at(index, z3.IntVal(0)) - less, at(index, index[dim] - 1))

        if way == "differences":
            return self._call(
                lambda index: own(index) - earlier(index),
                aten.diff.default, number, 1, dim, before,
            )  # fmt: skip
        joined = self._call(earlier, aten.cat.default, [before, number], dim)
        return self._call(lambda index: self.entry[joined](index), aten.slice.Tensor, joined, dim, 0, size)

    # Truth values.

    def _truth(self, depth: int = 0) -> fx.Node:
        pick = self.pick
        way = pick.choice(_WAYS)
        if depth > 2 and way not in ("compare", "padding"):
            way = "compare"
        deeper = depth + 1
        if way == "compare":
            relation, function = pick.choice(_RELATIONS)
            if pick.random() < 0.6:
                return self._elementwise(
                    function, getattr(aten, relation).Scalar, self._number(deeper), pick.randint(-3, 5)
                )
            return self._elementwise(
                function, getattr(aten, relation).Tensor, self._number(deeper), self._number(deeper)
            )
        if way in ("all", "any", "xor"):
            target, function = {
                "all": (pick.choice((aten.bitwise_and.Tensor, aten.logical_and.default)), z3.And),
                "any": (pick.choice((aten.bitwise_or.Tensor, aten.logical_or.default)), z3.Or),
                "xor": (pick.choice((aten.bitwise_xor.Tensor, aten.logical_xor.default)), z3.Xor),
            }[way]
            return self._elementwise(function, target, self._truth(deeper), self._truth(deeper))
        if way == "not":
            target = pick.choice((aten.bitwise_not.default, aten.logical_not.default))
            return self._elementwise(z3.Not, target, self._truth(deeper))
        if way == "where":
            args = (self._truth(deeper), self._truth(deeper), self._truth(deeper))
            return self._elementwise(lambda c, a, b: z3.If(c, a, b), aten.where.self, *args)
        if way == "triangle":
            return self._triangle(self._full(self._truth(deeper) if pick.random() < 0.3 else True))
        if way == "padding":
            return self._of_batch("truths", torch.bool, pick.choice((1, 2, 2)))
        if way == "written":
            return self._written(self._full(self._truth(deeper)))
        if way == "equal":
            target, function = pick.choice(((aten.eq.Tensor, operator.eq), (aten.ne.Tensor, operator.ne)))
            return self._elementwise(function, target, self._truth(deeper), self._truth(deeper))
        if way == "filled":
            value = pick.choice((True, False, 1, 0))
            return self._elementwise(
                lambda a, c, _: z3.If(c, z3.BoolVal(bool(value)), a),
                aten.masked_fill.Scalar, self._full(self._truth(deeper)), self._truth(deeper), value,
            )  # fmt: skip
        if way == "nonzero":
            number = self._number(deeper)
            if pick.random() < 0.5:
                return self._elementwise(lambda a: a != 0, aten.to.dtype, number, dtype=torch.bool)
            return self._elementwise(lambda a: a == 0, aten.logical_not.default, number)
        if way == "constant":
            return self._full(pick.random() < 0.7)
        if way == "stored":
            return self._stored()
        if way == "outside":
            dim, bound = pick.choice((1, 2)), pick.randint(0, 4)
            return self._elementwise(operator.ge, aten.ge.Scalar, self._arange(dim), bound)
        return self._isolated()

    def _full(self, what: Any) -> fx.Node:
        """Over all queries and keys."""
        shape = self.size_nodes[1:]
        if isinstance(what, bool):
            return self._call(lambda index: z3.BoolVal(what), aten.full.default, shape, what, dtype=torch.bool)
        shape = self.size_nodes[3 - max(2, what.meta["val"].dim()) :]
        return self._call(lambda index: self._at(what, index), aten.expand.default, what, shape)

    def _triangle(self, node: fx.Node) -> fx.Node:
        diagonal = self.pick.choice((0, 0, 0, 1, -1, 2, -3))
        if self.pick.random() < 0.5:
            lower = lambda index: z3.And(index[-1] - index[-2] <= diagonal, self.entry[node](index))  # noqa: E731
            return self._call(lower, aten.tril.default, node, diagonal)
        upper = lambda index: z3.And(index[-1] - index[-2] >= diagonal, self.entry[node](index))  # noqa: E731
        return self._call(upper, aten.triu.default, node, diagonal)

    def _written(self, node: fx.Node) -> fx.Node:
        """``mask[..., 1:3] = True``, or a row, a column or a diagonal of it."""
        value = self.pick.random() < 0.5
        dim = self.pick.choice((-1, -2))
        way = self.pick.choice(("select", "slice", "diagonal"))
        shape = [size if not isinstance(size, torch.SymInt) else None for size in node.meta["val"].shape]
        if way == "diagonal":
            with_value = self._call_view(aten.diagonal.default, node, 0, -2, -1)
            filled = self._call(lambda index: z3.BoolVal(value), aten.full_like.default, with_value, value)
            on = lambda index: z3.If(index[-1] == index[-2], z3.BoolVal(value), self.entry[node](index))  # noqa: E731
            return self._call(on, aten.diagonal_scatter.default, node, filled, 0, -2, -1)
        size = shape[dim]
        # A symbolic length is at least 2.
        last = 2 if size is None else size
        if way == "select":
            place = self.pick.randrange(last)
            filled = self._call_view(aten.select.int, node, dim, place)
            filled = self._call(lambda index: z3.BoolVal(value), aten.full_like.default, filled, value)
            at = lambda index: z3.If(index[dim] == place, z3.BoolVal(value), self.entry[node](index))  # noqa: E731
            return self._call(at, aten.select_scatter.default, node, filled, dim, place)
        start = self.pick.randrange(last)
        stop = self.pick.randint(start + 1, last)
        filled = self._call_view(aten.slice.Tensor, node, dim, start, stop)
        filled = self._call(lambda index: z3.BoolVal(value), aten.full_like.default, filled, value)
        within = lambda index: z3.If(  # noqa: E731
            z3.And(index[dim] >= start, index[dim] < stop), z3.BoolVal(value), self.entry[node](index)
        )
        return self._call(within, aten.slice_scatter.default, node, filled, dim, start, stop)

    def _call_view(self, target: Any, *args: Any) -> fx.Node:
        """A view of which only the shape matters."""
        return self._call(lambda index: z3.BoolVal(False), target, *args)

    def _stored(self) -> fx.Node:
        """A triangle that was stored, cut to the lengths (GPT-2's buffer)."""
        diagonal = self.pick.choice((0, 0, 1, -2))
        lower = self.pick.random() < 0.7
        name = f"stored_{'tril' if lower else 'triu'}_{diagonal + 2}"
        triangle = _stored_triangle(lower, diagonal)
        with self.lengths.mode:
            fake = torch.empty(TABLE, TABLE, dtype=torch.bool)
        inside = lambda index: (  # noqa: E731
            index[1] - index[0] <= diagonal if lower else index[1] - index[0] >= diagonal
        )
        buffer = self._input(name, fake, inside)
        buffer.meta["stored"] = StoredPattern(triangle)
        if self.lengths.dynamic:
            # Dynamo knows that a length fits only by a guard: the whole is compared in its place.
            return self._triangle(self._full(True))
        rows = self._call(lambda index: self.entry[buffer](index), aten.slice.Tensor, buffer, 0, 0, self.size_nodes[1])
        return self._call(lambda index: self.entry[rows](index), aten.slice.Tensor, rows, 1, 0, self.size_nodes[2])

    def _isolated(self) -> fx.Node:
        """Within a block of positions each is kept to itself."""
        i, j = (self._unsqueezed(self._call(lambda index: index[0], aten.arange.default, self.size_nodes[d]), 2 - d)
                for d in (1, 2))  # fmt: skip
        bound = self.pick.randint(1, 4)
        upper = self.pick.random() < 0.5
        target, function = (aten.ge.Scalar, operator.ge) if upper else (aten.lt.Scalar, operator.lt)
        both = self._elementwise(
            z3.And, aten.bitwise_and.Tensor, *(self._elementwise(function, target, x, bound) for x in (i, j))
        )
        if self.pick.random() < 0.3:
            stop = bound + self.pick.randint(1, 3)
            target, function = (aten.lt.Scalar, operator.lt) if upper else (aten.ge.Scalar, operator.ge)
            if upper:
                for x in (i, j):
                    below = self._elementwise(function, target, x, stop)
                    both = self._elementwise(z3.And, aten.bitwise_and.Tensor, both, below)
        own = self._elementwise(operator.eq, aten.eq.Tensor, i, j)
        if self.pick.random() < 0.5:
            other = self._elementwise(z3.Not, aten.bitwise_not.default, both)
            return self._elementwise(z3.Or, aten.bitwise_or.Tensor, other, own)
        apart = self._elementwise(operator.ne, aten.ne.Tensor, i, j)
        closed = self._elementwise(z3.And, aten.bitwise_and.Tensor, both, apart)
        return self._elementwise(z3.Not, aten.logical_not.default, closed)

    # Terms.

    def _draw_term(self) -> None:
        pick = self.pick
        condition = self._truth()
        open_where_true = pick.random() < 0.7
        way = pick.choice(("fill", "fill", "where", "product", "masked_fill"))
        low = pick.choice((-math.inf, -1e9, torch.finfo(torch.float32).min))
        self.kept.append((condition, open_where_true))
        if way == "fill":
            self.terms.append(Fill(self._operand(condition), low, torch.float32, invert=open_where_true))
            return
        with_value: Entry = lambda index: z3.IntVal(0)  # noqa: E731
        if way == "where":
            numbers = (0.0, low) if open_where_true else (low, 0.0)
            added = self._call(with_value, aten.where.Scalar, condition, *numbers)
        elif way == "product":
            numbers_of = self._call(with_value, aten.to.dtype, condition, torch.float32)
            if open_where_true:
                numbers_of = self._call(with_value, aten.rsub.Scalar, numbers_of, 1.0)
            added = self._call(with_value, aten.mul.Tensor, numbers_of, max(low, -1e30))
        else:
            closed = condition
            if open_where_true:
                closed = self._elementwise(z3.Not, aten.logical_not.default, condition)
            zeros = self._call(with_value, aten.zeros.default, self.size_nodes[1:])
            added = self._call(with_value, aten.masked_fill.Scalar, zeros, closed, low)
        self.terms.append(Bias(self._operand(added), torch.float32))

    def _operand(self, node: fx.Node) -> Operand:
        shape = node.meta["val"].shape
        layout: Layout = tuple(
            () if isinstance(size, int) and size == 1 else axes
            for size, axes in zip(shape, self.axes[3 - len(shape) :], strict=True)
        )
        return Operand(node, layout)

    def is_kept(self, term: int, batch: Any, query: Any, key: Any) -> Any:
        """Whether a term keeps a score, in z3."""
        condition, open_where_true = self.kept[term]
        value = self._at(condition, [batch, query, key])
        return value if open_where_true else z3.Not(value)

    # Real tensors.

    def values(self, queries: int, keys: int) -> dict[fx.Node, Any]:
        """The value of every node, computed."""
        generator = torch.Generator().manual_seed(self.pick.randrange(2**31))
        found: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                found[node] = self._real(node, queries, keys, generator)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = node.target(*args, **kwargs)
        return found

    def _real(self, node: fx.Node, queries: int, keys: int, generator: torch.Generator) -> torch.Tensor:
        stored = node.meta.get("stored")
        if stored is not None:
            return stored.tensor  # type: ignore[no-any-return]
        name = str(node.target)
        if name == "scores":
            return torch.zeros(BATCHES, queries, keys)
        sizes = {"0": [BATCHES], "1": [BATCHES, queries], "2": [BATCHES, keys]}.get(name[-1], [BATCHES, keys])
        if name.startswith("truths"):
            return torch.rand(sizes, generator=generator) < 0.6
        return torch.randint(-1, 4, sizes, generator=generator)


def _stored_triangle(lower: bool, diagonal: int) -> torch.Tensor:
    ones = torch.ones(TABLE, TABLE, dtype=torch.bool)
    return ones.tril(diagonal) if lower else ones.triu(diagonal)


_RELATIONS = (
    ("le", operator.le),
    ("lt", operator.lt),
    ("ge", operator.ge),
    ("gt", operator.gt),
    ("eq", operator.eq),
    ("ne", operator.ne),
)

_WAYS = (
    *("compare",) * 7,
    *("triangle", "block") * 2,
    *("all", "any", "xor", "not", "where", "equal", "filled", "nonzero", "written"),
    *("padding", "outside", "constant", "stored"),
)
"""What truth values are made of."""

_OPERANDS = (
    *("i", "j", "i-j") * 2,
    *("distance", "plus", "times", "input", "blocks", "table", "chosen", "negative", "from the end"),
    *("between", "remainder", "joined", "differences", "sums", "turned", "taken"),
)
"""What is compared."""
