"""Conditions that hold exactly for rows without a key, and others that only look like it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.helpers import gradients, relative_error, rewritten, rows

Weights = Callable[[Tensor], Tensor]


def _zeroed(condition: Callable[[Tensor], Tensor]) -> Weights:
    return lambda scores: torch.where(condition(scores), 0.0, scores.softmax(-1))


def _kept(condition: Callable[[Tensor], Tensor]) -> Weights:
    return lambda scores: torch.where(condition(scores), scores.softmax(-1), 0.0)


def _of_weights(scores: Tensor) -> Tensor:
    weights = scores.softmax(-1)
    return weights.masked_fill(weights.isnan().any(-1, keepdim=True), 0.0)


def _by_hand(scores: Tensor) -> Tensor:
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)


def _without_maximum(scores: Tensor) -> Tensor:
    """Rows far below zero are NaN, too."""
    weights = scores.exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)


EXACT: dict[str, Weights] = {
    "all": _zeroed(lambda s: (s == -math.inf).all(-1, keepdim=True)),
    "none": _zeroed(lambda s: ~(s != -math.inf).any(-1, keepdim=True)),
    "not all are not": _kept(lambda s: ~(s == -math.inf).all(-1, keepdim=True)),
    "any": _kept(lambda s: (s != -math.inf).any(-1)[..., None]),
    "maximum": _zeroed(lambda s: s.amax(-1, keepdim=True) == -math.inf),
    "maximum and place": _zeroed(lambda s: (s.max(-1).values == -math.inf).unsqueeze(-1)),
    "logsumexp": _zeroed(lambda s: s.logsumexp(-1, keepdim=True) == -math.inf),
    "expanded": _zeroed(lambda s: torch.isneginf(s).all(-1, keepdim=True).expand_as(s)),
    "each score": _zeroed(lambda s: s == -math.inf),
    "a cast": _zeroed(lambda s: (s.double() <= -math.inf).all(-1, keepdim=True)),
    "reshaped": _zeroed(lambda s: (s.flatten(0, 1) == -math.inf).all(-1, keepdim=True).view(*s.shape[:3], 1)),
    "NaN among the weights": _of_weights,
    "by hand": _by_hand,
    "dropped first": lambda s: torch.where(
        (s == -math.inf).all(-1, True), 0.0, torch.dropout(s.softmax(-1), 0.5, False)
    ),
    "twice": lambda s: torch.where((s == -math.inf).all(-1, True), 0.0, s.softmax(-1)).nan_to_num(),
    "twice, the other way": lambda s: torch.where((s == -math.inf).all(-1, True), 0.0, s.softmax(-1).nan_to_num()),
}

OTHER: dict[str, Weights] = {
    "another axis": _zeroed(lambda s: (s == -math.inf).all(-2, keepdim=True)),
    "any score": _zeroed(lambda s: (s == -math.inf).any(-1, keepdim=True)),
    "infinite, not only below": _zeroed(lambda s: s.isinf().all(-1, keepdim=True)),
    "another number": _zeroed(lambda s: (s == -1e30).all(-1, keepdim=True)),
    "NaN counts as minus infinity": _zeroed(lambda s: ~(s > -math.inf).any(-1, keepdim=True)),
    "other scores": lambda s: torch.where((s * 2 == -math.inf).all(-1, True), 0.0, s.softmax(-1)),
    "rows of another head": _zeroed(lambda s: (s.flip(1) == -math.inf).all(-1, keepdim=True)),
    "the other way round": _kept(lambda s: (s == -math.inf).all(-1, keepdim=True)),
    "no maximum": _without_maximum,
    "rounded behind it": lambda s: torch.where(
        (s == -math.inf).all(-1, True), 0.0, s.double().softmax(-1, torch.float32)
    ),
    "another number in its place": lambda s: torch.where((s == -math.inf).all(-1, True), 0.5, s.softmax(-1)),
}


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator) for length in (6, 7, 7))
    keep = torch.rand(2, 3, 6, 7, generator=generator) < 0.6
    keep[..., 0] = True
    keep[0, :, 2] = False
    keep[1, 1, 4] = False
    return [q, k, v, keep]


@pytest.mark.parametrize("name", EXACT)
def test_rows_that_are_set_to_zero(name: str) -> None:
    def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return EXACT[name]((q @ k.mT).masked_fill(~keep, -math.inf)) @ v

    def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return EXACT[name](q @ k.mT + mask) @ v

    q, k, v, keep = _inputs()
    for attend, mask in ((filled, keep), (added, torch.zeros(keep.shape).masked_fill(~keep, -math.inf))):
        torch._dynamo.reset()
        with torch.no_grad():
            (row,) = rows(attend, q, k, v, mask)
            assert row.status == "rewritten", row.reason
            expected = attend(q, k, v, mask)
            result = rewritten(attend)(q, k, v, mask)
        assert expected[0, :, 2].eq(0).all()
        assert torch.equal(result[0, :, 2], expected[0, :, 2])
        assert relative_error(result, expected) <= 1e-6
        torch._dynamo.reset()
        own = gradients(attend, [q, k, v, mask])
        new = gradients(rewritten(attend), [q, k, v, mask])
        for a, b in zip(new, own, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert relative_error(a.nan_to_num(), b.nan_to_num()) <= 1e-5


@pytest.mark.parametrize("name", OTHER)
def test_other_conditions(name: str) -> None:
    """Kept, or rewritten to what the source gives."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return OTHER[name]((q @ k.mT).masked_fill(~keep, -math.inf)) @ v

    inputs = _inputs()
    with torch.no_grad():
        (row,) = rows(attend, *inputs)
        assert row.status == "kept"
        torch.testing.assert_close(rewritten(attend)(*inputs), attend(*inputs), equal_nan=True)


def test_the_condition_is_read_elsewhere() -> None:
    """Then the scores must exist, and the attention is kept."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        scores = (q @ k.mT).masked_fill(~keep, -math.inf)
        empty = (scores == -math.inf).all(-1, keepdim=True)
        return torch.where(empty, 0.0, scores.softmax(-1)) @ v, empty

    with torch.no_grad():
        (row,) = rows(attend, *_inputs())
    assert row.status == "kept"
    assert "read more than once" in row.reason
