"""Finds the tensor that given nodes are slices of, or writes it if no node holds it.

If the same elementwise operation is applied to each slice (a mask inverted slice by slice, a query scaled slice by
slice), the results are slices of the same operation applied to the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.bounds import EQUAL_STEPS
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, is_tensor, same, tensor
from attnrewrite.ir.ops import is_cast, is_pointwise, is_pure, same_argument
from attnrewrite.ir.spans import Span, Taken, same_span, taken_from
from attnrewrite.ir.views import permutation_of

__all__ = ["NotSlices", "Whole", "Wholes"]

aten = torch.ops.aten


class NotSlices(Exception):
    """Sites whose results are put together cannot be merged; the message says why."""


@dataclass(frozen=True)
class Whole:
    """The tensor that some nodes are slices of.

    Attributes:
        node: the tensor.
        dims: for each of its dimensions, the slices' dimension; None if it was selected.
        sliced: for each of its sliced dimensions, the range that it is sliced along.
    """

    node: fx.Node
    dims: tuple[int | None, ...]
    sliced: Mapping[int, int]

    def aligned(self) -> bool:
        """Whether the tensor and the slices have the same dimensions in the same order."""
        return self.dims == tuple(range(len(self.dims)))


class Wholes:
    """Finds the whole tensors of slices whose spans of each range are known."""

    def __init__(
        self,
        spans: Mapping[int, Sequence[Span]],
        sizes: Mapping[int, Size],
        builder: Builder,
        may_move: Callable[[fx.Node], bool],
    ) -> None:
        """
        Args:
            spans: for each range, by name, the span that each slice covers.
            sizes: the length of each range.
            builder: writes a whole tensor that no node holds.
            may_move: whether a node's computation may be repeated where ``builder`` writes.
        """
        self._spans = spans
        self._sizes = sizes
        self._builder = builder
        self._may_move = may_move
        self._found: dict[tuple[fx.Node, ...], Whole] = {}

    def of(self, nodes: Sequence[fx.Node], what: str) -> Whole:
        """The whole tensor of ``nodes``, one node for each slice.

        Args:
            what: the name of the operand in messages.

        Raises:
            NotSlices: the nodes are not known to be slices of one tensor along these ranges.
        """
        key = tuple(nodes)
        if key not in self._found:
            self._found[key] = self._look_for(nodes, what)
        return self._found[key]

    def _look_for(self, nodes: Sequence[fx.Node], what: str) -> Whole:
        first = nodes[0]
        if all(node is first for node in nodes):
            return Whole(first, tuple(range(tensor(first).dim())), {})
        if all(self._equal(node, first) for node in nodes):
            # It is computed again for each slice.
            return Whole(first, tuple(range(tensor(first).dim())), {})
        if not all(map(self._may_move, nodes)):
            raise NotSlices(f"the {what} of the slices is computed under another grad mode or autocast")
        taken = _taken(nodes)
        if len(taken) == len(nodes) and len({(part.dim, part.selected) for part in taken}) == 1:
            return self._sliced(taken, what)
        if first.target in _CONSTANT and all(_same_constant(node, first) for node in nodes):
            return self._constant(first)
        if all(_same_call(node, first) for node in nodes):
            if first.target is aten.arange.start:
                return self._arange(nodes, what)
            if is_cast(first) or is_pointwise(first):
                return self._entry_by_entry(nodes, what)
            if (
                first.args
                and is_tensor(first.args[0])
                and (first.target is aten.unsqueeze.default or permutation_of(first) is not None)
            ):
                return self._rearranged(nodes, what)
        raise NotSlices(f"the {what} of the slices is not known to be sliced from one tensor")

    def _equal(self, a: fx.Node, b: fx.Node, steps: int = 0) -> bool:
        """Structural equality of two nodes, compared up to ``EQUAL_STEPS`` steps back."""
        if a is b:
            return True
        if a.op != "call_function" or a.target is not b.target or not (is_pure(a) and is_pure(b)):
            return False
        if a.kwargs != b.kwargs or len(a.args) != len(b.args) or not (self._may_move(a) and self._may_move(b)):
            return False
        if not EQUAL_STEPS.allows(steps + 1):
            return False
        pairs: list[tuple[Any, Any]] = list(zip(a.args, b.args, strict=True))
        return all(
            self._equal(x, y, steps + 1) if is_tensor(x) and is_tensor(y) else same_argument(x, y) for x, y in pairs
        )

    def _sliced(self, taken: Sequence[Taken], what: str) -> Whole:
        whole = self.of([part.source for part in taken], what)
        own = taken[0].dim
        dim = whole.dims.index(own)
        if all(same_span(part.span, Span(0, tensor(part.source).shape[own])) for part in taken):
            return whole if not taken[0].selected else replace(whole, dims=_without(own, whole.dims))
        dims = _without(own, whole.dims) if taken[0].selected else whole.dims
        for name, spans in self._spans.items():
            if all(same_span(part.span, span) for part, span in zip(taken, spans, strict=True)):
                if dim in whole.sliced or name in whole.sliced.values():
                    raise NotSlices(f"the {what} is sliced twice")
                if not same(tensor(whole.node).shape[dim], self._sizes[name]):
                    raise NotSlices(f"the slices do not cover all of the {what}")
                return Whole(whole.node, dims, {**whole.sliced, dim: name})
        first = taken[0].span
        if dim not in whole.sliced and all(same_span(part.span, first) for part in taken):
            # The same part of each slice is a slice of that part.
            node = self._builder.call(aten.slice.Tensor, whole.node, dim, first.start, first.stop)
            return Whole(node, dims, whole.sliced)
        raise NotSlices(f"the {what} and the result are not sliced alike")

    def _arange(self, nodes: Sequence[fx.Node], what: str) -> Whole:
        """The ``arange`` over a whole range, of which the slices have ``arange(start, end)``."""
        bounds = [[_value(arg) for arg in node.args[:2]] for node in nodes]
        for name, spans in self._spans.items():
            if all(same(a, span.start) and same(b, span.stop) for (a, b), span in zip(bounds, spans, strict=True)):
                node = self._builder.call(aten.arange.start, 0, self._sizes[name], **nodes[0].kwargs)
                return Whole(node, (0,), {0: name})
        raise NotSlices(f"the {what} and the result are not sliced alike")

    def _constant(self, node: fx.Node) -> Whole:
        """A constant tensor of one entry, which broadcasts."""
        rank = tensor(node).dim()
        one = self._builder.call(node.target, [1] * rank, *node.args[1:], **node.kwargs)
        return Whole(one, tuple(range(rank)), {})

    def _entry_by_entry(self, nodes: Sequence[fx.Node], what: str) -> Whole:
        first = nodes[0]
        args: list[Any] = []
        wholes: list[Whole] = []
        for position, own in enumerate(first.args):
            if is_tensor(own):
                wholes.append(self.of([node.args[position] for node in nodes], what))  # type: ignore[misc]
                args.append(wholes[-1].node)
            elif all(same_argument(node.args[position], own) for node in nodes):
                args.append(own)
            else:
                raise NotSlices(f"the slices differ in their {what}")
        model = max(wholes, key=lambda whole: len(whole.dims))
        rank = len(model.dims)
        sliced: dict[int, int] = {}
        for whole in wholes:
            # Broadcasting aligns dimensions from the last one.
            offset = rank - len(whole.dims)
            if whole.dims != model.dims and not (whole.aligned() and None not in model.dims[offset:]):
                raise NotSlices(f"the {what} of the slices is not known to be sliced from one tensor")
            for dim, name in whole.sliced.items():
                if sliced.setdefault(dim + offset, name) != name:
                    raise NotSlices(f"the {what} is sliced along another axis than the result")
        for whole in wholes:
            offset = rank - len(whole.dims)
            for dim in sliced:
                own = dim - offset
                if own >= 0 and own not in whole.sliced and not same(tensor(whole.node).shape[own], 1):
                    raise NotSlices(f"the slices share the {what}, which has the axis that the result is sliced along")
        if len(set(sliced.values())) < len(sliced) or first.kwargs.get("out") is not None:
            raise NotSlices(f"the {what} is sliced twice")
        return Whole(self._builder.call(first.target, *args, **first.kwargs), model.dims, sliced)

    def _rearranged(self, nodes: Sequence[fx.Node], what: str) -> Whole:
        whole = self.of([node.args[0] for node in nodes], what)  # type: ignore[misc]
        if not whole.aligned():
            raise NotSlices(f"the {what} of the slices is rearranged after a selection")
        first = nodes[0]
        node = self._builder.call(first.target, whole.node, *first.args[1:], **first.kwargs)
        order = permutation_of(first)
        rank = tensor(first).dim()
        if order is None:
            new = int(first.args[1]) % rank  # type: ignore[arg-type]
            order = [dim - (dim > new) if dim != new else -1 for dim in range(rank)]
        sliced = {dim: whole.sliced[source] for dim, source in enumerate(order) if source in whole.sliced}
        return Whole(node, tuple(range(rank)), sliced)


def _taken(nodes: Sequence[fx.Node]) -> list[Taken]:
    """The slices that the nodes are; among slices of one tensor, the tensor itself counts as one."""
    found = [taken_from(node) for node in nodes]
    known = [part for part in found if part is not None]
    if known and len(known) < len(found) and all(part.source is known[0].source for part in known):
        source, dim = known[0].source, known[0].dim
        all_of_it = Taken(source, dim, Span(0, tensor(source).shape[dim]))
        return [part or all_of_it for part, node in zip(found, nodes, strict=True) if part or node is source]
    return known


def _without(own: int, dims: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """``dims`` after the slices' dimension ``own`` was selected."""
    return tuple(None if dim is None or dim == own else dim - (dim > own) for dim in dims)


def _same_call(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes call the same operator with the same arguments, apart from tensors and sizes."""
    return (
        a.op == b.op == "call_function"
        and a.target is b.target
        and len(a.args) == len(b.args)
        and [is_tensor(arg) for arg in a.args] == [is_tensor(arg) for arg in b.args]
        and a.kwargs == b.kwargs
        and not any(isinstance(value, fx.Node) for value in a.kwargs.values())
        and is_tensor(a)
        and is_tensor(b)
        and tensor(a).dim() == tensor(b).dim()
        and (a.target is aten.arange.start or a.args[1:] == b.args[1:] or is_pointwise(a))
    )


_CONSTANT = frozenset({aten.zeros.default, aten.ones.default, aten.full.default})


def _same_constant(a: fx.Node, b: fx.Node) -> bool:
    """Whether two constant nodes hold the same number; their sizes may differ."""
    return (
        a.target is b.target
        and len(a.args) == len(b.args)
        and all(map(same_argument, a.args[1:], b.args[1:]))
        and a.kwargs == b.kwargs
        and tensor(a).dim() == tensor(b).dim()
    )


def _value(argument: Any) -> Any:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    return value if isinstance(value, (int, torch.SymInt)) else -1
