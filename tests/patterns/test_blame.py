"""What is kept names the operation that is in the way: not softmax, unless softmax itself is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrewrite.patterns.base import Specimen
from attnrewrite.patterns.lookalikes import LOOKALIKES
from tests.support.helpers import rows

_OUTPUT = "the output of the graph"
_PRODUCT = {"matmul"}

_BLAMED: dict[str, set[str]] = {
    "a_function_behind_masks": {"erf"},
    "batch_norm_of_the_batch": {"getitem"},
    "causal_linear_attention": _PRODUCT,
    "difference_with_a_factor_of_each_key": {"unbind"},
    "double_softmax": {"softmax"},
    "entropy_of_weights": {"clamp_min"},
    "expert_matrices": {"einsum"},
    "features_that_cancel": _PRODUCT,
    "filled_after_softmax": {"masked_fill"},
    "gated_weights": {"mul"},
    "gates_by_products": {"bmm", "einsum", "inner", "matmul", "sum", "tensordot"},
    "infinite_rows_of_either_sign_are_zero": {"isinf"},
    "keys_chosen_by_score": {"topk"},
    "masked_after_softmax": {"mul"},
    "maximum_over_queries": {"amax"},
    "mixture_of_experts": {"L_experts_"},
    "number_added_to_weights": {"add"},
    "one_key_and_a_sum_over_queries": _PRODUCT,
    "parts_with_a_gap": {"slice"},
    "pooling": _PRODUCT,
    "positive_part_of_a_difference": {"sub"},
    "product_sums_over_batch_too": {"einsum"},
    "product_with_transposed_weights": _PRODUCT,
    "relative_values": {"einsum"},
    "renormalized_weights": {"add"},
    "retention": _PRODUCT,
    "running_sums": {"einsum", "matmul"},
    "scores_returned": {_OUTPUT},
    "scores_summed_over_heads": {"sum"},
    "sharpened_weights": {"pow"},
    "sink_with_a_value": _PRODUCT,
    "slot_attention": {"add"},
    "softmax_of_context": _PRODUCT,
    "softmax_over_all_pairs": _PRODUCT,
    "softmax_over_batch": _PRODUCT,
    "softmax_over_heads": _PRODUCT,
    "softmax_over_queries": _PRODUCT,
    "softmax_over_the_only_head": _PRODUCT,
    "some_of_the_weights": {"slice"},
    "squared_scores": {"mul"},
    "state_of_linear_attention": _PRODUCT,
    "straight_through": {"argmax"},
    "talking_heads_after_softmax": {"einsum"},
    "talking_heads_before_softmax": {"L_v_"},
    "top_k_router": {"topk"},
    "two_biases_and_the_scores_returned": {"cat"},
    "weights_cut_short": {"slice"},
    "weights_of_linear_attention": _PRODUCT,
    "weights_returned": {_OUTPUT},
    "weights_that_are_measured_too": {"cumsum"},
    "zeroed_by_another_mask": {"masked_fill"},
}
"""The operations that lookalikes are kept for."""


def _operation(blamed: str) -> str:
    return blamed.partition(" (")[0]


@pytest.mark.parametrize("specimen", LOOKALIKES, ids=lambda specimen: specimen.name)
def test_lookalikes(specimen: Specimen) -> None:
    with torch.no_grad():
        kept = [row for row in rows(specimen.function, *specimen.inputs(0, 12)) if row.status == "kept"]
    assert {_operation(row.blamed) for row in kept} == (_BLAMED.get(specimen.name, set()) if kept else set())


def _heads() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (6, 9, 9))
    mask, other = (torch.rand(2, 1, 6, 9, generator=generator) < 0.5 for _ in range(2))
    return q, k, v, mask, other, torch.randn(4, 6, 9, generator=generator)


_REFUSED: dict[str, tuple[Callable[..., Tensor], bool, str, str]] = {
    # Name: what is done to the scores, whether in training, the operation, words of the reason.
    "a second mask behind a maximum": (
        lambda s, m, o, b: (low := s.masked_fill(m, -1e9), low - low.amax(-1, keepdim=True))[1] + o * -1e9,
        True,
        "add",
        "changed further after their maximum was subtracted",
    ),
    "a mask between a bias and softmax": (
        lambda s, m, o, b: s.masked_fill(m, -math.inf) + b,
        True,
        "add",
        "a fill stops the gradient",
    ),
    "a function of masked scores": (lambda s, m, o, b: (s + m * -1e9).square(), False, "square", "masked before"),
    "a scale of infinity": (lambda s, m, o, b: s / math.inf, False, "div", "divided by infinity"),
    "scores divided by zero": (lambda s, m, o, b: s / 0.0, False, "div", "divided by zero"),
    "a tiny factor": (lambda s, m, o, b: s * 1e-30, False, "mul", "out of the range"),
    "infinity times zero": (
        lambda s, m, o, b: s.masked_fill(m, -math.inf) * o,
        False,
        "mul",
        "multiplied by zeros, which gives NaN",
    ),
    "two numbers that cancel": (lambda s, m, o, b: s + m * -1e9 + o * 1e9, False, "add", "large numbers of both signs"),
    "a floor in training": (
        lambda s, m, o, b: torch.clamp(s + m * torch.finfo(s.dtype).min, min=torch.finfo(s.dtype).min),
        True,
        "clamp",
        "split between the scores and their lower bound",
    ),
    "infinities put in": (
        lambda s, m, o, b: torch.nan_to_num(s, nan=-math.inf),
        False,
        "nan_to_num",
        "puts infinities",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_refusals(name: str) -> None:
    change, training, operation, words = _REFUSED[name]

    def function(q: Tensor, k: Tensor, v: Tensor, *masks: Any) -> Tensor:
        return change(q @ k.mT * 0.3, *masks).softmax(-1) @ v

    inputs = [part.requires_grad_(training and part.is_floating_point()) for part in _heads()]
    with torch.set_grad_enabled(training):
        (row,) = rows(function, *inputs)
    assert row.status == "kept"
    assert words in row.reason
    assert _operation(row.blamed) == operation
