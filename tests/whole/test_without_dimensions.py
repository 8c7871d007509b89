"""Operators that take a dimension take -1 and 0 of a tensor without any, too, and models do that to their scalars."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.helpers import relative_error, rewritten_and_rows

Step = Callable[[Tensor], Tensor]

STEPS: dict[str, Step] = {
    "sum": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(0),
    "amax": lambda x: x.amax(-1),
    "max": lambda x: x.max(-1).values,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0).exp(),
    "logsumexp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "exponentials": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "less its maximum": lambda x: (x - x.amax(-1, keepdim=True)).softmax(-1),
    "cumsum": lambda x: x.cumsum(0),
    "transpose": lambda x: x.transpose(0, -1),
    "movedim": lambda x: x.movedim(0, -1),
    "permute": lambda x: x.permute(()),
    "squeeze": lambda x: x.squeeze(-1),
    "gather": lambda x: x.gather(0, torch.zeros((), dtype=torch.long)),
    "any": lambda x: (x > 0).any(-1).to(x.dtype),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(1, -1).values,
    "argmax": lambda x: x.argmax(-1).to(x.dtype),
    "prod": lambda x: x.prod(-1),
    "norm": lambda x: x.norm(dim=-1),
}


def _as_factor(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return (q @ k.mT * x).softmax(-1) @ v


def _as_bias(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + x).softmax(-1) @ v


def _of_weights(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return ((q @ k.mT * 0.3).softmax(-1) * x) @ v


@pytest.mark.parametrize("attention", [_as_factor, _as_bias, _of_weights])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_a_scalar(name: str, attention: Callable[..., Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return attention(q, k, v, STEPS[name](x))

    generator = torch.Generator().manual_seed(0)
    inputs = (*(torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3)), torch.tensor(0.3))
    with torch.no_grad():
        _, result, rows = rewritten_and_rows(function, *inputs)
        assert relative_error(result, function(*inputs)) <= 1e-5
    assert [row.status for row in rows] == ["rewritten"], [row.reason for row in rows]
