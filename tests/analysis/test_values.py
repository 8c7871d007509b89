"""Which values a tensor can take, from how the graph computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnrewrite.analysis.values import Value, ValueKind, possible_values
from attnrewrite.capture.legalize import legalized
from attnrewrite.capture.trace import capture
from attnrewrite.ir.bounds import BEHIND_PRODUCT, searching

MASK = torch.zeros(2, 6)


def values_of(function: Callable[..., Tensor], *inputs: Tensor) -> frozenset[Value]:
    found: list[frozenset[Value]] = []

    def read(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        (result,) = capture(legalized(gm), example_inputs).gm.graph.output_node().all_input_nodes
        found.append(possible_values(result))
        return gm.forward

    torch.compile(function, backend=read)(*inputs)
    (values,) = found
    return values


@pytest.mark.parametrize("frozen", [False, True])
def test_projections_are_of_ordinary_size(frozen: bool) -> None:
    weight = nn.Parameter(torch.randn(3, 6), requires_grad=not frozen)
    assert values_of(lambda x, w: F.linear(x, w), MASK, weight) == {ValueKind.LEARNED}


@pytest.mark.parametrize(
    "product",
    [
        lambda x: torch.einsum("bi,bj->bij", x, torch.ones(2, 5)),
        lambda x: F.linear(x[..., None], torch.ones(4, 1)),
        lambda x: x @ x.mT,
    ],
)
def test_products_of_what_is_given_are_anything(product: Callable[[Tensor], Tensor]) -> None:
    """A mask of -1e9 may go in."""
    assert values_of(product, MASK) == {ValueKind.ANY}


WEIGHT = nn.Parameter(torch.randn(6, 6))


@pytest.mark.parametrize("number", [-1e4, -65504.0, -1e9])
def test_products_of_masks_are_anything_whatever_they_are_multiplied_with(number: float) -> None:
    assert values_of(lambda x, w: (1 - x) * number @ w, MASK, WEIGHT) == {ValueKind.ANY}
    assert values_of(lambda x, w: (x * number).sin() @ w, MASK, WEIGHT) == {ValueKind.LEARNED}


def test_a_mask_far_behind_a_product_is_not_ruled_out() -> None:
    def function(x: Tensor, w: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = x * 0.5
        return x @ w

    within = BEHIND_PRODUCT.most - 2  # The product's operand and the input are nodes, too.
    assert values_of(lambda x, w: function(x, w, within), MASK, WEIGHT) == {ValueKind.LEARNED}
    with searching() as ended:
        assert values_of(lambda x, w: function(x, w, within + 2), MASK, WEIGHT) == {ValueKind.ANY}
    assert str(BEHIND_PRODUCT) in str(ended)
