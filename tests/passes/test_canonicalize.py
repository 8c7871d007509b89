"""The canonical form of a site's scores, replayed in float64, gives the weights that the source gives."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnrewrite.analysis.masks import may_mask
from attnrewrite.analysis.values import ABSORBING, FAR_BELOW
from attnrewrite.ir.axes import Axis, Operand, resolve
from attnrewrite.ir.site import Bias, CanonicalAttention, CanonicalScores, Fill, Floor, MaskedRows, Scale
from tests.support.captured import Reading

QUERIES, KEYS, FEATURES = 4, 5, 8
_INPUTS = "q, k, v, bias, key_bias, mask, per_query, per_key"


def _scores(source: str) -> Callable[..., Tensor]:
    """``source`` says what is done to scores ``s``, step by step."""
    lines = [f"def scores({_INPUTS}):", "    s = q @ k.mT"]
    lines += [f"    i, j = torch.arange({QUERIES})[:, None], torch.arange({KEYS})[None]"]
    lines += [f"    {line}" for line in source.splitlines()]
    names: dict[str, Any] = {"torch": torch, "inf": math.inf}
    exec("\n".join([*lines, "    return s"]), names)
    return names["scores"]  # type: ignore[no-any-return]


def _inputs(seed: int, with_masked_rows: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(2, QUERIES, KEYS, generator=generator) < 0.4
    mask[..., 0] = False
    if with_masked_rows:
        mask[:, ::2] = True
    q, k, v = numbers(2, QUERIES, FEATURES), numbers(2, KEYS, FEATURES), numbers(2, KEYS, FEATURES)
    per_query, per_key = numbers(2, QUERIES, 1), numbers(KEYS).abs() + 0.5
    return [q, k, v, numbers(QUERIES, KEYS), numbers(2, 1, KEYS), mask, per_query, per_key]


class _Replay:
    """A canonical form, computed as a kernel is asked to."""

    def __init__(self, site: CanonicalAttention, values: dict[fx.Node, Any]) -> None:
        self._site, self._scores, self._values = site, site.scores, values
        (query,), (key,), (feature,) = site.query_axes, site.key_axes, site.feature_axes
        (batch,) = (axis for axis in site.query.axes if axis not in (query, feature))
        self._rows, self._columns, self._grid = (batch, query, feature), (batch, key, feature), (batch, query, key)

    def weights(self) -> Tensor:
        form = self._scores
        query = self._scaled(self._laid_out(self._site.query, self._rows), form.query_factors, self._rows)
        key = self._scaled(self._laid_out(self._site.key, self._columns), form.key_factors, self._columns)
        assert form.scale is not None
        products = form.scale * (query @ key.mT)
        if form.softcap is not None:
            products = form.softcap * torch.tanh(products / form.softcap)
        return (products + self.mask()).softmax(-1)

    def mask(self) -> Tensor:
        form = self._scores
        total = torch.zeros(2, QUERIES, KEYS, dtype=torch.float64)
        if form.is_causal:
            total = total.masked_fill(torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1), -math.inf)
        for term in form.terms:
            if isinstance(term, Bias):
                added = self._scaled(self._laid_out(term.operand, self._grid), term.scales, self._grid)
                total = total + added * term.factor
            elif isinstance(term, Floor):
                total = total.clamp_min(term.value)
            else:
                assert isinstance(term, Fill)
                condition = self._laid_out(term.condition, self._grid) != 0
                total = torch.where(condition != term.invert, _number_of(term, form), total)
        return total if form.rounded_to is None else total.to(form.rounded_to).double()

    def _laid_out(self, operand: Operand, axes: Sequence[Axis]) -> Tensor:
        value: Tensor = self._values[operand.node]
        layout = resolve(operand.layout)
        assert all(len(dim) < 2 for dim in layout)
        own = [dim[0] for dim in layout if dim]
        value = value.reshape([size for size, dim in zip(value.shape, layout, strict=True) if dim])
        value = value.permute([own.index(axis) for axis in axes if axis in own])
        for place, axis in enumerate(axes):
            if axis not in own:
                value = value.unsqueeze(place)
        return value

    def _scaled(self, value: Tensor, scales: Sequence[Scale], axes: Sequence[Axis]) -> Tensor:
        for scale in scales:
            factor: Any = scale.factor
            if isinstance(factor, Operand):
                factor = self._laid_out(factor, axes)
            elif isinstance(factor, fx.Node):
                factor = self._values[factor]
            value = value / factor if scale.divide else value * factor
        return value


def _number_of(term: Fill, form: CanonicalScores) -> float:
    """A mask's number is added to a score that the source replaces: alone, it is one that swallows any score.

    Fills of one number are one.
    """
    masks = [each for each in form.terms if isinstance(each, Fill) or (isinstance(each, Bias) and may_mask(each))]
    several = len(masks) > 1 and not form.fills_decide
    return term.value if several or term.value == -math.inf else ABSORBING


def _judged(source: str, seed: int = 0) -> tuple[str, CanonicalScores | None]:
    """What became of the source (compared, refused, or left to a kernel that takes any function), and its form."""
    scores = _scores(source)

    def attention(*inputs: Tensor) -> Tensor:
        s = scores(*inputs)
        return s.softmax(-1) @ inputs[2].to(s.dtype)

    reading = Reading(attention)
    form: CanonicalScores | None = None
    # A form holds for every input, whether rows keep a key or not.
    for with_masked_rows in (False, True):
        inputs = _inputs(seed, with_masked_rows)
        reading(*inputs)
        if not reading.sites:
            return "refused", None
        (site,) = reading.sites
        form = site.scores
        assert form is not None
        given = scores(*inputs)
        lost = (given <= FAR_BELOW).all(-1) if not given.isnan().any() else torch.zeros(2, QUERIES, dtype=torch.bool)
        assert form.attended is None or not bool(lost.any()), source
        assert (form.masked_rows is MaskedRows.NONE) == (form.attended is not None), source
        if form.inexpressible and form.softcap is None:
            return "any function", form
        expected = given.softmax(-1).double()
        # A form says nothing of the precision of what lies between.
        tolerance = 1e-5 if "float()" in source else 1e-9
        actual = _Replay(site, reading.values).weights()
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=tolerance, equal_nan=True, msg=lambda m: f"{source}\n{m}"
        )
        if bool(expected.isnan().any()):
            assert form.masked_rows is MaskedRows.NAN, source
    return "compared", form


# Drawn modifications.

_STEPS = (
    "s = s * 0.5",
    "s = s / 3",
    "s = -s",
    "s = s * -1.5",
    "s = s + bias",
    "s = s + key_bias",
    "s = bias - s",
    "s = torch.sub(s, bias, alpha=2)",
    "s = s + 3.0",
    "s = s - s.amax(-1, keepdim=True)",
    "s = s.masked_fill(mask, -inf)",
    "s = s.masked_fill(mask, -1e9)",
    "s = s.masked_fill(mask, torch.finfo(s.dtype).min)",
    "s = torch.where(mask, -1e300, s)",
    "s = s.masked_fill(j > i, -inf)",
    "s = s.masked_fill(j > i, -1e9)",
    "s = s + torch.where(mask, -inf, 0.0)",
    "s = s + (1.0 - (j <= i).double()) * -1e9",
    "s = s * (~mask).double() + (1.0 - (~mask).double()) * -1e9",
    "s = s * per_query",
    "s = s * per_key",
    "s = s / per_key",
    "s = s.clamp(min=torch.finfo(torch.float32).min)",
    "s = s.float().double()",
    "s = s.float()",
    "s = torch.tanh(s / 4) * 4",
    "s = s.clamp(-1, 1)",
)


def _drawn(pick: random.Random) -> str:
    return "\n".join(pick.choice(_STEPS) for _ in range(pick.choice((1, 2, 2, 3, 3, 4))))


def test_drawn_modifications() -> None:
    pick = random.Random(1)
    outcomes = Counter(_judged(_drawn(pick), seed)[0] for seed in range(40))
    # The steps are such that many have a canonical form.
    assert outcomes["compared"] >= 15, outcomes


# What each step comes to.


def _form(source: str) -> CanonicalScores:
    outcome, form = _judged(source)
    assert form is not None, outcome
    return form


def test_a_scale_after_a_bias_multiplies_it() -> None:
    form = _form("s = s * 0.5 + bias\ns = s * 4")
    assert form.scale == 2.0
    (bias,) = form.terms
    assert isinstance(bias, Bias)
    # Of a bias that may be anything each step is kept, as it may overflow.
    assert bias.of(1.0) == 4.0
    before = _form("s = s * 0.5 * 4 + bias")
    (bias,) = before.terms
    assert isinstance(bias, Bias)
    assert (before.scale, bias.of(1.0)) == (2.0, 1.0)


def test_the_sign_goes_to_the_query() -> None:
    form = _form("s = bias - s * 0.5")
    assert form.scale == 0.5
    assert form.query_factors == (Scale(-1.0),)
    (bias,) = form.terms
    assert isinstance(bias, Bias)
    assert bias.of(1.0) == 1.0


def test_a_factor_of_a_row_or_a_column_goes_to_query_or_key() -> None:
    form = _form("s = s * per_query / per_key")
    assert [scale.divide for scale in form.query_factors] == [False]
    assert [scale.divide for scale in form.key_factors] == [True]


def test_a_fill_is_scaled_with_the_scores() -> None:
    (fill,) = _form("s = s.masked_fill(mask, -1e9) * 0.5").terms
    assert isinstance(fill, Fill)
    assert fill.value == -5e8


def test_a_cast_makes_a_fill_infinite() -> None:
    form = _form("s = torch.where(mask, -1e300, s).float()")
    (fill,) = form.terms
    assert isinstance(fill, Fill)
    assert fill.value == -math.inf
    assert form.masked_rows is MaskedRows.NAN


def test_a_floor_makes_a_mask_finite() -> None:
    form = _form("s = s.masked_fill(mask, -inf).clamp(min=-3e38)")
    (fill,) = form.terms
    assert isinstance(fill, Fill)
    assert fill.value == -3e38
    assert form.masked_rows is MaskedRows.MEAN_OF_VALUE
    floored = _form("s = (s + torch.where(mask, -inf, 0.0)).clamp(min=-3e38)")
    assert [type(term) for term in floored.terms] == [Bias, Floor]
    assert floored.masked_rows is MaskedRows.MEAN_OF_VALUE


@pytest.mark.parametrize(
    ("source", "masked_rows"),
    [
        ("s = s * 0.5", MaskedRows.NONE),
        ("s = s.masked_fill(j > i, -inf)", MaskedRows.NONE),
        ("s = s.masked_fill(mask, -inf)", MaskedRows.NAN),
        ("s = s.masked_fill(mask, -1e9)", MaskedRows.MEAN_OF_VALUE),
        ("s = s.masked_fill(mask, torch.finfo(s.dtype).min)", MaskedRows.MEAN_OF_VALUE),
        ("s = s + torch.where(mask, -inf, 0.0)", MaskedRows.NAN),
        # What the caller adds may be minus infinity.
        ("s = s + bias", MaskedRows.NAN),
        ("s = s.masked_fill(mask | (j > i), -inf)", MaskedRows.NAN),
    ],
)
def test_rows_without_a_key(source: str, masked_rows: MaskedRows) -> None:
    assert _form(source).masked_rows is masked_rows


def test_multiplied_by_zeros_and_filled_by_a_sum() -> None:
    (fill,) = _form("m = (~mask).double()\ns = s * m + (1.0 - m) * -1e9").terms
    assert isinstance(fill, Fill)
    assert (fill.value, fill.invert) == (-1e9, True)


@pytest.mark.parametrize(
    "source",
    [
        "s = s / 0.0",
        "s = s.masked_fill(mask, -inf) * -1.0",
        "s = torch.relu(s.masked_fill(mask, -inf))",
        "s = s + torch.where(mask, -inf, 0.0)\ns = s * (j <= i).double()",
    ],
)
def test_no_form_gives_the_source(source: str) -> None:
    assert _judged(source)[0] == "refused"


@pytest.mark.parametrize("value", [-2e7, -1e9])
def test_a_number_that_is_filled_in_beside_a_bias_that_may_mask(value: float) -> None:
    """In a row that is filled as a whole all keys weigh the same, which no number that is added to scores gives them.

    A number that swallows any score would: but the bias may mask the other keys of a row by as low a number.
    """
    form = _form(f"s = s + bias\ns = s.masked_fill(mask, {value})")
    assert "together with another mask or bias" in form.inexpressible
    # One that swallows any score is what it is.
    assert not _form("s = s + bias\ns = s.masked_fill(mask, -1e300)").inexpressible
    # Nor is there a second mask where every row keeps a key.
    assert not _form(f"s = s + torch.where(j > i, -inf, 0.0)\ns = s.masked_fill(j > i, {value})").inexpressible
