"""Specimens of softmax attention whose softmax is written in another way, or whose weights are changed after it.

Subtracting a row's maximum changes nothing. ``exp(x) / (exp(x).sum() + exp(s))`` is softmax with one more key that has
no value, a sink of score ``s``. Zeroing weights that were masked changes only rows that have no key. The rule is that
of softmax attention (:mod:`attnrewrite.patterns.softmax`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, additive, keep, learned, normal, padding

__all__ = ["SPECIMENS"]

_spelling = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


# Softmax, written otherwise.


@_spelling.add(_Q, _K, _V)
def less_its_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    return (scores - scores.amax(dim=-1, keepdim=True)).softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def less_its_detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """lucidrains' stable softmax."""
    scores = q @ k.mT * 8**-0.5
    scores = scores - scores.max(dim=-1, keepdim=True).values.detach()
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def less_the_maximum_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GLIP, Grounding DINO."""
    scores = q @ k.mT * 8**-0.5
    return (scores - scores.max()).softmax(-1) @ v


@_spelling.add(normal(2, 16, "L"))
def less_than_the_maximum(x: Tensor) -> Tensor:
    """Attention between channels of DANet: the least similar ones weigh most."""
    scores = x @ x.mT / 4
    scores = scores.max(-1, keepdim=True)[0].expand_as(scores) - scores
    return scores.softmax(-1) @ x


@_spelling.add(_Q, _K, _V)
def less_its_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    return (scores - scores.mean(dim=-1, keepdim=True)).softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def exponentials_over_their_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT * 8**-0.5)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@_spelling.add(_Q, _K, _V, additive(2, 1, 1, "S"))
def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5 + mask
    weights = (scores - scores.max(dim=-1, keepdim=True)[0]).exp()
    return (weights / weights.sum(dim=-1).unsqueeze(-1)) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def masked_exponentials(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT * 8**-0.5) * mask
    return (weights / weights.sum(-1, keepdim=True)) @ v


@_spelling.add(_Q, _K, _V)
def exponential_of_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * 8**-0.5, dim=-1).exp() @ v


@_spelling.add(_Q, _K, _V)
def less_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


@_spelling.add(_Q, _K, _V, padding(2, 1, 1, "S"))
def exponentials_that_underflow(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A row without a key is 0 / 0 here, where softmax would give the mean of the values."""
    weights = (q @ k.mT * 8**-0.5).masked_fill(mask, torch.finfo(q.dtype).min).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"))
def divided_after_the_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


# One more key that has no value.


@_spelling.add(_Q, _K, _V)
def softmax_plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that may attend to nothing."""
    weights = (q @ k.transpose(-2, -1) / 8**0.5).exp()
    return weights / (1 + weights.sum(-1, keepdim=True)) @ v


@_spelling.add(_Q, _K, _V)
def stable_softmax_plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - highest)
    return weights / (torch.exp(-highest) + weights.sum(-1, keepdim=True)) @ v


@_spelling.add(_Q, _K, _V)
def softmax_plus_one_of_a_clamped_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    highest = scores.amax(-1, keepdim=True).clamp(min=0)
    weights = torch.exp(scores - highest)
    return weights / (torch.exp(-highest) + weights.sum(-1, keepdim=True)) @ v


@_spelling.add(_Q, _K, _V)
def over_a_clamped_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum of exponentials of scores less their maximum is at least one."""
    scores = q @ k.mT * 8**-0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ v


@_spelling.add(_Q, _K, _V)
def sink_of_a_number_less_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch Geometric's restricted softmax."""
    scores = q @ k.mT * 8**-0.5
    highest = scores.amax(-1, keepdim=True).clamp(min=0)
    weights = (scores - highest).exp()
    return weights / (weights.sum(-1, keepdim=True) + (0.0 - highest).exp()) @ v


@_spelling.add(_Q, _K, _V)
def padded_with_a_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.pad(q @ k.mT * 8**-0.5, (1, 0))
    return scores.softmax(-1)[..., 1:] @ v


@_spelling.add(_Q, _K, _V, learned(4, 1, 1))
def attention_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 8**0.5
    scores = torch.cat([scores, sinks.expand(scores.shape[0], -1, scores.shape[2], 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


@_spelling.add(normal(2, 4, "L", 8), normal(2, 2, "S", 8), normal(2, 2, "S", 8), learned(4), keep(2, 1, 1, "S"))
def attention_sinks_and_a_mask(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    """gpt-oss."""
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], 4, -1, 8) for t in (k, v))
    scores = q @ k.transpose(2, 3) * 8**-0.5
    scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    weights = F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
    return weights @ v


# Weights that are changed after softmax.


@_spelling.add(_Q, _K, _V)
def divided_by_their_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    return weights / weights.sum(-1, keepdim=True) @ v


@_spelling.add(_Q, _K, _V, normal(4, "L", "S"), learned(4))
def mixture_divided_by_its_sum(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, gating: Tensor) -> Tensor:
    """ConViT: content and positions, mixed by a gate for each head."""
    content, places = (q @ k.mT * 8**-0.5).softmax(-1), positions.expand(q.shape[0], -1, -1, -1).softmax(-1)
    gate = gating.view(1, -1, 1, 1)
    weights = (1.0 - torch.sigmoid(gate)) * content + torch.sigmoid(gate) * places
    weights = weights / weights.sum(dim=-1).unsqueeze(-1)
    return weights @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"))
def masked_weights_are_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """ESPnet, WeNet: so that a row without a key gives zero."""
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(~mask, 0.0) @ v


@_spelling.add(_Q, _K, _V, padding(2, 1, "L", "S"))
def masked_by_a_small_number_and_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """NeMo: what is zeroed adds to the sum of its row all the same, and does so where scores are as low."""
    scores = (q @ k.mT * 8**-0.5).masked_fill(mask, -10000.0)
    return scores.softmax(-1).masked_fill(mask, 0.0) @ v


@_spelling.add(_Q, _K, _V, padding(2, 1, "L", "S"))
def infinite_rows_are_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(mask, -math.inf)
    return scores.softmax(-1).masked_fill(mask, 0.0) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"))
def multiplied_by_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -1e9)
    return (scores.softmax(-1) * mask) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def nan_to_num(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def nan_replaced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (q @ k.mT * 8**-0.5).masked_fill(~mask, -math.inf).softmax(-1)
    return torch.where(weights.isnan(), 0.0, weights) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def empty_rows_are_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(empty, 0.0, scores.softmax(-1)) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def decomposed_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` after ``ExportedProgram.run_decompositions()`` and in torch.onnx."""
    scale = 8**-0.25
    kept, masked = (torch.scalar_tensor(number, dtype=q.dtype, device=q.device) for number in (0.0, -math.inf))
    mask = torch.where(mask, kept, masked)
    scores = torch.bmm((q * scale).flatten(0, 1), (k.mT * scale).flatten(0, 1))
    scores = scores.view(*q.shape[:3], k.shape[2]) + mask
    weights = torch.ops.aten._softmax(scores, -1, False)
    attended = torch.logical_not(scores == -math.inf).any(-1, True)
    weights = torch.where(torch.logical_not(attended), torch.full_like(scores, 0), weights)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(*q.shape[:3], v.shape[3])


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def decomposed_further(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same with its softmax decomposed as well."""
    scores = (q * 8**-0.25) @ (k * 8**-0.25).mT + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = exponentials / exponentials.sum(-1, keepdim=True)
    return torch.where((scores != -math.inf).any(-1, keepdim=True), weights, torch.zeros_like(weights)) @ v


@_spelling.add(_Q, _K, _V, additive(2, 1, "L", "S"))
def empty_by_their_maximum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5 + mask
    empty = scores.detach().max(-1).values.isneginf()
    return scores.softmax(-1).masked_fill(empty.unsqueeze(-1), 0.0) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"))
def masked_weights_over_their_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """AllenNLP's masked_softmax: masked scores are zero, and count beside the small number alone."""
    weights = ((q @ k.mT * 8**-0.5) * mask).softmax(-1) * mask
    return (weights / (weights.sum(-1, keepdim=True) + 1e-13)) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"))
def masked_weights_over_their_sum_after_the_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (q @ k.mT * 8**-0.5).softmax(-1) * mask
    return (weights @ v) / weights.sum(-1).clamp(min=1e-9).unsqueeze(-1)


@_spelling.add(_Q, _K, _V, learned(4, 1, "S"), keep(2, 1, "L", "S"))
def gated_weights_over_their_sum(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = (scores.softmax(-1) * gate.sigmoid()).masked_fill(~mask, 0.0)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


@_spelling.add(_Q, _K, _V, learned(4))
def head_mask(q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Tensor:
    """transformers before 5."""
    return ((q @ k.mT * 8**-0.5).softmax(-1) * heads.view(1, -1, 1, 1)) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", 1), keep(2, 1, 1, "S"))
def multiplied_by_padding(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    return ((q @ k.mT * 8**-0.5).softmax(-1) * queries * keys) @ v


@_spelling.add(normal(2, "L", 8), normal(2, "S", 8), normal(2, "S", 8), keep(2, "L"))
def multiplied_by_a_repeated_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Transformer-TTS, and other ports of Kyubyong Park's transformer: padded queries give zero."""
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    return (weights * mask.unsqueeze(-1).repeat(1, 1, k.shape[1]).to(weights.dtype)) @ v


@_spelling.add(_Q, _K, _V, learned(4))
def multiplied_by_an_expanded_gate(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    return (gate.sigmoid().view(1, -1, 1, 1).expand(*weights.shape) * weights) @ v


@_spelling.add(_Q, _K, _V, learned(2, 1, "L", 1))
def divided_by_a_tiled_size(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    return (weights / (1 + size**2).tile(1, 4, 1, k.shape[2])) @ v


@_spelling.add(_Q, _K, _V, keep(2, 4, "L", "S"))
def assigned_before_and_after(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked by assignment, and zero in a row without a key."""
    scores = q @ k.mT * 8**-0.5
    scores[~mask] = -math.inf
    weights = scores.softmax(-1).clone()
    weights[~mask] = 0
    return weights @ v


# Around a maximum that is the row's own, and beside the one of softmax plus one.


@_spelling.add(_Q, _K, _V, learned(1, 4, 1, 1))
def merged_heads_less_their_maximum(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Heads are folded into the batch only around a softmax by hand."""
    scores = (q @ k.mT * temperature).flatten(0, 1)
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = exponentials / exponentials.sum(-1, keepdim=True)
    return weights.view(2, 4, q.shape[2], k.shape[2]) @ v


@_spelling.add(_Q, _K, _V)
def bounded_below_its_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention between words and image regions of GLIP and Grounding DINO."""
    scores = q @ k.mT * 8**-0.5
    scores = scores - torch.max(scores, dim=-1, keepdim=True)[0]
    scores = torch.clamp(torch.clamp(scores, min=-50000), max=50000)
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V, learned(2, 4, "L", "S"), keep(2, 1, "L", "S"))
def zeroed_beside_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Softmax plus one, whose masked weights are zero before they are set to zero."""
    scores = (q @ k.mT * 8**-0.5 + bias).masked_fill(~mask, -math.inf)
    exponentials = scores.exp()
    weights = exponentials / (1 + exponentials.sum(-1, keepdim=True))
    return weights.masked_fill(~mask, 0.0) @ v


# Masks on both sides of a maximum: a row that the first masks as a whole is raised, and the second decides.


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"), keep(2, 1, "L", "S"))
def filled_before_and_after_its_maximum(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 8**-0.5).masked_fill(~padding, torch.finfo(q.dtype).min)
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, additive(2, 1, "L", "S"), keep(2, 1, "L", "S"))
def masked_before_and_after_its_maximum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5 + bias
    scores = (scores - scores.amax(-1, keepdim=True)) * 0.5
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, additive(2, 1, "L", "S"), additive(2, 1, "L", "S"))
def added_before_and_after_its_maximum(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
    """The temperature raises what the first mask has left."""
    scores = q @ k.mT * 8**-0.5 + padding
    scores = (scores - scores.amax(-1, keepdim=True)) * 1.5
    return (scores + mask).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"), learned(4, "L", "S"))
def zeroed_before_a_bias_beside_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """What is added to minus infinity leaves it what it is."""
    exponentials = ((q @ k.mT * 8**-0.5).masked_fill(~mask, -math.inf) + bias).exp()
    weights = exponentials / (1 + exponentials.sum(-1, keepdim=True))
    return weights.masked_fill(~mask, 0.0) @ v
