"""Specimens of softmax attention whose weights are taken apart or added up before they are multiplied.

Keys in several parts, as of a cache and new ones, are attended as one, and so are heads. A sum of weights times a
value is the same sum of attentions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, keep, learned, normal

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)
_NEW = normal(2, 4, "L", 8)
_TWICE_Q = normal(2, 8, "L", 8)
_TWICE_K = normal(2, 8, "S", 8)


# Keys in several parts.


@_spelling.add(_Q, _K, _NEW, _V, _NEW)
def cached_and_new_keys(q: Tensor, old_k: Tensor, new_k: Tensor, old_v: Tensor, new_v: Tensor) -> Tensor:
    """Exports of models with a cache; OpenVINO's SDPAFusion."""
    scores = torch.cat([q @ old_k.mT, q @ new_k.mT], -1) * 8**-0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(old_k.shape[2])
    weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
    old, new = torch.split(weights, [old_k.shape[2], new_k.shape[2]], -1)
    return old @ old_v + new @ new_v


@_spelling.add(_Q, _K, _NEW, _V, _NEW)
def scaled_by_part(q: Tensor, old_k: Tensor, new_k: Tensor, old_v: Tensor, new_v: Tensor) -> Tensor:
    parts = [torch.einsum("bhld,bhsd->bhls", q, k) / 8**0.5 for k in (old_k, new_k)]
    weights = torch.cat(parts, dim=-1).softmax(-1)
    old, new = weights[..., : old_k.shape[2]], weights[..., old_k.shape[2] :]
    return torch.einsum("bhls,bhsd->bhld", old, old_v) + torch.einsum("bhls,bhsd->bhld", new, new_v)


@_spelling.add(_Q, _K, _NEW, _V, _NEW, keep(2, 1, "L", "S"), keep(2, 1, "L", "L"))
def masked_by_part(
    q: Tensor, old_k: Tensor, new_k: Tensor, old_v: Tensor, new_v: Tensor, old: Tensor, new: Tensor
) -> Tensor:
    parts = [q @ k.mT * 8**-0.5 + (1 - keep.to(q.dtype)) * -1e9 for k, keep in ((old_k, old), (new_k, new))]
    weights = torch.cat(parts, -1).softmax(-1)
    return weights.narrow(-1, 0, old_k.shape[2]) @ old_v + weights.narrow(-1, old_k.shape[2], new_k.shape[2]) @ new_v


@_spelling.add(_Q, _K, _V, normal(2, 4, 3, 8), normal(2, 4, 3, 8), dynamic=False)
def three_parts(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensor:
    """The values of two parts are those of one tensor, and the last part of the weights comes first."""
    keys = torch.cat([k, more_k], 2)
    first, second, third = torch.split((q @ keys.mT * 8**-0.5).softmax(-1), [5, k.shape[2] - 5, 3], -1)
    return third @ more_v + first @ v[:, :, :5] + second @ v[:, :, 5:]


# Scores in several parts.


@_spelling.add(normal(4, "L", 8), normal(4, "S", 8), normal(4, "S", 8), keep("S", dtype=torch.float32))
def foreground_and_background(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """MasaCtrl: the same scores under a mask and its complement are twice the heads."""
    scores = torch.einsum("h i d, h j d -> h i j", q, k) * 8**-0.5
    background = scores + mask.masked_fill(mask == 1, torch.finfo(q.dtype).min)
    foreground = scores + mask.masked_fill(mask == 0, torch.finfo(q.dtype).min)
    weights = torch.cat([foreground, background], dim=0).softmax(-1)
    return torch.einsum("h i j, h j d -> h i d", weights, torch.cat([v] * 2))


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"), keep(2, 1, 1, "S"))
def heads_under_two_masks(q: Tensor, k: Tensor, v: Tensor, near: Tensor, all_over: Tensor) -> Tensor:
    first, second = q.chunk(2, 1)
    key, more = k.chunk(2, 1)
    masks = (near, near & all_over)
    products = (first @ key.mT, second @ more.mT)
    parts = [scores.masked_fill(~mask, -math.inf) for scores, mask in zip(products, masks, strict=True)]
    return (torch.cat(parts, 1) * 8**-0.5).softmax(-1) @ v


# Sums of weights.


@_spelling.add(_TWICE_Q, _TWICE_K, normal(2, 4, "S", 16), learned(1))
def difference_of_weights(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """Differential Transformer: twice as many heads of scores as of values."""
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    weights = weights.view(q.shape[0], 4, 2, q.shape[2], k.shape[2])
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v


@_spelling.add(_TWICE_Q, _TWICE_K, normal(2, 4, "S", 16), learned(4, 1, 1), keep(2, 1, "L", "S"), dynamic=False)
def difference_of_halves(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -math.inf)
    first, second = scores.softmax(-1).chunk(2, dim=1)
    return (first - factors * second) @ v


@_spelling.add(_Q, _K, _Q, _K, _V, learned(4), sites=2)
def mixture_of_softmaxes(q: Tensor, k: Tensor, other_q: Tensor, other_k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """ConViT, with queries and keys for the positions as well."""
    gate = gate.sigmoid().view(1, -1, 1, 1)
    content = (q @ k.mT * 8**-0.5).softmax(-1)
    position = (other_q @ other_k.mT * 8**-0.5).softmax(-1)
    return ((1 - gate) * content + gate * position) @ v


@_spelling.add(_Q, _K, _Q, _K, _V, sites=2)
def negative_part_by_einsum(q: Tensor, k: Tensor, other_q: Tensor, other_k: Tensor, v: Tensor) -> Tensor:
    first = torch.einsum("bhld,bhsd->bhls", q, k).softmax(-1)
    second = torch.einsum("bhld,bhsd->bhls", other_q, other_k).softmax(-1)
    return torch.einsum("bhls,bhsd->blhd", -(second / 2) + first, v)


@_spelling.add(_Q, _K, _V, sites=2)
def mixture_of_temperatures(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two softmaxes of the same scores."""
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return (0.5 * scores.softmax(-1) + 0.5 * (2 * scores).softmax(-1)) @ v


@_spelling.add(_Q, _K, _V, sites=2)
def differential_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q1, q2 = q.chunk(2, -1)
    k1, k2 = k.chunk(2, -1)
    return ((q1 @ k1.mT).softmax(-1) - 0.8 * (q2 @ k2.mT).softmax(-1)) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"), normal(2, 1, "L", "S"), keep(2, 1, "L", "S", dtype=torch.float32))
def mixed_with_given_matrices(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, distances: Tensor, adjacency: Tensor
) -> Tensor:
    """Molecule Attention Transformer: weights of distances and of bonds beside those of the scores."""
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -math.inf)
    adjacency = adjacency / (adjacency.sum(-1, keepdim=True) + 1e-6)
    weights = 0.3 * scores.softmax(-1) + 0.3 * distances.softmax(-1) + 0.4 * adjacency.repeat(1, 4, 1, 1)
    return weights @ v
