"""Specimens of softmax attention: spellings of products, scales, masks and heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrewrite.patterns.sample_inputs import Specimens, additive, keep, learned, normal, padding

# Specimens. Without a word on the shape, operands are (batch, heads, length, features).

_spelling = SPECIMENS = Specimens()

_Q = normal(2, 4, "L", 8)

_K = _V = normal(2, 4, "S", 8)


@_spelling.add(_Q, _K, _V)
def divided_by_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BERT, GPT-2, and every tutorial."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    return torch.matmul(F.softmax(scores, dim=-1), v)


@_spelling.add(_Q, _K, _V)
def multiplied_by_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """timm, lucidrains."""
    scale: float = q.shape[-1] ** -0.5
    return ((q @ k.mT) * scale).softmax(dim=-1) @ v


@_spelling.add(_Q, _K, _V, learned(2, 4, "L", "S"))
def unscaled_with_bias(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor) -> Tensor:
    """T5."""
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += position_bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


@_spelling.add(_Q, _K, _V)
def scale_on_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BART, ViT."""
    q = q * q.shape[-1] ** -0.5
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def scale_on_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k / math.sqrt(k.shape[-1])
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@_spelling.add(normal(8, 8, "L"), normal(8, 8, "S"), normal(8, 8, "S"))
def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """guided-diffusion: (batch * heads, features, length)."""
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v)


@_spelling.add(normal(8, "L", 8), normal(8, "S", 8), normal(8, "S", 8))
def scores_outside_of_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ControlNet and much other code around Stable Diffusion: in float32, whatever the caller does."""
    with torch.autocast("cuda", enabled=False):
        scores = torch.einsum("bid,bjd->bij", q.float(), k.float()) * q.shape[-1] ** -0.5
    return torch.einsum("bij,bjd->bid", scores.softmax(-1).to(v.dtype), v)


@_spelling.add(normal(8, "L", 16), normal(8, "S", 16), normal(8, "S", 16))
def bmm_over_batch_and_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fairseq: (batch * heads, length, features)."""
    weights = nn.Softmax(dim=-1)(torch.bmm(q, k.transpose(1, 2)) * 0.25)
    return torch.bmm(weights, v)


@_spelling.add(normal(2, "L", 32), normal(2, "S", 32), normal(2, "S", 32))
def heads_folded_into_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CLIP, Whisper: heads are split off and folded into the batch, and back."""
    batch, length, width = q.shape
    heads = [t.view(batch, -1, 4, width // 4).transpose(1, 2).reshape(batch * 4, -1, width // 4) for t in (q, k, v)]
    weights = torch.bmm(heads[0] * 8**-0.5, heads[1].transpose(1, 2)).softmax(dim=-1)
    output = torch.bmm(weights, heads[2]).view(batch, 4, length, width // 4)
    return output.transpose(1, 2).reshape(batch, length, width)


@_spelling.add(normal(8, "L", 8), normal(8, "S", 8), normal(8, "S", 8))
def baddbmm_without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diffusers' get_attention_scores."""
    unused = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(unused, q, k.transpose(-1, -2), beta=0, alpha=0.35)
    return torch.bmm(scores.softmax(dim=-1).to(q.dtype), v)


@_spelling.add(normal(8, "L", 8), normal(8, "S", 8), normal(8, "S", 8), additive(8, 1, "S"))
def baddbmm_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """diffusers' get_attention_scores."""
    scores = torch.baddbmm(mask.expand(-1, q.shape[1], -1), q, k.transpose(-1, -2), beta=1, alpha=0.35)
    return torch.bmm(scores.softmax(dim=-1), v)


@_spelling.add(_Q, _K, _V)
def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.35
    return torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)


@_spelling.add(normal(2, "L", 4, 8), normal(2, "S", 4, 8), normal(2, "S", 4, 8))
def einsum_length_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first FlashAttention's reference: (batch, length, heads, features)."""
    scores = torch.einsum("bthd,bshd->bhts", q, k * 0.35)
    return torch.einsum("bhts,bshd->bthd", torch.softmax(scores, dim=-1), v)


@_spelling.add(normal(2, 5, "L", 8), normal(2, 5, 7, 8), normal(2, 5, 7, 8))
def einsum_over_pixels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over an image: two axes of queries and two of keys."""
    scores = torch.einsum("bhwc,bxyc->bhwxy", q, k) * 0.35
    weights = scores.flatten(-2).softmax(-1).view(scores.shape)
    return torch.einsum("bhwxy,bxyc->bhwc", weights, v)


@_spelling.add(normal(2, "L", 4, 8), normal(2, "S", 4, 8), normal(2, "S", 4, 8), padding(2, "S"))
def masked_in_place_on_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """LoFTR: the einsum is a permuted view of a product, and the mask is written into it."""
    scores = torch.einsum("nlhd,nshd->nlsh", q, k)
    scores.masked_fill_(mask[:, None, :, None], -math.inf)
    return torch.einsum("nlsh,nshd->nlhd", (scores / 8**0.5).softmax(2), v)


@_spelling.add(normal(2, 16, "L", 3), learned(48, 16))
def convolutional(x: Tensor, projection: Tensor) -> Tensor:
    """The autoencoder of Stable Diffusion: (batch, channels, height, width), one head."""
    b, c, h, w = x.shape
    q, k, v = F.conv2d(x, projection[:, :, None, None]).chunk(3, dim=1)
    q = q.reshape(b, c, h * w).permute(0, 2, 1)
    k = k.reshape(b, c, h * w)
    weights = F.softmax(torch.bmm(q, k) * (int(c) ** (-0.5)), dim=2)
    v = v.reshape(b, c, h * w)
    weights = weights.permute(0, 2, 1)
    return torch.bmm(v, weights).reshape(b, c, h, w)


@_spelling.add(normal(2, "L", 32), learned(96, 32), learned(96))
def packed_projection(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """timm's ViT."""
    b, n, c = x.shape
    qkv = F.linear(x, weight, bias).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    attn = (q @ k.transpose(-2, -1)) * 8**-0.5
    attn = attn.softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(b, n, c)


@_spelling.add(normal("L", 2, 32), learned(96, 32), learned(96), padding(2, "L"))
def multi_head_attention(x: Tensor, weight: Tensor, bias: Tensor, key_padding_mask: Tensor) -> Tensor:
    """nn.MultiheadAttention of old: (length, batch, features), its mask a float one of (batch * heads, 1, length)."""
    length, batch, width = x.shape
    q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
    q, k, v = (t.contiguous().view(length, batch * 4, width // 4).transpose(0, 1) for t in (q, k, v))
    mask = key_padding_mask.view(batch, 1, 1, length).expand(-1, 4, -1, -1).reshape(batch * 4, 1, length)
    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    weights = F.softmax(torch.baddbmm(mask, q * math.sqrt(1.0 / 8), k.transpose(-2, -1)), dim=-1)
    return torch.bmm(weights, v).transpose(0, 1).contiguous().view(length * batch, width)


@_spelling.add(normal(2, 3, "L", 32), learned(96, 32), learned(4, "L", "L"), additive(3, "L", "L"))
def shifted_windows(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Swin: windows are folded into the batch; each has a mask of its own, which is added in five dimensions."""
    x = x.flatten(0, 1)
    b, n, c = x.shape
    q, k, v = F.linear(x, weight).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
    attn = (q * 8**-0.5) @ k.transpose(-2, -1)
    attn = attn + bias.unsqueeze(0)
    windows = mask.shape[0]
    attn = attn.view(b // windows, windows, 4, n, n) + mask.unsqueeze(1).unsqueeze(0)
    attn = attn.view(-1, 4, n, n).softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(b, n, c)


@_spelling.add(normal(2, 3, 4, "L", 8), normal(2, 3, 4, "S", 8), normal(2, 3, 4, "S", 8))
def five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Video and axial models: (batch, frames, heads, length, features)."""
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, additive(2, 1, "L", "S"))
def additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5 + mask).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, additive(2, 1, 1, "S"))
def mask_before_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1) + mask) / 8**0.5).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, additive("S"))
def mask_of_rank_1(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5 + mask).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, additive("L", "S"))
def mask_of_rank_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (mask + q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v


@_spelling.add(normal(2, "L", 8), normal(2, "S", 8), normal(2, "S", 8), additive(2, "L", "S"))
def mask_of_rank_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5 + mask).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, learned(4, "L", "S"), additive(2, 1, 1, "S"), learned("L", "S"))
def several_terms(q: Tensor, k: Tensor, v: Tensor, heads: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 8**0.5 - positions
    scores = scores + heads + mask
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, "S", dtype=torch.int64))
def lowest_number_added(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """transformers before 4.50: get_extended_attention_mask."""
    mask = attention_mask[:, None, None, :].to(dtype=q.dtype)
    mask = (1.0 - mask) * torch.finfo(q.dtype).min
    return nn.functional.softmax(q @ k.transpose(-1, -2) / math.sqrt(8) + mask, dim=-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def filled_with_minus_infinity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 8**-0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S", dtype=torch.int64))
def filled_with_a_billion(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The Annotated Transformer."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(mask == 0, -1e9)
    return torch.matmul(scores.softmax(dim=-1), v)


@_spelling.add(_Q, _K, _V, padding(2, 1, 1, "S"))
def filled_with_lowest_number(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """lucidrains."""
    dots = torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5
    dots.masked_fill_(mask, -torch.finfo(dots.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", dots.softmax(-1), v)


@_spelling.add(_Q, _Q, _Q)
def chosen_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2: a causal mask, and the lowest number as a tensor."""
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / torch.full([], v.size(-1) ** 0.5, dtype=scores.dtype, device=scores.device)
    length = q.size(-2)
    mask = torch.tril(torch.ones((length, length), dtype=torch.bool, device=q.device)).view(1, 1, length, length)
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    scores = torch.where(mask, scores.to(scores.dtype), lowest)
    return torch.matmul(nn.functional.softmax(scores, dim=-1), v)


@_spelling.add(_Q, _Q, _Q)
def causal_by_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nanoGPT, whose mask is a buffer; here it is made on the spot."""
    length = q.shape[-2]
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(torch.tril(torch.ones(length, length, device=q.device)) == 0, float("-inf"))
    return F.dropout(F.softmax(att, dim=-1), p=0.1, training=False) @ v


@_spelling.add(_Q, _Q, _Q)
def causal_by_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama's first release, CLIP: nn.Transformer.generate_square_subsequent_mask."""
    length = q.shape[-2]
    mask = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device)
    mask = torch.triu(mask, diagonal=1)
    return (q @ k.transpose(2, 3) / math.sqrt(8) + mask).softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q)
def causal_by_comparison(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[-2], device=q.device)
    future = position[None, :] > position[:, None]
    scores = (q @ k.mT).div(math.sqrt(8)).masked_fill(future, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q, keep(2, "L"))
def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
    """MPT, Falcon: one boolean mask of both."""
    position = torch.arange(q.shape[-2], device=q.device)
    mask = (position[:, None] >= position)[None, None] & attended[:, None, None, :]
    return (q @ k.mT * 0.35).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@_spelling.add(normal(2, 4, 1, 8), _K, _V, keep(2, "S"))
def single_query(q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
    """A step of decoding."""
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~attended[:, None, None], float("-inf"))
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 8**-0.5
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


@_spelling.add(_Q, _K, _V)
def scores_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query and key are cast up before their product."""
    scores = q.float() @ k.float().transpose(-2, -1) * 8**-0.5
    return scores.softmax(-1).to(v.dtype) @ v


@_spelling.add(_Q, _K, _V)
def dropout_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout((q @ k.mT / 8**0.5).softmax(-1), p=0.0, training=True)
    return (weights @ v).transpose(1, 2).contiguous()


@_spelling.add(normal(2, 6, "L", 8), normal(2, 2, "S", 8), normal(2, 2, "S", 8))
def grouped_by_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama's repeat_kv."""
    b, heads, length, width = k.shape
    k = k[:, :, None, :, :].expand(b, heads, 3, length, width).reshape(b, heads * 3, length, width)
    v = v[:, :, None, :, :].expand(b, heads, 3, length, width).reshape(b, heads * 3, length, width)
    return (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v


@_spelling.add(normal(2, 6, "L", 8), normal(2, 2, "S", 8), normal(2, 2, "S", 8))
def grouped_by_repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(3, dim=1), torch.repeat_interleave(v, 3, dim=1)
    return (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v


@_spelling.add(normal(2, 6, "L", 8), normal(2, 2, "S", 8), normal(2, 2, "S", 8), additive(2, 1, 1, "S"))
def grouped_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The query is reshaped into groups, and the keys broadcast over them."""
    b, heads, length, width = q.shape
    q = q.reshape(b, heads // 3, 3, length, width)
    scores = q @ k[:, :, None].transpose(-2, -1) * 8**-0.5 + mask[:, :, None]
    return (scores.softmax(-1) @ v[:, :, None]).reshape(b, heads, length, width)


@_spelling.add(normal(2, "L", 6, 8), normal(2, "S", 2, 8), normal(2, "S", 2, 8))
def grouped_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.view(q.shape[0], -1, 2, 3, 8)
    weights = torch.einsum("blhgd,bshd->bhgls", q, k).mul(8**-0.5).softmax(-1)
    return torch.einsum("bhgls,bshd->blhgd", weights, v).flatten(2, 3)


@_spelling.add(normal(2, 4, "L", 8), normal(2, "S", 8), normal(2, "S", 8))
def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PaLM: one key and value for all heads."""
    weights = (torch.einsum("bhid,bjd->bhij", q, k) * 8**-0.5).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v)


@_spelling.add(normal(2, 4, "L", 8), normal(2, 1, "S", 8), normal(2, 1, "S", 8))
def multi_query_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """StarCoder: the heads stand beside the queries, in one product a batch."""
    b, heads, length, width = q.shape
    q = q.transpose(1, 2).reshape(b, length * heads, width)
    scores = torch.bmm(q, k[:, 0].transpose(1, 2)).view(b, length, heads, -1) * 8**-0.5
    weights = scores.softmax(-1).view(b, length * heads, -1)
    return torch.bmm(weights, v[:, 0]).view(b, length, heads, width).transpose(1, 2)


@_spelling.add(_Q, _K, _V)
def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys first: the scores, the weights and the result are transposed."""
    return v.transpose(-1, -2) @ (k @ q.transpose(-1, -2) * 8**-0.5).softmax(-2)


@_spelling.add(_Q, _Q, _Q, learned(4))
def bias_by_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi."""
    position = torch.arange(q.shape[-2], device=q.device)
    bias = -(position[:, None] - position[None, :]).abs() * slopes[:, None, None]
    return ((q @ k.mT) * 8**-0.5 + bias).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, learned())
def learned_temperature(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return (q @ k.mT * temperature.exp()).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, learned(4, 1, 1))
def learned_temperature_of_heads(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor) -> Tensor:
    """Swin v2: cosine attention."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()).softmax(-1) @ v


@_spelling.add(normal(2, 32, "L"), learned(96, 32), learned(4, 1, 1), dynamic=False)
def across_channels(x: Tensor, weight: Tensor, temperature: Tensor) -> Tensor:
    """Restormer, XCiT: channels attend to channels."""
    q, k, v = (torch.einsum("oc,bcn->bon", weight, x)).chunk(3, dim=1)
    q, k, v = (t.reshape(t.shape[0], 4, 8, -1) for t in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = (q @ k.transpose(-2, -1) * temperature).softmax(dim=-1)
    return (weights @ v).flatten(1, 2)


@_spelling.add(_Q, _K, _V, _Q)
def cross_attention_with_residual(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Query and key lengths differ; what comes after is not part of the attention."""
    scores = q @ k.mT
    scores *= 8**-0.5
    return torch.add(x, scores.softmax(-1) @ v) * 2


@_spelling.add(_Q, normal(2, 4, "S", 8), normal(2, 4, "S", 24))
def wider_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeepSeek, Perceiver: the values have another width than the keys."""
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q, learned("L", "L"), sites=2)
def two_layers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The result of one attention is the query, the key and the value of the next."""
    x = (q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v
    return (x @ x.mT * 8**-0.5 + bias).softmax(-1) @ x


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def mask_of_zeros_and_ones(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The first GPT."""
    kept = mask.to(q.dtype)
    return (q @ k.mT * 8**-0.5 * kept + (1.0 - kept) * -1e9).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, padding(2, 4, "L", "S"))
def mask_by_index(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    scores[mask] = float("-inf")
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V, keep(2, 1, 1, "S"))
def floor_under_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """OPT, XGLM."""
    lowest = torch.finfo(q.dtype).min
    scores = q @ k.mT * 8**-0.5 + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, lowest)
    return torch.max(scores, torch.tensor(lowest, dtype=q.dtype, device=q.device)).softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q)
def causal_within_a_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mistral."""
    position = torch.arange(q.shape[-2], device=q.device)
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0) & (distance < 4)
    return (q @ k.mT * 8**-0.5).masked_fill(~seen, float("-inf")).softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q, keep(2, "L", dtype=torch.int64))
def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """Packed sequences: tokens of one document see each other."""
    same = document[:, None, :, None] == document[:, None, None, :]
    return (q @ k.mT * 8**-0.5).masked_fill(~same, float("-inf")).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, normal("S", 8))
def two_terms(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Transformer-XL, DeBERTa: a second product beside that of query and key."""
    return ((q @ positions.T + q @ k.mT) * 8**-0.5).softmax(-1) @ v


@_spelling.add(normal(2, 4, 8), _K, _V)
def one_query_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A product is a sum of elementwise products."""
    weights = (q.unsqueeze(2) * k).sum(-1).mul(8**-0.5).softmax(-1)
    return (weights.unsqueeze(-1) * v).sum(dim=2)


@_spelling.add(normal("L", 8), normal("S", 8), normal("S", 8))
def products_by_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(q, k).div(8**0.5).softmax(-1), v.T)


@_spelling.add(_Q, _K, _V, learned(4))
def scale_within_einsum(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd,h->bhij", q, k, temperature)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@_spelling.add(_Q, _K, _V, additive(2, 1, 1, "S"), learned(4, 1, 1))
def temperature_after_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
    return ((q @ k.mT * 8**-0.5 + mask) / temperature.exp()).softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def chunks_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [(part @ k.mT * 8**-0.5).softmax(-1) @ v for part in q.chunk(2, dim=2)]
    return torch.cat(parts, dim=2)


@_spelling.add(_Q, _K, _K, _Q, sites=2)
def scores_used_both_ways(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Text attends to the image, and the image to the text."""
    scores = q @ k.mT * 8**-0.5
    return scores.softmax(-1) @ v, scores.mT.softmax(-1) @ u


@_spelling.add(_Q, _K, _V, normal(2, 4, "S", 3), sites=2)
def weights_of_two_values(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Features and coordinates by the same weights."""
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    return weights @ v, weights @ positions


@_spelling.add(_Q, normal(2, 4, 5, 8), normal(2, 4, "L", 8), normal(2, 4, 5, 8), normal(2, 4, "L", 8))
def cached_keys(q: Tensor, past_k: Tensor, k: Tensor, past_v: Tensor, v: Tensor) -> Tensor:
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


class _Filled(nn.Module):
    """The mask and what it fills in, both buffers."""

    bias: Tensor
    masked_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril())
        self.register_buffer("masked_bias", torch.tensor(-1e9))

    def forward(self, scores: Tensor) -> Tensor:
        length = scores.shape[-1]
        return torch.where(self.bias[:, :, :length, :length].bool(), scores, self.masked_bias)


_filled = {device: _Filled().to(device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))}


@_spelling.add(_Q, _Q, _Q)
def filled_from_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2, GPT-J and GPT-Neo of transformers up to 4.20, Decision Transformer."""
    scores: Tensor = _filled[q.device.type](q @ k.transpose(-1, -2) / 8**0.5)
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _Q, _Q, learned(4, 11, 11), dynamic=False)
def bias_of_a_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """MViT: relative positions of the patches, and none of the class token."""
    scores = q @ k.mT * 8**-0.5
    scores[:, :, 1:, 1:] += bias
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def assigned_to_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last key is for the first two queries alone."""
    scores = q @ k.mT * 8**-0.5
    scores[:, :, 2:, -1] = -math.inf
    return scores.softmax(-1) @ v


# Operators by their other names.


@_spelling.add(_Q, _K, _V, learned("L", "S"))
def other_names_of_arithmetic(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.linalg.matmul(q, k.swapaxes(-1, -2)).true_divide(4.0).multiply(1.5)
    scores = torch.subtract(scores, bias).clip(-50.0, 50.0)
    weights: Tensor = torch.special.softmax(scores, dim=-1)
    return weights.matmul(v)


@_spelling.add(_Q, _Q, _Q, keep(2, 1, 1, "L"))
def other_names_in_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows = torch.arange(q.shape[2], device=q.device)
    later = torch.less(rows[:, None], rows)
    scores = torch.divide(q @ k.mT, 3.0).masked_fill(torch.logical_or(later, mask.logical_not()), -torch.inf)
    return scores.softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def scores_by_vecdot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores: Tensor = torch.linalg.vecdot(q[..., :, None, :], k[..., None, :, :])
    return scores.divide(8**0.5).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, learned("L", "S"), learned(4, 1, 1))
def scores_by_addcmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, temperature: Tensor) -> Tensor:
    return torch.addcmul(bias, q @ k.mT, temperature, value=0.5).softmax(-1) @ v


@_spelling.add(_Q, _K, _V)
def heads_by_hstack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = zip(*(torch.split(t, 2, dim=1) for t in (q, k, v)), strict=True)
    return torch.hstack([(a @ b.mT * 8**-0.5).softmax(-1) @ c for a, b, c in pairs])


@_spelling.add(_Q, _K, _V, learned(4))
def sinks_by_concat(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.concat([scores, column], dim=-1).softmax(-1)[..., :-1] @ v


@_spelling.add(_Q, _K, _V, learned(4))
def batch_norm_of_scores(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Axial attention (Medical Transformer): stored statistics of each head, and a sum over one kind of scores."""
    mean, variance = (torch.linspace(low, 2.0, 4, dtype=q.dtype, device=q.device) for low in (-1.0, 0.5))
    scores = F.batch_norm(torch.einsum("bgic,bgjc->bgij", q, k), mean, variance, 1.0 + weight, mean / 2)
    batch, heads, queries, keys = scores.shape
    scores = scores.reshape(batch, 1, heads, queries, keys).sum(dim=1)
    return torch.einsum("bgij,bgjc->bgic", scores.softmax(-1), v)


@_spelling.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def mask_by_lowered_scores(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Keras: scores are lowered where they are masked, by a choice between them and less."""
    scores = q @ k.mT * 8**-0.5
    return torch.where(kept, scores, scores - 1e9).softmax(-1) @ v


@_spelling.add(_Q, _K, _V, learned("L", "S"))
def bias_where_one_holds(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT * 8**-0.5
    near = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril().triu(-2)
    return torch.where(near, bias + scores, scores - 2.0).softmax(-1) @ v
