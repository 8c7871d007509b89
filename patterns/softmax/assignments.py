"""Specimens of softmax attention whose masks are assigned, filled twice, or made beside the graph's gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, keep, normal

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


@_spelling.add(_Q, _Q, _Q)
def assigned_by_indices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """pbloem/former and what was copied from it."""
    scores = q @ k.mT * 8**-0.5
    later = torch.triu_indices(q.shape[2], q.shape[2], offset=1, device=q.device)
    scores[..., later[0], later[1]] = -math.inf
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def assigned_before_and_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The window of a monotonic decoder (DeepVoice 3)."""
    scores = q @ k.mT * 8**-0.5
    scores[:, :, :, :2] = -math.inf
    scores[:, :, :, 5:] = -math.inf
    return scores.softmax(-1) @ v


@_spelling.add(normal(2, 4, 7, 8), normal(2, 4, 7, 8), normal(2, 4, 7, 8), normal(2, 4, 6, 2), normal(2, 4, 6, 3))
def corner_in_another_shape(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Decomposed positions of two rows and three columns behind a class token (MViTv2)."""
    scores = q @ k.mT * 8**-0.5
    biases = rows[..., :, None] + columns[..., None, :]
    corner = scores[:, :, 1:, 1:].reshape(2, 4, 6, 2, 3) + biases
    scores[:, :, 1:, 1:] = corner.reshape(2, 4, 6, 6)
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q)
def diagonal_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No position attends to itself."""
    scores = q @ k.mT * 8**-0.5
    scores.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q)
def identity_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Locality self-attention of vision transformers for small datasets."""
    scores = q @ k.mT * 8**-0.5
    itself = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    return scores.masked_fill(itself, -torch.finfo(scores.dtype).max).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"), keep(1, 1, "L", "S"))
def filled_twice_with_a_number(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~padding, -1e10)
    return scores.masked_fill(~mask, -1e10).softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q)
def mask_made_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``TriangularCausalMask`` of Informer and what followed it."""
    scores = torch.einsum("bhld,bhsd->bhls", q, k)
    with torch.no_grad():
        mask = torch.triu(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device), diagonal=1)
    scores.masked_fill_(mask, -math.inf)
    return (8**-0.5 * scores).softmax(-1) @ v
