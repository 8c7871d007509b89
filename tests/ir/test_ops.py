"""What the tables and predicates of operators say, against what the operators do."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from attnrewrite.ir.ops import (
    COPY_OPS,
    MOVE_OPS,
    PIECE_OPS,
    SPLIT_OPS,
    has_effect,
    is_function,
    is_pointwise,
    is_pure,
    is_random,
    may_share_memory,
    shares_memory,
    writes,
)
from tests.support.graphs import Written

aten = torch.ops.aten

X = torch.arange(24.0).view(2, 3, 4)
ROWS = torch.tensor([1, 0, 1])

PARTS: dict[Any, tuple[Any, ...]] = {
    aten.split.Tensor: (2, 2),
    aten.split_with_sizes.default: ([1, 3], 2),
    aten.unbind.int: (1,),
    aten.unsafe_split.Tensor: (2, 2),
    aten.unsafe_split_with_sizes.default: ([1, 3], 2),
}
MOVED: dict[Any, tuple[Any, ...]] = {
    **dict.fromkeys(sorted(COPY_OPS, key=str), ()),
    aten.view.default: ([6, 4],),
    aten.reshape.default: ([4, 6],),
    aten._unsafe_view.default: ([24],),
    aten.transpose.int: (0, 2),
    aten.permute.default: ([2, 0, 1],),
    aten.unsqueeze.default: (1,),
    aten.squeeze.default: (),
    aten.squeeze.dim: (0,),
    aten.squeeze.dims: ([0, 1],),
    aten.expand.default: ([5, 2, 3, 4],),
    aten.select.int: (1, 2),
    aten.slice.Tensor: (2, 1, 3),
    aten.diagonal.default: (0, 1, 2),
    aten.repeat.default: ([2, 1, 1],),
    aten.repeat_interleave.self_int: (2, 1),
    aten.index_select.default: (0, ROWS),
    aten.index.Tensor: ([ROWS],),
    aten.gather.default: (0, torch.zeros(1, 3, 4, dtype=torch.int64)),
    aten.roll.default: ([1], [2]),
    aten.flip.default: ([1],),
}


def test_every_operator_is_tried() -> None:
    assert PARTS.keys() == SPLIT_OPS
    assert MOVE_OPS - {aten.t.default} == MOVED.keys()
    assert (PARTS | MOVED).keys() >= PIECE_OPS


@pytest.mark.parametrize(("target", "args"), [*PARTS.items(), *MOVED.items()], ids=str)
def test_entries_are_those_of_the_argument(target: Any, args: tuple[Any, ...]) -> None:
    graph = Written()
    node = graph.call(target, graph.source(X), *args)
    found = node.meta["val"] if target in SPLIT_OPS else [node.meta["val"]]
    assert all(torch.isin(part, X).all() for part in found)
    assert target not in COPY_OPS or torch.equal(found[0], X)
    assert target not in SPLIT_OPS or sum(part.numel() for part in found) == X.numel()
    assert is_pure(node)
    if any(part.untyped_storage().data_ptr() == X.untyped_storage().data_ptr() for part in found):
        assert shares_memory(node)


def test_memory() -> None:
    graph = Written()
    x = graph.source(X)
    square = graph.source(torch.eye(4))
    assert not shares_memory(graph.call(aten.dropout.default, x, 0.0, False))
    assert may_share_memory(graph.call(aten.dropout.default, x, 0.0, False))
    assert may_share_memory(graph.call(aten.einsum.default, "abc->cba", [x]))
    assert shares_memory(graph.call(operator.getitem, graph.call(aten.split.Tensor, x, 2, 2), 0))
    for own in (
        graph.call(aten.linear.default, x, square),
        graph.call(aten.matmul.default, x, square),
        graph.call(aten.layer_norm.default, x, [4]),
        graph.call(aten.exp.default, x),
    ):
        assert not may_share_memory(own)


def test_effects() -> None:
    graph = Written()
    x = graph.source(X)
    exp, drawn = graph.call(aten.exp.default, x), graph.call(aten.bernoulli.p, x, 0.5)
    written = graph.call(aten.copy_.default, graph.source(X.clone()), x)
    first = graph.call(operator.getitem, graph.call(aten.unbind.int, x), 0)
    assert [writes(node) for node in (exp, drawn, written, first)] == [False, False, True, False]
    assert [has_effect(node) for node in (exp, drawn, written, first, x)] == [False, False, True, False, True]
    assert [is_random(node) for node in (exp, drawn, written, first)] == [False, True, False, False]
    assert [is_function(node.target) for node in (exp, drawn, written, first, x)] == [True, False, False, True, False]


def test_entry_by_entry() -> None:
    graph = Written()
    x = graph.source(X)
    chosen = graph.source(X > 2)
    assert is_pointwise(graph.call(aten.exp.default, x))
    assert is_pointwise(graph.call(aten.where.self, chosen, x, x))
    assert is_pointwise(graph.call(aten.where.ScalarOther, chosen, x, 0.0))
    assert not is_pointwise(graph.call(aten.cumsum.default, x, 0))
    assert not is_pointwise(graph.call(aten.bernoulli.p, x, 0.5))
