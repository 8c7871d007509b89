"""Floats of modules and globals under ``dynamic=True``: constants until they change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.report.rows import GraphReport

CAP = 30.0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fill, self.cap = -1e9, 30.0

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(-2, -1)


class Filled(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return self.scores(query, key).masked_fill(mask, self.fill).softmax(-1) @ value


class Capped(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = torch.tanh(self.scores(query, key) / self.cap) * self.cap
        return scores.masked_fill(mask, -torch.inf).softmax(-1) @ value


class CappedByGlobal(Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = torch.tanh(self.scores(query, key) / CAP) * CAP
        return scores.masked_fill(mask, -torch.inf).softmax(-1) @ value


def inputs(length: int = 7) -> list[Tensor]:
    mask = torch.rand(2, 1, length, length) > 0.7
    mask[..., 0] = False
    return [*(torch.randn(2, 3, length, 8) for _ in range(3)), mask]


def compiled(model: Any, inner_backend: str = "eager", **keywords: Any) -> Any:
    return torch.compile(model, backend="attnrewrite", options={"inner_backend": inner_backend}, **keywords)


def kernels(reports: list[GraphReport]) -> list[list[str | None]]:
    return [[site.kernel for site in report.sites] for report in reports]


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("model", "kernel"), [(Filled(), "native"), (Capped(), "flex"), (CappedByGlobal(), "flex")])
def test_a_float_of_a_module_is_known(model: nn.Module, kernel: str, inner_backend: str) -> None:
    function = compiled(model, inner_backend, dynamic=True)
    with collect_reports() as reports:
        for length in (7, 9):
            given = inputs(length)
            torch.testing.assert_close(function(*given), model(*given))
    assert kernels(reports) == [[kernel]]


def test_a_float_that_changes_is_a_symbol_from_then_on() -> None:
    model = Capped()
    function = compiled(model, dynamic=True)
    with collect_reports() as reports:
        for cap in (30.0, 20.0, 10.0, 30.0):
            model.cap = cap
            given = inputs()
            torch.testing.assert_close(function(*given), model(*given))
    assert kernels(reports) == [["flex"], [None]]


def test_a_float_stays_a_constant_where_another_part_of_the_call_changes() -> None:
    model = Capped()
    function = compiled(model, dynamic=True)
    with collect_reports() as reports:
        for gradients in (True, False):
            given = inputs()
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(function(*given), model(*given))
    assert kernels(reports) == [["flex"], ["flex"]]


def test_an_argument_stays_a_symbol() -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return (query @ key.transpose(-2, -1) * scale).softmax(-1) @ value

    function = compiled(attention, dynamic=True)
    with collect_reports() as reports:
        for scale in (0.5, 0.25, 0.125):
            query, key, value, _ = inputs()
            torch.testing.assert_close(function(query, key, value, scale), attention(query, key, value, scale))
    assert kernels(reports) == [["native"]]


def test_a_float_that_changes_without_dynamic_is_not_made_a_constant_again() -> None:
    model = Capped()
    function = compiled(model)
    with collect_reports() as reports:
        for cap in (30.0, 20.0, 10.0):
            model.cap = cap
            given = inputs()
            torch.testing.assert_close(function(*given), model(*given))
    assert kernels(reports) == [["flex"], [None]]
