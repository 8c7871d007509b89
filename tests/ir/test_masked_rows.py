"""What the source gives rows without a key, as kernels ask for it."""

from __future__ import annotations

import math

import pytest

from attnrewrite.ir import MaskedRows

MEAN = 1.0

GIVEN = {
    # What softmax over values whose mean is 1 comes to in a row that is masked by (a finite number, minus infinity).
    MaskedRows.MEAN_OF_VALUE: (MEAN, MEAN),
    MaskedRows.NAN: (MEAN, math.nan),
    MaskedRows.ZERO: (0.0, 0.0),
    MaskedRows.ZERO_UNLESS_NAN: (0.0, math.nan),
    MaskedRows.ZERO_WHERE_NAN: (MEAN, 0.0),
}


def test_every_answer_but_none_gives_something_else() -> None:
    assert {*GIVEN, MaskedRows.NONE} == set(MaskedRows)
    assert len(set(map(str, GIVEN.values()))) == len(GIVEN)


@pytest.mark.parametrize("rows", GIVEN)
def test_properties_say_what_is_given(rows: MaskedRows) -> None:
    finite, infinite = GIVEN[rows]
    assert rows.may_occur
    assert rows.may_be_nan == math.isnan(infinite)
    assert rows.tells_nan == (finite != infinite)
    assert rows.is_zero_unless_nan == (finite == 0)
    assert rows.is_mean_of_value == (finite == infinite == MEAN)


def test_rows_that_do_not_occur_ask_for_nothing() -> None:
    rows = MaskedRows.NONE
    assert not (rows.may_occur or rows.may_be_nan or rows.tells_nan or rows.is_zero_unless_nan)
    assert rows.is_mean_of_value


def test_a_kernel_may_compare_with_the_words() -> None:
    rows: str = MaskedRows.ZERO_UNLESS_NAN
    assert rows == "zero unless NaN"
    assert f"{rows}" == "zero unless NaN"
