"""Spans: which part of a tensor a node takes, or writes to. Sizes may be symbolic, and nothing is guarded on."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.nodes import Size, is_tensor, same, tensor
from attnrewrite.ir.ops import SPLIT_OPS

__all__ = ["Span", "Taken", "argument_of", "dim_of", "same_span", "span_of", "taken_from"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Span:
    """The index range ``start : start + size``."""

    start: Size
    size: Size

    @property
    def stop(self) -> Size:
        return self.start + self.size


def same_span(a: Span, b: Span) -> bool:
    return same(a.start, b.start) and same(a.size, b.size)


@dataclass(frozen=True)
class Taken:
    """The part ``span`` of ``source`` along ``dim``; ``selected`` if the dimension was removed, as by ``x[0]``."""

    source: fx.Node
    dim: int
    span: Span
    selected: bool = False


def taken_from(node: fx.Node) -> Taken | None:
    """The part that ``node`` takes by a slice, a selection or a split; None for any other node."""
    args: Any = node.args
    target: Any = node.target
    if node.op != "call_function" or not args or not is_tensor(node):
        return None
    if target is operator.getitem:
        return _from_split(args[0], args[1])
    if target not in (aten.slice.Tensor, aten.select.int) or not is_tensor(args[0]):
        return None
    span = span_of(node, tensor(node))
    dim = dim_of(node, tensor(args[0]).dim())
    return None if span is None else Taken(args[0], dim, span, target is aten.select.int)


def _from_split(split: Any, index: int) -> Taken | None:
    if not isinstance(split, fx.Node) or split.target not in SPLIT_OPS or not is_tensor(split.args[0]):
        return None
    source: Any = split.args[0]
    given = argument_of(split, 1 if split.target is aten.unbind.int else 2, "dim", 0)
    if not isinstance(given, int):
        return None
    dim = given % tensor(source).dim()
    if split.target is aten.unbind.int:
        return Taken(source, dim, Span(index, 1), True)
    sizes = [part.shape[dim] for part in split.meta["val"]]
    return Taken(source, dim, Span(sum(sizes[:index]), sizes[index]))


def argument_of(node: fx.Node, position: int, name: str, default: Any) -> Any:
    value: Any = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def dim_of(node: fx.Node, rank: int, position: int = 1) -> int:
    return int(argument_of(node, position, "dim", 0)) % rank


def span_of(node: fx.Node, part: torch.Tensor, position: int = 1) -> Span | None:
    """The span of a slice, a selection, or their scatters; None if it is not known or has a step.

    Args:
        node: the call.
        part: the fake tensor that is taken, or written.
        position: the position of the argument ``dim``.
    """
    whole = tensor(node.args[0])
    dim = dim_of(node, whole.dim(), position)
    if node.target in (aten.select.int, aten.select_scatter.default):
        start = _from_start(argument_of(node, position + 1, "index", 0), whole.shape[dim])
        return None if start is None else Span(start, 1)
    if argument_of(node, position + 3, "step", 1) != 1:
        return None
    start = _from_start(argument_of(node, position + 1, "start", 0), whole.shape[dim])
    return None if start is None else Span(start, part.shape[dim])


def _from_start(index: Any, size: Size) -> Size | None:
    """The start of a slice as a nonnegative index; None if its sign is not known."""
    if index is None:
        return 0
    if not isinstance(index, (int, torch.SymInt)):
        return None
    if statically_known_true(index >= 0):
        return min(index, size) if isinstance(index, int) and isinstance(size, int) else index
    if statically_known_true(index < 0) and statically_known_true(index + size >= 0):
        return index + size
    return None
