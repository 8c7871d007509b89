"""Numbers of positions that are known only once the data is there (``nonzero``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.errors import OptionError
from tests.support.helpers import gradients, relative_error, rewritten, rows

_OPTION: dict[str, Any] = {"capture_dynamic_output_shape_ops": True}


def ragged(q: Tensor, k: Tensor, v: Tensor, text: Tensor, keep: Tensor) -> Tensor:
    """Each batch entry has its own number of tokens of text."""
    parts = []
    for entry in range(q.shape[0]):
        chosen = torch.nonzero(keep[entry]).flatten()
        own = text[entry : entry + 1, :, chosen]
        keys, values = (torch.cat([part[entry : entry + 1], own], dim=2) for part in (k, v))
        parts.append(F.scaled_dot_product_attention(q[entry : entry + 1], keys, values, scale=0.5))
    return torch.cat(parts)


def written_out(q: Tensor, k: Tensor, v: Tensor, text: Tensor, keep: Tensor) -> Tensor:
    own = text[:, :, torch.nonzero(keep[0]).flatten()]
    keys, values = (torch.cat([part, own], dim=2) for part in (k, v))
    return (q @ keys.mT * 0.5).softmax(-1) @ values


def operands(*kept: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, text = (torch.randn(2, 3, length, 8, generator=generator) for length in (6, 6, 6, 5))
    return [q, k, v, text, torch.stack([torch.arange(5) < count for count in kept])]


@pytest.mark.parametrize("function, sites, inner", [(ragged, 2, "inductor"), (written_out, 1, "aot_eager")])
def test_found_and_rewritten_once_for_all_numbers(function: Any, sites: int, inner: str) -> None:
    with torch._dynamo.config.patch(_OPTION), torch.no_grad(), collect_reports() as graphs:
        compiled = rewritten(function, inner)
        for kept in ((5, 2), (0, 3), (1, 1)):
            assert relative_error(compiled(*operands(*kept)), function(*operands(*kept))) <= 1e-6
    (graph,) = graphs
    assert [(row.kernel, row.reason) for row in graph.sites] == [("native", "")] * sites


def test_gradients() -> None:
    with torch._dynamo.config.patch(_OPTION):
        actual = gradients(rewritten(ragged, "aot_eager"), operands(4, 2))
    assert relative_error(actual, gradients(ragged, operands(4, 2))) <= 1e-5


def test_as_an_option_of_explain_and_of_the_decorator() -> None:
    inputs = operands(4, 2)
    report = attnrewrite.explain(ragged, *inputs, options=_OPTION)
    assert not report.graph_breaks and [len(graph.rewritten) for graph in report.graphs] == [2]
    torch._dynamo.reset()
    compiled = attnrewrite.accelerate_attention(options={**_OPTION, "inner_backend": "eager"}, fullgraph=True)(ragged)
    assert relative_error(compiled(*inputs), ragged(*inputs)) <= 1e-6
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops


def test_as_an_option_of_torch_compile_it_comes_too_late() -> None:
    q, k, v, *_ = operands(4, 2)
    with pytest.raises(Exception, match="has already traced the graph") as raised:
        rewritten(F.scaled_dot_product_attention, "eager", **_OPTION)(q, k, v)
    assert isinstance(raised.value, OptionError) or "OptionError" in str(raised.value)


def test_other_kernels_are_not_asked() -> None:
    with torch._dynamo.config.patch(_OPTION), torch.no_grad(), collect_reports() as graphs:
        rewritten(ragged, kernels=["flex"])(*operands(4, 2))
    reasons = {verdict.reason for row in graphs[0].sites for verdict in row.verdicts if verdict.kernel == "flex"}
    assert reasons == {"does not take a number of queries or keys that depends on the data"}


def causal(x: Tensor) -> Tensor:
    scores = x @ x.mT / 4
    keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return scores.masked_fill(~keep, -torch.inf).softmax(-1) @ x


def causal_and_never_empty(x: Tensor) -> Tensor:
    torch._check(x.shape[1] > 0)  # type: ignore[no-untyped-call]
    return causal(x)


def across(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / 4).softmax(-1) @ y


def across_kept(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    return (x @ y.mT / 4).masked_fill(~keep, -torch.inf).softmax(-1) @ y


def unbacked(*shape: int) -> Tensor:
    x = torch.randn(shape)
    torch._dynamo.decorators.mark_unbacked(x, 1)
    return x


@pytest.mark.parametrize(
    "function, inner",
    [(causal, "eager"), (causal, "aot_eager"), (causal, "inductor"), (causal_and_never_empty, "aot_eager")],
)
def test_sizes_that_are_marked_unbacked(function: Any, inner: str) -> None:
    """Inductor alone does not compile these: it asks whether the length is one."""
    compiled = rewritten(function, inner, fullgraph=True)
    with torch.no_grad(), collect_reports() as graphs:
        for length in (8, 5, 2):
            x = unbacked(2, length, 16)
            assert relative_error(compiled(x), function(x)) <= 1e-5
        if function is causal:
            # Dynamo guards strides, and compiles once more for those of an empty tensor.
            assert compiled(unbacked(2, 0, 16)).shape == (2, 0, 16)
    graph = graphs[0]
    (row,) = graph.sites
    assert row.status == "rewritten" and row.mask.startswith("causal")


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_no_query_or_no_key(inner: str) -> None:
    compiled = rewritten(across, inner, fullgraph=True)
    with torch.no_grad(), collect_reports() as graphs:
        for queries, keys in ((5, 7), (0, 7), (5, 0), (0, 0), (1, 1)):
            inputs = unbacked(2, queries, 16), unbacked(2, keys, 16)
            torch.testing.assert_close(compiled(*inputs), across(*inputs))
    assert {row.status for graph in graphs for row in graph.sites} == {"rewritten"}


def divided_late(x: Tensor, y: Tensor) -> Tensor:
    exponentials = (x @ y.mT / 4).exp()
    return exponentials @ y / exponentials.sum(-1, keepdim=True)


def test_without_a_key_a_division_behind_the_product_is_nan() -> None:
    compiled = rewritten(divided_late, "aot_eager")
    with torch.no_grad(), collect_reports() as graphs:
        for queries, keys in ((5, 7), (5, 0)):
            inputs = unbacked(2, queries, 16), unbacked(2, keys, 16)
            torch.testing.assert_close(compiled(*inputs), divided_late(*inputs), equal_nan=True)
        assert divided_late(*inputs).isnan().all()
    assert all("a division behind the product" in row.reason for graph in graphs for row in graph.sites)


def test_what_may_be_empty_is_kept_for_gradients_and_given_masks() -> None:
    x, y = unbacked(2, 5, 16), unbacked(2, 7, 16)
    (row,) = rows(across, x.requires_grad_(), y)
    assert row.status == "kept"
    assert "here it has gradients" in row.reason and "torch._check(L['x'].shape[1] > 0)" in row.reason
    keep = torch.ones(2, 5, 7, dtype=torch.bool)
    torch._dynamo.decorators.mark_unbacked(keep, 1)
    torch._dynamo.decorators.mark_unbacked(keep, 2)
    with torch.no_grad():
        (row,) = rows(across_kept, unbacked(2, 5, 16), y, keep)
    assert row.status == "kept" and "a mask that may take every key from a row" in row.reason
