"""Vision and image generation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from tests.coverage.case import Case
from tests.support.zoo import noise

__all__ = ["CASES"]


class SplitByHead(nn.Module):
    """One head of one picture at a time, in a loop that writes into a tensor of zeros."""

    def __init__(self, width: int = 16, context_width: int = 24, heads: int = 2, dim_head: int = 8) -> None:
        super().__init__()
        self.heads, self.scale, self.att_step = heads, dim_head**-0.5, 1
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_width, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_width, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(part, "b n (h d) -> (b h) n d", h=self.heads) for part in (q, k, v))
        limit, step = k.shape[0], self.att_step
        q_chunks = list(torch.tensor_split(q, limit // step, dim=0))
        k_chunks = list(torch.tensor_split(k, limit // step, dim=0))
        v_chunks = list(torch.tensor_split(v, limit // step, dim=0))
        q_chunks.reverse()
        k_chunks.reverse()
        v_chunks.reverse()
        sim = torch.zeros(q.shape[0], q.shape[1], v.shape[2], device=q.device)
        del k, q, v
        for i in range(0, limit, step):
            buffer = einsum("b i d, b j d -> b i j", q_chunks.pop(), k_chunks.pop()) * self.scale
            buffer = buffer.softmax(dim=-1)
            buffer = einsum("b i j, b j d -> b i d", buffer, v_chunks.pop())
            sim[i : i + step, :, :] = buffer
        sim = rearrange(sim, "(b h) n d -> b n (h d)", h=self.heads)
        result: Tensor = self.to_out(sim)
        return result


class ChannelsFirstWithText(nn.Module):
    """Channels before positions, half of the scale on either side, and the keys of a text in front of the image's."""

    def __init__(self, channels: int = 32, encoder_channels: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.encoder_kv = nn.Conv1d(encoder_channels, channels * 2, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, encoder_out: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        qkv = self.qkv(self.norm(x).view(b, c, -1))
        encoder_kv = self.encoder_kv(encoder_out)
        bs, width, length = qkv.shape
        ch = width // (3 * self.heads)
        q, k, v = qkv.reshape(bs * self.heads, ch * 3, length).split(ch, dim=1)
        ek, ev = encoder_kv.reshape(bs * self.heads, ch * 2, -1).split(ch, dim=1)
        k = torch.cat([ek, k], dim=-1)
        v = torch.cat([ev, v], dim=-1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        a = torch.einsum("bts,bcs->bct", weight, v)
        h = self.proj_out(a.reshape(bs, -1, length))
        result: Tensor = x + h.reshape(b, c, *spatial)
        return result


class ScoresOutsideAutocast(nn.Module):
    """Scores in float32 with autocast off, and an image of booleans as the mask, filled in place with -max."""

    def __init__(self, width: int = 32, context_width: int = 24, heads: int = 4, dim_head: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_width, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_width, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        h = self.heads
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
        with torch.autocast(enabled=False, device_type="cuda"):
            q, k = q.float(), k.float()
            sim = einsum("b i d, b j d -> b i j", q, k) * self.scale
        del q, k
        mask = rearrange(mask, "b ... -> b (...)")
        max_neg_value = -torch.finfo(sim.dtype).max
        mask = repeat(mask, "b j -> (b h) () j", h=h)
        sim.masked_fill_(~mask, max_neg_value)
        sim = sim.softmax(dim=-1)
        out = einsum("b i j, b j d -> b i d", sim, v)
        out = rearrange(out, "(b h) n d -> b n (h d)", h=h)
        result: Tensor = self.to_out(out)
        return result


class SpatialSelfAttention(nn.Module):
    """1x1 convolutions over an image, and the weights transposed before they meet the values."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups=8, num_channels=channels, eps=1e-6, affine=True)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        _, c, h, _ = q.shape
        q = rearrange(q, "b c h w -> b (h w) c")
        k = rearrange(k, "b c h w -> b c (h w)")
        w_ = torch.einsum("bij,bjk->bik", q, k)
        w_ = w_ * (int(c) ** (-0.5))
        w_ = F.softmax(w_, dim=2)
        v = rearrange(v, "b c h w -> b c (h w)")
        w_ = rearrange(w_, "b i j -> b j i")
        h_ = torch.einsum("bij,bjk->bik", v, w_)
        h_ = rearrange(h_, "b c (h w) -> b c h w", h=h)
        result: Tensor = x + self.proj_out(h_)
        return result


class AttnBlock(nn.Module):
    """bmm over an image of one head; the weights are permuted, and the values come first."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups=8, num_channels=channels, eps=1e-6, affine=True)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w)
        q = q.permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        w_ = torch.bmm(q, k)
        w_ = w_ * (int(c) ** (-0.5))
        w_ = F.softmax(w_, dim=2)
        v = v.reshape(b, c, h * w)
        w_ = w_.permute(0, 2, 1)
        h_ = torch.bmm(v, w_)
        h_ = h_.reshape(b, c, h, w)
        result: Tensor = x + self.proj_out(h_)
        return result


class GroundedCrossAttention(nn.Module):
    """Heads folded into the batch; the mask is filled in place by a method whose result nobody takes."""

    def __init__(self, width: int, key_width: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_k = nn.Linear(key_width, heads * dim_head, bias=False)
        self.to_v = nn.Linear(key_width, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, width), nn.Dropout(0.0))

    def fill_inf_from_mask(self, sim: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            b, _ = mask.shape
            mask = mask.unsqueeze(1).repeat(1, self.heads, 1).reshape(b * self.heads, 1, -1)
            max_neg_value = -torch.finfo(sim.dtype).max
            sim.masked_fill_(~mask, max_neg_value)
        return sim

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(key), self.to_v(value)
        b, n, hc = q.shape
        _, m, _ = key.shape
        h = self.heads
        c = hc // h
        q = q.view(b, n, h, c).permute(0, 2, 1, 3).reshape(b * h, n, c)
        k = k.view(b, m, h, c).permute(0, 2, 1, 3).reshape(b * h, m, c)
        v = v.view(b, m, h, c).permute(0, 2, 1, 3).reshape(b * h, m, c)
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        self.fill_inf_from_mask(sim, mask)
        attn = sim.softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", attn, v)
        out = out.view(b, h, n, c).permute(0, 2, 1, 3).reshape(b, n, h * c)
        result: Tensor = self.to_out(out)
        return result


class GroundedBlock(nn.Module):
    """Boxes are keys and queries beside the image and are cut off again; a tanh gate, then a masked text."""

    def __init__(self, width: int = 32, key_width: int = 24, heads: int = 4, dim_head: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(key_width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = GroundedCrossAttention(width, width, heads, dim_head)
        self.attn2 = GroundedCrossAttention(width, key_width, heads, dim_head)
        self.alpha_attn = nn.Parameter(torch.tensor(0.5))
        self.scale = 1

    def forward(self, x: Tensor, context: Tensor, objs: Tensor, mask: Tensor) -> Tensor:
        visual = x.shape[1]
        objs = self.linear(objs)
        both = self.norm1(torch.cat([x, objs], dim=1))
        x = x + self.scale * torch.tanh(self.alpha_attn) * self.attn(both, both, both)[:, 0:visual, :]
        result: Tensor = self.attn2(self.norm2(x), context, context, mask) + x
        return result


class MutualSelfAttention(nn.Module):
    """Heads are the batch and pictures are beside each other; foreground and background are twice the heads."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)

    def attn_batch(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        b = q.shape[0] // self.heads
        height = int(np.sqrt(q.shape[1]))
        q, k, v = (rearrange(t, "(b h) n d -> h (b n) d", h=self.heads) for t in (q, k, v))
        sim = torch.einsum("h i d, h j d -> h i j", q, k) * self.scale
        if mask is not None:
            mask = mask.unsqueeze(0).unsqueeze(0)
            mask = F.interpolate(mask, (height, height)).flatten(0).unsqueeze(0)
            mask = mask.flatten()
            sim_bg = sim + mask.masked_fill(mask == 1, torch.finfo(sim.dtype).min)
            sim_fg = sim + mask.masked_fill(mask == 0, torch.finfo(sim.dtype).min)
            sim = torch.cat([sim_fg, sim_bg], dim=0)
        attn = sim.softmax(-1)
        if len(attn) == 2 * len(v):
            v = torch.cat([v] * 2)
        out = torch.einsum("h i j, h j d -> h i d", attn, v)
        return rearrange(out, "(h1 h) (b n) d -> (h1 b) n (h d)", b=b, h=self.heads)

    def forward(self, x: Tensor, mask_s: Tensor, mask_t: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        height = int(np.sqrt(q.shape[1]))
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        heads = self.heads
        source = self.attn_batch(q[:heads], k[:heads], v[:heads])
        target = self.attn_batch(q[-heads:], k[:heads], v[:heads], mask_s)
        foreground, background = target.chunk(2, 0)
        mask = F.interpolate(mask_t.unsqueeze(0).unsqueeze(0), (height, height))
        mask = mask.reshape(-1, 1)
        target = foreground * mask + background * (1 - mask)
        return torch.cat([source, target], dim=0)


class ImagePrompt(nn.Module):
    """Two attentions of the same queries, of a text and of an image, in one sum; baddbmm, and one map is stored."""

    attn_map: Tensor

    def __getstate__(self) -> dict[str, Any]:
        """The map belongs to one call, and a tensor with a history cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "attn_map"}

    def __init__(self, width: int = 32, context_width: int = 24, heads: int = 4, num_tokens: int = 4) -> None:
        super().__init__()
        self.heads, self.num_tokens, self.scale = heads, num_tokens, 0.6
        self.attn_scale = (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_k_ip = nn.Linear(context_width, width, bias=False)
        self.to_v_ip = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def head_to_batch_dim(self, tensor: Tensor) -> Tensor:
        b, n, c = tensor.shape
        tensor = tensor.reshape(b, n, self.heads, c // self.heads)
        return tensor.permute(0, 2, 1, 3).reshape(b * self.heads, n, c // self.heads)

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        b, n, c = tensor.shape
        tensor = tensor.reshape(b // self.heads, self.heads, n, c)
        return tensor.permute(0, 2, 1, 3).reshape(b // self.heads, n, c * self.heads)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
        dtype = query.dtype
        if attention_mask is None:
            start = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device)
            beta = 0
        else:
            start = attention_mask
            beta = 1
        scores = torch.baddbmm(start, query, key.transpose(-1, -2), beta=beta, alpha=self.attn_scale)
        del start
        probs = scores.softmax(dim=-1)
        del scores
        return probs.to(dtype)

    def forward(self, x: Tensor, context: Tensor, attention_mask: Tensor) -> Tensor:
        attention_mask = ((1 - attention_mask) * -10000.0).unsqueeze(1)
        attention_mask = attention_mask.repeat_interleave(self.heads, dim=0)
        query = self.to_q(x)
        end_pos = context.shape[1] - self.num_tokens
        context, ip = context[:, :end_pos, :], context[:, end_pos:, :]
        key, value = self.to_k(context), self.to_v(context)
        query = self.head_to_batch_dim(query)
        key = self.head_to_batch_dim(key)
        value = self.head_to_batch_dim(value)
        probs = self.get_attention_scores(query, key, attention_mask)
        hidden = self.batch_to_head_dim(torch.bmm(probs, value))
        ip_key = self.head_to_batch_dim(self.to_k_ip(ip))
        ip_value = self.head_to_batch_dim(self.to_v_ip(ip))
        ip_probs = self.get_attention_scores(query, ip_key, None)
        self.attn_map = ip_probs
        ip = self.batch_to_head_dim(torch.bmm(ip_probs, ip_value))
        hidden = hidden + self.scale * ip
        hidden = self.to_out[0](hidden)
        hidden = self.to_out[1](hidden)
        result: Tensor = hidden + x
        return result


class SparseCausalFrames(nn.Module):
    """Keys of the first frame and of the frame before, picked by a list and by a tensor of indices; baddbmm."""

    def __init__(self, width: int = 32, heads: int = 4, frames: int = 3) -> None:
        super().__init__()
        self.heads, self.frames, self.scale = heads, frames, (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def reshape_heads_to_batch_dim(self, tensor: Tensor) -> Tensor:
        b, n, c = tensor.shape
        tensor = tensor.reshape(b, n, self.heads, c // self.heads)
        return tensor.permute(0, 2, 1, 3).reshape(b * self.heads, n, c // self.heads)

    def of_frames(self, part: Tensor, former: Tensor) -> Tensor:
        part = rearrange(part, "(b f) d c -> b f d c", f=self.frames)
        part = torch.cat([part[:, [0] * self.frames], part[:, former]], dim=2)
        return rearrange(part, "b f d c -> (b f) d c")

    def forward(self, x: Tensor) -> Tensor:
        query = self.reshape_heads_to_batch_dim(self.to_q(x))
        key, value = self.to_k(x), self.to_v(x)
        former = torch.arange(self.frames) - 1
        former[0] = 0
        key = self.reshape_heads_to_batch_dim(self.of_frames(key, former))
        value = self.reshape_heads_to_batch_dim(self.of_frames(value, former))
        scores = torch.baddbmm(
            torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device),
            query,
            key.transpose(-1, -2),
            beta=0,
            alpha=self.scale,
        )
        probs = scores.softmax(dim=-1)
        probs = probs.to(value.dtype)
        hidden = torch.bmm(probs, value)
        b, n, c = hidden.shape
        hidden = hidden.reshape(b // self.heads, self.heads, n, c)
        hidden = hidden.permute(0, 2, 1, 3).reshape(b // self.heads, n, c * self.heads)
        result: Tensor = self.to_out(hidden)
        return result


class AttentionOp(torch.autograd.Function):
    """The weights, always in float32, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        w = torch.einsum("ncq,nck->nqk", q.to(torch.float32), (k / np.sqrt(k.shape[1])).to(torch.float32))
        w = w.softmax(dim=2).to(q.dtype)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, Tensor]:
        q, k, w = ctx.saved_tensors
        db = torch._softmax_backward_data(
            grad_output=dw.to(torch.float32), output=w.to(torch.float32), dim=2, input_dtype=torch.float32
        )
        dq = torch.einsum("nck,nqk->ncq", k.to(torch.float32), db).to(q.dtype) / np.sqrt(k.shape[1])
        dk = torch.einsum("ncq,nqk->nck", q.to(torch.float32), db).to(k.dtype) / np.sqrt(k.shape[1])
        return dq, dk


class WeightsByFunction(nn.Module):
    """The weights come from an autograd function; query, key and value alternate in the channels."""

    def __init__(self, channels: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, channels * 3, kernel_size=1)
        self.proj = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).reshape(x.shape[0] * self.heads, x.shape[1] // self.heads, 3, -1)
        q, k, v = qkv.unbind(2)
        w = AttentionOp.apply(q, k)  # type: ignore[no-untyped-call]
        a = torch.einsum("nqk,nck->ncq", w, v)
        x = self.proj(a.reshape(*x.shape)).add_(x)
        result: Tensor = x * 0.5**0.5
        return result


class NIN(nn.Module):
    """A linear layer over the channels of an image, as an einsum between two permutations."""

    def __init__(self, in_dim: int, units: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(in_dim, units))
        self.b = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        y = torch.einsum("abcd,de->abce", x, self.W) + self.b
        return y.permute(0, 3, 1, 2)


class FiveAxes(nn.Module):
    """The scores have rows and columns of queries and of keys, and are flat for the softmax alone."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups=min(channels // 4, 32), num_channels=channels, eps=1e-6)
        self.nin_q, self.nin_k = NIN(channels, channels), NIN(channels, channels)
        self.nin_v, self.nin_o = NIN(channels, channels), NIN(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = self.nin_q(h), self.nin_k(h), self.nin_v(h)
        w = torch.einsum("bchw,bcij->bhwij", q, k) * (int(c) ** (-0.5))
        w = torch.reshape(w, (b, height, width, height * width))
        w = F.softmax(w, dim=-1)
        w = torch.reshape(w, (b, height, width, height, width))
        h = torch.einsum("bhwij,bcij->bchw", w, v)
        h = self.nin_o(h)
        result: Tensor = (x + h) / np.sqrt(2.0)
        return result


class GatedPositional(nn.Module):
    """Two softmaxes, of contents and of positions, mixed by a gate of each head and divided by their sum."""

    rel_indices: Tensor

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qk = nn.Linear(width, width * 2, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.pos_proj = nn.Linear(3, heads)
        self.gating_param = nn.Parameter(torch.ones(heads))

    def get_rel_indices(self, patches: int) -> None:
        size = int(patches**0.5)
        rel_indices = torch.zeros(1, patches, patches, 3)
        ind = torch.arange(size).view(1, -1) - torch.arange(size).view(-1, 1)
        indx = ind.repeat(size, size)
        indy = ind.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1)
        indd = indx**2 + indy**2
        rel_indices[:, :, :, 2] = indd.unsqueeze(0)
        rel_indices[:, :, :, 1] = indy.unsqueeze(0)
        rel_indices[:, :, :, 0] = indx.unsqueeze(0)
        self.rel_indices = rel_indices.to(self.qk.weight.device)

    def get_attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qk = self.qk(x).reshape(b, n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k = qk[0], qk[1]
        pos_score = self.rel_indices.expand(b, -1, -1, -1)
        pos_score = self.pos_proj(pos_score).permute(0, 3, 1, 2)
        patch_score = (q @ k.transpose(-2, -1)) * self.scale
        patch_score = patch_score.softmax(dim=-1)
        pos_score = pos_score.softmax(dim=-1)
        gating = self.gating_param.view(1, -1, 1, 1)
        attn: Tensor = (1.0 - torch.sigmoid(gating)) * patch_score + torch.sigmoid(gating) * pos_score
        attn /= attn.sum(dim=-1).unsqueeze(-1)
        attn = self.attn_drop(attn)
        return attn

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if not hasattr(self, "rel_indices") or self.rel_indices.size(1) != n:
            self.get_rel_indices(n)
        attn = self.get_attention(x)
        v = self.v(x).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        result: Tensor = self.proj(x)
        return result


class CrossCovariance(nn.Module):
    """Channels attend to channels, by their cosine and a temperature; then a class token, as product and sum."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.class_qkv = nn.Linear(width, width * 3), nn.Linear(width, width * 3)
        self.proj, self.class_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.attn_drop = nn.Dropout(0.0)

    def channels(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, k, v = q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)
        q = F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = (attn @ v).permute(0, 3, 1, 2).reshape(b, n, c)
        result: Tensor = self.proj(x)
        return result

    def of_class(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.class_qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        qc = q[:, :, 0:1]
        attn_cls = (qc * k).sum(dim=-1) * self.scale
        attn_cls = attn_cls.softmax(dim=-1)
        attn_cls = self.attn_drop(attn_cls)
        cls_tkn = (attn_cls.unsqueeze(2) @ v).transpose(1, 2).reshape(b, 1, c)
        cls_tkn = self.class_proj(cls_tkn)
        return torch.cat([cls_tkn, x[:, 1:]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.channels(x)
        return x + self.of_class(x)


def window_partition(x: Tensor, size: int) -> Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, c)


def window_reverse(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    b = int(windows.shape[0] / (h * w / size / size))
    x = windows.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


def shifted_mask(h: int, w: int, size: int, shift: int) -> Tensor:
    img_mask = torch.zeros((1, h, w, 1))
    slices = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    cnt = 0
    for rows in slices:
        for columns in slices:
            img_mask[:, rows, columns, :] = cnt
            cnt += 1
    windows = window_partition(img_mask, size).view(-1, size * size)
    attn_mask = windows.unsqueeze(1) - windows.unsqueeze(2)
    return attn_mask.masked_fill(attn_mask != 0, (-100.0)).masked_fill(attn_mask == 0, 0.0)


def relative_index(q_size: int, k_size: int) -> Tensor:
    coords_q = torch.flatten(torch.stack(torch.meshgrid([torch.arange(q_size)] * 2, indexing="ij")), 1)
    coords_k = torch.flatten(torch.stack(torch.meshgrid([torch.arange(k_size)] * 2, indexing="ij")), 1)
    relative = (coords_q[:, :, None] - coords_k[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += k_size - 1
    relative[:, :, 1] += k_size - 1
    relative[:, :, 0] *= (q_size + k_size) - 1
    return relative.sum(-1)


class FocalWindows(nn.Module):
    """Keys of the window, of its surroundings and of pooled windows; biases and masks are written into slices."""

    relative_position_index: Tensor
    relative_position_index_k: Tensor
    valid_ind_rolled: Tensor
    attn_mask: Tensor

    def __init__(self, width: int = 16, heads: int = 2, size: int = 8, window: int = 4, focal: int = 3) -> None:
        super().__init__()
        self.heads, self.size, self.window, self.focal = heads, size, window, focal
        self.scale, self.expand, self.shift = (width // heads) ** -0.5, window // 2, window // 2
        area = window * window
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_index(window, window))
        surroundings = 4 * area - 4 * (window - self.expand) ** 2
        self.table_to_neighbors = nn.Parameter(torch.zeros(1, heads, area, surroundings))
        corners = [torch.ones(window, window) for _ in range(4)]
        corners[0][: -self.expand, : -self.expand] = 0
        corners[1][: -self.expand, self.expand :] = 0
        corners[2][self.expand :, : -self.expand] = 0
        corners[3][self.expand :, self.expand :] = 0
        self.register_buffer("valid_ind_rolled", torch.stack(corners, 0).flatten(0).nonzero().view(-1))
        kernel = 2 * (focal // 2) + 1
        self.unfold = nn.Unfold(kernel_size=(kernel, kernel), stride=1, padding=kernel // 2)
        self.table_to_windows = nn.Parameter(torch.zeros(heads, (window + focal - 1) ** 2))
        self.register_buffer("relative_position_index_k", relative_index(window, focal))
        self.register_buffer("attn_mask", shifted_mask(size, size, window, self.shift))
        self.pool = nn.Linear(area, 1)
        self.qkv = nn.Linear(width, width * 3)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)

    def windows(self, t: Tensor) -> Tensor:
        c = t.shape[-1]
        return window_partition(t, self.window).view(-1, self.window**2, self.heads, c // self.heads)

    def rolled(self, t: Tensor) -> Tensor:
        e = self.expand
        corners = [torch.roll(t, shifts=shifts, dims=(1, 2)) for shifts in ((-e, -e), (-e, e), (e, -e), (e, e))]
        around = torch.cat([self.windows(corner) for corner in corners], 1).transpose(1, 2)
        return torch.cat((self.windows(t).transpose(1, 2), around[:, :, self.valid_ind_rolled]), 2)

    def unfolded(self, t: Tensor, b: int, c: int) -> Tensor:
        n = 2 * (self.focal // 2) + 1
        t = self.unfold(t).view(b, c, n, n, -1).permute(0, 4, 2, 3, 1).contiguous()
        return t.view(-1, n * n, self.heads, c // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        b, h, w, c = x.shape
        area, heads, focal = self.window**2, self.heads, self.focal
        pooled = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        pooled = pooled.permute(0, 1, 3, 2, 4, 5).contiguous()
        n_h, n_w = pooled.shape[1:3]
        pooled = pooled.view(b, n_h, n_w, area, c).transpose(3, 4)
        pooled = self.pool(pooled).flatten(-2)

        qkv = self.qkv(x).reshape(b, h, w, 3, c).permute(3, 0, 1, 2, 4).contiguous()
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = self.windows(q).transpose(1, 2)
        k_rolled, v_rolled = self.rolled(k), self.rolled(v)

        mask = pooled.new(n_h, n_w).fill_(1)
        kernel = 2 * (focal // 2) + 1
        mask = self.unfold(mask.unsqueeze(0).unsqueeze(1)).view(1, 1, kernel, kernel, -1)
        mask = mask.permute(0, 4, 2, 3, 1).contiguous().view(n_h * n_w, -1, 1)
        mask = mask.flatten(1).unsqueeze(0)
        mask = mask.masked_fill(mask == 0, (-100.0)).masked_fill(mask > 0, 0.0)
        qkv_pooled = self.qkv(pooled).reshape(b, n_h, n_w, 3, c).permute(3, 0, 4, 1, 2).contiguous()
        k_all = torch.cat([k_rolled, self.unfolded(qkv_pooled[1], b, c)], 2)
        v_all = torch.cat([v_rolled, self.unfolded(qkv_pooled[2], b, c)], 2)

        n = k_all.shape[-2]
        q = q * self.scale
        attn = q @ k_all.transpose(-2, -1)
        area_rolled = k_rolled.shape[2]
        bias = self.table[self.relative_position_index.view(-1)].view(area, area, -1)
        bias = bias.permute(2, 0, 1).contiguous()
        attn[:, :, :area, :area] = attn[:, :, :area, :area] + bias.unsqueeze(0)
        attn[:, :, :area, area:area_rolled] = attn[:, :, :area, area:area_rolled] + self.table_to_neighbors
        end = area_rolled + focal**2
        bias = self.table_to_windows[:, self.relative_position_index_k.view(-1)].view(-1, area, focal**2)
        attn[:, :, :area, area_rolled:end] = attn[:, :, :area, area_rolled:end] + bias.unsqueeze(0)
        attn[:, :, :area, area_rolled:end] = attn[:, :, :area, area_rolled:end] + mask[:, :, None, None, :].repeat(
            attn.shape[0] // mask.shape[1], 1, 1, 1, 1
        ).view(-1, 1, 1, mask.shape[-1])
        n_windows = self.attn_mask.shape[0]
        attn = attn.view(attn.shape[0] // n_windows, n_windows, heads, area, n)
        attn[:, :, :, :, :area] = attn[:, :, :, :, :area] + self.attn_mask[None, :, None, :, :]
        attn = attn.view(-1, heads, area, n)
        attn = self.softmax(attn)
        attn = self.attn_drop(attn)
        x = (attn @ v_all).transpose(1, 2).reshape(attn.shape[0], area, c)
        x = self.proj(x)
        x = window_reverse(x.view(-1, self.window, self.window, c), self.window, h, w)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))


class OverlappingWindows(nn.Module):
    """Queries of a window, keys of a larger one around it, unfolded; the biases of a rectangle of positions."""

    rpi: Tensor

    def __init__(self, width: int = 16, heads: int = 2, window: int = 4, overlap: float = 0.5) -> None:
        super().__init__()
        self.width, self.heads, self.window, self.scale = width, heads, window, (width // heads) ** -0.5
        self.overlap = int(window * overlap) + window
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, width * 3)
        self.unfold = nn.Unfold(
            kernel_size=(self.overlap, self.overlap), stride=window, padding=(self.overlap - window) // 2
        )
        self.table = nn.Parameter(torch.zeros((window + self.overlap - 1) ** 2, heads))
        self.register_buffer("rpi", relative_index(window, self.overlap))
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, length, c = x.shape
        h = w = int(length**0.5)
        shortcut = x
        x = self.norm1(x)
        x = x.view(b, h, w, c)
        qkv = self.qkv(x).reshape(b, h, w, 3, c).permute(3, 0, 4, 1, 2)
        q = qkv[0].permute(0, 2, 3, 1)
        kv = torch.cat((qkv[1], qkv[2]), dim=1)
        q_windows = window_partition(q, self.window)
        q_windows = q_windows.view(-1, self.window * self.window, c)
        kv_windows = self.unfold(kv)
        kv_windows = rearrange(
            kv_windows,
            "b (nc ch owh oww) nw -> nc (b nw) (owh oww) ch",
            nc=2,
            ch=c,
            owh=self.overlap,
            oww=self.overlap,
        ).contiguous()
        k_windows, v_windows = kv_windows[0], kv_windows[1]
        b_, nq, _ = q_windows.shape
        _, n, _ = k_windows.shape
        d = self.width // self.heads
        q = q_windows.reshape(b_, nq, self.heads, d).permute(0, 2, 1, 3)
        k = k_windows.reshape(b_, n, self.heads, d).permute(0, 2, 1, 3)
        v = v_windows.reshape(b_, n, self.heads, d).permute(0, 2, 1, 3)
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.table[self.rpi.view(-1)].view(self.window * self.window, self.overlap * self.overlap, -1)
        bias = bias.permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        attn = self.softmax(attn)
        windows = (attn @ v).transpose(1, 2).reshape(b_, nq, self.width)
        windows = windows.view(-1, self.window, self.window, self.width)
        x = window_reverse(windows, self.window, h, w)
        x = x.view(b, h * w, self.width)
        result: Tensor = self.proj(x) + shortcut
        return result


class HeadsFirstWindows(nn.Module):
    """Heads before the batch, windows as an axis, and a mask whose six axes are set to True slice by slice."""

    def __init__(self, width: int = 32, head_dim: int = 8, window: int = 4) -> None:
        super().__init__()
        self.head_dim, self.scale, self.window = head_dim, head_dim**-0.5, window
        self.embedding_layer = nn.Linear(width, 3 * width)
        params = torch.zeros((2 * window - 1) * (2 * window - 1), width // head_dim)
        params = params.view(2 * window - 1, 2 * window - 1, width // head_dim).transpose(1, 2).transpose(0, 1)
        self.relative_position_params = nn.Parameter(params)
        self.linear = nn.Linear(width, width)

    def generate_mask(self, h: int, w: int, p: int, shift: int) -> Tensor:
        mask = torch.zeros(h, w, p, p, p, p, dtype=torch.bool, device=self.relative_position_params.device)
        s = p - shift
        mask[-1, :, :s, :, s:, :] = True
        mask[-1, :, s:, :, :s, :] = True
        mask[:, -1, :, :s, :, s:] = True
        mask[:, -1, :, s:, :, :s] = True
        return rearrange(mask, "w1 w2 p1 p2 p3 p4 -> 1 1 (w1 w2) (p1 p2) (p3 p4)")

    def relative_embedding(self) -> Tensor:
        cord = torch.tensor(np.array([[i, j] for i in range(self.window) for j in range(self.window)]))
        relation = cord[:, None, :] - cord[None, :, :] + self.window - 1
        return self.relative_position_params[:, relation[:, :, 0].long(), relation[:, :, 1].long()]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(x, shifts=(-(self.window // 2), -(self.window // 2)), dims=(1, 2))
        x = rearrange(x, "b (w1 p1) (w2 p2) c -> b w1 w2 p1 p2 c", p1=self.window, p2=self.window)
        h_windows, w_windows = x.size(1), x.size(2)
        x = rearrange(x, "b w1 w2 p1 p2 c -> b (w1 w2) (p1 p2) c", p1=self.window, p2=self.window)
        qkv = self.embedding_layer(x)
        q, k, v = rearrange(qkv, "b nw np (threeh c) -> threeh b nw np c", c=self.head_dim).chunk(3, dim=0)
        sim = torch.einsum("hbwpc,hbwqc->hbwpq", q, k) * self.scale
        sim = sim + rearrange(self.relative_embedding(), "h p q -> h 1 1 p q")
        attn_mask = self.generate_mask(h_windows, w_windows, self.window, shift=self.window // 2)
        sim = sim.masked_fill_(attn_mask, float("-inf"))
        probs = F.softmax(sim, dim=-1)
        output = torch.einsum("hbwij,hbwjc->hbwic", probs, v)
        output = rearrange(output, "h b w p c -> b w p (h c)")
        output = self.linear(output)
        output = rearrange(output, "b (w1 w2) (p1 p2) c -> b (w1 p1) (w2 p2) c", w1=h_windows, p1=self.window)
        return torch.roll(output, shifts=(self.window // 2, self.window // 2), dims=(1, 2))


class PooledDecomposed(nn.Module):
    """Pooled keys, and biases of rows and of columns written over the scores of all but the class token."""

    def __init__(self, width: int = 32, heads: int = 4, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size, self.scale = heads, size, (width // heads) ** -0.5
        head_dim = width // heads
        self.qkv = nn.Linear(width, width * 3)
        self.proj = nn.Linear(width, width)
        self.pool_q = nn.Conv2d(head_dim, head_dim, 3, stride=1, padding=1, groups=head_dim, bias=False)
        self.pool_k = nn.Conv2d(head_dim, head_dim, 3, stride=2, padding=1, groups=head_dim, bias=False)
        self.pool_v = nn.Conv2d(head_dim, head_dim, 3, stride=2, padding=1, groups=head_dim, bias=False)
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(head_dim) for _ in range(3))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, head_dim))

    def attention_pool(self, t: Tensor, pool: nn.Module, norm: nn.Module) -> tuple[Tensor, list[int]]:
        cls_tok, t = t[:, :, :1, :], t[:, :, 1:, :]
        b, n, _, c = t.shape
        t = t.reshape(b * n, self.size, self.size, c).permute(0, 3, 1, 2).contiguous()
        t = pool(t)
        shape = [t.shape[2], t.shape[3]]
        t = t.reshape(b, n, c, t.shape[2] * t.shape[3]).transpose(2, 3)
        t = torch.cat((cls_tok, t), dim=2)
        t = norm(t)
        return t, shape

    def spatial(self, attn: Tensor, q: Tensor, q_shape: list[int], k_shape: list[int]) -> Tensor:
        q_h, q_w = q_shape
        k_h, k_w = k_shape
        q_h_ratio, k_h_ratio = max(k_h / q_h, 1.0), max(q_h / k_h, 1.0)
        dist_h = torch.arange(q_h)[:, None] * q_h_ratio - torch.arange(k_h)[None, :] * k_h_ratio
        dist_h += (k_h - 1) * k_h_ratio
        q_w_ratio, k_w_ratio = max(k_w / q_w, 1.0), max(q_w / k_w, 1.0)
        dist_w = torch.arange(q_w)[:, None] * q_w_ratio - torch.arange(k_w)[None, :] * k_w_ratio
        dist_w += (k_w - 1) * k_w_ratio
        r_h = self.rel_pos_h[dist_h.long()]
        r_w = self.rel_pos_w[dist_w.long()]
        b, n_head, _, dim = q.shape
        r_q = q[:, :, 1:].reshape(b, n_head, q_h, q_w, dim)
        rel_h = torch.einsum("byhwc,hkc->byhwk", r_q, r_h)
        rel_w = torch.einsum("byhwc,wkc->byhwk", r_q, r_w)
        attn[:, :, 1:, 1:] = (
            attn[:, :, 1:, 1:].view(b, -1, q_h, q_w, k_h, k_w) + rel_h[:, :, :, :, :, None] + rel_w[:, :, :, :, None, :]
        ).view(b, -1, q_h * q_w, k_h * k_w)
        return attn

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, q_shape = self.attention_pool(q, self.pool_q, self.norm_q)
        k, k_shape = self.attention_pool(k, self.pool_k, self.norm_k)
        v, _ = self.attention_pool(v, self.pool_v, self.norm_v)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = self.spatial(attn, q, q_shape, k_shape)
        attn = attn.softmax(dim=-1)
        x = attn @ v
        x = x + q
        x = x.transpose(1, 2).reshape(b, -1, width)
        result: Tensor = self.proj(x)
        return result


class Trajectory(nn.Module):
    """A softmax within each frame, then one over the frames whose queries are a diagonal of the first result."""

    def __init__(self, width: int = 32, heads: int = 4, frames: int = 3) -> None:
        super().__init__()
        self.heads, self.frames, self.scale = heads, frames, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, width * 3)
        self.proj_q = nn.Linear(width, width)
        self.proj_kv = nn.Linear(width, width * 2)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        f, h = self.frames, self.heads
        p = (n - 1) // f
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
        (cls_q, q_), (_, k_), (_, v_) = ((t[:, 0:1], t[:, 1:]) for t in (q, k, v))
        sim = einsum("b i d, b j d -> b i j", cls_q * self.scale, k)
        cls_out = einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        cls_out = rearrange(cls_out, "(b h) f d -> b f (h d)", f=1, h=h)

        q_dot_k = q_ @ k_.transpose(-2, -1)
        q_dot_k = rearrange(q_dot_k, "b q (f n) -> b q f n", f=f)
        space_attn = (self.scale * q_dot_k).softmax(dim=-1)
        attn = self.attn_drop(space_attn)
        v_ = rearrange(v_, "b (f n) d -> b f n d", f=f, n=p)
        x = torch.einsum("b q f n, b f n d -> b q f d", attn, v_)

        x = rearrange(x, "(b h) s f d -> b s f (h d)", b=b)
        x_diag = rearrange(x, "b (g n) f d -> b g n f d", g=f)
        x_diag = torch.diagonal(x_diag, dim1=-4, dim2=-2)
        x_diag = rearrange(x_diag, "b n d f -> b (f n) d", f=f)
        q2 = self.proj_q(x_diag)
        k2, _ = self.proj_kv(x).chunk(2, dim=-1)
        q2 = rearrange(q2, "b s (h d) -> b h s d", h=h)
        q2 *= self.scale
        k2 = rearrange(k2, "b s f (h d) -> b h s f d", f=f, h=h)
        attn = torch.einsum("b h s d, b h s f d -> b h s f", q2, k2)
        attn = attn.softmax(dim=-1)
        x = rearrange(x, "b s f (h d) -> b h s f d", f=f, h=h)
        x = torch.einsum("b h s f, b h s f d -> b h s d", attn, x)
        x = rearrange(x, "b h s d -> b s (h d)")
        x = torch.cat((cls_out, x), dim=1)
        result: Tensor = self.proj(x)
        return result


class PositionsOnQueries(nn.Module):
    """No scale; the queries meet positions from the other side, so that the bias belongs to key and query swapped."""

    def __init__(self, channels: int = 16, width: int = 4, height: int = 4) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, kernel_size=1)
        self.key = nn.Conv2d(channels, channels, kernel_size=1)
        self.value = nn.Conv2d(channels, channels, kernel_size=1)
        self.rel_h = nn.Parameter(torch.randn([1, channels, height, 1]), requires_grad=True)
        self.rel_w = nn.Parameter(torch.randn([1, channels, 1, width]), requires_grad=True)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        n_batch, c, width, height = x.size()
        q = self.query(x).view(n_batch, c, -1)
        k = self.key(x).view(n_batch, c, -1)
        v = self.value(x).view(n_batch, c, -1)
        content_content = torch.bmm(q.permute(0, 2, 1), k)
        content_position = (self.rel_h + self.rel_w).view(1, c, -1).permute(0, 2, 1)
        content_position = torch.matmul(content_position, q)
        energy = content_content + content_position
        attention = self.softmax(energy)
        out = torch.bmm(v, attention.permute(0, 2, 1))
        return out.view(n_batch, c, width, height)


class AxialAttention(nn.Module):
    """Batch norm of three kinds of scores before their sum; the weights meet values and embeddings of positions."""

    flatten_index: Tensor

    def __init__(self, planes: int = 32, groups: int = 2, kernel_size: int = 6) -> None:
        super().__init__()
        self.planes, self.groups, self.group_planes, self.kernel_size = planes, groups, planes // groups, kernel_size
        self.qkv_transform = nn.Conv1d(planes, planes * 2, kernel_size=1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(planes * 2)
        self.bn_similarity = nn.BatchNorm2d(groups * 3)
        self.bn_output = nn.BatchNorm1d(planes * 2)
        self.relative = nn.Parameter(torch.randn(self.group_planes * 2, kernel_size * 2 - 1), requires_grad=True)
        query_index = torch.arange(kernel_size).unsqueeze(0)
        key_index = torch.arange(kernel_size).unsqueeze(1)
        self.register_buffer("flatten_index", (key_index - query_index + kernel_size - 1).view(-1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        n, w, c, h = x.shape
        x = x.contiguous().view(n * w, c, h)
        parts = [self.group_planes // 2, self.group_planes // 2, self.group_planes]
        qkv = self.bn_qkv(self.qkv_transform(x))
        q, k, v = torch.split(qkv.reshape(n * w, self.groups, self.group_planes * 2, h), parts, dim=2)
        embeddings = torch.index_select(self.relative, 1, self.flatten_index)
        embeddings = embeddings.view(self.group_planes * 2, self.kernel_size, self.kernel_size)
        q_embedding, k_embedding, v_embedding = torch.split(embeddings, parts, dim=0)
        qr = torch.einsum("bgci,cij->bgij", q, q_embedding)
        kr = torch.einsum("bgci,cij->bgij", k, k_embedding).transpose(2, 3)
        qk = torch.einsum("bgci, bgcj->bgij", q, k)
        stacked = torch.cat([qk, qr, kr], dim=1)
        stacked = self.bn_similarity(stacked).view(n * w, 3, self.groups, h, h).sum(dim=1)
        similarity = F.softmax(stacked, dim=3)
        sv = torch.einsum("bgij,bgcj->bgci", similarity, v)
        sve = torch.einsum("bgij,cij->bgci", similarity, v_embedding)
        output = torch.cat([sv, sve], dim=-1).view(n * w, self.planes * 2, h)
        output = self.bn_output(output).view(n, w, self.planes, 2, h).sum(dim=-2)
        result: Tensor = output.permute(0, 2, 3, 1)
        return result


class CrissCross(nn.Module):
    """One softmax over a row and a column, whose scores are two products side by side, -inf on one diagonal."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 4, kernel_size=1)
        self.key_conv = nn.Conv2d(channels, channels // 4, kernel_size=1)
        self.value_conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.softmax = nn.Softmax(dim=3)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))

    def infinite(self, b: int, h: int, w: int) -> Tensor:
        return -torch.diag(torch.tensor(float("inf")).repeat(h), 0).unsqueeze(0).repeat(b * w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.size()
        query = self.query_conv(x)
        query_h = query.permute(0, 3, 1, 2).contiguous().view(b * width, -1, height).permute(0, 2, 1)
        query_w = query.permute(0, 2, 1, 3).contiguous().view(b * height, -1, width).permute(0, 2, 1)
        key = self.key_conv(x)
        key_h = key.permute(0, 3, 1, 2).contiguous().view(b * width, -1, height)
        key_w = key.permute(0, 2, 1, 3).contiguous().view(b * height, -1, width)
        value = self.value_conv(x)
        value_h = value.permute(0, 3, 1, 2).contiguous().view(b * width, -1, height)
        value_w = value.permute(0, 2, 1, 3).contiguous().view(b * height, -1, width)
        energy_h = torch.bmm(query_h, key_h) + self.infinite(b, height, width)
        energy_h = energy_h.view(b, width, height, height).permute(0, 2, 1, 3)
        energy_w = torch.bmm(query_w, key_w).view(b, height, width, width)
        concate = self.softmax(torch.cat([energy_h, energy_w], 3))
        att_h = concate[:, :, :, 0:height].permute(0, 2, 1, 3).contiguous().view(b * width, height, height)
        att_w = concate[:, :, :, height : height + width].contiguous().view(b * height, width, width)
        out_h = torch.bmm(value_h, att_h.permute(0, 2, 1))
        out_h = out_h.view(b, width, -1, height).permute(0, 2, 3, 1)
        out_w = torch.bmm(value_w, att_w.permute(0, 2, 1))
        out_w = out_w.view(b, height, -1, width).permute(0, 2, 1, 3)
        result: Tensor = self.gamma * (out_h + out_w) + x
        return result


class SoftmaxOverQueries(nn.Module):
    """The softmax goes over the axis of the queries, although the values are summed over that of the keys."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 4, kernel_size=1)
        self.key_conv = nn.Conv2d(channels, channels // 4, kernel_size=1)
        self.value_conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.size()
        query = self.query_conv(x).view(b, -1, width * height).permute(0, 2, 1)
        key = self.key_conv(x).view(b, -1, width * height)
        energy = torch.bmm(query, key)
        attention = F.softmax(energy, 1)
        value = self.value_conv(x).view(b, -1, width * height)
        out = torch.bmm(value, attention.permute(0, 2, 1))
        out = out.view(b, c, height, width)
        return self.gamma * out + x


class UnfoldedNeighbors(nn.Module):
    """Keys and values of each pixel's neighbors, unfolded; products and sums where others multiply matrices."""

    def __init__(self, planes: int = 16, head: int = 2, kernel_att: int = 3) -> None:
        super().__init__()
        self.planes, self.head, self.head_dim, self.kernel_att = planes, head, planes // head, kernel_att
        self.conv1 = nn.Conv2d(planes, planes, kernel_size=1)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=1)
        self.conv3 = nn.Conv2d(planes, planes, kernel_size=1)
        self.conv_p = nn.Conv2d(2, self.head_dim, kernel_size=1)
        self.pad_att = nn.ReflectionPad2d(kernel_att // 2)
        self.unfold = nn.Unfold(kernel_size=kernel_att, padding=0, stride=1)
        self.softmax = nn.Softmax(dim=1)
        self.rate1 = nn.Parameter(torch.full((1,), 0.5))

    def position(self, height: int, width: int) -> Tensor:
        loc_w = torch.linspace(-1.0, 1.0, width).unsqueeze(0).repeat(height, 1)
        loc_h = torch.linspace(-1.0, 1.0, height).unsqueeze(1).repeat(1, width)
        return torch.cat([loc_w.unsqueeze(0), loc_h.unsqueeze(0)], 0).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.conv1(x), self.conv2(x), self.conv3(x)
        scaling = float(self.head_dim) ** -0.5
        b, _, h, w = q.shape
        pe = self.conv_p(self.position(h, w))
        q_att = q.view(b * self.head, self.head_dim, h, w) * scaling
        k_att = k.view(b * self.head, self.head_dim, h, w)
        v_att = v.view(b * self.head, self.head_dim, h, w)
        area = self.kernel_att * self.kernel_att
        unfold_k = self.unfold(self.pad_att(k_att)).view(b * self.head, self.head_dim, area, h, w)
        unfold_rpe = self.unfold(self.pad_att(pe)).view(1, self.head_dim, area, h, w)
        att = (q_att.unsqueeze(2) * (unfold_k + pe.unsqueeze(2) - unfold_rpe)).sum(1)
        att = self.softmax(att)
        out = self.unfold(self.pad_att(v_att)).view(b * self.head, self.head_dim, area, h, w)
        out = (att.unsqueeze(1) * out).sum(2).view(b, self.planes, h, w)
        result: Tensor = self.rate1 * out
        return result


class HeadsLast(nn.Module):
    """Heads behind positions, softmax over axis 2, and the scale after a mask of queries times keys."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, source: Tensor, x_mask: Tensor, source_mask: Tensor) -> Tensor:
        bs = x.size(0)
        queries = self.q_proj(x).view(bs, -1, self.heads, self.head_dim)
        keys = self.k_proj(source).view(bs, -1, self.heads, self.head_dim)
        values = self.v_proj(source).view(bs, -1, self.heads, self.head_dim)
        qk = torch.einsum("nlhd,nshd->nlsh", queries, keys)
        qk.masked_fill_(~(x_mask[:, :, None, None] * source_mask[:, None, :, None]), float("-inf"))
        softmax_temp = 1.0 / queries.size(3) ** 0.5
        a = torch.softmax(softmax_temp * qk, dim=2)
        queried = torch.einsum("nlsh,nshd->nlhd", a, values).contiguous()
        result: Tensor = self.merge(queried.view(bs, -1, self.heads * self.head_dim))
        return result


class MemoryReader(nn.Module):
    """Keys by queries, a softmax over the first of them, and minus the squares of the keys as a bias."""

    def __init__(self, channels: int = 16, key_width: int = 8, value_width: int = 16) -> None:
        super().__init__()
        self.key_proj = nn.Conv2d(channels, key_width, kernel_size=3, padding=1)
        self.key_comp = nn.Conv2d(channels, value_width, kernel_size=3, padding=1)
        self.value_proj = nn.Conv3d(channels, value_width, kernel_size=1)

    def forward(self, frames: Tensor, frame: Tensor) -> Tensor:
        b, t = frames.shape[:2]
        k16 = self.key_proj(frames.flatten(start_dim=0, end_dim=1))
        mk = k16.view(b, t, *k16.shape[-3:]).transpose(1, 2).contiguous()
        mv = self.value_proj(frames.transpose(1, 2))
        qk, qv = self.key_proj(frame), self.key_comp(frame)
        _, ck, _, h, w = mk.shape
        mk = mk.flatten(start_dim=2)
        qk = qk.flatten(start_dim=2)
        a = mk.pow(2).sum(1).unsqueeze(2)
        ab = 2 * (mk.transpose(1, 2) @ qk)
        affinity = (-a + ab) / math.sqrt(ck)
        affinity = F.softmax(affinity, dim=1)
        mo = mv.view(b, mv.shape[1], t * h * w)
        mem = torch.bmm(mo, affinity)
        mem = mem.view(b, mv.shape[1], h, w)
        return torch.cat([mem, qv], dim=1)


class SelectiveMemory(nn.Module):
    """Distances that a query weighs by channel and a key shrinks, and a softmax by hand over the keys in front."""

    def __init__(self, channels: int = 16, key_width: int = 8, value_width: int = 16) -> None:
        super().__init__()
        self.key_proj = nn.Conv2d(channels, key_width, kernel_size=3, padding=1)
        self.d_proj = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        self.e_proj = nn.Conv2d(channels, key_width, kernel_size=3, padding=1)
        self.value_proj = nn.Conv3d(channels, value_width, kernel_size=1)

    def forward(self, frames: Tensor, frame: Tensor) -> Tensor:
        b, t = frames.shape[:2]
        flat = frames.flatten(start_dim=0, end_dim=1)
        mk, ms = self.key_proj(flat), self.d_proj(flat) ** 2 + 1
        mk = mk.view(b, t, *mk.shape[-3:]).transpose(1, 2).contiguous()
        ms = ms.view(b, t, *ms.shape[-3:]).transpose(1, 2).contiguous()
        mv = self.value_proj(frames.transpose(1, 2))
        qk, qe = self.key_proj(frame), torch.sigmoid(self.e_proj(frame))
        ck = mk.shape[1]
        mk = mk.flatten(start_dim=2)
        ms = ms.flatten(start_dim=1).unsqueeze(2)
        qk = qk.flatten(start_dim=2)
        qe = qe.flatten(start_dim=2)
        mk = mk.transpose(1, 2)
        a_sq = mk.pow(2) @ qe
        two_ab = 2 * (mk @ (qk * qe))
        b_sq = (qe * qk.pow(2)).sum(1, keepdim=True)
        similarity = -a_sq + two_ab - b_sq
        similarity = similarity * ms / math.sqrt(ck)
        maxes = torch.max(similarity, dim=1, keepdim=True)[0]
        x_exp = torch.exp(similarity - maxes)
        x_exp_sum = torch.sum(x_exp, dim=1, keepdim=True)
        affinity = x_exp / x_exp_sum
        _, cv, _, h, w = mv.shape
        mo = mv.view(b, cv, t * h * w)
        mem = torch.bmm(mo, affinity)
        return mem.view(b, cv, h, w)


class SquaredDistances(nn.Module):
    """Minus squared distances of einsums, queries that are the keys, and values of another width than the head."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.width, self.head_dim = width, width // heads
        self.q_weight = nn.Parameter(torch.empty(width, heads, self.head_dim).normal_())
        self.v_weight = nn.Parameter(torch.empty(width, heads, self.head_dim).normal_())
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        t, n, _ = x.shape
        q = k = torch.einsum("tbm,mhd->tbhd", x, self.q_weight)
        squared_dist = (
            torch.einsum("tbhd,tbhd->tbh", q, q).unsqueeze(1)
            + torch.einsum("sbhd,sbhd->sbh", k, k).unsqueeze(0)
            - 2 * torch.einsum("tbhd,sbhd->tsbh", q, k)
        )
        attn_logits = -squared_dist / math.sqrt(self.head_dim)
        attn_mask = attn_mask[..., None, None]
        attn_logits += attn_mask
        attn_weights = F.softmax(attn_logits, dim=1)
        a = torch.einsum("mhd,nhd->hmn", self.q_weight, self.q_weight) / math.sqrt(self.head_dim)
        xa = torch.einsum("tbm,hmn->tbhn", x, a)
        pxa = torch.einsum("tsbh,sbhm->tbhm", attn_weights, xa)
        pxav = torch.einsum("tbhm,mhd->tbhd", pxa, self.v_weight).reshape(t, n, self.width)
        result: Tensor = self.out_proj(pxav)
        return result


class SlotAttention(nn.Module):
    """A softmax over the slots, which are queries; an epsilon is added and the keys' weights are divided by a sum."""

    def __init__(self, width: int = 16, iters: int = 2, eps: float = 1e-8) -> None:
        super().__init__()
        self.iters, self.eps, self.scale = iters, eps, width**-0.5
        self.slots_mu = nn.Parameter(torch.zeros(1, 1, width))
        self.slots_logsigma = nn.Parameter(torch.zeros(1, 1, width))
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.gru = nn.GRUCell(width, width)
        self.norm_input, self.norm_slots = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, inputs: Tensor, start: Tensor) -> Tensor:
        b, _, d = inputs.shape
        n_s = start.shape[1]
        slots = self.slots_mu.expand(b, n_s, -1) + self.slots_logsigma.exp().expand(b, n_s, -1) * start
        inputs = self.norm_input(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iters):
            slots_prev = slots
            q = self.to_q(self.norm_slots(slots))
            dots = torch.einsum("bid,bjd->bij", q, k) * self.scale
            attn = dots.softmax(dim=1) + self.eps
            attn = attn / attn.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bjd,bij->bid", v, attn)
            slots = self.gru(updates.reshape(-1, d), slots_prev.reshape(-1, d))
            slots = slots.reshape(b, -1, d)
        return slots


class KeptTokens(nn.Module):
    """exp of scores minus their maximum, times a policy with ones on the diagonal, smoothed above and below."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, width * 3)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def softmax_with_policy(self, attn: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
        b, n, _ = policy.size()
        attn_policy = policy.reshape(b, 1, 1, n)
        eye = torch.eye(n, dtype=attn_policy.dtype, device=attn_policy.device).view(1, 1, n, n)
        attn_policy = attn_policy + (1.0 - attn_policy) * eye
        max_att = torch.max(attn, dim=-1, keepdim=True)[0]
        attn = attn - max_att
        attn = attn.to(torch.float32).exp_() * attn_policy.to(torch.float32)
        attn = (attn + eps / n) / (attn.sum(dim=-1, keepdim=True) + eps)
        return attn.type_as(max_att)

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = self.softmax_with_policy(attn, policy)
        attn = self.attn_drop(attn)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        result: Tensor = self.proj(x)
        return result


class LayerNormProxy(nn.Module):
    """Layer norm of an image's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b c h w -> b h w c")
        x = self.norm(x)
        return rearrange(x, "b h w c -> b c h w")


class DeformedKeys(nn.Module):
    """Keys sampled where the queries point, and biases sampled from a table at the displacements; channels first."""

    def __init__(self, size: int = 4, heads: int = 4, channels: int = 8, groups: int = 2, stride: int = 2) -> None:
        super().__init__()
        self.heads, self.channels, self.groups, self.scale = heads, channels, groups, channels**-0.5
        self.nc, self.factor = heads * channels, 2.0
        self.group_channels, self.group_heads = self.nc // groups, heads // groups
        width = self.group_channels
        self.conv_offset = nn.Sequential(
            nn.Conv2d(width, width, 3, stride, 1, groups=width),
            LayerNormProxy(width),
            nn.GELU(),
            nn.Conv2d(width, 2, 1, 1, 0, bias=False),
        )
        self.proj_q = nn.Conv2d(self.nc, self.nc, kernel_size=1)
        self.proj_k = nn.Conv2d(self.nc, self.nc, kernel_size=1)
        self.proj_v = nn.Conv2d(self.nc, self.nc, kernel_size=1)
        self.proj_out = nn.Conv2d(self.nc, self.nc, kernel_size=1)
        self.attn_drop = nn.Dropout(0.0, inplace=True)
        self.rpe_table = nn.Parameter(torch.zeros(heads, size * 2 - 1, size * 2 - 1))

    @torch.no_grad()
    def grid(self, start: float, h: int, w: int, b: int) -> Tensor:
        rows, columns = torch.linspace(start, h - 1 + start, h), torch.linspace(start, w - 1 + start, w)
        ref = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        ref[..., 1].div_(w - 1.0).mul_(2.0).sub_(1.0)
        ref[..., 0].div_(h - 1.0).mul_(2.0).sub_(1.0)
        return ref[None, ...].expand(b * self.groups, -1, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        q = self.proj_q(x)
        q_off = rearrange(q, "b (g c) h w -> (b g) c h w", g=self.groups, c=self.group_channels)
        offset = self.conv_offset(q_off).contiguous()
        h_k, w_k = offset.size(2), offset.size(3)
        n_sample = h_k * w_k
        offset_range = torch.tensor([1.0 / (h_k - 1.0), 1.0 / (w_k - 1.0)]).reshape(1, 2, 1, 1)
        offset = offset.tanh().mul(offset_range).mul(self.factor)
        offset = rearrange(offset, "b p h w -> b h w p")
        pos = offset + self.grid(0.5, h_k, w_k, b)
        x_sampled = F.grid_sample(
            input=x.reshape(b * self.groups, self.group_channels, h, w),
            grid=pos[..., (1, 0)],
            mode="bilinear",
            align_corners=True,
        )
        x_sampled = x_sampled.reshape(b, c, 1, n_sample)
        q = q.reshape(b * self.heads, self.channels, h * w)
        k = self.proj_k(x_sampled).reshape(b * self.heads, self.channels, n_sample)
        v = self.proj_v(x_sampled).reshape(b * self.heads, self.channels, n_sample)
        attn = torch.einsum("b c m, b c n -> b m n", q, k)
        attn = attn.mul(self.scale)
        rpe_bias = self.rpe_table[None, ...].expand(b, -1, -1, -1)
        q_grid = self.grid(0.0, h, w, b)
        displacement = q_grid.reshape(b * self.groups, h * w, 2).unsqueeze(2)
        displacement = (displacement - pos.reshape(b * self.groups, n_sample, 2).unsqueeze(1)).mul(0.5)
        attn_bias = F.grid_sample(
            input=rearrange(rpe_bias, "b (g c) h w -> (b g) c h w", c=self.group_heads, g=self.groups),
            grid=displacement[..., (1, 0)],
            mode="bilinear",
            align_corners=True,
        )
        attn_bias = attn_bias.reshape(b * self.heads, h * w, n_sample)
        attn = attn + attn_bias
        attn = F.softmax(attn, dim=2)
        attn = self.attn_drop(attn)
        out = torch.einsum("b m n, b c n -> b c m", attn, v)
        out = out.reshape(b, c, h, w)
        result: Tensor = self.proj_out(out)
        return result


class ContentAndPosition(nn.Module):
    """Contents beside positions in each head, values half as wide, two masks of -inf, and a mean map nobody reads."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.q_content, self.q_pos = nn.Linear(width, width), nn.Linear(width, width)
        self.k_content, self.k_pos = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, tgt: Tensor, memory: Tensor, query_pos: Tensor, pos: Tensor, attn_mask: Tensor, padding: Tensor
    ) -> Tensor:
        tgt2 = self.attention(tgt, memory, query_pos, pos, attn_mask, padding)[0]
        return tgt + tgt2

    def attention(
        self, tgt: Tensor, memory: Tensor, query_pos: Tensor, pos: Tensor, attn_mask: Tensor, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        n, b, c = tgt.shape
        hw, h = memory.shape[0], self.heads
        q, k = self.q_content(tgt).view(n, b, h, c // h), self.k_content(memory).view(hw, b, h, c // h)
        q_pos, k_pos = self.q_pos(query_pos).view(n, b, h, c // h), self.k_pos(pos).view(hw, b, h, c // h)
        q = torch.cat([q, q_pos], dim=3).view(n, b, c * 2)
        k = torch.cat([k, k_pos], dim=3).view(hw, b, c * 2)
        v = self.v_proj(memory)
        head_dim, v_head_dim = c * 2 // h, c // h
        q = q * float(head_dim) ** -0.5
        attn_mask = attn_mask.unsqueeze(0)
        q = q.contiguous().view(n, b * h, head_dim).transpose(0, 1)
        k = k.contiguous().view(-1, b * h, head_dim).transpose(0, 1)
        v = v.contiguous().view(-1, b * h, v_head_dim).transpose(0, 1)
        weights = torch.bmm(q, k.transpose(1, 2))
        weights.masked_fill_(attn_mask, float("-inf"))
        weights = weights.view(b, h, n, hw)
        weights = weights.masked_fill(padding.unsqueeze(1).unsqueeze(2), float("-inf"))
        weights = weights.view(b * h, n, hw)
        weights = F.softmax(weights, dim=-1)
        weights = F.dropout(weights, p=0.1, training=self.training)
        output = torch.bmm(weights, v)
        output = output.transpose(0, 1).contiguous().view(n, b, c)
        return self.out_proj(output), weights.view(b, h, n, hw).sum(dim=1) / h


class BothDirections(nn.Module):
    """Image and text from the same scores, clamped, once transposed and minus their maximum; a mask of ones adds 1."""

    def __init__(self, v_dim: int = 16, l_dim: int = 24, width: int = 32, heads: int = 4, stable: bool = False) -> None:
        super().__init__()
        self.width, self.heads, self.head_dim, self.stable = width, heads, width // heads, stable
        self.scale = self.head_dim ** (-0.5)
        self.v_proj, self.l_proj = nn.Linear(v_dim, width), nn.Linear(l_dim, width)
        self.values_v_proj, self.values_l_proj = nn.Linear(v_dim, width), nn.Linear(l_dim, width)
        self.out_v_proj, self.out_l_proj = nn.Linear(width, v_dim), nn.Linear(width, l_dim)

    def _shape(self, tensor: Tensor, seq_len: int, bsz: int) -> Tensor:
        return tensor.view(bsz, seq_len, self.heads, self.head_dim).transpose(1, 2).contiguous()

    def forward(self, v: Tensor, text: Tensor, attention_mask_l: Tensor) -> tuple[Tensor, Tensor]:
        bsz, tgt_len, _ = v.size()
        query = self.v_proj(v) * self.scale
        key = self._shape(self.l_proj(text), -1, bsz)
        value_v = self._shape(self.values_v_proj(v), -1, bsz)
        value_l = self._shape(self.values_l_proj(text), -1, bsz)
        proj_shape = (bsz * self.heads, -1, self.head_dim)
        query = self._shape(query, tgt_len, bsz).view(*proj_shape)
        key, value_v, value_l = key.view(*proj_shape), value_v.view(*proj_shape), value_l.view(*proj_shape)
        src_len = key.size(1)
        weights = torch.bmm(query, key.transpose(1, 2))
        if self.stable:
            weights = weights - weights.max()
        weights = torch.clamp(weights, min=-50000)
        weights = torch.clamp(weights, max=50000)
        transposed = weights.transpose(1, 2)
        weights_l = transposed - torch.max(transposed, dim=-1, keepdim=True)[0]
        weights_l = torch.clamp(weights_l, min=-50000)
        weights_l = torch.clamp(weights_l, max=50000)
        weights_l = weights_l.softmax(dim=-1)
        mask = attention_mask_l.unsqueeze(1).unsqueeze(1)
        mask = mask.expand(bsz, 1, tgt_len, src_len)
        mask = mask.masked_fill(mask == 0, -9e15)
        weights = weights.view(bsz, self.heads, tgt_len, src_len) + mask
        weights = weights.view(bsz * self.heads, tgt_len, src_len)
        weights_v = F.softmax(weights, dim=-1)
        probs_v = F.dropout(weights_v, p=0.1, training=self.training)
        probs_l = F.dropout(weights_l, p=0.1, training=self.training)
        output_v = torch.bmm(probs_v, value_l)
        output_l = torch.bmm(probs_l, value_v)
        output_v = output_v.view(bsz, self.heads, tgt_len, self.head_dim).transpose(1, 2)
        output_v = output_v.reshape(bsz, tgt_len, self.width)
        output_l = output_l.view(bsz, self.heads, src_len, self.head_dim).transpose(1, 2)
        output_l = output_l.reshape(bsz, src_len, self.width)
        return self.out_v_proj(output_v), self.out_l_proj(output_l)


class HolesInWindows(nn.Module):
    """Cosine-like queries and keys, keys transposed from the start, and a window's mask of holes that it updates."""

    attn_mask: Tensor

    def __init__(self, width: int = 16, heads: int = 2, size: int = 8, window: int = 4) -> None:
        super().__init__()
        self.heads, self.size, self.window, self.scale = heads, size, window, (width // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)
        self.register_buffer("attn_mask", shifted_mask(size, size, window, window // 2))

    def attention(self, x: Tensor, mask_windows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b_, n, c = x.shape
        norm_x = F.normalize(x, p=2.0, dim=-1)
        q = self.q(norm_x).reshape(b_, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        k = self.k(norm_x).view(b_, -1, self.heads, c // self.heads).permute(0, 2, 3, 1)
        v = self.v(x).view(b_, -1, self.heads, c // self.heads).permute(0, 2, 1, 3)
        attn = (q @ k) * self.scale
        n_windows = mask.shape[0]
        attn = attn.view(b_ // n_windows, n_windows, self.heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.heads, n, n)
        holes = mask_windows.squeeze(-1).unsqueeze(1).unsqueeze(1)
        attn = attn + holes.masked_fill(holes == 0, (-100.0)).masked_fill(holes == 1, 0.0)
        with torch.no_grad():
            mask_windows = torch.clamp(torch.sum(mask_windows, dim=1, keepdim=True), 0, 1).repeat(1, n, 1)
        attn = self.softmax(attn)
        x = (attn @ v).transpose(1, 2).reshape(b_, n, c)
        return self.proj(x), mask_windows

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b, _, c = x.shape
        h = w = self.size
        shift, area = self.window // 2, self.window**2
        shifted_x = torch.roll(x.view(b, h, w, c), shifts=(-shift, -shift), dims=(1, 2))
        shifted = torch.roll(mask.view(b, h, w, 1), shifts=(-shift, -shift), dims=(1, 2))
        x_windows = window_partition(shifted_x, self.window).view(-1, area, c)
        mask_windows = window_partition(shifted, self.window).view(-1, area, 1)
        windows, mask_windows = self.attention(x_windows, mask_windows, self.attn_mask)
        shifted_x = window_reverse(windows.view(-1, self.window, self.window, c), self.window, h, w)
        shifted = window_reverse(mask_windows.view(-1, self.window, self.window, 1), self.window, h, w)
        x = torch.roll(shifted_x, shifts=(shift, shift), dims=(1, 2)).view(b, h * w, c)
        return x, torch.roll(shifted, shifts=(shift, shift), dims=(1, 2)).view(b, h * w, 1)


class MultipliedMask(nn.Module):
    """Scores times a mask of ones minus 10000 times the rest; the queries are divided beforehand."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, width * 3)
        self.dense = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        q, k, v = self.query_key_value(x).split(c, dim=-1)
        q, k, v = (t.view(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3) for t in (q, k, v))
        return q, k, v

    def merged(self, context: Tensor) -> Tensor:
        context = context.permute(0, 2, 1, 3).contiguous()
        result: Tensor = self.dense(context.view(*context.size()[:-2], -1))
        return result

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if len(attention_mask.shape) == 3:
            attention_mask = attention_mask.unsqueeze(1)
        scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-1, -2))
        scores = torch.mul(scores, attention_mask) - 10000.0 * (1.0 - attention_mask)
        probs = nn.Softmax(dim=-1)(scores)
        return self.merged(torch.matmul(probs, v))


class PivotsAndWindows(MultipliedMask):
    """One softmax over gathered pivots and over overlapping windows of a strided view, added up from two products."""

    def __init__(self, width: int = 32, heads: int = 4, window: int = 4, times: int = 2) -> None:
        super().__init__(width, heads)
        self.window, self.times = window, times

    def chunked(self, x: Tensor) -> Tensor:
        w, times = self.window, self.times
        x = F.pad(x, (0, 0, (times - 1) * w, 0), value=0)
        x = x.view(x.size(0), x.size(1), x.size(2) // w, w, x.size(3))
        chunk_size, chunk_stride = list(x.size()), list(x.stride())
        chunk_size[2] = chunk_size[2] - times + 1
        chunk_size[3] = w * times
        return x.as_strided(size=chunk_size, stride=chunk_stride)

    def forward(self, x: Tensor, pivot_idx: Tensor, pivot_mask: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.split(x)
        b, n_head, s, hn = q.shape
        _, n_piv = pivot_idx.shape
        w, times = self.window, self.times
        dummy = pivot_idx.view(b, 1, n_piv, 1).expand(b, n_head, n_piv, hn)
        pivot_k, pivot_v = torch.gather(k, 2, dummy), torch.gather(v, 2, dummy)
        scores = torch.matmul(q, pivot_k.transpose(-1, -2))
        pivot_mask = pivot_mask.unsqueeze(1)
        scores_pivot = torch.mul(scores, pivot_mask / math.sqrt(hn)) - 10000.0 * (1.0 - pivot_mask)
        scores_pivot = scores_pivot + math.log(s // n_piv)
        window_k, window_v = self.chunked(k), self.chunked(v)
        window_q = q.reshape(b, n_head, s // w, w, hn)
        scores = torch.matmul(window_q, window_k.transpose(-1, -2))
        mask = torch.ones((w, w * times), dtype=scores.dtype, device=q.device).tril_(diagonal=w * (times - 1))
        scores_window = torch.mul(scores, mask / math.sqrt(hn)) - 10000.0 * (1.0 - mask)
        for t in range(1, times):
            scores_window[:, :, t - 1, :, : w * times - w * t] -= 10000.0
        scores_window = scores_window.view(b, n_head, s, w * times)
        probs = nn.Softmax(dim=-1)(torch.cat((scores_pivot, scores_window), dim=-1))
        context = torch.matmul(probs[..., : -w * times], pivot_v) + torch.einsum(
            "bcgwk,bcgkh->bcgwh", probs[..., -w * times :].view(b, n_head, s // w, w, w * times), window_v
        ).view(b, n_head, s, hn)
        return self.merged(context)


class GatheredKeys(MultipliedMask):
    """The last keys are the queries: a triangle made in place is added in place to a corner of the scores."""

    def forward(self, x: Tensor, index: Tensor, queries: Tensor) -> Tensor:  # type: ignore[override]
        _, k, v = self.split(x)
        q, _, _ = self.split(queries)
        b, n_head, sq, hn = q.shape
        _, n_piv = index.shape
        dummy = index.view(b, 1, n_piv, 1).expand(b, n_head, n_piv, hn)
        pivot_k, pivot_v = torch.gather(k, 2, dummy), torch.gather(v, 2, dummy)
        scores = torch.matmul(q / math.sqrt(hn), pivot_k.transpose(-1, -2))
        part = scores[:, :, -sq:, -sq:]
        m = torch.ones((sq, sq), device=q.device, dtype=q.dtype) * -10000.0
        m.triu_(diagonal=1)
        part += m
        probs = nn.Softmax(dim=-1)(scores)
        return self.merged(torch.matmul(probs, pivot_v))


class NextScale(nn.Module):
    """Cosine attention with a clamped temperature in its logarithm, no bias for keys, and a cache of its own."""

    zero_k_bias: Tensor

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, width // heads, 1
        self.scale_mul_1h11 = nn.Parameter(torch.full(size=(1, heads, 1, 1), fill_value=4.0).log())
        self.max_scale_mul = torch.log(torch.tensor(100)).item()
        self.mat_qkv = nn.Linear(width, width * 3, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.caching = False
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def slow_attn(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        attn = query.mul(self.scale) @ key.transpose(-2, -1)
        if attn_mask is not None:
            attn.add_(attn_mask)
        return attn.softmax(dim=-1) @ value

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(input=x, weight=self.mat_qkv.weight, bias=bias).view(b, n, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(dim=0)
        scale_mul = self.scale_mul_1h11.clamp_max(self.max_scale_mul).exp()
        q = F.normalize(q, dim=-1).mul(scale_mul)
        k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is None or self.cached_v is None:
                self.cached_k = k
                self.cached_v = v
            else:
                k = self.cached_k = torch.cat((self.cached_k, k), dim=2)
                v = self.cached_v = torch.cat((self.cached_v, v), dim=2)
        out = self.slow_attn(q, k, v, attn_bias).transpose(1, 2).reshape(b, n, c)
        result: Tensor = self.proj(out)
        return result


class ScalesOneByOne(nn.Module):
    """The cache is emptied, grows by a scale at a time, and is emptied again."""

    def __init__(self, patch_nums: tuple[int, ...] = (1, 2, 3)) -> None:
        super().__init__()
        self.patch_nums = patch_nums
        self.attn = NextScale()

    def forward(self, x: Tensor) -> Tensor:
        self.attn.kv_caching(True)
        outputs, start = [], 0
        for pn in self.patch_nums:
            outputs.append(self.attn(x[:, start : start + pn * pn]))
            start += pn * pn
        self.attn.kv_caching(False)
        return torch.cat(outputs, dim=1)


class ScalesAtOnce(nn.Module):
    """A mask by scales: zeros where a query's scale is not below the key's, minus infinity elsewhere."""

    attn_bias_for_masking: Tensor

    def __init__(self, patch_nums: tuple[int, ...] = (1, 2, 3)) -> None:
        super().__init__()
        self.attn = NextScale()
        d = torch.cat([torch.full((pn * pn,), i) for i, pn in enumerate(patch_nums)]).view(1, -1, 1)
        d_t = d.transpose(1, 2)
        bias = torch.where(d >= d_t, 0.0, -torch.inf).reshape(1, 1, d.shape[1], d.shape[1])
        self.register_buffer("attn_bias_for_masking", bias.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        attn_bias = self.attn_bias_for_masking[:, :, : x.shape[1], : x.shape[1]]
        result: Tensor = self.attn(x, attn_bias)
        return result


class PatchesOfFrames(nn.Module):
    """Each head has patches of its own size over all frames, and a fill of the scores whose result is lost."""

    def __init__(self, channels: int = 8, patchsize: tuple[tuple[int, int], ...] = ((4, 4), (2, 2))) -> None:
        super().__init__()
        self.patchsize = patchsize
        self.query_embedding = nn.Conv2d(channels, channels, kernel_size=1, padding=0)
        self.value_embedding = nn.Conv2d(channels, channels, kernel_size=1, padding=0)
        self.key_embedding = nn.Conv2d(channels, channels, kernel_size=1, padding=0)
        self.output_linear = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.LeakyReLU(0.2, inplace=True)
        )

    def attention(self, query: Tensor, key: Tensor, value: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        scores.masked_fill(m, -1e9)
        p_attn = F.softmax(scores, dim=-1)
        p_val = torch.matmul(p_attn, value)
        return p_val, p_attn

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        b = 2
        bt, c, h, w = x.size()
        t = bt // b
        d_k = c // len(self.patchsize)
        output = []
        parts = (self.query_embedding(x), self.key_embedding(x), self.value_embedding(x))
        chunks = zip(*(torch.chunk(part, len(self.patchsize), dim=1) for part in parts), strict=True)
        for (width, height), (query, key, value) in zip(self.patchsize, chunks, strict=True):
            out_w, out_h = w // width, h // height
            n = t * out_h * out_w
            mm = m.view(b, t, 1, out_h, height, out_w, width)
            mm = mm.permute(0, 1, 3, 5, 2, 4, 6).contiguous().view(b, n, height * width)
            mm = (mm.mean(-1) > 0.5).unsqueeze(1).repeat(1, n, 1)
            q, k, v = (
                part.view(b, t, d_k, out_h, height, out_w, width)
                .permute(0, 1, 3, 5, 2, 4, 6)
                .contiguous()
                .view(b, n, d_k * height * width)
                for part in (query, key, value)
            )
            y, _ = self.attention(q, k, v, mm)
            y = y.view(b, t, out_h, out_w, d_k, height, width)
            y = y.permute(0, 1, 4, 2, 5, 3, 6).contiguous().view(bt, d_k, h, w)
            output.append(y)
        result: Tensor = self.output_linear(torch.cat(output, 1))
        return result


class HardAssignment(nn.Module):
    """Groups look at the image, then each pixel picks its group: a straight-through argmax over the queries."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 5) -> None:
        super().__init__()
        self.heads, self.assign_eps = heads, 1.0
        self.group_token = nn.Parameter(torch.zeros(1, groups, width))
        self.cross_q, self.cross_k, self.cross_v = (nn.Linear(width, width) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.proj, self.cross_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def hard_softmax(self, logits: Tensor, dim: int) -> Tensor:
        y_soft = logits.softmax(dim)
        index = y_soft.max(dim, keepdim=True)[1]
        y_hard = torch.zeros_like(logits, memory_format=torch.legacy_contiguous_format).scatter_(dim, index, 1.0)
        return y_hard - y_soft.detach() + y_soft

    def cross(self, query: Tensor, key: Tensor) -> Tensor:
        q, k, v = self.cross_q(query), self.cross_k(key), self.cross_v(key)
        q, k, v = (rearrange(t, "b n (h c)-> b h n c", h=self.heads) for t in (q, k, v))
        attn = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        attn = attn.softmax(dim=-1)
        result: Tensor = self.cross_proj(rearrange(attn @ v, "b h n c -> b n (h c)", h=self.heads))
        return result

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = self.group_token.expand(x.shape[0], -1, -1)
        query = self.norm(query + self.cross(query, x))
        q, k, v = self.q_proj(query), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(t, "b n (h c)-> b h n c", h=1) for t in (q, k, v))
        raw_attn = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        attn = self.hard_softmax(raw_attn, dim=-2)
        soft_attn = F.softmax(raw_attn, dim=-2)
        attn = attn / (attn.sum(dim=-1, keepdim=True) + self.assign_eps)
        out = rearrange(attn @ v, "b h n c -> b n (h c)", h=1)
        new_x = self.proj(out)
        new_x += query
        return new_x, soft_attn


class HashedRounds(nn.Module):
    """exp of scores minus their logsumexp, in chunks of a sorted order; the logsumexp also weighs the rounds."""

    alpha: Tensor
    beta: Tensor

    def __init__(self, channels: int = 16, heads: int = 2, rounds: int = 2, size: int = 8) -> None:
        super().__init__()
        self.heads, self.rounds, self.size = heads, rounds, size
        inner = channels * 2
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)
        self.register_buffer("alpha", noise(channels // heads + 2, rounds, seed=1))
        self.register_buffer("beta", noise(1, rounds, seed=2))

    def positions(self, x: Tensor) -> Tensor:
        norms = x.norm(p=2, dim=-1, keepdim=True)
        ext = torch.sqrt(torch.amax(norms, dim=-2, keepdim=True) ** 2 - norms**2)
        x = torch.cat((x, ext, torch.zeros_like(ext)), -1)
        hashed = ((x @ self.alpha + self.beta) / 1).permute(2, 0, 1)
        return hashed.reshape((self.rounds, *x.shape[:-1])).argsort(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        with torch.no_grad():
            x_hash = rearrange(x.view(b, n, self.heads, c // self.heads), "b t h e -> (b h) t e")
            positions = self.positions(x_hash).reshape(self.rounds, b * self.heads, -1)
        query, key, value = (rearrange(t, "b t (h e) -> (b h) t e", h=self.heads) for t in (query, key, value))
        bs, _, dim = query.shape
        rev_positions = torch.argsort(positions, dim=-1)
        offset = torch.arange(bs, device=query.device).unsqueeze(-1) * n
        flat = (positions + offset).reshape(-1)
        s_queries = query.reshape(-1, dim).index_select(0, flat).reshape(-1, self.size, dim)
        s_keys = key.reshape(-1, dim).index_select(0, flat).reshape(-1, self.size, dim)
        s_values = value.reshape(-1, dim).index_select(0, flat).reshape(-1, self.size, dim)
        inner = s_queries @ s_keys.transpose(2, 1)
        inner = inner / 1
        dots_logsumexp = torch.logsumexp(inner, dim=-1, keepdim=True)
        dots = torch.exp(inner - dots_logsumexp)
        bo = (dots @ s_values).reshape(self.rounds, bs, n, -1)
        offset = torch.arange(bs * self.rounds, device=query.device).unsqueeze(-1) * n
        rev_flat = (rev_positions.reshape(-1, n) + offset).reshape(-1)
        o = bo.reshape(-1, dim).index_select(0, rev_flat).reshape(self.rounds, bs, n, -1)
        slogits = dots_logsumexp.reshape(self.rounds, bs, -1)
        logits = torch.gather(slogits, 2, rev_positions)
        probs = torch.exp(logits - torch.logsumexp(logits, dim=0, keepdim=True))
        out = torch.sum(o * probs.unsqueeze(-1), dim=0)
        out = rearrange(out, "(b h) t d -> b t h d", h=self.heads).reshape(b, n, -1)
        result: Tensor = self.to_out(out)
        return result


class SpectrumByMask(nn.Module):
    """Bands attend to bands, keys times queries; the values are gated by a mask of the aperture beforehand."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.rescale = nn.Parameter(torch.ones(heads, 1, 1))
        self.proj = nn.Linear(width, width, bias=True)
        self.mask_conv = nn.Conv2d(width, width, kernel_size=1, bias=True)

    def forward(self, x_in: Tensor, mask: Tensor) -> Tensor:
        b, h, w, c = x_in.shape
        x = x_in.reshape(b, h * w, c)
        mask_attn = torch.sigmoid(self.mask_conv(mask.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        mask_attn = (mask_attn[0, :, :, :]).expand([b, h, w, c]).flatten(1, 2)
        parts = (self.to_q(x), self.to_k(x), self.to_v(x), mask_attn)
        q, k, v, mask_attn = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in parts)
        v = v * mask_attn
        q, k, v = q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)
        q = F.normalize(q, dim=-1, p=2)
        k = F.normalize(k, dim=-1, p=2)
        attn = k @ q.transpose(-2, -1)
        attn = attn * self.rescale
        attn = attn.softmax(dim=-1)
        x = attn @ v
        x = x.permute(0, 3, 1, 2)
        x = x.reshape(b, h * w, c)
        result: Tensor = self.proj(x).view(b, h, w, c) + x_in
        return result


class SparseAndDense(nn.Module):
    """A softmax and a squared ReLU of the same scores, in a sum whose weights are a softmax of two numbers."""

    index: Tensor

    def __init__(self, width: int = 16, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (width // heads) ** -0.5
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_index(window, window))
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, width * 2)
        self.proj = nn.Linear(width, width)
        self.softmax, self.relu = nn.Softmax(dim=-1), nn.ReLU()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        b_, n, c = x.shape
        q = self.to_q(x).reshape(b_, n, 1, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)[0]
        kv = self.to_kv(x).reshape(b_, n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1)
        bias = bias.permute(2, 0, 1).contiguous()
        ratio = attn.size(-1) // bias.size(-1)
        bias = repeat(bias, "nH l c -> nH l (c d)", d=ratio)
        attn = attn + bias.unsqueeze(0)
        attn0 = self.softmax(attn)
        attn1 = self.relu(attn) ** 2
        w1 = torch.exp(self.w[0]) / torch.sum(torch.exp(self.w))
        w2 = torch.exp(self.w[1]) / torch.sum(torch.exp(self.w))
        attn = attn0 * w1 + attn1 * w2
        x = (attn @ v).transpose(1, 2).reshape(b_, n, c)
        result: Tensor = self.proj(x)
        return result


class MaskedByPrediction(nn.Module):
    """A mask that the model predicts; rows without any key are set to False through the indices of torch.where."""

    def __init__(self, width: int = 32, heads: int = 4, queries: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.mask_embed = nn.Linear(width, 8)
        self.cross = nn.MultiheadAttention(width, heads, dropout=0.0)
        self.norm = nn.LayerNorm(width)

    def forward(self, memory: Tensor, pos: Tensor, mask_features: Tensor) -> Tensor:
        bs = memory.shape[1]
        size = int(memory.shape[0] ** 0.5)
        query_embed = self.query_embed.weight.unsqueeze(1).repeat(1, bs, 1)
        output = self.query_feat.weight.unsqueeze(1).repeat(1, bs, 1)
        mask_embed = self.mask_embed(output.transpose(0, 1))
        outputs_mask = torch.einsum("bqc,bchw->bqhw", mask_embed, mask_features)
        attn_mask = F.interpolate(outputs_mask, size=(size, size), mode="bilinear", align_corners=False)
        attn_mask = (attn_mask.sigmoid().flatten(2).unsqueeze(1).repeat(1, self.heads, 1, 1).flatten(0, 1) < 0.5).bool()
        attn_mask = attn_mask.detach()
        attn_mask[torch.where(attn_mask.sum(-1) == attn_mask.shape[-1])] = False
        output2 = self.cross(
            query=output + query_embed,
            key=memory + pos,
            value=memory,
            attn_mask=attn_mask,
            key_padding_mask=None,
        )[0]
        result: Tensor = self.norm(output + output2)
        return result


class PrunedTokens(nn.Module):
    """The first row of the weights chooses the tokens that remain and weighs the sum of the others."""

    def __init__(self, width: int = 32, heads: int = 4, keep_rate: float = 0.7) -> None:
        super().__init__()
        self.heads, self.scale, self.keep_rate = heads, (width // heads) ** -0.5, keep_rate
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, width * 3)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def complement(self, idx: Tensor, dim: int) -> Tensor:
        a = torch.arange(dim, device=idx.device)
        dims = idx.shape
        a = a.expand(*dims[:-1], dim)
        masked = torch.scatter(a, -1, idx, 0)
        compl, _ = torch.sort(masked, dim=-1, descending=False)
        compl = compl.permute(-1, *tuple(range(len(dims) - 1)))
        return compl[dims[-1] :].permute(*tuple(range(1, len(dims))), 0)

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        x = self.proj(x)
        left_tokens = math.ceil(self.keep_rate * (n - 1))
        cls_attn = attn[:, :, 0, 1:]
        cls_attn = cls_attn.mean(dim=1)
        _, idx = torch.topk(cls_attn, left_tokens, dim=1, largest=True, sorted=True)
        index = idx.unsqueeze(-1).expand(-1, -1, c)
        return x, index, idx, cls_attn

    def forward(self, x: Tensor) -> Tensor:
        _, n, c = x.shape
        tmp, index, idx, cls_attn = self.attention(self.norm(x))
        x = x + tmp
        non_cls = x[:, 1:]
        x_others = torch.gather(non_cls, dim=1, index=index)
        compl = self.complement(idx, n - 1)
        non_topk = torch.gather(non_cls, dim=1, index=compl.unsqueeze(-1).expand(-1, -1, c))
        non_topk_attn = torch.gather(cls_attn, dim=1, index=compl)
        extra_token = torch.sum(non_topk * non_topk_attn.unsqueeze(-1), dim=1, keepdim=True)
        return torch.cat([x[:, 0:1], x_others, extra_token], dim=1)


class RoutedWindows(nn.Module):
    """Each window gathers the keys of the windows that a product of means finds; a router's weights are dropped."""

    def __init__(self, width: int = 16, heads: int = 2, n_win: int = 2, topk: int = 2) -> None:
        super().__init__()
        self.width, self.heads, self.n_win, self.topk, self.scale = width, heads, n_win, topk, width**-0.5
        self.qkv = nn.Linear(width, width * 3)
        self.lepe = nn.Conv2d(width, width, kernel_size=5, stride=1, padding=2, groups=width)
        self.wo = nn.Linear(width, width)

    def route(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = query.detach(), key.detach()
        attn_logit = (query * self.scale) @ key.transpose(-2, -1)
        topk_logit, topk_index = torch.topk(attn_logit, k=self.topk, dim=-1)
        return F.softmax(topk_logit, dim=-1), topk_index

    def gathered(self, r_idx: Tensor, kv: Tensor) -> Tensor:
        n, p2, w2, c_kv = kv.size()
        return torch.gather(
            kv.view(n, 1, p2, w2, c_kv).expand(-1, p2, -1, -1, -1),
            dim=2,
            index=r_idx.view(n, p2, self.topk, 1, 1).expand(-1, -1, -1, w2, c_kv),
        )

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.size()
        win = self.n_win
        x = rearrange(x, "n (j h) (i w) c -> n (j i) h w c", j=win, i=win)
        q, kv = self.qkv(x).split([self.width, self.width * 2], dim=-1)
        q_pix = rearrange(q, "n p2 h w c -> n p2 (h w) c")
        kv_pix = rearrange(kv, "n p2 h w c -> n p2 (h w) c").contiguous()
        q_win, k_win = q.mean([2, 3]), kv[..., 0 : self.width].mean([2, 3])
        lepe = self.lepe(
            rearrange(kv[..., self.width :], "n (j i) h w c -> n c (j h) (i w)", j=win, i=win).contiguous()
        )
        lepe = rearrange(lepe, "n c (j h) (i w) -> n (j h) (i w) c", j=win, i=win)
        _, r_idx = self.route(q_win, k_win)
        kv_pix_sel = self.gathered(r_idx, kv_pix)
        k_pix_sel, v_pix_sel = torch.split(kv_pix_sel, [self.width, self.width], dim=-1)
        k_pix_sel = rearrange(k_pix_sel, "n p2 k w2 (m c) -> (n p2) m c (k w2)", m=self.heads)
        v_pix_sel = rearrange(v_pix_sel, "n p2 k w2 (m c) -> (n p2) m (k w2) c", m=self.heads)
        q_pix = rearrange(q_pix, "n p2 w2 (m c) -> (n p2) m w2 c", m=self.heads)
        attn_weight = (q_pix * self.scale) @ k_pix_sel
        attn_weight = F.softmax(attn_weight, dim=-1)
        out = attn_weight @ v_pix_sel
        out = rearrange(
            out,
            "(n j i) m (h w) c -> n (j h) (i w) (m c)",
            j=win,
            i=win,
            h=height // win,
            w=width // win,
        )
        out = out + lepe
        result: Tensor = self.wo(out)
        return result


class KeptBiases(nn.Module):
    """Values wider than keys, fewer queries than keys, and biases that eval() gathers once and for all."""

    attention_bias_idxs: Tensor
    ab: Tensor

    def __init__(self, width: int = 32, key_dim: int = 8, heads: int = 4, resolution: int = 4, stride: int = 2) -> None:
        super().__init__()
        self.heads, self.key_dim, self.scale, self.d = heads, key_dim, key_dim**-0.5, 2 * key_dim
        self.resolution, self.stride, self.dh = resolution, stride, 2 * key_dim * heads
        self.kv = nn.Linear(width, self.dh + key_dim * heads)
        self.q = nn.Linear(width, key_dim * heads)
        self.proj = nn.Sequential(nn.Hardswish(), nn.Linear(self.dh, width))
        points = [(i, j) for i in range(resolution) for j in range(resolution)]
        points_ = [(i, j) for i in range(resolution // stride) for j in range(resolution // stride)]
        offsets: dict[tuple[float, float], int] = {}
        idxs = []
        for p1 in points_:
            for p2 in points:
                offset = (abs(p1[0] * stride - p2[0]), abs(p1[1] * stride - p2[1]))
                idxs.append(offsets.setdefault(offset, len(offsets)))
        self.attention_biases = nn.Parameter(noise(heads, len(offsets), seed=1))
        self.register_buffer("attention_bias_idxs", torch.LongTensor(idxs).view(len(points_), len(points)))

    @torch.no_grad()
    def train(self, mode: bool = True) -> KeptBiases:
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.attention_biases[:, self.attention_bias_idxs]
        return self

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        k, v = self.kv(x).view(b, n, self.heads, -1).split([self.key_dim, self.d], dim=3)
        k = k.permute(0, 2, 1, 3)
        v = v.permute(0, 2, 1, 3)
        sub = x.view(b, self.resolution, self.resolution, c)[:, :: self.stride, :: self.stride].reshape(b, -1, c)
        q = self.q(sub).view(b, -1, self.heads, self.key_dim).permute(0, 2, 1, 3)
        attn = (q @ k.transpose(-2, -1)) * self.scale + (
            self.attention_biases[:, self.attention_bias_idxs] if self.training else self.ab
        )
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, -1, self.dh)
        result: Tensor = self.proj(x)
        return result


class ShuntedHeads(nn.Module):
    """Half of the heads for coarse keys, half for fine ones, and a convolution added to the values of each half."""

    def __init__(self, width: int = 32, heads: int = 4, size: int = 4, sr_ratio: int = 2) -> None:
        super().__init__()
        self.heads, self.size, self.sr_ratio, self.scale = heads, size, sr_ratio, (width // heads) ** -0.5
        self.q = nn.Linear(width, width)
        self.sr1, self.norm1 = nn.Conv2d(width, width, kernel_size=2, stride=2), nn.LayerNorm(width)
        self.sr2, self.norm2 = nn.Conv2d(width, width, kernel_size=1, stride=1), nn.LayerNorm(width)
        self.kv1, self.kv2 = nn.Linear(width, width), nn.Linear(width, width)
        half = width // 2
        self.local_conv1 = nn.Conv2d(half, half, kernel_size=3, padding=1, stride=1, groups=half)
        self.local_conv2 = nn.Conv2d(half, half, kernel_size=3, padding=1, stride=1, groups=half)
        self.act = nn.GELU()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h, w, heads, ratio = self.size, self.size, self.heads, self.sr_ratio
        q = self.q(x).reshape(b, n, heads, c // heads).permute(0, 2, 1, 3)
        x_ = x.permute(0, 2, 1).reshape(b, c, h, w)
        x_1 = self.act(self.norm1(self.sr1(x_).reshape(b, c, -1).permute(0, 2, 1)))
        x_2 = self.act(self.norm2(self.sr2(x_).reshape(b, c, -1).permute(0, 2, 1)))
        kv1 = self.kv1(x_1).reshape(b, -1, 2, heads // 2, c // heads).permute(2, 0, 3, 1, 4)
        kv2 = self.kv2(x_2).reshape(b, -1, 2, heads // 2, c // heads).permute(2, 0, 3, 1, 4)
        k1, v1 = kv1[0], kv1[1]
        k2, v2 = kv2[0], kv2[1]
        attn1 = (q[:, : heads // 2] @ k1.transpose(-2, -1)) * self.scale
        attn1 = attn1.softmax(dim=-1)
        attn1 = self.attn_drop(attn1)
        v1 = v1 + self.local_conv1(
            v1.transpose(1, 2).reshape(b, -1, c // 2).transpose(1, 2).view(b, c // 2, h // ratio, w // ratio)
        ).view(b, c // 2, -1).view(b, heads // 2, c // heads, -1).transpose(-1, -2)
        x1 = (attn1 @ v1).transpose(1, 2).reshape(b, n, c // 2)
        attn2 = (q[:, heads // 2 :] @ k2.transpose(-2, -1)) * self.scale
        attn2 = attn2.softmax(dim=-1)
        attn2 = self.attn_drop(attn2)
        v2 = v2 + self.local_conv2(
            v2.transpose(1, 2).reshape(b, -1, c // 2).transpose(1, 2).view(b, c // 2, h * 2 // ratio, w * 2 // ratio)
        ).view(b, c // 2, -1).view(b, heads // 2, c // heads, -1).transpose(-1, -2)
        x2 = (attn2 @ v2).transpose(1, 2).reshape(b, n, c // 2)
        x = torch.cat([x1, x2], dim=-1)
        result: Tensor = self.proj(x)
        return result


def _booleans(*shape: int, kept: int) -> Tensor:
    """True up to ``kept`` in the last row of a batch, and everywhere else."""
    mask = torch.ones(*shape, dtype=torch.bool)
    mask[-1, kept:] = False
    return mask


def _image(channels: int, size: int, name: str = "x") -> Callable[[], dict[str, Any]]:
    return lambda: {name: noise(2, channels, size, size, seed=0)}


def _tokens(length: int, width: int, name: str = "x") -> Callable[[], dict[str, Any]]:
    return lambda: {name: noise(2, length, width, seed=0)}


def _pivots() -> dict[str, Any]:
    pivots = torch.tensor([[0, 1, 2, 5], [0, 1, 3, 8]])
    seen = (torch.arange(16).view(1, 16, 1) // 4 > pivots.view(2, 1, 4) // 4 + 1).float()
    return {"x": noise(2, 16, 32, seed=0), "pivot_idx": pivots, "pivot_mask": seen}


def _video() -> dict[str, Any]:
    holes = (noise(4, 1, 8, 8, seed=1) > 0).float()
    return {"x": noise(4, 8, 8, 8, seed=0), "m": holes}


def _two_images(kept: int) -> dict[str, Any]:
    return {
        "x": noise(2, 12, 32, seed=0),
        "source": noise(2, 16, 32, seed=1),
        "x_mask": _booleans(2, 12, kept=kept),
        "source_mask": _booleans(2, 16, kept=11),
    }


def _image_and_text() -> dict[str, Any]:
    return {
        "v": noise(2, 12, 16, seed=0),
        "text": noise(2, 7, 24, seed=1),
        "attention_mask_l": _booleans(2, 7, kept=5).float(),
    }


def _memory() -> dict[str, Any]:
    return {"frames": noise(2, 2, 16, 3, 3, seed=0), "frame": noise(2, 16, 3, 3, seed=1)}


CASES: tuple[Case, ...] = (
    # One, computed a head of a picture at a time.
    Case(
        "webui-split",
        "a head at a time, written into zeros",
        1,
        SplitByHead,
        lambda: {"x": noise(2, 9, 16, seed=0), "context": noise(2, 7, 24, seed=1)},
        "AUTOMATIC1111/stable-diffusion-webui",
    ),
    Case(
        "glide",
        "channels first, keys of a text in front",
        1,
        ChannelsFirstWithText,
        lambda: {"x": noise(2, 32, 4, 4, seed=0), "encoder_out": noise(2, 24, 5, seed=1)},
        "openai/glide-text2im",
    ),
    Case(
        "stablediffusion-cross",
        "autocast off, mask of an image filled in place",
        1,
        ScoresOutsideAutocast,
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "context": noise(2, 12, 24, seed=1),
            "mask": _booleans(2, 12, kept=7).view(2, 3, 4),
        },
        "Stability-AI/stablediffusion",
    ),
    Case(
        "stablediffusion-spatial",
        "image, weights transposed by einops",
        1,
        SpatialSelfAttention,
        _image(16, 4),
        "Stability-AI/stablediffusion",
    ),
    Case(
        "taming-attn-block",
        "image, values times transposed weights",
        1,
        AttnBlock,
        _image(16, 4),
        "CompVis/taming-transformers",
    ),
    # Image and boxes, then text.
    Case(
        "gligen",
        "boxes beside the image, mask filled in place",
        2,
        GroundedBlock,
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "context": noise(2, 7, 24, seed=1),
            "objs": noise(2, 3, 24, seed=2),
            "mask": _booleans(2, 7, kept=4),
        },
        "gligen/GLIGEN",
    ),
    # The source, and the target with foreground and background in one.
    Case(
        "masactrl",
        "foreground and background as further heads",
        2,
        MutualSelfAttention,
        lambda: {
            "x": noise(2, 16, 32, seed=0),
            "mask_s": (noise(8, 8, seed=1) > 0).float(),
            "mask_t": (noise(8, 8, seed=2) > 0).float(),
        },
        "TencentARC/MasaCtrl",
    ),
    # A text, and an image whose weights are stored.
    Case(
        "ip-adapter",
        "sum of two attentions, one stored, baddbmm",
        2,
        ImagePrompt,
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "context": noise(2, 11, 24, seed=1),
            "attention_mask": _booleans(2, 7, kept=5).float(),
        },
        "tencent-ailab/IP-Adapter",
    ),
    Case(
        "tune-a-video",
        "keys of the first and the former frame",
        1,
        SparseCausalFrames,
        lambda: {"x": noise(6, 6, 32, seed=0)},
        "showlab/Tune-A-Video",
    ),
    Case("edm", "weights of an autograd function", 1, WeightsByFunction, _image(32, 4), "NVlabs/edm"),
    Case("score-sde", "rows and columns on both sides", 1, FiveAxes, _image(16, 4), "yang-song/score_sde_pytorch"),
    Case(
        "convit", "gate of two softmaxes, renormalized", 1, GatedPositional, _tokens(9, 32), "facebookresearch/convit"
    ),
    # Channels, then the class token.
    Case("xcit", "channels to channels, class token", 2, CrossCovariance, _tokens(9, 32), "facebookresearch/xcit"),
    Case(
        "focal-transformer",
        "keys of three kinds, biases in slices",
        1,
        FocalWindows,
        lambda: {"x": noise(2, 8, 8, 16, seed=0)},
        "microsoft/Focal-Transformer",
    ),
    Case("hat", "window of queries, larger window of keys", 1, OverlappingWindows, _tokens(64, 16), "XPixelGroup/HAT"),
    Case(
        "scunet",
        "heads first, mask set slice by slice",
        1,
        HeadsFirstWindows,
        lambda: {"x": noise(2, 8, 8, 32, seed=0)},
        "cszn/SCUNet",
    ),
    Case(
        "mvit", "decomposed bias written into the scores", 1, PooledDecomposed, _tokens(17, 32), "facebookresearch/mvit"
    ),
    # The class token, space, and time.
    Case(
        "motionformer",
        "softmax within frames, then over frames",
        3,
        Trajectory,
        _tokens(13, 32),
        "facebookresearch/Motionformer",
    ),
    Case(
        "bottleneck-transformers",
        "positions times queries, no scale",
        1,
        PositionsOnQueries,
        _image(16, 4),
        "leaderj1001/BottleneckTransformers",
    ),
    Case(
        "axial-deeplab",
        "batch norm of scores, weights used twice",
        1,
        AxialAttention,
        _image(32, 6),
        "csrhddlam/axial-deeplab",
    ),
    Case("ccnet", "one softmax over row and column", 1, CrissCross, _image(32, 4), "speedinghzl/CCNet"),
    Case("ccnet-pam", "softmax over the queries", 1, SoftmaxOverQueries, _image(32, 4), "speedinghzl/CCNet"),
    Case("acmix", "unfolded neighbors, product and sum", 1, UnfoldedNeighbors, _image(16, 5), "LeapLabTHU/ACmix"),
    Case("loftr", "heads last, mask of queries times keys", 1, HeadsLast, lambda: _two_images(12), "zju3dv/LoFTR"),
    Case("loftr-padded", "as before, with rows of no key", 1, HeadsLast, lambda: _two_images(9), "zju3dv/LoFTR"),
    Case("stcn", "keys by queries, squares of keys", 1, MemoryReader, _memory, "hkchengrex/STCN"),
    Case("xmem", "softmax by hand over keys in front", 1, SelectiveMemory, _memory, "hkchengrex/XMem"),
    Case(
        "l2-attention",
        "squared distances, length first, heads last",
        1,
        SquaredDistances,
        lambda: {
            "x": noise(10, 2, 16, seed=0),
            "attn_mask": torch.triu(torch.ones(10, 10), diagonal=1) * -1e12,
        },
        "facebookresearch/neural_stpp",
    ),
    # One of each iteration.
    Case(
        "slot-attention",
        "softmax over slots, renormalized over keys",
        2,
        SlotAttention,
        lambda: {"inputs": noise(2, 12, 16, seed=0), "start": noise(2, 4, 16, seed=1)},
        "evelinehong/slot-attention-pytorch",
    ),
    Case(
        "dynamic-vit",
        "exp times a policy, smoothed",
        1,
        KeptTokens,
        lambda: {"x": noise(2, 10, 32, seed=0), "policy": _booleans(2, 10, kept=6).float().unsqueeze(-1)},
        "raoyongming/DynamicViT",
    ),
    Case("dat", "sampled keys, sampled biases", 1, DeformedKeys, _image(32, 4), "LeapLabTHU/DAT"),
    Case(
        "conditional-detr",
        "contents beside positions, two masks, unread map",
        1,
        ContentAndPosition,
        lambda: {
            "tgt": noise(6, 2, 16, seed=0),
            "memory": noise(9, 2, 16, seed=1),
            "query_pos": noise(6, 2, 16, seed=2),
            "pos": noise(9, 2, 16, seed=3),
            "attn_mask": torch.eye(6, 9, dtype=torch.bool),
            "padding": ~_booleans(2, 9, kept=7),
        },
        "Atten4Vis/ConditionalDETR",
    ),
    # To the image and to the text.
    Case("glip", "both directions of clamped scores", 2, BothDirections, _image_and_text, "microsoft/GLIP"),
    Case(
        "glip-stable",
        "as before, minus the maximum of all scores",
        2,
        lambda: BothDirections(stable=True),
        _image_and_text,
        "microsoft/GLIP",
    ),
    Case(
        "mat",
        "windows with holes",
        1,
        HolesInWindows,
        lambda: {"x": noise(2, 64, 16, seed=0), "mask": (noise(2, 64, 1, seed=1) > 0).float()},
        "fenglinglwb/MAT",
    ),
    Case(
        "cogview",
        "scores times a mask",
        1,
        MultipliedMask,
        lambda: {"x": noise(2, 10, 32, seed=0), "attention_mask": torch.ones(2, 10, 10).tril()},
        "THUDM/CogView",
    ),
    Case("cogview-sparse", "one softmax over pivots and windows", 1, PivotsAndWindows, _pivots, "THUDM/CogView"),
    Case(
        "cogview-inference",
        "gathered keys, corner of the scores filled in place",
        1,
        GatheredKeys,
        lambda: {
            "x": noise(2, 16, 32, seed=0),
            "index": torch.tensor([[0, 2, 3, 13, 14, 15], [1, 2, 7, 13, 14, 15]]),
            "queries": noise(2, 3, 32, seed=1),
        },
        "THUDM/CogView",
    ),
    # One of each scale.
    Case("var-cached", "cosine, cache of the module", 3, ScalesOneByOne, _tokens(14, 32), "FoundationVision/VAR"),
    Case("var-masked", "cosine, mask added in place", 1, ScalesAtOnce, _tokens(14, 32), "FoundationVision/VAR"),
    # One of each size of patches.
    Case("sttn", "patches of frames, a fill that is lost", 2, PatchesOfFrames, _video, "researchmm/STTN"),
    # Groups to pixels, then pixels to groups.
    Case("groupvit", "hard assignment over the queries", 2, HardAssignment, _tokens(9, 32), "NVlabs/GroupViT"),
    Case("cst", "exp minus logsumexp, which is used again", 1, HashedRounds, _tokens(16, 16), "caiyuanhao1998/MST"),
    Case(
        "mst",
        "keys times queries, channels to channels",
        1,
        SpectrumByMask,
        lambda: {"x_in": noise(2, 3, 3, 32, seed=0), "mask": noise(1, 3, 3, 32, seed=1)},
        "caiyuanhao1998/MST",
    ),
    Case("ast", "softmax and squared ReLU of the same scores", 1, SparseAndDense, _tokens(16, 16), "joshyZhou/AST"),
    Case("evit", "first row of the weights chooses tokens", 1, PrunedTokens, _tokens(11, 32), "youweiliang/evit"),
    Case(
        "biformer",
        "keys of windows gathered by a router",
        1,
        RoutedWindows,
        lambda: {"x": noise(2, 4, 4, 16, seed=0)},
        "rayleizhu/BiFormer",
    ),
    Case(
        "levit-original", "biases kept by eval(), wide values", 1, KeptBiases, _tokens(16, 32), "facebookresearch/LeViT"
    ),
    # Coarse and fine keys.
    Case(
        "shunted-transformer",
        "halves of the heads, convolved values",
        2,
        ShuntedHeads,
        _tokens(16, 32),
        "OliverRensu/Shunted-Transformer",
    ),
    Case(
        "mask2former-original",
        "predicted mask, rows reset by index",
        1,
        MaskedByPrediction,
        lambda: {
            "memory": noise(16, 2, 32, seed=0),
            "pos": noise(16, 2, 32, seed=1),
            "mask_features": noise(2, 8, 1, 1, seed=2) + 0.3 * noise(2, 8, 8, 8, seed=3),
        },
        "facebookresearch/Mask2Former",
    ),
)
