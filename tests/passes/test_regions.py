"""Attention in graphs within a graph: regions compiled once, branches, loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from tests.support.helpers import gradients, relative_error, rewritten, rewritten_and_rows, rows

pytestmark = pytest.mark.drawn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return x + (q @ k.mT / 4).softmax(-1) @ v


class Projection(nn.Linear):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT / 4).softmax(-1) @ x


class Gate(nn.Module):
    """Softmax over the entries of a learned matrix: no attention, which only the weights being learned tells."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.keys).softmax(-1) @ self.values


def of_weights(model: nn.Module, call: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "layers",
    [[Block, Block, Block], [lambda: Projection(16, 16)] * 3 + [Attention]],
    ids=["attention in regions", "attention beside regions"],
)
def test_regions_are_rewritten_once_and_train(inner: str, layers: list[Callable[[], nn.Module]]) -> None:
    """Through Inductor, which gives wrong gradients for regions, they are inlined in training."""
    model = nn.Sequential(*(layer() for layer in layers))
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        assert [row.status for row in rows(model, x)] == ["rewritten"]
        assert relative_error(rewritten(model, inner, fullgraph=True)(x), model(x)) <= 1e-5
    torch._dynamo.reset()
    found = of_weights(model, rewritten(model, inner, fullgraph=True), x)
    assert relative_error(found, of_weights(model, model, x)) <= 1e-4


def test_what_is_known_of_inputs_is_known_in_a_region() -> None:
    model = nn.Sequential(Gate(), Gate(), Gate(), Attention())
    x = torch.randn(2, 16, 16)
    _, first, found = rewritten_and_rows(model, x)
    assert [row.status for row in found if row.status == "rewritten"] == ["rewritten"]
    assert relative_error(first, model(x)) <= 1e-5


def branches(x: Tensor) -> Tensor:
    result: Tensor = torch.cond(x.sum() > 0, attended, lambda x: x.clone(), (x,))
    return result


def attended(x: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2) / 3).softmax(-1) @ x


def attended_or_not(x: Tensor) -> Tensor:
    def relu(x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)).relu() @ x

    result: Tensor = torch.cond(x.sum() > 0, attended, relu, (x,))
    return result


def looped(x: Tensor) -> Tensor:
    def step(count: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, attended(x)

    carried: Any = (torch.tensor(0), x)
    result: Tensor = while_loop(lambda count, x: count < 3, step, carried)[1]  # type: ignore[no-untyped-call]
    return result


def scanned(x: Tensor, several: Tensor) -> Tensor:
    def step(carried: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        result = attended(carried) + x
        return result, result.clone()

    result: Tensor = scan(step, x, several)[1]
    return result


def mapped_over(several: Tensor) -> Tensor:
    result: Tensor = mapped(attended, several)  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize(
    ("function", "shapes", "trains"),
    [
        (branches, [(2, 7, 16)], False),
        (attended_or_not, [(2, 7, 16)], False),
        (looped, [(2, 7, 16)], False),
        (scanned, [(2, 7, 16), (3, 2, 7, 16)], True),
        (mapped_over, [(3, 2, 7, 16)], True),
    ],
    ids=["cond", "another branch", "while_loop", "scan", "map"],
)
def test_branches_and_loops(function: Callable[..., Tensor], shapes: list[tuple[int, ...]], trains: bool) -> None:
    inputs = [torch.randn(shape).abs() for shape in shapes]
    with torch.no_grad():
        (row,) = rows(function, *inputs)
        assert row.status == "rewritten" and "." in row.name
        compiled = rewritten(function, "aot_eager", fullgraph=True)
        for sign in (1, -1):
            signed = [value * sign for value in inputs]
            assert relative_error(compiled(*signed), function(*signed)) <= 1e-5
    if trains:
        torch._dynamo.reset()
        found = gradients(rewritten(function, "aot_eager", fullgraph=True), inputs)
        assert relative_error(found, gradients(function, inputs)) <= 1e-4


@pytest.mark.parametrize("function", [branches, attended_or_not])
def test_branches_are_kept_in_training(function: Callable[[Tensor], Tensor]) -> None:
    """PyTorch requires one layout of both branches' gradients."""
    x = torch.randn(2, 7, 16).abs().requires_grad_()
    (row,) = rows(function, x)
    assert row.status == "kept" and "lay out their gradients alike" in (row.reason or "")
    found = gradients(rewritten(function, "aot_eager", fullgraph=True), [x])
    assert relative_error(found, gradients(function, [x])) <= 1e-5


def test_a_region_of_two_levels_is_two_graphs() -> None:
    """What is known of a region's inputs is known where it is called, and PyTorch keeps one graph a name."""

    @torch.compiler.nested_compile_region
    def region(x: Tensor, kept: Tensor) -> Tensor:
        result: Tensor = (x @ x.transpose(-2, -1) * 0.3).masked_fill(~kept, -math.inf).softmax(-1) @ x
        return result

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("causal", torch.ones(6, 6, dtype=torch.bool).tril())
            self.register_buffer("full", torch.ones(6, 6, dtype=torch.bool))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            def first(x: Tensor, kept: Tensor) -> Any:
                return region(x, kept) + 1

            def second(x: Tensor, kept: Tensor) -> Any:
                return region(x, kept) + 2

            return region(x, self.causal), torch.cond(x.sum() > -1e9, first, second, (x, self.full))

    model, x = Model(), torch.randn(1, 2, 6, 8)
    with torch.no_grad():
        assert relative_error(rewritten(model, "aot_eager")(x), model(x)) <= 1e-5


def test_with_verification_and_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREWRITE_DEBUG", str(tmp_path))
    model: Any = nn.Sequential(Block(), Block(), Block())
    x = torch.randn(2, 7, 16)
    found = of_weights(model, rewritten(model, "aot_eager", verify=True), x)
    assert relative_error(found, of_weights(model, model, x)) <= 1e-4
