"""Another order of summation, as the fuzzers ask for it."""

from __future__ import annotations

import torch

from tests.support.reordered import TF32, Reordered, Rounded

SCORES = torch.linspace(-1, 1, 64)


def test_scores_beside_a_mask_that_takes_some_of_their_digits_change() -> None:
    with Reordered(0):
        reordered = (SCORES - 1e6 * torch.ones(64)).softmax(-1)
    own = (SCORES - 1e6 * torch.ones(64)).softmax(-1)
    assert not torch.equal(reordered, own)
    torch.testing.assert_close(reordered, own, rtol=0.2, atol=0)


def test_scores_beside_a_mask_that_takes_all_of_their_digits_stay() -> None:
    with Reordered(0):
        reordered = (SCORES - 1e9 * torch.ones(64)).softmax(-1)
    assert torch.equal(reordered, torch.full((64,), 1 / 64))


def test_sums_of_numbers_of_one_size_stay_but_for_a_rounding() -> None:
    with Reordered(0):
        added, updated = SCORES + SCORES.flip(0), SCORES.clone().sub_(SCORES.flip(0) / 2)
    torch.testing.assert_close(added, SCORES + SCORES.flip(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(updated, SCORES - SCORES.flip(0) / 2, rtol=1e-6, atol=1e-6)


def test_two_results_of_one_formula_differ_by_roundings() -> None:
    """Without it their difference is exactly zero, which no other kernel gives."""
    assert not (SCORES.softmax(-1) - SCORES.softmax(-1)).any()
    with Rounded(0):
        difference = SCORES.softmax(-1) - SCORES.softmax(-1)
    assert 0 < difference.abs().max() <= 10 * torch.finfo(torch.float32).eps * SCORES.softmax(-1).max()


def test_masks_are_not_rounded_otherwise() -> None:
    lowest = torch.finfo(torch.float32).min
    with Rounded(0):
        rounded = (SCORES * 0 + torch.ones(64) * lowest).softmax(-1)
    torch.testing.assert_close(rounded, torch.full((64,), 1 / 64), rtol=1e-5, atol=0)


def test_products_are_rounded_as_those_of_tf32_and_whole_numbers_stay() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 8)
    whole = torch.arange(8.0).outer(torch.ones(8))
    with Rounded(0, products=TF32):
        error = (a @ b - a @ b).abs().max()
        product = whole @ whole.T
    assert 1e-4 < error < 2e-2
    torch.testing.assert_close(product, whole @ whole.T)
