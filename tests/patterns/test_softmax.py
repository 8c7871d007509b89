"""Softmax attention, written out: what is done to scores and weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.helpers import gradients, relative_error, rewritten, rows


def heads(queries: int = 6, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (queries, keys, keys))
    return q, k, v


# Factors of the weights that were copied.


@pytest.mark.parametrize(
    ("copied", "shape"),
    [
        (lambda t: t.repeat(1, 4, 1, 9), (2, 1, 6, 1)),
        (lambda t: t.tile(4, 1, 9), (2, 1, 6, 1)),
        (lambda t: t.expand(2, 4, 6, 9), (4, 1, 1)),
        (lambda t: t.repeat(1, 1, 6, 1), (2, 4, 1, 9)),
        (lambda t: t.repeat_interleave(9, -1), (2, 4, 6, 1)),
        (lambda t: t.repeat(1, 1, 1, 9).transpose(0, 1).contiguous().transpose(0, 1), (2, 4, 6, 1)),
    ],
)
def test_a_copied_factor(copied: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * copied(factor)) @ v

    inputs = (*heads(), torch.randn(shape))
    (row,) = rows(function, *inputs)
    assert row.status == "rewritten", row.reason
    compiled = rewritten(function, "aot_eager")
    assert relative_error(compiled(*inputs), function(*inputs)) < 1e-5
    assert relative_error(gradients(compiled, inputs), gradients(function, inputs)) < 1e-4


def test_a_copied_mask_of_queries() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * mask.repeat(1, 4, 1, 9).float()) @ v

    inputs = (*heads(), torch.rand(2, 1, 6, 1) < 0.5)
    (row,) = rows(function, *inputs)
    assert row.status == "rewritten", row.reason
    assert relative_error(rewritten(function, "aot_eager")(*inputs), function(*inputs)) < 1e-5


def test_a_factor_that_is_copied_without_gradients() -> None:
    """Behind the copies it would get a gradient."""

    def function(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        with torch.no_grad():
            copies = factor.repeat(1, 1, 1, 9)
        return ((q @ k.mT).softmax(-1) * copies) @ v * factor

    inputs = (*heads(), torch.randn(2, 4, 6, 1))
    compiled = rewritten(function, "aot_eager")
    assert relative_error(gradients(compiled, inputs), gradients(function, inputs)) < 1e-4


def test_a_factor_that_only_looks_copied() -> None:
    """What is repeated has keys of its own."""

    def function(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * factor.repeat(1, 1, 1, 3)) @ v

    (row,) = rows(function, *heads(), torch.randn(2, 4, 6, 3))
    assert row.status == "kept" and "not known to be the mask" in row.reason
