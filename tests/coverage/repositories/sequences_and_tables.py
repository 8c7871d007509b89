"""More of sequences: language, speech, proteins, time series, recommendation, games and tables."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from tests.coverage.case import Case
from tests.support.zoo import noise

__all__ = ["CASES"]


def _ends(*lengths: int, longest: int) -> Tensor:
    """True up to the length of each sample."""
    return torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]


def _rotated(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def _angles(positions: Tensor, size: int) -> Tensor:
    inv_freq = 1.0 / (10000 ** (torch.arange(0, size, 2).float() / size))
    freqs = positions.float()[..., None] * inv_freq
    return torch.cat((freqs, freqs), dim=-1)


class TwoPositionAttention(nn.Module):
    """Rotation by two positions, a remembered past, baddbmm into what is empty, a fill in place before a factor."""

    def __init__(self, width: int = 32, heads: int = 4, layer: int = 2) -> None:
        super().__init__()
        self.heads, self.head_dim, self.layer = heads, width // heads, layer
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = _angles(positions, self.head_dim // 2).transpose(0, 1).unsqueeze(2)
        cos, sin = angles.cos(), angles.sin()
        return (q * cos) + (_rotated(q) * sin), (k * cos) + (_rotated(k) * sin)

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        mixed = self.query_key_value(x)
        mixed = mixed.view(*mixed.size()[:-1], self.heads, 3 * self.head_dim)
        q, k, v = mixed.split(self.head_dim, dim=-1)
        q1, q2 = q.chunk(2, dim=-1)
        k1, k2 = k.chunk(2, dim=-1)
        q1, k1 = self.rotate(q1, k1, positions[:, 0, :])
        q2, k2 = self.rotate(q2, k2, positions[:, 1, :])
        q, k = torch.concat([q1, q2], dim=-1), torch.concat([k1, k2], dim=-1)
        k = torch.cat((past_key, k), dim=0)
        v = torch.cat((past_value, v), dim=0)
        factor = float(self.layer + 1)
        q = q / (math.sqrt(self.head_dim) * factor)
        size = (q.size(1), q.size(2), q.size(0), k.size(0))
        q = q.view(size[2], size[0] * size[1], -1)
        k = k.view(size[3], size[0] * size[1], -1)
        product = torch.empty(size[0] * size[1], size[2], size[3], dtype=q.dtype, device=q.device)
        product = torch.baddbmm(product, q.transpose(0, 1), k.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=1.0)
        scores = product.view(*size)
        if not (mask == 0).all():
            scores.masked_fill_(mask, -10000.0)
        dtype = scores.dtype
        scores = scores.float()
        scores = scores * factor
        probs = F.softmax(scores, dim=-1)
        probs = probs.type(dtype)
        size = (v.size(1), v.size(2), q.size(0), v.size(3))
        v = v.view(v.size(0), size[0] * size[1], -1)
        probs = probs.view(size[0] * size[1], size[2], -1)
        context = torch.bmm(probs, v.transpose(0, 1)).view(*size)
        context = context.permute(2, 0, 1, 3).contiguous()
        result: Tensor = self.dense(context.view(*context.size()[:-2], -1))
        return result


class GroupedPrefixAttention(nn.Module):
    """Few heads of keys by expand, half rotated by pairs, a factor that goes and comes back, then infinities."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2, layer: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim, self.factor = heads, groups, width // heads, float(layer + 1)
        self.query_key_value = nn.Linear(width, width + 2 * groups * self.head_dim)
        self.dense = nn.Linear(width, width, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        rot, passed = x[..., :half], x[..., half:]
        angles = _angles(torch.arange(x.size(0)), half)[:, : half // 2].view(-1, 1, 1, half // 2)
        pairs = rot.reshape(*rot.shape[:-1], half // 2, 2)
        turned = torch.stack(
            [
                pairs[..., 0] * angles.cos() - pairs[..., 1] * angles.sin(),
                pairs[..., 1] * angles.cos() + pairs[..., 0] * angles.sin(),
            ],
            -1,
        )
        return torch.cat((turned.flatten(3), passed), dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        sq, b, width = x.shape
        size = self.groups * self.head_dim
        q, k, v = self.query_key_value(x).split([width, size, size], dim=-1)
        q = q.view(sq, b, self.heads, self.head_dim)
        k, v = (part.view(sq, b, self.groups, self.head_dim) for part in (k, v))
        q, k = self.turned(q), self.turned(k)
        times = self.heads // self.groups
        k, v = (part.unsqueeze(-2).expand(-1, -1, -1, times, -1) for part in (k, v))
        k, v = (part.contiguous().view(sq, b, self.heads, self.head_dim) for part in (k, v))
        q = q.view(sq, b * self.heads, -1)
        k = k.view(sq, b * self.heads, -1)
        empty = torch.empty(b * self.heads, sq, sq, dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(
            empty,
            q.transpose(0, 1),
            k.transpose(0, 1).transpose(1, 2),
            beta=0.0,
            alpha=(1.0 / (math.sqrt(self.head_dim) * self.factor)),
        )
        scores = scores.view(b, self.heads, sq, sq)
        scores = scores.float()
        scores = scores * self.factor
        scores = scores.masked_fill(mask, float("-inf"))
        probs = F.softmax(scores, dim=-1)
        probs = probs.type_as(v)
        v = v.view(sq, b * self.heads, -1)
        probs = probs.view(b * self.heads, sq, -1)
        context = torch.bmm(probs, v.transpose(0, 1))
        context = context.view(b, self.heads, sq, self.head_dim).permute(2, 0, 1, 3).contiguous()
        result: Tensor = self.dense(context.view(sq, b, width))
        return result


class PackedAlibiAttention(nn.Module):
    """One packed weight that is unflattened; slopes and infinities in one buffer, scores no lower than the least."""

    future_mask: Tensor

    def __init__(self, width: int = 32, heads: int = 4, longest: int = 16) -> None:
        super().__init__()
        self.width, self.heads, self.head_dim = width, heads, width // heads
        self.W_pack = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        slopes = torch.tensor([2.0 ** (-2 * (head + 1)) for head in range(heads)])
        positions = torch.arange(longest).unsqueeze(0).unsqueeze(0).expand(heads, -1, -1)
        alibi = slopes.unsqueeze(1).unsqueeze(1) * positions
        infinities = torch.triu(torch.zeros([longest, longest]).fill_(float("-inf")), 1)
        self.register_buffer("future_mask", infinities.unsqueeze(0) + alibi)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        bsz, length, _ = x.size()
        bias = self.future_mask[: self.heads, :length, :length]
        expanded = attention_mask.to(bias.dtype)
        seen = torch.tril(torch.gt(expanded[:, :, None] * expanded[:, None, :], 0))
        expanded = seen * torch.eq(expanded[:, :, None] - expanded[:, None, :], 0)
        inverted = 1.0 - expanded.to(bias.dtype)
        inverted = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(bias.dtype).min)
        mask = inverted.unsqueeze(1) + bias.unsqueeze(0)
        proj = self.W_pack(x)
        proj = proj.unflatten(-1, (3, self.width)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        q = proj[0].view(bsz, length, self.heads, self.head_dim).transpose(1, 2)
        k = proj[1].view(bsz, length, self.heads, self.head_dim).transpose(1, 2)
        v = proj[2].view(bsz, length, self.heads, self.head_dim).transpose(1, 2)
        weights = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        weights = weights + mask
        weights = torch.max(weights, torch.tensor(torch.finfo(weights.dtype).min, device=weights.device))
        weights = F.softmax(weights, dim=-1)
        out = torch.matmul(weights, v).transpose(1, 2)
        result: Tensor = self.o_proj(out.reshape(bsz, length, self.width))
        return result


class LogLengthAttention(nn.Module):
    """Queries times the logarithm of their position, half rotated; a triangle by where, then padding that is added."""

    logn: Tensor
    causal: Tensor

    def __init__(self, width: int = 32, heads: int = 4, trained: int = 6, longest: int = 16) -> None:
        super().__init__()
        self.width, self.heads, self.head_dim = width, heads, width // heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.attn_dropout = nn.Dropout(0.0)
        logn = [math.log(i, trained) if i > trained else 1.0 for i in range(1, longest + 1)]
        self.register_buffer("logn", torch.tensor(logn)[None, :, None, None], persistent=False)
        triangle = torch.tril(torch.ones((longest, longest), dtype=torch.bool)).view(1, 1, longest, longest)
        self.register_buffer("causal", triangle, persistent=False)

    def rotate(self, t: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        rot, passed = t[..., : angles.shape[-1]], t[..., angles.shape[-1] :]
        halves = rearrange(rot, "... (j d) -> ... j d", j=2)
        x1, x2 = halves.unbind(dim=-2)
        turned = torch.cat((-x2, x1), dim=-1)
        return torch.cat((rot * cos + turned * sin, passed), dim=-1).type_as(t)

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor, attention_mask: Tensor) -> Tensor:
        mixed = self.c_attn(x)
        q, k, v = mixed.split(self.width, dim=2)
        q, k, v = (part.view(*part.size()[:-1], self.heads, self.head_dim) for part in (q, k, v))
        total = past_key.size(1) + q.size(1)
        angles = _angles(torch.arange(total), self.head_dim // 2)[None, :, None, :]
        q = self.rotate(q, angles[:, -q.shape[1] :])
        k = self.rotate(k, angles[:, -k.shape[1] :])
        k = torch.cat((past_key, k), dim=1)
        v = torch.cat((past_value, v), dim=1)
        start, end = k.size(1) - q.size(1), k.size(1)
        q = q * self.logn[:, start:end, :, :].type_as(q).expand_as(q)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        weights = torch.matmul(q, k.transpose(-1, -2))
        weights = weights / (v.size(-1) ** 0.5)
        least = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        causal = self.causal[:, :, k.size(-2) - q.size(-2) : k.size(-2), : k.size(-2)]
        weights = torch.where(causal, weights.to(weights.dtype), least)
        weights = weights + attention_mask
        weights = F.softmax(weights.float(), dim=-1)
        weights = self.attn_dropout(weights.type(v.dtype))
        out = torch.matmul(weights, v).transpose(1, 2)
        result: Tensor = self.c_proj(out.contiguous().view(*out.size()[:-2], self.width))
        return result


class SelfExtendedAttention(nn.Module):
    """Two maps of scores, of near and of grouped positions, and one softmax over the choice of both."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, group: int = 2, near: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.group, self.near = group, near
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = _angles(positions, self.head_dim)[:, None]
        return (x * angles.cos()) + (_rotated(x) * angles.sin())

    def repeated(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        times = self.heads // self.kv_heads
        return x[:, :, None, :, :].expand(b, h, times, n, d).reshape(b, h * times, n, d)

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bsz, q_len, width = x.size()
        q = self.q_proj(x).view(bsz, q_len, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(bsz, q_len, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(bsz, q_len, self.kv_heads, self.head_dim).transpose(1, 2)
        grouped_q = position_ids // self.group + self.near - self.near / self.group
        grouped_k = position_ids // self.group
        near_q, near_k = self.turned(q, position_ids), self.repeated(self.turned(k, position_ids))
        group_q, group_k = self.turned(q, grouped_q), self.repeated(self.turned(k, grouped_k))
        v = self.repeated(v)
        near_weights = torch.matmul(near_q, near_k.transpose(2, 3)) / math.sqrt(self.head_dim)
        group_weights = torch.matmul(group_q, group_k.transpose(2, 3)) / math.sqrt(self.head_dim)
        group_weights = group_weights + attention_mask
        near_weights = near_weights + attention_mask
        is_near = torch.tril(torch.ones((q_len, q_len)))
        far = torch.tril(torch.ones((q_len - self.near, q_len - self.near)))
        is_near[self.near :, : -self.near] -= far
        weights = torch.where(is_near.bool(), near_weights, group_weights)
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        result: Tensor = self.o_proj(out.reshape(bsz, q_len, width))
        return result


class ShiftedGroupAttention(nn.Module):
    """Groups of the sequence, half of the heads rolled by half a group, in place and back again."""

    def __init__(self, width: int = 32, heads: int = 4, group: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.group = heads, width // heads, group
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def shifted(self, part: Tensor, bsz: int, q_len: int) -> Tensor:
        part[:, self.heads // 2 :] = part[:, self.heads // 2 :].roll(-self.group // 2, dims=2)
        part = part.transpose(1, 2).reshape(bsz * (q_len // self.group), self.group, self.heads, self.head_dim)
        return part.transpose(1, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        bsz, q_len, width = x.size()
        q, k, v = (
            project(x).view(bsz, q_len, self.heads, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = _angles(torch.arange(q_len), self.head_dim)[None, None]
        q = (q * angles.cos()) + (_rotated(q) * angles.sin())
        k = (k * angles.cos()) + (_rotated(k) * angles.sin())
        v = v.clone()
        q, k, v = self.shifted(q, bsz, q_len), self.shifted(k, bsz, q_len), self.shifted(v, bsz, q_len)
        weights = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        mask = attention_mask[:, :, : self.group, : self.group].repeat(q_len // self.group, 1, 1, 1)
        weights = weights + mask
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        out = out.reshape(bsz, q_len, self.heads, self.head_dim)
        out[:, :, self.heads // 2 :] = out[:, :, self.heads // 2 :].roll(self.group // 2, dims=1)
        result: Tensor = self.o_proj(out.reshape(bsz, q_len, width))
        return result


class RememberingAttention(nn.Module):
    """A past that is prepended, a slice of a triangle that fits all that is there, and the new past returned."""

    bias: Tensor

    def __init__(self, width: int = 32, heads: int = 4, block: int = 16) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.attn_dropout = nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.width, dim=2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        k = torch.cat((past_key, k), dim=-2)
        v = torch.cat((past_value, v), dim=-2)
        full = k.shape[-2]
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, full - t : full, :full] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        return self.c_proj(y), (k, v)


class TimeMixedAttention(nn.Module):
    """Rotated after a shift in time, weights times a learned curve of distances, heads mixed by a convolution."""

    mask: Tensor

    def __init__(self, width: int = 32, heads: int = 4, context: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim, self.context = heads, width // heads, context
        self.time_shift = nn.ZeroPad2d((0, 0, 1, 0))
        curve = torch.ones(heads, context)
        for head in range(heads):
            decay = torch.arange(context) / (context - 1)
            curve[head] = torch.exp(-decay.flip(0) * (head + 1))
        self.time_w = nn.Parameter(curve)
        self.time_alpha = nn.Parameter(torch.ones(heads, 1, context))
        self.time_beta = nn.Parameter(torch.ones(heads, context, 1))
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.head_mix = nn.Conv2d(heads, heads, kernel_size=1, bias=False)
        self.output = nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(context, context)))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        length = self.context
        w = F.pad(self.time_w, (0, length))
        w = torch.tile(w, (length,))
        w = w[:, :-length].reshape(-1, length, 2 * length - 1)
        w = w[:, :, length - 1 :]
        w = w[:, :t, :t] * self.time_alpha[:, :, :t] * self.time_beta[:, :t, :]
        x = torch.cat([self.time_shift(x)[:, :-1, : c // 2], x[:, :, c // 2 :]], dim=-1)
        q = self.query(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        angles = _angles(torch.arange(t), self.head_dim)[None, None]
        q = (q * angles.cos()) + (_rotated(q) * angles.sin())
        k = (k * angles.cos()) + (_rotated(k) * angles.sin())
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:t, :t] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = att * w
        att = self.head_mix(att)
        x = att @ v
        result: Tensor = self.output(x.transpose(1, 2).contiguous().view(b, t, c))
        return result


class RelativeKeysAndValues(nn.Module):
    """Sines of distances beside the keys and beside the values, with heads and batch in one dimension."""

    table: Tensor

    def __init__(self, width: int = 32, heads: int = 4, reach: int = 3, longest: int = 12) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)
        distance = torch.arange(longest)[None, :] - torch.arange(longest)[:, None]
        sines = _angles(torch.arange(2 * reach + 1), self.head_dim)
        table = torch.cat([sines.sin()[:, ::2], sines.cos()[:, ::2]], dim=-1)
        self.register_buffer("table", table[distance.clamp(-reach, reach) + reach])

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (
            project(x).view(b, n, self.heads, self.head_dim).permute(0, 2, 1, 3)
            for project in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2))
        relations = self.table[:n, :n]
        q_t = q.permute(2, 0, 1, 3)
        q_r = q_t.contiguous().view(n, self.heads * b, self.head_dim)
        key_position = torch.matmul(q_r, relations.permute(0, 2, 1))
        scores = scores + key_position.view(n, b, self.heads, n).permute(1, 2, 0, 3)
        scores = scores / math.sqrt(self.head_dim)
        scores = scores + attention_mask
        probs = nn.Softmax(dim=-1)(scores)
        probs = self.dropout(probs)
        context = torch.matmul(probs, v)
        probs_r = probs.permute(2, 0, 1, 3).contiguous().view(n, b * self.heads, n)
        value_position = torch.matmul(probs_r, relations)
        context = context + value_position.view(n, b, self.heads, self.head_dim).permute(1, 2, 0, 3)
        return context.permute(0, 2, 1, 3).contiguous().view(b, n, c)


class AnnotatedAttention(nn.Module):
    """The weights are kept in the module for a picture of them."""

    attn: Tensor | None

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.d_k, self.h = width // heads, heads
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.attn = None
        self.dropout = nn.Dropout(p=0.1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attn": None}  # A copy has none of the graph of gradients.

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask.unsqueeze(1)
        batches = x.size(0)
        q, k, v = (
            lin(x).view(batches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, _ in zip(self.linears, range(3), strict=False)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.d_k)
        scores = scores.masked_fill(mask == 0, -1e9)
        self.attn = self.dropout(scores.softmax(dim=-1))
        x = torch.matmul(self.attn, v)
        x = x.transpose(1, 2).contiguous().view(batches, -1, self.h * self.d_k)
        result: Tensor = self.linears[-1](x)
        return result


class SummaryDecoderAttention(nn.Module):
    """A step of a decoder: its own cache first, then memory whose keys were projected before; 1e18 below zero."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.dim_per_head = heads, width // heads
        self.keys, self.values, self.query = (
            nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(3)
        )
        self.final = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.1)

    def shape(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, self.heads, self.dim_per_head).transpose(1, 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch = q.size(0)
        q = self.shape(q)
        q = q / math.sqrt(self.dim_per_head)
        scores = torch.matmul(q, k.transpose(2, 3))
        if mask is not None:
            mask = mask.unsqueeze(1).expand_as(scores)
            scores = scores.masked_fill(mask, -1e18)
        drop_attn = self.dropout(self.softmax(scores))
        context = torch.matmul(drop_attn, v).transpose(1, 2).contiguous()
        context = context.view(batch, -1, self.heads * self.dim_per_head)
        result: Tensor = self.final[layer](context)
        return result

    def forward(self, x: Tensor, cached_keys: Tensor, cached_values: Tensor, memory: Tensor, src_pad: Tensor) -> Tensor:
        normed = self.norms[0](x)
        k = torch.cat((cached_keys, self.shape(self.keys[0](normed))), dim=2)
        v = torch.cat((cached_values, self.shape(self.values[0](normed))), dim=2)
        query = self.attend(0, self.query[0](normed), k, v, None) + x
        normed = self.norms[1](query)
        k, v = self.shape(self.keys[1](memory)), self.shape(self.values[1](memory))
        mask = src_pad.expand(src_pad.size(0), x.size(1), src_pad.size(2))
        return self.attend(1, self.query[1](normed), k, v, mask) + query


class GatedUnitSoftmaxPlus(nn.Module):
    """One head of a gated unit; scores times the logarithm of how many keys there are, after the fill."""

    def __init__(self, width: int = 32, inner: int = 48, size: int = 16) -> None:
        super().__init__()
        self.inner, self.size = inner, size
        self.i_dense = nn.Linear(width, 2 * inner + size, bias=False)
        self.o_dense = nn.Linear(inner, width, bias=False)
        self.q_gamma = nn.Parameter(torch.ones(size))
        self.k_gamma = nn.Parameter(torch.ones(size))

    def turned(self, x: Tensor) -> Tensor:
        angles = _angles(torch.arange(x.size(1)), x.size(-1))[:, : x.size(-1) // 2]
        sin, cos = angles.sin(), angles.cos()
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2, -1)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, None, :]
        u, v, qk = torch.split(F.silu(self.i_dense(x)), [self.inner, self.inner, self.size], dim=-1)
        q, k = self.turned(qk * self.q_gamma), self.turned(qk * self.k_gamma)
        a = einsum("bmd,bnd->bmn", q, k)
        a = a / self.size**0.5
        a = a.masked_fill(mask == 0, -1e12)
        count = mask.sum(-1, keepdim=True)
        scale = torch.log(count) / math.log(512)
        weights = torch.softmax(a * scale, dim=-1)
        result: Tensor = self.o_dense(u * einsum("bmn,bnd->bmd", weights, v))
        return result


class TokenAttention(nn.Module):
    """Heads last in the scores, softmax over the third dimension; a mask of products that blinds whole rows."""

    def __init__(self, width: int = 32, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.causal, self.heads, self.scale = causal, heads, (width // heads) ** -0.5
        self.to_qkv = nn.Linear(width, width * 3, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b t (h d) -> b t h d", h=self.heads) for t in (q, k, v))
        e = einsum("b i h d, b j h d -> b i j h", q, k)
        e = e * self.scale
        kpm = m.unsqueeze(1) * m.unsqueeze(2)
        if self.causal:
            kpm = kpm.squeeze(-1).tril().unsqueeze(-1)
        e = e.masked_fill(kpm == 0, -torch.finfo(e.dtype).max)
        a = e.softmax(dim=2)
        o = einsum("b i j h, b j h d -> b i h d", a, v)
        result: Tensor = self.to_out(o.flatten(-2)) * m
        return result


class GroupedRelativeAttention(nn.Module):
    """Neighboring frames side by side in one query, positions shifted by two paddings, 1e9 times a mask added."""

    def __init__(self, width: int = 16, heads: int = 2, group: int = 3) -> None:
        super().__init__()
        self.width, self.heads, self.group = width, heads, group
        self.head_dim = group * width // heads
        self.query_layer, self.key_layer, self.value_layer, self.output_layer = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.pos_layer = nn.Linear(width, width)
        self.u = nn.Parameter(torch.zeros(width))
        self.v = nn.Parameter(torch.zeros(width))

    @staticmethod
    def absolute(scores: Tensor) -> Tensor:
        batch, heads, one, two = scores.size()
        scores = F.pad(scores, pad=(0, 1), value=0)
        scores = scores.reshape(batch, heads, -1)
        scores = F.pad(scores, pad=(0, two - one), value=0)
        scores = scores.reshape(batch, heads, 1 + one, two)
        return scores[:, :, :one, one - 1 :]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length = x.size(0), x.size(1)
        q, k, v = self.query_layer(x), self.key_layer(x), self.value_layer(x)
        padding = (self.group - length % self.group) % self.group
        q, k, v = (F.pad(part, (0, 0, 0, padding), value=0) for part in (q, k, v))
        mask = F.pad(mask, (0, padding, 0, padding), value=1)[:, :, :: self.group, :: self.group]
        total = length + padding
        positions = torch.arange(total - 1, -total, -1.0)
        angles = _angles(positions, self.width)[:, : self.width // 2]
        e = self.pos_layer(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[None])
        e = e.repeat(batch, 1, 1)[:, self.group // 2 : e.size(1) - self.group // 2]
        qu, qv = q + self.u, q + self.v
        qu, qv, k, v = (part.reshape(batch, -1, self.heads, self.head_dim).transpose(1, 2) for part in (qu, qv, k, v))
        n = k.size(2)
        e = e[:, : (2 * n - 1) * self.group]
        e = F.pad(e, (0, 0, 0, (2 * n - 1) * self.group - e.size(1)))
        e = e.reshape(batch, -1, self.heads, self.head_dim).transpose(1, 2)
        scores_k = qu.matmul(k.transpose(2, 3))
        scores_e = self.absolute(qv.matmul(e.transpose(2, 3)))
        scores = (scores_k + scores_e) / k.shape[-1] ** 0.5
        scores += mask * -1e9
        w = scores.softmax(dim=-1)
        o = w.matmul(v)
        o = o.transpose(1, 2).reshape(batch, -1, self.width)
        result: Tensor = self.output_layer(o[:, : o.size(1) - padding])
        return result


class PhonemeAttention(nn.Module):
    """Heads first along the batch, a mask that is repeated for them, infinities; padded outputs filled with zeros."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.n_head, self.d_k = heads, width // heads
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(width, width) for _ in range(3))
        self.softmax = nn.Softmax(dim=2)
        self.fc = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = x.size(1)
        ids = torch.arange(0, longest).unsqueeze(0).expand(x.size(0), -1)
        padded = ids >= lengths.unsqueeze(1).expand(-1, longest)
        slf_attn_mask = padded.unsqueeze(1).expand(-1, longest, -1)
        b, n, _ = x.size()
        q, k, v = (
            w(x).view(b, n, self.n_head, self.d_k).permute(2, 0, 1, 3).contiguous().view(-1, n, self.d_k)
            for w in (self.w_qs, self.w_ks, self.w_vs)
        )
        mask = slf_attn_mask.repeat(self.n_head, 1, 1)
        attn = torch.bmm(q, k.transpose(1, 2))
        attn = attn / self.d_k**0.5
        attn = attn.masked_fill(mask, -math.inf)
        attn = self.softmax(attn)
        output = torch.bmm(attn, v).view(self.n_head, b, n, self.d_k)
        output = output.permute(1, 2, 0, 3).contiguous().view(b, n, -1)
        output = self.layer_norm(self.fc(output) + x)
        result: Tensor = output.masked_fill(padded.unsqueeze(-1), 0)
        return result


class BufferedProteinAttention(nn.Module):
    """Softmax step by step with out=, parts of the queries, results and weights assigned into empty tensors."""

    def __init__(self, width: int = 16, edge: int = 8, heads: int = 2, c: int = 8, part: int = 4) -> None:
        super().__init__()
        self.c, self.part = c, part
        self.proj_edge_bias = nn.Linear(edge, heads)
        self.qg_weights = nn.Parameter(torch.randn(width, 1, heads, 2 * c))
        self.kv_weights = nn.Parameter(torch.randn(width, 1, heads, 2 * c))
        self.qg_bias = nn.Parameter(torch.zeros(1, heads, 1, 2 * c))
        self.kv_bias = nn.Parameter(torch.zeros(1, heads, 1, 2 * c))
        self.o_weights = nn.Parameter(torch.randn(1, heads, c, width))
        self.o_bias = nn.Parameter(torch.zeros(width, 1))

    @staticmethod
    def softmax(x: Tensor, in_place: bool) -> Tensor:
        if not in_place:
            return torch.softmax(x, dim=-1)
        largest = torch.max(x, dim=-1, keepdim=True)[0]
        torch.sub(x, largest, out=x)
        torch.exp(x, out=x)
        summed = torch.sum(x, dim=-1, keepdim=True)
        x /= summed
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        n = q.shape[-2]
        output = torch.empty(*q.shape[:-2], n, v.shape[-1], dtype=q.dtype)
        logits = torch.empty(*q.shape[:-2], n, k.shape[-2], dtype=q.dtype)
        for i, q_i in enumerate(torch.split(q, self.part, dim=-2)):
            start, end = i * self.part, (i + 1) * self.part
            scores = torch.einsum("...id, ...jd -> ...ij", q_i * self.c**-0.5, k)
            attn = self.softmax(scores + bias[..., start:end, :], in_place=not torch.is_grad_enabled())
            output[..., start:end, :] = torch.einsum("...ij, ...jd -> ...id", attn, v)
            logits[..., start:end, :] = attn
        return output, logits

    def forward(self, node: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        node = F.layer_norm(node, node.shape[-1:])
        edges = F.layer_norm(edges, edges.shape[-1:])
        bias = self.proj_edge_bias(edges).permute(2, 0, 1) + 1e9 * (mask[..., None, None, :] - 1)
        node, bias = node.unsqueeze(-1), bias.unsqueeze(-4)
        qg = torch.einsum("...qar,arhc->...rhqc", node, self.qg_weights)
        qg = qg + self.qg_bias
        q, gate = torch.split(qg, self.c, dim=-1)
        kv = torch.einsum("...kar,arhc->...rhkc", node, self.kv_weights)
        kv = kv + self.kv_bias
        k, v = torch.split(kv, [self.c, self.c], dim=-1)
        out, _ = self.attend(q, k, v, bias)
        out = out * torch.sigmoid(gate)
        output = torch.einsum("...rhqc,rhco->...qor", out, self.o_weights)
        output = output + self.o_bias
        return output.squeeze(-1)


class MoleculePairs(nn.Module):
    """Scores that the next layer takes as its bias, padding filled in them; the last are returned."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.in_proj = nn.ModuleList(nn.Linear(width, width * 3) for _ in range(2))
        self.out_proj = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, attn_bias: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        b, n, c = x.size()
        for layer in range(2):
            q, k, v = self.in_proj[layer](x).chunk(3, dim=-1)
            q, k, v = (
                part.view(b, n, self.heads, self.head_dim).transpose(1, 2).contiguous().view(-1, n, self.head_dim)
                for part in (q, k, v)
            )
            q = q * self.head_dim**-0.5
            weights = torch.bmm(q, k.transpose(1, 2))
            weights = weights.view(b, self.heads, n, n)
            weights.masked_fill_(padding.unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf"))
            weights = weights.view(b * self.heads, n, n)
            weights = weights + attn_bias
            attn = F.softmax(weights, dim=-1)
            o = torch.bmm(attn, v)
            o = o.view(b, self.heads, n, self.head_dim).transpose(1, 2).contiguous().view(b, n, c)
            x = x + self.out_proj[layer](o)
            attn_bias = weights
        return x, attn_bias


class SoftTiedAttention(nn.Module):
    """Rows of an alignment share one map, each with a weight by its likeness to the first row."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.d_k = heads, width // heads
        self.scale = 1.0 / math.sqrt(self.d_k)
        self.seq_query, self.seq_key = nn.Linear(width, width), nn.Linear(width, width)
        self.to_query, self.to_key, self.to_value, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def weights(self, msa: Tensor) -> Tensor:
        b, n, length = msa.shape[:3]
        first = msa[:, 0].unsqueeze(1)
        q = self.seq_query(first).view(b, 1, length, self.heads, self.d_k).permute(0, 2, 3, 1, 4).contiguous()
        k = self.seq_key(msa).view(b, n, length, self.heads, self.d_k).permute(0, 2, 3, 4, 1).contiguous()
        q = q * self.scale
        attn = F.softmax(torch.matmul(q, k), dim=-1)
        return attn.permute(0, 4, 2, 1, 3)

    def forward(self, msa: Tensor) -> Tensor:
        b, n, length = msa.shape[:3]
        q = self.to_query(msa).view(b, n, length, self.heads, self.d_k).permute(0, 1, 3, 2, 4).contiguous()
        k = self.to_key(msa).view(b, n, length, self.heads, self.d_k).permute(0, 1, 3, 4, 2).contiguous()
        v = self.to_value(msa).view(b, n, length, self.heads, self.d_k).permute(0, 1, 3, 2, 4).contiguous()
        q = q * self.weights(msa)
        k = k * self.scale
        attention = torch.einsum("bnhik,bnhkj->bhij", q, k)
        attention = F.softmax(attention, dim=-1)
        attention = attention.unsqueeze(1)
        out = torch.matmul(attention, v)
        out = out.permute(0, 1, 3, 2, 4).contiguous().view(b, n, length, -1)
        result: Tensor = self.to_out(out)
        return result


class TwoStageSeries(nn.Module):
    """Across time, then from all series to a few routers and back."""

    def __init__(self, width: int = 32, heads: int = 4, segments: int = 5, factor: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.ModuleList(nn.Linear(width, width) for _ in range(3)) for _ in range(4)
        )
        self.router = nn.Parameter(torch.randn(segments, factor, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def attend(self, stage: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, n, _ = q.shape
        s, h = k.shape[1], self.heads
        q = self.to_q[stage](q).view(b, n, h, -1)
        k = self.to_k[stage](k).view(b, s, h, -1)
        v = self.to_v[stage](v).view(b, s, h, -1)
        scale = 1.0 / math.sqrt(q.shape[-1])
        scores = torch.einsum("blhe,bshe->bhls", q, k)
        a = torch.softmax(scale * scores, dim=-1)
        out = torch.einsum("bhls,bshd->blhd", a, v).contiguous()
        result: Tensor = self.to_out[stage](out.view(b, n, -1))
        return result

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        time_in = rearrange(x, "b ts_d seg_num d_model -> (b ts_d) seg_num d_model")
        dim_in = self.norms[0](time_in + self.attend(0, time_in, time_in, time_in))
        dim_send = rearrange(dim_in, "(b ts_d) seg_num d_model -> (b seg_num) ts_d d_model", b=batch)
        routers = repeat(self.router, "seg_num factor d_model -> (repeat seg_num) factor d_model", repeat=batch)
        buffer = self.attend(1, routers, dim_send, dim_send)
        received = self.attend(2, dim_send, buffer, buffer)
        dim_enc = self.norms[1](dim_send + received)
        result: Tensor = rearrange(dim_enc, "(b seg_num) ts_d d_model -> b ts_d seg_num d_model", b=batch)
        return result


class PyramidAttention(nn.Module):
    """Scales of a series in one sequence: each node sees its neighbors, children and parent."""

    mask: Tensor

    def __init__(self, width: int = 32, heads: int = 2, sizes: tuple[int, ...] = (8, 4, 2), inner: int = 3) -> None:
        super().__init__()
        self.n_head, self.d_k = heads, width // heads
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(width, width, bias=False) for _ in range(3))
        nn.init.xavier_uniform_(self.w_qs.weight)
        self.fc = nn.Linear(width, width)
        self.temperature = self.d_k**0.5
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)
        total = sum(sizes)
        mask = torch.zeros(total, total)
        for layer, size in enumerate(sizes):
            start = sum(sizes[:layer])
            for i in range(start, start + size):
                mask[i, max(i - inner // 2, start) : min(i + inner // 2 + 1, start + size)] = 1
                if layer:
                    left = start - sizes[layer - 1] + (i - start) * 2
                    mask[i, left : left + 2] = 1
                    mask[left : left + 2, i] = 1
        self.register_buffer("mask", (1 - mask).bool())

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask.repeat(len(x), 1, 1)
        b, n = x.size(0), x.size(1)
        residual = x
        x = self.layer_norm(x)
        q = self.w_qs(x).view(b, n, self.n_head, self.d_k).transpose(1, 2)
        k = self.w_ks(x).view(b, n, self.n_head, self.d_k).transpose(1, 2)
        v = self.w_vs(x).view(b, n, self.n_head, self.d_k).transpose(1, 2)
        attn = torch.matmul(q / self.temperature, k.transpose(2, 3))
        attn = attn.masked_fill(mask.unsqueeze(1), -1e9)
        attn = F.softmax(attn, dim=-1)
        output = torch.matmul(attn, v).transpose(1, 2).contiguous().view(b, n, -1)
        result: Tensor = self.fc(output) + residual
        return result


class SequentialRecommendation(nn.Module):
    """PyTorch's module on sequences first; queries are normalized and keys are not; padding is zeroed before."""

    def __init__(self, width: int = 32, heads: int = 2, items: int = 20, longest: int = 12) -> None:
        super().__init__()
        self.item_emb = nn.Embedding(items + 1, width, padding_idx=0)
        self.pos_emb = nn.Embedding(longest + 1, width, padding_idx=0)
        self.norm, self.last_norm = nn.LayerNorm(width, eps=1e-8), nn.LayerNorm(width, eps=1e-8)
        self.attention = nn.MultiheadAttention(width, heads, 0.2)

    def forward(self, log_seqs: Tensor) -> Tensor:
        seqs = self.item_emb(log_seqs)
        seqs *= self.item_emb.embedding_dim**0.5
        poss = torch.arange(1, log_seqs.shape[1] + 1).repeat(log_seqs.shape[0], 1)
        poss = poss * (log_seqs != 0)
        seqs += self.pos_emb(poss)
        n = seqs.shape[1]
        mask = ~torch.tril(torch.ones((n, n), dtype=torch.bool))
        seqs = torch.transpose(seqs, 0, 1)
        q = self.norm(seqs)
        outputs, _ = self.attention(q, seqs, seqs, attn_mask=mask)
        seqs = q + outputs
        seqs = torch.transpose(seqs, 0, 1)
        result: Tensor = self.last_norm(seqs)
        return result


class ClozeRecommendation(nn.Module):
    """A mask from the items themselves, repeated for each query; weights returned and not read."""

    def __init__(self, width: int = 32, heads: int = 4, items: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(items, width, padding_idx=0)
        self.d_k, self.h = width // heads, heads
        self.linear_layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.output_linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(p=0.1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(mask == 0, -1e9)
        p_attn = F.softmax(scores, dim=-1)
        p_attn = self.dropout(p_attn)
        return torch.matmul(p_attn, v), p_attn

    def forward(self, items: Tensor) -> Tensor:
        mask = (items > 0).unsqueeze(1).repeat(1, items.size(1), 1).unsqueeze(1)
        x = self.embedding(items)
        b = x.size(0)
        q, k, v = (lin(x).view(b, -1, self.h, self.d_k).transpose(1, 2) for lin in self.linear_layers)
        x, _ = self.attention(q, k, v, mask)
        x = x.transpose(1, 2).contiguous().view(b, -1, self.h * self.d_k)
        result: Tensor = self.output_linear(x)
        return result


class PretrainedRecommendation(nn.Module):
    """Padding times a triangle that is compared with zero, as a number of -10000 that is added."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.attn_dropout = nn.Dropout(0.5)

    def split(self, x: Tensor) -> Tensor:
        x = x.view(*x.size()[:-1], self.heads, self.size)
        return x.permute(0, 2, 1, 3)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        attention_mask = (input_ids > 0).long()
        extended = attention_mask.unsqueeze(1).unsqueeze(2)
        longest = attention_mask.size(-1)
        subsequent = torch.triu(torch.ones((1, longest, longest)), diagonal=1)
        subsequent = (subsequent == 0).unsqueeze(1).long()
        extended = extended * subsequent
        extended = extended.to(dtype=self.dense.weight.dtype)
        extended = (1.0 - extended) * -10000.0
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores / math.sqrt(self.size)
        scores = scores + extended
        probs = self.attn_dropout(nn.Softmax(dim=-1)(scores))
        context = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
        context = context.view(*context.size()[:-2], self.heads * self.size)
        result: Tensor = self.norm(self.dense(context) + x)
        return result


class StochasticRecommendation(nn.Module):
    """Negated distances of distributions, and the weights for means and, squared, for variances."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.mean = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.cov = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, means: Tensor, covs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mean_q, mean_k, mean_v = (self.split(lin(means)) for lin in self.mean)
        cov_q, cov_k, cov_v = (self.split(F.elu(lin(covs)) + 1) for lin in self.cov)
        norm_q, norm_k = (mean_q**2).sum(-1, keepdim=True), (mean_k**2).sum(-1, keepdim=True)
        ret = -2 * torch.matmul(mean_q, mean_k.transpose(-1, -2)) + norm_q + norm_k.transpose(-1, -2)
        root_q, root_k = torch.sqrt(torch.clamp(cov_q, min=1e-24)), torch.sqrt(torch.clamp(cov_k, min=1e-24))
        cov = -2 * torch.matmul(root_q, root_k.transpose(-1, -2))
        cov = cov + cov_q.sum(-1, keepdim=True) + cov_k.sum(-1, keepdim=True).transpose(-1, -2)
        scores = -(ret + cov)
        scores = scores / math.sqrt(mean_q.size(-1))
        scores = scores + mask
        probs = nn.Softmax(dim=-1)(scores)
        mean_context = torch.matmul(probs, mean_v)
        cov_context = torch.matmul(probs**2, cov_v)
        return mean_context.permute(0, 2, 1, 3).flatten(2), cov_context.permute(0, 2, 1, 3).flatten(2)


class NewsSelfAttention(nn.Module):
    """Head by head; the words themselves are keys and values, which are projected after the weights."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.qs = nn.ParameterList(nn.Parameter(torch.empty(width, width).uniform_(-0.1, 0.1)) for _ in range(heads))
        self.vs = nn.ParameterList(
            nn.Parameter(torch.empty(width, width // heads).uniform_(-0.1, 0.1)) for _ in range(heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        container = []
        for i in range(len(self.qs)):
            temp = torch.matmul(x, self.qs[i])
            temp2 = torch.bmm(temp, x.transpose(1, 2))
            weights = F.softmax(temp2, dim=2)
            weighted = torch.bmm(weights, x)
            container.append(torch.matmul(weighted, self.vs[i]))
        return torch.cat(container, dim=2)


class NewsExponentials(nn.Module):
    """Exponentials without a maximum, times a mask of lengths, over their sum and a little more."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.d_k = heads, width // heads
        self.w_q, self.w_k, self.w_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        b, longest = x.size(0), x.size(1)
        mask = torch.arange(longest).expand(b, longest) < length.view(-1, 1)
        mask = mask.unsqueeze(1).expand(b, longest, longest)
        mask = mask.unsqueeze(1).repeat(1, self.heads, 1, 1)
        q = self.w_q(x).view(b, -1, self.heads, self.d_k).transpose(1, 2)
        k = self.w_k(x).view(b, -1, self.heads, self.d_k).transpose(1, 2)
        v = self.w_v(x).view(b, -1, self.heads, self.d_k).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.d_k)
        scores = torch.exp(scores)
        scores = scores * mask
        attn = scores / (torch.sum(scores, dim=-1, keepdim=True) + 1e-8)
        context = torch.matmul(attn, v)
        return context.transpose(1, 2).contiguous().view(b, -1, self.heads * self.d_k)


class RowsAndColumns(nn.Module):
    """Features of a row, then rows of a batch, as one sequence of flattened rows."""

    def __init__(self, width: int = 8, features: int = 5, heads: int = 2, dim_head: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        inner = heads * dim_head
        self.to_qkv = nn.Linear(width, inner * 3, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.row_qkv = nn.Linear(width * features, inner * 3, bias=False)
        self.row_out = nn.Linear(inner, width * features)

    def attend(self, x: Tensor, to_qkv: nn.Linear, to_out: nn.Linear) -> Tensor:
        q, k, v = to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        sim = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        attn = sim.softmax(dim=-1)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        result: Tensor = to_out(rearrange(out, "b h n d -> b n (h d)", h=self.heads))
        return result

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = x + self.attend(x, self.to_qkv, self.to_out)
        x = rearrange(x, "b n d -> 1 b (n d)")
        x = x + self.attend(x, self.row_qkv, self.row_out)
        return rearrange(x, "1 b (n d) -> b n d", n=n)


class TrajectoryAttention(nn.Module):
    """A triangle in which every column of a value estimate is blinded; a copy of the weights stays in the module."""

    mask: Tensor
    _attn_map: Tensor | None

    def __init__(
        self, width: int = 32, heads: int = 4, block: int = 16, joined: int = 4, keep_map: bool = True
    ) -> None:
        super().__init__()
        self.n_head = heads
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.attn_drop, self.resid_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.register_buffer("mask", torch.tril(torch.ones(block, block)).view(1, 1, block, block))
        self.mask.squeeze()[:, joined - 1 :: joined] = 0
        self._attn_map = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attn_map": None}  # A copy has none of the graph of gradients.

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        k = self.key(x).view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        q = self.query(x).view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        v = self.value(x).view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        self._attn_map = att.clone()
        att = self.attn_drop(att)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(b, t, c)
        result: Tensor = self.resid_drop(self.proj(y))
        return result


class WorldModelAttention(nn.Module):
    """A cache that is written at its end and read up to it, and a triangle with blocks on its diagonal."""

    mask: Tensor
    cache_k: Tensor
    cache_v: Tensor

    def __init__(self, width: int = 32, heads: int = 4, longest: int = 16, block: int = 4, filled: int = 5) -> None:
        super().__init__()
        self.heads, self.filled = heads, filled
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.attn_drop = nn.Dropout(0.1)
        causal = torch.tril(torch.ones(longest, longest))
        blocks = torch.kron(torch.eye(longest // block), torch.ones(block, block))
        self.register_buffer("mask", torch.max(causal, blocks))
        self.register_buffer("cache_k", noise(2, heads, longest, width // heads, seed=8))
        self.register_buffer("cache_v", noise(2, heads, longest, width // heads, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        past = self.filled
        q = self.query(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)
        k = self.key(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = self.value(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)
        cache_k = self.cache_k.clone() if torch.is_grad_enabled() else self.cache_k
        cache_v = self.cache_v.clone() if torch.is_grad_enabled() else self.cache_v
        cache_k[:, :, past : past + t, :] = k
        cache_v[:, :, past : past + t, :] = v
        k, v = cache_k[:, :, : past + t, :], cache_v[:, :, : past + t, :]
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[past : past + t, : past + t] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_drop(att)
        y = att @ v
        y = rearrange(y, "b h t e -> b t (h e)")
        result: Tensor = self.proj(y)
        return result


class RotatedPairsAttention(nn.Module):
    """Pairs of numbers turned as complex ones, grouped heads by expand, a triangle of infinities that is sliced."""

    mask: Tensor

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, longest: int = 16) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        mask = torch.full((1, 1, longest, longest), float("-inf"))
        self.register_buffer("mask", torch.triu(mask, diagonal=1))

    def turned(self, x: Tensor) -> Tensor:
        x_r, x_i = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        angles = _angles(torch.arange(x.shape[1]), self.head_dim)[:, : self.head_dim // 2]
        cos, sin = (part.view(1, x.shape[1], 1, -1) for part in (angles.cos(), angles.sin()))
        out = torch.stack([x_r * cos - x_i * sin, x_r * sin + x_i * cos], dim=-1).flatten(3)
        return out.type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        xq = self.turned(self.wq(x).view(b, n, self.heads, self.head_dim))
        xk = self.turned(self.wk(x).view(b, n, self.kv_heads, self.head_dim))
        xv = self.wv(x).view(b, n, self.kv_heads, self.head_dim)
        times = self.heads // self.kv_heads
        xk, xv = (
            part[:, :, :, None, :].expand(b, n, self.kv_heads, times, self.head_dim).reshape(b, n, -1, self.head_dim)
            for part in (xk, xv)
        )
        xq, xk, xv = xq.transpose(1, 2), xk.transpose(1, 2), xv.transpose(1, 2)
        scores = torch.matmul(xq, xk.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores + self.mask[:, :, :n, :n]
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, xv)
        result: Tensor = self.wo(output.transpose(1, 2).contiguous().view(b, n, -1))
        return result


def _triangle(length: int) -> Tensor:
    return torch.triu(torch.full((length, length), torch.finfo(torch.float32).min), diagonal=1)[None, None]


def _prefixes(*lengths: int, longest: int) -> Tensor:
    """True above the diagonal, but for a prefix whose tokens all see each other."""
    seen = torch.ones(len(lengths), longest, longest).tril()
    for sample, length in zip(seen, lengths, strict=True):
        sample[..., :length] = 1
    return (seen < 0.5).unsqueeze(1)


def _two_positions() -> dict[str, Any]:
    mask = torch.triu(torch.ones(6, 6), diagonal=1).bool()
    return {
        "x": noise(6, 2, 32, seed=0),
        "past_key": noise(3, 2, 4, 8, seed=1),
        "past_value": noise(3, 2, 4, 8, seed=2),
        "positions": torch.stack([torch.arange(6), torch.tensor([0, 0, 0, 1, 2, 3])]).expand(2, 2, 6).contiguous(),
        "mask": torch.cat([torch.zeros(6, 3).bool(), mask], dim=1)[None, None],
    }


CASES: tuple[Case, ...] = (
    Case(
        "chatglm_two_positions",
        "a number read from the mask, baddbmm into what is empty, -10000 before a factor",
        1,
        TwoPositionAttention,
        _two_positions,
        "THUDM/ChatGLM-6B",
    ),
    Case(
        "chatglm2_grouped",
        "grouped heads by expand, baddbmm into what is empty, infinities after a factor",
        1,
        GroupedPrefixAttention,
        lambda: {"x": noise(7, 2, 32, seed=0), "mask": _prefixes(3, 5, longest=7)},
        "THUDM/ChatGLM2-6B",
    ),
    Case(
        "baichuan_alibi",
        "slopes, infinities and the least number in one sum, no lower than the least number",
        1,
        PackedAlibiAttention,
        lambda: {"x": noise(2, 10, 32, seed=0), "attention_mask": _ends(10, 7, longest=10).long()},
        "baichuan-inc/Baichuan-13B",
    ),
    Case(
        "qwen_logn",
        "queries times logarithms, a past, where and then a sum with padding",
        1,
        LogLengthAttention,
        lambda: {
            "x": noise(2, 6, 32, seed=0),
            "past_key": noise(2, 4, 4, 8, seed=1),
            "past_value": noise(2, 4, 4, 8, seed=2),
            "attention_mask": (1.0 - _ends(10, 8, longest=10).float())[:, None, None] * torch.finfo(torch.float32).min,
        },
        "QwenLM/Qwen",
    ),
    Case(
        "self_extend",
        "where of two maps of scores",
        1,
        SelfExtendedAttention,
        lambda: {
            "x": noise(2, 10, 32, seed=0),
            "position_ids": torch.arange(10)[None],
            "attention_mask": _triangle(10),
        },
        "datamllab/LongLM",
    ),
    Case(
        "longlora_shifted",
        "half of the heads rolled in place, groups along the batch",
        1,
        ShiftedGroupAttention,
        lambda: {"x": noise(2, 12, 32, seed=0), "attention_mask": _triangle(12).expand(2, 1, 12, 12)},
        "dvlab-research/LongLoRA",
    ),
    Case(
        "bark_past",
        "a past, a slice of a triangle that starts behind it",
        1,
        RememberingAttention,
        lambda: {
            "x": noise(2, 3, 32, seed=0),
            "past_key": noise(2, 4, 6, 8, seed=1),
            "past_value": noise(2, 4, 6, 8, seed=2),
        },
        "suno-ai/bark",
    ),
    Case(
        "mingpt_time_mixing",
        "weights times a learned curve, heads mixed by a convolution",
        1,
        TimeMixedAttention,
        lambda: {"x": noise(2, 10, 32, seed=0)},
        "BlinkDL/minGPT-tuned",
    ),
    Case(
        "llama2c",
        "grouped heads by expand, a sliced triangle of infinities",
        1,
        RotatedPairsAttention,
        lambda: {"x": noise(2, 10, 32, seed=0)},
        "karpathy/llama2.c",
    ),
    Case(
        "nezha_relative",
        "positions beside keys and beside values",
        1,
        RelativeKeysAndValues,
        lambda: {
            "x": noise(2, 10, 32, seed=0),
            "attention_mask": (1.0 - _ends(10, 7, longest=10).float())[:, None, None] * -10000.0,
        },
        "lonePatient/NeZha_Chinese_PyTorch",
    ),
    Case(
        "annotated_transformer",
        "weights stored in the module",
        1,
        AnnotatedAttention,
        lambda: {"x": noise(2, 10, 32, seed=0), "mask": _ends(10, 7, longest=10).unsqueeze(1)},
        "harvardnlp/annotated-transformer",
    ),
    Case(
        "presumm_decoder",
        "one step with a cache, memory with -1e18 by expand_as",
        2,
        SummaryDecoderAttention,
        lambda: {
            "x": noise(2, 1, 32, seed=0),
            "cached_keys": noise(2, 4, 5, 8, seed=1),
            "cached_values": noise(2, 4, 5, 8, seed=2),
            "memory": noise(2, 9, 32, seed=3),
            "src_pad": ~_ends(9, 6, longest=9).unsqueeze(1),
        },
        "nlpyang/PreSumm",
    ),
    Case(
        "gau_softmax_plus",
        "scores times a logarithm of how many keys there are, after a fill of -1e12",
        1,
        GatedUnitSoftmaxPlus,
        lambda: {"x": noise(2, 10, 32, seed=0), "attention_mask": _ends(10, 7, longest=10).float()},
        "JunnYu/GAU-alpha-pytorch",
    ),
    Case(
        "valle_tokens",
        "heads last, a product of masks and its triangle compared with zero, blind rows",
        1,
        TokenAttention,
        lambda: {"x": noise(2, 10, 32, seed=0), "m": _ends(10, 7, longest=10).float().unsqueeze(-1)},
        "enhuiz/vall-e",
    ),
    Case(
        "valle_tokens_all",
        "heads last, a product of masks compared with zero, blind rows",
        1,
        lambda: TokenAttention(causal=False),
        lambda: {"x": noise(2, 10, 32, seed=0), "m": _ends(10, 7, longest=10).float().unsqueeze(-1)},
        "enhuiz/vall-e",
    ),
    Case(
        "efficient_conformer_grouped",
        "frames grouped in one query, positions by two paddings, a strided mask times -1e9",
        1,
        GroupedRelativeAttention,
        lambda: {
            "x": noise(2, 11, 16, seed=0),
            "mask": (~_ends(11, 8, longest=11)).float()[:, None, None].expand(2, 1, 11, 11).contiguous(),
        },
        "burchim/EfficientConformer",
    ),
    Case(
        "fastspeech2",
        "a mask from lengths repeated for heads along the batch, padded rows zeroed after",
        1,
        PhonemeAttention,
        lambda: {"x": noise(2, 10, 32, seed=0), "lengths": torch.tensor([10, 7])},
        "ming024/FastSpeech2",
    ),
    Case(
        "omegafold_parts",
        "softmax by hand with out=, parts of the queries assigned into an empty tensor",
        1,
        BufferedProteinAttention,
        lambda: {"node": noise(8, 16, seed=0), "edges": noise(8, 8, 8, seed=1), "mask": _ends(6, longest=8)[0].float()},
        "HeliXonProtein/OmegaFold",
    ),
    Case(
        "unimol_pairs",
        "scores handed on and returned",
        2,
        MoleculePairs,
        lambda: {
            "x": noise(2, 8, 32, seed=0),
            "attn_bias": noise(8, 8, 8, seed=1),
            "padding": ~_ends(8, 6, longest=8),
        },
        "dptech-corp/Uni-Mol",
    ),
    Case(
        "rosettafold_tied",
        "one map for all rows, queries times weights of rows",
        2,
        SoftTiedAttention,
        lambda: {"msa": noise(2, 4, 7, 32, seed=0)},
        "RosettaCommons/RoseTTAFold",
    ),
    Case(
        "crossformer_two_stages",
        "time, routers and back; scale inside softmax",
        3,
        TwoStageSeries,
        lambda: {"x": noise(2, 6, 5, 32, seed=0)},
        "Thinklab-SJTU/Crossformer",
    ),
    Case(
        "pyraformer",
        "a mask of a graph, repeated for the batch",
        1,
        PyramidAttention,
        lambda: {"x": noise(2, 14, 32, seed=0)},
        "ant-research/Pyraformer",
    ),
    Case(
        "sasrec",
        "PyTorch's module, an inverted triangle",
        1,
        SequentialRecommendation,
        lambda: {"log_seqs": torch.tensor([[0, 0, 3, 5, 9, 2, 4, 8], [1, 7, 3, 5, 9, 2, 4, 8]])},
        "pmixer/SASRec.pytorch",
    ),
    Case(
        "bert4rec",
        "a mask from the items, repeated for queries",
        1,
        ClozeRecommendation,
        lambda: {"items": torch.tensor([[0, 0, 3, 5, 9, 2, 4, 8], [1, 7, 3, 5, 9, 2, 4, 8]])},
        "jaywonchung/BERT4Rec-VAE-Pytorch",
    ),
    Case(
        "s3rec",
        "padding times a triangle, -10000 added, blind rows",
        1,
        PretrainedRecommendation,
        lambda: {
            "x": noise(2, 8, 32, seed=0),
            "input_ids": torch.tensor([[0, 0, 3, 5, 9, 2, 4, 8], [1, 7, 3, 5, 9, 2, 4, 8]]),
        },
        "aHuiWang/CIKM2020-S3Rec",
    ),
    Case(
        "stosa_distances",
        "negated distances, weights read twice",
        1,
        StochasticRecommendation,
        lambda: {
            "means": noise(2, 8, 32, seed=0),
            "covs": noise(2, 8, 32, seed=1),
            "mask": torch.triu(torch.ones(8, 8), 1)[None, None] * -10000.0,
        },
        "zfan20/STOSA",
    ),
    Case(
        "nrms_heads",
        "head by head, the input as keys and values",
        2,
        NewsSelfAttention,
        lambda: {"x": noise(2, 8, 16, seed=0)},
        "yusanshi/news-recommendation",
    ),
    Case(
        "nrms_exponentials",
        "exponentials times a mask over their sum and 1e-8",
        1,
        NewsExponentials,
        lambda: {"x": noise(2, 8, 32, seed=0), "length": torch.tensor([8, 5])},
        "yusanshi/news-recommendation",
    ),
    Case(
        "saint_rows",
        "features, then rows of the batch",
        2,
        RowsAndColumns,
        lambda: {"x": noise(6, 5, 8, seed=0)},
        "somepago/saint",
    ),
    Case(
        "trajectory_transformer",
        "columns of a triangle blinded, a copy of the weights stored",
        1,
        TrajectoryAttention,
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "jannerm/trajectory-transformer",
    ),
    Case(
        "iris_cache",
        "a cache written at its end, a triangle with blocks",
        1,
        WorldModelAttention,
        lambda: {"x": noise(2, 4, 32, seed=0)},
        "eloialonso/iris",
    ),
)
