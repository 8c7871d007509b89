"""Specimens of attention to a single key: cross attention to a pooled or class embedding.

    softmax([score]) @ [value] = value

The rules are those of softmax attention and of fused calls (:mod:`attnrewrite.patterns.softmax`,
:mod:`attnrewrite.patterns.sdpa`). The kernel ``single_key`` serves them where the key is never masked.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, keep, learned, normal

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, 1, 8)


# The gradients of query and key are zeros, of which a fused call leaves rounding: see tests/kernels/test_single_key.py.
_alone = partial(_spelling.add, gradients=False)


@_alone(normal(2, "L", 16), normal(2, 1, 24), learned(16, 32), learned(24, 32), learned(24, 32))
def token_of_a_condition(x: Tensor, condition: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor) -> Tensor:
    """Cross attention of a UNet to the embedding of a class or an image."""
    q, k, v = x @ to_q, condition @ to_k, condition @ to_v
    q, k, v = (t.view(2, -1, 4, 8).transpose(1, 2).reshape(8, -1, 8) for t in (q, k, v))
    scores = torch.baddbmm(q.new_empty(8, q.shape[1], 1), q, k.transpose(1, 2), beta=0, alpha=8**-0.5)
    return (scores.softmax(dim=-1) @ v).view(2, 4, -1, 8).transpose(1, 2).reshape(2, -1, 32)


@_alone(_Q, _K, _V)
def call_with_one_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@_spelling.add(normal(2, "L", 4, 8), normal(2, 4, 8), normal(2, 4, 24))
def key_without_a_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The key is transposed by hand, and broadcast over the queries."""
    weights = torch.softmax(torch.einsum("nihd,njhd->nhij", q, k[:, None]) * 8**-0.5, dim=3)
    return torch.einsum("nhij,njhe->nihe", weights, v[:, None])


@_alone(_Q, normal(2, 1, 1, 8), normal(2, 1, 1, 8))
def one_key_filled_with_lowest_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of one finite number is 1, whatever the number."""
    scores = (q @ k.mT * 8**-0.5).masked_fill(q[..., :1] > 0, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


@_alone(_Q, _K, _V, keep(2, 1, "L", 1))
def one_key_that_may_be_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 8**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@_alone(_Q, _K, _V, keep(2, 1, "L", 1))
def call_with_one_key_that_may_be_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
