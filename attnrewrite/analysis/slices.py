"""Slices: which part of a tensor a node takes, and from which pieces a tensor is assembled.

A slice, a selection or a split takes a part. A concatenation, a stack, or a chain of scatters (slices written into a
buffer, one after another) assembles a whole. Parts and pieces are boxes of index ranges with sizes that may be
symbolic; only what is known for every input is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.nodes import Size, is_tensor, same, tensor
from attnrewrite.ir.ops import CAT_OPS
from attnrewrite.ir.reason import FINE, Reason
from attnrewrite.ir.spans import Span, Taken, dim_of, same_span, span_of, taken_from

__all__ = ["Assembly", "Box", "Piece", "assemblies", "grid"]

aten = torch.ops.aten


Box = tuple[Span, ...]


def _within(a: Span, b: Span) -> bool:
    return same_span(a, b) or (_at_most(b.start, a.start) and _at_most(a.stop, b.stop))


def _disjoint(a: Span, b: Span) -> bool:
    return _at_most(a.stop, b.start) or _at_most(b.stop, a.start)


def _at_most(a: Size, b: Size) -> bool:
    return statically_known_true(a <= b)


# How a tensor is assembled.


@dataclass(frozen=True)
class Piece:
    """``node`` fills the ``box`` of a whole; ``dims`` has its dimension for each of the whole's, or None."""

    box: Box
    node: fx.Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class _Ground:
    """The contents where no piece was written: the ``box`` of ``node``, with only the ``kept`` dimensions."""

    node: fx.Node
    box: Box
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Assembly:
    """A tensor that is assembled from pieces.

    Attributes:
        pieces: the pieces.
        ground: the contents where no piece was written; None if the pieces cover the whole.
        nodes: the nodes that assemble it.
        problem: why the pieces cannot be separated; empty if they can.
    """

    pieces: tuple[Piece, ...] = ()
    ground: _Ground | None = None
    nodes: frozenset[fx.Node] = field(default=frozenset())
    problem: Reason = FINE

    @property
    def buffer(self) -> fx.Node | None:
        """The tensor that the pieces were written into; None for a concatenation."""
        return None if self.ground is None else self.ground.node


def _box_of(shape: Iterable[Size]) -> Box:
    return tuple(Span(0, size) for size in shape)


def _unassembled(node: fx.Node) -> Assembly:
    shape = tensor(node).shape
    return Assembly(ground=_Ground(node, _box_of(shape), tuple(range(len(shape)))))


def assemblies(graph: fx.Graph) -> dict[fx.Node, Assembly]:
    """The assembly of each concatenation, stack and scatter of the graph, in graph order."""
    known: dict[fx.Node, Assembly] = {}
    found: dict[fx.Node, Assembly] = {}

    def contents(node: fx.Node) -> Assembly:
        return known.get(node) or _unassembled(node)

    for node in graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        args: Any = node.args
        if node.target in CAT_OPS:
            # torch.cat skips empty tensors of one dimension (such as the empty cache of transformers).
            rank = tensor(node).dim() - (node.target is aten.stack.default)
            if all(is_tensor(part) and tensor(part).dim() == rank for part in args[0]):
                known[node] = found[node] = _concatenated(node, [(part, contents(part)) for part in args[0]])
        elif node.target in (aten.slice_scatter.default, aten.select_scatter.default):
            known[node] = found[node] = _scattered(node, contents(args[0]), contents(args[1]))
        elif node.target in (aten.slice.Tensor, aten.select.int):
            taken = taken_from(node)
            before = None if taken is None else _restricted(contents(taken.source), taken)
            if before is not None:
                known[node] = replace(before, nodes=before.nodes | {node})
    return found


def _concatenated(node: fx.Node, parts: Sequence[tuple[fx.Node, Assembly]]) -> Assembly:
    """The assembly of a concatenation or stack, of the pieces of its parts."""
    stacked = node.target is aten.stack.default
    dim = dim_of(node, tensor(node).dim())
    pieces: list[Piece] = []
    nodes = {node}
    start: Size = 0
    for part, inside in parts:
        size = 1 if stacked else tensor(part).shape[dim]
        own = inside if inside.pieces and grid(inside.pieces, tensor(part).shape) is not None else _single_piece(part)
        nodes |= own.nodes
        pieces += [_placed(piece, dim, Span(start, size), stacked) for piece in own.pieces]
        start = start + size
    return Assembly(tuple(pieces), None, frozenset(nodes))


def _single_piece(node: fx.Node) -> Assembly:
    shape = tensor(node).shape
    return Assembly((Piece(_box_of(shape), node, tuple(range(len(shape)))),))


def _placed(piece: Piece, dim: int, span: Span, inserted: bool) -> Piece:
    """A piece of a part as a piece of the whole: the part is ``span`` along ``dim``, a new one if ``inserted``."""
    if inserted:
        return Piece(
            (*piece.box[:dim], span, *piece.box[dim:]), piece.node, (*piece.dims[:dim], None, *piece.dims[dim:])
        )
    return _moved(piece, dim, span.start)


def _moved(piece: Piece, dim: int, by: Size) -> Piece:
    box = list(piece.box)
    box[dim] = Span(box[dim].start + by, box[dim].size)
    return replace(piece, box=tuple(box))


def _scattered(node: fx.Node, into: Assembly, source: Assembly) -> Assembly:
    """The assembly ``into`` after the scatter ``node`` wrote ``source`` into it."""
    args: Any = node.args
    selected = node.target is aten.select_scatter.default
    span = span_of(node, tensor(args[1]), position=2)
    if span is None:
        return _unassembled(node)
    dim = dim_of(node, tensor(node).dim(), position=2)
    taken = Taken(args[0], dim, span, selected)
    before = _restricted(into, taken)
    if before is None:
        piece = _placed(_single_piece(args[1]).pieces[0], dim, span, selected)
        nodes = into.nodes | {node}
        return Assembly((*into.pieces, piece), into.ground, nodes, into.problem or Reason("slices overlap"))
    covered = bool(source.pieces) and grid(source.pieces, tensor(args[1]).shape) is not None
    if not covered and not (source.ground is not None and _same_ground(source.ground, before.ground)):
        source = _single_piece(args[1])
    kept = [piece for piece in into.pieces if not _within(piece.box[dim], span)]
    new = [_placed(piece, dim, span, selected) for piece in source.pieces]
    return Assembly((*kept, *new), into.ground, into.nodes | source.nodes | {node}, into.problem or source.problem)


def _same_ground(a: _Ground, b: _Ground | None) -> bool:
    return b is not None and a.node is b.node and a.kept == b.kept and all(map(same_span, a.box, b.box))


def _restricted(whole: Assembly, taken: Taken) -> Assembly | None:
    """The assembly of a part of ``whole``; None if the part cuts a piece."""
    dim, span = taken.dim, taken.span
    pieces: list[Piece] = []
    for piece in whole.pieces:
        own = piece.box[dim]
        if _within(own, span):
            moved = _moved(piece, dim, -span.start)
            if taken.selected:
                box, dims = moved.box, moved.dims
                moved = Piece((*box[:dim], *box[dim + 1 :]), piece.node, (*dims[:dim], *dims[dim + 1 :]))
            pieces.append(moved)
        elif not _disjoint(own, span):
            return None
    ground = whole.ground
    if ground is not None:
        at = ground.kept[dim]
        outer = list(ground.box)
        outer[at] = Span(outer[at].start + span.start, span.size)
        kept = tuple(own for own in ground.kept if own != at) if taken.selected else ground.kept
        ground = _Ground(ground.node, tuple(outer), kept)
    return replace(whole, pieces=tuple(pieces), ground=ground)


def grid(pieces: Sequence[Piece], shape: Sequence[Size]) -> list[list[Span]] | None:
    """The spans that the pieces divide each dimension into, in order.

    None if the pieces are not known to form a grid that covers the whole exactly once.
    """
    spans: list[list[Span]] = []
    places: list[tuple[int, ...]] = [() for _ in pieces]
    cells = 1
    for dim, size in enumerate(shape):
        order = _in_order([piece.box[dim] for piece in pieces], size)
        if order is None:
            return None
        along, positions = order
        spans.append(along)
        places = [(*place, position) for place, position in zip(places, positions, strict=True)]
        cells *= len(along)
    return spans if len(pieces) == cells == len(set(places)) else None


def _in_order(spans: Sequence[Span], size: Size) -> tuple[list[Span], list[int]] | None:
    """The distinct spans in order from 0 to ``size``, and for each of ``spans`` its place among them.

    None if they leave a gap or overlap, or if that is not known.
    """
    different: list[Span] = []
    index: list[int] = []
    seen: dict[Any, int] = {}
    for span in spans:
        key = (_key(span.start), _key(span.size))
        if key not in seen:
            seen[key] = len(different)
            different.append(span)
        index.append(seen[key])
    starts = {_key(span.start): number for number, span in enumerate(different)}
    order: list[int] = []
    end: Size = 0
    while not same(end, size):
        following = starts.get(_key(end))
        if following is None:
            following = next((n for n, span in enumerate(different) if n not in order and same(span.start, end)), None)
        if following is None or following in order:
            return None
        order.append(following)
        end = different[following].stop
    if len(order) != len(different):
        return None
    place = {number: position for position, number in enumerate(order)}
    return [different[number] for number in order], [place[number] for number in index]


def _key(size: Size) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
