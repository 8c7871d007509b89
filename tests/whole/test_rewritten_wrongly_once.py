"""Attentions that a version rewrote into other numbers, or broke on: whatever becomes of them, eager's numbers stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.numerics.judge import HALF, disagreement
from tests.support.helpers import gradients, outputs, relative_error, rewritten, rows

BATCH, HEADS, LENGTH, KEYS, WIDTH = 2, 4, 5, 6, 8
LOWEST = torch.finfo(torch.float32).min
_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


Q, K, V = (_normal(BATCH, HEADS, length, WIDTH) for length in (LENGTH, KEYS, KEYS))
KEPT_KEYS = torch.tensor([True, True, False, True, False, True]).expand(BATCH, 1, 1, KEYS).contiguous()
KEPT = torch.rand(BATCH, 1, LENGTH, KEYS, generator=_generator) > 0.4
MASKED = torch.zeros(BATCH, 1, LENGTH, KEYS, dtype=torch.bool)
MASKED[0, :, 1] = True  # A row without a key.
MASKED[1, :, :, :2] = True
OTHER = torch.rand(BATCH, 1, LENGTH, KEYS, generator=_generator) > 0.5

_Case = tuple[Callable[..., Any], tuple[Tensor, ...]]
_CASES: dict[str, _Case] = {}


def _case(*inputs: Tensor) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _CASES[function.__name__] = (function, inputs)
        return function

    return register


# A number that is added before zeros and ones are multiplied does not reach the scores that become zero.


@_case(Q, K, V, KEPT_KEYS)
def shifted_and_multiplied_by_a_key_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return ((q @ k.mT + 5.0) * kept).softmax(-1) @ v


@_case(Q, K, V, KEPT_KEYS)
def maximum_subtracted_and_multiplied_by_a_key_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    s = q @ k.mT
    return ((s - s.amax(-1, keepdim=True)) * kept).softmax(-1) @ v


@_case(Q, K, V, KEPT)
def shifted_multiplied_by_a_mask_and_scaled(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return ((q @ k.mT + 5.0) * kept / 8).softmax(-1) @ v


@_case(Q, K, V, KEPT_KEYS, KEPT_KEYS.flip(-1))
def shifted_multiplied_and_filled_by_two_masks(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ((q @ k.mT + 5.0) * a + (1 - b.float()) * -1e9).softmax(-1) @ v


# Subtracting the maximum brings a row whose keys are all masked back to zero.


def _after_maximum(name: str, mask: Callable[..., Tensor], after: Callable[..., Tensor], by_hand: bool = False) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, other: Tensor) -> Tensor:
        s = mask(q @ k.mT / 3, masked)
        s = after(s - s.amax(-1, keepdim=True), other)
        if by_hand:
            s = s.exp()
            return s / s.sum(-1, keepdim=True) @ v
        return s.softmax(-1).to(v.dtype) @ v

    attend.__name__ = name
    _case(Q, K, V, MASKED, OTHER)(attend)


def _fill(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, mask: scores.masked_fill(mask, value)


_after_maximum("maximum_between_two_fills", _fill(LOWEST), _fill(LOWEST))
_after_maximum("maximum_between_fills_of_minus_1e9", _fill(-1e9), _fill(-1e9))
_after_maximum("maximum_after_minus_infinity", _fill(-math.inf), _fill(LOWEST))
_after_maximum("maximum_before_a_floor", _fill(-math.inf), lambda s, m: s.clamp(min=LOWEST))
_after_maximum("maximum_between_bias_and_fill", lambda s, m: s + m * LOWEST, _fill(LOWEST))
_after_maximum("maximum_before_a_factor", _fill(LOWEST), lambda s, m: s / 0.5)
_after_maximum("maximum_before_a_narrower_dtype", _fill(LOWEST), lambda s, m: s.bfloat16())
_after_maximum("maximum_before_a_factor_below_one", _fill(LOWEST), lambda s, m: s * 0.5)
_after_maximum("maximum_of_minus_infinity_before_a_bias", _fill(-math.inf), lambda s, m: (s + m * -3.0) * 2)
_after_maximum("maximum_and_temperature_by_hand", _fill(-1e9), lambda s, m: s / 2, by_hand=True)


@_case(Q, K, V, MASKED)
def precision_bottleneck_relaxation(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    """CogView, LayoutLMv3."""
    s = (q @ k.mT + torch.zeros(masked.shape).masked_fill(masked, LOWEST)) / 32
    return ((s - s.amax(-1, keepdim=True)) * 32).softmax(-1) @ v


# Which keys a row attends that several masks cover together depends on their numbers.


@_case(Q, K, V, MASKED[:, :, :1], torch.full((LENGTH, KEYS), LOWEST).triu(1))
def fill_beside_a_bias_of_the_lowest_number(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(masked, LOWEST) + bias).softmax(-1) @ v


@_case(Q, K, V, MASKED, ~MASKED)
def fills_of_two_lowest_numbers(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(a, torch.finfo(torch.bfloat16).min)
    return s.masked_fill(b, LOWEST).softmax(-1) @ v


class LeftPadding(nn.Module):
    """GPT-2's spelling, for years: ``where(causal, scores, min) + (1 - mask) * min``."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.tril(torch.ones(16, 16, dtype=torch.bool))[None, None])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        s = q @ k.mT / 8**0.5
        length = s.shape[-1]
        s = torch.where(self.causal[:, :, :length, :length], s, torch.full([], LOWEST, dtype=s.dtype))
        s = s + (1.0 - attention_mask[:, None, None, :].to(s.dtype)) * LOWEST
        result: Tensor = s.softmax(-1) @ v
        return result


_PADDED = torch.ones(BATCH, KEYS, dtype=torch.long)
_PADDED[1, :2] = 0
_CASES["left_padding"] = (LeftPadding(), (_normal(BATCH, HEADS, KEYS, WIDTH), K, V, _PADDED))


@_case(Q.double(), K.double(), V.double(), MASKED, OTHER)
def fills_of_float64(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(a, torch.finfo(torch.float64).min)
    return s.masked_fill(b, -math.inf).softmax(-1) @ v


# What looks like a learned bias, and masks.


@_case(Q, K, V, ~MASKED, OTHER)
def logarithm_of_a_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
    scores = (q @ k.mT + kept.log()).masked_fill(masked, -math.inf)
    return scores.softmax(-1).masked_fill(masked, 0) @ v


@_case(Q, K, V, MASKED, _normal(1, WIDTH))
def sink_of_minus_infinity(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, weight: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(masked, -math.inf)
    return torch.cat([scores, (F.linear(q, weight) * 0).log()], -1).softmax(-1)[..., :-1] @ v


@_case(Q, K, V, MASKED)
def mask_divided_by_a_small_number(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return (q @ k.mT - masked.float() / 1e-9).softmax(-1) @ v


@_case(Q, K, V, ~MASKED)
def logarithm_of_a_mask_with_a_floor(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return (q @ k.mT + kept.log().clamp(min=LOWEST)).softmax(-1) @ v


@_case(Q, K, V, MASKED.long() * -(10**9))
def integers_that_are_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


# A batch or a head that no operand has.


@_case(Q[:, :1], K[:, :1], V[:, :1])
def every_operand_expanded_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.expand(BATCH, HEADS, -1, -1) for t in (q, k, v))
    return ((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).reshape(BATCH, LENGTH, HEADS * WIDTH)


@_case(Q[:1], K[:1], V[:1])
def every_operand_repeated_over_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.repeat(BATCH, 1, 1, 1) for t in (q, k, v))
    return (q @ k.mT / 3).softmax(-1) @ v


@_case(Q[:, :1], K[:, :1], V[:, :1])
def call_on_expanded_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.expand(BATCH, HEADS, -1, -1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


@_case(Q[:1, :1], K[:1, :1], V[:1, :1], MASKED)
def mask_with_a_batch_of_its_own(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    q, k, v = (t.expand(BATCH, HEADS, -1, -1) for t in (q, k, v))
    return (q @ k.mT).masked_fill(masked, -math.inf).softmax(-1) @ v


@_case(Q, K[:, :, :1], V)
def one_key_at_every_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.expand(-1, -1, KEYS, -1).mT).softmax(-1) @ v


# Weights that go into several products, or grow.


@_case(Q, K, V)
def two_late_divisions(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = q @ k.mT / 3
    e = (s - s.amax(-1, keepdim=True)).exp()
    total = e.sum(-1, keepdim=True)
    return (e @ v) / total, (e @ (v * 2)) / total


@_case(Q, K, V)
def two_late_divisions_one_with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    e = (q @ k.mT / 3).exp()
    total = e.sum(-1, keepdim=True)
    return (e @ v) / total, (e @ (v * 2)) / (total + 1)


@_case(Q, K, V, _normal(BATCH, HEADS, 2, 3, 5))
def second_value_divides_the_keys(q: Tensor, k: Tensor, v: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT / 3).softmax(-1)
    return weights @ v, weights @ grid.flatten(2, 3)


@_case(Q[:, :1], K[:, :1], V, _normal(1, HEADS, 1, 1))
def weights_of_one_head_grow_to_several(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * gate) @ v


# What a row without a key is worth, in value and in gradient, by steps that stand around the mask.

MASKED_ROWS = MASKED.all(-1, keepdim=True)


def _by_hand(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


@_case(Q / 4, K / 4, V, MASKED)
def exponentials_with_a_floor(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = q @ k.mT + torch.zeros(masked.shape).masked_fill(masked, -math.inf)
    return _by_hand(torch.max(s, torch.tensor(LOWEST))) @ v


@_case(Q / 4, K / 4, V, MASKED)
def exponentials_of_clamped_scores(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return _by_hand((q @ k.mT).masked_fill(masked, -1e9).clamp(min=-1e4)) @ v


@_case(Q, K, V, MASKED)
def clamped_scores_that_overflow(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(masked, -math.inf).clamp(-1e30, 1e30) * 1e10).softmax(-1) @ v


@_case(Q, K, V, MASKED, OTHER)
def floor_between_two_masks(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, other: Tensor) -> Tensor:
    s = (q @ k.mT / 3 + torch.zeros(masked.shape).masked_fill(masked, -math.inf)).clamp(min=LOWEST)
    return s.masked_fill(other, LOWEST).softmax(-1) @ v


@_case(Q.double(), K.double(), V.double(), MASKED, _normal(KEYS).double())
def billion_in_float64_beside_a_bias(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT / 3 + bias).masked_fill(masked, -1e9).softmax(-1) @ v


@_case(Q.double(), K.double(), V.double(), MASKED)
def billion_in_float64_that_is_rounded(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = q @ k.mT / 3 + torch.zeros(masked.shape, dtype=q.dtype).masked_fill(masked, -1e9)
    return torch.softmax(s, -1, dtype=torch.float32).to(q.dtype) @ v


@_case(Q, K, V, MASKED, _normal(HEADS))
def sink_beneath_the_maximum(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, sink: Tensor) -> Tensor:
    s = (q @ k.mT / 3).masked_fill(masked, -math.inf)
    s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True))[..., :-1] @ v


@_case(Q, K, V, MASKED, OTHER)
def number_that_outweighs_a_mask(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, other: Tensor) -> Tensor:
    s = q @ k.mT / 3 + torch.where(masked, -1e9, 0.0) + torch.where(other, 1e38, 0.0)
    return s.softmax(-1).masked_fill(masked, 0.0) @ v


@_case(Q, K, V, MASKED, OTHER)
def two_masks_that_overflow_before_they_are_scaled(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, other: Tensor
) -> Tensor:
    first, second = (torch.zeros(each.shape).masked_fill(each, LOWEST) for each in (masked, other | masked))
    return ((q @ k.mT + first + second) * 0.3).softmax(-1) @ v


@_case(Q, K, V, MASKED, OTHER, _normal(HEADS, 1, 1).abs())
def two_masks_that_overflow_before_a_tensor_scales_them(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, other: Tensor, factor: Tensor
) -> Tensor:
    first, second = (torch.zeros(each.shape).masked_fill(each, LOWEST) for each in (masked, other | masked))
    return ((q @ k.mT + first + second) * 0.1 * factor).softmax(-1) @ v


@_case(Q, K, V, MASKED, _normal(HEADS))
def zeroed_rows_beside_a_sink(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, sink: Tensor) -> Tensor:
    s = q @ k.mT / 3 + torch.zeros(masked.shape).masked_fill(masked, -math.inf)
    s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    return s.softmax(-1)[..., :-1].masked_fill(masked.all(-1, keepdim=True), 0.0) @ v


@_case(Q.double(), K.double(), V.double(), MASKED)
def billion_in_float64_and_logsumexp(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = q @ k.mT / 3 + masked.double() * -1e9
    return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v


@_case(Q, K, V, MASKED, KEPT_KEYS)
def infinite_mask_times_a_mask(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(masked, -math.inf) * kept.float()
    return torch.nan_to_num((s + (1 - kept.float()) * -1e4).softmax(-1)) @ v


@_case(Q, K, V, MASKED)
def added_then_zeroed(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = q @ k.mT + torch.zeros(masked.shape).masked_fill(masked, -math.inf)
    return s.softmax(-1).masked_fill(masked, 0.0) @ v


@_case(Q, K, V, ~MASKED)
def multiplied_exponentials(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    e = (q @ k.mT).exp() * kept
    return torch.nan_to_num(e / e.sum(-1, keepdim=True)) @ v


@_case(Q, K, V, ~MASKED)
def exponentials_of_multiplied_scores(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return torch.nan_to_num(_by_hand((q @ k.mT) * kept - 1e9 * (1 - kept.float()))) @ v


@_case(Q, K, V, MASKED, MASKED)
def sum_of_two_masks_that_is_scaled(q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor) -> Tensor:
    s = q @ k.mT + one.float() * LOWEST + other.float() * LOWEST
    return (s * 0.5).log_softmax(-1).exp() @ v


@_case(Q, K, V, MASKED, OTHER, KEPT)
def sum_of_two_masks_beside_a_fill_that_is_scaled(
    q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor, kept: Tensor
) -> Tensor:
    s = (q @ k.mT).masked_fill(~kept, -math.inf) + one.float() * LOWEST + other.float() * LOWEST
    return (s * 0.25).softmax(-1) @ v


@_case(Q, K, V, MASKED, OTHER)
def two_fills_that_are_scaled(q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(one, LOWEST).masked_fill(other, LOWEST)
    return (s * 0.25).softmax(-1) @ v


@_case(Q, K, V, MASKED, OTHER)
def sum_of_two_masks_that_is_scaled_twice(q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor) -> Tensor:
    s = q @ k.mT + one.float() * LOWEST + other.float() * LOWEST
    return (s * 0.25 * 3.0).softmax(-1) @ v


@_case(Q, K, V, MASKED, OTHER, KEPT_KEYS)
def a_mask_after_a_sum_that_is_scaled(
    q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor, kept: Tensor
) -> Tensor:
    s = (q @ k.mT + one.float() * LOWEST + other.float() * LOWEST) * 0.25
    return (s + (~kept).float() * LOWEST).softmax(-1) @ v


@_case(Q, K, V, ~MASKED)
def added_then_multiplied_by_the_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    w = (q @ k.mT + torch.zeros(kept.shape).masked_fill(~kept, -math.inf)).softmax(-1)
    return (w * kept.to(w.dtype)) @ v


@_case(Q, K, V, MASKED, MASKED_ROWS)
def rows_set_to_zero(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, rows: Tensor) -> Tensor:
    return (q @ k.mT / 3).masked_fill(masked, -math.inf).softmax(-1).masked_fill(rows, 0.0) @ v


@_case(Q, K, V, ~MASKED)
def rows_chosen_to_be_zero(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    w = torch.where(kept, q @ k.mT / 3, -math.inf).softmax(-1)
    return torch.where(kept.any(-1, keepdim=True), w, 0.0) @ v


@_case(Q, K, V, MASKED)
def shifted_sink(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(masked, -math.inf)
    highest = s.amax(-1, keepdim=True)
    e = (s - highest).exp()
    # The loss looks at rows that have keys.
    out = e / (e.sum(-1, keepdim=True) + (-highest).exp()) @ v
    return out.masked_fill(masked.all(-1, keepdim=True), 0.0)


@_case(*(torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)))
def positions_that_floats_round(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(40).float()[:, None], torch.arange(40).float()
    kept = (i * 0.1 + 1.0) - i * 0.1 >= 1.0 + 0 * j
    return (q @ k.mT).masked_fill(~kept, -math.inf).softmax(-1) @ v


@_case(Q[:3], K[:1], V[:1])
def one_entry_by_an_index_from_the_end(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    frames = [-1, 0]
    return (q @ k[frames].mT).softmax(-1) @ v[frames]


# Numbers that are no numbers of their dtype, that wrap, or that only another dtype holds.


@_case(Q, K, V)
def fill_value_with_an_alpha_by_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    value = torch.rsub(torch.full((), 1e30), 3, alpha=2)
    return (q @ k.mT).masked_fill(torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1), value).softmax(-1) @ v


@_case(Q, K, V)
def mask_with_an_alpha_by_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + torch.rsub(torch.ones(LENGTH, KEYS).tril(), 1.0, alpha=2) * -1e9).softmax(-1) @ v


@_case(Q, K, V)
def mask_with_an_alpha_under_another_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.subtract(torch.ones(LENGTH, KEYS).tril(), 1.0, alpha=2) * 1e9
    return (q @ k.mT + mask).softmax(-1) @ v


@_case(Q, K, V)
def rows_far_below_by_their_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT - (torch.arange(LENGTH)[:, None].float() * 120) ** 4).softmax(-1) @ v


@_case(Q, K, V)
def rows_far_below_by_powers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT - 2.0 ** (32 * torch.arange(LENGTH)[:, None])).softmax(-1) @ v


@_case(Q, K, V)
def filled_with_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(torch.arange(KEYS) > 3, math.nan).softmax(-1) @ v


@_case(Q, K, V)
def chosen_to_be_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(torch.arange(KEYS) > 3, math.nan, q @ k.mT).softmax(-1) @ v


def _filled(name: str, value: Callable[[], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(torch.arange(KEYS) > 3, value()).softmax(-1) @ v

    attend.__name__ = name
    _case(Q, K, V)(attend)


_filled("integer_that_wraps_to_zero", lambda: torch.full((), 2**62) * 4)
_filled("narrow_integer_that_wraps_to_zero", lambda: torch.full((), 2**30, dtype=torch.int32) * 4)
_filled("integer_that_wraps_to_a_positive_one", lambda: torch.full((), 2**31 - 1, dtype=torch.int32) * 3)
_filled("integer_beyond_the_digits_of_float64", lambda: (torch.full((), 2**53 + 1) - 2**53) * 1000000)


@_case(Q, K, V, MASKED)
def empty_rows_looked_for_behind_their_maximum(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(masked, -math.inf)
    s = s - s.amax(-1, keepdim=True)
    return s.softmax(-1).masked_fill((s == -math.inf).all(-1, keepdim=True), 0.0) @ v


@_case(Q, K, V, torch.zeros(MASKED.shape).masked_fill(MASKED, -math.inf))
def safe_softmax_of_empty_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights: Tensor = torch.ops.aten._safe_softmax(q @ k.mT + mask, -1)
    return weights @ v


_FAR = _normal(BATCH, HEADS, KEYS) * 1e4
_CANCEL = torch.cat([torch.full((BATCH, HEADS, LENGTH, 1), 1e4), torch.full((BATCH, HEADS, LENGTH, 1), -1e4)], -1)


@_case(torch.cat([_CANCEL, Q[..., 2:]], -1), torch.cat([_FAR[..., None], _FAR[..., None], K[..., 2:]], -1), V)
def product_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.double() @ k.double().mT).float().softmax(-1) @ v


def _maximum_cast_to(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        e = (s - s.amax(-1, keepdim=True).to(dtype).float()).exp()
        return e / (e.sum(-1, keepdim=True) + 1e-8) @ v

    attend.__name__ = f"maximum_cast_to_{str(dtype)[6:]}"
    _case(Q.abs() * 100, K.abs() * 100, V)(attend)


for _dtype in (torch.float16, torch.bfloat16, torch.int8, torch.bool):
    _maximum_cast_to(_dtype)


@_case(Q, K, V, MASKED)
def billion_added_in_float32_before_a_softmax_in_float64(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + masked.float() * -1e9, -1, dtype=torch.float64).float() @ v


@_case(Q, K, V, OTHER)
def numbers_that_cancel(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return (q @ k.mT + torch.where(masked, -3e38, 0.0) + torch.where(masked, 3e38, 0.0)).softmax(-1) @ v


@_case(Q, K, V, MASKED)
def logarithm_of_softmax_in_float16(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(masked, -1e9)
    return F.log_softmax(s, -1, dtype=torch.float16).float().exp() @ v


@_case(Q * 3, K, V)
def exponentials_in_float16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (q @ k.mT).exp().to(torch.float16).float()
    return e / e.sum(-1, keepdim=True) @ v


@_case(Q, K, V)
def factors_that_leave_the_range(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 1e200 * 1e-200).softmax(-1) @ v


@_case(Q, K, V)
def weights_divided_by_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) / 0.0) @ v


@_case(Q, K, V)
def number_with_an_alpha(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.add(q @ k.mT, 5, alpha=1e9).softmax(-1) @ v


@_case(Q, K, V, MASKED)
def lowest_number_cast_up_and_scaled(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(masked, LOWEST).double() * 3).softmax(-1).float() @ v


@_case(Q, K, V, MASKED)
def lowest_number_added_cast_up_and_scaled(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    return ((q @ k.mT + masked.float() * LOWEST).double() * 3).softmax(-1).float() @ v


@_case(Q[:1], K[:, :, :1], V[:, :, :1])
def one_key_with_a_batch_of_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_an_integer_that_is_no_size_is_any_number() -> None:
    for dtype in (torch.float32, torch.int32, torch.int64):

        def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            position = torch.arange(q.shape[-2], dtype=dtype) + start  # noqa: B023
            return (q @ k.mT).masked_fill(position[:, None] < position, -math.inf).softmax(-1) @ v

        torch._dynamo.reset()
        compiled = rewritten(attend, dynamic=True)
        for start in (5, 2**25 + 1, 1_700_000_000, *[2**31 - 3, 2**40] * (dtype is not torch.int32)):
            assert relative_error(compiled(K, K, V, start), attend(K, K, V, start)) <= 1e-5, (dtype, start)


def test_a_float_that_is_no_number() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, a: float, b: float) -> Tensor:
        limit = a * 10.0 - b * 10.0
        position = torch.arange(k.shape[-2])
        return (q @ k.mT).masked_fill(~((position < limit) | (position >= limit)), -math.inf).softmax(-1) @ v

    compiled = rewritten(attend, dynamic=True)
    for numbers in ((6.5, 1.5), (1e308, 1e308)):
        assert relative_error(compiled(Q, K, V, *numbers), attend(Q, K, V, *numbers)) <= 1e-5


@pytest.mark.parametrize("shape", [(1, 2, 0, 8), (0, 2, 3, 8), (1, 0, 3, 8)], ids=str)
def test_what_is_empty(shape: tuple[int, ...]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return (5 * torch.tanh(q @ k.mT / 5)).masked_fill(~kept, -math.inf).softmax(-1) @ v

    keys = torch.ones(*shape[:2], 4, 8)
    inputs = torch.ones(shape), keys, keys, torch.ones(shape[2], 4, dtype=torch.bool)
    assert rewritten(attend)(*inputs).shape == shape


@pytest.mark.parametrize("grown", [lambda s: s * 10, lambda s: s / 0.1, lambda s: s - 7e4], ids=["*", "/", "-"])
def test_half_of_the_lowest_number_beside_scores_in_float32(grown: Callable[[Tensor], Tensor]) -> None:
    """-65504 is no mask where scores may be lower."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = grown((q @ k.mT).float())
        return s.masked_fill(torch.arange(KEYS) >= 4, torch.finfo(torch.float16).min).softmax(-1).half() @ v

    q, k = (Q.abs() * 30 + 30).half(), -(K.abs() * 30 + 30).half()
    assert relative_error(rewritten(attend)(q, k, V.half()), attend(q, k, V.half())) <= 1e-2


def test_half_of_the_lowest_number_beside_scores_that_are_divided() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT / 3).float() / 2
        return s.masked_fill(torch.arange(KEYS) >= 4, torch.finfo(torch.float16).min).softmax(-1).half() @ v

    (row,) = rows(attend, Q.half(), K.half(), V.half())
    assert row.kernel == "native"


@pytest.mark.parametrize("factor", [torch.tensor(2000.0), torch.full((LENGTH, 1), 2000.0).half()], ids=["0-d", "rows"])
def test_a_factor_beyond_the_range_of_the_query(factor: Tensor) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        return (q @ k.mT * factor).softmax(-1) @ v

    inputs = (Q * 50).half(), (K * 1e-3).half(), V.half(), factor
    (row,) = rows(attend, *inputs)
    assert row.status == "rewritten"
    assert not rewritten(attend)(*inputs).isnan().any()


def test_a_mask_that_masks_nothing_keeps_its_gradient() -> None:
    """An optimizer lets a parameter decay whose gradient is zero, and leaves one alone that has none."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias.tril(-100)).softmax(-1) @ v

    bias = torch.nn.Parameter(_normal(LENGTH, KEYS))
    (gradient,) = torch.autograd.grad(rewritten(attend)(Q, K, V, bias).sum(), bias)
    assert torch.equal(gradient, torch.zeros_like(bias))


def test_dropout_beside_rows_that_a_number_absorbs() -> None:
    """Scores depend on query and key by their product alone, so the two have gradients of one sum, whatever drops."""

    def attend(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
        return F.dropout((q @ k.mT * 0.3 + masked.float() * LOWEST).softmax(-1), 0.5) @ v

    q, k, v = (value.clone().requires_grad_() for value in (Q, K, V))
    (row,) = rows(attend, q, k, v, MASKED)
    assert row.status == "rewritten"
    of_query, of_key = torch.autograd.grad((rewritten(attend)(q, k, v, MASKED) * _normal(*Q.shape)).sum(), (q, k))
    assert torch.allclose((of_query * q).sum(), (of_key * k).sum(), rtol=1e-3, atol=1e-4)


def test_second_derivatives_are_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
        return (q @ k.mT * 0.3 + masked.float() * LOWEST).softmax(-1) @ v

    q, k, v = (value.clone().requires_grad_() for value in (Q, K, V[..., :4]))
    (first,) = torch.autograd.grad(rewritten(attend)(q, k, v, MASKED).square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(first.square().sum(), k)


def test_one_module_applied_twice_to_one_query() -> None:
    torch.manual_seed(0)
    of_query, of_key, of_value, out = (torch.nn.Linear(8, 8) for _ in range(4))

    def attend(x: Tensor, context: Tensor) -> Tensor:
        parts = of_query(x), of_key(context), of_value(context)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        result: Tensor = out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return result

    def twice(x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        x = F.silu(x)
        return attend(x, text) + attend(x, image)

    for batch, length in ((1, 6), (2, 1)):
        inputs = _normal(batch, length, 8), _normal(batch, 5, 8), _normal(batch, 7, 8)
        assert relative_error(rewritten(twice)(*inputs), twice(*inputs)) <= 1e-5


def test_a_python_float_that_changes_is_any_number() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, low: float) -> Tensor:
        return (q @ k.mT + masked.float() * low).softmax(-1) @ v

    compiled = rewritten(attend)
    for low in (-1e4, -2e4, LOWEST, -math.inf):
        inputs = (Q, K, V, MASKED)
        actual, expected = compiled(*inputs, low), attend(*inputs, low)
        assert relative_error(actual, expected) <= 1e-5, low


# Numbers that are computed from positions.


@_case(Q, K, V)
def positions_that_a_number_scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(KEYS)
    return torch.sub(q @ k.mT * 0.3, i.float(), alpha=1e9).masked_fill(j > i, -1e9).softmax(-1) @ v


@_case(Q, K, V)
def positions_that_outweigh_a_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(KEYS)
    return torch.add((q @ k.mT * 0.3).masked_fill(j > i, -1e9), j.float(), alpha=5e8).softmax(-1) @ v


@_case(Q, K, V)
def a_quotient_of_positions_by_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(KEYS)
    return (q @ k.mT * 0.3 - (i + 1) / (i - j).abs()).masked_fill(j > i, -1e9).softmax(-1) @ v


@_case(Q, K, V)
def zero_by_zero_replaced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(KEYS)
    return (q @ k.mT * 0.3 - (i - j) / (i + j)).softmax(-1).nan_to_num() @ v


@_case(Q, K, V)
def logarithms_of_negative_numbers_replaced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(KEYS)
    return (q @ k.mT * 0.3 + torch.log((i - j).float() + 2)).softmax(-1).nan_to_num() @ v


@_case(Q, K, V, torch.randn(LENGTH, KEYS, generator=torch.Generator().manual_seed(1)))
def a_complex_factor_of_scores(q: Tensor, k: Tensor, v: Tensor, phase: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 * torch.polar(torch.ones_like(phase), phase)).abs().softmax(-1) @ v


@_case(Q, K, V, torch.tensor([1, 2, 10**9 + 1, 4, 10**9, 6]))
def integers_compared_with_a_float(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """Which rounds them."""
    weights = (q @ k.mT).masked_fill(tokens == 10**9, -math.inf).softmax(-1)
    return weights.masked_fill(tokens == 1e9, 0.0) @ v


# A maximum that is not that of the row: of several rows, bounded, or of keys that are taken away afterwards.


@_case(Q, K, V, MASKED, OTHER)
def filled_again_behind_a_bounded_maximum(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, other: Tensor) -> Tensor:
    s = (q @ k.mT * 0.3).masked_fill(masked, LOWEST)
    s = s - s.amax(-1, keepdim=True).clamp(min=0)
    return s.masked_fill(other, -1e9).softmax(-1) @ v


@_case(Q, K, V, MASKED, torch.tensor([-math.inf, -1e9, 1.0, 0.0]).view(1, HEADS, 1, 1))
def exponentials_beside_that_of_no_sink(q: Tensor, k: Tensor, v: Tensor, masked: Tensor, sink: Tensor) -> Tensor:
    exponentials = (q @ k.mT * 0.3 - 1e9 * masked).exp()
    return exponentials / (sink.exp() + exponentials.sum(-1, keepdim=True)) @ v


@_case(Q, K, V, MASKED, OTHER)
def exponentials_masked_below_a_masked_maximum(
    q: Tensor, k: Tensor, v: Tensor, masked: Tensor, other: Tensor
) -> Tensor:
    s = q @ k.mT * 0.3 + masked * -1e4
    exponentials = (s - s.amax(-1, keepdim=True)).exp() * ~other
    return (exponentials / exponentials.sum(-1, keepdim=True)).nan_to_num() @ v


@pytest.mark.parametrize("name", _CASES)
def test_values(name: str) -> None:
    function, inputs = _CASES[name]
    with torch.no_grad():
        for actual, expected in zip(outputs(rewritten(function)(*inputs)), outputs(function(*inputs)), strict=True):
            assert actual.shape == expected.shape
            assert relative_error(actual, expected) <= (1e-2 if "narrower" in name else 1e-5)


@pytest.mark.parametrize("name", _CASES)
def test_gradients(name: str) -> None:
    function, inputs = _CASES[name]
    # All in one: some gradients are zero but for rounding.
    actual, expected = (
        torch.cat([gradient.flatten() for gradient in gradients(call, inputs)])
        for call in (rewritten(function, "aot_eager"), function)
    )
    assert relative_error(actual, expected) <= (2e-2 if "narrower" in name else 1e-4)


def test_no_graph_is_given_up() -> None:
    """An attention that cannot be read is left with its reason, and the graph's others are rewritten all the same."""
    for name, (function, inputs) in _CASES.items():
        torch._dynamo.reset()
        assert rows(function, *inputs), name


def test_a_relaxed_softmax_is_rewritten() -> None:
    function, inputs = _CASES["precision_bottleneck_relaxation"]
    (row,) = rows(function, *inputs)
    assert row.status == "rewritten"


def test_a_tensor_factor_is_not_rounded_with_the_query() -> None:
    """Products in float32 of bfloat16 operands are exact; the query times a float32 factor is not bfloat16."""
    q, k, v = (_normal(BATCH, HEADS, 64, 64).bfloat16() for _ in range(3))
    factor = torch.rand(HEADS, 1, 1, generator=_generator) + 0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        return ((q.float() @ k.float().mT) * factor).softmax(-1).to(v.dtype) @ v

    exact = ((q.double() @ k.double().mT) * factor.double()).softmax(-1) @ v.double()
    own, eager = rewritten(attend)(q, k, v, factor), attend(q, k, v, factor)
    assert relative_error(own.double(), exact) <= relative_error(eager.double(), exact)


def test_a_batch_that_only_the_value_has_drops_weights_of_its_own() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (t.expand(BATCH, -1, -1, -1) for t in (q, k))
        return F.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v

    inputs = Q[:1], K[:1], V[:1].repeat(BATCH, 1, 1, 1)
    (row,) = rows(attend, *inputs)
    assert row.status == "rewritten"
    one, other = rewritten(attend)(*inputs)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_memory_order_of_a_call(dynamic: bool) -> None:
    """The result of a call lies in memory as its query does, and so do views of it that eager code takes afterwards."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 2, 8).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    inputs = [_normal(3, 6, 16) for _ in range(3)]
    actual, expected = rewritten(attend, dynamic=dynamic)(*inputs), attend(*inputs)
    assert relative_error(actual, expected) <= 1e-5
    assert actual.stride() == expected.stride()


def test_sizes_that_depend_on_the_data() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        k, v = k[kept], v[kept]
        return (q @ k.mT).softmax(-1) @ v

    inputs = Q[0, 0], K[0, 0], V[0, 0]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (row,) = rows(attend, *inputs, torch.arange(KEYS) < 3)
        assert row.status == "rewritten"
        new = rewritten(attend, "aot_eager")
        for count in (3, 5, 1, 0):
            kept = torch.arange(KEYS) < count
            torch.testing.assert_close(new(*inputs, kept), attend(*inputs, kept))
        (row,) = rows(attend, *(value.detach().requires_grad_() for value in inputs), torch.arange(KEYS) < 3)
        assert row.status == "kept" and "depends on the data" in row.reason


def test_logsumexp_of_scores_with_a_learned_bias() -> None:
    """What corrects rows that a mask lowers as a whole overflows in the others, beside a highest bias above zero."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.mT / 3 + bias
        return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v

    inputs = [*(value.detach().requires_grad_() for value in (Q, K, V)), torch.nn.Parameter(_normal(LENGTH, KEYS))]
    (row,) = rows(attend, *inputs)
    assert row.status == "rewritten"
    found, expected = (
        torch.autograd.grad(each(*inputs).square().sum(), inputs) for each in (rewritten(attend), attend)
    )
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_that_is_expanded_along_its_features(dtype: torch.dtype, dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v[..., :1].expand(BATCH, HEADS, v.shape[2], WIDTH)
        return (q @ k.mT).softmax(-1) @ v

    inputs = [value.to(dtype) for value in (Q, K, V)]
    (row,) = rows(attend, *inputs, dynamic=dynamic)
    assert row.status == "rewritten"
    function = rewritten(attend, "aot_eager", dynamic=dynamic)
    actual, expected = function(*inputs), attend(*inputs)
    assert actual.stride() == expected.stride()
    assert relative_error(actual, expected) <= 1e-6
    assert relative_error(gradients(function, inputs), gradients(attend, inputs)) <= 1e-5


def test_a_floor_under_a_mask_of_zeros() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        mask = torch.zeros(kept.shape).masked_fill(~kept, LOWEST) * 0.0
        return torch.max(q @ k.mT + mask, torch.tensor(LOWEST)).softmax(-1) @ v

    inputs = Q, K, V, KEPT
    (row,) = rows(attend, *inputs)
    assert row.status == "rewritten"
    assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-6


def _one_less_the_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return (q @ k.mT + (1.0 - torch.where(kept, 0.0, LOWEST))).softmax(-1) @ v


def _divided_by_a_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return (q @ k.mT / kept.any(-2, keepdim=True).float()).softmax(-1) @ v


def _multiplied_by_infinities(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return (q @ k.mT * torch.zeros(kept.shape).masked_fill(kept, -math.inf)).softmax(-1) @ v


def _weights_divided_by_a_mask(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) / kept.all(-1, keepdim=True)) @ v


def _linear_divided_by_a_triangle(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    products = q.relu() @ k.relu().mT
    return products / (products.sum(-1, keepdim=True) + 1e-6).tril(-1) @ v


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (_one_less_the_mask, "near the largest"),
        (_divided_by_a_mask, "holds zeros"),
        (_multiplied_by_infinities, "holds infinities"),
        (_weights_divided_by_a_mask, "holds zeros"),
        (_linear_divided_by_a_triangle, "holds zeros"),
    ],
    ids=lambda value: value.__name__.lstrip("_") if callable(value) else "",
)
def test_numbers_that_leave_the_range(attend: Callable[..., Any], reason: str) -> None:
    inputs = Q, K, V, MASKED
    (row,) = rows(attend, *inputs)
    assert row.status == "kept" and reason in row.reason
    assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-6


def test_a_key_that_is_expanded_along_its_features() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k[:, :2, None].sum(-1, keepdim=True).expand(BATCH, 2, 2, KEYS, WIDTH).reshape(BATCH, HEADS, KEYS, WIDTH)
        return (q @ k.mT).softmax(-1) @ v

    inputs = Q, K, V
    assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-5
    function = rewritten(attend, "aot_eager")
    assert relative_error(gradients(function, inputs), gradients(attend, inputs)) <= 1e-4


@pytest.mark.parametrize("shape", [(), (1,), (HEADS, 1, 1)])
def test_a_temperature_beside_a_single_key_has_a_gradient_of_zero(shape: tuple[int, ...]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        return (q @ k[:, :, :1].mT * temperature).softmax(-1) @ v[:, :, :1]

    temperature = torch.full(shape, 1.5).requires_grad_()
    for call in (attend, rewritten(attend, "aot_eager")):
        (gradient,) = torch.autograd.grad(call(Q, K, V, temperature).sum(), [temperature])
        assert torch.equal(gradient, torch.zeros(shape))


NAN_MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "times minus infinity": lambda s, masked: s + masked * -math.inf,
    "floats times minus infinity": lambda s, masked: s + masked.float() * -math.inf,
    "triangle": lambda s, masked: s + torch.ones(LENGTH, KEYS).triu(1) * -math.inf,
    "one less the mask": lambda s, masked: s + (1.0 - (~masked).to(s.dtype)) * -math.inf,
    "lowest of float64 times a mask": lambda s, masked: s + masked * torch.finfo(torch.float64).min,
    "half": lambda s, masked: s + (masked.half() * torch.tensor([-1e9]).half()).to(s.dtype),
    "over zero": lambda s, masked: s + masked.to(s.dtype) / -0.0,
    "and filled": lambda s, masked: (s + masked.to(s.dtype) * -math.inf).masked_fill(masked, -math.inf),
    "NaN times a mask": lambda s, masked: s.masked_fill(masked, -math.inf) + masked * math.nan,
    "infinities of both signs": lambda s, masked: (
        s + (torch.where(masked, -math.inf, 0.0) + torch.where(masked, math.inf, 0.0))
    ),
}


@pytest.mark.parametrize("mask", NAN_MASKS.values(), ids=list(NAN_MASKS))
def test_nan_of_a_mask_that_is_replaced(mask: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``0 * -inf`` is NaN in every row; where it is replaced by zeros the row is zero."""

    def attend(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
        return torch.nan_to_num(mask(q @ k.mT, masked).softmax(-1)) @ v

    def replaced(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
        weights = mask(q @ k.mT, masked).softmax(-1)
        return torch.where(weights.isnan(), 0.0, weights) @ v

    for function in (attend, replaced):
        assert relative_error(rewritten(function)(Q, K, V, MASKED), function(Q, K, V, MASKED)) <= 1e-5


def _attended(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    scores = q @ k.mT
    return (scores if keep is None else scores.masked_fill(~keep, -math.inf)).softmax(-1) @ v


def _keys_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attended(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))


def _keys_interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attended(q, k.repeat_interleave(2, -2), v.repeat_interleave(2, -2))


def _keys_and_heads_repeated_under_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (part[:, :1].repeat(1, HEADS, 2, 1) for part in (k, v))
    return _attended(q, k, v, torch.arange(2 * KEYS) <= torch.arange(LENGTH)[:, None] + 4)


def _features_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attended(q.repeat(1, 1, 1, 2), k.repeat_interleave(2, -1), v)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "attend",
    [_keys_repeated, _keys_interleaved, _keys_and_heads_repeated_under_a_mask, _features_repeated],
    ids=lambda function: function.__name__.lstrip("_"),
)
def test_positions_and_features_that_are_repeated(attend: Callable[..., Any], dynamic: bool | None) -> None:
    inputs = Q, K, V
    (row,) = rows(attend, *inputs, dynamic=dynamic)
    assert row.status == "rewritten"
    function = rewritten(attend, "aot_eager", dynamic=dynamic)
    assert relative_error(function(*inputs), attend(*inputs)) <= 1e-5
    assert relative_error(gradients(function, inputs), gradients(attend, inputs)) <= 1e-4


def exponentials_less_the_maximum_of_all_rows(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = (q @ k.mT * 0.3).masked_fill(masked, -1e9)
    exponentials = (s - s.max()).exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)) @ v


def a_one_beside_the_maximum_of_all_rows(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = (q @ k.mT * 0.3).masked_fill(masked, -math.inf)
    exponentials = (s - s.max()).exp()
    return exponentials / ((-s.max()).exp() + exponentials.sum(-1, keepdim=True)) @ v


def a_one_beside_a_maximum_that_is_bounded_above(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    s = (q @ k.mT * 0.3).masked_fill(masked, -math.inf)
    highest = s.amax(-1, keepdim=True).clamp(max=20.0)
    exponentials = (s - highest).exp()
    weights = exponentials / ((-highest).exp() + exponentials.sum(-1, keepdim=True))
    return weights.nan_to_num() @ v


@pytest.mark.parametrize(
    "attend",
    [
        exponentials_less_the_maximum_of_all_rows,
        a_one_beside_the_maximum_of_all_rows,
        a_one_beside_a_maximum_that_is_bounded_above,
    ],
    ids=lambda attend: attend.__name__,
)
def test_a_maximum_that_is_not_the_row_s(attend: Callable[..., Tensor]) -> None:
    """AOTAutograd's gradients of replaced NaN are not eager's, and two of these are not recognized."""
    found = [
        gradients(lambda *operands, call=call: call(*operands, MASKED), [Q, K, V])
        for call in (attend, rewritten(attend))
    ]
    assert relative_error(rewritten(attend)(Q, K, V, MASKED), attend(Q, K, V, MASKED)) <= 1e-5
    assert relative_error(*found) <= 1e-4


def test_gradients_of_rows_of_nan_under_a_loss_of_nan() -> None:
    """What comes back to such a row is NaN, and a fill stops it on its way to query and key."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(MASKED, -math.inf).softmax(-1) @ v

    found = []
    for call in (attend, rewritten(attend)):
        inputs = [part.clone().requires_grad_() for part in (Q, K, V)]
        found.append(torch.autograd.grad(call(*inputs).square().sum(), inputs))
    assert not found[1][1].isnan().any()
    assert relative_error(found[1], found[0]) <= 1e-4


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
def test_fills_under_another_default_dtype(default: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.mT * 0.3).masked_fill(MASKED, LOWEST)
        return (s + OTHER.float() * LOWEST).softmax(-1) @ v

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        expected, actual = attend(Q, K, V), rewritten(attend)(Q, K, V)
    finally:
        torch.set_default_dtype(before)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("whole", [lambda n: n * n // 2, lambda n: 2**n], ids=["quotient", "power"])
def test_positions_beside_a_symbolic_number_that_float32_rounds(whole: Callable[[int], int]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, sized: Tensor) -> Tensor:
        first = whole(sized.shape[0])
        i = torch.arange(q.shape[-2]).float() + first
        j = torch.arange(k.shape[-2]).float() + first
        return (q @ k.mT * 0.3).masked_fill(j > i[:, None], -math.inf).softmax(-1) @ v

    sized = torch.empty(()).expand(2**14 if whole(3) == 4 else 30)
    assert relative_error(rewritten(attend, dynamic=True)(Q, K, V, sized), attend(Q, K, V, sized)) <= 1e-5


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_two_results_of_one_key_are_two_tensors(inner: str) -> None:
    def attend(q: Tensor, other: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (q @ k.mT).softmax(-1) @ v, (other @ k.mT).softmax(-1) @ v

    first, second = rewritten(attend, inner)(Q, 2 * Q, K[:, :, :1], V[:, :, :1])
    before = second.clone()
    first.add_(1)
    assert torch.equal(second, before)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_copy_into_a_transposed_view(inner: str, packed: bool) -> None:
    """Its strides are those of what is copied into: a cache of (batch, length, heads * width), or a part of it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = flat[..., HEADS * WIDTH :] if packed else flat
        keys = part.view(BATCH, KEYS, HEADS, WIDTH).transpose(1, 2)
        keys.copy_(k)
        own = torch.empty(BATCH, KEYS, HEADS, WIDTH).transpose(1, 2)
        own.copy_(k)
        return (q @ keys.mT).softmax(-1) @ v, own, keys

    flat = torch.zeros(BATCH, KEYS, (1 + packed) * HEADS * WIDTH)
    expected_flat = flat.clone()
    expected, actual = attend(Q, K, V, expected_flat), rewritten(attend, inner)(Q, K, V, flat)
    assert relative_error([*actual, flat], [*expected, expected_flat]) <= 1e-5
    assert [each.stride() for each in actual] == [each.stride() for each in expected]


@pytest.mark.parametrize("bias", [False, True])
def test_float64_in_a_function_of_the_scores(bias: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
        s = torch.tanh(q @ k.mT / number) * number
        return (s + _POSITIONS if bias else s).float().softmax(-1) @ v

    number = torch.tensor(3.0, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(rewritten(attend, "inductor")(Q, K, V, number), attend(Q, K, V, number)) <= 1e-5


_POSITIONS = torch.linspace(-1, 1, KEYS, dtype=torch.float64)


# Numbers that half precision does not hold, beside scores in half precision.


def _sink_in_float32(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = q.float() @ k.float().mT
    column = sink.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(v.dtype) @ v


def _sink_in_the_denominator(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    exponentials = (q.float() @ k.float().mT).exp()
    return (exponentials / (exponentials.sum(-1, keepdim=True) + sink.float().exp())).to(v.dtype) @ v


def _number_in_the_denominator(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    exponentials = (q.float() @ k.float().mT).exp()
    return (exponentials / (exponentials.sum(-1, keepdim=True) + 1.9e29)).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("attend", [_sink_in_float32, _sink_in_the_denominator, _number_in_the_denominator])
def test_a_sink_that_half_precision_does_not_hold(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = ((0.7 + 0.02 * torch.randn(1, 2, length, 128)).to(dtype) for length in (4, 64))
    v = (1 + 0.3 * torch.randn(1, 2, 64, 128)).to(dtype)
    sink = torch.tensor(67.23 if dtype is torch.bfloat16 else 67.27)
    with torch.no_grad():
        exact = attend(*(value.double() for value in (q, k, v, sink)))
        own, new = attend(q, k, v, sink), rewritten(attend)(q, k, v, sink)
    assert disagreement(new, own, exact, dtype) == ""
    assert [row.status for row in rows(attend, q, k, v, sink)] == ["rewritten"]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_mask_in_float32_that_is_rounded_to_minus_infinity(dtype: torch.dtype, gradients: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, masks: Tensor) -> Tensor:
        gate = torch.where(masks, torch.finfo(torch.float32).min, 0.0)
        return (q @ k.mT * 0.3 + gate).softmax(-1) @ v

    def results(function: Callable[..., Tensor]) -> Tensor:
        inputs = [value.to(dtype).requires_grad_(gradients) for value in (Q, K, V)]
        with torch.set_grad_enabled(gradients):
            return function(*inputs, torch.tensor(True))

    assert bool(results(attend).isnan().all())
    assert bool(results(rewritten(attend, "aot_eager")).isnan().all())


class _MaskThroughAProduct(nn.Module):
    """A mask of -1e9 that a product with small numbers sums up, or spreads over the heads."""

    segments: Tensor
    slopes: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        segments = torch.zeros(3, KEYS)
        segments[torch.arange(KEYS) // 2, torch.arange(KEYS)] = 1.0
        self.register_buffer("segments", segments)
        self.register_buffer("slopes", torch.tensor([1.0, 0.5, 0.25, 2.0]))
        self.per_head = nn.Linear(1, HEADS, bias=False)
        nn.init.constant_(self.per_head.weight, 0.7)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        bias = (1 - kept) * -1e9
        if self.how == "clamped":
            bias = (kept.log().clamp(min=-1e9) @ self.segments)[:, None, None]
        elif self.how == "alpha":
            bias = (torch.sub(torch.zeros(1), 1 - kept, alpha=1e9) @ self.segments)[:, None, None]
        elif self.how == "buffer":
            bias = (bias @ self.segments)[:, None, None]
        elif self.how == "slopes":
            bias = torch.einsum("bk,h->bhk", bias.repeat_interleave(2, 1), self.slopes)[:, :, None]
        else:
            bias = self.per_head(bias.repeat_interleave(2, 1)[:, None, :, None]).permute(0, 3, 1, 2)
        later = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
        return (q @ k.mT + bias).masked_fill(later, -1e9).softmax(-1) @ v


@pytest.mark.parametrize("how", ["buffer", "slopes", "projection", "clamped", "alpha"])
def test_a_mask_that_goes_through_a_product(how: str) -> None:
    """Left padding leaves the first rows without a key."""
    model = _MaskThroughAProduct(how)
    model.per_head.requires_grad_(False)
    kept = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    new = rewritten(model, "aot_eager")
    with torch.no_grad():
        assert relative_error(new(Q, K, V, kept), model(Q, K, V, kept)) <= 1e-5
    kept[1] = 0.0
    operands = [value.clone().requires_grad_() for value in (Q, K, V)]
    own, found = (torch.autograd.grad(each(*operands, kept).square().sum(), operands) for each in (model, new))
    assert relative_error(found, own) <= 1e-4


@pytest.mark.parametrize("window", [4, 8])
def test_windows_that_overlap_in_memory(window: int) -> None:
    """PyTorch's kernel for the CPU takes them for other memory (2.13)."""

    def attend(x: Tensor) -> Tensor:
        windows = x.unfold(1, window, 1)
        return (windows @ windows.mT / 3).softmax(-1) @ windows

    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(rewritten(attend)(x), attend(x)) <= 1e-5
    assert [row.status for row in rows(attend, x)] == ["rewritten"]


# Numbers computed from positions that are as large as a mask: a row without a key is told by how low its scores are.


@_case(Q, K, V, KEPT_KEYS)
def far_by_two_axes(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH).float(), torch.arange(KEYS).float()
    far = (i[:, None] - j) ** 2 / (2 * 1.1e-3**2)
    s = q @ k.mT - far - far + (1.0 - kept.float()) * -1e9
    return s.softmax(-1) * kept.float() @ v


@_case(Q, K, V, MASKED.any(-2, keepdim=True))
def raised_by_positions_beside_a_low_mask(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH).float(), torch.arange(KEYS).float()
    s = q @ k.mT + (i[:, None] - j) ** 2 / (2 * 1.1e-3**2) + masked.float() * -2e7
    return s.softmax(-1).masked_fill(masked, 0.0) @ v


@_case(Q, K, V, KEPT_KEYS)
def lowered_rows_less_their_logsumexp(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    i, j = torch.arange(LENGTH).float(), torch.arange(KEYS).float()
    row = i[:, None] ** 2 / (2 * 1.1e-3**2)
    s = q @ k.mT - row - row - (i[:, None] - j).abs() * 50 + (1.0 - kept.float()) * -1e9
    return torch.exp(s - torch.logsumexp(s, -1, keepdim=True)) @ v


# A mask and numbers computed from positions, added to each other first: one sequence is padding alone.
PADDED = torch.tensor([[True] * KEYS, [False, False, True, False, False, True]])


@_case(Q, K, V, PADDED)
def lowered_with_positions(q: Tensor, k: Tensor, v: Tensor, padded: Tensor) -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(KEYS)).abs().float()
    return (q @ k.mT + (-0.25 * distance + padded[:, None, None].float() * -1e7)).softmax(-1) @ v


@_case(Q, K, V, PADDED)
def lowered_far_with_positions(q: Tensor, k: Tensor, v: Tensor, padded: Tensor) -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(KEYS)).abs().float()
    return (q @ k.mT + (-0.25 * distance - padded[:, None, None].float() * 1e9)).softmax(-1) @ v


def _without_a_maximum(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


# Without a maximum a padded sequence is 0 / 0, whatever the positions add to its mask.


@_case(Q, K, V, PADDED, _normal(LENGTH, KEYS).sigmoid() + 0.5)
def exponentials_of_scores_lowered_with_positions(
    q: Tensor, k: Tensor, v: Tensor, padded: Tensor, decay: Tensor
) -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(KEYS)).abs().float()
    bias = padded[:, None, None].float() * -1e4 - 0.25 * distance
    return _without_a_maximum((q @ k.mT / 3 + bias) * decay) @ v


@_case(Q, K, V, PADDED)
def nan_replaced_where_scores_are_lowered_with_positions(q: Tensor, k: Tensor, v: Tensor, padded: Tensor) -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(KEYS)).abs().float()
    bias = padded[:, None, None].float() * -1e4 - 0.25 * distance
    return torch.nan_to_num(_without_a_maximum(q @ k.mT / 3 + bias)) @ v


@_case(Q, K, V)
def exponentials_of_low_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query is far from every key."""
    i, j = torch.arange(LENGTH).float(), torch.arange(KEYS).float()
    return _without_a_maximum(q @ k.mT / 3 - 60.0 * (i[:, None] + j)) @ v


class _Costs(nn.Module):
    """The exponential of a buffer of ordinary numbers is a mask that a causal fill does not outweigh."""

    log_cost: Tensor

    def __init__(self, power: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("log_cost", torch.tensor([60.0, 55.0, 58.0, 0.0, 1.0, 0.0]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
        return (q @ k.mT / 3 - self.power(self.log_cost)).masked_fill(later, -1e9).softmax(-1) @ v


@pytest.mark.parametrize("power", [torch.exp, lambda x: 2.0**x, lambda x: 0.5**-x], ids=["exp", "two", "half"])
def test_the_exponential_of_a_buffer(power: Callable[[Tensor], Tensor]) -> None:
    model = _Costs(power)
    with torch.no_grad():
        assert relative_error(rewritten(model, "aot_eager")(Q, K, V), model(Q, K, V)) <= 1e-5


def test_weights_that_are_multiplied_with_themselves() -> None:
    """Either factor was taken for the weights, and the other for the value."""

    def attend(q: Tensor, k: Tensor, queries: Tensor) -> Tensor:
        weights = (q @ k.mT / 3).softmax(-1) * queries.unsqueeze(-1).repeat(1, 1, 1, KEYS)
        turned = weights.mT.contiguous()
        return turned.mT @ turned

    queries = torch.rand(BATCH, HEADS, LENGTH, generator=torch.Generator().manual_seed(0))
    assert relative_error(rewritten(attend, "aot_eager")(Q, K, queries), attend(Q, K, queries)) <= 1e-5
    (row,) = rows(attend, Q, K, queries)
    assert "multiplied with themselves" in row.reason


def test_one_weight_for_several_values() -> None:
    """``einsum`` repeats a part of the weights that has a single key."""

    def attend(q: Tensor, old_k: Tensor, new_k: Tensor, old_v: Tensor, new_v: Tensor) -> Tensor:
        old, new = q @ old_k.mT, (q @ new_k.mT)[..., :1]
        weights = torch.cat([old, new], -1).softmax(-1)
        length = old_k.shape[-2]
        values = torch.einsum("bhls,bhsd->bhld", weights[..., :length], old_v)
        return values + torch.einsum("bhls,bhsd->bhld", weights[..., length:], new_v)

    inputs = (Q, K[:, :, :4], K[:, :, 4:], V[:, :, :4], V[:, :, 4:])
    for dynamic in (None, True):
        assert relative_error(rewritten(attend, "aot_eager", dynamic=dynamic)(*inputs), attend(*inputs)) <= 1e-5


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_a_bias_beside_masks_that_cover_a_row_together(dtype: torch.dtype, gradients: bool) -> None:
    """The bias cancels the scores, so that eager, which loses both beside -1e9, gives the formula's numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 6, 8, generator=generator).to(dtype) for _ in range(3))
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :3] = False
    bias = -(q.float() @ k.float().mT)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q.float() @ k.float().mT + bias
        s = s + torch.where(torch.ones(6, 6, dtype=torch.bool).tril(), 0.0, -1e9)
        s = s + torch.where(keep[:, None, None, :], 0.0, -1e9)
        return s.softmax(-1).to(v.dtype) @ v

    call = [value.requires_grad_(gradients) for value in (q, k, v, bias)]
    found = rewritten(attend, "aot_eager")(*call)
    assert (found - attend(*call)).abs().max() <= 4 * torch.finfo(dtype).eps * v.abs().max()


def test_a_given_mask_and_a_known_one_beside_rows_that_are_lowered_further() -> None:
    """The sum of the first two is minus infinity in float16; in float32 the third one loses what they differ by."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator).half() for length in (5, 6, 6))
    masked = torch.tensor([True, True, True, False, True, True])
    bias = torch.zeros(2, 1, 5, 6).masked_fill(masked, -65504.0).half()
    low_rows = torch.zeros(2, 1, 5, 6)
    low_rows[0, 0, 2] = 1.0

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, masked: Tensor, low_rows: Tensor) -> Tensor:
        s = q @ k.mT * 8**-0.5 + bias
        s = s + torch.zeros(masked.shape, dtype=s.dtype).masked_fill(masked, torch.finfo(s.dtype).min)
        s = s.float() + low_rows * -1e15
        return s.softmax(-1).to(v.dtype) @ v

    inputs = (q, k, v, bias, masked.expand(2, 1, 1, 6), low_rows)
    with torch.no_grad():
        assert relative_error(rewritten(attend, "aot_eager")(*inputs), attend(*inputs)) <= 4e-3


@_case(Q, K, V)
def a_softmax_of_a_logarithm_of_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two softmaxes go into one product: the exponentials, and those divided by their sum, which is one."""
    s = (q @ k.mT / 3).flatten(0, 1)
    exponentials = (s - s.logsumexp(-1, keepdim=True)).exp()
    weights = exponentials / exponentials.sum(-1, keepdim=True)
    return weights.view(BATCH, HEADS, LENGTH, KEYS) @ v


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_learned_addend_that_counts_for_nothing_has_a_gradient_of_zeros(factor: float) -> None:
    addend = torch.nn.Parameter(torch.ones(6, 6))
    call = [torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.baddbmm((addend * factor).expand(3, 6, 6), q, k.mT, beta=0, alpha=0.3).softmax(-1) @ v

    with collect_reports() as reports:
        rewritten(attend, "aot_eager")(*call).sum().backward()
    assert addend.grad is not None and not addend.grad.any()
    assert ["gradient of zeros" in row.reason for report in reports for row in report.sites] == [True]


@_case(Q, K, V)
def a_maximum_with_one_dimension_more_than_its_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / 3
    highest = s.amax(-1, keepdim=True)[None].clamp(min=0)
    exponentials = (s - highest).exp()
    return exponentials / ((-highest).exp() + exponentials.sum(-1, keepdim=True)) @ v


@_case(Q, K, V)
def a_maximum_with_one_dimension_more_than_its_scores_and_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.cat([q @ k.mT / 3, torch.zeros(BATCH, HEADS, LENGTH, 1)], dim=-1)
    return (s - s.amax(-1, keepdim=True)[None]).softmax(-1)[..., :-1] @ v
