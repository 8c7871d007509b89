"""What the tests' own comparison with eager calls rounding, and what it does not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support.against_eager import moved, prepared, run, truth, wrong


def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


def _inputs() -> list[Tensor]:
    """With them the gradient of the scale is 0.005, the sum of numbers that are 12 together."""
    generator = torch.Generator().manual_seed(0)
    factors = (0.5, 1.0, 1.0, 0.3)
    shapes = ((4, 2, 4), (4, 5, 4), (4, 5, 8), ())
    return [factor * torch.randn(shape, generator=generator) for factor, shape in zip(factors, shapes, strict=True)]


@pytest.mark.parametrize(
    ("what", "place", "change", "alone", "beside"),
    [
        ("gradient", 3, 1e-6, True, False),
        ("gradient", 3, 1e-4, True, True),
        ("gradient", 0, 1e-6, False, False),
        ("gradient", 0, 1e-3, True, True),
        ("value", 0, 1e-4, True, True),
    ],
)
def test_a_sum_that_cancels(what: str, place: int, change: float, alone: bool, beside: bool) -> None:
    """A change of one number is wrong by itself, and beside what the rounding of inputs moves."""
    call = _inputs()
    own = run(attend, prepared(call, torch.float32, True), True)
    exact = truth(attend, call, torch.float32, True, "cpu")
    assert exact["gradient"][3].abs() < 0.01
    new = {key: [value.clone() for value in values] for key, values in own.items()}
    new[what][place].view(-1)[0] += change
    draws = partial(moved, attend, call, torch.float32, True, "cpu")
    assert bool(wrong(torch.float32, new, own, exact)) is alone
    assert bool(wrong(torch.float32, new, own, exact, moved=draws)) is beside
