"""Specimens of joint attention under a mask that isolates the positions of a block from each other (PAG).

    keep[i, j] = i == j  or  i outside the block  or  j outside the block

Patches of an image see themselves and the text, and the text sees everything. Such code is read as softmax attention
(:mod:`attnrewrite.patterns.softmax`) or as a fused call (:mod:`attnrewrite.patterns.sdpa`), and
its mask from how the graph writes it (:mod:`attnrewrite.analysis.entries`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, normal

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_IMAGE = normal(2, 4, "L", 8)
_TEXT = normal(2, 4, 5, 8)


# Without attnrewrite no compiler takes it, by which its compilations could be counted.
@_spelling.add(_IMAGE, _IMAGE, _IMAGE, _TEXT, _TEXT, _TEXT, dynamic=False)
def image_isolated_from_itself(
    q: Tensor, k: Tensor, v: Tensor, q_text: Tensor, k_text: Tensor, v_text: Tensor
) -> Tensor:
    """diffusers' PAGJointAttnProcessor2_0: the image first; the diagonal is opened in place."""
    block = q.shape[2]
    q, k, v = (torch.cat(parts, dim=2) for parts in ((q, q_text), (k, k_text), (v, v_text)))
    mask = torch.zeros((q.size(2), q.size(2)), device=q.device, dtype=q.dtype)
    mask[:block, :block] = float("-inf")
    mask[:block, :block].fill_diagonal_(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], dropout_p=0.0, is_causal=False)


@_spelling.add(_IMAGE, _IMAGE, _IMAGE, _TEXT, _TEXT, _TEXT)
def image_isolated_behind_the_text(
    q: Tensor, k: Tensor, v: Tensor, q_text: Tensor, k_text: Tensor, v_text: Tensor
) -> Tensor:
    """The text first, and written out, with a mask of comparisons."""
    text = q_text.shape[2]
    q, k, v = (torch.cat(parts, dim=2) for parts in ((q_text, q), (k_text, k), (v_text, v)))
    place = torch.arange(q.shape[2], device=q.device)
    patch = place >= text
    hidden = patch[:, None] & patch[None, :] & (place[:, None] != place[None, :])
    scores = torch.einsum("nhid,nhjd->nhij", q, k) * 8**-0.5
    return torch.einsum("nhij,nhjd->nhid", scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1), v)
