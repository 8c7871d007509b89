"""Positions are followed through integer arithmetic: packed sequences that are not packed are one document."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tests.support.helpers import compile_count, no_more_graphs, relative_error, rewritten, rewritten_and_rows, rows

pytestmark = pytest.mark.drawn

BATCH, LENGTH = 2, 9
_Mask = Callable[[Tensor], Tensor]


def _attend(mask: _Mask, length: int = LENGTH) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Attention of ``x`` (batch, heads, length, features) where ``mask(x)`` (batch, queries, keys) keeps a key."""

    def attention(x: Tensor) -> Tensor:
        scores = x @ x.mT * 0.3
        return scores.masked_fill(~mask(x)[:, None], -math.inf).softmax(-1) @ x

    return attention, torch.randn(BATCH, 3, length, 8, generator=torch.Generator().manual_seed(0))


def _causal(positions: Tensor) -> Tensor:
    return positions[:, None, :] <= positions[:, :, None]


def _packed(positions: Tensor) -> Tensor:
    """As transformers finds packed sequences: a new one begins where a position does not follow the one before."""
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    document = (steps != 1).cumsum(-1)
    return _causal(positions) & (document[:, None, :] == document[:, :, None])


def _count(x: Tensor, **options: Any) -> Tensor:
    return torch.arange(x.shape[-2], **options).expand(x.shape[0], -1)


def _of_steps(steps: Tensor) -> Tensor:
    document = steps.cumsum(-1)
    return document[:, None, :] == document[:, :, None]


def one_document(x: Tensor) -> Tensor:
    return _packed(_count(x))


def one_document_in_int32(x: Tensor) -> Tensor:
    return _packed(_count(x, dtype=torch.int32))


def behind_a_cache(x: Tensor) -> Tensor:
    return _packed((torch.arange(x.shape[-2]) + 5)[None].repeat(x.shape[0], 1))


def first_differences_by_slices(x: Tensor) -> Tensor:
    positions = _count(x)
    starts = pad((positions[:, 1:] - positions[:, :-1]) != 1, (1, 0))
    return _causal(positions) & _of_steps(starts)


def prepended_number(x: Tensor) -> Tensor:
    positions = _count(x)
    before = torch.full((x.shape[0], 1), -1)
    return _causal(positions) & _of_steps(torch.diff(positions, prepend=before) != 1)


def counted_by_sums(x: Tensor) -> Tensor:
    return _causal(torch.ones(x.shape[0], x.shape[-2], dtype=torch.int64).cumsum(-1) - 1)


def summed_over_either_axis(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[0], x.shape[-2], x.shape[-2], dtype=torch.int64)
    return ones.cumsum(2) <= ones.cumsum(1)


def from_two_parts(x: Tensor) -> Tensor:
    return _packed(torch.cat([torch.arange(2), torch.arange(2, x.shape[-2])])[None].expand(x.shape[0], -1))


def within_bounds(x: Tensor) -> Tensor:
    return _packed(_count(x).clamp(min=0, max=2**40))


def below_a_maximum(x: Tensor) -> Tensor:
    return _causal(torch.minimum(_count(x), torch.tensor(2**30)))


def less_than_a_block(x: Tensor) -> Tensor:
    positions = _count(x)
    return _causal(positions % 2**24) & (positions[:, None, :] // 2**24 == positions[:, :, None] // 2**24)


def multiples_of_a_block(x: Tensor) -> Tensor:
    positions = _count(x) * 6 + 4
    return _causal(positions // 3) & (positions[:, None, :] % 3 == positions[:, :, None] % 3)


def turned_twice(x: Tensor) -> Tensor:
    backwards = _count(x).flip(-1)
    return backwards[:, None, :] >= backwards[:, :, None]


def looked_up(x: Tensor) -> Tensor:
    table, places = torch.arange(3, 103), torch.arange(x.shape[-2])
    chosen = table.index_select(0, places)[None].expand(x.shape[0], -1)
    return _packed(chosen) & _causal(table.expand(x.shape[0], -1).gather(1, _count(x)))


def stacked(x: Tensor) -> Tensor:
    positions = torch.stack([_count(x), _count(x) + 7])
    return _packed(positions[0]) & _packed(positions[1])


@pytest.mark.parametrize(
    "mask",
    [
        one_document,
        one_document_in_int32,
        behind_a_cache,
        first_differences_by_slices,
        prepended_number,
        counted_by_sums,
        summed_over_either_axis,
        from_two_parts,
        within_bounds,
        below_a_maximum,
        less_than_a_block,
        multiples_of_a_block,
        turned_twice,
        looked_up,
        stacked,
    ],
)
def test_proved_to_be_causal(mask: _Mask) -> None:
    function, x = _attend(mask)
    _, result, (row,) = rewritten_and_rows(function, x)
    assert (row.status, row.mask) == ("rewritten", "causal")
    assert relative_error(result, function(x)) <= 1e-5
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    assert torch.equal(mask(x), (j <= i).expand(BATCH, -1, -1))


@pytest.mark.parametrize("mask", [one_document, behind_a_cache, from_two_parts, turned_twice, summed_over_either_axis])
def test_of_symbolic_lengths(mask: _Mask) -> None:
    function, x = _attend(mask)
    (row,) = rows(function, x, dynamic=True)
    assert (row.status, row.mask) == ("rewritten", "causal")
    calls = [(x[:, :, :length],) for length in (9, 4, 7)]
    options = {"inner_backend": "eager"}
    needed = compile_count(function, calls, "attnrewrite", options=options)
    assert no_more_graphs(needed, function, calls)
    torch._dynamo.reset()
    compiled = rewritten(function, dynamic=True)
    for (call,) in calls:
        assert relative_error(compiled(call), function(call)) <= 1e-5


# What must not be proved.


def wraps_in_int8(x: Tensor) -> Tensor:
    return _causal(_count(x, dtype=torch.int8) + 123)


def wraps_in_uint8(x: Tensor) -> Tensor:
    return _causal(_count(x, dtype=torch.uint8) - 4)


def wraps_in_int64(x: Tensor) -> Tensor:
    return _causal(_count(x) + (2**63 - 5))


def wraps_in_a_product(x: Tensor) -> Tensor:
    return _causal(_count(x) * 2**61)


def a_number_that_wraps(x: Tensor) -> Tensor:
    large = torch.full((x.shape[0], 1, 1), 2**62) * 2
    return _causal(_count(x)) & (large > 0)


def a_number_that_float64_lacks(x: Tensor) -> Tensor:
    positions = _count(x)
    return positions[:, None, :] <= positions[:, :, None] + (2**53 + 1) - 2**53 - 1 + (2**53 + 1) - 2**53


def rounded_to_half(x: Tensor) -> Tensor:
    return _packed((_count(x) + 2044).to(torch.float16))


def rounded_sums(x: Tensor) -> Tensor:
    ones = torch.full((x.shape[0], x.shape[-2]), 0.1, dtype=torch.float16)
    return _causal((ones.cumsum(-1) * 4).floor())


def real_documents(x: Tensor) -> Tensor:
    return _packed(_count(x) % 4)


def two_documents(x: Tensor) -> Tensor:
    return _packed(torch.cat([torch.arange(3), torch.arange(x.shape[-2] - 3)])[None].expand(x.shape[0], -1))


def a_gap(x: Tensor) -> Tensor:
    positions = _count(x)
    return _packed(torch.where(positions > 4, positions + 1, positions))


def second_differences(x: Tensor) -> Tensor:
    positions = _count(x)
    return _of_steps(torch.diff(positions, n=2, prepend=positions[:, :1] - 1, append=positions[:, -1:] + 1) != 1)


def sums_over_the_batch(x: Tensor) -> Tensor:
    document = (_count(x) % 3 == 0).cumsum(0)
    return _causal(_count(x)) & (document[:, None, :] == document[:, :, None])


def sums_over_the_other_axis(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[0], x.shape[-2], x.shape[-2], dtype=torch.int64)
    return ones.cumsum(1) <= ones.cumsum(2)


def below_a_small_maximum(x: Tensor) -> Tensor:
    return _causal(_count(x).clamp(max=4))


def above_a_minimum(x: Tensor) -> Tensor:
    return _causal(_count(x).clamp(min=3))


def blocks_of_four(x: Tensor) -> Tensor:
    return _causal(_count(x) // 4)


def negative_quotients(x: Tensor) -> Tensor:
    below = _count(x) - 3
    return _causal(torch.div(below, 2**20, rounding_mode="trunc"))


def from_the_end_of_a_table(x: Tensor) -> Tensor:
    return _causal(torch.arange(LENGTH)[torch.arange(x.shape[-2]) - 1][None].expand(x.shape[0], -1))


@pytest.mark.parametrize(
    "mask",
    [
        wraps_in_int8,
        wraps_in_uint8,
        wraps_in_int64,
        wraps_in_a_product,
        a_number_that_wraps,
        a_number_that_float64_lacks,
        rounded_to_half,
        rounded_sums,
        real_documents,
        two_documents,
        a_gap,
        second_differences,
        sums_over_the_batch,
        sums_over_the_other_axis,
        below_a_small_maximum,
        above_a_minimum,
        blocks_of_four,
        negative_quotients,
        from_the_end_of_a_table,
    ],
)
def test_not_proved_to_be_causal(mask: _Mask) -> None:
    function, x = _attend(mask)
    (row,) = rows(function, x)
    assert row.mask != "causal"
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    assert not torch.equal(mask(x), (j <= i).expand(BATCH, -1, -1))
    assert relative_error(rewritten(function)(x), function(x)) <= 1e-5


def test_positions_from_an_input() -> None:
    def attention(x: Tensor, positions: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(~_packed(positions)[:, None], -math.inf).softmax(-1) @ x

    _, x = _attend(one_document)
    positions = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) % 4])
    (row,) = rows(attention, x, positions)
    assert "causal" not in row.mask.split(" + ")
    compiled = rewritten(attention)
    for given in (positions, _count(x)):
        assert relative_error(compiled(x, given), attention(x, given)) <= 1e-5


def test_positions_with_an_offset_for_each_batch() -> None:
    def attention(x: Tensor, offset: Tensor) -> Tensor:
        i = torch.arange(x.shape[-2])[None, :, None] + offset[:, None, None]
        return (x @ x.mT).masked_fill((torch.arange(x.shape[-2]) > i)[:, None], -math.inf).softmax(-1) @ x

    _, x = _attend(one_document)
    (row,) = rows(attention, x, torch.tensor([0, 2]))
    assert row.mask != "causal"
    compiled = rewritten(attention)
    for offset in (torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([2**63 - 3, 0])):
        assert relative_error(compiled(x, offset), attention(x, offset)) <= 1e-5


# Buffers.


class _Counted(nn.Module):
    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(20)[None])

    def forward(self, x: Tensor) -> Tensor:
        kept = _packed(self.position_ids[:, : x.shape[-2]].expand(x.shape[0], -1))
        return (x @ x.mT * 0.3).masked_fill(~kept[:, None], -math.inf).softmax(-1) @ x


def test_a_buffer_of_positions_is_watched() -> None:
    model, x = _Counted(), _attend(one_document)[1]
    (row,) = rows(model, x)
    assert row.mask == "causal"
    compiled = rewritten(model)
    assert relative_error(compiled(x), model(x)) <= 1e-5
    model.position_ids[0, 5:] = torch.arange(15)
    assert relative_error(compiled(x), model(x)) <= 1e-5
