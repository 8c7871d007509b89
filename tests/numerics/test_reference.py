"""The reference of half precision is the formula of the call itself, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.reference import Reference, wide

HALF = torch.float16


def evaluated(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with Reference():
        result = wide(function(*Reference.given(inputs)))
    assert type(result) is Tensor
    return result


def test_numbers_that_the_dtype_decides_are_those_of_the_call() -> None:
    """A row that -65504 masks as a whole keeps its scores in float64: finfo(float64).min would absorb them."""
    scores = torch.randn(2, 4, dtype=HALF)

    def masked(scores: Tensor) -> Tensor:
        return (scores + torch.finfo(scores.dtype).min).softmax(-1)

    assert torch.allclose(evaluated(masked, scores), scores.double().softmax(-1), atol=1e-9)


def test_nothing_is_rounded_on_the_way() -> None:
    value = torch.randn(64, dtype=HALF)

    def scaled(value: Tensor) -> Tensor:
        assert value.dtype is HALF
        return (value.float() / 49).to(HALF) * 49

    assert torch.allclose(evaluated(scaled, value), value.double(), atol=1e-12)
    assert not torch.equal(scaled(value).double(), value.double())


def test_a_buffer_that_is_filled_in_place_is_not_rounded_either() -> None:
    value = torch.randn(2, 8, dtype=HALF)

    def filled(value: Tensor) -> Tensor:
        buffer = torch.zeros(2, 8, dtype=value.dtype)
        buffer[:, :4] = value[:, :4] / 3
        buffer[:, 4:].copy_(value[:, 4:] / 3)
        return buffer * 3

    assert torch.allclose(evaluated(filled, value), value.double(), atol=1e-12)


def test_gradients_are_those_of_float64() -> None:
    query, key = torch.randn(2, 3, 4, dtype=HALF).unbind()
    query.requires_grad_()

    def weights(query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1, dtype=torch.float32).to(query.dtype)

    with Reference():
        twofold, other = Reference.given([query, key])
        (gradient,) = torch.autograd.grad(weights(twofold, other).square().sum(), [twofold])
    double = query.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((double @ key.double().mT).softmax(-1).square().sum(), [double])
    assert gradient.dtype is HALF
    assert torch.allclose(wide(gradient), expected, atol=1e-12)


def test_an_input_is_left_as_it_was() -> None:
    value = torch.ones(3, dtype=HALF)
    evaluated(lambda value: value.add_(1), value)
    assert torch.equal(value, torch.ones(3, dtype=HALF))
