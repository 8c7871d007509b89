"""Numbers that are made from each row of scores: added to it, subtracted from it, or that it is subtracted from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.helpers import gradients, relative_error, rewritten, rows

NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda s: s.max(-1, keepdim=True)[0].expand_as(s),
    "amax": lambda s: s.detach().amax(-1)[..., None],
    "min": lambda s: s.min(-1, keepdim=True).values,
    "mean": lambda s: s.mean(-1, keepdim=True),
    "sum": lambda s: s.sum(-1, keepdim=True) / 4,
    "logsumexp": lambda s: s.logsumexp(-1, keepdim=True),
    "minus max": lambda s: -s.amax(-1, keepdim=True),
    "minus min": lambda s: s.amin(-1, keepdim=True).neg(),
    "twice the mean": lambda s: 2 * s.mean(-1, keepdim=True),
}
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "score - number": lambda s, c: s - c,
    "number - score": lambda s, c: c - s,
    "score + number": lambda s, c: s + c,
    "number + score": lambda s, c: c + s,
}
KEPT = {
    *(("score + number", name) for name in ("max", "amax", "logsumexp")),
    *(("number + score", name) for name in ("max", "amax", "logsumexp")),
    ("score - number", "minus max"),
    ("number - score", "minus min"),
}
"""Here one row with an infinite score is NaN and another is not."""

AS_SOFTMAX = {
    *(("score - number", name) for name in ("max", "amax", "logsumexp")),
    *((name, "minus max") for name in ("score + number", "number + score")),
    ("number - score", "min"),
}
"""What is subtracted is the maximum, as softmax does by itself. Kernels do not agree on rows that are not finite."""

ODD = (math.inf, -math.inf, math.nan)


def attention(step: str, number: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 8**-0.5
        return STEPS[step](scores, NUMBERS[number](scores)).softmax(-1) @ v

    return function


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (6, 9, 9))
    return q, k, v


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("step", STEPS)
def test_such_a_number_cancels(step: str, number: str) -> None:
    function, (q, k, v) = attention(step, number), inputs()
    (row,) = rows(function, q, k, v)
    if (step, number) in KEPT:
        assert row.status == "kept" and "read more than once" in row.reason
        return
    assert row.status == "rewritten", row.reason
    compiled = rewritten(function, "aot_eager")
    assert relative_error(compiled(q, k, v), function(q, k, v)) < 1e-5
    assert relative_error(gradients(compiled, (q, k, v)), gradients(function, (q, k, v))) < 1e-4
    if (step, number) in AS_SOFTMAX:
        return
    for place in (0, 1):
        for odd in ODD:
            given = [q.clone(), k.clone(), v]
            given[place][0, 1, 2, 3] = odd
            expected, actual = function(*given), compiled(*given)
            assert torch.equal(expected.isnan(), actual.isnan()), (place, odd)
            assert relative_error(actual.nan_to_num(0), expected.nan_to_num(0)) < 1e-5


@pytest.mark.parametrize("number", ["amax", "mean", "logsumexp"])
def test_of_masked_scores(number: str) -> None:
    """A mask leaves no number to cancel but the maximum, where that is subtracted."""
    hidden = torch.rand(6, 9) < 0.3
    hidden[:, 0] = False

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(hidden, -math.inf)
        return (scores - NUMBERS[number](scores)).softmax(-1) @ v

    def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(hidden, -math.inf)
        return (NUMBERS[number](scores) - scores).softmax(-1) @ v

    q, k, v = inputs()
    (row,) = rows(plain, q, k, v)
    assert (row.status == "kept") is (number == "mean")
    result = rewritten(plain, "aot_eager")(q, k, v)
    assert torch.allclose(result, plain(q, k, v), atol=1e-5, equal_nan=True)
    (row,) = rows(turned, q, k, v)
    assert row.status == "kept" and ("masked before" in row.reason or "a filled mask is multiplied" in row.reason)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda s: s.amax((-2, -1), keepdim=True) - s, "read more than once"),
        (lambda s: s.amax(-1, keepdim=True).clamp(max=1) - s, "read more than once"),
        (lambda s: s.mean(-2, keepdim=True) - s, "read more than once"),
        (lambda s: (t := s.tanh()).amax(-1, keepdim=True) - t, "tanh"),
        (lambda s: (t := s.amax(-1, keepdim=True) - s) * t, "read more than once"),
        (lambda s: (s.amax(-1, keepdim=True) - s).tanh(), "read more than once"),
        (lambda s: -(s.amax(-1, keepdim=True) - s), "may be negative"),
        (lambda s: (s.amax(-1, keepdim=True) - s) / -2, "may be negative"),
    ],
)
def test_what_does_not_cancel(function: Callable[[Tensor], Tensor], reason: str) -> None:
    (row,) = rows(lambda q, k, v: function(q @ k.mT).softmax(-1) @ v, *inputs())
    assert row.status == "kept" and reason in row.reason, row.reason


def test_a_number_that_something_else_reads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        highest = scores.amax(-1, keepdim=True)
        return (highest - scores).softmax(-1) @ v, highest

    (row,) = rows(function, *inputs())
    assert row.status == "kept" and "read more than once" in row.reason


def test_keys_that_are_shared_by_heads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = q @ k.mT
        return (scores.amax(-1, keepdim=True) - scores).softmax(-1) @ v

    q, k, v = inputs()
    k, v = k[:, :2].contiguous(), v[:, :2].contiguous()
    k[1, 1, 3, 0] = math.inf
    (row,) = rows(function, q, k, v)
    assert row.status == "rewritten", row.reason
    result, expected = rewritten(function, "aot_eager")(q, k, v), function(q, k, v)
    assert expected[1, 2:].isnan().all() and expected[0].isfinite().all()
    assert torch.allclose(result, expected, atol=1e-5, equal_nan=True)
