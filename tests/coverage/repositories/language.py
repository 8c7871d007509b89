"""Language models, and what else is called a transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.coverage.case import Case
from tests.support.zoo import noise

__all__ = ["CASES"]


def _written(cache: Tensor) -> Tensor:
    """The cache itself in inference; a copy where autograd would keep the graph of one call alive in the next."""
    return cache.clone() if torch.is_grad_enabled() else cache


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def _ends(*lengths: int, longest: int) -> Tensor:
    """True up to the length of each sample."""
    return torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]


class CausalSelfAttention(nn.Module):
    """One projection for all three, and a buffer of ones below the diagonal."""

    bias: Tensor

    def __init__(self, width: int = 32, heads: int = 4, block: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        parts = self.c_attn(x).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        att = nn.functional.softmax(att, dim=-1)
        y = (att @ v).transpose(1, 2).contiguous().view(batch, length, width)
        result: Tensor = self.c_proj(y)
        return result


class SameLengthAttention(nn.Module):
    """Keys of a memory, scores with the heads last, and a window that is filled in only if it masks anything."""

    def __init__(self, width: int = 32, heads: int = 4, memory: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.memory = heads, width // heads, memory
        self.q_net = nn.Linear(width, width, bias=False)
        self.kv_net = nn.Linear(width, 2 * width, bias=False)
        self.drop_attention = nn.Dropout(0.1)
        self.o_net = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.scale = 1 / (self.head_dim**0.5)

    def forward(self, h: Tensor, mems: Tensor) -> Tensor:
        queries, remembered = h.size(0), mems.size(0)
        keys = queries + remembered
        ones = h.new_ones(queries, keys)
        beyond = keys - self.memory
        shift = queries - beyond if beyond > 0 else queries
        mask = (torch.triu(ones, 1 + remembered) + torch.tril(ones, -shift)).bool()[:, :, None]
        c = torch.cat([mems, h], 0)
        head_q = self.q_net(h)
        head_k, head_v = torch.chunk(self.kv_net(c), 2, -1)
        head_q = head_q.view(h.size(0), h.size(1), self.heads, self.head_dim)
        head_k = head_k.view(c.size(0), c.size(1), self.heads, self.head_dim)
        head_v = head_v.view(c.size(0), c.size(1), self.heads, self.head_dim)
        score = torch.einsum("ibnd,jbnd->ijbn", (head_q, head_k))
        score.mul_(self.scale)
        if mask is not None and mask.any().item():
            if mask.dim() == 2:
                score.masked_fill_(mask[None, :, :, None], -float("inf"))
            elif mask.dim() == 3:
                score.masked_fill_(mask[:, :, :, None], -float("inf"))
        prob = F.softmax(score, dim=1)
        prob = self.drop_attention(prob)
        vec = torch.einsum("ijbn,jbnd->ibnd", (prob, head_v))
        vec = vec.contiguous().view(vec.size(0), vec.size(1), self.heads * self.head_dim)
        result: Tensor = self.norm(h + self.o_net(vec))
        return result


class RelativeMemoryAttention(nn.Module):
    """Relative positions that are shifted into place by a view of padded scores; softmax over the second dimension."""

    inv_freq: Tensor

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv_net = nn.Linear(width, 3 * width, bias=False)
        self.r_net = nn.Linear(width, width, bias=False)
        self.o_net = nn.Linear(width, width, bias=False)
        self.r_w_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.r_r_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.drop_attention = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0.0, width, 2.0) / width)))
        self.scale = 1 / (self.head_dim**0.5)

    @staticmethod
    def shifted(x: Tensor) -> Tensor:
        zero_pad = torch.zeros((x.size(0), 1, *x.size()[2:]), device=x.device, dtype=x.dtype)
        padded = torch.cat([zero_pad, x], dim=1)
        padded = padded.view(x.size(1) + 1, x.size(0), *x.size()[2:])
        return padded[1:].view_as(x)

    def forward(self, w: Tensor, mems: Tensor) -> Tensor:
        q_len, batch, m_len = w.size(0), w.size(1), mems.size(0)
        k_len = q_len + m_len
        mask = torch.triu(w.new_ones(q_len, k_len), diagonal=1 + m_len).bool()[:, :, None]
        positions = torch.arange(k_len - 1, -1, -1.0, device=w.device, dtype=w.dtype)
        angles = torch.outer(positions, self.inv_freq)
        r = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None, :]
        w_heads = self.qkv_net(torch.cat([mems, w], 0))
        r_head_k = self.r_net(r)
        w_head_q, w_head_k, w_head_v = torch.chunk(w_heads, 3, dim=-1)
        w_head_q = w_head_q[-q_len:]
        w_head_q = w_head_q.view(q_len, batch, self.heads, self.head_dim)
        w_head_k = w_head_k.view(k_len, batch, self.heads, self.head_dim)
        w_head_v = w_head_v.view(k_len, batch, self.heads, self.head_dim)
        r_head_k = r_head_k.view(k_len, self.heads, self.head_dim)
        ac = torch.einsum("ibnd,jbnd->ijbn", (w_head_q + self.r_w_bias, w_head_k))
        bd = torch.einsum("ibnd,jnd->ijbn", (w_head_q + self.r_r_bias, r_head_k))
        bd = self.shifted(bd)
        score = ac + bd
        score.mul_(self.scale)
        score = score.float().masked_fill(mask[:, :, :, None], -float("inf")).type_as(score)
        prob = F.softmax(score, dim=1)
        prob = self.drop_attention(prob)
        vec = torch.einsum("ijbn,jbnd->ibnd", (prob, w_head_v))
        vec = vec.contiguous().view(vec.size(0), vec.size(1), self.heads * self.head_dim)
        result: Tensor = self.norm(w + self.o_net(vec))
        return result


class TwoStreamAttention(nn.Module):
    """Two streams of queries over the same keys: content, position and segment scores, and 1e30 times a mask less."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        head_dim = width // heads
        self.q_proj = nn.Parameter(torch.randn(width, heads, head_dim))
        self.k_proj = nn.Parameter(torch.randn(width, heads, head_dim))
        self.v_proj = nn.Parameter(torch.randn(width, heads, head_dim))
        self.r_proj = nn.Parameter(torch.randn(width, heads, head_dim))
        self.o_proj = nn.Parameter(torch.randn(width, heads, head_dim))
        self.r_w_bias = nn.Parameter(torch.randn(heads, head_dim))
        self.r_r_bias = nn.Parameter(torch.randn(heads, head_dim))
        self.r_s_bias = nn.Parameter(torch.randn(heads, head_dim))
        self.seg_embed = nn.Parameter(torch.randn(2, heads, head_dim))
        self.norm = nn.LayerNorm(width)
        self.drop_attention = nn.Dropout(0.1)
        self.scale = 1 / (head_dim**0.5)

    @staticmethod
    def shifted(x: Tensor, k_len: int) -> Tensor:
        size = x.shape
        x = torch.reshape(x, [size[1], size[0], size[2], size[3]])
        x = x[1:, 0:, 0:, 0:]
        x = torch.reshape(x, [size[0], size[1] - 1, size[2], size[3]])
        return x[0:, 0:k_len, 0:, 0:]

    def core(self, q: Tensor, k: Tensor, v: Tensor, k_r: Tensor, seg_mat: Tensor, mask: Tensor) -> Tensor:
        ac = torch.einsum("ibnd,jbnd->ijbn", q + self.r_w_bias, k)
        bd = torch.einsum("ibnd,jbnd->ijbn", q + self.r_r_bias, k_r)
        bd = self.shifted(bd, k_len=ac.shape[1])
        ef = torch.einsum("ibnd,snd->ibns", q + self.r_s_bias, self.seg_embed)
        ef = torch.einsum("ijbs,ibns->ijbn", seg_mat, ef)
        score = (ac + bd + ef) * self.scale
        score = score - 1e30 * mask
        prob = F.softmax(score, dim=1)
        prob = self.drop_attention(prob)
        return torch.einsum("ijbn,jbnd->ibnd", prob, v)

    def forward(
        self, h: Tensor, g: Tensor, mems: Tensor, r: Tensor, perm_mask: Tensor, segments: Tensor, target_mapping: Tensor
    ) -> tuple[Tensor, Tensor]:
        q_len, m_len = h.size(0), mems.size(0)
        data_mask = torch.cat([torch.zeros([q_len, m_len, h.size(1)], dtype=h.dtype), perm_mask], dim=1)
        mask = (data_mask[:, :, :, None] > 0).float()
        itself = torch.cat([torch.zeros([q_len, m_len]), -torch.eye(q_len)], dim=-1)
        mask_h = ((mask + itself[:, :, None, None]) > 0).float()
        of_keys = torch.cat([torch.zeros([m_len, h.size(1)], dtype=torch.long), segments], dim=0)
        seg_mat = (segments[:, None] != of_keys[None, :]).long()
        seg_mat = F.one_hot(seg_mat, 2).float()
        cat = torch.cat([mems, h], dim=0)
        k = torch.einsum("ibh,hnd->ibnd", cat, self.k_proj)
        v = torch.einsum("ibh,hnd->ibnd", cat, self.v_proj)
        k_r = torch.einsum("ibh,hnd->ibnd", r, self.r_proj)
        q_h = torch.einsum("ibh,hnd->ibnd", h, self.q_proj)
        vec_h = self.core(q_h, k, v, k_r, seg_mat, mask_h)
        q_g = torch.einsum("ibh,hnd->ibnd", g, self.q_proj)
        q_g = torch.einsum("mbnd,mlb->lbnd", q_g, target_mapping)
        vec_g = self.core(q_g, k, v, k_r, seg_mat, mask)
        vec_g = torch.einsum("lbnd,mlb->mbnd", vec_g, target_mapping)
        out_h: Tensor = self.norm(torch.einsum("ibnd,hnd->ibh", vec_h, self.o_proj) + h)
        out_g: Tensor = self.norm(torch.einsum("ibnd,hnd->ibh", vec_g, self.o_proj) + g)
        return out_h, out_g


def _two_streams() -> dict[str, Any]:
    length, targets, memory, batch = 8, 3, 4, 2
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(row)) for row in range(batch)])
    rank = order.argsort(dim=1).t()
    return {
        "h": noise(length, batch, 32, seed=0),
        "g": noise(targets, batch, 32, seed=1),
        "mems": noise(memory, batch, 32, seed=2),
        "r": noise(2 * length + memory, 1, 32, seed=3),
        "perm_mask": (rank[:, None] <= rank[None, :]).float(),
        "segments": (torch.arange(length) > 4).long()[:, None].expand(length, batch).contiguous(),
        "target_mapping": F.one_hot(order[:, -targets:].t(), length).float().transpose(1, 2).contiguous(),
    }


class FactorizedFunnelAttention(nn.Module):
    """Pooled queries; positions as products of sines, segments by a choice of two scores, 1e6 times a mask less."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        head_dim = width // heads
        self.width, self.heads = width, heads
        self.q_head = nn.Parameter(torch.zeros(width, heads, head_dim))
        self.k_head = nn.Parameter(torch.zeros(width, heads, head_dim))
        self.k_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.v_head = nn.Parameter(torch.zeros(width, heads, head_dim))
        self.v_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.r_w_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.r_r_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.r_kernel = nn.Parameter(torch.zeros(width, heads, head_dim))
        self.r_s_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.seg_embed = nn.Parameter(torch.zeros(2, heads, head_dim))
        self.post_proj = nn.Parameter(torch.zeros(heads, head_dim, width))
        self.drop_attention = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(width)
        self.scale = 1.0 / math.sqrt(head_dim)

    def encodings(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = self.width // 2
        inv_freq = 1 / (10000 ** (torch.arange(0, half, 1.0) / half))
        sinusoid = torch.einsum("...i,d->...id", torch.arange(0, length, 1.0), inv_freq)
        sin, cos = torch.sin(sinusoid), torch.cos(sinusoid)
        return (
            torch.cat([sin, sin], dim=-1)[::2],
            torch.cat([cos, cos], dim=-1)[::2],
            torch.cat([cos, sin], dim=-1),
            torch.cat([-sin, cos], dim=-1),
        )

    def forward(self, hidden: Tensor, input_mask: Tensor, segments: Tensor) -> Tensor:
        length = hidden.size(1)
        pooled = hidden[:, ::2]
        seg_mat = torch.eq(torch.unsqueeze(segments[:, ::2], -1), torch.unsqueeze(segments, -2))
        cls_mat = torch.unsqueeze(torch.eq(segments[:, ::2], 2), -1) | torch.unsqueeze(torch.eq(segments, 2), -2)
        seg_mat = cls_mat | seg_mat
        func_mask = F.pad(torch.ones([pooled.size(1) - 1, length - 1]), (1, 0, 1, 0))
        enc_q_1, enc_q_2, enc_k_1, enc_k_2 = self.encodings(length)

        q_head = torch.einsum("...a,aef->...ef", pooled, self.q_head)
        k_head = torch.einsum("...a,aef->...ef", hidden, self.k_head) + self.k_bias
        v_head = torch.einsum("...a,aef->...ef", hidden, self.v_head) + self.v_bias
        q_head = q_head * self.scale
        content = torch.einsum("...ind,...jnd->...nij", q_head + self.r_w_bias * self.scale, k_head)
        q_head_r = torch.einsum("...inh,dnh->...ind", q_head + self.r_r_bias * self.scale, self.r_kernel)
        q_head_r_1 = q_head_r * torch.unsqueeze(enc_q_1, -2)
        q_head_r_2 = q_head_r * torch.unsqueeze(enc_q_2, -2)
        bd = torch.einsum("...ind,jd->...nij", q_head_r_1, enc_k_1) + torch.einsum(
            "...ind,jd->...nij", q_head_r_2, enc_k_2
        )
        bd = bd * func_mask
        seg_bias = torch.einsum("...ind,snd->...nis", q_head + self.r_s_bias * self.scale, self.seg_embed)
        shape = [seg_mat.size(0), self.heads, seg_mat.size(1), seg_mat.size(2)]
        seg_mat = torch.unsqueeze(seg_mat, -3).expand(shape)
        different, same = torch.split(seg_bias, 1, dim=-1)
        seg_bias = torch.where(seg_mat, same.expand(shape), different.expand(shape))
        seg_bias *= func_mask
        score = content + bd + seg_bias
        dtype = score.dtype
        score = score.float()
        score = score - 1e6 * input_mask[:, None, None, :].float()
        prob = torch.softmax(score, dim=-1)
        prob = prob.type(dtype)
        prob = self.drop_attention(prob)
        vec = torch.einsum("...nij,...jnd->...ind", prob, v_head)
        out = torch.einsum("...ab,abe->...e", vec, self.post_proj)
        result: Tensor = self.norm(pooled + out)
        return result


class FactoredAttention(nn.Module):
    """One sequence in blocks: within a block, across blocks, to the previous block, and to a summary of each block."""

    def __init__(self, width: int = 32, heads: int = 2, blocks: int = 4) -> None:
        super().__init__()
        self.heads, self.blocks = heads, blocks
        self.c_attn_block = nn.Linear(width, 3 * width)
        self.c_attn_transpose = nn.Linear(width, 3 * width)
        self.c_attn_previous = nn.Linear(width, 3 * width)
        self.c_attn_summary = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def mask(self, kind: str | None, q_l: int, kv_l: int) -> Tensor | None:
        if kind is None or q_l == 1:
            return None
        if kind == "autoregressive":
            mask = torch.ones(q_l, kv_l).tril(max(kv_l - q_l, 0))
        else:
            ones = torch.ones(q_l, q_l).tril().view(q_l, self.blocks, q_l // self.blocks)
            ones = ones[:, :-1, -kv_l // self.blocks :]
            mask = F.pad(ones, (0, 0, 1, 0), value=1).contiguous().view(q_l, kv_l)
        return mask.view(1, 1, q_l, kv_l)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kind: str | None) -> Tensor:
        scale = 1.0 / math.sqrt(math.sqrt(q.size(-1)))
        if self.training:
            w = torch.matmul(q * scale, k * scale)
        else:
            w = torch.matmul(q, k)
            w.mul_(scale * scale)
        wtype = w.dtype
        w = w.float()
        mask = self.mask(kind, q.size(-2), k.size(-1))
        if mask is not None:
            w = w * mask + -1e9 * (1 - mask)
        w = F.softmax(w, dim=-1).type(wtype)
        return torch.matmul(w, v)

    def heads_of(self, x: Tensor, key: bool = False) -> Tensor:
        x = x.view(*x.size()[:-1], self.heads, x.size(-1) // self.heads)
        return x.permute(0, 2, 3, 1) if key else x.permute(0, 2, 1, 3)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, kind: str | None = "autoregressive") -> Tensor:
        a = self.attend(self.heads_of(q), self.heads_of(k, key=True), self.heads_of(v), kind)
        a = a.permute(0, 2, 1, 3).contiguous()
        return a.view(*a.size()[:-2], a.size(-2) * a.size(-1))

    def block(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bs, length, d = v.shape
        size = length // self.blocks
        q, k, v = (part.view(bs * length // size, size, d) for part in (q, k, v))
        return self.dense(q, k, v).view(bs, length, d)

    def transpose(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bs, length, d = v.shape
        size = length // self.blocks
        q, k, v = (
            part.view(bs, length // size, size, d).transpose(1, 2).contiguous().view(bs * size, length // size, d)
            for part in (q, k, v)
        )
        a = self.dense(q, k, v).view(bs, size, length // size, d)
        return a.transpose(1, 2).contiguous().view(bs, length, d)

    def previous(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bs, length, d = v.shape
        size = length // self.blocks
        q = q.view(bs * length // size, size, d)
        k, v = (
            F.pad(part.view(bs, length // size, size, d)[:, :-1, :, :], (0, 0, 0, 0, 1, 0)).view(-1, size, d)
            for part in (k, v)
        )
        return self.dense(q, k, v, None).view(bs, length, d)

    def summary(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bs, length, d = v.shape
        k, v = (
            F.pad(part.view(bs, self.blocks, length // self.blocks, d)[:, :-1, -1, :], (0, 0, 1, 0)) for part in (k, v)
        )
        return self.dense(q, k, v, "summary").view(bs, length, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.c_proj(self.block(*self.c_attn_block(x).chunk(3, dim=2)))
        x = x + self.c_proj(self.transpose(*self.c_attn_transpose(x).chunk(3, dim=2)))
        x = x + self.c_proj(self.previous(*self.c_attn_previous(x).chunk(3, dim=2)))
        result: Tensor = x + self.c_proj(self.summary(*self.c_attn_summary(x).chunk(3, dim=2)))
        return result


class GatedChunkAttention(nn.Module):
    """One head in chunks, a table of distances that is tiled into a matrix, and padding that spares empty chunks."""

    def __init__(self, width: int = 32, z: int = 8, h: int = 48, chunk: int = 4) -> None:
        super().__init__()
        self.width, self.z, self.h, self.chunk = width, z, h, chunk
        self.norm = nn.LayerNorm(width)
        self.v_proj = nn.Linear(width, h)
        self.mx_proj = nn.Linear(width, z + h + 2 * width)
        self.h_proj = nn.Linear(h, width)
        self.gamma = nn.Parameter(torch.zeros(2, z))
        self.beta = nn.Parameter(torch.zeros(2, z))
        self.distances = nn.Parameter(torch.zeros(2 * chunk - 1))

    def bias(self, length: int) -> Tensor:
        b = self.distances[(self.chunk - length) : (self.chunk + length - 1)]
        t = F.pad(b, (0, length))
        t = torch.tile(t, (length,))
        t = t[:-length]
        t = t.view(length, 3 * length - 2)
        start = (2 * length - 1) // 2
        return t[:, start : t.size(1) - start]

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        length, batch, _ = x.size()
        residual = x
        x = self.norm(x)
        v = F.silu(self.v_proj(x))
        base = self.mx_proj(x)
        u, zr, hx = torch.split(base, [self.width, self.z + self.h, self.width], dim=-1)
        u = torch.sigmoid(u)
        z, r = torch.split(F.silu(zr), [self.z, self.h], dim=-1)
        z = z.unsqueeze(2) * self.gamma + self.beta
        q, k = torch.unbind(z, dim=2)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        chunks = length // self.chunk
        q = q.reshape(batch, chunks, self.chunk, self.z)
        k = k.reshape(batch, chunks, self.chunk, self.z)
        v = v.reshape(batch, chunks, self.chunk, self.h)
        padding = padding.view(batch, chunks, self.chunk)
        q = q * self.z**-0.5
        qk = torch.matmul(q, k.transpose(2, 3)) + self.bias(k.size(2))
        nothing = padding.all(dim=-1, keepdim=True)
        padding = torch.logical_and(padding, ~nothing)
        qk = qk.masked_fill(padding.unsqueeze(2).to(torch.bool), float("-inf"))
        weights = F.softmax(qk, dim=-1, dtype=torch.float32).type_as(qk)
        h = torch.matmul(weights, v).view(batch, length, self.h).transpose(0, 1)
        h = F.silu(hx + self.h_proj(h * r))
        return torch.addcmul(residual, u, h - residual)


class AdaptiveSpanAttention(nn.Module):
    """Each query sees the keys just before it: scores are skewed, weights times a learned ramp, normalized."""

    mask_template: Tensor

    def __init__(self, width: int = 32, heads: int = 4, span: int = 8, ramp: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.span, self.ramp = heads, width // heads, span, ramp
        self.proj_query = nn.Linear(width, width, bias=False)
        self.proj_key = nn.Linear(width, width, bias=False)
        self.proj_val = nn.Linear(width, width, bias=False)
        self.proj_out = nn.Linear(width, width, bias=False)
        self.key_pe = nn.Parameter(torch.randn(1, self.head_dim, span))
        self.current_val = nn.Parameter(torch.zeros(heads, 1, 1) + 0.5, requires_grad=True)
        self.register_buffer("mask_template", torch.linspace(1 - span, 0, steps=span))

    @staticmethod
    def skewed(x: Tensor, value: float) -> Tensor:
        batch, m, length = x.size()
        x = F.pad(x, (0, m + 1), value=value)
        x = x.view(batch, -1)
        x = x[:, :-m]
        return x.view(batch, m, m + length)

    @staticmethod
    def unskewed(x: Tensor) -> Tensor:
        batch, m, length = x.size()
        length -= m
        x = x.view(batch, -1)
        x = F.pad(x, (0, m))
        x = x.view(batch, m, m + length + 1)
        return x[:, :, :length]

    def heads_of(self, x: Tensor) -> Tensor:
        x = x.view(*x.size()[:-1], self.heads, self.head_dim)
        x = x.transpose(1, 2).contiguous()
        return x.view(-1, x.size(-2), x.size(-1))

    def ramped(self, attn: Tensor) -> Tensor:
        batch, m = attn.size(0), attn.size(1)
        attn = attn.reshape(batch // self.heads, self.heads, m, -1)
        mask = self.mask_template + self.current_val * self.span
        mask = mask / self.ramp + 1
        mask = mask.clamp(0, 1)
        attn = attn * mask
        attn = attn / (attn.sum(-1, keepdim=True) + 1e-8)
        return attn.view(batch, m, -1)

    def forward(self, h: Tensor, h_cache: Tensor) -> Tensor:
        batch, m, _ = h.size()
        everything = torch.cat([h_cache, h], dim=1)
        query = self.heads_of(self.proj_query(h))
        value = self.heads_of(self.proj_val(everything))
        key = self.heads_of(self.proj_key(everything))
        attn_cont = torch.matmul(query, key.transpose(-1, -2))
        attn_cont = self.unskewed(attn_cont)
        attn_pos = torch.matmul(query, self.key_pe)
        attn = attn_cont + attn_pos
        attn = attn / math.sqrt(self.head_dim)
        attn = F.softmax(attn, dim=-1)
        attn = self.ramped(attn)
        out = torch.matmul(self.skewed(attn, 0), value)
        out = out.view(batch, self.heads, m, self.head_dim)
        out = out.transpose(1, 2).contiguous()
        result: Tensor = self.proj_out(out.view(batch, m, -1))
        return result


class AbsorbedLatentAttention(nn.Module):
    """Latent keys that are the values too, shared by all heads; two products added up, with the heads in third."""

    kv_cache: Tensor
    pe_cache: Tensor
    angles: Tensor

    def __init__(self, width: int = 32, heads: int = 4, rank: int = 16, nope: int = 8, rope: int = 8) -> None:
        super().__init__()
        self.heads, self.rank, self.nope, self.rope, self.v_dim = heads, rank, nope, rope, nope
        self.wq = nn.Linear(width, heads * (nope + rope), bias=False)
        self.wkv_a = nn.Linear(width, rank + rope)
        self.kv_norm = nn.Parameter(torch.ones(rank))
        self.wkv_b = nn.Linear(rank, heads * (nope + self.v_dim), bias=False)
        self.wo = nn.Linear(heads * self.v_dim, width, bias=False)
        self.softmax_scale = (nope + rope) ** -0.5
        self.register_buffer("kv_cache", torch.zeros(4, 16, rank), persistent=False)
        self.register_buffer("pe_cache", torch.zeros(4, 16, rope), persistent=False)
        angles = torch.outer(torch.arange(16), 1.0 / (10000.0 ** (torch.arange(0, rope, 2) / rope)))
        self.register_buffer("angles", angles, persistent=False)

    def rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        turns = torch.polar(torch.ones_like(angles), angles).view(1, pairs.size(1), 1, pairs.size(-1))
        return torch.view_as_real(pairs * turns).flatten(3).to(x.dtype)

    def forward(self, x: Tensor, start_pos: int) -> Tensor:
        batch, length, _ = x.size()
        end_pos = start_pos + length
        angles = self.angles[start_pos:end_pos]
        mask = torch.full((length, length), float("-inf"), device=x.device).triu_(1) if length > 1 else None
        q = self.wq(x)
        q = q.view(batch, length, self.heads, self.nope + self.rope)
        q_nope, q_pe = torch.split(q, [self.nope, self.rope], dim=-1)
        q_pe = self.rotated(q_pe, angles)
        kv = self.wkv_a(x)
        kv, k_pe = torch.split(kv, [self.rank, self.rope], dim=-1)
        k_pe = self.rotated(k_pe.unsqueeze(2), angles)
        wkv_b = self.wkv_b.weight
        wkv_b = wkv_b.view(self.heads, -1, self.rank)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, : self.nope])
        kv_cache, pe_cache = _written(self.kv_cache), _written(self.pe_cache)
        kv_cache[:batch, start_pos:end_pos] = _rms(kv, self.kv_norm)
        pe_cache[:batch, start_pos:end_pos] = k_pe.squeeze(2)
        scores = (
            torch.einsum("bshc,btc->bsht", q_nope, kv_cache[:batch, :end_pos])
            + torch.einsum("bshr,btr->bsht", q_pe, pe_cache[:batch, :end_pos])
        ) * self.softmax_scale
        if mask is not None:
            scores += mask.unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        x = torch.einsum("bsht,btc->bshc", scores, kv_cache[:batch, :end_pos])
        x = torch.einsum("bshc,hdc->bshd", x, wkv_b[:, -self.v_dim :])
        result: Tensor = self.wo(x.flatten(2))
        return result


class CachedGroupedAttention(nn.Module):
    """Keys are written into a cache at a position that is a number, and the mask is zeros before a triangle."""

    cache_k: Tensor
    cache_v: Tensor
    angles: Tensor

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, longest: int = 16) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        cache = noise(4, longest, kv_heads, self.head_dim, seed=5)
        self.register_buffer("cache_k", cache, persistent=False)
        self.register_buffer("cache_v", cache.flip(0).clone(), persistent=False)
        freqs = 1.0 / (500000.0 ** (torch.arange(0, self.head_dim, 2)[: (self.head_dim // 2)].float() / self.head_dim))
        angles = torch.outer(torch.arange(longest, dtype=torch.float32), freqs)
        self.register_buffer("angles", angles, persistent=False)

    def rotated(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        shape = [d if i == 1 or i == pairs.ndim - 1 else 1 for i, d in enumerate(pairs.shape)]
        return torch.view_as_real(pairs * freqs_cis.view(*shape)).flatten(3).type_as(x)

    def repeated(self, x: Tensor) -> Tensor:
        batch, length, kv_heads, head_dim = x.shape
        times = self.heads // self.kv_heads
        return (
            x[:, :, :, None, :]
            .expand(batch, length, kv_heads, times, head_dim)
            .reshape(batch, length, kv_heads * times, head_dim)
        )

    def forward(self, x: Tensor, start_pos: int) -> Tensor:
        batch, length, _ = x.shape
        angles = self.angles[start_pos : start_pos + length]
        freqs_cis = torch.polar(torch.ones_like(angles), angles)
        mask = None
        if length > 1:
            mask = torch.full((length, length), float("-inf"), device=x.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((length, start_pos), device=x.device), mask]).type_as(x)
        xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)
        xq = xq.view(batch, length, self.heads, self.head_dim)
        xk = xk.view(batch, length, self.kv_heads, self.head_dim)
        xv = xv.view(batch, length, self.kv_heads, self.head_dim)
        xq, xk = self.rotated(xq, freqs_cis), self.rotated(xk, freqs_cis)
        cache_k, cache_v = _written(self.cache_k), _written(self.cache_v)
        cache_k[:batch, start_pos : start_pos + length] = xk
        cache_v[:batch, start_pos : start_pos + length] = xv
        keys = self.repeated(cache_k[:batch, : start_pos + length])
        values = self.repeated(cache_v[:batch, : start_pos + length])
        xq = xq.transpose(1, 2)
        keys = keys.transpose(1, 2)
        values = values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, values)
        output = output.transpose(1, 2).contiguous().view(batch, length, -1)
        result: Tensor = self.wo(output)
        return result


class SinkBlock(nn.Module):
    """No batch: one sequence of packed tokens; a sink per head as a further column, and a window of two triangles."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, width // heads, window
        self.sinks = nn.Parameter(torch.zeros(heads))
        self.scale = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, self.head_dim * (heads + 2 * kv_heads))
        self.out = nn.Linear(self.head_dim * heads, width)
        self.sm_scale = 1 / math.sqrt(self.head_dim)

    def rotated(self, x: Tensor) -> Tensor:
        freq = 150000.0 ** (torch.arange(0, self.head_dim, 2, dtype=torch.float, device=x.device) / self.head_dim)
        t = torch.arange(x.shape[0], dtype=torch.float32, device=x.device)
        freqs = torch.einsum("i,j->ij", t, 1.0 / freq)
        cos, sin = freqs.cos().unsqueeze(-2).to(x.dtype), freqs.sin().unsqueeze(-2).to(x.dtype)
        x1, x2 = torch.chunk(x.view(x.shape[0], -1, self.head_dim), 2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).reshape(x.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        n_tokens, n_heads, q_mult, _ = q.shape
        k = k[:, :, None, :].expand(-1, -1, q_mult, -1)
        v = v[:, :, None, :].expand(-1, -1, q_mult, -1)
        s = s.reshape(n_heads, q_mult, 1, 1).expand(-1, -1, n_tokens, -1)
        mask = torch.triu(q.new_full((n_tokens, n_tokens), -float("inf")), diagonal=1)
        if self.window > 0:
            mask += torch.tril(mask.new_full((n_tokens, n_tokens), -float("inf")), diagonal=-self.window)
        qk = torch.einsum("qhmd,khmd->hmqk", q, k)
        qk *= self.sm_scale
        qk += mask[None, None, :, :]
        qk = torch.cat([qk, s], dim=-1)
        w = torch.softmax(qk, dim=-1)
        w = w[..., :-1]
        attn = torch.einsum("hmqk,khmd->qhmd", w, v)
        return attn.reshape(n_tokens, -1)

    def forward(self, x: Tensor) -> Tensor:
        t = _rms(x.float(), self.scale).to(x.dtype)
        qkv = self.qkv(t)
        own, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q = qkv[:, :own].contiguous()
        k = qkv[:, own : own + shared].contiguous()
        v = qkv[:, own + shared : own + 2 * shared].contiguous()
        q = q.view(-1, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        k = k.view(-1, self.kv_heads, self.head_dim)
        v = v.view(-1, self.kv_heads, self.head_dim)
        t = self.attend(self.rotated(q), self.rotated(k), v, self.sinks)
        result: Tensor = x + self.out(t)
        return result


class SoftCappedAttention(nn.Module):
    """Keys written at positions that are a tensor, scores capped by tanh, and masks of -2.38e38, one plus another."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, longest: int = 16, local: int = 0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.longest, self.local = heads, kv_heads, 8, longest, local
        self.q_size, self.kv_size = heads * self.head_dim, kv_heads * self.head_dim
        self.qkv_proj = nn.Linear(width, self.q_size + 2 * self.kv_size, bias=False)
        self.o_proj = nn.Linear(self.q_size, width, bias=False)
        self.scaling = 16**-0.5
        self.softcap = 50.0
        self.register_buffer("k_cache", torch.zeros(2, longest, kv_heads, self.head_dim), persistent=False)
        self.register_buffer("v_cache", torch.zeros(2, longest, kv_heads, self.head_dim), persistent=False)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        mask = torch.full((1, 1, self.longest, self.longest), -2.3819763e38).to(torch.float)
        mask = torch.triu(mask, diagonal=1)
        if self.local:
            lower = torch.full((1, 1, self.longest, self.longest), -2.3819763e38)
            mask = mask + torch.tril(lower, diagonal=-self.local)
        mask = mask.index_select(2, positions)
        qkv = self.qkv_proj(hidden)
        xq, xk, xv = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        xq = xq.view(batch, -1, self.heads, self.head_dim)
        xk = xk.view(batch, -1, self.kv_heads, self.head_dim)
        xv = xv.view(batch, -1, self.kv_heads, self.head_dim)
        k_cache, v_cache = _written(self.k_cache), _written(self.v_cache)
        k_cache.index_copy_(1, positions, xk)
        v_cache.index_copy_(1, positions, xv)
        key = torch.repeat_interleave(k_cache, self.heads // self.kv_heads, dim=2)
        value = torch.repeat_interleave(v_cache, self.heads // self.kv_heads, dim=2)
        q = xq.transpose(1, 2) * 1.0
        k = key.transpose(1, 2)
        v = value.transpose(1, 2)
        q.mul_(self.scaling)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = scores / self.softcap
        scores = torch.tanh(scores)
        scores = scores * self.softcap
        scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        output = torch.matmul(scores, v)
        output = output.transpose(1, 2).contiguous().view(batch, length, -1)
        result: Tensor = self.o_proj(output)
        return result


class LocalAndGlobal(nn.Module):
    """A layer with a window, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.near = SoftCappedAttention(local=4)
        self.far = SoftCappedAttention()

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        hidden = hidden + self.near(hidden, positions)
        result: Tensor = hidden + self.far(hidden, positions)
        return result


class DifferentialAttention(nn.Module):
    """One softmax for two maps per head, of which the second, times a learned number, is taken from the first."""

    def __init__(self, width: int = 32, heads: int = 2, kv_heads: int = 1, depth: int = 1) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.times = heads, kv_heads, heads // kv_heads
        self.head_dim = width // heads // 2
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width // self.times, bias=False)
        self.v_proj = nn.Linear(width, width // self.times, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lambda_q1 = nn.Parameter(torch.zeros(self.head_dim))
        self.lambda_k1 = nn.Parameter(torch.zeros(self.head_dim))
        self.lambda_q2 = nn.Parameter(torch.zeros(self.head_dim))
        self.lambda_k2 = nn.Parameter(torch.zeros(self.head_dim))
        self.subln = nn.Parameter(torch.ones(2 * self.head_dim))

    def repeated(self, x: Tensor) -> Tensor:
        batch, kv_heads, length, head_dim = x.shape
        x = x[:, :, None, :, :].expand(batch, kv_heads, self.times, length, head_dim)
        return x.reshape(batch, kv_heads * self.times, length, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q = self.q_proj(x).view(batch, length, 2 * self.heads, self.head_dim)
        k = self.k_proj(x).view(batch, length, 2 * self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, length, self.kv_heads, 2 * self.head_dim)
        q = q.transpose(1, 2)
        k = self.repeated(k.transpose(1, 2))
        v = self.repeated(v.transpose(1, 2))
        q *= self.head_dim**-0.5
        weights = torch.matmul(q, k.transpose(-1, -2))
        mask = torch.triu(torch.zeros([length, length]).float().fill_(float("-inf")).type_as(weights), 1)
        weights = torch.nan_to_num(weights)
        weights += mask
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        lambda_1 = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1).float()).type_as(q)
        lambda_2 = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1).float()).type_as(q)
        lambda_full = lambda_1 - lambda_2 + self.lambda_init
        weights = weights.view(batch, self.heads, 2, length, length)
        weights = weights[:, :, 0] - lambda_full * weights[:, :, 1]
        attn = torch.matmul(weights, v)
        attn = _rms(attn, self.subln)
        attn = attn * (1 - self.lambda_init)
        attn = attn.transpose(1, 2).reshape(batch, length, width)
        result: Tensor = self.out_proj(attn)
        return result


class MaskedByZeroRows(nn.Module):
    """Heads stacked along the batch; padding is what sums to zero, for keys before and for queries after softmax."""

    def __init__(self, width: int = 32, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.k_proj = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.v_proj = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.drop = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        q, k, v = self.q_proj(queries), self.k_proj(keys), self.v_proj(keys)
        q = torch.cat(torch.chunk(q, self.heads, dim=2), dim=0)
        k = torch.cat(torch.chunk(k, self.heads, dim=2), dim=0)
        v = torch.cat(torch.chunk(v, self.heads, dim=2), dim=0)
        outputs = torch.bmm(q, k.permute(0, 2, 1))
        outputs = outputs / (k.size()[-1] ** 0.5)
        key_masks = torch.sign(torch.abs(torch.sum(keys, dim=-1)))
        key_masks = key_masks.repeat(self.heads, 1)
        key_masks = torch.unsqueeze(key_masks, 1).repeat(1, queries.size()[1], 1)
        padding = torch.ones(*outputs.size()) * (-(2**32) + 1)
        condition = key_masks.eq(0.0).float()
        outputs = padding * condition + outputs * (1.0 - condition)
        if self.causal:
            tril = torch.tril(torch.ones(*outputs[0, :, :].size()), diagonal=0)
            masks = torch.unsqueeze(tril, 0).repeat(outputs.size()[0], 1, 1)
            padding = torch.ones(*masks.size()) * (-(2**32) + 1)
            condition = masks.eq(0.0).float()
            outputs = padding * condition + outputs * (1.0 - condition)
        outputs = F.softmax(outputs, dim=-1)
        query_masks = torch.sign(torch.abs(torch.sum(queries, dim=-1)))
        query_masks = query_masks.repeat(self.heads, 1)
        query_masks = torch.unsqueeze(query_masks, 2).repeat(1, 1, keys.size()[1])
        outputs = outputs * query_masks
        outputs = self.drop(outputs)
        outputs = torch.bmm(outputs, v)
        outputs = torch.cat(torch.chunk(outputs, self.heads, dim=0), dim=2)
        outputs += queries
        result: Tensor = self.norm(outputs)
        return result


class MaskedByZeroRowsDecoder(nn.Module):
    """Causal among the targets, and then over the sources."""

    def __init__(self) -> None:
        super().__init__()
        self.own = MaskedByZeroRows(causal=True)
        self.other = MaskedByZeroRows(causal=False)

    def forward(self, targets: Tensor, sources: Tensor) -> Tensor:
        result: Tensor = self.other(self.own(targets, targets), sources)
        return result


class InPlaceAttention(nn.Module):
    """Everything in place, and the mask a filled copy of zeros that is added."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.att_size = heads, width // heads
        self.scale = self.att_size**-0.5
        self.linear_q = nn.Linear(width, width, bias=False)
        self.linear_k = nn.Linear(width, width, bias=False)
        self.linear_v = nn.Linear(width, width, bias=False)
        self.att_dropout = nn.Dropout(0.1)
        self.output_layer = nn.Linear(width, width, bias=False)

    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        batch, v = q.size(0), k
        q = self.linear_q(q).view(batch, -1, self.heads, self.att_size)
        k = self.linear_k(k).view(batch, -1, self.heads, self.att_size)
        v = self.linear_v(v).view(batch, -1, self.heads, self.att_size)
        q = q.transpose(1, 2)
        v = v.transpose(1, 2)
        k = k.transpose(1, 2).transpose(2, 3)
        q.mul_(self.scale)
        x = torch.matmul(q, k)
        x.add_(torch.zeros_like(x).masked_fill_(mask.unsqueeze(1), -1e9))
        x = torch.softmax(x, dim=3)
        x = self.att_dropout(x)
        x = x.matmul(v)
        x = x.transpose(1, 2).contiguous()
        result: Tensor = self.output_layer(x.view(batch, -1, self.heads * self.att_size))
        return result


class InPlaceDecoder(nn.Module):
    """A triangle for the targets' own attention, and the padding of the sources for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.own = InPlaceAttention()
        self.other = InPlaceAttention()

    def forward(self, targets: Tensor, sources: Tensor, padding: Tensor) -> Tensor:
        ones = torch.ones(targets.size(1), targets.size(1), dtype=torch.uint8, device=targets.device)
        future = torch.triu(ones, diagonal=1).unsqueeze(0).bool()
        x = targets + self.own(targets, targets, future)
        result: Tensor = x + self.other(x, sources, padding.unsqueeze(-2))
        return result


class HeadByHead(nn.Module):
    """A call for each head on a chunk of the features; masks are written to the scores behind autograd's back."""

    def __init__(self, width: int = 32, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.scale = heads, causal, math.sqrt(width)
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(0.2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        dots = query @ key.transpose(1, 2)
        if query.dim() == 3 and self.causal:
            tri = key.data.new(key.size(1), key.size(1)).fill_(1).triu(1) * 1e10
            dots.data.sub_(tri.unsqueeze(0))
        if padding is not None:
            dots.data.masked_fill_(padding.unsqueeze(1).expand_as(dots), -1e10)
        weights: Tensor = self.drop(F.softmax(dots / self.scale, dim=-1))
        return weights @ value

    def forward(self, query: Tensor, key: Tensor, padding: Tensor | None = None) -> Tensor:
        projected = self.wq(query), self.wk(key), self.wv(key)
        q, k, v = (part.chunk(self.heads, -1) for part in projected)
        return torch.cat([self.attend(*each, padding) for each in zip(q, k, v, strict=True)], -1)


class HeadByHeadDecoder(nn.Module):
    """Causal among the answers, and then over the context; the scale is that of the full width."""

    def __init__(self) -> None:
        super().__init__()
        self.own = HeadByHead(causal=True)
        self.other = HeadByHead()

    def forward(self, x: Tensor, context: Tensor, padding: Tensor) -> Tensor:
        x = x + self.own(x, x)
        result: Tensor = x + self.other(x, context, padding)
        return result


class SequenceMatch(nn.Module):
    """Softmax over a matrix of all rows of the batch; minus infinity is written behind autograd's back."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, y_mask: Tensor) -> Tensor:
        x_proj = self.linear(x.view(-1, x.size(2))).view(x.size())
        x_proj = F.relu(x_proj)
        y_proj = self.linear(y.view(-1, y.size(2))).view(y.size())
        y_proj = F.relu(y_proj)
        scores = x_proj.bmm(y_proj.transpose(2, 1))
        y_mask = y_mask.unsqueeze(1).expand(scores.size())
        scores.data.masked_fill_(y_mask.data, -float("inf"))
        alpha_flat = F.softmax(scores.view(-1, y.size(1)), dim=-1)
        alpha = alpha_flat.view(-1, x.size(1), y.size(1))
        return alpha.bmm(y)


class RelativeBlock(nn.Module):
    """Relative positions by a padded view; scores times a mask less 1e4 times what it leaves out, and so once more."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.relative = nn.Linear(width, width)
        self.r_w_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.r_r_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.dense = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.cross_dense = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def heads_of(self, x: Tensor) -> Tensor:
        x = x.view(*x.size()[:-1], self.heads, self.head_dim)
        return x.permute(0, 2, 1, 3)

    @staticmethod
    def shifted(x: Tensor) -> Tensor:
        zero_pad = torch.zeros((*x.size()[:-2], x.size(-2), 1), device=x.device, dtype=x.dtype)
        padded = torch.cat([zero_pad, x], dim=-1)
        padded = padded.view(*x.size()[:-2], x.size(-1) + 1, x.size(-2))
        return padded[:, :, 1:].view_as(x)

    def mixed(self, scores: Tensor, mask: Tensor, value: Tensor) -> Tensor:
        scores = scores / math.sqrt(self.head_dim)
        scores = torch.mul(scores, mask) - 10000.0 * (1.0 - mask)
        probs = torch.nn.Softmax(dim=-1)(scores)
        probs = self.drop(probs)
        context = torch.matmul(probs, value)
        context = context.permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], self.heads * self.head_dim)

    def forward(
        self, hidden: Tensor, mem: Tensor, positions: Tensor, encoded: Tensor, ltor_mask: Tensor, cross_mask: Tensor
    ) -> Tensor:
        length = hidden.size(1)
        q, k, v = self.query_key_value(torch.cat((mem, hidden), 1)).chunk(3, dim=-1)
        q = q[:, -length:]
        q, k, v = self.heads_of(q), self.heads_of(k), self.heads_of(v)
        relative = self.heads_of(self.relative(positions))
        ac = torch.matmul(q + self.r_w_bias.unsqueeze(1), k.transpose(-1, -2))
        bd = torch.matmul(q + self.r_r_bias.unsqueeze(1), relative.transpose(-1, -2))
        bd = self.shifted(bd)
        hidden = hidden + self.dense(self.mixed(ac + bd, ltor_mask, v))
        q = self.heads_of(self.query(hidden))
        k, v = (self.heads_of(part) for part in self.key_value(encoded).chunk(2, dim=-1))
        scores = torch.matmul(q, k.transpose(-1, -2))
        result: Tensor = hidden + self.cross_dense(self.mixed(scores, cross_mask, v))
        return result


class ScaledByLayer(nn.Module):
    """Grouped heads by broadcasting in five dimensions; the query is divided by a number that the scores get back."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2, layer: int = 3) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim, self.layer = heads, groups, width // heads, layer
        self.qkv_proj = nn.Linear(width, self.head_dim * (heads + 2 * groups))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(0.1)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor, shape: list[int]) -> Tensor:
        x = x.view(*shape[:-1], self.head_dim // 2, 2)
        real = x[..., 0] * cos - x[..., 1] * sin
        imaginary = x[..., 0] * sin + x[..., 1] * cos
        return torch.stack([real, imaginary], dim=-1).view(*shape)

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        seq = torch.arange(length, device=x.device)
        causal = seq[:, None] < seq[None, :]
        mask = (causal[None, ...] | ~attention_mask[:, None, :].bool()).float() * -1e10
        positions = torch.cumsum(attention_mask, dim=1) - 1
        quarter = self.head_dim // 4
        freqs = 1.0 / (10000.0 ** (torch.arange(quarter, device=x.device).float() / quarter))
        freqs = torch.cat([freqs, torch.zeros_like(freqs)])
        angles = (positions[..., None] * freqs)[:, :, None, None, :]
        cos, sin = angles.cos(), angles.sin()

        sizes = [self.head_dim * self.heads, self.head_dim * self.groups, self.head_dim * self.groups]
        q, k, v = torch.split(self.qkv_proj(x), sizes, dim=-1)
        shape_q = [batch, length, self.groups, self.heads // self.groups, self.head_dim]
        shape_kv = [batch, length, self.groups, 1, self.head_dim]
        q = self.rotated(q.view(*shape_q), cos, sin, shape_q)
        k = self.rotated(k.view(*shape_kv), cos, sin, shape_kv)
        v = v.view(*shape_kv)
        cached = k.detach(), v.detach()
        q = q.permute(0, 2, 3, 1, 4)
        k = k.permute(0, 2, 3, 4, 1)
        v = v.permute(0, 2, 3, 1, 4)
        coefficient = float(self.layer + 1)
        q = q / (math.sqrt(self.head_dim) * coefficient)
        qk = torch.matmul(q, k)
        qk = qk + mask[:, None, None, :, :]
        scores = F.softmax(qk.float() * coefficient, dim=-1).type_as(x)
        scores = self.drop(scores)
        output = torch.matmul(scores, v)
        output = output.permute(0, 3, 1, 2, 4).reshape(batch, length, -1)
        result: Tensor = self.o_proj(output)
        return result, *cached


class BaddbmmAttention(nn.Module):
    """Time first; an empty matrix that baddbmm multiplies by 0, a bucketed bias and a fill of -1e4 in place."""

    def __init__(self, width: int = 32, heads: int = 4, buckets: int = 8, farthest: int = 16) -> None:
        super().__init__()
        self.heads, self.head_dim, self.buckets, self.farthest = heads, width // heads, buckets, farthest
        self.query_key_value = nn.Linear(width, 3 * width)
        self.relative_attention_bias = nn.Embedding(buckets, heads)
        self.dense = nn.Linear(width, width)
        self.norm_factor = math.sqrt(self.head_dim)
        self.drop = nn.Dropout(0.1)

    def rpe(self, q_len: int, k_len: int) -> Tensor:
        q_pos = torch.arange(q_len, dtype=torch.long)
        k_pos = torch.arange(k_len, dtype=torch.long)
        n = -(k_pos[None, :] - q_pos[:, None])
        n = torch.max(n, torch.zeros_like(n))
        exact = self.buckets // 2
        ratio = torch.log(n.float() / exact) / math.log(self.farthest / exact)
        large = exact + (ratio * (self.buckets - exact)).long()
        large = torch.min(large, torch.full_like(large, self.buckets - 1))
        bucket = torch.where(n < exact, n, large)
        bias: Tensor = self.relative_attention_bias(bucket)
        return bias.movedim(2, 0).unsqueeze(0)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mixed = self.query_key_value(hidden)
        mixed = mixed.view(*mixed.size()[:-1], self.heads, 3 * self.head_dim)
        query, key, value = torch.split(mixed, self.head_dim, dim=-1)
        size = (query.size(1), query.size(2), query.size(0), key.size(0))
        query = query.reshape(size[2], size[0] * size[1], -1)
        key = key.reshape(size[3], size[0] * size[1], -1)
        result = torch.empty(size[0] * size[1], size[2], size[3], dtype=query.dtype, device=query.device)
        result = torch.baddbmm(
            result,
            query.transpose(0, 1),
            key.transpose(0, 1).transpose(1, 2),
            beta=0.0,
            alpha=(1.0 / self.norm_factor),
        )
        scores = result.view(*size)
        scores += self.rpe(query.size(0), key.size(0))
        scores.masked_fill_(mask, -10000.0)
        probs = torch.nn.Softmax(dim=-1)(scores)
        probs = self.drop(probs)
        size = (value.size(1), value.size(2), query.size(0), value.size(3))
        value = value.reshape(value.size(0), size[0] * size[1], -1)
        probs = probs.view(size[0] * size[1], size[2], -1)
        context = torch.bmm(probs, value.transpose(0, 1))
        context = context.view(*size)
        context = context.permute(2, 0, 1, 3).contiguous()
        out: Tensor = self.dense(context.view(*context.size()[:-2], self.heads * self.head_dim))
        return out


class AlibiInBfloat16(nn.Module):
    """Slopes times positions in bfloat16, scaled with the scores, and a mask that is a bfloat16 copy of a bool."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.drop = nn.Dropout(0.1)

    def alibi(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        batch, length = mask.shape
        base = torch.tensor(2 ** (-(2 ** -(math.log2(self.heads) - 3))), dtype=torch.float32)
        slopes = torch.pow(base, torch.arange(1, 1 + self.heads, dtype=torch.int32))
        positions = ((mask.cumsum(dim=-1) - 1) * mask)[:, None, :]
        alibi = slopes[..., None].bfloat16() * positions
        return alibi.reshape(batch * self.heads, 1, length).to(dtype)

    def forward(self, hidden: Tensor, tokens: Tensor, head_mask: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        alibi = self.alibi(tokens, hidden.dtype)
        past = torch.ones(length, length, dtype=torch.bool).tril()
        attention_mask = ~(past[None, None] & tokens[:, None, None, :].bool())
        fused = self.query_key_value(hidden).view(batch, length, self.heads, 3, self.head_dim)
        query, key, value = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        query = query.transpose(1, 2).reshape(batch * self.heads, length, self.head_dim)
        key = key.transpose(1, 2).reshape(batch * self.heads, length, self.head_dim)
        value = value.transpose(1, 2).reshape(batch * self.heads, length, self.head_dim)
        as_float = (attention_mask * 1.0).masked_fill(attention_mask, -1e9).to(torch.bfloat16)
        product = query @ key.transpose(-1, -2)
        scores = product.view(batch, self.heads, length, length)
        probs = F.softmax(
            (scores + alibi.view(batch, self.heads, 1, -1)) * self.inv_norm_factor + as_float,
            dim=-1,
            dtype=hidden.dtype,
        )
        probs = self.drop(probs)
        probs = probs * head_mask
        flat = probs.view(batch * self.heads, length, length)
        context = flat @ value
        context = context.view(batch, self.heads, length, self.head_dim).permute(0, 2, 1, 3)
        result: Tensor = self.dense(context.reshape(batch, length, width))
        return result


class XSoftmax(torch.autograd.Function):
    """Softmax that is zero where it is masked, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        rmask = (1 - mask).bool()
        output = scores.masked_fill(rmask, float("-inf"))
        output = torch.softmax(output, ctx.dim)
        output.masked_fill_(rmask, 0)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        return torch._softmax_backward_data(grads[0], output, ctx.dim, output.dtype), None, None


class DisentangledAttention(nn.Module):
    """Content to position and position to content, both gathered by distance, and a softmax of its own."""

    def __init__(self, width: int = 32, heads: int = 4, farthest: int = 16) -> None:
        super().__init__()
        self.heads, self.farthest = heads, farthest
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.pos_proj = nn.Linear(width, width, bias=False)
        self.pos_q_proj = nn.Linear(width, width)
        self.rel_embeddings = nn.Parameter(torch.zeros(2 * farthest, width))

    def heads_of(self, x: Tensor) -> Tensor:
        x = x.view(*x.size()[:-1], self.heads, -1)
        return x.permute(0, 2, 1, 3)

    def bias(self, query: Tensor, key: Tensor, factor: int) -> Tensor:
        length = query.size(-2)
        ids = torch.arange(0, length)
        relative = (ids[:, None] - ids[None, :].tile((length, 1)))[None, None].long()
        span = min(length, self.farthest)
        embeddings = self.rel_embeddings[self.farthest - span : self.farthest + span, :].unsqueeze(0)
        pos_key = self.heads_of(self.pos_proj(embeddings))
        pos_query = self.heads_of(self.pos_q_proj(embeddings))
        c2p = torch.matmul(query, pos_key.transpose(-1, -2))
        c2p_pos = torch.clamp(relative + span, 0, span * 2 - 1)
        c2p = torch.gather(c2p, dim=-1, index=c2p_pos.expand([query.size(0), query.size(1), length, length]))
        pos_query /= math.sqrt(pos_query.size(-1) * factor)
        p2c_pos = torch.clamp(-relative + span, 0, span * 2 - 1)
        p2c = torch.matmul(key, pos_query.transpose(-1, -2))
        p2c = torch.gather(p2c, dim=-1, index=p2c_pos.expand([query.size(0), query.size(1), length, length]))
        score: Any = 0
        score += c2p
        score += p2c.transpose(-1, -2)
        result: Tensor = score
        return result

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        extended = tokens.unsqueeze(1).unsqueeze(2)
        mask = extended * extended.squeeze(-2).unsqueeze(-1)
        mask = mask.byte()
        query, key, value = self.heads_of(self.in_proj(hidden)).chunk(3, dim=-1)
        query = query + self.heads_of(self.q_bias.unsqueeze(0).unsqueeze(0))
        value = value + self.heads_of(self.v_bias.unsqueeze(0).unsqueeze(0))
        factor = 3
        query = query / math.sqrt(query.size(-1) * factor)
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = scores + self.bias(query, key, factor)
        probs: Tensor = XSoftmax.apply(scores, mask, -1)  # type: ignore[no-untyped-call]
        context = torch.matmul(probs, value)
        context = context.permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], -1)


class PastOfManyLengths(nn.Module):
    """One token per sample, put into a cache where each sample ends; a triangle that masks nothing, and the lengths."""

    bias: Tensor

    def __init__(self, width: int = 32, heads: int = 4, context: int = 12) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.register_buffer("bias", torch.tril(torch.ones(context, context)).view(1, 1, context, context))
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def heads_of(self, x: Tensor, key: bool = False) -> Tensor:
        x = x.view(*x.size()[:-1], self.heads, x.size(-1) // self.heads)
        return x.permute(0, 2, 3, 1).contiguous() if key else x.permute(0, 2, 1, 3).contiguous()

    def forward(self, x: Tensor, layer_past: Tensor, len_past: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.c_attn(x).split(self.width, dim=2)
        query = self.heads_of(query)
        key = self.heads_of(key, key=True)
        value = self.heads_of(value)
        rows = torch.arange(0, key.shape[0], dtype=torch.long, device=key.device)
        past_key, past_value = _written(layer_past[0]), _written(layer_past[1])
        past_key[rows, :, len_past, :] = key.squeeze(-1)
        past_value[rows, :, len_past, :] = value.squeeze(-2)
        key = past_key.transpose(-2, -1)
        value = past_value
        len_kv = len_past + 1
        present = torch.stack((key.transpose(-2, -1), value))

        w = torch.matmul(query, key)
        w = w / math.sqrt(value.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        b = self.bias[:, :, ns - nd : ns, :ns]
        w = w * b - 1e10 * (1 - b)
        positions = torch.arange(key.size(-1), device=key.device)
        absent = positions[None, :] >= len_kv[:, None]
        w = w.masked_fill(absent.unsqueeze(1).unsqueeze(2), -1.0e10)
        w = nn.Softmax(dim=-1)(w)
        a = torch.matmul(w, value)
        a = a.permute(0, 2, 1, 3).contiguous()
        result: Tensor = self.c_proj(a.view(*a.size()[:-2], a.size(-2) * a.size(-1)))
        return result, present


class HeadsAsRepeatedBatch(nn.Module):
    """The input repeated for each head; softmax over a flat matrix; a view that mixes heads and batch at the end."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.w_qs = nn.Parameter(torch.zeros(heads, width, self.head_dim))
        self.w_ks = nn.Parameter(torch.zeros(heads, width, self.head_dim))
        self.w_vs = nn.Parameter(torch.zeros(heads, width, self.head_dim))
        self.temper = width**0.5
        self.softmax = nn.Softmax(dim=1)
        self.drop = nn.Dropout(0.1)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        batch, length, width = x.size()
        attn_mask = padding.unsqueeze(1).expand(batch, length, length)
        future = torch.triu(torch.ones(batch, length, length, dtype=torch.uint8), diagonal=1)
        attn_mask = torch.gt(attn_mask + future, 0)
        attn_mask = attn_mask.repeat(self.heads, 1, 1)
        q_s = x.repeat(self.heads, 1, 1).view(self.heads, -1, width)
        k_s = x.repeat(self.heads, 1, 1).view(self.heads, -1, width)
        v_s = x.repeat(self.heads, 1, 1).view(self.heads, -1, width)
        q_s = torch.bmm(q_s, self.w_qs).view(-1, length, self.head_dim)
        k_s = torch.bmm(k_s, self.w_ks).view(-1, length, self.head_dim)
        v_s = torch.bmm(v_s, self.w_vs).view(-1, length, self.head_dim)
        attn = torch.bmm(q_s, k_s.transpose(1, 2)) / self.temper
        attn.data.masked_fill_(attn_mask, -float("inf"))
        size = attn.size()[:2]
        attn = self.softmax(attn.view(size[0] * size[1], -1)).view(size[0], size[1], -1)
        attn = self.drop(attn)
        outputs = torch.bmm(attn, v_s)
        outputs = outputs.view(batch, length, -1)
        outputs = self.proj(outputs.view(-1, outputs.size(2))).view_as(x)
        result: Tensor = self.norm(outputs + x)
        return result


def _with_zero_rows(*shape: int, seed: int) -> Tensor:
    x = noise(*shape, seed=seed)
    x[1, -3:] = 0
    return x


CASES: tuple[Case, ...] = (
    Case(
        "nanogpt",
        "causal mask in a buffer",
        1,
        CausalSelfAttention,
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "karpathy/nanoGPT",
    ),
    Case(
        "transformer_xl_same_length",
        "memory, heads last, a window that is filled in if it masks anything",
        1,
        SameLengthAttention,
        lambda: {"h": noise(6, 2, 32, seed=0), "mems": noise(6, 2, 32, seed=1)},
        "kimiyoung/transformer-xl",
    ),
    Case(
        "transformer_xl_relative",
        "memory, relative positions by a shifted view",
        1,
        RelativeMemoryAttention,
        lambda: {"w": noise(6, 2, 32, seed=0), "mems": noise(5, 2, 32, seed=1)},
        "kimiyoung/transformer-xl",
    ),
    Case(
        "xlnet_two_streams",
        "two streams, segments, 1e30 times a mask",
        2,
        TwoStreamAttention,
        _two_streams,
        "graykode/xlnet-Pytorch",
    ),
    Case(
        "funnel_factorized",
        "pooled queries, factorized positions, segments by where, 1e6 times a mask",
        1,
        FactorizedFunnelAttention,
        lambda: {
            "hidden": noise(2, 12, 32, seed=0),
            "input_mask": (~_ends(12, 9, longest=12)).float(),
            "segments": torch.tensor([2, *[0] * 5, *[1] * 6]).expand(2, 12).contiguous(),
        },
        "laiguokun/Funnel-Transformer",
    ),
    Case(
        "jukebox_factored",
        "blocks, columns of blocks, the previous block and summaries",
        4,
        FactoredAttention,
        lambda: {"x": noise(2, 16, 32, seed=0)},
        "openai/jukebox",
    ),
    Case(
        "mega_chunks",
        "chunks, a tiled table of distances, padding but for empty chunks",
        1,
        GatedChunkAttention,
        lambda: {"x": noise(12, 2, 32, seed=0), "padding": ~_ends(12, 6, longest=12)},
        "facebookresearch/mega",
    ),
    Case(
        "adaptive_span",
        "skewed windows, weights times a ramp, normalized",
        1,
        AdaptiveSpanAttention,
        lambda: {"h": noise(2, 6, 32, seed=0), "h_cache": noise(2, 8, 32, seed=1)},
        "facebookresearch/adaptive-span",
    ),
    Case(
        "deepseek_v3_absorbed",
        "latent keys shared by all heads, two products, a cache",
        1,
        AbsorbedLatentAttention,
        lambda: {"x": noise(2, 6, 32, seed=0), "start_pos": 0},
        "deepseek-ai/DeepSeek-V3",
    ),
    Case(
        "llama3_cache",
        "grouped heads by expand, a cache, zeros beside a triangle",
        1,
        CachedGroupedAttention,
        lambda: {"x": noise(2, 5, 32, seed=0), "start_pos": 4},
        "meta-llama/llama3",
    ),
    Case(
        "gpt_oss_einsum",
        "sinks as a column, grouped heads in einsum, a window of two triangles",
        1,
        SinkBlock,
        lambda: {"x": noise(12, 32, seed=0)},
        "openai/gpt-oss",
    ),
    Case(
        "gemma_local_global",
        "soft-capping, index_copy_ into a cache, masks of -2.38e38",
        2,
        LocalAndGlobal,
        lambda: {"hidden": noise(2, 8, 32, seed=0), "positions": torch.arange(2, 10)},
        "google/gemma_pytorch",
    ),
    Case(
        "diff_transformer",
        "difference of two maps of one softmax, nan_to_num of the scores",
        1,
        DifferentialAttention,
        lambda: {"x": noise(2, 10, 32, seed=0)},
        "microsoft/unilm",
    ),
    Case(
        "masked_by_zero_rows",
        "heads along the batch, masks of what sums to zero, queries masked after softmax",
        2,
        MaskedByZeroRowsDecoder,
        lambda: {"targets": _with_zero_rows(2, 8, 32, seed=0), "sources": _with_zero_rows(2, 10, 32, seed=1)},
        "leviswind/pytorch-transformer",
    ),
    Case(
        "in_place_transformer",
        "in place; a filled copy of zeros is added",
        2,
        InPlaceDecoder,
        lambda: {
            "targets": noise(2, 8, 32, seed=0),
            "sources": noise(2, 10, 32, seed=1),
            "padding": ~_ends(10, 6, longest=10),
        },
        "tunz/transformer-pytorch",
    ),
    Case(
        "decanlp_heads",
        "head by head, masks written to .data",
        4,
        HeadByHeadDecoder,
        lambda: {
            "x": noise(2, 8, 32, seed=0),
            "context": noise(2, 10, 32, seed=1),
            "padding": ~_ends(10, 6, longest=10),
        },
        "salesforce/decaNLP",
    ),
    Case(
        "drqa_sequence_match",
        "softmax over a flat matrix, -inf written to .data, keys as values",
        1,
        SequenceMatch,
        lambda: {"x": noise(2, 8, 32, seed=0), "y": noise(2, 10, 32, seed=1), "y_mask": ~_ends(10, 6, longest=10)},
        "hitvoice/DrQA",
    ),
    Case(
        "glm_relative",
        "memory, relative positions by a shifted view, scores times a mask less 1e4",
        2,
        RelativeBlock,
        lambda: {
            "hidden": noise(2, 6, 32, seed=0),
            "mem": noise(2, 4, 32, seed=1),
            "positions": noise(1, 10, 32, seed=2),
            "encoded": noise(2, 7, 32, seed=3),
            "ltor_mask": torch.tril(torch.ones(6, 10), 4)[None, None],
            "cross_mask": _ends(7, 5, longest=7)[:, None, None, :].float(),
        },
        "THUDM/GLM",
    ),
    Case(
        "chatglm_q",
        "groups by broadcasting, a scale that goes and comes back, a bool mask times -1e10",
        1,
        ScaledByLayer,
        lambda: {"x": noise(2, 10, 32, seed=0), "attention_mask": _ends(10, 8, longest=10).flip(1).long()},
        "K024/chatglm-q",
    ),
    Case(
        "gpt_neox_baddbmm",
        "baddbmm with beta 0, a bucketed bias, a fill of -1e4",
        1,
        BaddbmmAttention,
        lambda: {"hidden": noise(10, 2, 32, seed=0), "mask": torch.tril(torch.ones(1, 1, 10, 10)) < 0.5},
        "EleutherAI/gpt-neox",
    ),
    Case(
        "streaming_falcon",
        "ALiBi and a mask in bfloat16, a mask of heads",
        1,
        AlibiInBfloat16,
        lambda: {
            "hidden": noise(2, 10, 32, seed=0),
            "tokens": _ends(10, 7, longest=10).long(),
            "head_mask": torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 4, 1, 1),
        },
        "mit-han-lab/streaming-llm",
    ),
    Case(
        "deberta_xsoftmax",
        "gathered positions, a softmax with a backward pass of its own",
        1,
        DisentangledAttention,
        lambda: {"hidden": noise(2, 10, 32, seed=0), "tokens": _ends(10, 7, longest=10).long()},
        "microsoft/DeBERTa",
    ),
    Case(
        "lora_gpt2_cache",
        "one query, a cache written at the end of each sample, lengths",
        1,
        PastOfManyLengths,
        lambda: {
            "x": noise(2, 1, 32, seed=0),
            "layer_past": noise(2, 2, 4, 12, 8, seed=1),
            "len_past": torch.tensor([9, 4]),
        },
        "microsoft/LoRA",
    ),
    Case(
        "heads_as_repeated_batch",
        "heads by repeating the input, softmax over a flat matrix, -inf written to .data",
        1,
        HeadsAsRepeatedBatch,
        lambda: {"x": noise(2, 8, 32, seed=0), "padding": (~_ends(8, 6, longest=8)).byte()},
        "jadore801120/attention-is-all-you-need-pytorch",
    ),
)
