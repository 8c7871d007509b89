r"""Specimens of guidance by perturbed attention (PAG): a part of the batch is not attended.

    result = cat([softmax(mods(query[:n] @ key[:n])) @ value[:n], value[n:]]) @ output

The part that is not attended takes its value as it is. Projections of value and result, which are written for each
part, are those of the whole batch (:mod:`attnrewrite.passes.join_projections`).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, learned, normal

__all__ = ["LINEAR_SPECIMENS", "SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_W = learned(32, 32)
_B = learned(32)


def _attended(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(x.shape[0], -1, 4, 8).transpose(1, 2) for w in (wq, wk, wv))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 32)


@_spelling.add(normal(4, "L", 32), _W, _W, _W, _W, _B)
def identity_of_half_the_batch(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bias: Tensor) -> Tensor:
    """diffusers' PAGIdentitySelfAttnProcessor2_0."""
    kept, perturbed = x.chunk(2)
    kept = F.linear(_attended(kept, wq, wk, wv), wo, bias)
    perturbed = F.linear(F.linear(perturbed, wv), wo, bias)
    return torch.cat([kept, perturbed]) / 1.0


@_spelling.add(normal(6, 32, 3, "L"), _W, _W, _W, _W, _B, learned(32))
def identity_of_a_third_of_images(
    x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bias: Tensor, scale: Tensor
) -> Tensor:
    """diffusers' PAGCFGIdentitySelfAttnProcessor2_0, of images, with a norm of groups."""
    b, c, h, w = x.shape
    without, text, perturbed = x.view(b, c, h * w).transpose(1, 2).chunk(3)
    kept = torch.cat([without, text])
    kept, perturbed = (F.group_norm(t.transpose(1, 2), 8, scale).transpose(1, 2) for t in (kept, perturbed))
    kept = F.linear(_attended(kept, wq, wk, wv), wo, bias)
    perturbed = F.linear(F.linear(perturbed, wv), wo, bias)
    kept, perturbed = (t.transpose(-1, -2).reshape(-1, c, h, w) for t in (kept, perturbed))
    return (torch.cat([kept, perturbed]) + x) / 1.5


@_spelling.add(normal(3, "L", 32), learned(96, 32), _W, _B)
def skipped_attention(tokens: Tensor, qkv: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    """From scratch: the last entry of the batch skips attention, and each part has its own residual."""
    wq, wk, wv = qkv.chunk(3)
    through, skip = tokens[:2], tokens[2:]
    q, k, v = (F.linear(through, w).reshape(2, -1, 4, 8) for w in (wq, wk, wv))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    halves = [through + F.linear(mixed, out, bias) * 0.7, skip + F.linear(F.linear(skip, wv), out, bias) * 0.7]
    return torch.cat(halves, dim=0)


# Without a softmax.

_linear = LINEAR_SPECIMENS = Specimens()
_recognized = partial(_linear.add, status="recognized")


@_recognized(normal(6, "L", 32), _W, _W, _W, _W, _B)
def identity_without_a_softmax(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bias: Tensor) -> Tensor:
    """diffusers' PAGCFGSanaLinearAttnProcessor2_0."""
    without, text, perturbed = x.chunk(3)
    kept = torch.cat([without, text])
    q, k, v = (rearrange(F.linear(kept, w), "b n (h d) -> b h d n", h=8) for w in (wq, wk, wv))
    q, k = F.relu(q).float(), F.relu(k.transpose(2, 3)).float()
    kept = F.pad(v.float(), (0, 0, 0, 1), value=1.0) @ k @ q
    kept = kept[:, :, :-1] / (kept[:, :, -1:] + 1e-15)
    kept = F.linear(kept.flatten(1, 2).transpose(1, 2).to(x.dtype), wo, bias)
    perturbed = F.linear(F.linear(perturbed, wv).to(x.dtype), wo, bias)
    return torch.cat([kept, perturbed])


@_recognized(normal(3, "L", 32), learned(96, 32), _W)
def skipped_attention_without_a_softmax(tokens: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    """From scratch: the last entry of the batch skips attention."""
    wq, wk, wv = qkv.chunk(3)
    through, skip = tokens.tensor_split([2])
    q, k, v = (rearrange(F.linear(through, w), "b n (g c) -> b g n c", g=8) for w in (wq, wk, wv))
    q, k = q.sigmoid(), k.sigmoid()
    mixed = q @ (k.mT @ v) / (q @ k.sum(dim=2)[..., None])
    mixed = rearrange(mixed, "b g n e -> b n (g e)")
    return torch.cat([F.linear(mixed, out), F.linear(F.linear(skip, wv), out)])
