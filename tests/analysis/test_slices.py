"""Boxes that cover a whole exactly once, what a node was taken from, and what a tensor is put together of."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnrewrite.analysis.slices import Assembly, Box, Piece, assemblies, grid
from attnrewrite.ir.spans import Span, same_span, taken_from
from tests.support.graphs import Written

aten = torch.ops.aten
quick = settings(max_examples=200, deadline=None, derandomize=True)


def _piece(*spans: tuple[Any, Any]) -> Piece:
    node = fx.Graph().placeholder("piece")
    return Piece(tuple(Span(*span) for span in spans), node, tuple(range(len(spans))))


def _covered(boxes: list[Box]) -> Counter[tuple[int, ...]]:
    """How often each place is in a box."""
    places: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        places.update(itertools.product(*(range(int(span.start), int(span.stop)) for span in box)))
    return places


def _once(shape: tuple[int, ...]) -> Counter[tuple[int, ...]]:
    return Counter(itertools.product(*map(range, shape)))


@st.composite
def divisions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[Span]]]:
    """A shape, and the spans that each of its dimensions is divided into."""
    sizes = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3))
    spans = [[Span(sum(parts[:n]), size) for n, size in enumerate(parts)] for parts in sizes]
    return tuple(map(sum, sizes)), spans


def _pieces_of(spans: list[list[Span]]) -> list[Piece]:
    return [_piece(*((span.start, span.size) for span in box)) for box in itertools.product(*spans)]


@quick
@given(divisions(), st.randoms(use_true_random=False))
def test_a_grid_is_found_in_any_order(division: tuple[tuple[int, ...], list[list[Span]]], order: Any) -> None:
    shape, spans = division
    pieces = _pieces_of(spans)
    order.shuffle(pieces)
    assert grid(pieces, shape) == spans


@quick
@given(divisions(), st.data())
def test_one_piece_that_is_wrong(division: tuple[tuple[int, ...], list[list[Span]]], data: st.DataObject) -> None:
    shape, spans = division
    pieces = _pieces_of(spans)
    place = data.draw(st.integers(0, len(pieces) - 1))
    dim = data.draw(st.integers(0, len(shape) - 1))
    piece = pieces[place]
    way = data.draw(st.sampled_from(("missing", "twice", "moved", "longer", "shorter")))
    if way == "missing":
        del pieces[place]
    elif way == "twice":
        pieces.append(piece)
    else:
        own = piece.box[dim]
        start, size = own.start + (way == "moved"), own.size + (way == "longer") - (way == "shorter")
        box = (*piece.box[:dim], Span(start, size), *piece.box[dim + 1 :])
        pieces[place] = Piece(box, piece.node, piece.dims)
    assert grid(pieces, shape) is None


@quick
@given(
    st.lists(st.tuples(*[st.integers(0, 2), st.integers(1, 3)] * 2), min_size=1, max_size=4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_what_is_found_covers_each_place_once(boxes: list[tuple[int, ...]], shape: tuple[int, int]) -> None:
    pieces = [_piece(box[:2], box[2:]) for box in boxes]  # type: ignore[arg-type]
    found = grid(pieces, shape)
    if found is not None:
        assert _covered([piece.box for piece in pieces]) == _once(shape)
        assert Counter(piece.box for piece in pieces) == Counter(itertools.product(*found))


def test_a_cover_that_is_no_grid() -> None:
    """Four around one."""
    boxes = [((0, 1), (0, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 2), (0, 1)), ((1, 1), (1, 1))]
    pieces = [_piece(*box) for box in boxes]
    assert _covered([piece.box for piece in pieces]) == _once((3, 3))
    assert grid(pieces, (3, 3)) is None


def test_no_pieces() -> None:
    assert grid([], (2, 3)) is None
    assert grid([_piece()], ()) == []


def _lengths() -> tuple[Any, Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    first, second = mode.from_tensor(torch.zeros(5, 7), symbolic_context=context).shape
    return first, second


def test_symbolic_lengths() -> None:
    first, second = _lengths()
    one, two = Span(0, first), Span(first, second)
    found = grid([_piece((first, second)), _piece((0, first))], (first + second,))
    assert found is not None
    assert all(map(same_span, found[0], [one, two]))
    # A gap of unknown length, an overlap, and a whole that may be longer.
    assert grid([_piece((0, first)), _piece((second, first))], (first + second,)) is None
    assert grid([_piece((0, first)), _piece((first - 1, second))], (first + second - 1,)) is None
    assert grid([_piece((0, first)), _piece((first, second))], (first * 2,)) is None
    assert not same_span(one, two)
    assert same_span(Span(first + 1 - 1, second), two)


# What a node was taken from.


_TAKING: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.slice.Tensor, (1, 2, 5)),
    (aten.slice.Tensor, (-1, -3, 2**62)),
    (aten.slice.Tensor, (0, 1)),
    (aten.slice.Tensor, (1, 4, 100)),
    (aten.slice.Tensor, (1, 9, 12)),
    (aten.slice.Tensor, (1, 1, -2)),
    (aten.select.int, (1, 3)),
    (aten.select.int, (-2, -1)),
]


@pytest.mark.parametrize(("target", "args"), _TAKING)
def test_taken(target: Any, args: tuple[Any, ...]) -> None:
    graph = Written()
    node = graph.call(target, graph.source(torch.arange(4 * 6 * 5).view(4, 6, 5)), *args)
    _assert_taken(node)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.split.Tensor, (4, 1)),
        (aten.split_with_sizes.default, ([1, 3, 2], -2)),
        (aten.unsafe_split.Tensor, (4, 1)),
        (aten.unsafe_split_with_sizes.default, ([1, 3, 2], -2)),
        (aten.unbind.int, (2,)),
    ],
)
def test_split(target: Any, args: tuple[Any, ...]) -> None:
    graph = Written()
    split = graph.call(target, graph.source(torch.arange(4 * 6 * 5).view(4, 6, 5)), *args)
    for index in range(len(split.meta["val"])):
        _assert_taken(graph.call(operator.getitem, split, index))


def _assert_taken(node: fx.Node) -> None:
    taken = taken_from(node)
    assert taken is not None
    part = taken.source.meta["val"].narrow(taken.dim, taken.span.start, taken.span.size)
    assert torch.equal(part.squeeze(taken.dim) if taken.selected else part, node.meta["val"])


def test_every_second_is_no_span() -> None:
    graph = Written()
    assert taken_from(graph.call(aten.slice.Tensor, graph.source(torch.arange(6)), 0, 0, 6, 2)) is None
    assert taken_from(graph.call(aten.clone.default, graph.source(torch.arange(6)))) is None


# What a tensor is put together of.


@st.composite
def programs(draw: st.DrawFn) -> fx.Graph:
    """Slices, concatenations, stacks and writes into slices, of tensors (2 to 4, 2 to 4), each entry another number."""
    graph = Written()
    count = itertools.count()

    def fresh(*shape: int) -> fx.Node:
        size = torch.Size(shape).numel()
        return graph.source(torch.tensor([next(count) for _ in range(size)]).view(shape))

    node = fresh(draw(st.integers(2, 4)), draw(st.integers(2, 4)))
    for _ in range(draw(st.integers(1, 5))):
        shape = list(node.meta["val"].shape)
        dim = draw(st.integers(0, 1))
        way = draw(st.sampled_from(("cat", "stack", "slice", "write", "write", "write", "row")))
        if way == "cat":
            shape[dim] = draw(st.integers(1, 2))
            node = graph.call(aten.cat.default, draw(st.permutations([node, fresh(*shape)])), dim)
        elif way == "stack":
            rows = graph.call(aten.select.int, node, dim, 0)
            node = graph.call(aten.stack.default, [rows, fresh(*rows.meta["val"].shape)], dim)
        elif way == "row":
            place = draw(st.integers(-shape[dim], shape[dim] - 1))
            node = graph.call(aten.select_scatter.default, node, fresh(shape[1 - dim]), dim, place)
        else:
            start = draw(st.integers(0, shape[dim] - 1))
            stop = draw(st.integers(start + 1, shape[dim]))
            part = graph.call(aten.slice.Tensor, node, dim, start, stop)
            if way == "slice":
                node = part
                continue
            # A write into a part of the part, or over all of it.
            own = list(part.meta["val"].shape)
            if draw(st.booleans()):
                first = draw(st.integers(0, own[1 - dim] - 1))
                own[1 - dim] = own[1 - dim] - first
                written = graph.call(aten.slice_scatter.default, part, fresh(*own), 1 - dim, first)
            else:
                written = fresh(*own)
            node = graph.call(aten.slice_scatter.default, node, written, dim, start, stop)
    return graph.graph


@quick
@given(programs())
def test_pieces_put_together_are_the_whole(graph: fx.Graph) -> None:
    found = assemblies(graph)
    for node, assembly in found.items():
        if not assembly.problem:
            assert torch.equal(_put_together(assembly, node.meta["val"]), node.meta["val"]), node
        spans = grid(assembly.pieces, node.meta["val"].shape)
        if spans is not None and not assembly.problem:
            assert _covered([piece.box for piece in assembly.pieces]) == _once(tuple(node.meta["val"].shape))


def _put_together(assembly: Assembly, like: torch.Tensor) -> torch.Tensor:
    whole = torch.full_like(like, -1)
    ground = assembly.ground
    if ground is not None:
        below = ground.node.meta["val"]
        for dim, span in enumerate(ground.box):
            below = below.narrow(dim, span.start, span.size)
        below = below.permute(*ground.kept, *(dim for dim in range(below.dim()) if dim not in ground.kept))
        whole.copy_(below.reshape(like.shape))
    for piece in assembly.pieces:
        place = whole
        for dim, span in enumerate(piece.box):
            place = place.narrow(dim, span.start, span.size)
        own = piece.node.meta["val"]
        named = [dim for dim in piece.dims if dim is not None]
        # A dimension that the whole lacks was selected from, and has but one entry.
        rest = [dim for dim in range(own.dim()) if dim not in named]
        assert all(own.shape[dim] == 1 for dim in rest)
        place.copy_(own.permute(*named, *rest).reshape(place.shape))
    return whole


def test_a_write_across_the_edge_of_another_is_a_problem() -> None:
    graph = Written()
    buffer = graph.source(torch.zeros(6))
    first = graph.call(aten.slice_scatter.default, buffer, graph.source(torch.ones(3)), 0, 0, 3)
    second = graph.call(aten.slice_scatter.default, first, graph.source(torch.ones(3)), 0, 2, 5)
    found = assemblies(graph.graph)
    assert found[first].problem == ""
    assert found[first].buffer is buffer
    assert found[second].problem == "slices overlap"


def test_a_write_over_all_of_another_takes_its_place() -> None:
    graph = Written()
    buffer = graph.source(torch.zeros(6))
    lost, kept = graph.source(torch.ones(2)), graph.source(torch.full((6,), 2.0))
    first = graph.call(aten.slice_scatter.default, buffer, lost, 0, 1, 3)
    second = graph.call(aten.slice_scatter.default, first, kept, 0, 0, 6)
    (piece,) = assemblies(graph.graph)[second].pieces
    assert piece.node is kept
    assert grid([piece], (6,)) == [[Span(0, 6)]]
