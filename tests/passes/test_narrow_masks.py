"""Masks are computed once along axes that their entries do not depend on, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.helpers import gradients, recording, relative_error, rewritten

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7
_Scores = Callable[[Tensor, Tensor], Tensor]


def _low() -> float:
    # A float that the module holds would be a symbol with dynamic shapes.
    return torch.finfo(torch.float32).min


def _masks(function: Callable[..., Any], *inputs: Any, **settings: Any) -> list[tuple[Any, ...]]:
    """The shapes of the masks that kernels get; what they compute is compared with the source's."""
    inner, given = recording()
    torch._dynamo.reset()
    assert relative_error(rewritten(function, inner, **settings)(*inputs), function(*inputs)) <= 1e-5
    found = []
    for node in given[0].graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    ):
        mask: Any = node.args[3]
        sizes = mask.meta["val"].shape
        found.append(tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes))
    return found


def _attend(masked: _Scores) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return masked(q @ k.mT * 0.3, given).softmax(-1) @ v

    return attention


def _inputs(given: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (*(torch.randn(BATCH, HEADS, size, 8, generator=generator) for size in (QUERIES, KEYS, KEYS)), given)


def _padding() -> Tensor:
    return torch.arange(KEYS) < torch.tensor([[KEYS], [KEYS - 2]])


def expanded(scores: Tensor, keep: Tensor) -> Tensor:
    mask = keep[:, None, None].expand(-1, -1, scores.shape[-2], -1)
    return scores + torch.where(mask, 0.0, _low())


def filled(scores: Tensor, keep: Tensor) -> Tensor:
    mask = keep[:, None].expand(-1, scores.shape[-2], -1).clone()
    return scores.masked_fill(~mask[:, None], -math.inf)


def beside_positions(scores: Tensor, keep: Tensor) -> Tensor:
    rows = torch.arange(scores.shape[-2])[:, None] >= 0
    return scores + (1.0 - (rows & keep[:, None, None]).float()) * _low()


def looked_up(scores: Tensor, keep: Tensor) -> Tensor:
    batch, keys = torch.arange(keep.shape[0])[:, None, None, None], torch.arange(keep.shape[1])
    rows = torch.arange(scores.shape[-2])[:, None] >= 0
    return scores.masked_fill(~(keep[batch, keys] & rows), _low())


def of_zeros(scores: Tensor, keep: Tensor) -> Tensor:
    zeros = torch.zeros(scores.shape[0], 1, scores.shape[-2], scores.shape[-1])
    return scores + zeros.masked_fill(~keep[:, None, None], _low())


def turned(scores: Tensor, keep: Tensor) -> Tensor:
    mask = keep[:, :, None].expand(-1, -1, scores.shape[-2]).transpose(1, 2)
    return scores.masked_fill(~mask[:, None], -math.inf)


@pytest.mark.parametrize("masked", [expanded, filled, beside_positions, looked_up, of_zeros, turned])
@pytest.mark.parametrize("dynamic", [False, True])
def test_key_padding_has_one_row(masked: _Scores, dynamic: bool) -> None:
    inputs = _inputs(_padding())
    assert _masks(_attend(masked), *inputs, dynamic=dynamic) == [(BATCH, 1, 1, KEYS)]


@pytest.mark.parametrize("masked", [expanded, filled, turned])
def test_gradients(masked: _Scores) -> None:
    inputs = _inputs(_padding())
    function = _attend(masked)
    expected, actual = gradients(function, inputs), gradients(rewritten(function, "aot_eager"), inputs)
    assert relative_error(actual, expected) <= 1e-4


def test_rows_without_a_key() -> None:
    keep = _padding()
    keep[1] = False
    for masked in (expanded, of_zeros, filled):
        assert _masks(_attend(masked), *_inputs(keep)) == [(BATCH, 1, 1, KEYS)]


def test_a_mask_that_all_batches_share() -> None:
    def masked(scores: Tensor, _: Tensor) -> Tensor:
        i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
        return scores.masked_fill(~((j <= i + 2) & (j >= i - 1)).expand(scores.shape), -math.inf)

    assert _masks(_attend(masked), *_inputs(_padding())) == [(1, 1, QUERIES, KEYS)]


def test_what_depends_on_the_row_keeps_it() -> None:
    def masked(scores: Tensor, keep: Tensor) -> Tensor:
        rows = torch.arange(scores.shape[-2])[:, None] >= 1
        return scores.masked_fill(~(rows & keep[:, None, None]), _low())

    assert _masks(_attend(masked), *_inputs(_padding())) == [(BATCH, 1, QUERIES, KEYS)]


def test_a_mask_that_is_handed_over_is_as_it_is() -> None:
    def masked(scores: Tensor, keep: Tensor) -> Tensor:
        return scores.masked_fill(~keep, _low())

    keep = _padding()[:, None, None].repeat(1, 1, QUERIES, 1)
    assert _masks(_attend(masked), *_inputs(keep)) == [(BATCH, 1, QUERIES, KEYS)]


def test_a_bias_with_gradients_is_as_it_is() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.3 + bias.expand(-1, -1, q.shape[-2], -1)).softmax(-1) @ v

    inputs = _inputs(torch.randn(1, HEADS, 1, KEYS))
    expected, actual = gradients(attention, inputs), gradients(rewritten(attention, "aot_eager"), inputs)
    assert relative_error(actual, expected) <= 1e-4


def test_a_mask_that_was_computed_without_gradients() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        with torch.no_grad():
            mask = torch.where(keep[:, None, None].expand(-1, -1, q.shape[-2], -1), 0.0, _low())
        return (q @ k.mT * 0.3 + mask).softmax(-1) @ v

    inputs = _inputs(_padding())
    assert _masks(attention, *inputs) == [(BATCH, 1, 1, KEYS)]
    expected, actual = gradients(attention, inputs), gradients(rewritten(attention, "aot_eager"), inputs)
    assert relative_error(actual, expected) <= 1e-4


def test_layers_share_one_mask() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.where(keep[:, None, None].expand(-1, -1, q.shape[-2], -1), 0.0, _low())
        for _ in range(2):
            q = (q @ k.mT * 0.3 + mask).softmax(-1) @ v
        return q

    inner, given = recording()
    rewritten(attention, inner)(*_inputs(_padding()))
    calls = given[0].graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert len(calls) == 2
    assert len({call.args[3] for call in calls}) == 1
