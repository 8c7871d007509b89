"""Steps on a part of the scores become steps on all of them, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnrewrite.capture.trace import capture
from attnrewrite.ir.ops import SCATTER_OPS
from tests.support.helpers import gradients, relative_error, rewritten, rows

_KEPT = torch.ones(6, 6, dtype=torch.bool).tril()


def _bias(scores: Tensor, *shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=scores.dtype).view(shape).sin()


def added(s: Tensor) -> None:
    s[:, :, 1:, 1:] += _bias(s, 2, 4, 6, 6)


def subtracted_from_rows(s: Tensor) -> None:
    s[:, :, :-2] -= _bias(s, 7)


def added_to_a_head(s: Tensor) -> None:
    s[:, 1] += _bias(s, 7, 7)


def added_to_a_batch(s: Tensor) -> None:
    s[1] = _bias(s, 4, 1, 7) + s[1]


def multiplied(s: Tensor) -> None:
    s[..., 2:5] *= _bias(s, 4, 7, 3)


def divided(s: Tensor) -> None:
    s[:, :2, 3:] /= 1.5 + _bias(s, 2, 4, 1)


def masked(s: Tensor) -> None:
    s[:, :, 1:, 1:].masked_fill_(~_KEPT, -math.inf)


def assigned(s: Tensor) -> None:
    s[:, :, 1:, 1:] = (s[:, :, 1:, 1:] + _bias(s, 6)).masked_fill(~_KEPT, -math.inf)


def filled(s: Tensor) -> None:
    s[:, :, :, 5:] = -math.inf


def filled_column(s: Tensor) -> None:
    s[..., -1] = -math.inf


def filled_corner(s: Tensor) -> None:
    s[:, :, :3, 4:].fill_(torch.finfo(s.dtype).min)


def numbers(s: Tensor) -> None:
    s[:, :, 0] += 1
    s[:, 0] *= 2
    s[..., 3] = s[..., 3] / 2 - 0.25


def diagonals(s: Tensor) -> None:
    s.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    s.diagonal(2, 2, 3).fill_(torch.finfo(s.dtype).min)
    s.diagonal(offset=1, dim1=3, dim2=2).fill_(-1e4)
    s.diagonal(-6, -1, -2).zero_()


STEPS = (
    *(added, subtracted_from_rows, added_to_a_head, added_to_a_batch, multiplied, divided),
    *(masked, assigned, filled, filled_column, filled_corner, numbers, diagonals),
)


def steps_of_an_odd_kind(s: Tensor) -> None:
    s[..., ::2] += _bias(s, 4)


def a_part_of_another_tensor(s: Tensor) -> None:
    s[:, :, 1:] = (2 * s)[:, :, 1:] + _bias(s, 7)


def another_part(s: Tensor) -> None:
    s[:, :, 1:] = s[:, :, :-1] + _bias(s, 7)


def no_identity(s: Tensor) -> None:
    s[:, :, 1:] = _bias(s, 7) - s[:, :, 1:]


def a_function(s: Tensor) -> None:
    s[:, :, 1:] = s[:, :, 1:].tanh()


def a_diagonal_of_numbers(s: Tensor) -> None:
    s.diagonal(dim1=-2, dim2=-1).copy_(_bias(s, 7))


OTHERS = (a_diagonal_of_numbers, steps_of_an_odd_kind, a_part_of_another_tensor, another_part, no_identity, a_function)


def attention(step: Callable[[Tensor], None]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        step(scores)
        return scores.softmax(-1) @ v, scores

    return function


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 7, 8, generator=generator, dtype=dtype) for _ in range(3))
    q[0, 0, 0] = -0.0
    return q, k, v


def captured(function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> tuple[Any, list[fx.Node]]:
    """The result of the captured graph, and its assignments to parts."""
    scatters: list[fx.Node] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        ir = capture(gm, example_inputs).gm
        ir.graph.lint()
        scatters.extend(node for node in ir.graph.nodes if node.target in SCATTER_OPS)
        return ir.forward

    return torch.compile(function, backend=backend, dynamic=dynamic)(*args), scatters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step", STEPS)
def test_every_bit_stays(step: Callable[[Tensor], None], dtype: torch.dtype) -> None:
    function, args = attention(step), inputs(dtype)
    (_, scores), scatters = captured(function, *args)
    assert bool(scatters) is (step is numbers and dtype is torch.bfloat16)
    expected = function(*args)[1]
    assert torch.equal(scores, expected) and torch.equal(scores.signbit(), expected.signbit())


@pytest.mark.parametrize("step", OTHERS)
def test_other_assignments_stay(step: Callable[[Tensor], None]) -> None:
    (_, scores), scatters = captured(attention(step), *inputs())
    assert scatters
    assert torch.equal(scores, attention(step)(*inputs())[1])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_attention_is_found(step: Callable[[Tensor], None], dynamic: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(step)(q, k, v)[0]

    args = inputs()
    with torch.no_grad():
        (row,) = rows(function, *args, dynamic=dynamic)
        assert row.status == "rewritten", row.reason
        compiled = rewritten(function, "aot_eager", dynamic)
        assert relative_error(compiled(*args), function(*args)) < 1e-5
    if row.kernel != "flex":
        assert relative_error(gradients(compiled, args), gradients(function, args)) < 1e-4


def test_gradients_of_what_is_added() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT
        scores[:, :, 1:, 1:] += bias
        return scores.softmax(-1) @ v

    args = (*inputs(), torch.randn(4, 6, 6))
    compiled = rewritten(function, "aot_eager")
    assert relative_error(gradients(compiled, args), gradients(function, args)) < 1e-4


def test_a_causal_mask_of_a_part() -> None:
    """It is proved that every row keeps a key, and which it keeps."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        later = torch.ones(6, 6, dtype=torch.bool).triu(1)
        scores[:, :, 1:, 1:].masked_fill_(later, -math.inf)
        scores[:, :, :1, 1:] = -math.inf
        return scores.softmax(-1) @ v

    args = inputs()
    (row,) = rows(function, *args)
    assert row.status == "rewritten", row.reason
    assert "every row keeps a key: the first key" in " ".join(row.proof)
    assert relative_error(rewritten(function)(*args), function(*args)) < 1e-5


def test_what_is_no_scores_stays() -> None:
    """A cache is assigned to as before."""

    def function(cache: Tensor, k: Tensor) -> Tensor:
        cache = cache.clone()
        cache[:, 2:] += k
        return cache @ k.mT

    _, scatters = captured(function, torch.randn(2, 4, 8), torch.randn(2, 2, 8))
    assert scatters
