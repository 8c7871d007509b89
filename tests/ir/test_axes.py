"""Axes followed through views name the entries that real tensors have there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnrewrite.ir.axes import (
    Axis,
    Layout,
    Operand,
    axes_of,
    broadcast,
    fits,
    fresh_layout,
    regroup,
    resolve,
    same_layout,
    shape_of,
    size_of,
    take_minor,
)
from attnrewrite.ir.views import is_layout_op, peel, permutation_of, pull, push
from tests.support.graphs import Written

aten = torch.ops.aten
quick = settings(max_examples=150, deadline=None, derandomize=True)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """Each entry tells its place."""
    return torch.arange(math.prod(shape)).reshape(shape)


def assert_names_entries(source: torch.Tensor, before: Layout, result: torch.Tensor, after: Layout) -> None:
    """Each entry of the result is the one of the source at the same place along all axes that the source has."""
    before, after = resolve(before), resolve(after)
    assert shape_of(before) == tuple(source.shape)
    assert shape_of(after) == tuple(result.shape)
    assert {axis for dim in before for axis in dim} <= {axis for dim in after for axis in dim}
    for index in itertools.product(*map(range, result.shape)):
        place: dict[Axis, int] = {}
        for position, dim in zip(index, after, strict=True):
            for axis in reversed(dim):
                position, place[axis] = divmod(position, int(axis.size))
        own = []
        for dim in before:
            position = 0
            for axis in dim:
                position = position * int(axis.size) + place[axis]
            own.append(position)
        assert result[index] == source[tuple(own)]


# One step of a chain, drawn.


def _factorisations(size: int, most: int) -> list[tuple[int, ...]]:
    if most == 1:
        return [(size,)]
    return [
        (first, *rest)
        for first in range(1, size + 1)
        if size % first == 0
        for rest in _factorisations(size // first, most - 1)
    ]


def _shapes_of(numel: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.integers(1, 4).flatmap(lambda rank: st.sampled_from(_factorisations(numel, rank)))


def _drawn_step(draw: st.DrawFn, graph: Written, node: fx.Node, repeats: bool) -> fx.Node:
    value: torch.Tensor = node.meta["val"]
    shape = tuple(value.shape)
    rank = len(shape)
    dims = st.integers(-rank, rank - 1) if rank else st.nothing()
    ways = ["view", "view", "unsqueeze", "clone"]
    if rank:
        ways += ["permute", "permute", "transpose", "squeeze", "slice"]
    if 1 in shape:
        ways += ["expand", "expand"]
    if repeats and rank:
        ways += ["repeat", "repeat_interleave"]
    way = draw(st.sampled_from(ways))
    if way == "view":
        without_copy = (aten._unsafe_view.default, aten.view.default) if value.is_contiguous() else ()
        target = draw(st.sampled_from((aten.reshape.default, *without_copy)))
        return graph.call(target, node, draw(_shapes_of(value.numel())))
    if way == "unsqueeze":
        return graph.call(aten.unsqueeze.default, node, draw(st.integers(-rank - 1, rank)))
    if way == "clone":
        return graph.call(draw(st.sampled_from((aten.clone.default, aten.alias.default))), node)
    if way == "permute":
        return graph.call(aten.permute.default, node, draw(st.permutations(range(rank))))
    if way == "transpose":
        return graph.call(aten.transpose.int, node, draw(dims), draw(dims))
    if way == "squeeze":
        if draw(st.booleans()):
            return graph.call(aten.squeeze.default, node)
        return graph.call(aten.squeeze.dim, node, draw(dims))
    if way == "slice":
        return graph.call(aten.slice.Tensor, node, draw(dims), 0, 2**62)
    if way == "expand":
        sizes = [draw(st.sampled_from((1, 2, 3))) if size == 1 else size for size in shape]
        new = draw(st.sampled_from(((), (2,))))
        return graph.call(aten.expand.default, node, [*new, *sizes])
    if way == "repeat":
        new = draw(st.sampled_from(((), (2,))))
        return graph.call(aten.repeat.default, node, [*new, *(draw(st.sampled_from((1, 1, 2))) for _ in shape)])
    return graph.call(aten.repeat_interleave.self_int, node, draw(st.sampled_from((1, 2))), draw(dims))


@st.composite
def chains(draw: st.DrawFn, repeats: bool = False) -> list[fx.Node]:
    graph = Written()
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=3)))
    nodes = [graph.source(numbered(shape))]
    for _ in range(draw(st.integers(1, 4))):
        if nodes[-1].meta["val"].numel() > 300:
            break
        nodes.append(_drawn_step(draw, graph, nodes[-1], repeats))
    # A view of a copy is two steps.
    return list(graph.graph.nodes)


@quick
@given(chains())
def test_push_names_the_entries_of_the_result(nodes: list[fx.Node]) -> None:
    source, *views = nodes
    first = layout = fresh_layout(source.meta["val"].shape)
    for node in views:
        pushed = push(node, layout)
        if pushed is None:
            return  # It mixes axes, which no layout says.
        layout = pushed
        assert fits(Operand(node, layout))
        assert_names_entries(source.meta["val"], first, node.meta["val"], layout)


@quick
@given(chains(repeats=True))
def test_pull_names_the_entries_of_the_source(nodes: list[fx.Node]) -> None:
    *_, last = nodes
    first = layout = fresh_layout(last.meta["val"].shape)
    for node in reversed(nodes[1:]):
        assert is_layout_op(node)
        pulled = pull(node, layout)
        if pulled is None:
            return
        layout = pulled
        (source,) = node.all_input_nodes
        assert fits(Operand(source, layout))
        assert_names_entries(source.meta["val"], layout, last.meta["val"], first)


@quick
@given(chains())
def test_pull_undoes_push(nodes: list[fx.Node]) -> None:
    layout = fresh_layout(nodes[0].meta["val"].shape)
    for node in nodes[1:]:
        pushed = push(node, layout)
        if pushed is None:
            return
        pulled = pull(node, pushed)
        assert pulled is not None
        assert same_layout(pulled, layout)
        layout = pushed


@quick
@given(chains())
def test_push_undoes_pull_where_nothing_is_repeated(nodes: list[fx.Node]) -> None:
    layout = fresh_layout(nodes[-1].meta["val"].shape)
    for node in reversed(nodes[1:]):
        if node.target is aten.expand.default:
            return
        pulled = pull(node, layout)
        if pulled is None:
            return
        pushed = push(node, pulled)
        assert pushed is not None
        assert same_layout(pushed, layout)
        layout = pulled


@quick
@given(chains())
def test_peel_is_pull_after_pull(nodes: list[fx.Node]) -> None:
    operand = Operand(nodes[-1], fresh_layout(nodes[-1].meta["val"].shape))
    seen = peel(operand, lambda node: True)
    assert [each.node for each in seen] == nodes[::-1][: len(seen)]
    assert all(map(fits, seen))
    assert [each.node for each in peel(operand, lambda node: False)] == [nodes[-1]]


# One operator at a time.

_PERMUTING: list[tuple[Any, tuple[Any, ...], tuple[int, ...]]] = [
    (aten.permute.default, ([2, -3, 1],), (2, 3, 4)),
    (aten.transpose.int, (0, -1), (2, 3, 4)),
    (aten.transpose.int, (1, 2), (2, 3, 4)),
    (aten.t.default, (), (2, 3)),
    (aten.t.default, (), (2,)),
    (aten.permute.default, ([1, -1, 0, 2],), (2, 3, 4, 5)),
]


@pytest.mark.parametrize(("target", "args", "shape"), _PERMUTING)
def test_permutation(target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    graph = Written()
    node = graph.call(target, graph.source(numbered(shape)), *args)
    order = permutation_of(node)
    assert order is not None
    assert torch.equal(numbered(shape).permute(order), node.meta["val"])


def test_what_is_no_permutation() -> None:
    graph = Written()
    source = graph.source(numbered((2, 3)))
    assert permutation_of(graph.call(aten.view.default, source, [3, 2])) is None
    assert permutation_of(graph.call(aten.unsqueeze.default, source, 0)) is None


def test_a_slice_of_a_part_is_no_view_of_all() -> None:
    graph = Written()
    source = graph.source(numbered((2, 3)))
    part = graph.call(aten.slice.Tensor, source, 1, 0, 2)
    assert not is_layout_op(part)
    layout = fresh_layout((2, 2))
    assert pull(part, layout) is None
    assert push(part, fresh_layout((2, 3))) is None


def test_regroup_divides_and_joins() -> None:
    b, heads_and_features = Axis(2), Axis(12)
    layout: Layout = ((b,), (heads_and_features,))
    split = regroup(layout, (2, 3, 4))
    assert split is not None
    assert heads_and_features.parts is not None
    major, minor = heads_and_features.parts
    assert (major.size, minor.size) == (3, 4)
    assert split == ((b,), (major,), (minor,))
    # Who knew the axis before sees its parts.
    assert resolve(layout) == ((b,), (major, minor))
    assert regroup(split, (1, 6, 4)) == ((), (b, major), (minor,))


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 3), (3, 2)), ((4, 3), (6, 2)), ((4,), (3,)), ((2, 3), (6, 2)), ((6,), (2,)), ((5,), (0,))],
)
def test_regroup_that_no_layout_says(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    assert regroup(fresh_layout(before), after) is None


def test_take_minor() -> None:
    a, b, c = Axis(2), Axis(3), Axis(4)
    axes = [a, b, c]
    assert take_minor(axes, 1) == ()
    assert axes == [a, b, c]
    assert take_minor(axes, 12) == (b, c)
    assert axes == [a]
    assert take_minor(axes, 4) is None

    axes = [b, c]
    taken = take_minor(axes, 2)
    assert c.parts is not None
    assert (taken, axes) == ((c.parts[1],), [b, c.parts[0]])
    assert [size_of(dim) for dim in ((b,), (c.parts[0],), (c.parts[1],))] == [3, 2, 2]
    assert take_minor([Axis(3)], 2) is None


def test_an_axis_is_divided_by_what_divides_it() -> None:
    assert Axis(6).divide(4) is None
    assert Axis(6).divide(0) is None
    axis = Axis(6, "q")
    parts = axis.divide(2)
    assert parts is not None
    assert [part.size for part in parts] == [3, 2]
    assert axis.leaves() == parts


def test_broadcast() -> None:
    b, q, k = Axis(2), Axis(3), Axis(4)
    layout: Layout = ((b,), (q,), (k,))
    assert broadcast(layout, (2, 3, 4), (2, 3, 4)) == layout
    assert broadcast(layout, (2, 3, 4), (3, 1)) == ((q,), ())
    assert broadcast(layout, (2, 3, 4), ()) == ()
    assert broadcast(layout, (2, 3, 4), (2, 1, 1)) == ((b,), (), ())
    assert broadcast(layout, (2, 3, 4), (1, 2, 3, 4)) is None
    assert broadcast(layout, (2, 3, 4), (2, 4)) is None


def test_fits() -> None:
    graph = Written()
    node = graph.source(numbered((6, 1, 4)))
    a, b, c = Axis(2), Axis(3), Axis(4)
    assert fits(Operand(node, ((a, b), (), (c,))))
    assert not fits(Operand(node, ((a,), (), (c,))))
    assert not fits(Operand(node, ((a, b), (c,))))
    assert not fits(Operand(node, ((a, b), (c,), ())))


def test_an_expanded_dimension_is_an_axis_that_the_operand_lacks() -> None:
    graph = Written()
    source = graph.source(numbered((3, 1)))
    node = graph.call(aten.expand.default, source, [2, 3, 4])
    result = fresh_layout((2, 3, 4))
    pulled = pull(node, result)
    assert pulled == (result[1], ())
    pushed = push(node, pulled)
    assert pushed is not None
    assert pushed[1] == result[1]
    # New axes, as nothing says that they are those of another result.
    assert not set(axes_of((pushed[0], pushed[2]))) & set(axes_of(result))


# Symbolic sizes.


def test_symbolic_sizes() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = [DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
    fake = mode.from_tensor(torch.zeros(5, 7, 12), symbolic_context=context)
    batch, length, width = fake.shape
    layout = fresh_layout(fake.shape)
    ((b,), (q,), (features,)) = layout
    split = regroup(layout, (batch, length, 3, 4))
    assert split is not None
    assert features.parts is not None
    assert split == ((b,), (q,), *((part,) for part in features.parts))
    joined = regroup(split, (batch * length, 3, 4))
    assert joined is not None
    assert joined[0] == (b, q)
    assert regroup(joined, (batch, length, width)) == resolve(layout)
    # Nothing says that one length is a multiple of the other, or of 2.
    assert regroup(layout, (length, batch, width)) is None
    assert regroup(((b,),), (2, batch // 2)) is None
    assert broadcast(layout, fake.shape, (length, batch)) is None
    assert broadcast(layout, fake.shape, (batch, 1, 12)) == (layout[0], (), layout[2])
