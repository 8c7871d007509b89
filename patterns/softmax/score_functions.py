"""Specimens of softmax attention whose scores go through a function that is no scale, no bias and no mask.

Only a kernel that applies any function to each score takes these. The rule is softmax attention's
(:mod:`attnrewrite.patterns.softmax`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, additive, keep, normal

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


@_spelling.add(_Q, _K, _V)
def capped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return (torch.tanh(scores / 5.0) * 5.0).softmax(-1) @ v


@_spelling.add(normal(2, 4, "L", 8), normal(2, 2, "S", 8), normal(2, 2, "S", 8), additive(2, 1, 1, "S"))
def capped_scores_and_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Gemma 2."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * 8**-0.5
    scores = torch.tanh(scores / 50.0) * 50.0 + mask
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), v)


@_spelling.add(_Q, _K, _V)
def clamped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.clamp(q @ k.mT * 8**-0.5, min=-2.0, max=1.5).softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def nan_to_num_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Differential Transformer, YOCO."""
    scores = torch.nan_to_num(q @ k.mT * 8**-0.5)
    scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype, device=q.device).triu(1)
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V, additive(2, 1, "L", "S"))
def bounded_from_above(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.clamp(q @ k.mT * 8**-0.5 + mask, max=1.0).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, normal(2, 4, "L", "S"))
def scores_times_matrix(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * gate).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S", dtype=torch.float32), gradients=False)
def biased_and_multiplied_by_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """GLM: scores with their biases times a mask that is an input, less 1e4 where it is zero."""
    queries, keys = (torch.arange(t.shape[2], device=q.device, dtype=q.dtype) for t in (q, k))
    scores = q @ k.transpose(-2, -1) / 8**0.5 - (queries[:, None] - keys).abs() / 4
    return (torch.mul(scores, mask) - 10000.0 * (1.0 - mask)).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def multiplied_by_zeros_and_ones(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A masked score is 0 here, and takes part."""
    return (q @ k.transpose(-2, -1) * mask).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def filled_with_minus_ten_thousand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~mask, -1e4).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def filled_with_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~mask, 0.0).softmax(-1) @ v
