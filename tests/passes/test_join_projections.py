"""Projections of parts of a batch are those of the whole, where that is the same; they stay where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnrewrite.backend import collect_reports
from tests.support.helpers import gradients, recording, relative_error, rewritten

_generator = torch.Generator().manual_seed(0)
X = torch.randn(4, 5, 16, generator=_generator)
WEIGHTS = tuple(0.2 * torch.randn(16, 16, generator=_generator) for _ in range(5))
INPUTS = (X, *WEIGHTS)


def attended(x: Tensor, *weights: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(x.shape[0], -1, 2, 8).transpose(1, 2) for w in weights)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def rows_and_linears(function: Callable[..., Any], *inputs: Any) -> tuple[Any, list[str], int]:
    torch._dynamo.reset()
    with collect_reports() as graphs:
        result = rewritten(function, "aot_eager")(*inputs)
    rows = [row for graph in graphs for row in graph.sites]
    assert [row.reason for row in rows if row.status != "rewritten"] == []
    return result, [row.projections for row in rows], sum(graph.after_code.count("aten.linear.") for graph in graphs)


def guided(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x[:3], x[3:]
    return F.linear(attended(a, wq, wk, wv), wo), F.linear(F.linear(b, wv), wo)


def test_one_projection_of_value_and_result() -> None:
    def function(*inputs: Tensor) -> Tensor:
        return torch.cat(guided(*inputs))

    result, said, linears = rows_and_linears(function, *INPUTS)
    assert (said, linears) == (["identity part of 1 of 4 batch entries"], 4)
    assert relative_error(result, function(*INPUTS)) <= 1e-5
    torch._dynamo.reset()
    actual, expected = (_gradients(f, INPUTS) for f in (rewritten(function, "aot_eager"), function))
    assert relative_error(actual, expected) <= 1e-4


def _with_another_output(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    return torch.cat([F.linear(attended(x[:3], wq, wk, wv), wo), F.linear(F.linear(x[3:], wv), other)])


def _with_another_value(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    return torch.cat([F.linear(attended(x[:3], wq, wk, wv), wo), F.linear(F.linear(x[3:], other), wo)])


def _of_two_tensors(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    return torch.cat([F.linear(attended(x[:3], wq, wk, wv), wo), F.linear(F.linear(other[None, :5], wv), wo)])


def _with_a_gap(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    return torch.cat([F.linear(attended(x[:2], wq, wk, wv), wo), F.linear(F.linear(x[3:], wv), wo)])


def _with_dropout(*inputs: Tensor) -> Tensor:
    return torch.cat([F.dropout(part, 0.5) * 0 for part in guided(*inputs)])


def _scaled_differently(*inputs: Tensor) -> Tensor:
    a, b = guided(*inputs)
    return torch.cat([a * 0.5, b * 0.25])


def _along_the_features(*inputs: Tensor) -> Tensor:
    a, b = guided(*inputs)
    return torch.cat([a[:1], b], dim=-1)


def _read_elsewhere(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    a, b = guided(*inputs)
    return torch.cat([a, b]), b


def _without_a_gradient(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    with torch.no_grad():
        b = F.linear(F.linear(x[3:], wv), wo)
    return torch.cat([F.linear(attended(x[:3], wq, wk, wv), wo), b])


def _checkpointed(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    a: Any = checkpoint(lambda part: F.linear(attended(part, wq, wk, wv), wo), x[:3], use_reentrant=False)
    return torch.cat([a, F.linear(F.linear(x[3:], wv), wo)])


def test_attention_that_is_recognized() -> None:
    """Nothing else of the graph changes, and it is the changed graph that runs."""

    def function(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        q, k, v = (F.linear(x[:3], w).view(3, -1, 2, 8).transpose(1, 2) for w in (wq, wk, wv))
        q, k = q.relu(), k.relu()
        kept = q @ (k.mT @ F.pad(v, (0, 1), value=1.0))
        kept = (kept[..., :-1] / (kept[..., -1:] + 1e-6)).transpose(1, 2).reshape(3, -1, 16)
        return torch.cat([F.linear(kept, wo), F.linear(F.linear(x[3:], wv), wo)])

    inputs = (torch.cat([X] * 4, dim=1), *WEIGHTS[:4])
    inner, given = recording()
    torch._dynamo.reset()
    with collect_reports() as graphs:
        result = rewritten(function, inner)(*inputs)
    (row,) = graphs[0].sites
    assert (row.status, row.projections) == ("recognized", "identity part of 1 of 4 batch entries")
    assert len(given[0].graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 4
    assert relative_error(result, function(*inputs)) <= 1e-5


def _with_a_bias_of_rows(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    rows = other[:5]
    return torch.cat([F.linear(attended(x[:3], wq, wk, wv), wo, rows), F.linear(F.linear(x[3:], wv), wo, rows)])


def _read_by_its_place(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, other: Tensor) -> Tensor:
    """``as_strided`` counts from where the memory of the part begins, in that of a piece of it, too."""
    value = F.linear(x[3:], wv)
    through = torch.cat([F.linear(attended(x[:3], wq, wk, wv), wo), F.linear(value, wo)])
    return through + value.as_strided((16,), (1,), 3) + value[:, 3:].as_strided((16,), (1,), 1)


# How many projections remain: 4 is all of them joined, 6 none.
@pytest.mark.parametrize(
    ("function", "linears"),
    [
        (_with_another_output, 5),
        (_with_another_value, 5),
        (_of_two_tensors, 5),
        (_with_a_gap, 5),
        (_with_dropout, 5),
        (_scaled_differently, 5),
        (_along_the_features, 5),
        (_read_elsewhere, 5),
        (_without_a_gradient, 6),
        (_with_a_bias_of_rows, 5),
        (_read_by_its_place, 5),
    ],
)
def test_what_is_not_the_same(function: Callable[..., Any], linears: int) -> None:
    result, _, found = rows_and_linears(function, *INPUTS)
    assert found == linears
    assert relative_error(result, function(*INPUTS)) <= 1e-5
    torch._dynamo.reset()
    actual, expected = (_gradients(f, INPUTS) for f in (rewritten(function, "aot_eager"), function))
    assert relative_error(actual, expected) <= 1e-4


def _gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Of an argument that is not used it is zero."""
    return gradients(lambda *args: [function(*args), *(arg.sum() for arg in args)], inputs)


def test_what_is_computed_anew_in_the_backward_pass_stays_apart() -> None:
    inputs = tuple(value.clone().requires_grad_() for value in INPUTS)
    result, _, linears = rows_and_linears(_checkpointed, *inputs)
    assert linears == 6
    assert relative_error(result, _checkpointed(*inputs)) <= 1e-5


def test_autocast() -> None:
    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cat(guided(*inputs))

    result, _, linears = rows_and_linears(function, *INPUTS)
    assert linears <= 6
    assert result.dtype is torch.bfloat16
    assert relative_error(result, function(*INPUTS)) <= 2**-6
