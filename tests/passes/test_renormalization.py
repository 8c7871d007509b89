"""Weights that are divided by their own sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.helpers import gradients, rewritten_and_rows
from tests.support.zoo import noise

Change = Callable[[Tensor, Tensor], Tensor]

KNOWN: dict[str, Change] = {
    "plain": lambda w, gate: w / w.sum(-1, keepdim=True),
    "not kept": lambda w, gate: w / w.sum(-1)[..., None],
    "epsilon": lambda w, gate: w / (w.sum(-1, keepdim=True) + 1e-9),
    "large epsilon": lambda w, gate: w / (w.sum(-1, keepdim=True) + 0.25),
    "clamp": lambda w, gate: w / w.sum(-1, keepdim=True).clamp_min(1e-8),
    "clamp that bites": lambda w, gate: w / w.sum(-1, keepdim=True).clamp(min=1.5),
    "number": lambda w, gate: (u := w * 0.3) / u.sum(-1, keepdim=True),
    "factor": lambda w, gate: (u := w * gate) / u.sum(-1, keepdim=True),
    "factor and clamp": lambda w, gate: (u := w * gate) / u.sum(-1).clamp(min=0.5).unsqueeze(-1),
    "two factors": lambda w, gate: (u := 2.0 * w * gate) / u.sum(-1, keepdim=True),
    "viewed": lambda w, gate: (u := w * gate) / u.sum(-1).view(-1).view(*u.shape[:-1], 1),
    "cast": lambda w, gate: (u := w.float().to(w.dtype)) / u.sum(-1, keepdim=True),
}

UNKNOWN: dict[str, Change] = {
    "over the queries": lambda w, gate: w / w.sum(-2, keepdim=True),
    "factor of keys": lambda w, gate: (u := w * gate[..., :1, :1].expand(w.shape).cumsum(-1)) / u.sum(-1, keepdim=True),
    "another's sum": lambda w, gate: w / (w * w).sum(-1, keepdim=True),
    "as an integer": lambda w, gate: w / (w.sum(-1, keepdim=True).long() + 0.5),
    "clamped from above": lambda w, gate: w / w.sum(-1, keepdim=True).clamp(0.1, 0.5).square(),
}


def attention(change: Change, masked: bool) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        scores = q @ k.mT
        if masked:
            scores = scores.masked_fill(torch.arange(7) > 4, -torch.inf)
        return change(scores.softmax(-1), gate) @ (v * gate)

    return function


def call() -> tuple[Tensor, ...]:
    drawn = (noise(2, 3, 5, 4, seed=1), noise(2, 3, 7, 4, seed=2), noise(2, 3, 7, 4, seed=3), noise(3, 1, 1, seed=4))
    return tuple(each.double().requires_grad_() for each in drawn)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("change", KNOWN.values(), ids=KNOWN)
def test_a_sum_that_is_known_is_not_computed_from_the_weights(change: Change, masked: bool) -> None:
    function, inputs = attention(change, masked), call()
    compiled, result, rows = rewritten_and_rows(function, *inputs)
    assert [row.status for row in rows] == ["rewritten"]
    torch.testing.assert_close(result, function(*inputs), rtol=1e-6, atol=1e-6)
    for own, reference in zip(gradients(compiled, inputs), gradients(function, inputs), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", UNKNOWN.values(), ids=UNKNOWN)
def test_other_sums_are_left_alone(change: Change) -> None:
    function, inputs = attention(change, False), call()
    _, result, (row,) = rewritten_and_rows(function, *inputs)
    reasons = ("read more than once", "divided by their sum, and no number")
    assert row.status == "kept" and any(reason in row.reason for reason in reasons)
    torch.testing.assert_close(result, function(*inputs))
