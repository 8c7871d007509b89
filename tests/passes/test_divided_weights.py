"""Attention weights that are divided by a sum that is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.numerics.judge import disagreement
from tests.support.against_eager import prepared, run, truth, wrong
from tests.support.helpers import rewritten, rewritten_and_rows, rows

_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


Q, K, V = _normal(2, 4, 5, 8), _normal(2, 4, 7, 8), _normal(2, 4, 7, 6)
MASK = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool).view(2, 1, 1, 7)
"""The rows of the second sample have no key."""
GATE = _normal(4, 1, 7)


def _masked(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * mask).softmax(-1) * mask


def before_the_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = _masked(q, k, mask)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-13)) @ v


def after_the_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = _masked(q, k, mask)
    return (weights @ v) / (weights.sum(-1) + 1e-13).unsqueeze(-1)


def clamped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = _masked(q, k, mask)
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)) @ v


def of_any_factor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The factor may be negative, and the sum may be."""
    weights = _masked(q, k, mask) * GATE.to(q.dtype)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-3)) @ v


@pytest.mark.parametrize("function", [before_the_product, after_the_product, clamped, of_any_factor])
@pytest.mark.parametrize("mask", [MASK, MASK.float(), MASK[0, 0, 0]], ids=["bool", "float", "vector"])
@pytest.mark.parametrize("large", [1.0, 20.0])
def test_the_sum_is_one_more_column_of_the_product(function: Callable[..., Tensor], mask: Tensor, large: float) -> None:
    """With large scores those that are masked are often the highest, and what is kept is small beside the number."""
    for dtype in (torch.float32, torch.float64):
        call = (Q * large, K, V, mask)
        compiled, _, (row,) = rewritten_and_rows(function, *prepared(call, dtype, True))
        assert row.status == "rewritten"
        new, own = (run(each, prepared(call, dtype, True), True) for each in (compiled, function))
        assert wrong(dtype, new, own, truth(function, call, dtype, True, "cpu")) == ""


def test_keys_that_are_nan_or_infinite_reach_what_they_reach_in_the_source() -> None:
    for number in (float("nan"), float("inf")):
        for place in ((0, 0, 1), (0, 0, 2)):  # A key that is kept, and one that is masked.
            value = V.clone()
            value[place] = number
            new, own = (each(Q, K, value, MASK) for each in (rewritten(before_the_product), before_the_product))
            assert disagreement(new, own, own.double(), torch.float32) == ""


def test_products_are_not_rounded_before_they_are_divided() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        inputs = [t.to(dtype) if t.is_floating_point() else t for t in (Q, K, V, MASK)]
        (row,) = rows(before_the_product, *inputs)
        assert row.status == "kept" and "in half precision" in row.reason


def test_a_number_bounds_the_sum_from_below() -> None:
    def divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = _masked(q, k, mask)
        return (weights / weights.sum(-1, keepdim=True)) @ v

    (row,) = rows(divided, Q, K, V, MASK)
    assert row.status == "kept" and "is added to it or bounds it from below" in row.reason


def test_weights_that_are_dropped_after_the_division_are_kept() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = _masked(q, k, mask)
        return F.dropout(weights / (weights.sum(-1, keepdim=True) + 1e-13), 0.5) @ v

    (row,) = rows(dropped, Q, K, V, MASK)
    assert row.status == "kept"


def test_what_no_kernel_takes_is_as_the_source_wrote_it() -> None:
    def of_queries_and_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1) * mask
        return (weights / (weights.sum(-1, keepdim=True) + 1e-13)) @ v

    mask = (_normal(2, 1, 5, 7) > 0).float()
    _, result, (row,) = rewritten_and_rows(of_queries_and_keys, Q, K, V, mask)
    assert row.status == "kept" and "not known to be the mask" in row.reason
    assert torch.equal(result, of_queries_and_keys(Q, K, V, mask))
