"""What several attentions of a graph are given alike is made once: masks that all layers share, and their copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from attnrewrite.backend import collect_reports
from attnrewrite.kernels import kernel_named
from tests.support.helpers import gradients, outputs, relative_error, rewritten
from tests.support.library_sites import only

aten = torch.ops.aten


def attend(x: Tensor, bias: Tensor, p: float = 0.0) -> Tensor:
    weights = (x @ x.mT * 0.2 + bias).softmax(-1)
    return torch.nn.functional.dropout(weights, p) @ x


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 10, 16, generator=generator)
    # As T5's relative bias comes: the number of heads is the last stride.
    return x, torch.randn(10, 10, 3, generator=generator).permute(2, 0, 1)


def graphs_of(function: Callable[..., Any], *inputs: Any) -> list[fx.GraphModule]:
    found: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    with collect_reports() as reports:
        result = rewritten(function, inner)(*inputs)
    assert all(site.status == "rewritten" for graph in reports for site in graph.sites)
    assert relative_error(result, function(*inputs)) <= 1e-5
    assert outputs(result)
    return found


def count(gm: fx.GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def twice(x: Tensor, bias: Tensor) -> Tensor:
    return attend(attend(x, bias), bias)


def test_layers_share_the_copy_of_a_permuted_bias() -> None:
    with torch.no_grad():
        (gm,) = graphs_of(twice, *operands())
    calls = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert len(calls) == 2 and len({call.args[3] for call in calls}) == 1
    # The factor for rows without a key is the mask's alone, too.
    assert count(gm, aten.amax.default) == 1


def test_flex_reads_a_permuted_bias_key_after_key() -> None:
    with torch.no_grad(), only(kernel_named("flex")):
        (gm,) = graphs_of(twice, *operands())
    assert count(gm, torch.ops.higher_order.flex_attention) == 2
    (copied,) = gm.graph.find_nodes(op="call_function", target=torch.ops.attnrewrite.stored.default)
    assert not copied.args[0][0].meta["val"].is_contiguous() and copied.meta["val"][0].is_contiguous()


@pytest.mark.parametrize("kernel", ["native", "flex"])
def test_gradients_of_a_shared_bias_add_up(kernel: str) -> None:
    x, bias = operands()
    with only(kernel_named(kernel)):
        actual = gradients(rewritten(twice, "aot_eager", assume_attended_rows=True), (x, bias))
    assert relative_error(actual, gradients(twice, (x, bias))) <= 1e-4


def test_nothing_is_shared_between_regions_with_gradients_and_without() -> None:
    def function(x: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            first = attend(x, bias)
        return attend(first + x, bias)

    x, bias = operands()
    actual = gradients(rewritten(function, "aot_eager", assume_attended_rows=True), (x, bias))
    assert relative_error(actual, gradients(function, (x, bias))) <= 1e-4


def test_nothing_is_shared_between_checkpoints() -> None:
    def function(x: Tensor, bias: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(attend, x, bias, use_reentrant=False)
        return x

    x, bias = operands()
    actual = gradients(rewritten(function, "aot_eager", assume_attended_rows=True), (x, bias))
    assert relative_error(actual, gradients(function, (x, bias))) <= 1e-4


def test_equal_calls_that_drop_weights_stay_two() -> None:
    def function(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return attend(x, bias, 0.5), attend(x, bias, 0.5)

    x, bias = operands()
    with torch.no_grad():
        first, second = rewritten(function, "aot_eager", assume_attended_rows=True)(x, bias)
    assert not torch.equal(first, second)


def test_a_later_attention_that_ends_earlier() -> None:
    """The products with the values come in the other order: what is shared must stand before both."""

    def function(x: Tensor, bias: Tensor) -> Tensor:
        first = (x @ x.mT * 0.2 + bias).softmax(-1)
        second = (x @ x.mT * 0.3 + bias).softmax(-1)
        later = second @ x
        return first @ later

    with torch.no_grad():
        (gm,) = graphs_of(function, *operands())
    gm.graph.lint()


def test_a_bias_that_is_read_across_is_laid_out() -> None:
    with torch.no_grad():
        (gm,) = graphs_of(twice, *operands())
    calls = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert all(call.args[3].meta["val"].stride(-1) == 1 for call in calls)


def test_two_equal_attentions_are_two_rows_with_nodes_of_their_own() -> None:
    def function(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return attend(x, bias), attend(x, bias)

    x, bias = operands()
    with torch.no_grad(), collect_reports() as (reports):
        first, second = rewritten(function, "aot_eager", kernels="flex", verify=True)(x, bias)
    assert relative_error(first, attend(x, bias)) <= 1e-5 and torch.equal(first, second)
    one, other = reports[0].sites
    assert one.kernel == other.kernel == "flex" and one.nodes_after and other.nodes_after
    assert not set(one.nodes_after) & set(other.nodes_after)
    assert not any("could not be matched" in note for note in reports[0].notes)
