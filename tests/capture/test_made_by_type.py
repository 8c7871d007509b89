"""Constants that are made by calling a type of tensors: tracing keeps no numbers of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnrewrite.backend import collect_reports
from tests.support.helpers import compile_count, gradients, relative_error, rewritten, rewritten_and_rows

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tensor": lambda scores: scores * torch.Tensor([0.5]).to(scores),
    "Tensor of a list": lambda scores: scores + torch.Tensor([4.0, 3.0, 2.0, 1.0, 0.5]),
    "Tensor of lists": lambda scores: scores + torch.Tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]),
    "Tensor of sizes": lambda scores: scores + torch.Tensor(5, 5).fill_(0.5),
    "Tensor of nothing": lambda scores: scores + torch.cat([torch.Tensor(), torch.ones(5)]) * len(torch.Tensor().shape),
    "HalfTensor": lambda scores: scores * torch.HalfTensor([0.1]).float(),
    "LongTensor": lambda scores: scores + torch.arange(5.0)[torch.LongTensor([4, 3, 2, 1, 0])],
    "LongTensor of floats": lambda scores: scores * torch.LongTensor([1.7, 2.0, 1.0, 1.0, 3.9]),
    "BoolTensor": lambda scores: scores.masked_fill(torch.BoolTensor([False, False, True, False, True]), -1e30),
}


def heads() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("form", FORMS)
def test_its_numbers_are_kept(form: str, inner: str) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return FORMS[form](query @ key.mT).softmax(-1) @ value

    compiled, result, rows = rewritten_and_rows(attention, *heads(), inner=inner)
    assert [row.status for row in rows] == ["rewritten"]
    assert relative_error(result, attention(*heads())) <= 1e-5
    assert relative_error(gradients(compiled, heads()), gradients(attention, heads())) <= 1e-5


def test_a_size_among_its_numbers_may_change() -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value * torch.Tensor([key.shape[-2], 2.0]).sum()

    calls = [[part[:, :, :length] for part in heads()] for length in (3, 4, 5)]
    compiled = rewritten(attention, "aot_eager", dynamic=True)
    for call in calls:
        assert relative_error(compiled(*call), attention(*call)) <= 1e-5
    assert compile_count(attention, calls, "attnrewrite") <= compile_count(attention, calls, "aot_eager")


LOST: dict[str, Callable[[Tensor], Tensor]] = {
    "device": lambda scores: scores * torch.Tensor([0.5], device="cpu"),
    "range": lambda scores: scores + torch.range(1, 5),
}


@pytest.mark.parametrize("form", LOST)
@pytest.mark.filterwarnings("ignore:torch.range is deprecated")
def test_a_graph_whose_constant_lost_its_numbers_is_left_alone(form: str) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return LOST[form](query @ key.mT).softmax(-1) @ value

    with collect_reports() as graphs:
        result = rewritten(attention, "aot_eager")(*heads())
    assert relative_error(result, attention(*heads())) <= 1e-5
    assert [graph.captured for graph in graphs] == [False]
    assert "without its numbers" in graphs[0].reason
