r"""Specimens of attention whose keys and values are repeated over frames, batches or heads.

    result[f] = softmax(mods(query[f] @ key)) @ value    for all f
    result    = softmax(mods(fold(query) @ key)) @ value,    fold(query): f and the query positions as one length

Rows of softmax are independent of each other, so the copies need not be made. Key and value lack the axis over
which they are repeated, however that was written (:mod:`attnrewrite.passes.unrepeat_kv`). Whether that axis then counts
as more queries or as more heads depends on how the query lies in memory (:mod:`attnrewrite.passes.fold_batches`).
"""

from __future__ import annotations

import einops
import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, additive, learned, normal

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_FRAMES = normal(6, "L", 32)
"""Two videos of three frames."""
_W = learned(32, 32)


def _heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, 4, 8).transpose(1, 2)


def _of_first_frame(x: Tensor, frames: int) -> Tensor:
    """Text2Video-Zero: every frame is given the first one's."""
    x = x.reshape(x.shape[0] // frames, frames, x.shape[1], x.shape[2])
    return x[:, [0] * frames].reshape(-1, x.shape[2], x.shape[3])


@_spelling.add(_FRAMES, _W, _W, _W)
def keys_of_the_first_frame(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """diffusers' CrossFrameAttnProcessor."""
    q, k, v = x @ wq, _of_first_frame(F.linear(x, wk), 3), _of_first_frame(F.linear(x, wv), 3)
    q, k, v = (_heads(t).reshape(24, -1, 8) for t in (q, k, v))
    start = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    weights = torch.baddbmm(start, q, k.transpose(-1, -2), beta=0, alpha=8**-0.5).softmax(dim=-1)
    return torch.bmm(weights, v).reshape(6, 4, -1, 8).transpose(1, 2).reshape(6, -1, 32)


@_spelling.add(_FRAMES, _W, _W, _W, additive(6, 1, 1, "L"))
def keys_of_the_first_frame_with_a_mask(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, mask: Tensor) -> Tensor:
    """diffusers' CrossFrameAttnProcessor2_0: every frame masks the keys in its own way."""
    q, k, v = _heads(x @ wq), _heads(_of_first_frame(x @ wk, 3)), _heads(_of_first_frame(x @ wv, 3))
    hidden = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
    return hidden.transpose(1, 2).reshape(6, -1, 32)


@_spelling.add(_FRAMES, _W, _W, _W, learned(6, 4, "L", "L"))
def keys_of_the_last_frame_with_a_bias(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bias: Tensor) -> Tensor:
    """The bias has every query position of every frame, and is folded as the query is."""
    pick = torch.full((3,), 2, dtype=torch.int64, device=x.device)
    k, v = (torch.index_select((x @ w).view(2, 3, -1, 32), 1, pick).flatten(0, 1) for w in (wk, wv))
    q, k, v = _heads(x @ wq), _heads(k), _heads(v)
    return ((q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


@_spelling.add(normal(6, "L", 4, 8), normal(2, "S", 4, 8), normal(2, "S", 4, 8))
def reference_view(looking: Tensor, seen: Tensor, told: Tensor) -> Tensor:
    """A multi-view model: all views look at one, repeated by einops."""
    seen, told = (einops.repeat(part, "scene n h d -> (scene view) n h d", view=3) for part in (seen, told))
    affinity = torch.einsum("vqhd,vkhd->vhqk", looking / 8**0.5, seen)
    return torch.einsum("vhqk,vkhd->vqhd", affinity.softmax(-1), told).flatten(2)


@_spelling.add(normal(2, 3, "L", 32), normal(2, 3, "S", 32), normal(2, 3, "S", 32))
def anchored_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A gather with an index of zeros, and no heads."""
    anchor = torch.zeros(1, 3, 1, 1, dtype=torch.int64, device=k.device).expand(2, -1, k.shape[2], 32)
    k, v = torch.gather(k, 1, anchor), torch.gather(v, 1, anchor)
    return F.scaled_dot_product_attention(q, k, v)


@_spelling.add(_FRAMES, normal(2, "S", 16), _W, learned(32, 16), learned(32, 16), learned(32))
def text_repeated_over_frames(x: Tensor, text: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bias: Tensor) -> Tensor:
    """AnimateDiff: the text is repeated before it is projected."""
    text = text.repeat_interleave(3, dim=0)
    q, k, v = _heads(x @ wq), _heads(F.linear(text, wk)), _heads(F.linear(text, wv, bias))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(6, -1, 32)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = x[..., :4], x[..., 4:]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, kept], dim=-1)


@_spelling.add(
    normal(2, 6, "L", 8), normal(2, 2, "L", 8), normal(2, 2, "L", 8), normal("L", 4), normal("L", 4), learned(8)
)
def repeated_before_the_rotation(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: Tensor) -> Tensor:
    """diffusers' StableAudioAttnProcessor2_0: key heads are repeated, normalized and rotated."""
    k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    q, k = F.layer_norm(q, (8,), scale), F.layer_norm(k, (8,), scale)
    return F.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)


@_spelling.add(normal(2, 6, "L", 8), normal(2, 3, "S", 8), normal(2, 3, "S", 8))
def key_heads_by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of three key heads the last two serve three query heads each."""
    owner = 1 + torch.arange(6) // 3
    return F.scaled_dot_product_attention(q, k[:, owner], v[:, owner])


@_spelling.add(_FRAMES)
def causal_over_the_first_frame(x: Tensor) -> Tensor:
    """Positions count: the frames are heads that share their keys, and no further queries."""
    q, k = _heads(x), _heads(_of_first_frame(x, 3))
    return F.scaled_dot_product_attention(q, k, k, is_causal=True)
