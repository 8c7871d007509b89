"""Specimens of softmax attention that is computed slice by slice, as code does that saves memory.

    result[s] = softmax(mods(query[s] @ key[s])) @ value[s]        for slices s that cover a range once
    result    = softmax(mods(query @ key)) @ value

A row of the result depends on its own query, batch and head alone. Each slice is found like any other attention
(:mod:`attnrewrite.patterns.softmax`, :mod:`attnrewrite.patterns.sdpa`), and :mod:`attnrewrite.passes.merge_slices`
merges what was found. Slices may be of the batch, of heads or of queries, or of several of them; they may be written
into a buffer, concatenated or stacked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, additive, keep, learned, normal

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        start, beta = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device), 0
    else:
        start, beta = mask, 1
    return torch.baddbmm(start, q, k.transpose(-1, -2), beta=beta, alpha=8**-0.5)


def _sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: int) -> Tensor:
    result = torch.zeros((q.shape[0], q.shape[1], v.shape[-1]), dtype=q.dtype, device=q.device)
    for i in range((q.shape[0] - 1) // size + 1):
        start, end = i * size, (i + 1) * size
        scores = _scores(q[start:end], k[start:end], None if mask is None else mask[start:end])
        result[start:end] = torch.bmm(scores.softmax(dim=-1), v[start:end])
    return result


@_spelling.add(normal(2, "L", 32), normal(2, "S", 32), normal(2, "S", 32))
def slices_written_into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diffusers' SlicedAttnProcessor: slices of batch times heads, the last one smaller."""
    q, k, v = (t.view(2, -1, 4, 8).transpose(1, 2).reshape(8, -1, 8) for t in (q, k, v))
    result = _sliced(q, k, v, None, 3)
    return result.view(2, 4, -1, 8).transpose(1, 2).reshape(2, -1, 32)


@_spelling.add(normal(8, "L", 8), normal(8, "S", 8), normal(8, "S", 8), additive(2, 1, "S"))
def slices_with_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """diffusers' SlicedAttnProcessor: the mask is repeated over heads and sliced, too."""
    return _sliced(q, k, v, mask.repeat_interleave(4, dim=0).expand(-1, q.shape[1], -1), 3)


@_spelling.add(normal(8, "L", 8), normal(8, "S", 8), normal(8, "S", 8))
def slice_that_is_the_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A slice size of all there is: the buffer is of no use."""
    return _sliced(q, k, v, None, 8)


@_spelling.add(normal(8, "L", 8), normal(8, "S", 8), normal(8, "S", 8), dynamic=False)
def slices_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stable Diffusion's web interfaces."""
    result = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    size = 5
    for i in range(0, q.shape[1], size):
        end = i + size
        weights = (torch.einsum("bid,bjd->bij", q[:, i:end], k) * 8**-0.5).softmax(dim=-1)
        result[:, i:end] = torch.einsum("bij,bjd->bid", weights, v)
    return result


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def slices_in_a_list(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    parts = []
    for part, own in zip(torch.split(q, 7, dim=2), torch.split(mask, 7, dim=2), strict=True):
        scores = (part @ k.mT * 8**-0.5).masked_fill(~own, float("-inf"))
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=2)


@_spelling.add(_Q, _K, _V, learned(4, "L", "S"))
def one_head_at_a_time(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    heads = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h].transpose(1, 2) * 8**-0.5 + bias[h]
        heads.append(F.softmax(scores, dim=-1) @ v[:, h])
    return torch.stack(heads, dim=1)


@_spelling.add(_Q, _K, _V)
def one_head_of_one_batch_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            result[b, h] = (q[b, h] @ k[b, h].T * 8**-0.5).softmax(-1) @ v[b, h]
    return result


@_spelling.add(_Q, normal(2, 1, "S", 8), normal(2, 1, "S", 8))
def heads_that_share_a_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [(part @ k.mT * 8**-0.5).softmax(-1) @ v for part in torch.split(q, [1, 3], dim=1)]
    return torch.cat(heads, dim=1)


@_spelling.add(normal(4, "L", 32), normal(4, "S", 32), normal(4, "S", 32))
def slices_of_calls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two of the batch at a time, in the order (batch, length, features) on the way in and out."""
    results = []
    for i in range(0, 4, 2):
        a, b, c = (t[i : i + 2].reshape(2, -1, 4, 8).transpose(1, 2) for t in (q, k, v))
        results.append(F.scaled_dot_product_attention(a, b, c).transpose(1, 2).flatten(2))
    return torch.cat(results)


@_spelling.add(_Q, _K, normal(2, 4, "S", 24))
def slices_of_the_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    return torch.cat([weights @ part for part in v.chunk(3, dim=-1)], dim=-1)
