"""Regions without gradients and with autocast, whose effects must not depend on where a rewrite looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.against_eager import prepared, run, truth, wrong
from tests.support.helpers import rewritten, rows


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v


def repeated_keys(q: Tensor, kv: Tensor) -> Tensor:
    with torch.no_grad():
        key = kv[:, [0] * 4]
    return attend(q, key, kv[:, [0] * 4])


def frozen_frames(q: Tensor, kv: Tensor) -> Tensor:
    first = kv.mean(1, keepdim=True)
    with torch.no_grad():
        key = first[:, [0] * 4]
    return attend(q, key, key)


def frozen_sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    with torch.no_grad():
        column = sinks.reshape(1, -1, 1, 1).expand(2, -1, 10, -1)
    return torch.cat([q @ k.mT, column], -1).softmax(-1)[..., :-1] @ v


def frozen_part(x: Tensor, weight: Tensor) -> Tensor:
    own = nn.functional.linear(x[:2], weight)
    with torch.no_grad():
        other = x[2:]
    return torch.cat([attend(own, own, own), nn.functional.linear(other, weight)])


def frozen_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (attend(q[i], k[i], v[i]) for i in range(2))
    with torch.no_grad():
        first = first.transpose(0, 1)
    return torch.stack([first, second.transpose(0, 1)])


def frozen_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [attend(q[:, :, i : i + 2], k, v) for i in range(0, 10, 2)]
    with torch.no_grad():
        memory = torch.cat(parts[:2], 2)
    return torch.cat([memory, *parts[2:]], 2)


def frozen_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    with torch.no_grad():
        doubled = scores[..., 1:] * 2
    scores[..., 1:] = doubled
    return scores.softmax(-1) @ v


VIDEO = (2, 4, 6, 16)
HEADS = (2, 4, 10, 8)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (repeated_keys, [VIDEO, VIDEO]),
        (frozen_frames, [VIDEO, VIDEO]),
        (frozen_sink, [HEADS, HEADS, HEADS, (4,)]),
        (frozen_part, [(4, 10, 16), (16, 16)]),
        (frozen_slice, [HEADS, HEADS, HEADS]),
        (frozen_memory, [HEADS, HEADS, HEADS]),
        (frozen_scores, [HEADS, HEADS, HEADS]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_a_region_cuts_off_stays_cut_off(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn_like(function(*inputs))

    def gradients(run: Callable[..., Tensor]) -> tuple[Any, ...]:
        return torch.autograd.grad((run(*inputs) * weight).sum(), inputs, allow_unused=True)

    expected = gradients(function)
    found = gradients(rewritten(function, "aot_eager"))
    assert [each is None for each in found] == [each is None for each in expected]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if function is not frozen_scores:
        assert {row.status for row in rows(function, *inputs)} == {"rewritten"}


def test_a_view_that_a_region_returns_has_a_gradient_or_none_as_in_eager() -> None:
    def kept(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            view = k.transpose(1, 2)
        return attend(q, k, v), view

    q, k, v = (torch.randn(HEADS, requires_grad=True) for _ in range(3))
    assert rewritten(kept, "aot_eager")(q, k, v)[1].requires_grad == kept(q, k, v)[1].requires_grad


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("replaces", [True, False])
def test_autocast_makes_minus_infinity_of_the_mask_that_a_product_adds(gradients: bool, replaces: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            bias = torch.where(keep[:, None, :] > 0, 0.0, torch.finfo(torch.float32).min)
            weights = torch.baddbmm(bias, q, k.mT, alpha=8**-0.5).softmax(-1)
            return (weights.nan_to_num() if replaces else weights) @ v

    torch.manual_seed(0)
    keep = torch.ones(3, 5, dtype=torch.long)
    keep[0, 3:] = 0
    keep[1] = 0
    call = [*(torch.randn(3, length, 8) for length in (4, 5, 5)), keep]

    def results(function: Callable[..., Tensor]) -> Any:
        return run(function, prepared(call, torch.float32, gradients), gradients)

    own = results(function)
    exact = truth(function, prepared(call, torch.float32, gradients), torch.bfloat16, gradients, "cpu")
    assert not wrong(torch.bfloat16, results(rewritten(function, "aot_eager")), own, exact)
    row_without_key = results(rewritten(function, "aot_eager"))["value"][0][1]
    assert bool((row_without_key == 0).all() if replaces else row_without_key.isnan().all())
