"""Softmax attention, written out: what is done to scores and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.against_eager import prepared, run, truth, wrong
from tests.support.helpers import gradients, relative_error, rewritten, rows


def heads(queries: int = 6, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (queries, keys, keys))
    return q, k, v


# Factors of the weights that were copied.


@pytest.mark.parametrize(
    ("copied", "shape"),
    [
        (lambda t: t.repeat(1, 4, 1, 9), (2, 1, 6, 1)),
        (lambda t: t.tile(4, 1, 9), (2, 1, 6, 1)),
        (lambda t: t.expand(2, 4, 6, 9), (4, 1, 1)),
        (lambda t: t.repeat(1, 1, 6, 1), (2, 4, 1, 9)),
        (lambda t: t.repeat_interleave(9, -1), (2, 4, 6, 1)),
        (lambda t: t.repeat(1, 1, 1, 9).transpose(0, 1).contiguous().transpose(0, 1), (2, 4, 6, 1)),
    ],
)
def test_a_copied_factor(copied: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * copied(factor)) @ v

    inputs = (*heads(), torch.randn(shape))
    (row,) = rows(function, *inputs)
    assert row.status == "rewritten", row.reason
    compiled = rewritten(function, "aot_eager")
    assert relative_error(compiled(*inputs), function(*inputs)) < 1e-5
    assert relative_error(gradients(compiled, inputs), gradients(function, inputs)) < 1e-4


def test_a_copied_mask_of_queries() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * mask.repeat(1, 4, 1, 9).float()) @ v

    inputs = (*heads(), torch.rand(2, 1, 6, 1) < 0.5)
    (row,) = rows(function, *inputs)
    assert row.status == "rewritten", row.reason
    assert relative_error(rewritten(function, "aot_eager")(*inputs), function(*inputs)) < 1e-5


def test_a_factor_that_is_copied_without_gradients() -> None:
    """Behind the copies it would get a gradient."""

    def function(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        with torch.no_grad():
            copies = factor.repeat(1, 1, 1, 9)
        return ((q @ k.mT).softmax(-1) * copies) @ v * factor

    inputs = (*heads(), torch.randn(2, 4, 6, 1))
    compiled = rewritten(function, "aot_eager")
    assert relative_error(gradients(compiled, inputs), gradients(function, inputs)) < 1e-4


def test_a_factor_that_only_looks_copied() -> None:
    """What is repeated has keys of its own."""

    def function(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * factor.repeat(1, 1, 1, 3)) @ v

    (row,) = rows(function, *heads(), torch.randn(2, 4, 6, 3))
    assert row.status == "kept" and "not known to be the mask" in row.reason


# Assignments to what a mask selects.


@pytest.mark.parametrize("shape", [(2, 4, 6, 9), (2, 4, 6), (2, 4), (4, 6, 9), (4,), (6,), (6, 9)])
@pytest.mark.parametrize("before", [True, False])
def test_assigned_by_a_mask(shape: tuple[int, ...], before: bool) -> None:
    place = {4: 1, 6: 2}.get(shape[0], 0)
    index: Any = (*[slice(None)] * place,)
    value = -1e9 if before else 0.0

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.mT
        if before:
            scores[(*index, mask)] = value
        weights = scores.softmax(-1)
        if not before:
            weights = weights.clone()
            weights[(*index, mask)] = value
        return weights @ v

    generator = torch.Generator().manual_seed(1)
    inputs = (*heads(), torch.rand(shape, generator=generator) < 0.4)
    (row,) = rows(function, *inputs)
    if not before and 9 in shape:
        assert row.status == "kept" and "not known to be the mask" in row.reason
    else:
        assert row.status == "rewritten", row.reason
    compiled = rewritten(function, "aot_eager")
    assert relative_error(compiled(*inputs), function(*inputs)) < 1e-5
    assert relative_error(gradients(compiled, inputs), gradients(function, inputs)) < 1e-4


@pytest.mark.parametrize(
    ("assign", "reason"),
    [
        (lambda w, m: w.index_put_((m,), torch.tensor(1.0)), "other than zero"),
        (lambda w, m: w.index_put_((m,), torch.tensor(0.0), accumulate=True), "not one boolean mask"),
        (lambda w, m: w.index_put_((torch.tensor([0]),), torch.tensor(0.0)), "not one boolean mask"),
    ],
)
def test_other_assignments_to_the_weights(assign: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return assign((q @ k.mT).softmax(-1).clone(), mask) @ v

    (row,) = rows(function, *heads(), torch.rand(2, 4, 6, 9) < 0.4)
    assert row.status == "kept" and reason in row.reason, row.reason


# Steps that are nothing where no gradient is wanted.


def filled_data(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.data.masked_fill_(mask, -math.inf)
    return scores.softmax(-1) @ v


def detached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).detach().masked_fill(mask, -math.inf).softmax(-1).detach() @ v


@pytest.mark.parametrize("function", [filled_data, detached])
def test_detached_where_no_gradient_is_wanted(function: Callable[..., Tensor]) -> None:
    inputs = (*heads(), torch.ones(6, 9, dtype=torch.bool).triu(4))
    with torch.no_grad():
        (row,) = rows(function, *inputs)
        assert row.status == "rewritten"
        assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-6


@pytest.mark.parametrize("function", [filled_data, detached])
def test_detached_where_gradients_are_wanted(function: Callable[..., Tensor]) -> None:
    *parts, mask = (*heads(), torch.ones(6, 9, dtype=torch.bool).triu(4))
    inputs = [part.requires_grad_() for part in parts]
    found, expected = (
        torch.autograd.grad(call(*inputs, mask).sin().sum(), inputs, allow_unused=True)
        for call in (rewritten(function), function)
    )
    # What has no gradient in eager may have one of zeros when compiled.
    pairs = [(torch.zeros_like(i) if e is None else e, f) for i, e, f in zip(inputs, expected, found, strict=True)]
    assert all(f is None or relative_error(f, e) <= 1e-5 for e, f in pairs)
    assert bool(expected[2].any())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_to_num_of_scores_that_are_not_finite(value: float, where: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.nan_to_num(q @ k.mT * 0.5)
        return scores.masked_fill(torch.ones(6, 9, dtype=torch.bool).triu(4), -math.inf).softmax(-1) @ v

    q, k, v = heads()
    (q if where == "query" else k)[0, 1, 2, 3] = value
    with torch.no_grad():
        (row,) = rows(function, q, k, v)
        assert (row.status, row.kernel) == ("rewritten", "flex")
        expected, found = function(q, k, v), rewritten(function)(q, k, v)
    assert torch.equal(found.isnan(), expected.isnan())
    assert relative_error(found, expected) <= 1e-5


# Assignments by indices.


@pytest.mark.parametrize("offset", [-3, 0, 1, 4])
@pytest.mark.parametrize("triangle", [torch.triu_indices, torch.tril_indices])
def test_assigned_by_the_indices_of_a_triangle(triangle: Callable[..., Tensor], offset: int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        rows_, columns = triangle(q.shape[-2], k.shape[-2], offset)
        scores[..., rows_, columns] = -math.inf
        return scores.softmax(-1) @ v

    (row,) = rows(function, *heads())
    assert row.status == "rewritten"
    expected, found = function(*heads()), rewritten(function)(*heads())
    assert torch.equal(found.isnan(), expected.isnan())
    assert relative_error(found.nan_to_num(), expected.nan_to_num()) <= 1e-6


@pytest.mark.parametrize("low", [-5e4, -1e30, -math.inf])
@pytest.mark.parametrize("last", [torch.finfo(torch.float32).min, -math.inf])
def test_assigned_twice_by_indices(low: float, last: float) -> None:
    """The diagonal and what is above it, as reformer-pytorch 1.4.4 writes it."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ q.mT
        places = torch.arange(q.shape[-2])
        scores[..., places, places] = low
        rows_, columns = torch.triu_indices(q.shape[-2], q.shape[-2], 1)
        scores[..., rows_, columns] = last
        return scores.softmax(-1) @ v

    q, _, v = heads()
    v = v[..., : q.shape[-2], :]
    with torch.no_grad():
        (row,) = rows(function, q, q, v)
        assert row.status == "rewritten"
        expected, found = function(q, q, v), rewritten(function)(q, q, v)
    assert torch.equal(found.isnan(), expected.isnan())
    assert relative_error(found.nan_to_num(), expected.nan_to_num()) <= 1e-6


def columns_of_some_rows(s: Tensor, places: Tensor) -> None:
    s[:, :, places[:, None], places] = -1e9


def pairs(s: Tensor, places: Tensor) -> None:
    s[..., places, places.flip(0)] = -math.inf


def from_behind(s: Tensor, places: Tensor) -> None:
    s[..., -1 - places, places] = torch.tensor(-1e30)


def whole_heads(s: Tensor, places: Tensor) -> None:
    s[:, places] = 0.5


@pytest.mark.parametrize("assign", [columns_of_some_rows, pairs, from_behind, whole_heads])
@pytest.mark.parametrize("grad", [False, True])
def test_assigned_by_indices_that_are_inputs(assign: Callable[..., None], grad: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        scores = (q @ k.mT).clone()
        assign(scores, places)
        return scores.softmax(-1) @ v

    q, k, v = (part.requires_grad_(grad) for part in heads())
    places = torch.tensor([0, 2, 3, 2])
    with torch.set_grad_enabled(grad):
        if assign is not whole_heads:
            assert [row.status for row in rows(function, q, k, v, places)] == ["rewritten"]
        expected, found = function(q, k, v, places), rewritten(function)(q, k, v, places)
    assert relative_error(found, expected) <= 1e-6
    if grad:
        ours, eagers = (torch.autograd.grad(each.sin().sum(), (q, k, v)) for each in (found, expected))
        assert all(relative_error(f, e) <= 1e-5 for f, e in zip(ours, eagers, strict=True))


def test_nan_to_num_that_masks_is_left() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nan_to_num(q @ k.mT, nan=-math.inf).softmax(-1) @ v

    with torch.no_grad():
        (row,) = rows(function, *heads())
    assert row.status == "kept" and "puts infinities or NaN in the place of scores" in row.reason


def test_detached_outputs_are_objects_of_their_own() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.mT
        result = scores.softmax(-1) @ v
        q.mul_(2)
        return scores.detach(), result, result.detach(), q.detach()

    q, k, v = heads()
    q.requires_grad_()
    with torch.no_grad():
        scores, result, other, query = rewritten(function)(q, k, v)
    assert result is not other and query is not q and not query.requires_grad and not scores.requires_grad


@pytest.mark.parametrize("filled", [0.0, -5.0])
def test_a_later_fill_may_open_what_was_masked(filled: float) -> None:
    """A key that an ordinary number is filled in for has a weight, which the mask before it still sets to zero."""

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        exponentials = ((q @ k.mT * 0.3 + bias).masked_fill(mask, -math.inf).masked_fill(other, filled)).exp()
        return (exponentials / (1 + exponentials.sum(-1, keepdim=True))).masked_fill(mask, 0.0) @ v

    generator = torch.Generator().manual_seed(1)
    mask, other = (torch.rand(6, 9, generator=generator) < 0.5 for _ in range(2))
    inputs = (*heads(), torch.randn(4, 6, 9, generator=generator), mask, other)
    assert bool((mask & other).any())
    with torch.no_grad():
        assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5


# Tensors that scale what was filled in.

_SIGNS = [
    torch.tensor([-1.0, 0.5, 0.0, 2.0]).view(4, 1, 1),
    torch.tensor([1.0, -1.0, 0.0, 0.3, 2.0, -0.1]).view(6, 1),
    torch.tensor([1.0, -1.0, 0.0, 0.3, 2.0, -0.1, 1.0, 3.0, 1.0]),
    torch.linspace(-1, 1, 54).view(6, 9),
]


@pytest.mark.parametrize("factor", _SIGNS, ids=["heads", "queries", "keys", "both"])
@pytest.mark.parametrize("filled", [-1e9, -math.inf])
@pytest.mark.parametrize("after", ["nothing", "zeroed", "NaN replaced"])
@pytest.mark.parametrize("dead", [False, True])
def test_a_fill_that_a_tensor_of_any_sign_scales(factor: Tensor, filled: float, after: str, dead: bool) -> None:
    """Times a negative number it masks no longer: the key has all of the weight."""

    def function(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, given: Tensor) -> Tensor:
        mask = given if dead else torch.ones(6, 9, dtype=torch.bool).triu(1)
        weights = ((q @ k.mT).masked_fill(mask, filled) * factor).softmax(-1)
        if after == "zeroed":
            weights = weights.masked_fill(mask, 0.0)
        return (weights.nan_to_num() if after == "NaN replaced" else weights) @ v

    given = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    given[1] = True
    inputs = (*heads(), factor, given)
    with torch.no_grad():
        (row,) = rows(function, *inputs)
        expected, result = function(*inputs), rewritten(function)(*inputs)
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5
    if filled == -1e9 and after != "zeroed":
        assert row.status == "rewritten", row.reason


# Masks before and after a subtracted maximum, and before a cast.


def _dead() -> tuple[Tensor, Tensor]:
    """Two masks: rows that the first, the second, both, or only both together mask as a whole."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.rand(2, 1, 6, 9, generator=generator) < 0.4 for _ in range(2))
    first[:, :, 1] = second[:, :, 2] = True
    first[:, :, 3] = second[:, :, 3] = True
    first[:, :, 4], second[:, :, 4] = torch.arange(9) < 4, torch.arange(9) >= 4
    return first, second


def _filled(scores: Tensor, mask: Tensor, low: float) -> Tensor:
    return scores.masked_fill(mask, low)


def _added(scores: Tensor, mask: Tensor, low: float) -> Tensor:
    return scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ways", [(_filled, _filled), (_filled, _added), (_added, _filled), (_added, _added)])
@pytest.mark.parametrize("infinite", [(False, False), (True, False), (False, True)])
def test_masks_on_both_sides_of_a_maximum(
    dtype: torch.dtype, ways: tuple[Callable[..., Tensor], ...], infinite: tuple[bool, bool]
) -> None:
    lows = [-math.inf if each else torch.finfo(dtype).min for each in infinite]

    def function(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Tensor:
        scores = ways[0](q @ k.mT * 0.3, first, lows[0])
        scores = (scores - scores.amax(-1, keepdim=True)) * 0.5
        return ways[1](scores, second, lows[1]).softmax(-1) @ v

    call = (*heads(), *_dead())
    with torch.no_grad():
        inputs = prepared(call, dtype, gradients=False)
        (row,) = rows(function, *inputs)
        own, new = run(function, inputs, gradients=False), run(rewritten(function), inputs, gradients=False)
        exact = truth(function, call, dtype, gradients=False, device="cpu")
    assert row.status == "rewritten" or "two masks may add up to minus infinity" in row.reason, row.reason
    assert not wrong(dtype, new, own, exact)


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (torch.float16, -65504.0),
        *((dtype, number) for dtype in (torch.float64, torch.bfloat16) for number in (-1e9, -1e12, -1e17, -1e18)),
    ],
    ids=str,
)
@pytest.mark.parametrize("ways", [(_filled, _filled), (_added, _filled), (_filled, _added), (_added, _added)])
def test_numbers_that_scores_show_beside_around_a_maximum(
    dtype: torch.dtype, number: float, ways: tuple[Callable[..., Tensor], ...]
) -> None:
    """A row is masked as a whole by the first, by the second, or by both together."""
    first = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    second = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()

    def function(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Tensor:
        scores = ways[0](q @ k.mT * 0.3, first, number)
        return ways[1](scores - scores.amax(-1, keepdim=True), second, number).softmax(-1) @ v

    call = (*heads(6, 4), first, second)
    with torch.no_grad():
        inputs = prepared(call, dtype, gradients=False)
        own, new = run(function, inputs, gradients=False), run(rewritten(function), inputs, gradients=False)
        exact = truth(function, call, dtype, gradients=False, device="cpu")
    assert not wrong(dtype, new, own, exact)


def test_a_maximum_between_a_mask_that_keeps_all_and_another() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        far = (torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])).abs() > 20
        scores = q @ k.mT * 0.3 + torch.where(far, -1e4, 0.0)
        return (scores - scores.amax(-1, keepdim=True) + numbers).softmax(-1) @ v

    numbers = torch.zeros(2, 1, 6, 9).masked_fill(_dead()[0], -math.inf)
    with torch.no_grad():
        (row,) = rows(function, *heads(), numbers)
        expected, result = function(*heads(), numbers), rewritten(function)(*heads(), numbers)
    assert row.status == "rewritten", row.reason
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5


@pytest.mark.parametrize("low", [-math.inf, -1e9, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("given", [False, True])
def test_masked_scores_that_are_rounded(low: float, given: bool) -> None:
    """What float64 holds beside a score, float32 does not, or calls infinite."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3 + (numbers if given else mask.to(q.dtype) * low if math.isfinite(low) else numbers)
        return scores.float().softmax(-1).to(q.dtype) @ v

    mask, _ = _dead()
    numbers = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, low)
    inputs = (*(part.double() for part in heads()), mask, numbers)
    with torch.no_grad():
        (row,) = rows(function, *inputs)
        assert row.status == "rewritten", row.reason
        expected, result = function(*inputs), rewritten(function)(*inputs)
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("low", [-math.inf, -65504.0, -1e4])
@pytest.mark.parametrize("then", ["softmax", "float32", "zeroed", "filled", "added", "scaled"])
@pytest.mark.parametrize("given", [False, True])
def test_a_bound_beside_which_scores_show(dtype: torch.dtype, low: float, then: str, given: bool) -> None:
    """XGLM in float16: a row whose keys are all masked is a softmax of what is left of the scores above the bound."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, other: Tensor, numbers: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        scores = scores + numbers if given else _added(scores, mask, low)
        scores = torch.max(scores, torch.tensor(-65504.0, dtype=scores.dtype))
        if then == "filled":
            scores = scores.masked_fill(other, -math.inf)
        elif then == "added":
            scores = _added(scores, other, -1e4)
        elif then == "scaled":
            scores = scores * 0.5
        weights = scores.softmax(-1, dtype=torch.float32 if then == "float32" else None).to(v.dtype)
        return (weights.masked_fill(mask, 0.0) if then == "zeroed" else weights) @ v

    mask, other = _dead()
    call = (*heads(), mask, other, torch.zeros(mask.shape).masked_fill(mask, low))
    with torch.no_grad():
        inputs = prepared(call, dtype, gradients=False)
        (row,) = rows(function, *inputs)
        own, new = run(function, inputs, gradients=False), run(rewritten(function), inputs, gradients=False)
        exact = truth(function, call, dtype, gradients=False, device="cpu")
    assert not wrong(dtype, new, own, exact)
    if then in ("softmax", "float32") and dtype is torch.float16:
        assert row.status == "rewritten", row.reason


@pytest.mark.parametrize("way", ["filled", "added"])
@pytest.mark.parametrize("factor", ["zeros and ones", "number"])
@pytest.mark.parametrize("then", ["softmax", "NaN replaced", "plus one"])
def test_two_masks_whose_sum_is_multiplied_by_zero(way: str, factor: str, then: str) -> None:
    """Two of the lowest numbers are minus infinity together, and 0 * -inf is NaN, also in a row with keys."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, other: Tensor, gate: Tensor) -> Tensor:
        scores, low = q @ k.mT * 0.3, torch.finfo(q.dtype).min
        scores = _filled(scores, mask, low) if way == "filled" else _added(scores, mask, low)
        scores = _added(scores, other, low)
        gate = (gate != 0).to(scores.dtype)
        scores = scores * gate + (1 - gate) * -1e9 if factor == "zeros and ones" else scores * gate[0, 0, :, :1]
        if then == "plus one":
            top = scores.amax(-1, keepdim=True).clamp(min=0)
            exponentials = (scores - top).exp()
            return exponentials / (torch.exp(-top) + exponentials.sum(-1, keepdim=True)) @ v
        weights = scores.softmax(-1)
        return (weights.nan_to_num() if then == "NaN replaced" else weights) @ v

    gate = (torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(5)) < 0.7).float()
    inputs = (*heads(), *_dead(), gate)
    with torch.no_grad():
        expected, result = function(*inputs), rewritten(function)(*inputs)
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5


_LOWS = [-math.inf, torch.finfo(torch.float64).min, -1e300, -1e30, -1e9, -1e4]


@pytest.mark.parametrize("low", _LOWS)
@pytest.mark.parametrize("way", ["filled", "added", "given"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_masked_scores_that_are_rounded_behind_a_maximum(low: float, way: str, scale: float) -> None:
    """No score is above zero there, so that float32 has all that count."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        if way == "given":
            scores = scores + numbers
        else:
            scores = _filled(scores, mask, low) if way == "filled" else _added(scores, mask, low)
        scores = scores - scores.amax(-1, keepdim=True)
        return torch.softmax(scores * scale, -1, dtype=torch.float32).to(q.dtype) @ v

    mask, _ = _dead()
    numbers = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, low)
    inputs = (*(part.double() for part in heads()), mask, numbers)
    with torch.no_grad():
        (row,) = rows(function, *inputs)
        # Beside -1e4 there may be scores that are as low.
        assert row.status == "rewritten" or (way, low) == ("filled", -1e4), row.reason
        expected, result = function(*inputs), rewritten(function)(*inputs)
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5


@pytest.mark.parametrize("later", ["nothing", "filled", "added", "filled with a large number"])
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("way", ["sum", "sum and a little", "logsumexp", "replaced"])
@pytest.mark.parametrize("grad", [False, True])
def test_exponentials_behind_a_maximum(later: str, low: float, way: str, grad: bool) -> None:
    """A row without a key is NaN or the mean there, whatever becomes of it without a maximum."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        scores = _filled(q @ k.mT * 0.3, mask, low)
        scores = (scores - scores.amax(-1, keepdim=True)) / 2
        if later == "added":
            scores = _added(scores, other, -math.inf)
        elif later != "nothing":
            scores = _filled(scores, other, -math.inf if later == "filled" else -1e9)
        if way == "logsumexp":
            return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v
        exponentials = scores.exp()
        total = exponentials.sum(-1, keepdim=True)
        weights = exponentials / (total + 1e-9 if way == "sum and a little" else total)
        return (weights.nan_to_num() if way == "replaced" else weights) @ v

    call = (*heads(), *_dead())
    with torch.set_grad_enabled(grad):
        inputs = prepared(call, torch.float32, gradients=grad)
        (row,) = rows(function, *inputs)
        own, new = run(function, inputs, gradients=grad), run(rewritten(function), inputs, gradients=grad)
        exact = truth(function, call, torch.float32, gradients=grad, device="cpu")
    assert not wrong(torch.float32, new, own, exact)
    if later == "nothing" and low != -1e4 and way != "sum and a little":
        assert row.status == "rewritten", row.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-math.inf, -1e9, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("factor", [None, 0.5, 2.5])
@pytest.mark.parametrize("steps", ["two masks", "one mask", "numbers between", "grouped"])
def test_training_with_masks_on_both_sides_of_a_maximum(
    dtype: torch.dtype, low: float, factor: float | None, steps: str
) -> None:
    """The scores of a row that was raised are lost, and have their gradients all the same."""

    def function(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor, learned: Tensor) -> Tensor:
        if steps == "grouped":
            k, v = (part[:, :2].repeat_interleave(2, 1) for part in (k, v))
        scores = q @ k.mT * 0.3 + first
        scores = scores + learned if steps == "numbers between" else scores
        scores = scores - scores.amax(-1, keepdim=True)
        scores = scores if factor is None else scores * factor
        return (scores if steps == "one mask" else scores + second).softmax(-1) @ v

    first, second = (torch.zeros(mask.shape).masked_fill(mask, low) for mask in _dead())
    learned = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(4))
    call = (*heads(), first, second, learned)
    (row,) = rows(function, *prepared(call, dtype, gradients=True))
    assert row.status == "rewritten", row.reason
    own, new = (run(f, prepared(call, dtype, gradients=True), gradients=True) for f in (function, rewritten(function)))
    exact = truth(function, call, dtype, gradients=True, device="cpu")
    assert not wrong(dtype, new, own, exact)


@pytest.mark.parametrize("low", [-math.inf, -1e4, -1e9, -1e30, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_training_with_masked_scores_that_are_rounded(low: float, given: bool, before: bool) -> None:
    """
    Args:
        before: the maximum is subtracted before they are rounded.
    """

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, numbers: Tensor, learned: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3 + (numbers if given else torch.zeros_like(numbers).masked_fill(mask, low)) + learned
        scores = scores - scores.amax(-1, keepdim=True) if before else scores
        return scores.float().softmax(-1).to(q.dtype) @ v

    mask, _ = _dead()
    learned = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(4)).double()
    numbers = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, low)
    call = (*(part.double() for part in heads()), mask, numbers, learned)
    (row,) = rows(function, *prepared(call, torch.float64, gradients=True))
    assert row.status == "rewritten", row.reason
    inputs = [prepared(call, torch.float64, gradients=True) for _ in range(2)]
    own, new = (run(f, each, gradients=True) for f, each in zip((function, rewritten(function)), inputs, strict=True))
    # Beside -1e4, float32 has three digits of a score behind the point.
    limit = 1e-3 if low == -1e4 and not before else 1e-5
    for what in own:
        for expected, result in zip(own[what], new[what], strict=True):
            assert torch.equal(result.isnan(), expected.isnan()), what
            assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= limit, what


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", [False, True])
def test_a_scale_of_zero_under_a_causal_mask(grad: bool, call: bool) -> None:
    """PyTorch's CPU kernel masks before it scales, and 0 * -inf is NaN."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        if call:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.0)
        return (q @ k.mT * 0.0).masked_fill(~keep, -math.inf).softmax(-1) @ v

    inputs = [part.requires_grad_(grad) for part in heads(9, 9)]
    assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5


@pytest.mark.parametrize("way", ["added", "added beside a bias", "multiplied"])
@pytest.mark.parametrize("low", [-1e4, -1e9])
def test_exponentials_that_an_added_mask_makes_zero(way: str, low: float) -> None:
    """0 / 0 is NaN, and NaN is replaced."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        masked = mask.to(q.dtype)
        scores = (q @ k.mT * 0.3) * (1 - masked) if way == "multiplied" else q @ k.mT * 0.3
        scores = scores + masked * low
        exponentials = (scores + bias if way == "added beside a bias" else scores).exp()
        return torch.nan_to_num(exponentials / exponentials.sum(-1, keepdim=True)) @ v

    mask, _ = _dead()
    inputs = (*heads(), mask, torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(4)))
    with torch.no_grad():
        expected, result = function(*inputs), rewritten(function)(*inputs)
    assert bool((expected[:, :, 1] == 0).all())
    assert relative_error(result, expected) <= 1e-5


def test_scores_times_a_tensor_behind_a_bias() -> None:
    """A learned bias is a part of the scores; one that is an input may mask them, and then may overflow."""

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return ((q @ k.mT * 0.3 + bias) * mask - 1e4 * (1.0 - mask)).softmax(-1) @ v

    mask = torch.ones(6, 9).tril(3)
    mask[2] = 0.0
    given = torch.randn(4, 6, 9)
    with torch.no_grad():
        inputs = (*heads(), torch.nn.Parameter(given), mask)
        (row,) = rows(function, *inputs)
        assert row.status == "rewritten", row.reason
        torch._dynamo.reset()
        assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5
        torch._dynamo.reset()
        (row,) = rows(function, *heads(), given, mask)
        assert row.status == "kept" and "a tensor scales masked scores" in row.reason


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("scale", [0.25, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fill_and_a_given_mask_whose_sum_is_scaled(low: float, scale: float, dtype: torch.dtype) -> None:
    """The sum is minus infinity before it is scaled, or it is not: a row that both mask is NaN, or the mean."""
    filled = torch.finfo(dtype).min

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).masked_fill(mask, filled) + numbers
        return (scores * scale).softmax(-1) @ v

    first, second = _dead()
    inputs = prepared((*heads(), first, torch.zeros(second.shape).masked_fill(second, low)), dtype, gradients=False)
    with torch.no_grad():
        (row,) = rows(function, *inputs)
        expected, result = function(*inputs), rewritten(function)(*inputs)
    assert row.status == "rewritten" or scale > 1, row.reason
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5


@pytest.mark.parametrize("way", ["filled", "added"])
@pytest.mark.parametrize("after", ["nothing", "zeroed"])
def test_masked_scores_times_zeros_and_ones(way: str, after: str) -> None:
    """What a zero multiplies is masked no longer, and has a weight that is zeroed afterwards."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, gate: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        scores = scores.masked_fill(mask, -1e9) if way == "filled" else scores + mask.to(scores.dtype) * -1e9
        weights = (scores * (gate > 0).to(scores.dtype)).softmax(-1)
        return (weights.masked_fill(mask, 0.0) if after == "zeroed" else weights) @ v

    mask, _ = _dead()
    inputs = (*heads(), mask, torch.randn(2, 1, 6, 9, generator=torch.Generator().manual_seed(5)))
    with torch.no_grad():
        assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5


@pytest.mark.parametrize("low", [-1e300, -1e39, torch.finfo(torch.float64).min, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("later", [-math.inf, -1e30])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_fills_that_are_cast(low: float, later: float, factor: float) -> None:
    """A number that float64 alone holds is minus infinity in float32."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).double().masked_fill(mask, low).float()
        return (scores.masked_fill(other, later) * factor).softmax(-1) @ v

    inputs = (*heads(), *_dead())
    with torch.no_grad():
        expected, result = function(*inputs), rewritten(function)(*inputs)
    assert torch.equal(result.isnan(), expected.isnan())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("infinite", [lambda s: s.isneginf(), lambda s: s == -math.inf])
@pytest.mark.parametrize("later", ["bias", "fill", "lower fill"])
def test_a_condition_on_scores_whose_maximum_was_subtracted(
    grad: bool, infinite: Callable[[Tensor], Tensor], later: str
) -> None:
    """Behind it a row of minus infinity is NaN, and the condition does not hold."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).masked_fill(mask, -math.inf)
        scores = scores - scores.amax(-1, keepdim=True).detach()
        last = torch.arange(9) == 8
        low = torch.finfo(q.dtype).min if later == "fill" else -math.inf
        scores = scores + bias if later == "bias" else scores.masked_fill(last, low)
        return torch.where(infinite(scores).all(-1, keepdim=True), 0.0, scores.softmax(-1)) @ v

    mask, _ = _dead()
    q, k, v = (part.requires_grad_(grad) for part in heads())
    with torch.set_grad_enabled(grad):
        expected, result = (each(q, k, v, mask, torch.ones(6, 9)) for each in (function, rewritten(function)))
    assert torch.equal(result.isnan(), expected.isnan()) and bool(expected.isnan().any())
    assert relative_error(result.nan_to_num(), expected.nan_to_num()) <= 1e-5


def test_weights_that_another_attention_takes_for_its_value() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT * 0.3).softmax(-1)
        return weights @ v, (k @ q.mT * 0.3).softmax(-1) @ weights

    inputs = heads()
    found = [row.status for row in rows(function, *inputs)]
    assert found == ["kept", "rewritten"]
    for result, expected in zip(rewritten(function)(*inputs), function(*inputs), strict=True):
        assert relative_error(result, expected) <= 1e-5


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("second", "statuses"),
    [
        (lambda q, k, v, s: (q.sin() @ k.mT + s).softmax(-1) @ v, ["rewritten", "rewritten"]),
        (lambda q, k, v, s: (q.sin() @ k.mT * s).softmax(-1) @ v, ["kept", "rewritten"]),
        (lambda q, k, v, s: (k @ q.mT).softmax(-1) @ s, ["kept", "rewritten"]),
    ],
    ids=["bias", "factor", "value"],
)
def test_scores_that_another_attention_takes(second: Callable[..., Tensor], statuses: list[str], grad: bool) -> None:
    """RealFormer adds them to its own; any other use needs them, and a rewrite of what they are for gains little."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * 0.3
        return scores.softmax(-1) @ v, second(q, k, v, scores)

    call = heads()
    with torch.set_grad_enabled(grad):
        inputs = prepared(call, torch.float32, gradients=grad)
        found = [row.status for row in rows(function, *inputs)]
        own, new = run(function, inputs, gradients=grad), run(rewritten(function), inputs, gradients=grad)
        exact = truth(function, call, torch.float32, gradients=grad, device="cpu")
    assert not wrong(torch.float32, new, own, exact)
    assert found == statuses or grad


def _by_hand(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


_LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "flex"])
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        (torch.float32, lambda s, a, b, gate: (_added(s, a, -math.inf) * 0.0).softmax(-1).nan_to_num()),
        (torch.bfloat16, lambda s, a, b, gate: torch.max(_added(s, a, -math.inf), s.new_tensor(_LOWEST)).softmax(-1)),
        (torch.float16, lambda s, a, b, gate: torch.max(_added(s, a, -math.inf), s.new_tensor(-1e9)).softmax(-1)),
        (torch.float32, lambda s, a, b, gate: _by_hand(s.masked_fill(a, -1e4) * gate)),
        (
            torch.float16,
            lambda s, a, b, gate: _by_hand(torch.max(_added(s, a, -1e4), s.new_tensor(-65504.0)) * gate.to(s.dtype)),
        ),
        (torch.float32, lambda s, a, b, gate: _added(s.masked_fill(a, _LOWEST), b, -1e33).softmax(-1)),
        (torch.float32, lambda s, a, b, gate: _added(_added(s, a, _LOWEST), b, -1e36).softmax(-1)),
        (torch.float32, lambda s, a, b, gate: (_added(_added(s, a, _LOWEST), b, -1e36) * gate).softmax(-1)),
        (torch.float32, lambda s, a, b, gate: (_added(_added(s, a, _LOWEST), b, -1e36) * 0.5).softmax(-1)),
        (torch.float32, lambda s, a, b, gate: _added(_added(s, a, -3e38), b, -3e37).softmax(-1)),
    ],
    ids=[
        "minus infinity times zero",
        "a bound beyond bfloat16",
        "a bound beyond float16",
        "fill times zeros",
        "bound times zeros",
        "fill and less",
        "mask and less",
        "sum times zeros",
        "sum times a half",
        "both below the lowest",
    ],
)
def test_what_numbers_near_the_lowest_become(
    weights: Callable[..., Tensor], dtype: torch.dtype, kernels: str, grad: bool
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor, gate: Tensor) -> Tensor:
        return weights(q @ k.mT * 0.3, first, second, gate) @ v

    gate = (torch.arange(9) % 3 > 0).float()
    call = (*heads(), *_dead(), gate)
    with torch.set_grad_enabled(grad):
        inputs = prepared(call, dtype, gradients=grad)
        own, new = run(function, inputs, gradients=grad), run(rewritten(function, kernels=kernels), inputs, grad)
    (o,), (n,) = own["value"], new["value"]
    assert torch.equal(n.isnan(), o.isnan())
    assert relative_error(n.nan_to_num(), o.nan_to_num()) <= (1e-5 if dtype is torch.float32 else 2e-2)
