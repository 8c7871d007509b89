"""Attention to a single key is its value: nothing else is computed, and the gradients stay what they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnrewrite
from attnrewrite.backend import collect_reports
from tests.support.helpers import relative_error, rewritten, rows


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Cross(nn.Module):
    """Cross attention to a single token."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return naive(q, k, v)


def operands(length: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, 8, generator=generator).to(dtype) for n in (length, 1, 1)]


def kernels(function: object, *inputs: Tensor, **options: object) -> list[tuple[str, str | None]]:
    return [(row.status, row.kernel) for row in rows(function, *inputs, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [naive, call])
def test_is_the_value(function: object) -> None:
    assert kernels(function, *operands()) == [("rewritten", "single_key")]


def test_query_and_key_are_not_computed_without_gradients() -> None:
    model, x, context = Cross(), torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    with torch.no_grad(), collect_reports() as graphs:
        assert relative_error(rewritten(model)(x, context), model(x, context)) <= 1e-6
    assert graphs[0].after_code.count("aten.linear") == 1


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_gradients_of_query_and_key_are_zeros_and_not_none(inner: str) -> None:
    model, x, context = Cross(), torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    rewritten(model, inner)(x, context).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert bool(gradient.any()) == name.startswith("to_v"), name
    own = [parameter.grad.clone() for parameter in model.to_v.parameters() if parameter.grad is not None]
    model.zero_grad()
    model(x, context).square().sum().backward()
    assert relative_error(own, [parameter.grad for parameter in model.to_v.parameters()]) <= 1e-5


def test_the_result_is_no_view_of_the_value() -> None:
    q, k, v = operands(length=1)
    with torch.no_grad():
        result = rewritten(naive, "aot_eager")(q, k, v)
        before = v.clone()
        result.add_(1)
    assert torch.equal(v, before)


def test_dropped_weights_are_left_to_a_kernel_with_dropout() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v

    assert kernels(dropped, *operands()) == [("rewritten", "native")]


def test_a_mask_of_the_caller_may_mask_the_only_key() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * 8**-0.5 + mask).softmax(-1) @ v

    mask = torch.zeros(2, 1, 1, 1)
    q, k, v = operands()
    assert kernels(biased, q, k, v, mask) == [("rewritten", "native")]
    assert kernels(biased, q, k, v, mask, assume_attended_rows=True) == [("rewritten", "single_key")]


def test_a_sink_is_a_second_key() -> None:
    def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 8**-0.5
        return torch.cat([scores, torch.zeros_like(scores)], -1).softmax(-1)[..., :1] @ v

    with collect_reports() as graphs:
        assert relative_error(rewritten(with_sink)(*operands()), with_sink(*operands())) <= 1e-6
    assert [(row.status, row.reason) for row in graphs[0].sites] == [
        ("kept", "softmax runs over a single key and a sink")
    ]


def test_another_kernel_by_name() -> None:
    with attnrewrite.attention_backend("native"):
        assert kernels(naive, *operands()) == [("rewritten", "native")]


def test_asked_for_by_name_where_there_are_more_keys() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    (row,) = rows(naive, q, k, v, kernels=["single_key"])
    assert row.kernel == "native"
    assert [verdict.reason for verdict in row.verdicts if verdict.kernel == "single_key"] == [
        "softmax runs over more than one key"
    ]
