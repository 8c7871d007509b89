"""Kernels of users' own: ``examples/own_kernel.py`` at work, and what it refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnrewrite
from attnrewrite.backend import collect_reports
from tests.support.helpers import compile_count, gradients, relative_error, rewritten, rows

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

import own_kernel  # noqa: E402

# Importing the example has registered it, which no other test shall see.
attnrewrite.unregister_kernel("chunked")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    attnrewrite.register_kernel(own_kernel.Chunked())
    yield
    attnrewrite.unregister_kernel("chunked")


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    away = torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])
    return (q @ k.mT * 0.3).masked_fill((away > 5) | (away < 0), float("-inf")).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, 0] @ k[:, 0].mT * 0.3).softmax(-1) @ v[:, 0]


def operands(queries: int = 130, keys: int = 130, *bias: int) -> list[Tensor]:
    shapes = [(2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 5), *([bias] if bias else [])]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


CASES: dict[str, tuple[Callable[..., Tensor], list[Any]]] = {
    "plain": (plain, operands()),
    "one chunk": (plain, operands(64, 20)),
    "causal": (causal, operands()),
    "causal, more keys": (causal, operands(70, 130)),
    "window": (windowed, operands()),
    "bias": (biased, operands(130, 70, 3, 130, 70)),
    "bias of a row": (biased, operands(130, 70, 2, 1, 1, 70)),
    "bias of all heads": (biased, operands(130, 70, 130, 70)),
    "three dimensions": (three_dimensions, operands()),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_exact_and_trains(case: str) -> None:
    function, inputs = CASES[case]
    # A bias that is given may hold minus infinity in all of a row, which is refused; here it does not.
    asked: Any = {"kernels": "chunked", "strict": True, "assume_attended_rows": "bias" in case}
    with collect_reports() as reports:
        actual = rewritten(function, **asked)(*inputs)
    (report,) = reports
    assert [site.kernel for site in report.sites] == ["chunked"]
    assert "torch.ops.example.chunked_attention" in report.after_code and "aten.softmax" not in report.after_code
    assert relative_error(actual, function(*inputs)) <= 1e-12
    torch._dynamo.reset()
    actual = gradients(rewritten(function, "aot_eager", **asked), inputs)
    assert relative_error(actual, gradients(function, inputs)) <= 1e-12


def test_sizes_stay_symbolic() -> None:
    options = {"inner_backend": "aot_eager", "kernels": "chunked", "strict": True}
    calls = [operands(length, length) for length in (40, 130, 71)]
    assert compile_count(plain, calls, "attnrewrite", options=options) == 1


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).masked_fill(~keep[:, None, None], float("-inf")).softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * 0.3).tanh()).softmax(-1) @ v


def sunk(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    column = sink[None, :, None, None].expand(q.shape[0], -1, q.shape[-2], 1)
    return torch.cat([q @ k.mT * 0.3, column], dim=-1).softmax(-1)[..., :-1] @ v


REFUSED: dict[str, tuple[Callable[..., Tensor], list[Any], str]] = {
    "lost rows": (padded, [*operands(8, 8), torch.ones(2, 8, dtype=torch.bool)], "a row may lose all its keys"),
    "dropout": (dropped, operands(8, 8), "has no dropout (call model.eval(), or ask for another kernel)"),
    "grouped": (grouped, operands(8, 8), "needs as many key heads as query heads"),
    "softcap": (capped, operands(8, 8), "tanh"),
    "sink": (sunk, [*operands(8, 8), torch.randn(3, dtype=torch.float64)], "takes no sink"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_beyond_its_limits_is_refused(case: str) -> None:
    function, inputs, sentence = REFUSED[case]
    with torch.no_grad(), pytest.raises(attnrewrite.KernelError, match=f"chunked: .*{re.escape(sentence)}"):
        rewritten(function, kernels="chunked", strict=True)(*inputs)


def test_it_is_taken_where_it_is_asked_for_only() -> None:
    (row,) = rows(plain, *operands(8, 8))
    assert row.kernel == "native"
    with attnrewrite.attention_backend("chunked"):
        torch._dynamo.reset()
        (row,) = rows(plain, *operands(8, 8))
    assert row.kernel == "chunked"


def test_the_word_of_the_caller_lifts_the_refusal() -> None:
    function, inputs, _ = REFUSED["lost rows"]
    (row,) = rows(function, *inputs, kernels="chunked", strict=True, assume_attended_rows=True)
    assert row.kernel == "chunked"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    own_kernel.main()
    printed = capsys.readouterr().out
    assert "1 of 1 attention sites rewritten" in printed and "verified: 1 site agrees" in printed
    assert "chunked" in printed
    assert float(printed.rsplit(maxsplit=1)[-1]) < 1e-5
