"""Real models with naive attention: every site is rewritten, and nothing else can tell."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from attnrewrite import explain
from tests.support.helpers import relative_error, rewritten
from tests.support.zoo import ZOO, Entry

pytestmark = pytest.mark.drawn

every_model = pytest.mark.parametrize("entry", ZOO, ids=[entry.name for entry in ZOO])


@cache
def built(entry: Entry) -> nn.Module:
    return entry.build()


@every_model
def test_every_attention_is_rewritten(entry: Entry) -> None:
    report = explain(built(entry), **entry.inputs(entry.lengths[0], 0))
    assert [site.reason for site in report.kept] == []
    assert len(report.rewritten) == entry.sites
    assert report.graph_breaks == []


@every_model
def test_values(entry: Entry) -> None:
    model = built(entry)
    with torch.no_grad():
        assert relative_error(entry.run(rewritten(model, "aot_eager")), entry.run(model)) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_values_through_inductor(name: str) -> None:
    (entry,) = (entry for entry in ZOO if entry.name == name)
    model = built(entry)
    with torch.no_grad():
        compiled = torch.compile(model, backend="attnrewrite")
        assert relative_error(entry.run(compiled), entry.run(model)) <= 1e-5


@every_model
def test_gradients_of_every_parameter(entry: Entry) -> None:
    model = entry.build().train()
    expected = parameter_gradients(entry, model, model)
    actual = parameter_gradients(entry, model, rewritten(model, "aot_eager"))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    wrong = {}
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).abs().max())
        # A bias of keys has no effect, since softmax cancels it: eager's gradient for it is rounding noise as well.
        if error > 1e-4 * float(gradient.abs().max()) + 1e-6 * largest:
            wrong[name] = error
    assert wrong == {}


def parameter_gradients(entry: Entry, model: nn.Module, call: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = entry.run(call)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward((output * weights).sum())
    # A parameter that the output does not depend on has no gradient in eager, and one of zeros when compiled.
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }


@every_model
def test_dynamic_shapes(entry: Entry) -> None:
    """Three lengths: the same numbers, and no more compilations than Dynamo needs by itself."""
    model = built(entry)
    lengths = [*entry.lengths]

    def graphs_of(backend: str, **options: Any) -> tuple[int, list[Any]]:
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled = torch.compile(model, backend=backend, dynamic=True, options=options or None)
        results = [entry.run(compiled, length) for length in lengths]
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before, results

    with torch.no_grad():
        needed, results = graphs_of("attnrewrite", inner_backend="eager")
        for length, result in zip(lengths, results, strict=True):
            assert relative_error(result, entry.run(model, length)) <= 1e-5
        assert needed == 1 or needed <= graphs_of("eager")[0]
