"""Keys that a number of any size masks, and whose weights are zeroed behind softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.helpers import gradients, rewritten_and_rows, rows
from tests.support.zoo import noise

LENGTH, KEYS = 5, 7


def filled(number: float) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(mask, number).softmax(-1).masked_fill(mask, 0.0) @ v

    return attention


def chosen(number: float) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = torch.where(~mask, q @ k.mT, number).softmax(-1)
        return torch.where(mask, 0.0, weights) @ v

    return attention


def multiplied(number: float) -> Callable[..., Tensor]:
    """A mask of numbers, which multiplies the weights."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        kept = (~mask).to(q.dtype)
        return ((q @ k.mT).masked_fill(kept == 0, number).softmax(-1) * kept) @ v

    return attention


def inputs(lowest: float) -> tuple[Tensor, ...]:
    """Queries whose scores are about ``lowest`` in one row; masks that take no key, some, and all."""
    q, k, v = noise(2, 3, LENGTH, 4, seed=1), noise(2, 3, KEYS, 4, seed=2), noise(2, 3, KEYS, 4, seed=3)
    k[..., 0] = 1.0
    q[:, :, 1, 0] = lowest
    mask = noise(2, 1, LENGTH, KEYS, seed=4) > 0.3
    mask[0, :, 2], mask[1, :, 1], mask[0, :, 3] = True, False, False
    return q.double(), k.double(), v.double(), mask


@pytest.mark.parametrize("number", [-10000.0, -30.0, 0.0, 12.5])
@pytest.mark.parametrize("spelling", [filled, chosen, multiplied])
def test_rows_are_what_the_source_makes_of_them(
    spelling: Callable[[float], Callable[..., Tensor]], number: float
) -> None:
    attention, call = spelling(number), inputs(2 * min(number, -1.0))
    _, result, (row,) = rewritten_and_rows(attention, *call)
    torch.testing.assert_close(result, attention(*call), rtol=1e-10, atol=1e-12)
    assert row.status == "rewritten" and "the sink of the masked keys" in " ".join(row.proof)
    # The row without a key, and the one whose scores are all lower than the number.
    assert not result[0, :, 2].any() and result[0, :, 3].abs().amax() > 1e-3


@pytest.mark.parametrize("number", [-10000.0, -30.0])
@pytest.mark.parametrize("spelling", [filled, chosen, multiplied])
def test_gradients_are_those_of_the_source(spelling: Callable[[float], Callable[..., Tensor]], number: float) -> None:
    q, k, v, mask = inputs(2 * number)
    attention = spelling(number)

    def function(*operands: Tensor) -> Tensor:
        return attention(*operands, mask)

    compiled, _, (row,) = rewritten_and_rows(function, q.requires_grad_(), k, v)
    assert row.status == "rewritten"
    for own, expected in zip(gradients(compiled, (q, k, v)), gradients(function, (q, k, v)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_number_in_float32(dtype: torch.dtype) -> None:
    """bfloat16 holds nothing between -9,984 and -10,048: neither the number nor what the logarithm of a count adds."""
    keys, few = 200, 50
    q, k = (
        torch.tensor([-100.0, 1.0]).expand(1, 1, 2, 2),
        torch.stack([torch.full((keys,), 100.0), torch.zeros(keys)], -1),
    )
    k[:, 1] = noise(keys, seed=1)
    call = [each.to(dtype) for each in (q, k[None, None], noise(1, 1, keys, 4, seed=2) + 1)]
    mask = (torch.arange(keys) >= few).expand(1, 1, 2, keys)
    attention = filled(-10000.0)
    _, result, (row,) = rewritten_and_rows(attention, *call, mask)
    expected = attention(*(each.double() for each in call), mask)
    assert row.status == "rewritten" and expected.abs().amax() > 0.1
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-3)


def test_half_precision_counts_more_keys_than_it_holds() -> None:
    """65,520 is infinite in float16."""
    keys = 70_000
    q, k, v = (noise(1, 1, length, 4, seed=length).half() for length in (1, keys, keys))
    mask = (torch.arange(keys) > 0).expand(1, 1, 1, keys)
    attention = filled(-10000.0)
    _, result, (row,) = rewritten_and_rows(attention, q, k, v, mask)
    assert row.status == "rewritten"
    torch.testing.assert_close(result, v[..., :1, :])


def test_what_another_mask_zeroes_is_left_alone() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        other = mask.roll(1, -1)
        return (q @ k.mT).masked_fill(mask, -1e4).softmax(-1).masked_fill(other, 0.0) @ v

    (row,) = rows(attention, *inputs(-1.0))
    assert row.status == "kept" and "not known to be the mask" in row.reason


def test_a_fill_of_whole_rows_is_not_counted_in_keys() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        whole = mask[..., :1]
        return (q @ k.mT).masked_fill(whole, -1e4).softmax(-1).masked_fill(whole, 0.0) @ v

    call = inputs(-1.0)
    _, result, _ = rewritten_and_rows(attention, *call)
    torch.testing.assert_close(result, attention(*call))
