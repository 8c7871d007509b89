"""What may pass for the same result, and what may not, on numbers chosen so that each is on its side of the line."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnrewrite.numerics.judge import HALF, disagreement, disagreements

NAN, INF = math.nan, math.inf
DTYPES = (torch.float64, torch.float32, *HALF)
UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}


def rows(*values: list[float]) -> Tensor:
    """In float64, which holds what a test means, whatever dtype it is about."""
    return torch.tensor(values, dtype=torch.float64)


def right(new: Tensor, own: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    return disagreement(new, own, truth, dtype) == ""


TRUTH = rows([1.0, -0.5, 0.25], [0.5, 1.0, -1.0], [0.75, 0.5, -0.25])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_is_right(dtype: torch.dtype) -> None:
    assert right(TRUTH.clone(), TRUTH, TRUTH, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_a_few_roundings_are_right_and_many_are_not(dtype: torch.dtype) -> None:
    assert right(TRUTH + 3 * UNIT[dtype], TRUTH, TRUTH, dtype)
    assert not right(TRUTH + 6 * UNIT[dtype], TRUTH, TRUTH, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_as_far_from_the_reference_as_eager_is_right_on_either_side(dtype: torch.dtype) -> None:
    own = TRUTH + 100 * UNIT[dtype]
    assert right(own, own, TRUTH, dtype)
    assert right(TRUTH, own, TRUTH, dtype)
    assert right(TRUTH - 100 * UNIT[dtype], own, TRUTH, dtype)
    assert not right(TRUTH - 500 * UNIT[dtype], own, TRUTH, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_a_row_that_eager_rounds_away_says_nothing_of_the_others(dtype: torch.dtype) -> None:
    own = TRUTH.clone()
    own[1] = torch.tensor([-1.0, 0.0, 1.0])  # Another mean of values.
    assert right(TRUTH, own, TRUTH, dtype)
    assert right(own, own, TRUTH, dtype)
    new = own.clone()
    new[2] += 0.1
    assert "row 2 of 3" in disagreement(new, own, TRUTH, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_a_row_that_eager_gets_right_by_luck_is_held_to_the_error_of_most_rows(dtype: torch.dtype) -> None:
    error = 20 * UNIT[dtype]
    own = TRUTH + error
    own[0] = TRUTH[0]
    new = TRUTH.clone()
    new[0] += error
    assert right(new, own, TRUTH, dtype)
    new[0] += 10 * error
    assert not right(new, own, TRUTH, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_a_whole_tensor_has_one_error(dtype: torch.dtype) -> None:
    own = TRUTH.clone()
    own[0] += 0.5
    new = TRUTH.clone()
    new[2] += 0.5
    assert not right(new, own, TRUTH, dtype)
    assert disagreement(new, own, TRUTH, dtype, whole=True) == ""
    new[2] += 4
    assert disagreement(new, own, TRUTH, dtype, whole=True)


@pytest.mark.parametrize("dtype", HALF)
def test_a_row_small_beside_the_largest_number_is_measured_by_itself(dtype: torch.dtype) -> None:
    """A fill that is returned beside scores, of which a rounding would be larger than they are."""
    truth = torch.cat([TRUTH, rows([-6e4, -6e4, -6e4])])
    new = truth.clone()
    new[0] += 4 * UNIT[dtype]
    assert right(new, truth, truth, dtype)
    new[0] += 0.5
    assert not right(new, truth, truth, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_a_small_row_has_the_roundings_of_its_neighbors(dtype: torch.dtype) -> None:
    truth = rows([1.0, 0.5], [0.1, 0.08])
    new = truth.clone()
    new[1] += 3 * UNIT[dtype]
    assert right(new, truth, truth, dtype)


def test_beneath_the_normal_numbers_neighbors_are_no_nearer() -> None:
    truth = rows([1e-7, 0.0])
    assert right(truth + 6e-8, truth, truth, torch.float16)
    assert not right(truth + 6e-8, truth, truth, torch.bfloat16)
    assert not right(truth + 1e-6, truth, truth, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("new", "own", "truth", "is_right"),
    [
        # Both agree.
        (NAN, NAN, NAN, True),
        (1.0, NAN, NAN, False),
        (INF, NAN, NAN, False),
        (INF, INF, INF, True),
        (-INF, INF, INF, False),
        (NAN, INF, INF, False),
        (1.0, INF, INF, False),
        (NAN, 1.0, 1.0, False),
        (INF, 1.0, 1.0, False),
        # Eager overflows.
        (NAN, NAN, 1.0, True),
        (1.0, NAN, 1.0, True),
        (2.0, NAN, 1.0, False),
        (INF, NAN, 1.0, False),
        (INF, INF, 1.0, True),
        (-INF, INF, 1.0, False),
        (1.0, INF, 1.0, True),
        (2.0, INF, 1.0, False),
        # The reference has none: eager is the measure.
        (NAN, 1.0, NAN, True),
        (1.0, 1.0, NAN, True),
        (2.0, 1.0, NAN, False),
        (INF, 1.0, NAN, False),
        # They are not finite in two ways.
        (INF, INF, NAN, True),
        (NAN, INF, NAN, True),
        (1.0, INF, NAN, False),
        (-INF, INF, NAN, False),
    ],
)
def test_nan_and_infinities_in_half(dtype: torch.dtype, new: float, own: float, truth: float, is_right: bool) -> None:
    beside = [1.0, 0.5]
    assert right(rows([new, *beside]), rows([own, *beside]), rows([truth, *beside]), dtype) == is_right


@pytest.mark.parametrize("dtype", HALF)
def test_where_eager_has_no_number_it_measures_no_rounding(dtype: torch.dtype) -> None:
    """The error of all layers before is in the result, and eager cannot say how large it is."""
    own = TRUTH.clone()
    own[1] = NAN
    new = TRUTH.clone()
    new[1] += 20 * UNIT[dtype]
    assert right(new, own, TRUTH, dtype)
    new[1] += 20 * UNIT[dtype]
    assert not right(new, own, TRUTH, dtype)
    new[1], new[0] = TRUTH[1], TRUTH[0] + 20 * UNIT[dtype]
    assert not right(new, own, TRUTH, dtype)


def test_the_dtype_is_what_is_computed_in_and_not_that_of_the_result() -> None:
    """Scores in float16 whose softmax is asked for in float32."""
    truth = TRUTH.float()
    new = truth + 3 * UNIT[torch.float16]
    assert right(new, truth, TRUTH, torch.float16)
    assert not right(new, truth, TRUTH, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_precision_agrees_with_eager_and_not_with_the_reference(dtype: torch.dtype) -> None:
    """-3e38 added to all scores of a row leaves the mean of the values, of which float64 knows nothing."""
    own = TRUTH.clone()
    own[1] = torch.tensor([-1.0, 0.0, 1.0])
    assert right(own, own, TRUTH, dtype)
    assert not right(TRUTH, own, TRUTH, dtype)


def test_single_precision_allows_another_order_of_summation() -> None:
    assert right(TRUTH + 5e-6, TRUTH, TRUTH, torch.float32)
    assert not right(TRUTH + 5e-5, TRUTH, TRUTH, torch.float32)
    assert not right(TRUTH + 5e-6, TRUTH, TRUTH, torch.float64)


def test_single_precision_allows_what_is_absorbed_before_the_sum() -> None:
    """-1e4 added to a score leaves three digits of it, which depend on the order of its products."""
    own = TRUTH + 5e-4
    assert right(TRUTH - 5e-4, own, TRUTH, torch.float32)
    assert not right(TRUTH - 5e-3, own, TRUTH, torch.float32)


@pytest.mark.parametrize(
    ("new", "own", "truth", "is_right"),
    [
        (NAN, NAN, NAN, True),
        (NAN, NAN, 1.0, True),
        (1.0, NAN, 1.0, False),
        (1.0, 1.0, NAN, True),
        (NAN, 1.0, NAN, False),
        (INF, INF, 1.0, True),
        (-INF, INF, 1.0, False),
    ],
)
def test_nan_and_infinities_in_single_precision(new: float, own: float, truth: float, is_right: bool) -> None:
    beside = [1.0, 0.5]
    assert right(rows([new, *beside]), rows([own, *beside]), rows([truth, *beside]), torch.float32) == is_right


def test_a_column_is_one_row() -> None:
    """A gradient for each head, of shape (heads, 1, 1): what is nought for one has the rounding of the others."""
    truth = rows([1.0, 0.0, 0.5]).view(3, 1, 1)
    new = truth + torch.tensor([0.0, 3 * UNIT[torch.float16], 0.0]).view(3, 1, 1)
    assert right(new, truth, truth, torch.float16)


def test_a_number_and_nothing() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    assert right(one, one, one, torch.float16)
    assert not right(one + 0.1, one, one, torch.float16)
    assert right(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), torch.float16)


def test_shape_and_dtype_must_be_eagers() -> None:
    own = TRUTH.half()
    assert "(9,) in place of" in disagreement(own.flatten(), own, TRUTH, torch.float16)
    assert "torch.float32 (3, 3) in place of torch.float16" in disagreement(own.float(), own, TRUTH, torch.float16)


def test_integers_are_eagers_or_the_references() -> None:
    """The index of the largest number, which may be another one where two are nearly equal."""
    own, truth = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    assert right(torch.tensor([1, 2, 3]), own, truth, torch.float16)
    assert right(torch.tensor([1, 2, 4]), own, truth, torch.float16)
    assert not right(torch.tensor([1, 2, 5]), own, truth, torch.float16)
    assert not right(torch.tensor([4, 2, 3]), own, truth, torch.float16)
    assert not right(torch.tensor([True]), torch.tensor([False]), torch.tensor([False]), torch.float32)


def test_a_tensor_of_several_is_named_and_measured_beside_them() -> None:
    """The query's gradient is a difference, and a bias has the sum of all."""
    key, bias, query = rows([1.0, 2.0]), rows([500.0]), rows([0.0, 0.0])
    unit = UNIT[torch.float16]
    own = truth = [key, bias, query]
    new = [key, bias, query + unit]
    assert disagreements(new, own, truth, torch.float16, beside=0.25) == ""
    assert disagreements(new, own, truth, torch.float16).startswith("number 3 of 3: ")
    new = [key, bias, query + 9 * unit]
    names = ["key", "bias", "query"]
    assert disagreements(new, own, truth, torch.float16, beside=0.25, names=names).startswith("query: ")


def test_a_missing_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        disagreements([TRUTH], [TRUTH, TRUTH], [TRUTH, TRUTH], torch.float16)


def test_a_gradient_of_zero_has_the_rounding_of_eager() -> None:
    """Where all values are equal the query's gradient is the difference of equal numbers."""
    truth = torch.full((2, 4), 1e-16, dtype=torch.float64)
    own, new = torch.full((2, 4), 1e-7), torch.full((2, 4), -2e-7)
    assert disagreement(new, own, truth, torch.float32) == ""
    assert disagreement(new * 100, own, truth, torch.float32) != ""


@pytest.mark.parametrize("dtype", HALF)
def test_a_number_is_known_no_better_than_its_inputs_are(dtype: torch.dtype) -> None:
    """The gradient of a factor is one number, a sum of which eager's error happened to be zero."""
    truth = torch.tensor(0.5, dtype=torch.float64)
    new = truth + 12 * UNIT[dtype]
    draws = [truth - 4 * UNIT[dtype], truth + UNIT[dtype]]
    assert disagreement(new, truth, truth, dtype)
    assert disagreement(new, truth, truth, dtype, moved=draws) == ""
    assert disagreement(truth + 40 * UNIT[dtype], truth, truth, dtype, moved=draws)
    assert disagreement(new.float(), truth.float(), truth, torch.float32, moved=draws)


@pytest.mark.parametrize("dtype", HALF)
def test_what_moves_with_the_inputs_is_judged_row_by_row(dtype: torch.dtype) -> None:
    draws = [TRUTH + torch.tensor([[1.0], [0.0], [0.0]])]
    new = TRUTH.clone()
    new[0] += 1.0
    assert disagreement(new, TRUTH, TRUTH, dtype, moved=draws) == ""
    assert disagreements([TRUTH, new], [TRUTH, TRUTH], [TRUTH, TRUTH], dtype, moved=[[TRUTH, draws[0]]]) == ""
    assert disagreements([new, TRUTH], [TRUTH, TRUTH], [TRUTH, TRUTH], dtype, moved=[[TRUTH, draws[0]]])
    new[1] += 1.0
    assert disagreement(new, TRUTH, TRUTH, dtype, moved=draws)


@pytest.mark.parametrize("dtype", HALF)
def test_a_row_of_which_only_eager_has_numbers_may_be_rounded(dtype: torch.dtype) -> None:
    truth = TRUTH.clone()
    truth[1] = math.nan
    new = TRUTH.clone()
    new[1] += 3 * UNIT[dtype]
    assert right(new, TRUTH, truth, dtype)
    new[1] += 0.5
    assert not right(new, TRUTH, truth, dtype)
