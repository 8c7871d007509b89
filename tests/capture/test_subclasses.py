"""Tensors made of others among the inputs of a graph: what touches them stays as it is, the rest is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from attnrewrite.backend import collect_reports
from attnrewrite.report.rows import GraphReport
from tests.support.helpers import relative_error, rewritten

X = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4


def twice(value: Tensor) -> Any:
    """A tensor that is computed with twice."""
    return TwoTensor(value.clone(), value.clone())


def attend(x: Tensor, key: Tensor | None = None) -> Tensor:
    key = x if key is None else key
    return (x @ key.mT / 4).softmax(-1) @ key


def both(function: Callable[..., Any], *inputs: Any, inner: str = "aot_eager", **settings: Any) -> list[GraphReport]:
    """The reports of a function whose results are those of eager."""
    torch._dynamo.reset()
    compiled = rewritten(function, inner, **settings)
    with collect_reports() as graphs:
        found, expected = compiled(*inputs), function(*inputs)
    for new, own in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        assert type(new) is type(own)
        if isinstance(own, TwoTensor):
            assert relative_error([new.a, new.b], [own.a, own.b]) <= 1e-5
        else:
            assert relative_error(new, own) <= 1e-5
    return graphs


def statuses(graphs: list[GraphReport]) -> list[str]:
    assert [graph.reason for graph in graphs if not graph.captured] == []
    return [site.status for graph in graphs for site in graph.sites]


def plain(value: Any) -> Tensor:
    result: Tensor = value.a
    return result


def of_a_weight(x: Tensor, weight: Any) -> Tensor:
    return attend(plain(F.linear(x, weight)))


def result_of_one(x: Tensor, weight: Any) -> tuple[Tensor, Any]:
    return attend(x), F.linear(x, weight)


def one_given_and_returned(x: Tensor, weight: Any) -> tuple[Tensor, Any]:
    return attend(x), weight


def between_two(x: Tensor, weight: Any) -> Any:
    attended = attend(plain(F.linear(x, weight)))
    return F.linear(attended + x, weight) * 2


def of_two_results(x: Tensor, weight: Any) -> Tensor:
    query, key = F.linear(x, weight).chunk(2, -1)
    return attend(plain(query), plain(key))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [of_a_weight, result_of_one, one_given_and_returned, between_two, of_two_results])
def test_what_lies_between_is_rewritten(function: Callable[..., Any], dynamic: bool, inner: str) -> None:
    with torch.no_grad():
        graphs = both(function, X, twice(WEIGHT), inner=inner, dynamic=dynamic or None)
    assert statuses(graphs) == ["rewritten"]
    if function is one_given_and_returned:  # It is no input of the graph.
        return
    (note,) = graphs[0].notes
    assert note.startswith("what is computed from tensors that are made of others is left as it is: L['weight'] (torch")


def test_gradients_pass_through() -> None:
    weight = twice(WEIGHT).requires_grad_()

    def gradients(function: Callable[..., Any]) -> list[Tensor]:
        x = X.clone().requires_grad_()
        found = torch.autograd.grad(function(x, weight).sum(), [x, weight])
        return [plain(each) if isinstance(each, TwoTensor) else each for each in found]

    torch._dynamo.reset()
    assert relative_error(gradients(rewritten(between_two, "aot_eager")), gradients(between_two)) <= 1e-4


def test_within_a_checkpoint() -> None:
    def function(x: Tensor, weight: Any) -> Any:
        return checkpoint(of_a_weight, x, weight, use_reentrant=False)

    with torch.no_grad():
        assert statuses(both(function, X, twice(WEIGHT))) == ["rewritten"]


def updates_what_it_gives(x: Tensor, weight: Any) -> Tensor:
    inner = plain(weight.t())
    inner.mul_(2)
    return attend(x) + inner.sum() + plain(F.linear(x, weight))


def updates_it(x: Tensor, weight: Any) -> Tensor:
    weight.mul_(2)
    return attend(plain(F.linear(x, weight)))


def switches_gradients(x: Tensor, weight: Any) -> Tensor:
    with torch.no_grad():
        projected = plain(F.linear(x, weight))
    return attend(projected) + x


def switches_autocast(x: Tensor, weight: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = F.linear(x, weight)
    return attend(plain(projected))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (updates_what_it_gives, "in place"),
        (updates_it, "in place"),
        (switches_gradients, "switches autocast or gradients"),
        (switches_autocast, "switches autocast or gradients"),
    ],
)
def test_what_has_an_order_is_left_alone(function: Callable[..., Any], words: str) -> None:
    torch._dynamo.reset()
    given = [twice(WEIGHT) for _ in range(2)]
    with collect_reports() as graphs:
        found, expected = rewritten(function, "aot_eager")(X, given[0]), function(X, given[1])
    assert relative_error(found, expected) <= 1e-2
    assert [(graph.captured, words in graph.reason) for graph in graphs] == [(False, True)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(2, 16, 4, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended: Tensor = (q @ k.mT / 4).softmax(-1) @ v
        return x + self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantized_weights(config: str, inner: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    quantization.quantize_(model, getattr(quantization, config)())
    x = torch.randn(2, 16, 64)
    with torch.no_grad(), collect_reports() as graphs:
        found, expected = rewritten(model, inner)(x), model(x)
    # An activation that is rounded to another of 256 steps.
    assert relative_error(found, expected) <= (1e-5 if config == "Int8WeightOnlyConfig" else 2e-3)
    assert statuses(graphs) == ["rewritten", "rewritten"]
