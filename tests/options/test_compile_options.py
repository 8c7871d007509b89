"""What a user may ask for, and what is said to one who asks for something that is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnrewrite import OptionError
from attnrewrite.backend import collect_reports
from tests.support.helpers import relative_error, rows


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v


def operands() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 4, 8, 16)
    return q, k, v


def holds_sdpa(gm: fx.GraphModule) -> bool:
    target = torch.ops.aten.scaled_dot_product_attention.default
    return bool(gm.graph.find_nodes(op="call_function", target=target))


def named_inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return gm.forward


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"options": {"inner_backnd": "eager"}}, ["'inner_backnd'", "did you mean 'inner_backend'"]),
        ({"options": {"no_such": 1}}, ["'no_such'", "inner_backend", "assume_attended_rows", "max_autotune"]),
        ({"options": {"inner_backend": "eager", "max_autotune": True}}, ["'max_autotune'", "'eager'"]),
        ({"options": {"inner_backend": named_inner, "fast": True}}, ["'fast'", "'named_inner'"]),
        ({"options": {"inner_backend": "aot_eagr"}}, ["'aot_eagr'", "did you mean 'aot_eager'", "inductor"]),
        ({"options": {"inner_backend": "attnrewrite"}}, ["unknown inner backend 'attnrewrite'", "aot_eager"]),
        ({"options": {"inner_backend": 3}}, ["inner_backend", "callable", "3"]),
        ({"options": {"inner_backend": "eager", "assume_attended_rows": "yes"}}, ["True or False", "'yes'"]),
        ({"options": {"max_autotune": "sometimes"}}, ["max_autotune"]),
        ({"mode": "fastest"}, ["fastest"]),
    ],
    ids=lambda value: None,
)
def test_what_is_wrong_is_said_in_one_line(settings: dict[str, Any], pieces: list[str]) -> None:
    compiled = torch.compile(attention, backend="attnrewrite", **settings)
    with pytest.raises(OptionError) as error:
        compiled(*operands())
    message = str(error.value)
    assert "\n" not in message
    assert [piece for piece in pieces if piece not in message] == [], message


def test_a_mode_needs_inductor() -> None:
    # torch.compile takes either a mode or options, so a mode comes with another inner backend only in a direct call.
    from attnrewrite.backend import attnrewrite

    gm = fx.symbolic_trace(lambda x: x)
    with pytest.raises(OptionError, match="mode='max-autotune' applies only to Inductor") as error:
        attnrewrite(gm, [torch.zeros(1)], mode="max-autotune", options={"inner_backend": "eager"})
    assert "\n" not in str(error.value)


def test_a_callable_compiles_the_rewritten_graph() -> None:
    given: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        given.append((gm, example_inputs))
        return gm.forward

    inputs = operands()
    compiled = torch.compile(attention, backend="attnrewrite", options={"inner_backend": inner})
    with collect_reports() as reports:
        result = compiled(*inputs)
    ((gm, example_inputs),) = given
    assert holds_sdpa(gm)
    assert [value.shape for value in example_inputs] == [value.shape for value in inputs]
    assert [report.inner_backend for report in reports] == ["inner"]
    assert relative_error(result, attention(*inputs)) <= 1e-5


def test_inductor_gets_its_own_options() -> None:
    seen: list[fx.Graph] = []
    inputs = operands()
    compiled = torch.compile(attention, backend="attnrewrite", options={"joint_custom_pre_pass": seen.append})
    assert relative_error(compiled(*inputs), attention(*inputs)) <= 1e-5
    assert len(seen) == 1


def test_inductor_gets_its_mode() -> None:
    inputs = operands()
    compiled = torch.compile(attention, backend="attnrewrite", mode="max-autotune-no-cudagraphs")
    assert relative_error(compiled(*inputs), attention(*inputs)) <= 1e-5


@pytest.mark.parametrize("name", ["eager", "aot_eager", "aot_eager_decomp_partition"])
def test_registered_backends(name: str) -> None:
    inputs = operands()
    compiled = torch.compile(attention, backend="attnrewrite", options={"inner_backend": name})
    assert relative_error(compiled(*inputs), attention(*inputs)) <= 1e-5


def test_assume_attended_rows_lifts_a_refusal() -> None:
    """Exponentials without a maximum may underflow in a row without a key: unless there is none."""

    def masked(q: Tensor, k: Tensor, v: Tensor, drop: Tensor) -> Tensor:
        exponentials = (q @ k.mT / 4).masked_fill(drop, -90.0).exp()
        return exponentials / exponentials.sum(-1, keepdim=True) @ v

    inputs = (*operands(), torch.zeros(8, 8, dtype=torch.bool))
    (kept,) = rows(masked, *inputs)
    assert kept.status == "kept" and "assume_attended_rows" in kept.reason
    torch._dynamo.reset()
    (taken,) = rows(masked, *inputs, assume_attended_rows=True)
    assert taken.status == "rewritten" and any("asserted by the option" in line for line in taken.proof)


def test_cpp_wrapper_with_symbolic_sizes() -> None:
    """Inductor takes a graph whose inputs have values for an exported program, whose sizes are no inputs."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT / 4).softmax(-1) @ v

    compiled = torch.compile(attention, backend="attnrewrite", dynamic=True, options={"cpp_wrapper": True})
    for length in (7, 9):
        inputs = torch.randn(3, 2, 4, length, 16)
        assert torch.allclose(compiled(*inputs), attention(*inputs), atol=1e-5)
