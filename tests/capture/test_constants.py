"""Constants in the source tell graphs apart, also for the caches of compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.support.helpers import relative_error

NUMBERS = ([0.5, 1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0, 0.5])


def biased(numbers: list[float]) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + torch.tensor(numbers)).softmax(-1) @ v

    return attention


def heads() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3)]


def test_the_code_of_a_graph_shows_its_numbers() -> None:
    codes: list[str] = []

    def kept(gm: fx.GraphModule, inputs: Any) -> Any:
        codes.append(gm.code)
        return gm

    for numbers in (*NUMBERS, NUMBERS[0]):
        torch._dynamo.reset()
        torch.compile(biased(numbers), backend="attnrewrite", options={"inner_backend": kept})(*heads())
    assert codes[0] != codes[1] and codes[0] == codes[2]


@pytest.mark.parametrize("grad", [False, True])
def test_a_cached_graph_has_its_own_numbers(grad: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = [part.requires_grad_(grad) for part in heads()]
    for numbers in NUMBERS:
        torch._dynamo.reset()
        function = biased(numbers)
        assert relative_error(torch.compile(function, backend="attnrewrite")(*inputs), function(*inputs)) <= 1e-5
