"""Where other attention rewriters answer wrongly: everything here goes through the default inner compiler.

torch 2.13's Inductor has an attention pass of its own. It takes softmax over any axis for attention, crashes on masks
of rank 1 and on additive masks of unknown size, and gives fully masked rows the value 0: what attnrewrite leaves alone
must be kept from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrewrite.patterns import Specimen, must_not_match
from attnrewrite.patterns.registry import specimens
from tests.support.against_eager import run
from tests.support.helpers import relative_error, rewritten, rows

CATALOGUE: dict[str, Specimen] = {specimen.name: specimen for specimen in (*specimens(), *must_not_match())}


def by_default(function: Callable[..., Any], **settings: Any) -> Any:
    return torch.compile(function, backend="attnrewrite", **settings)


def heads(length: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 4, length, 16, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_over_another_axis(axis: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / 4).softmax(axis) @ v

    inputs = heads()
    assert relative_error(by_default(attention)(*inputs), attention(*inputs)) <= 1e-5


@pytest.mark.parametrize("name", ["weights_returned", "double_softmax", "talking_heads_after_softmax", "capped_scores"])
def test_left_alone(name: str) -> None:
    lookalike = CATALOGUE[name]
    inputs = lookalike.inputs(0, 16)
    assert relative_error(by_default(lookalike.function)(*inputs), lookalike.function(*inputs)) <= 1e-5


def test_keys_laid_out_for_the_product() -> None:
    """K comes by permute(0, 2, 3, 1), and the length equals the number of heads: no size tells the axes apart."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        return (q @ k * 0.25).softmax(-1) @ v

    q, k, v = torch.randn(3, 2, 8, 8, 16)
    assert [row.status for row in rows(attention, q, k, v)] == ["rewritten"]
    assert relative_error(by_default(attention)(q, k, v), attention(q, k, v)) <= 1e-5


def test_heads_attend_to_heads() -> None:
    """The same sizes with the axes swapped: (batch, length, heads, features), and the product runs over heads."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.permute(0, 1, 3, 2) * 0.25).softmax(-1) @ v

    q, k, v = torch.randn(3, 2, 8, 8, 16)
    assert relative_error(by_default(attention)(q, k, v), attention(q, k, v)) <= 1e-5


@pytest.mark.parametrize("name", ["five_dimensions", "mask_of_rank_1"])
def test_unusual_ranks(name: str) -> None:
    specimen = CATALOGUE[name]
    inputs = specimen.inputs(0, 16)
    assert relative_error(by_default(specimen.function)(*inputs), specimen.function(*inputs)) <= 1e-5


def test_additive_mask_of_unknown_size() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + mask).softmax(-1) @ v

    compiled = by_default(attention, dynamic=True)
    for length in (16, 7, 24):
        inputs = (*heads(length), torch.randn(2, 1, length, length))
        assert relative_error(compiled(*inputs), attention(*inputs)) <= 1e-5


def added(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, value: float) -> Tensor:
    return (q @ k.transpose(-2, -1) / 4 + (1.0 - kept.to(q.dtype)) * value).softmax(-1) @ v


def given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 4 + mask).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, value: float) -> Tensor:
    return (q @ k.transpose(-2, -1) / 4).masked_fill(~kept, value).softmax(-1) @ v


def some_rows_without_a_key() -> Tensor:
    kept = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    kept[0, :, 3] = False
    kept[1, :, :, 9:] = False
    kept[1, :, 5] = False
    return kept


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_empty_rows(attention: Callable[..., Tensor], dtype: torch.dtype, *arguments: Any) -> None:
    inputs = heads(dtype=dtype)
    expected = attention(*inputs, *arguments)
    assert relative_error(by_default(attention)(*inputs, *arguments), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_rows_of_minus_infinity(dtype: torch.dtype) -> None:
    """Eager gives NaN."""
    kept = some_rows_without_a_key()
    assert filled(*heads(dtype=dtype), kept, -math.inf)[1, :, 5].isnan().all()
    check_empty_rows(filled, dtype, kept, -math.inf)


def test_rows_of_minus_infinity_in_a_mask_that_is_given() -> None:
    kept = some_rows_without_a_key()
    check_empty_rows(given, torch.float32, torch.zeros(kept.shape).masked_fill(~kept, -math.inf))


def rounded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@pytest.mark.parametrize("masked", [-math.inf, -1e30, -3.4028235e38])
def test_float64_scores_that_are_rounded_to_float32(masked: float) -> None:
    """Eager gives NaN where float32 has no number for the mask, and the mean of the values where it has."""

    def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return rounded(q, k, v, torch.zeros_like(kept, dtype=q.dtype).masked_fill(~kept, masked))

    kept = some_rows_without_a_key()
    inputs = heads(dtype=torch.float64)
    (row,) = rows(attention, *inputs, kept)
    assert row.status == "rewritten"
    lost = attention(*inputs, kept)[1, :, 5]
    assert lost.isnan().all() if math.isinf(masked) else relative_error(lost, inputs[2].mean(-2)[1]) < 1e-5
    assert relative_error(rewritten(attention)(*inputs, kept), attention(*inputs, kept)) < 1e-5


@pytest.mark.parametrize("masked", [-math.inf, -1e300, -1e30, -1e9])
def test_float64_scores_under_a_mask_that_is_given_are_rounded_to_float32(masked: float) -> None:
    """The given mask may hold -1e9, beside which float32 keeps no score, and float64 all of them."""
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.float64).masked_fill(~some_rows_without_a_key(), masked)
    inputs = heads(dtype=torch.float64)
    with torch.no_grad():
        assert [row.status for row in rows(rounded, *inputs, mask)] == ["rewritten"]
        assert relative_error(rewritten(rounded)(*inputs, mask), rounded(*inputs, mask)) < 1e-5
    trained = [part.requires_grad_() for part in inputs]
    assert [row.status for row in rows(rounded, *trained, mask)] == ["rewritten"]
    own, new = (run(f, [*trained, mask], gradients=True) for f in (rounded, rewritten(rounded)))
    for what in own:
        for expected, result in zip(own[what], new[what], strict=True):
            assert torch.equal(result.isnan(), expected.isnan())
            assert relative_error(result.nan_to_num(), expected.nan_to_num()) < 1e-5


@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
def test_replaced_nan_keeps_its_gradient(learned: bool) -> None:
    """The gradient of softmax is NaN in a row of minus infinity, whatever replaces its value."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).softmax(-1).nan_to_num() @ v

    mask = torch.zeros(2, 1, 16, 16).masked_fill(~some_rows_without_a_key(), -math.inf)
    mask = torch.nn.Parameter(mask) if learned else mask
    inputs = [*(tensor.requires_grad_() for tensor in heads()), mask]
    assert [row.status for row in rows(attention, *inputs)] == ["rewritten"]
    asked = inputs if learned else inputs[:3]
    found = torch.autograd.grad(rewritten(attention)(*inputs).sum(), asked)
    expected = torch.autograd.grad(attention(*inputs).sum(), asked)
    assert expected[0][1, :, 5].isnan().all() and not expected[2].isnan().any()
    assert all(relative_error(*pair) <= 1e-5 for pair in zip(found, expected, strict=True))
    check_empty_rows(attention, torch.float32, mask)


@pytest.mark.parametrize("attention", [added, filled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_of_the_lowest_number(attention: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Eager gives the mean of the values."""
    kept = some_rows_without_a_key()
    inputs = heads(dtype=dtype)
    expected = inputs[2].mean(-2)[1]
    assert relative_error(attention(*inputs, kept, torch.finfo(dtype).min)[1, :, 5], expected) <= TOLERANCE[dtype]
    check_empty_rows(attention, dtype, kept, torch.finfo(dtype).min)


def test_minus_ten_thousand_in_float16_keeps_the_scores() -> None:
    """float16 has a step of 8 there: eager attends to the keys of a masked row alike, its formula does not."""
    kept = some_rows_without_a_key()
    q, k, v = heads(dtype=torch.float16)
    q = q * 2
    eager = added(q, k, v, kept, -1e4)
    formula = added(q.double(), k.double(), v.double(), kept, -1e4)
    assert relative_error(eager[1, :, 5], formula[1, :, 5]) > 0.1
    assert relative_error(by_default(added)(q, k, v, kept, -1e4), formula) <= TOLERANCE[torch.float16]


def test_minus_ten_thousand_as_a_value_in_float16() -> None:
    check_empty_rows(filled, torch.float16, some_rows_without_a_key(), -1e4)


def test_dropout_drops_with_its_probability_and_scales_what_is_left() -> None:
    """With the identity for values the result is the weights themselves: each is nought or scaled by 1 / (1 - p)."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.nn.functional.dropout((q @ k.mT / 4).softmax(-1), p=0.25, training=True)
        return weights @ v

    q, k = torch.randn(2, 8, 8, 64, 16)
    identity = torch.eye(64).expand(8, 8, 64, 64)
    (row,) = rows(attention, q, k, identity)
    assert (row.status, row.dropout) == ("rewritten", "0.25")
    result = rewritten(attention)(q, k, identity)
    kept = result != 0
    weights = (q @ k.mT / 4).softmax(-1)
    assert relative_error(result[kept], weights[kept] / 0.75) <= 1e-5
    # 262144 independent draws: four standard deviations of their mean.
    assert abs(kept.double().mean().item() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / kept.numel())
